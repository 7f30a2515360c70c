"""What a KL finish is worth: runs of as many tokens with and without one, on the same harvest.

    python -m benchmarks.finish

Trains the runs of a training file, one without a finish and one for each length of it, measures
each on all held-out rows and tokens, and adds a row to the results. A second group, `fine-tuned`,
gives the run without a finish further tokens through the model (start_from). Run again, it goes on.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import run
from sae.bench.rows import append, facts, read
from sae.commands.train import train
from sae.data.harvests import held_out_rows, load_harvested_model, open_complete
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import measure_reconstruction
from sae.formats.load import SAE_FOLDER
from sae.training.config import TrainConfig
from sae.training.finish import FinishConfig
from saescope.config import Config, load
from saescope.errors import check_range
from saescope.progress import say

MEASURED = (
    "l0", "fvu", "fvu_interval", "rows", "delta_ce", "delta_ce_interval", "kl", "kl_interval",
    "recovered_mean", "tokens",
)  # fmt: skip
FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")
COLUMNS = (
    "run",
    "seed",
    "batch_size",
    "lr_multiplier",
    "trained_tokens",
    "finish_tokens",
    *MEASURED,
    "cpu_s",
    *FACTS,
)
"""cpu_s: processor seconds of the training; empty where it was not all done in one go"""


@dataclass(frozen=True, kw_only=True)
class FinishBenchmark(Config):
    """Compare runs with and without a finish."""

    train: str = "configs/train/topk-quick.toml"
    """The training file."""
    harvest: str = "data/smollm2-135m-quick"
    """The harvest."""
    tokens: tuple[int, ...] = (51_200,)
    """Lengths of the finish, in tokens."""
    tuned_tokens: tuple[int, ...] = (25_600,)
    """Further tokens for the run without a finish."""
    tuned_batch: int = 256
    """Rows a step of these: few tokens want many steps."""
    tuned_lr_multiplier: float = 0.25
    """Of the learning rate at their start, which falls to 0."""
    seed: int = 0
    """Of the runs."""
    threads: int = 1
    """Threads of torch."""
    work: str = "build/finish"
    """Folder for the runs."""
    results: str = "benchmarks/results/finish.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)


def configurations(config: FinishBenchmark) -> Iterator[TrainConfig]:
    """The runs, each in a folder of its name."""
    base = replace(load(TrainConfig, config.train), harvest=config.harvest, seed=config.seed)
    rows = open_complete(config.harvest).n_rows("train")
    work = Path(config.work) / f"seed-{config.seed}"
    plain = work / "plain"
    yield replace(base, out=str(plain))
    for tokens in config.tokens:
        finish = FinishConfig(objective="kl", tokens=tokens)
        yield replace(base, out=str(work / f"finish-{tokens}"), finish=finish)
    for tokens in config.tuned_tokens:
        trainer = replace(
            base.trainer,
            batch_size=config.tuned_batch,
            lr_multiplier=config.tuned_lr_multiplier,
            warmup_fraction=0.0,
            decay_fraction=1.0,
        )
        yield replace(
            base,
            out=str(work / f"fine-tuned-{tokens}-lr{config.tuned_lr_multiplier:g}"),
            passes=(tokens + config.tuned_batch / 2) / rows,
            start_from=str(plain / SAE_FOLDER),
            finish=FinishConfig(objective="kl", fraction=1.0),
            trainer=trainer,
        )


def work(config: FinishBenchmark) -> None:
    """Train, measure and write what is not there yet."""
    torch.set_num_threads(config.threads)
    path = Path(config.results)
    have = {(row["run"], row["seed"]) for row in read(path, COLUMNS)}
    for each in configurations(config):
        name = Path(each.out).name
        if (name, str(config.seed)) in have:
            continue
        fresh, start = not Path(each.out).exists(), time.process_time()
        sae = train(each)
        took = time.process_time() - start
        assert sae is not None
        measured = measure(each, sae)
        trained = sae.metadata["tokens_trained"]
        after = sae.metadata.get("finish", {}).get("after_tokens", trained)
        row = {
            "run": name,
            "seed": config.seed,
            "batch_size": each.trainer.batch_size,
            "lr_multiplier": each.trainer.lr_multiplier,
            "trained_tokens": trained,
            "finish_tokens": trained - after,
            **{key: measured[key] for key in MEASURED},
            "cpu_s": round(took, 1) if fresh else "",
            **{key: value for key, value in facts("cpu").items() if key in FACTS},
        }
        append(path, [row], COLUMNS)
        say(f"{name}: delta CE {row['delta_ce']:.4f}, FVU {row['fvu']:.4f}, {took:.0f} s")


def measure(config: TrainConfig, sae: Any) -> dict[str, Any]:
    """Of all held-out rows and tokens, without what the model may do at other positions."""
    harvest = open_complete(config.harvest)
    model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
    site = str(sae.metadata["site"])
    held_out = torch.from_numpy(harvest.split == 1).nonzero()[:, 0].numpy()
    found = measure_reconstruction(sae, held_out_rows(harvest, site, None))
    downstream = measure_downstream(
        model,
        site,
        lambda x: sae(x).x_hat,
        torch.from_numpy(harvest.statistics(site).mean),
        torch.from_numpy(harvest.tokens[held_out]).long(),
        torch.from_numpy(harvest.keep[held_out]),
        document=torch.from_numpy(harvest.document[held_out]).long(),
    )
    return {**asdict(found), **asdict(downstream)}


if __name__ == "__main__":
    run(FinishBenchmark, work)
