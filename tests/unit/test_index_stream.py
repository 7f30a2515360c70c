"""An index that was killed, interrupted or shared ends as one that nobody disturbed."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from activations import ActivationStore, CorpusConfig, HarvestConfig, append
from sae import IndexConfig, index
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.indexing import encoding
from sae.indexing.encoding import Encoder, pieces_of
from sae.indexing.growth import old_part
from sae.indexing.pending import Pending
from saescope.artefact import write_json
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from store import FeatureStore, StoreWriter
from tests.interrupt import Interrupt, Killed
from tests.tiny import D_MODEL, make_tiny_harvest

SITE = "blocks.1.hook_resid_post"
Tables = dict[str, list[tuple[Any, ...]]]


def save_sae(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sae = TopKSAE(TopKConfig(d_sae=48, k=4), D_MODEL).eval()
    sae.metadata = {"site": SITE}
    sae.save(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest without a model, which would take long to load, and two SAEs."""
    folder = tmp_path_factory.mktemp("stream")
    x = torch.randn(2400, D_MODEL, generator=torch.Generator().manual_seed(0))
    ActivationStore.from_arrays(
        folder / "harvest", {SITE: x}, documents=torch.arange(2400) // 60, context=16,
        chunk_rows=128, window_chunks=4, held_out_fraction=0.2,
    )  # fmt: skip
    for seed in (0, 1):
        save_sae(folder / f"sae-{seed}", seed)
    return folder


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of about five chunks, and stores without the time in them."""
    monkeypatch.setattr(encoding, "_PIECE_ROWS", 600)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., IndexConfig]:
    return lambda **fields: IndexConfig(
        **{
            "run": str(root / "sae-0"),
            "harvest": str(root / "harvest"),
            "out": str(tmp_path / "store"),
            **fields,
        }
    )


def tables(path: Path) -> Tables:
    """All rows of a store, by table."""
    with FeatureStore.open(path) as store:
        names = [name for (name,) in store.database.rows("SELECT table_name FROM duckdb_tables()")]
        assert "activation_by_feature" in names
        return {name: store.database.rows(f"SELECT * FROM db.{name}") for name in names}


@pytest.fixture(scope="module")
def whole(root: Path) -> Tables:
    """What an index that nobody disturbs makes, in one piece."""
    path = root / "whole" / "features.duckdb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        config = IndexConfig(
            run=str(root / "sae-0"), harvest=str(root / "harvest"), out=str(path.parent)
        )
        index(config)
    named = tables(path)
    named["meta"] = [row for row in named["meta"] if row[0] != "name"]
    return named


def is_whole(path: Path, whole: Tables) -> None:
    """Nothing but a store lies there, and it is the one of an undisturbed index."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = tables(path)
    assert ("name", f'"{path.parent.name}"') in found["meta"]
    found["meta"] = [row for row in found["meta"] if row[0] != "name"]
    assert found.keys() == whole.keys()
    for name, rows in whole.items():
        assert found[name] == rows, name


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each piece that is encoded from now on."""
    rows: list[int] = []
    encode = Encoder._encode

    def counted(self: Encoder, piece: encoding.Piece) -> Any:
        rows.append(piece.rows)
        return encode(self, piece)

    monkeypatch.setattr(Encoder, "_encode", counted)
    return rows


def test_pieces_hold_every_chunk_once(root: Path) -> None:
    harvest = ActivationStore.open(root / "harvest")
    pieces = pieces_of(harvest)
    chunks = [chunk.index for piece in pieces for chunk in piece.chunks]
    assert chunks == list(range(len(chunks)))
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert sum(piece.rows for piece in pieces) == harvest.n_rows()
    assert len(pieces) == 4
    assert all(piece.rows >= 600 for piece in pieces[:-1])
    later = pieces_of(harvest, 3)
    assert [chunk.index for piece in later for chunk in piece.chunks] == chunks[3:]


@pytest.mark.parametrize(
    ("owner", "name", "at", "left"),
    [
        (Pending, "put", 1, 4),
        (Pending, "put", 3, 2),
        (StoreWriter, "add_sequences", 1, 0),
        (StoreWriter, "finish", 1, 0),
        (Pending, "remove", 2, None),
    ],
)
def test_what_was_killed_goes_on(
    make: Callable[..., IndexConfig],
    whole: Tables,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    at: int,
    left: int | None,
) -> None:
    """left: pieces that are still to be encoded; None: the store is there."""
    config = make()
    with monkeypatch.context() as patch:
        Interrupt(patch, owner, name, at, Killed())
        with pytest.raises(Killed):
            index(config)
    out = Path(config.out)
    assert (out / "features.duckdb").exists() == (left is None)
    assert (out / ".features.duckdb.pending" / "plan.json").exists()
    rows = encoded(monkeypatch)
    path = index(config)
    assert len(rows) == (left or 0)
    is_whole(path, whole)


def test_what_was_begun_with_something_else_is_named(
    make: Callable[..., IndexConfig], whole: Tables, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupt(patch, StoreWriter, "finish", 1, Killed())
        with pytest.raises(Killed):
            index(make(run=str(root / "sae-1")))
    with pytest.raises(InputError, match="of another SAE was begun here and is not finished"):
        index(make())
    rows = encoded(monkeypatch)
    index(make(run=str(root / "sae-1"), logits=3))  # what follows from the activations may differ
    assert rows == []
    Interrupt(monkeypatch, StoreWriter, "finish", 1, Killed())
    with pytest.raises(Killed):
        index(make(run=str(root / "sae-1"), replace=True))
    del rows[:]
    is_whole(index(make(replace=True)), whole)
    assert len(rows) == 4


def test_a_store_that_is_there_stays_until_the_new_one_is(
    make: Callable[..., IndexConfig],
    whole: Tables,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = tables(index(make(run=str(root / "sae-1"))))
    with monkeypatch.context() as patch:
        Interrupt(patch, Pending, "put", 3, Killed())
        with pytest.raises(Killed):
            index(make(replace=True))
    path = index(make())
    assert "an index with --replace was begun here" in capsys.readouterr().out
    assert tables(path) == old
    rows = encoded(monkeypatch)
    is_whole(index(make(replace=True)), whole)
    assert len(rows) == 2


def test_a_damaged_piece_is_encoded_again(
    make: Callable[..., IndexConfig], whole: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupt(patch, StoreWriter, "finish", 1, Killed())
        with pytest.raises(Killed):
            index(make())
    pieces = sorted(Path(make().out, ".features.duckdb.pending").glob("activations-*"))
    data = bytearray(pieces[1].read_bytes())
    data[len(data) // 2] ^= 8
    pieces[1].write_bytes(data)
    pieces[2].write_bytes(pieces[2].read_bytes()[:100])
    rows = encoded(monkeypatch)
    is_whole(index(make()), whole)
    assert len(rows) == 2


def test_files_of_others_in_the_folder_stay(make: Callable[..., IndexConfig]) -> None:
    folder = Path(make().out, ".features.duckdb.pending")
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", {"mine": 1})
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="was begun here"):
        index(make())
    with pytest.raises(ArtefactError, match="something was put into"):
        index(make(replace=True))
    assert (folder / "thesis.txt").read_text() == "three years"


def test_two_builders_of_one_store_are_refused(
    make: Callable[..., IndexConfig], tmp_path: Path
) -> None:
    config = make()
    with (
        locked(Path(config.out, "features.duckdb"), "index"),
        pytest.raises(ArtefactError, match="in use by index, process"),
    ):
        index(config)
    shutil.rmtree(config.out)
    with pytest.raises(InputError, match="not in the harvest"):
        index(dataclasses.replace(config, site="blocks.0.hook_resid_post"))
    assert not Path(config.out).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A harvest in `harvest`, what it was before it grew in `before`, and a store of that."""
    folder = tmp_path_factory.mktemp("grown")
    path = make_tiny_harvest(folder, tiny_folder, documents=12, held_out_fraction=0.3)
    shutil.copytree(path, folder / "before")
    save_sae(folder / "sae-0")
    save_sae(folder / "sae-1", 1)
    text = folder / "text" / "corpus.jsonl"
    more = folder / "more.jsonl"
    more.write_text(text.read_text().replace("Number", "Another").replace("Document", "Text"))
    manifest = ActivationStore.open(path).manifest["config"]
    config = from_dict(HarvestConfig, manifest, "test")
    append(dataclasses.replace(config, out=str(path), corpus=CorpusConfig(source=str(more))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        index(
            IndexConfig(
                run=str(folder / "sae-0"),
                harvest=str(folder / "before"),
                out=str(folder / "old" / "store"),
            )
        )
    return folder


def test_a_grown_store_is_the_one_built_from_nothing(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in between; the old rows are not encoded again."""
    run, harvest = str(grown / "sae-0"), str(grown / "harvest")
    from_nothing = index(IndexConfig(run=run, harvest=harvest, out=str(tmp_path / "a" / "store")))
    out = tmp_path / "b" / "store"
    shutil.copytree(grown / "old" / "store", out)
    config = IndexConfig(run=run, harvest=harvest, out=str(out), append=True)
    rows = encoded(monkeypatch)
    before, after = (ActivationStore.open(grown / name) for name in ("before", "harvest"))
    assert {w.split for w in after.windows[len(before.windows) :]} == {"train", "held_out"}
    old = tables(out / "features.duckdb")
    with monkeypatch.context() as patch:
        Interrupt(patch, StoreWriter, "finish", 1, Killed())
        with pytest.raises(Killed):
            index(config)
    assert tables(out / "features.duckdb") == old
    path = index(config)
    assert sum(rows) == after.n_rows() - before.n_rows() > 0
    assert len(rows) > 1
    is_whole(path, {n: [r for r in t if r[0] != "name"] for n, t in tables(from_nothing).items()})
    capsys.readouterr()
    index(config)
    assert f"has all of its harvest already, {after.n_rows():,} rows" in capsys.readouterr().out


def test_only_a_store_of_the_same_grows(grown: Path, tmp_path: Path, tiny_folder: Path) -> None:
    harvest = str(grown / "harvest")
    config = IndexConfig(
        run=str(grown / "sae-0"), harvest=harvest, out=str(tmp_path / "store"), append=True
    )
    with pytest.raises(InputError, match="there is no store that could grow"):
        index(config)
    shutil.copytree(grown / "old" / "store", config.out)
    content = Path(config.out, "features.duckdb").read_bytes()
    with pytest.raises(InputError, match="is a store of another SAE, so its activations cannot"):
        index(dataclasses.replace(config, run=str(grown / "sae-1")))
    other = make_tiny_harvest(tmp_path / "other", tiny_folder, documents=20)
    with pytest.raises(InputError, match="was built from another harvest, not from the beginning"):
        index(dataclasses.replace(config, harvest=str(other)))
    with pytest.raises(InputError, match="give one"):
        dataclasses.replace(config, replace=True)
    assert Path(config.out, "features.duckdb").read_bytes() == content
    assert not list(Path(config.out).glob(".*"))


def test_a_store_of_rows_that_were_repaired_does_not_grow(grown: Path) -> None:
    harvest = ActivationStore.open(grown / "harvest")
    path = grown / "old" / "store" / "features.duckdb"
    with FeatureStore.open(path) as store:
        meta = store.meta
    chunks = old_part(path, harvest, meta).chunks
    harvest.ledger.corrections.append({"array": SITE, "chunk": chunks, "crc32c": 1, "why": {}})
    assert old_part(path, harvest, meta).chunks == chunks  # a new row was repaired
    harvest.ledger.corrections.append({"array": SITE, "chunk": 0, "crc32c": 1, "why": {}})
    with pytest.raises(InputError, match="were repaired with other content since"):
        old_part(path, harvest, meta)
