"""Training on rows in memory: one call, whatever has the rows, with nothing left on the disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from sae.architectures.topk import TopKConfig
from sae.commands.examination import examine
from sae.evaluation.reconstruction import measure_reconstruction
from sae.training.run_folder import read_run
from sae.training.trainer import Trainer
from saescope.errors import InputError

D_IN = 12
SETTINGS: dict[str, Any] = {"d_sae": 24, "batch_size": 64, "passes": 4, "deterministic": True}


def planted(rows: int = 1200) -> torch.Tensor:
    """Sums of 3 of 24 directions, scaled far from 1."""
    source = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=source), dim=1)
    active = torch.rand(rows, 24, generator=source).argsort(1) < 3
    return 50 * (active * (0.5 + torch.rand(rows, 24, generator=source))) @ directions


X = planted()


def same(a: sae.SparseAutoencoder, b: sae.SparseAutoencoder) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], other[name]) for name in mine)


def test_it_learns_and_is_measured_on_rows_it_never_saw() -> None:
    settings: dict[str, Any] = {**SETTINGS, "k": 3, "lr": 3e-3}
    short = sae.train(X, "topk", **{**settings, "passes": 0.1})
    trained = sae.train(X, "topk", **{**settings, "passes": 30})
    held_out = trained.metadata["held_out"]
    assert held_out["rows"] == 60
    assert held_out["fvu"] < 0.5 * short.metadata["held_out"]["fvu"]
    assert held_out["l0"] == 3
    assert trained.normaliser.kind == "none"  # folded: it takes the rows' own units
    found = measure_reconstruction(trained, lambda: iter([X]))
    assert found.fvu == pytest.approx(held_out["fvu"], rel=0.5)
    assert trained.metadata["rows"]["rows"] == 1200


def test_what_needs_neighbouring_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"^config: needs neighbouring tokens, .*temporal"):
        sae.train(X, "temporal", d_sae=24, k=3)


@pytest.mark.parametrize(
    "kind",
    sorted(
        kind
        for kind, cls in sae.list_architectures().items()
        if not (cls.concatenates or cls.Config().needs_neighbours)
    ),
)
def test_every_architecture_trains(kind: str) -> None:
    cls = sae.list_architectures()[kind]
    more = {"target": X.roll(1, dims=1)} if cls.transcodes else {}
    names = {field.name for field in dataclasses.fields(cls.Config)}
    small = {"k": 3, "n_candidates": 32, "multi_topk": 2, "ks": (3, 24)}
    more |= {name: value for name, value in small.items() if name in names}
    trained = sae.train(X, kind, **{**SETTINGS, "passes": 1}, **more)
    assert not trained.training
    assert trained.metadata["held_out"]["rows"] > 0
    assert torch.isfinite(trained(X).x_hat).all()


def test_thresholds_are_measured() -> None:
    trained = sae.train(X, "batchtopk", k=3, **SETTINGS)
    assert float(trained.encode_sparse(X).l0().float().mean()) == pytest.approx(3, rel=0.3)


def test_arrays_and_tensors_and_their_dtypes_are_one() -> None:
    expected = sae.train(X, "topk", k=3, **SETTINGS)
    assert same(expected, sae.train(X.numpy(), "topk", k=3, **SETTINGS))
    assert same(expected, sae.train(X.flip(0).numpy()[::-1], TopKConfig(d_sae=24, k=3), **SETTINGS))
    low = X.bfloat16()
    found = sae.train(low, {"kind": "topk", "d_sae": 24, "k": 3}, **SETTINGS)
    assert same(found, sae.train(low.float(), "topk", k=3, **SETTINGS))


def test_rows_mapped_from_a_file_are_not_read_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert same(sae.train(mapped, k=3, **SETTINGS), sae.train(X, k=3, **SETTINGS))


def test_nothing_is_written_but_to_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = sae.train(X, k=3, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    out = sae.train(X, k=3, out=tmp_path / "run", **SETTINGS)
    assert same(trained, out)
    loaded = sae.load(tmp_path / "run")
    assert same(loaded, trained)
    assert loaded.metadata["held_out"] == trained.metadata["held_out"]


def test_its_folder_is_found_undamaged_of_this_version_and_of_older_ones(tmp_path: Path) -> None:
    sae.train(X, "topk", k=3, out=tmp_path / "run", **{**SETTINGS, "passes": 1})
    assert examine(tmp_path / "run", "run").faults == []
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "site": "another"}))
    assert [file for file, *_ in examine(tmp_path / "run", "run").faults] == ["manifest.json"]
    del manifest["sha256"]  # older versions sealed no manifest of a run on rows
    path.write_text(json.dumps(manifest))
    assert examine(tmp_path / "run", "run").faults == []


def test_an_interrupted_run_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**SETTINGS, "k": 3, "checkpoint_every": 5, "out": tmp_path / "run"}
    step, seen = Trainer.train_step, []

    def interrupted(self: Trainer, raw: Any) -> Any:
        seen.append(self.step)
        if len(seen) == 13:
            raise KeyboardInterrupt
        return step(self, raw)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sae.train(X, "topk", **settings)
    found = sae.train(X, "topk", **settings)
    assert seen[12:14] == [12, 10]
    assert same(found, sae.train(X, "topk", **{**settings, "out": None}))
    seen.clear()
    assert same(sae.train(X, "topk", **settings), found)
    assert seen == []
    with pytest.raises(InputError, match="holds another run"):
        sae.train(X[:600], "topk", **settings)


def test_its_learning_rate_follows_its_length_and_a_begun_run_keeps_its_own(tmp_path: Path) -> None:
    sae.train(X, "topk", k=3, out=tmp_path / "new", **SETTINGS)
    manifest = read_run(tmp_path / "new")
    assert manifest["learning_rate"]["from"] == "the steps"
    assert manifest["learning_rate"]["peak"] == manifest["config"]["trainer"]["lr"]
    older = sae.train(X, "topk", k=3, out=tmp_path / "older", lr_multiplier=1.0, **SETTINGS)
    again = sae.train(X, "topk", k=3, out=tmp_path / "older", **SETTINGS)
    assert same(again, older)
    assert not same(again, sae.load(tmp_path / "new"))


def damaged(row: int, value: float) -> torch.Tensor:
    x = X.clone()
    x[row, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "config", "settings", "message"),
    [
        (X.double(), "topk", {}, r"x: would lose digits.*x\.float\(\).*given: 'float64'"),
        (X.double().numpy(), "topk", {}, r'x\.astype\("float32"\)'),
        (X.int(), "topk", {}, "given: 'int32'"),
        (X[0], "topk", {}, r"x: is not rows of activations \(given: 'shape \(12,\)'"),
        (X[:0], "topk", {}, "shape"),
        (X[:1], "topk", {}, "too few rows"),
        (X.tolist(), "topk", {}, "x: is no array"),
        (damaged(700, float("nan")), "topk", {}, "x: a row is not finite .given: 'row 700"),
        (damaged(701, float("inf")).numpy(), "topk", {}, "row 701"),
        (X, "topq", {}, "no such architecture"),
        (X, {"kind": "topk", "kk": 3}, {}, "unknown key 'kk'"),
        (X, sae.TrainConfig(harvest="a", out="b"), {}, "is no configuration of an architecture"),
        (X, "topk", {"kk": 3}, "no such setting .given: 'kk"),
        (X, "topk", {"batch_size": 5000}, "fewer training rows than one batch"),
        (X, "topk", {"target": X}, "reconstructs what it reads"),
        (X, "transcoder", {}, "needs target"),
        (X, "transcoder", {"target": X[1:]}, "another number of rows"),
        (X, "crosscoder", {}, "from_arrays"),
        (X, "topk", {"held_out_fraction": 0.0}, "held_out_fraction"),
        (X, "topk", {"telemetry": "tensorboard"}, "telemetry"),
    ],
)
def test_wrong_input_is_one_clear_error(x: Any, config: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sae.train(x, config, **settings)


def test_a_configuration_is_of_a_harvest() -> None:
    with pytest.raises(InputError, match="is no configuration of a run"):
        sae.train(config="topk")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="settings stand beside rows"):
        sae.train(sae.TrainConfig(harvest="a", out="b"), k=3)  # type: ignore[call-overload]
