"""No command replaces or empties what is not its own kind of artefact; a full disk is one line."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activations import CorpusConfig, HarvestConfig, ModelConfig
from activations import harvest as run_harvest
from sae import EvaluateConfig, IndexConfig, TrainConfig, evaluate, index, load, train
from sae.bench import rows
from sae.commands.convert import ConvertConfig, convert
from sae.commands.sweep import SweepConfig, members
from sae.formats import formats
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

TO = sorted(set(formats()) - {"gemma_scope", "circuit_tracer"})  # which hold no TopK


def train_config(root: Path, out: Path, **more: Any) -> TrainConfig:
    values = {
        "harvest": str(root / "data" / "harvest"), "out": str(out), "passes": 0.2,
        "sae": {"kind": "topk", "d_sae": 64, "k": 4}, "trainer": {"batch_size": 64}, **more,
    }  # fmt: skip
    return from_dict(TrainConfig.specialise(values), values, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, harvest and run."""
    folder = tmp_path_factory.mktemp("writers")
    make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"))
    train(train_config(folder, folder / "run"))
    train(train_config(folder, folder / "other", seed=1))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", TO)
def test_convert_replaces_an_sae_when_asked_and_nothing_else(
    root: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other, out = str(root / "run"), str(root / "other"), tmp_path / "out"
    convert(ConvertConfig(source=run, to=to, out=str(out)))
    first = content(out)
    convert(ConvertConfig(source=run, to=to, out=str(out)))
    assert content(out) == first
    with pytest.raises(InputError, match="holds an SAE already; --replace"):
        convert(ConvertConfig(source=other, to=to, out=str(out)))
    assert content(out) == first
    convert(ConvertConfig(source=other, to=to, out=str(out), replace=True))
    second = content(out)
    assert second.keys() == first.keys()
    assert second != first
    (out / "thesis.txt").write_text("three years")
    assert main(["convert", run, "--to", to, "--out", str(out), "--replace"]) == 2
    assert content(out) == {**second, "thesis.txt": b"three years"}
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_convert_in_another_format_loses_nothing(root: Path, tmp_path: Path) -> None:
    """What this source gives again to the byte may go; what another gave may not."""
    run, out = str(root / "run"), str(tmp_path / "out")
    convert(ConvertConfig(source=run, to="sparsify", out=out))
    convert(ConvertConfig(source=run, to="saelens", out=out))
    before = content(tmp_path)
    with pytest.raises(InputError, match="holds an SAE already"):
        convert(ConvertConfig(source=str(root / "other"), to="sparsify", out=out))
    assert content(tmp_path) == before


@pytest.mark.parametrize("out", ["run", "run/sae", "run/sae/export", "data/harvest", ".", "model"])
def test_convert_never_writes_over_what_there_is(root: Path, out: str) -> None:
    before = content(root)
    for to in TO:
        config = ConvertConfig(
            source=str(root / "run"), to=to, out=str(root / out), replace=True,
            harvest=str(root / "data" / "harvest"),
        )  # fmt: skip
        with pytest.raises(InputError, match=r"may not lie in what is read|holds something"):
            convert(config)
    assert content(root) == before


def test_index_replaces_a_store_and_nothing_else(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    file = out / "features.duckdb"
    file.write_text("three years")
    for replace in (False, True):
        with pytest.raises(InputError, match="holds something else than a feature store"):
            index(IndexConfig(run=str(root / "run"), out=str(out), replace=replace))
    assert file.read_text() == "three years"
    for place in ("run", "run/store", "data/harvest/store"):
        with pytest.raises(InputError, match="may not lie in what is read"):
            index(
                IndexConfig(
                    run=str(root / "run"), out=str(root / place),
                    harvest=str(root / "data" / "harvest"),
                )
            )  # fmt: skip


def test_eval_writes_over_an_evaluation_when_asked_and_nothing_else(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"

    def measure(run: str, **more: Any) -> None:
        evaluate(EvaluateConfig(run=str(root / run), tokens=0, out=str(out), **more))

    for text in ("three years", '{"mine": 1}'):
        out.write_text(text)
        with pytest.raises(InputError, match="holds something else than an evaluation"):
            measure("run", replace=True)
        assert out.read_text() == text
    out.unlink()
    measure("run")
    first = out.read_bytes()
    measure("run")  # the same
    with pytest.raises(InputError, match="holds an evaluation already; --replace"):
        measure("other")
    assert out.read_bytes() == first
    measure("other", replace=True)
    assert out.read_bytes() != first


@pytest.mark.parametrize("name", ["metrics.jsonl", "thesis.txt", "checkpoints/last/mine"])
def test_train_begins_in_no_folder_with_something_in_it(
    root: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("three years")
    with pytest.raises(InputError, match="exists and holds no run"):
        train(train_config(root, tmp_path / "out"))
    assert content(tmp_path) == {f"out/{name}": b"three years"}
    with pytest.raises(InputError, match="may not lie in what is read"):
        train(train_config(root, root / "data" / "harvest" / "run"))


def test_a_training_goes_on_after_a_start_that_was_cut_short(root: Path, tmp_path: Path) -> None:
    """Killed after its measurements were begun and before its manifest was there."""
    (tmp_path / "out" / ".manifest.json.abcd1234.partial").mkdir(parents=True)
    (tmp_path / "out" / "metrics.jsonl").touch()
    train(train_config(root, tmp_path / "out"))
    assert not list(tmp_path.rglob(".*"))
    assert load(tmp_path / "out").d_sae == 64


@pytest.mark.parametrize(
    "name", ["..", ".", "", ".hidden", "a\0b", "a\nb", "a\\b", "members.json", "x" * 300]
)
def test_a_sweeps_members_are_plain_folders(root: Path, tmp_path: Path, name: str) -> None:
    config = SweepConfig(
        harvest=str(root / "data" / "harvest"), out=str(tmp_path), grid=({"name": name},)
    )
    with pytest.raises(InputError, match="a member's name is that of its folder"):
        members(config)


def test_results_are_added_to_a_file_of_results_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    rows.append(path, [{"name": "a"}])
    before = path.read_bytes()
    written = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 5:
            return written(descriptor, bytes(data[:5]))
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ArtefactError, match=r"rows\.csv: the disk is full"):
            rows.append(path, [{"name": "b"}])
    assert path.read_bytes() == before
    rows.append(path, [{"name": "b"}])
    assert [row["name"] for row in rows.read(path)] == ["a", "b"]
    for content_ in (b"\xff\xfe\x00", b"", b"a,b\n1,2\n"):
        path.write_bytes(content_)
        with pytest.raises(InputError):
            rows.append(path, [{"name": "b"}])
        assert path.read_bytes() == content_
    with pytest.raises(ArtefactError, match="is a folder"):
        rows.append(tmp_path, [{"name": "b"}])


@pytest.mark.parametrize("work", ["convert", "evaluate"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def do(name: str) -> None:
        run, out = str(root / "run"), str(tmp_path / name)
        if work == "convert":
            convert(ConvertConfig(source=run, to="saelens", out=out))
        else:
            evaluate(EvaluateConfig(run=run, tokens=0, out=out))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtefactError, match="x: the disk is full"):
            do("x")
    assert list(tmp_path.iterdir()) == []
    do("x")


@pytest.mark.parametrize("to", TO)
def test_weights_that_may_not_be_read_are_not_called_missing(
    root: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may read all files, so the system's answer is feigned."""
    convert(ConvertConfig(source=str(root / "run"), to=to, out=str(tmp_path / "out")))
    opened = os.open
    for file in list((tmp_path / "out").iterdir()):

        def refusing(path: Any, *more: Any, file: Path = file, **named: Any) -> int:
            if str(path) == str(file):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return opened(path, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refusing)
            if file.suffix in (".pt", ".safetensors") and to == "saescope":
                patch.setattr("saescope.seals.seal_of", lambda p: os.close(os.open(p, 0)))
            with pytest.raises(ArtefactError, match=f"{file.name}: permission denied"):
                load(tmp_path / "out")


def test_home_is_expanded_in_every_path(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(root, home)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    steps: tuple[Callable[[], Any], ...] = (
        lambda: run_harvest(
            HarvestConfig(
                model=ModelConfig(spec="~/model", dtype="float32"),
                corpus=CorpusConfig(source="~/data/text/corpus.jsonl"),
                sites=("blocks.1.hook_resid_post",), out="~/h", context=16, chunk_rows=128,
                window_chunks=8, batch_sequences=16, held_out_fraction=0.2,
            )
        ),
        lambda: train(train_config(home, Path("~/r"), harvest="~/h")),
        lambda: evaluate(EvaluateConfig(run="~/r", harvest="~/h", tokens=0)),
        lambda: evaluate(EvaluateConfig(run="~/r", harvest="~/h", tokens=0, out="~/e.json")),
        lambda: index(IndexConfig(run="~/r", harvest="~/h", out="~/s")),
        lambda: convert(ConvertConfig(source="~/r", to="saelens", out="~/c")),
        lambda: load("~/c").save("~/again"),
        lambda: load(Path("~/again")),
    )  # fmt: skip
    for step in steps:
        step()
    assert list(here.iterdir()) == []
    assert {"h", "r", "e.json", "s", "c", "again"} <= {path.name for path in home.iterdir()}
    assert (home / "s" / "features.duckdb").exists()
    assert (home / "r" / "evaluation.json").exists()
