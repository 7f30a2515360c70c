"""The loop: exact resume at any step, telemetry, schedules, dead features, errors."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.architectures import architecture, list_architectures
from sae.architectures.topk import TopKConfig
from sae.core.base import SparseAutoencoder
from sae.core.batch import RawBatch
from sae.core.finite import check_finite
from sae.training import checkpoint
from sae.training.schedules import base_lr, default_lr, lr_factor
from sae.training.telemetry import MetricsLog, read_metrics
from sae.training.trainer import CHECKPOINT, METRICS, Trainer, TrainerConfig
from saescope.artefact import atomic_path
from saescope.errors import ArtefactError, InputError, SaescopeError
from saescope.replacing import Kind, only_files

D_IN, D_SAE, BATCH, STEPS = 8, 24, 16, 24


class Stream:
    """Endless random batches whose place is a step number."""

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            generator = torch.Generator().manual_seed(self.step)
            self.step += 1
            yield torch.randn(BATCH, D_IN, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def make_trainer(folder: Path, kind: str = "topk", tag: str = "", **settings: Any) -> Trainer:
    torch.manual_seed(0)
    names = architecture(kind).Config.__dataclass_fields__
    config = architecture(kind).Config(d_sae=D_SAE, **({"k": 3} if "k" in names else {}))
    sae = architecture(kind)(config, D_IN)
    options = {"dead_after_tokens": 3 * BATCH, "evaluate_every": 5, "checkpoint_every": 7}
    held_out = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(99))
    return Trainer(
        sae,
        Stream(),
        TrainerConfig(batch_size=BATCH, **{**options, **settings}),
        total_steps=STEPS,
        held_out=lambda: iter([held_out]),
        folder=folder,
        tag=tag,
    )


def bits(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    "kind",
    sorted(k for k, cls in list_architectures().items() if not cls.Config().needs_neighbours),
)
@pytest.mark.parametrize("kill_at", [1, 6, 7, 8, 14, 23])
def test_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kill_at: int
) -> None:
    whole = bits(make_trainer(tmp_path / "whole", kind).run())
    expected = read_metrics(tmp_path / "whole" / METRICS)
    trainer = make_trainer(tmp_path / "run", kind)
    step = trainer.train_step

    def train_step(x: torch.Tensor) -> dict[str, float]:
        if trainer.step == kill_at:
            raise Killed
        return step(x)

    monkeypatch.setattr(trainer, "train_step", train_step)
    with pytest.raises(Killed):
        trainer.run()
    resumed = make_trainer(tmp_path / "run", kind)
    assert resumed.step == kill_at // 7 * 7
    found = bits(resumed.run())
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert read_metrics(tmp_path / "run" / METRICS) == expected


def test_a_kill_while_the_checkpoint_is_written_keeps_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bits(make_trainer(tmp_path / "whole").run())
    trainer = make_trainer(tmp_path / "run")

    def save_file(*_: Any) -> None:
        if trainer.step == 14:
            raise Killed
        real(*_)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(Killed):
        trainer.run()
    monkeypatch.undo()
    resumed = make_trainer(tmp_path / "run")
    assert resumed.step == 7
    found = bits(resumed.run())
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, tag="a").run()
    with pytest.raises(InputError, match="another configuration"):
        make_trainer(tmp_path, tag="b")


def test_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    tensors = tmp_path / CHECKPOINT / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="damaged checkpoint"):
        make_trainer(tmp_path)


def test_full_disk_is_one_clear_error_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)

    def save_file(*arguments: Any) -> None:
        if trainer.step == 14:
            raise OSError(28, "No space left on device")
        real(*arguments)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(ArtefactError, match="disk is full"):
        trainer.run()
    assert checkpoint.load(tmp_path / CHECKPOINT)[1]["step"] == 7
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last"]


def test_metrics_are_written_on_held_out_rows(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 24]
    last = lines[-1]
    assert last["tokens"] == 24 * BATCH
    assert last["held_out"]["rows"] == 40
    assert last["held_out"]["l0"] <= 3
    assert 0 < last["held_out"]["fvu"] < lines[0]["held_out"]["fvu"] < 1.5
    assert last["train"].keys() >= {"loss", "fvu", "auxk", "dead", "lr", "grad_norm"}


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    MetricsLog(path, resume_step=7).append(8, fvu=0.5)
    assert read_metrics(path) == [{"step": 5}, {"step": 8, "fvu": 0.5}]


def test_dead_features_are_counted_in_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.sae.b_enc[5] = -1e6
    dead = [trainer.train_step(torch.randn(BATCH, D_IN))["dead"] for _ in range(5)]
    # not known as dead before 3 batches have passed without it
    assert dead[:3] == [None, None, None]
    assert dead[3] is not None
    assert dead[3] >= 1
    assert trainer.tokens_since_fired[5] == 5 * BATCH
    assert trainer.tokens_since_fired.min() == 0


def test_decoder_keeps_unit_norm_through_training(tmp_path: Path) -> None:
    sae = make_trainer(tmp_path).run()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_gradient_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = bits(trainer.sae)
    with pytest.raises(SaescopeError, match=r"step 0 \(loss nan\): the gradient is not finite"):
        trainer.train_step(torch.full((BATCH, D_IN), 1e30))
    same = {name: torch.equal(value, before[name]) for name, value in bits(trainer.sae).items()}
    assert all(same[name] for name in ("W_enc_T", "W_dec", "b_enc"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_found_before_anything_changes(
    tmp_path: Path, value: float
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train_step(torch.randn(BATCH, D_IN))
    x = torch.randn(BATCH, D_IN)
    x[[3, 9], 5] = value
    before, generator = bits(trainer.sae), trainer.generator.get_state()
    message = r"step 1: rows of activations that are not finite: 2 of 16, the first is row 3"
    with pytest.raises(InputError, match=message + r"; check"):
        trainer.train_step(x)
    with pytest.raises(InputError, match=message + r", of token 103;"):
        trainer.train_step(RawBatch(x, row_token=torch.arange(100, 100 + BATCH)))
    with pytest.raises(InputError, match=r"step 1: rows of targets"):
        trainer.train_step(RawBatch(torch.randn(BATCH, D_IN), target=x))
    assert all(torch.equal(each, before[name]) for name, each in bits(trainer.sae).items())
    assert torch.equal(trainer.generator.get_state(), generator)
    assert trainer.step == 1
    # a sum that overflows is no such row
    check_finite(RawBatch(torch.full((2, D_IN), 3e38)), "here")


def test_held_out_rows_that_are_not_finite_are_one_clear_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.held_out = lambda: iter([torch.full((4, D_IN), math.nan)])
    with pytest.raises(InputError, match=r"held-out rows: rows of activations .* 4 of 4"):
        trainer.run()


@pytest.mark.parametrize(
    ("optimiser", "moment", "share"), [("adam", "exp_avg", 0.1), ("signum", "momentum", 0.05)]
)
def test_gradient_is_projected_before_it_is_clipped(
    tmp_path: Path, optimiser: str, moment: str, share: float
) -> None:
    """The clipped norm must not count the part that the projection removes."""
    trainer = make_trainer(tmp_path, grad_clip=1e-3, optimiser=optimiser)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        unit = trainer.sae.W_dec.detach().clone()
        terms = trainer.train_step(torch.randn(BATCH, D_IN, generator=generator))
        if trainer.step > 1:
            continue
        # after one step the mean is the clipped gradient, times its weight
        found = {each: trainer.optimiser.state[each][moment] for each in trainer.sae.parameters()}
        norm = math.sqrt(sum(float(mean.double().square().sum()) for mean in found.values()))
        assert norm == pytest.approx(share * 1e-3, rel=1e-4)
        assert (found[trainer.sae.W_dec] * unit).sum(1).abs().max() < 1e-6 * norm
        assert terms["grad_norm"] > 1e-2
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_learning_rate_rule() -> None:
    assert base_lr(2**14) == pytest.approx(2e-4)
    assert base_lr(2**12) == pytest.approx(4e-4)
    factors = [lr_factor(step, 100, warmup=10, decay=20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[-1] == pytest.approx(1 / 20)
    assert all(b < a for a, b in pairwise(factors[80:]))


def test_the_fewer_steps_the_higher_the_default_learning_rate() -> None:
    times = [default_lr(2**12, steps) / base_lr(2**12) for steps in (1, 300, 1000, 7500, 10**6)]
    assert times == pytest.approx([8, 5, 2.75, 1, 1], rel=0.02)
    # a small dictionary takes no more than what was best of any
    assert default_lr(2**8, 300) == 8e-3
    assert default_lr(4, 300) == pytest.approx(base_lr(4), rel=0.02)
    assert default_lr(2**12, 300, "signum") == base_lr(2**12, "signum")


def test_the_default_learning_rate_stands_back_for_one_that_is_given(tmp_path: Path) -> None:
    steps = 1000
    sae = TopKConfig(d_sae=2**12, k=4)
    assert TrainerConfig().peak_lr(sae, steps) == default_lr(2**12, steps)
    assert TrainerConfig(lr=7e-3, lr_multiplier=2.0).peak_lr(sae, steps) == 7e-3
    assert TrainerConfig(lr_multiplier=1.0).peak_lr(sae, steps) == base_lr(2**12)
    chosen = TrainerConfig().with_lr(sae, steps)
    assert (chosen.lr, chosen.lr_multiplier) == (default_lr(2**12, steps), None)
    # what a run that goes on was begun with, before the length counted and since
    for lr, multiplier, peak in ((None, 1.0, base_lr(2**12)), (0.5, None, 0.5), (0.5, 1.0, 0.5)):
        recorded = {"lr": lr, "lr_multiplier": multiplier}
        again = TrainerConfig().with_lr(sae, steps, recorded)
        assert (again.lr, again.lr_multiplier) == (lr, multiplier)
        assert again.peak_lr(sae, steps) == peak
        assert TrainerConfig(lr=0.25).with_lr(sae, steps, recorded).lr == 0.25
    assert make_trainer(tmp_path / "a", lr=None).lr == default_lr(D_SAE, STEPS)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"lr": 0.0}, {"beta1": 1.0}, {"decay_fraction": 1.5}, {"grad_clip": -1.0}],
)
def test_ranges(settings: dict) -> None:
    with pytest.raises(InputError, match=f"trainer.{next(iter(settings))}"):
        TrainerConfig(**settings)


def test_atomic_folder_replaces_and_survives_failure(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    kind = Kind("a test", lambda folder: only_files(folder, ("file",)))
    for text in ("one", "two"):
        with atomic_path(target, kind, replace=True) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    assert (target / "file").read_text() == "two"

    def killed_while_writing() -> None:
        with atomic_path(target, kind, replace=True) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("three")
            raise Killed

    with pytest.raises(Killed):
        killed_while_writing()
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_training_turns_gradients_on_itself(tmp_path: Path) -> None:
    trained = bits(make_trainer(tmp_path / "on").run())
    try:
        torch.set_grad_enabled(False)  # for good, as notebooks do at their top
        again = bits(make_trainer(tmp_path / "off").run())
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_inference_mode_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match=r"inside torch\.inference_mode"):
        make_trainer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokens_are_counted_where_they_have_several_rows(tmp_path: Path) -> None:
    """With mix = "all" a token has a row at each of several layers."""
    trainer = make_trainer(tmp_path)
    rows = RawBatch(
        torch.randn(BATCH, D_IN),
        group=torch.arange(BATCH) % 4,
        row_token=torch.arange(BATCH) // 4,
    )
    dead = [trainer.train_step(rows)["dead"] for _ in range(13)]
    assert trainer.tokens == 13 * BATCH // 4
    assert int(trainer.tokens_since_fired.max()) <= trainer.tokens
    # dead_after_tokens is that of 3 batches of rows
    assert dead[:12] == [None] * 12
    assert dead[12] is not None


def test_dead_after_follows_the_length_of_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", dead_after_tokens=None, evaluate_every=1)
    assert trainer.dead_after == STEPS * BATCH // 32
    trainer.run()
    lines = read_metrics(tmp_path / "a" / METRICS)
    # less than a batch: known from the second step on
    assert [line["step"] for line in lines if line["train"]["dead"] is None] == [1]
    assert TrainerConfig().dead_after(10**9) == 10_000_000
    assert TrainerConfig(dead_after_tokens=5).dead_after(10**9) == 5
    with pytest.raises(InputError, match="dead_after_tokens"):
        TrainerConfig(dead_after_tokens=0)


def test_a_first_part_too_small_to_start_from_is_refused(tmp_path: Path) -> None:
    config = TrainerConfig(batch_size=BATCH, accumulate=BATCH)
    cls = architecture("archetypal")
    sae = cls(cls.Config(d_sae=D_SAE, k=4, n_candidates=5), D_IN)  # type: ignore[call-arg]
    with pytest.raises(
        InputError, match=r"1 in the first of 16 micro-batches'; allowed: at least 2"
    ):
        Trainer(
            sae,
            make_trainer(tmp_path / "other").batches,
            config,
            total_steps=3,
            held_out=list,
            folder=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
