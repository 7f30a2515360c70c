"""What each process runs that tests/unit/test_ranks.py starts: jobs, one after another."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae import distributed
from sae.architectures import architecture
from sae.core.base import SparseAutoencoder
from sae.core.batch import RawBatch
from sae.distributed import FEATURES
from sae.kernels import global_topk, reference_backend, selection
from sae.training import process_group
from sae.training.batch_maker import LossConfig
from sae.training.trainer import Trainer, TrainerConfig
from saescope.errors import InputError

D_IN, D_SAE, BATCH, STEPS = 8, 25, 17, 8
"""no number of rows or features that ranks could share evenly"""

CASES: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk"},
    "topk_multi": {"kind": "topk", "sae": {"multi_topk_coefficient": 0.125, "k_start": 6}},
    "abstopk": {"kind": "abstopk"},
    "relu": {"kind": "relu"},
    "relu_levels": {
        "kind": "relu",
        "sae": {"p_end": 0.5, "p_from": 0.1, "l1_coefficient": 0.5, "decoder_norm_weighted": False},
    },
    "relu_resampled": {"kind": "relu", "sae": {"resample_at": (0.5,), "l1_coefficient": 0.5}},
    "jumprelu": {"kind": "jumprelu"},
    "jumprelu_tanh": {"kind": "jumprelu", "sae": {"penalty": "tanh", "parametrisation": "log"}},
    "jumprelu_steered": {"kind": "jumprelu", "trainer": {"target_l0": 16.0}},
    "jumprelu_quadratic": {"kind": "jumprelu", "sae": {"penalty": "quadratic", "l0_target": 4.0}},
    "jumprelu_frequency": {"kind": "jumprelu", "sae": {"frequency_scale": 0.05}},
    "gated": {"kind": "gated"},
    "batchtopk": {"kind": "batchtopk"},
    "mutual_choice": {"kind": "mutual_choice", "sae": {"auxiliary": "auxk"}},
    "mutual_choice_zipf": {"kind": "mutual_choice", "sae": {"ema_decay": 0.5}},
    "feature_choice": {"kind": "feature_choice", "sae": {"phase_one": 0.5, "ema_decay": 0.5}},
    "matryoshka": {"kind": "matryoshka"},
    "matryoshka_levels": {"kind": "matryoshka", "sae": {"aux_per_level": True}},
    "msae": {"kind": "msae"},
    "matching_pursuit": {"kind": "matching_pursuit"},
    "archetypal": {"kind": "archetypal", "sae": {"n_candidates": 5}},
    "csr": {"kind": "csr"},
    "csr_class": {"kind": "csr", "sae": {"positives": "class"}, "labels": True},
    "temporal": {"kind": "temporal", "sae": {"temporal_coefficient": 1.0}, "neighbours": True},
    "crosscoder": {"kind": "crosscoder"},
    "crosscoder_batchtopk": {"kind": "crosscoder", "sae": {"activation": "batchtopk"}},
    "transcoder": {"kind": "transcoder", "target": True},
    "transcoder_relu": {"kind": "transcoder", "sae": {"activation": "relu"}, "target": True},
    "skip_transcoder": {"kind": "skip_transcoder", "target": True},
    "tilted": {"kind": "topk", "trainer": {"loss": {"tilt": 2.0}}},
    "masked": {"kind": "topk", "trainer": {"loss": {"visible_fraction": 0.75}}},
    "in_parts": {"kind": "batchtopk", "trainer": {"accumulate": 2}},
    "signum": {"kind": "topk", "trainer": {"optimiser": "signum"}},
    "schedule_free": {"kind": "topk", "trainer": {"optimiser": "schedule_free_adam"}},
    "wide": {"kind": "topk", "sae": {"d_sae": 401, "k": 2}},
    "float32": {"kind": "topk", "dtype": "float32"},
}
"""In float64 unless said otherwise, so that what is wrong cannot pass for rounding."""
BY_FEATURE = (
    "topk_multi", "abstopk", "relu_levels", "jumprelu", "jumprelu_tanh", "jumprelu_quadratic",
    "jumprelu_frequency", "gated", "batchtopk", "mutual_choice", "tilted", "masked",
    "schedule_free", "wide", "float32",
)  # fmt: skip
"""cases whose features ranks can share out"""


class Stream:
    """Endless random batches whose place is a step number."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.step, self.case = 0, case

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            generator = torch.Generator().manual_seed(self.step)
            self.step += 1
            labels = torch.randint(4, (BATCH,), generator=generator)
            x = torch.randn(BATCH, D_IN, generator=generator)
            if self.case.get("neighbours"):
                labels = torch.arange(BATCH) // 2 * 5 + torch.arange(BATCH) % 2
            elif not self.case.get("labels"):
                labels = None
            yield rows_of(self.case, x, labels)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def rows_of(case: dict[str, Any], x: torch.Tensor, labels: torch.Tensor | None) -> RawBatch:
    """A case's batch of rows x, in its precision, with what a transcoder is to predict."""
    x = x.to(getattr(torch, case.get("dtype", "float64")))
    return RawBatch(x, x.roll(1, 1).abs() if case.get("target") else None, labels=labels)


class Stopped(Exception):
    """Stands for a kill."""


def make(name: str, folder: Path) -> Trainer:
    """A case's trainer into a folder."""
    case = CASES[name]
    torch.manual_seed(0)
    cls = architecture(case["kind"])
    known = cls.Config.__dataclass_fields__
    options = {"d_sae": D_SAE, **({"k": 3} if "k" in known else {}), **case.get("sae", {})}
    sae = cls(cls.Config(**options), D_IN).to(getattr(torch, case.get("dtype", "float64")))
    settings = dict(case.get("trainer", {}))
    if "loss" in settings:
        settings["loss"] = LossConfig(**settings["loss"])
    held_out = torch.randn(41, D_IN, generator=torch.Generator().manual_seed(99))
    return Trainer(
        sae,
        Stream(case),
        TrainerConfig(
            batch_size=BATCH, dead_after_tokens=2 * BATCH, evaluate_every=4, checkpoint_every=3,
            lr=3e-3, **settings,
        ),
        total_steps=STEPS,
        held_out=lambda: iter([rows_of(case, held_out, None)]),
        folder=folder,
    )  # fmt: skip


def train(name: str, folder: Path, *, stop_at: int | None = None) -> dict[str, Any]:
    """Train a case from its last checkpoint; what is to be compared."""
    trainer, losses = make(name, folder), {}
    step = trainer.train_step

    def train_step(raw: RawBatch) -> dict[str, float]:
        if trainer.step == stop_at:
            raise Stopped
        losses[str(trainer.step)] = found = step(raw)
        if hasattr(trainer.sae, "threshold"):  # a running mean, which the end replaces
            found["threshold"] = float(whole(trainer.sae)["threshold"].sum())
        return found

    trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        trainer.run()
    except Stopped:
        return {"losses": losses}
    held_out = {k: v for k, v in trainer.last_held_out.items() if isinstance(v, float)}
    return {"losses": losses, "held_out": held_out, "weights": whole(trainer.sae)}


def whole(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """All ranks' weights."""
    return {
        name: (FEATURES.gather(value) if value.ndim and name in sae.by_feature else value).clone()
        for name, value in sae.state_dict().items()
    }


def contests(split: str) -> None:
    """What each rank keeps of integers, which tie often, is its part of what one process keeps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (13, 5), generator=generator).float()
    W = torch.randint(-2, 3, (11, 5), generator=generator).float()
    b, quota = torch.zeros(11), torch.randint(0, 6, (11,), generator=generator)
    rows, features = distributed.ROWS.share(13), FEATURES.share(11)
    plain: Any = reference_backend
    for n in (1, 7, 20, 60, 500):
        for hint in (0.0, 2.0, 100.0):
            with distributed.alone():
                expected = selection.top_of_batch(plain, x, W, b, n).dense()
            mine = (x[rows], W[features], b[features])
            found = selection.top_of_batch(plain, *mine, n, hint=hint)
            own = expected[rows][:, features]
            if split == "rows":  # of equals the first in the order of rows, as in one process
                assert torch.equal(found.dense(), own), (n, hint)
            assert distributed.ALL.total(len(found.value)) == int((expected > 0).sum())
            assert distributed.ALL.sum(found.value.sum()) == expected.sum()
    if split == "rows":
        for hint in (0.0, 1.0, 100.0):
            hints = torch.full((11,), hint)
            with distributed.alone():
                expected = selection.top_of_features(plain, x, W, b, quota, hints)
            found = selection.top_of_features(plain, x[rows], W, b, quota, hints)
            assert torch.equal(found.dense(), expected.dense()[rows])
    if split == "features":
        pre = (x @ W.T).relu()
        for k in (1, 3, 8, 11, 20):
            kept = global_topk.largest_of_rows(pre[:, features], k)
            everywhere = FEATURES.gather(kept.T.contiguous()).T
            assert everywhere.sum(1).tolist() == [min(k, 11)] * 13
            best = torch.where(everywhere, pre, 0.0).sum(1)
            assert torch.equal(best, pre.topk(min(k, 11), 1).values.sum(1))


def run(job: dict[str, Any]) -> None:
    """One job, on every rank."""
    distributed.arrange(job["split"])
    name, folder = job["case"], Path(job["folder"])
    if name == "contests":
        contests(job["split"])
        return
    if name == "refused":
        try:
            make(job["of"], folder)
        except InputError as error:
            assert job["message"] in str(error), str(error)  # noqa: PT017
            return
        raise AssertionError("was not refused")
    if name == "fails_on_one":
        fails_on_one(folder)
    found = train(name, folder, stop_at=job.get("stop_at"))
    weights = found.pop("weights", {})
    if process_group.first():
        save_file(weights, folder / "found.safetensors")
        (folder / "found.json").write_text(json.dumps(found))


def fails_on_one(folder: Path) -> None:
    """The second rank fails at a step at which the first already waits for it."""
    trainer = make("topk", folder)
    for raw in Stream(CASES["topk"]):
        if trainer.step == 3 and not process_group.first():
            raise InputError("cannot be read", where="a row of the second rank")
        trainer.train_step(raw)


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with process_group.session():
        for job in jobs:
            run(job)
    left = [name for name in threads() if "gloo" in name]
    assert not left, f"threads of a group that has ended: {left}"


def threads() -> list[str]:
    """Names of this process's threads, those of C++ included, where Linux tells."""
    return [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    main()
