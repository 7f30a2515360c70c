"""The doctor: every kind of damage is named, and repaired by harvesting just that."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore, Model
from activations.storage.chunk_files import crc32c
from activations.storage.layout import documents_part
from activations.storage.ledger import Ledger, Window
from activations.storage.verify import examine
from saescope.__main__ import main
from saescope.artefact import sha256_json
from saescope.errors import ArtefactError
from tests.damage import GROUP, SITES, as_schema_1, assert_same_content
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE, OTHER, LIKE = SITES


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    return make_tiny_harvest(root, make_tiny_model(root / "model"), sites=SITES, documents=40)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def doctor(copy: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command on the copy: its exit code and what it printed."""

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["doctor", str(copy), *options])
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


def chunk(folder: Path, array: str, number: int) -> Path:
    path = folder / GROUP / array / "c" / str(number)
    return path if array in ("split", "row_token") else path / "0"


def found(folder: Path) -> dict[str, str]:
    """What is wrong, by file: the kind."""
    faults = examine(ActivationStore.read(folder)).faults
    assert len({fault.path for fault in faults}) == len(faults)
    return {fault.path: fault.kind for fault in faults}


def test_all_is_well(doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path) -> None:
    code, text = doctor()
    assert code == 0
    assert "all well" in text
    assert doctor("--repair", "--set-aside", "--upgrade")[0] == 0
    assert_same_content(copy, whole)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy"]


def test_every_fault_is_named_and_repaired(
    doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path
) -> None:
    expected = {}

    def note(path: Path, kind: str) -> None:
        expected[str(path.relative_to(copy))] = kind

    flipped = chunk(copy, SITE, 2)
    flipped.write_bytes(flipped.read_bytes()[:-9] + b"x" + flipped.read_bytes()[-8:])
    note(flipped, "damaged")
    short = chunk(copy, OTHER, 3)
    short.write_bytes(short.read_bytes()[:100])
    note(short, "truncated")
    for path in (chunk(copy, "row_token", 1), chunk(copy, "keep", 1), chunk(copy, "split", 0)):
        path.unlink()
        note(path, "missing")
    one, other = chunk(copy, SITE, 5), chunk(copy, LIKE, 6)
    swapped = one.read_bytes(), other.read_bytes()
    one.write_bytes(swapped[1])
    other.write_bytes(swapped[0])
    for path in (one, other):
        note(path, "swapped")
    tokens = chunk(copy, "tokens", 1)
    tokens.write_bytes(chunk(copy, "tokens", 0).read_bytes())
    note(tokens, "swapped")
    documents = copy / "documents.parquet" / documents_part(1)
    documents.write_bytes(documents.read_bytes()[:-1])
    note(documents, "damaged")
    described = copy / GROUP / SITE / "zarr.json"
    described.write_text(described.read_text().replace("uint16", "uint32"))
    note(described, "damaged")
    (copy / GROUP / "zarr.json").unlink()
    note(copy / GROUP / "zarr.json", "missing")

    assert found(copy) == expected
    code, text = doctor()
    assert code == 1
    assert f"chunk 5 of {SITE} is damaged: it is whole, but not the one" in text
    assert f"committed here, but chunk 6 of {LIKE}" in text
    for path in expected:
        assert path in text
    assert "--repair" in text
    code, text = doctor("--repair")
    assert (code, found(copy)) == (0, {})
    assert_same_content(copy, whole)
    ActivationStore.open(copy).verify()


def test_verify_names_all(copy: Path) -> None:
    for number in (1, 3):
        chunk(copy, SITE, number).unlink()
    with pytest.raises(ArtefactError, match=f"chunk 1 of {SITE} is missing.*chunk 3 of {SITE}"):
        ActivationStore.open(copy).verify()


def test_every_reader_refuses_a_swapped_chunk(copy: Path) -> None:
    chunk(copy, SITE, 0).write_bytes(chunk(copy, SITE, 1).read_bytes())
    store = ActivationStore.open(copy)
    with pytest.raises(ArtefactError, match="not the one that was committed here"):
        list(ActivationLoader(store, SITE, batch_size=50, epochs=1))
    chunk(copy, "row_token", 2).write_bytes(chunk(copy, "row_token", 1).read_bytes())
    with pytest.raises(ArtefactError, match="chunk 2 of row_token is damaged"):
        store.read_chunk(LIKE, 2)
    for name in ("tokens", "document", "keep"):
        chunk(copy, name, 0).write_bytes(chunk(copy, name, 1).read_bytes())
        with pytest.raises(ArtefactError, match=f"chunk 0 of {name} is damaged"):
            np.asarray(getattr(store, name))
    lists = copy / "documents.parquet"
    (lists / documents_part(0)).write_bytes((lists / documents_part(1)).read_bytes())
    with pytest.raises(ArtefactError, match="not the one committed"):
        store.document_table()


def test_strange_files_are_named_and_moved_only_if_asked(
    doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path
) -> None:
    strange = ("notes.txt", f"{GROUP}/{SITE}/c/99/0", f"{GROUP}/row_token/c/01", f"{GROUP}/x/y/z")
    for name in strange:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("ours")
    named = {"notes.txt", f"{GROUP}/{SITE}/c/99", f"{GROUP}/row_token/c/01", f"{GROUP}/x"}
    assert found(copy) == dict.fromkeys(named, "foreign")
    code, text = doctor("--repair")
    assert code == 1
    assert "--set-aside" in text
    assert found(copy) == dict.fromkeys(named, "foreign")
    code, _ = doctor("--set-aside")
    assert code == 0
    assert_same_content(copy, whole)
    aside = copy.parent / "copy.set-aside-1"
    assert all((aside / name).read_text() == "ours" for name in strange)


def test_leftovers_of_a_killed_process_are_no_fault(
    doctor: Callable[..., tuple[int, str]], copy: Path
) -> None:
    (copy / ".manifest.json.abcd1234").mkdir()
    (copy / ".manifest.json.abcd1234" / "manifest.json").write_text("{")
    code, text = doctor()
    assert code == 0
    assert "left over   .manifest.json.abcd1234" in text


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "add"])
def test_the_ledger_is_rebuilt(
    doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path, damage: str
) -> None:
    path = copy / "windows.jsonl"
    text = path.read_text()
    if damage == "lose":
        path.unlink()
    else:
        changed = {"flip": text.replace("1", "2", 1), "cut": text[:-1], "add": text + "{}\n"}
        path.write_text(changed[damage])
    code, shown = doctor()
    assert code == 1
    assert "windows.jsonl" in shown
    if damage != "add":
        with pytest.raises(ArtefactError, match="the list of windows"):
            ActivationStore.open(copy)
    assert doctor("--repair")[0] == 0
    assert_same_content(copy, whole)


def test_a_ledger_and_a_chunk_are_too_much(
    doctor: Callable[..., tuple[int, str]], copy: Path
) -> None:
    (copy / "windows.jsonl").unlink()
    chunk(copy, SITE, 1).write_bytes(chunk(copy, SITE, 0).read_bytes())
    code, text = doctor("--repair")
    assert code == 2
    assert "cannot be rebuilt" in text
    assert not (copy / "windows.jsonl").exists()


def test_a_damaged_manifest_is_said_to_be_past_repair(
    doctor: Callable[..., tuple[int, str]], copy: Path
) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    code, text = doctor()
    assert code == 1
    assert "manifest.json: its content does not match its own sha256" in text
    code, text = doctor("--repair")
    assert code == 2
    assert "cannot be repaired" in text
    path.write_text("{")
    assert doctor()[0] == 1
    path.unlink()
    code, text = doctor()
    assert code == 2
    assert "no harvest here" in text


def changed_rounding(patch: pytest.MonkeyPatch) -> None:
    """As another machine would: activations that differ in their last bits."""
    original = Model.capture

    def other(self: Model, tokens: torch.Tensor, sites: object) -> dict[str, torch.Tensor]:
        found = original(self, tokens, sites)  # type: ignore[arg-type]
        return {site: x * (1 + 2**-9) for site, x in found.items()}

    patch.setattr(Model, "capture", other)


def test_other_rounding_is_reported_and_refused_unless_allowed(
    doctor: Callable[..., tuple[int, str]], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk(copy, SITE, 2).unlink()
    made = {"created": "1999-12-31T00:00:00+00:00", "versions": {"torch": "0.1"}, "commit": "abc"}
    manifest = json.loads((copy / "manifest.json").read_text()) | made
    del manifest["sha256"]
    sealed = {**manifest, "sha256": sha256_json(manifest)}
    (copy / "manifest.json").write_text(json.dumps(sealed))
    changed_rounding(monkeypatch)
    code, text = doctor("--repair")
    assert code == 1
    assert "not repaired" in text
    assert "in 7 undamaged chunks" in text
    assert not chunk(copy, SITE, 2).exists()
    code, text = doctor("--repair", "--allow-rounding")
    assert code == 0
    assert "with other rounding" in text
    store = ActivationStore.open(copy)
    store.verify()
    assert [(c["array"], c["chunk"]) for c in store.ledger.corrections] == [(SITE, 2)]
    assert {name: store.manifest[name] for name in made} == made
    code, text = doctor()
    assert code == 0
    assert f"chunk 2 of {SITE} was repaired with values that differ" in text
    # what is not computed but known is never written otherwise
    shutil.rmtree(copy / GROUP / "row_token" / "c")
    assert doctor("--repair")[0] == 0


def test_another_model_or_corpus_repairs_nothing(
    doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path, tmp_path: Path
) -> None:
    chunk(copy, SITE, 2).unlink()
    chunk(copy, "document", 1).unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    corpus = Path(manifest["config"]["corpus"]["source"])
    model = Path(manifest["config"]["model"]["spec"])
    text = corpus.read_text()
    try:
        corpus.write_text(text.replace("river", "brook"))
        code, shown = doctor("--repair")
        assert code == 1
        assert "the corpus is not the one that was harvested" in shown
        assert not chunk(copy, "document", 1).exists()
        assert chunk(copy, SITE, 2).exists()  # needs the tokens alone
        chunk(copy, SITE, 2).unlink()
        corpus.write_text(text)
        shutil.move(model, tmp_path / "model")
        make_tiny_model(model, seed=1)
        code, shown = doctor("--repair")
        assert "weights_hash differs" in shown
        assert code != 0
        assert not chunk(copy, "document", 1).exists()
        assert not chunk(copy, SITE, 2).exists()
    finally:
        corpus.write_text(text)
        if (tmp_path / "model").exists():
            shutil.rmtree(model)
            shutil.move(tmp_path / "model", model)
    assert doctor("--repair")[0] == 0
    assert_same_content(copy, whole)


def test_an_older_store_is_read_checked_and_repaired(
    doctor: Callable[..., tuple[int, str]], copy: Path, whole: Path
) -> None:
    as_schema_1(copy)
    store = ActivationStore.open(copy)
    assert store.hash == ActivationStore.open(whole).hash
    assert np.array_equal(store.tokens[:], ActivationStore.open(whole).tokens[:])
    code, text = doctor()
    assert code == 0
    assert "schema 1 does not record" in text
    chunk(copy, SITE, 2).unlink()
    chunk(copy, "tokens", 1).unlink()
    assert sorted(found(copy).values()) == ["missing", "missing"]
    assert doctor("--upgrade")[0] == 1
    assert doctor("--repair")[0] == 0
    assert json.loads((copy / "manifest.json").read_text())["schema"] == 1
    assert doctor("--upgrade")[0] == 0
    assert_same_content(copy, whole)


def test_an_older_store_is_not_mixed_with_other_rounding(
    doctor: Callable[..., tuple[int, str]], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_schema_1(copy)
    chunk(copy, SITE, 2).unlink()
    changed_rounding(monkeypatch)
    assert doctor("--repair")[0] == 1
    assert not chunk(copy, SITE, 2).exists()


def test_a_newer_store_is_refused(doctor: Callable[..., tuple[int, str]], copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema": 3}))
    code, text = doctor()
    assert code == 2
    assert "newer saescope (schema 3, this one reads up to 2); update saescope" in text


def test_the_cost_of_a_commit_does_not_grow(tmp_path: Path) -> None:
    """The manifest's part is fixed, and the ledger is written from its end on."""
    hand = importlib.import_module("tests.hand_store")
    x = {"site": torch.zeros(64, 4)}
    store = hand.make_hand_store(tmp_path / "store", x)
    ledger = store.ledger
    size = len(json.dumps(ledger.committed))
    before = ledger.size
    entry = (tmp_path / "store" / "windows.jsonl").read_bytes()
    ledger.append(tmp_path / "store", entry)
    assert (ledger.size, len(json.dumps(ledger.committed))) == (2 * before, size)
    assert (tmp_path / "store" / "windows.jsonl").stat().st_size == 2 * before


def test_what_a_window_covers() -> None:
    pieces = Window("train", 0, 100, first_sequence=5, sequences=8).pieces(6)
    assert [(p.number, p.chunk, p.start, p.offset, p.sequences) for p in pieces] == [
        (0, 0, 5, 0, 1), (1, 1, 0, 1, 6), (2, 2, 0, 7, 1)
    ]  # fmt: skip
    assert Ledger().committed["bytes"] == 0
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
