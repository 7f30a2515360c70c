"""What a KL finish is worth: an SAE before and after one, on the same tokens of the same harvest.

    python -m benchmarks.finish

Trains the run of a training file, fine-tunes its SAE through the model at some rates (`start_from`,
`finish.fraction = 1`), and trains the run again with such a finish as its last part (`tokens`).
The null of a fine-tuning is as much further training on stored rows, of the same batches and rate
(`further`). Each is measured on all held-out tokens beside the run without a finish, and on
training sequences that it has not read, where there are such, so that rates can be compared without
the held-out ones. Every difference is of the same tokens; its interval is over documents. Run
again, it goes on.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationStore
from benchmarks.running import run
from sae.bench.rows import append, facts, read
from sae.commands.train import train
from sae.core.base import SparseAutoencoder
from sae.data.harvests import held_out_rows, load_harvested_model, open_complete
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.in_model import Splice
from sae.evaluation.intervals import ratio
from sae.evaluation.reconstruction import measure_reconstruction
from sae.formats.load import SAE_FOLDER
from sae.training.config import TrainConfig
from sae.training.finish import FinishConfig
from saescope.config import Config, load
from saescope.errors import check_range
from saescope.progress import Progress, say

FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")
LOSSES = (
    "delta_ce", "delta_ce_interval", "delta_ce_change", "delta_ce_change_interval",
    "kl", "kl_interval", "kl_change", "kl_change_interval",
)  # fmt: skip
COLUMNS = (
    "run", "seed", "batch_size", "lr_multiplier", "finish_lr_multiplier", "trained_tokens",
    "finish_tokens", "l0", "fvu", "fvu_interval", "rows", *LOSSES, "tokens",
    *(f"unread_{name}" for name in LOSSES), "unread_tokens", "cpu_s", *FACTS,
)  # fmt: skip
"""_change: from the run without a finish; unread_: on training sequences that no finish has read;
lr_multiplier: of the run itself, of which a fine-tuning makes no use; cpu_s: processor seconds of
the training, empty where it was not all done in one go"""
_BATCH = 4
"""sequences that go through the model at once where they are measured"""


@dataclass(frozen=True, kw_only=True)
class FinishBenchmark(Config):
    """Compare SAEs with and without a finish."""

    train: str = "configs/train/topk-quick.toml"
    """The training file."""
    harvest: str = "data/smollm2-135m-quick"
    """The harvest."""
    tuned_tokens: tuple[int, ...] = (25_600,)
    """Further tokens for the run without a finish."""
    tuned_batch: int = 256
    """Rows a step of these: few tokens want many steps."""
    lr_multipliers: tuple[float, ...] = (0.5, 1.0)
    """Rates that they begin with, each for each number of tokens."""
    further: bool = False
    """Whether as much further training on stored rows is measured instead of the fine-tunings."""
    tokens: tuple[int, ...] = ()
    """Lengths of the finish as the last part of the run, in tokens."""
    unread: int = 28
    """Training sequences that no finish reads."""
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
        check_range("unread", self.unread, low=1)


def configurations(config: FinishBenchmark) -> Iterator[TrainConfig]:
    """The runs, each in a folder of its name; first that without a finish."""
    base = replace(load(TrainConfig, config.train), harvest=config.harvest, seed=config.seed)
    rows = open_complete(config.harvest).n_rows("train")
    work = Path(config.work) / f"seed-{config.seed}"
    plain = work / "plain"
    yield replace(base, out=str(plain))
    for tokens in config.tuned_tokens:
        for multiplier in config.lr_multipliers:
            longer = replace(
                base,
                passes=(tokens + config.tuned_batch / 2) / rows,
                start_from=str(plain / SAE_FOLDER),
                trainer=replace(base.trainer, batch_size=config.tuned_batch),
            )
            if config.further:
                yield _further(longer, multiplier, work / f"further-{tokens}-from-{multiplier:g}")
            else:
                out = work / f"fine-tuned-{tokens}-from-{multiplier:g}"
                finish = FinishConfig(objective="kl", fraction=1.0, lr_multiplier=multiplier)
                yield replace(longer, out=str(out), finish=finish)
    for tokens in config.tokens:
        finish = FinishConfig(objective="kl", tokens=tokens)
        name = f"finish-{tokens}-from-{finish.lr_multiplier:g}"
        yield replace(base, out=str(work / name), finish=finish)


def _further(longer: TrainConfig, multiplier: float, out: Path) -> TrainConfig:
    """A run on stored rows whose rate is that of a finish: from its own, linearly to 0."""
    trainer = replace(
        longer.trainer, lr_multiplier=multiplier, warmup_fraction=0.0, decay_fraction=1.0
    )
    return replace(longer, out=str(out), trainer=trainer)


def work(config: FinishBenchmark) -> None:
    """Train, measure and write what is not there yet."""
    torch.set_num_threads(config.threads)
    path = Path(config.results)
    have = {(row["run"], row["seed"]) for row in read(path, COLUMNS)}
    plain, *others = configurations(config)
    for each in (plain, *others):
        name = Path(each.out).name
        if (name, str(config.seed)) in have:
            continue
        fresh, start = not Path(each.out).exists(), time.process_time()
        sae = train(each)
        took = time.process_time() - start
        assert sae is not None
        trained = sae.metadata["tokens_trained"]
        after = sae.metadata.get("finish", {}).get("after_tokens", trained)
        row = {
            "run": name,
            "seed": config.seed,
            "batch_size": each.trainer.batch_size,
            "lr_multiplier": each.trainer.lr_multiplier,
            "finish_lr_multiplier": each.finish.lr_multiplier if each.finish.objective else "",
            "trained_tokens": trained,
            "finish_tokens": trained - after,
            **_measured(config, sae, Path(each.out), Path(plain.out), trained - after),
            "cpu_s": round(took, 1) if fresh else "",
            **{key: value for key, value in facts("cpu").items() if key in FACTS},
        }
        append(path, [row], COLUMNS)
        say(f"{name}: delta CE {row['delta_ce']:.4f}, FVU {row['fvu']:.4f}, {took:.0f} s")


def _measured(
    config: FinishBenchmark, sae: SparseAutoencoder, out: Path, plain: Path, finish_tokens: int
) -> dict[str, Any]:
    """The columns of an SAE: of all held-out rows and tokens, and of unread sequences.

    A finish of so many tokens that it comes to these has no columns of them, nor has what is
    trained further on stored rows of all sequences.
    """
    harvest = open_complete(config.harvest)
    left = unread(harvest, config.seed, config.unread)
    others = harvest.n_rows("train") - int(harvest.keep[left].sum())
    has_unread = out == plain or 0 < finish_tokens <= others
    found = asdict(measure_reconstruction(sae, held_out_rows(harvest, _site(sae), None)))
    columns = {name: found[name] for name in ("l0", "fvu", "fvu_interval", "rows")}
    for prefix, sequences in (
        ("", np.flatnonzero(harvest.split == 1)),
        *([("unread_", left)] if has_unread else []),
    ):
        file = f"{prefix}losses.pt"
        losses = token_losses(harvest, sae, sequences)
        torch.save(losses, out / file)
        before = None if out == plain else torch.load(plain / file)
        found = summary(losses, before)
        columns |= {f"{prefix}{name}": value for name, value in found.items()}
    return columns


def unread(harvest: ActivationStore, seed: int, count: int) -> NDArray[np.int64]:
    """The training sequences that a finish of this seed reads last: those it does not come to."""
    order = np.random.default_rng((seed, 0)).permutation(np.flatnonzero(harvest.split == 0))
    return np.sort(order[-count:])


def token_losses(
    harvest: ActivationStore, sae: SparseAutoencoder, sequences: NDArray[np.int64]
) -> dict[str, Tensor]:
    """delta_ce and kl of each token of some sequences, and its document: each [tokens]."""
    model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
    splice = Splice(model, [_site(sae)], [_site(sae)])
    parts: dict[str, list[Tensor]] = {"delta_ce": [], "kl": [], "document": []}
    with torch.inference_mode(), Progress("measuring", len(sequences), "sequences") as progress:
        for start in range(0, len(sequences), _BATCH):
            chosen = sequences[start : start + _BATCH]
            tokens = torch.from_numpy(harvest.tokens[chosen]).long()
            keep = torch.from_numpy(harvest.keep[chosen])
            document = torch.from_numpy(harvest.document[chosen]).long()
            counted, following = keep[:, :-1], tokens[:, 1:]
            with splice.reading(keep):
                clean = model.logits(tokens)[:, :-1][counted].float()
            with splice.replacing(lambda x: sae(x).x_hat, keep):
                other = model.logits(tokens)[:, :-1][counted].float()
            next_ = following[counted]
            parts["delta_ce"].append(_cross_entropy(other, next_) - _cross_entropy(clean, next_))
            parts["kl"].append(divergence_in_place(clean, other).double())
            parts["document"].append(document[:, :-1][counted])
            progress.advance(len(chosen))
    return {name: torch.cat(each) for name, each in parts.items()}


def summary(losses: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, Any]:
    """Means of `token_losses`, and their changes from `before`, of the same tokens."""
    document = losses["document"]
    one = torch.ones(len(document), dtype=torch.float64)
    found: dict[str, Any] = {"tokens": len(document)}
    for name in ("delta_ce", "kl"):
        found[name], found[f"{name}_interval"] = ratio(losses[name], one, document)
        change: tuple[float | None, float | None] = (None, None)
        if before is not None:
            change = ratio(losses[name] - before[name], one, document)
        found[f"{name}_change"], found[f"{name}_change_interval"] = change
    return found


def _cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """[tokens]"""
    return torch.nn.functional.cross_entropy(logits, following, reduction="none").double()


def _site(sae: SparseAutoencoder) -> str:
    return str(sae.metadata["site"])


if __name__ == "__main__":
    run(FinishBenchmark, work)
