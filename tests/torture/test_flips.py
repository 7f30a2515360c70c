"""Bits flipped at random in everything that saescope writes but harvests: each is found and named.

A flip that is not named must be one that changes nothing of what is read: a blank in JSON, bytes of
a database that nothing is in. There are none in tensors, metrics and libraries.
"""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from activations.loading import gather
from activations.models.packaged import SEALS, check_packaged, packaged_folder
from sae import load
from sae.analysis.lens import TunedLens
from sae.commands.examination import examine
from sae.evaluation.written import EVALUATION_FILE, read_evaluation
from sae.training import checkpoint
from sae.training.run_folder import read_run
from sae.training.telemetry import read_metrics
from saescope import compiled, compiler
from saescope.errors import ArtefactError
from store import Annotations, FeatureStore
from tests.artefacts import flip, make_everything
from tests.tiny import make_tiny_model
from tests.torture.test_torture import FEW_OR_ALL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("flipped"))


def _sae(folder: Path) -> Any:
    found = load(folder)
    return {**{n: v.tolist() for n, v in found.state_dict().items()}, "metadata": found.metadata}


def _checkpoint(folder: Path) -> Any:
    tensors, state = checkpoint.load(folder)
    return state, {
        f"{group}/{name}": value.tolist()
        for group, members in tensors.items()
        for name, value in members.items()
    }


def _store(folder: Path) -> Any:
    with FeatureStore.open(folder) as store:
        found = store._rows("SELECT table_name FROM duckdb_tables() ORDER BY 1")
        tables = [name for (name,) in found]
        return [store._rows(f"SELECT count(*), sum(hash(t)) FROM db.{t} t") for t in tables]


def _annotations(folder: Path) -> Any:
    with Annotations.open(folder) as notes:
        lists = {name: notes.members(name) for name in notes.lists()}
        texts = [notes.get(feature) for feature in range(48)]
        return texts, lists, [notes.search(word) for word in ("label", "river", "seen", "mor")]


@dataclass(frozen=True)
class Written:
    """An artefact: what kind it is, its files, and how it is read."""

    kind: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    refused: bool = True
    """whether what is damaged is never read (and not only named by the doctor)"""


_RUN = "runs/a"
ALL = (
    Written("SAE", f"{_RUN}/sae", ("weights.safetensors", "config.json"), _sae),
    Written(
        "checkpoint", f"{_RUN}/checkpoints/last", ("tensors.safetensors", "state.json"), _checkpoint
    ),
    Written("run", _RUN, ("manifest.json",), read_run),
    Written("run", _RUN, ("metrics.jsonl",), lambda run: read_metrics(run / "metrics.jsonl")),
    Written("run", _RUN, (EVALUATION_FILE,), lambda run: read_evaluation(run / EVALUATION_FILE)),
    Written(
        "lens", "lens", ("weights.safetensors", "manifest.json"),
        lambda folder: (TunedLens.load(folder).hash, TunedLens.load(folder).metadata),
    ),
    Written("store", "stores/a", ("features.duckdb",), _store),
    Written("store", "stores/a", ("features.annotations.sqlite",), _annotations, refused=False),
)  # fmt: skip


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_every_flipped_bit_is_named_and_refused(
    whole: Path, tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    chance = random.Random(share)
    right = [each.read(root / each.folder) for each in ALL]
    named, harmless = dict.fromkeys(ALL, 0), dict.fromkeys(ALL, 0)
    for trial in range(64 if share == "few" else 2400):
        number = trial % len(ALL)
        each = ALL[number]
        folder = root / each.folder
        path = folder / chance.choice(each.files)
        before = path.read_bytes()
        bit = flip(path, chance)
        what = f"bit {bit} of {each.folder}/{path.name}"
        found = examine(folder, each.kind)
        if any(name == path.name for name, _, _ in found.faults):
            named[each] += 1
            if each.refused:
                with pytest.raises(ArtefactError):
                    pytest.fail(f"{what}: {each.read(folder) == right[number]}")
        else:
            assert found.faults == [], what
            assert path.suffix in (".json", ".duckdb", ".sqlite"), what
            assert each.read(folder) == right[number], what
            harmless[each] += 1
        path.write_bytes(before)
        for journal in folder.glob("*-journal"):
            journal.unlink()
    assert all(examine(root / each.folder, each.kind).faults == [] for each in ALL)
    with capsys.disabled():
        for each in ALL:
            print(  # noqa: T201
                f"\n{each.kind}, {each.files[-1]}: {named[each]} named, {harmless[each]} void",
                end="",
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@FEW_OR_ALL
def test_flips_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str) -> None:
    """A packaged model, or a library, of which a bit is flipped is never loaded, but made anew."""
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "activations.models.packaged._convert", lambda _, folder: make_tiny_model(folder)
    )
    folder = packaged_folder("smollm2-135m")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    chance = random.Random(share)
    for _ in range(12 if share == "few" else 300):
        name = chance.choice(list(files))
        flip(folder / name, chance)
        if name != SEALS or _json(folder / name) != json.loads(files[name]):
            with pytest.raises(ArtefactError, match=name):
                check_packaged(folder)
        (folder / name).write_bytes(files[name])
    try:
        library = compiled.build("gather", Path(gather.__file__).parent)
    except compiler.NotBuilt:
        pytest.skip("no compiler")
    content = library.read_bytes()
    for _ in range(2 if share == "few" else 12):
        flip(library, chance)
        assert compiled.build("gather", Path(gather.__file__).parent).read_bytes() == content


def test_a_flip_in_a_text_of_annotations_is_named(whole: Path, tmp_path: Path) -> None:
    """What SQLite itself does not see."""
    folder = Path(shutil.copytree(whole / "stores/a", tmp_path / "a"))
    path = folder / "features.annotations.sqlite"
    whole_file, text = path.read_bytes(), b"above all in the morning"
    for at in (whole_file.index(text), whole_file.rindex(text)):  # a note, or its history
        data = bytearray(whole_file)
        data[at] ^= 1
        path.write_bytes(data)
        with sqlite3.connect(path) as con:
            assert con.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        con.close()
        found = [name for name, _, _ in examine(folder, "store").faults]
        assert found
        assert set(found) == {path.name}
