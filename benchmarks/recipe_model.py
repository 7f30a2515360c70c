"""The recipe's options on a language model's harvest: recipe_model.csv.

    python -m benchmarks.recipe_model

Trains each set of options on the quick harvest, with the settings of configs/train/topk-quick.toml,
and measures L0, FVU and delta CE on held-out rows and tokens. Rows that are there are not trained
again.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import run
from sae.architectures import architecture
from sae.bench.rows import append, facts, read
from sae.commands.train import train
from sae.data.harvests import held_out_rows, load_harvested_model, open_complete
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import measure_reconstruction
from sae.training.batch_maker import LossConfig
from sae.training.config import TrainConfig
from saescope.config import Config, load, to_dict
from saescope.progress import say

MEASURED = (
    "l0", "fvu", "fvu_interval", "rows", "delta_ce", "delta_ce_interval", "kl", "kl_interval",
    "tokens",
)  # fmt: skip
FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")
COLUMNS = ("architecture", "options", "seed", "passes", *MEASURED, "cpu_s", *FACTS)
"""cpu_s: processor seconds of the training; empty where it was not all done in one go"""
RUNS: tuple[tuple[str, str], ...] = (
    ("batchtopk", "none"), ("matryoshka", "k lista tilt detach sort"), ("matryoshka", "none"),
)  # fmt: skip
TILT = 0.01


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark(Config):
    """Train with and without the options on a harvest, and measure."""

    train: str = "configs/train/topk-quick.toml"
    """The training file that settings are taken from."""
    harvest: str = "data/smollm2-135m-quick"
    """The harvest."""
    passes: float = 5.0
    """Passes over it."""
    seed: int = 0
    """Of the runs."""
    threads: int = 1
    """Threads of torch."""
    work: str = "build/recipe"
    """Folder for the runs."""
    results: str = "benchmarks/results/recipe_model.csv"
    """File that rows are added to."""


def configurations(config: ModelBenchmark) -> Iterator[tuple[str, str, TrainConfig]]:
    """Architecture, options and configuration of each run."""
    base = load(TrainConfig, config.train)
    common = {name: getattr(base.sae, name) for name in ("d_sae", "k")}
    prefixes = tuple(base.sae.d_sae // part for part in (32, 8, 2, 1))
    for kind, options in RUNS:
        fields: dict[str, Any] = dict(common)
        if kind == "matryoshka":
            fields["prefix_widths"] = prefixes
        if options != "none":
            fields |= {
                "k_start": round(2.4 * fields["k"]), "k_anneal_fraction": 1.0, "lista_eta": 0.3,
                "detach_prefixes": True, "sort_by_frequency": True,
            }  # fmt: skip
        sae = architecture(kind).Config(**fields)
        tilt = LossConfig(tilt=TILT if options != "none" else 0.0)
        values = {each: getattr(base, each) for each in to_dict(base) if hasattr(base, each)}
        yield (
            kind,
            options,
            TrainConfig.specialise({"sae": {"kind": kind}})(
                **{
                    **values,
                    "harvest": config.harvest,
                    "out": str(Path(config.work) / f"{kind}-{len(options.split())}-{config.seed}"),
                    "passes": config.passes,
                    "seed": config.seed,
                    "sae": sae,
                    "trainer": replace(base.trainer, loss=tilt),
                }
            ),
        )


def work(config: ModelBenchmark) -> None:
    """Train, measure and write what is not there yet."""
    torch.set_num_threads(config.threads)
    path = Path(config.results)
    have = {(row["architecture"], row["options"], row["seed"]) for row in read(path, COLUMNS)}
    for kind, options, each in configurations(config):
        if (kind, options, str(config.seed)) in have:
            continue
        fresh, start = not Path(each.out).exists(), time.process_time()
        sae = train(each)
        took = time.process_time() - start
        assert sae is not None
        measured = measure(each, sae)
        row = {
            "architecture": kind, "options": options, "seed": config.seed, "passes": config.passes,
            **{name: measured[name] for name in MEASURED},
            "cpu_s": round(took, 1) if fresh else "",
            **{name: value for name, value in facts("cpu").items() if name in FACTS},
        }  # fmt: skip
        append(path, [row], COLUMNS)
        say(f"{kind} ({options}): FVU {row['fvu']:.4f}, delta CE {row['delta_ce']:.4f}")


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
    run(ModelBenchmark, work)
