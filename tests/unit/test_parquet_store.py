"""Writing a store in Parquet: what is cut where, what a half-written one is, damage, commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from saescope.__main__ import main
from saescope.artefact import MANIFEST, read_json, write_json
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, file_sizes, put, read_bytes
from store import Annotations, FeatureStore
from store.annotations import annotations_file
from store.export import parquet_store
from store.export.parquet_store import Layout, write_parquet_store
from store.parquet.files import StoreFiles
from store.parquet.layout import TableFile
from tests.interrupt import Interrupt, Killed
from tests.tiny_store import EVERYWHERE, RARE, make_tiny_store

SMALL = Layout(group_rows=64, file_rows=300, other_rows=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("made"))


@pytest.fixture
def written(made: Path, tmp_path: Path) -> Path:
    with FeatureStore.open(made) as store:
        write_parquet_store(store, tmp_path / "large", layout=SMALL)
    return tmp_path / "large"


@pytest.mark.parametrize(
    ("table", "key", "unit"),
    [("activation_by_feature", "feature", 1), ("activation_by_position", "position", 16)],
)
def test_files_are_cut_between_features_and_sequences(
    written: Path, table: str, key: str, unit: int
) -> None:
    files = sorted((written / table).iterdir())
    assert len(files) > 3
    seen: set[int] = set()
    for file in files:
        numbers = set((pq.read_table(file)[key].to_numpy() // unit).tolist())
        assert not seen & numbers
        seen |= numbers
        facts = pq.ParquetFile(file).metadata
        assert max(facts.row_group(n).num_rows for n in range(facts.num_row_groups)) == 64
        assert facts.row_group(0).column(0).statistics.has_min_max
    assert all(pq.read_metadata(file).num_rows >= 300 for file in files[:-1])


def test_a_feature_and_a_sequence_are_read_from_few_row_groups(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FeatureStore.open(written) as store:
        store.feature(RARE), store.densities()
        fetched: list[str] = []
        original = StoreFiles.fetch

        def fetch(self: StoreFiles, file: TableFile, start: int, end: int) -> bytes:
            if not file.name.startswith("feature/") and end < file.bytes - 12:
                fetched.append(file.name)
            return original(self, file, start, end)

        monkeypatch.setattr(StoreFiles, "fetch", fetch)
        assert len(store.activations(RARE)[0]) == 1
        one = {name for name in fetched if name.startswith("activation")}
        assert len(one) == 1
        fetched.clear()
        store._active(32, 48)  # pyright: ignore[reportPrivateUsage]
        assert len(set(fetched)) == 1


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_half_written_store_is_none(
    made: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    out = as_path(str(tmp_path / "s") if where == "folder" else f"memory://{tmp_path.name}/s")
    with FeatureStore.open(made) as store:
        with monkeypatch.context() as patch:
            Interrupt(patch, parquet_store, "seal_of", 9, Killed())
            with pytest.raises(Killed):
                write_parquet_store(store, out, layout=SMALL)
        with pytest.raises(ArtefactError, match="no feature store here"):
            FeatureStore.open(out)
        write_parquet_store(store, out, layout=SMALL)  # what was left over is no obstacle
        with pytest.raises(InputError, match="--replace"):
            write_parquet_store(store, out, layout=SMALL)
        before = file_sizes(out)
        with FeatureStore.open(out) as reader:
            write_parquet_store(store, out, replace=True)
            assert len(file_sizes(out)) < len(before)
            assert not before.keys() & file_sizes(out).keys() - {MANIFEST}
            with FeatureStore.open(out) as again:
                expected = store.activations(EVERYWHERE)[0]
                assert np.array_equal(again.activations(EVERYWHERE)[0], expected)
            # who reads the old one never gets the new one's rows at the old places
            try:
                found = reader.activations(EVERYWHERE)[0]
            except ArtefactError:
                found = expected
            assert np.array_equal(found, expected)


def test_what_is_no_store_is_not_replaced(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(made.parent / "cache"))
    path = as_path("memory://other/name")
    put(path / "mine.txt", b"?")  # pyright: ignore[reportArgumentType]
    with FeatureStore.open(made) as store, pytest.raises(InputError, match="never replaced"):
        write_parquet_store(store, path, replace=True)


def _flip(path: Path, at: int = 50) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


def _of(table: str) -> Callable[[Path], Path]:
    return lambda folder: sorted((folder / table).iterdir())[0]


@pytest.mark.parametrize("file", [_of("activation_by_feature"), _of("logit"), _of("sequence")])
def test_doctor_finds_a_flipped_byte(
    written: Path, file: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(written)]) == 0
    assert "all well" in capsys.readouterr().out
    _flip(file(written))
    assert main(["doctor", str(written)]) == 1
    assert "does not match its checksum" in capsys.readouterr().out


def test_doctor_finds_missing_cut_and_strange_files(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _of("logit")(written).unlink()
    file = _of("sequence")(written)
    file.write_bytes(file.read_bytes()[:-1])
    (written / "strange").write_text("?")
    assert main(["doctor", str(written)]) == 1
    said = capsys.readouterr().out
    assert "the file is missing" in said
    assert "bytes of" in said
    assert "does not belong" in said
    with pytest.raises(ArtefactError, match=r"the file is missing|bytes of"):
        FeatureStore.open(written)


@pytest.mark.parametrize("change", ["name", "rows", "kind", "seal", "newer"])
def test_a_manifest_that_lies_is_refused(written: Path, change: str) -> None:
    from saescope.seals import sealed

    path = written / MANIFEST
    found: dict[str, Any] = read_json(path)
    file = found["tables"]["logit"]["files"][0]
    if change == "name":
        file["name"] = "logit/../../../etc/passwd"
    if change == "rows":
        file["rows"] = -1
    if change == "kind":
        found["kind"] = "run"
    if change == "newer":
        found["schema"] = 9
    if change == "seal":
        found["tables"]["logit"]["rows"] += 1
    else:
        del found["sha256"]
        found = sealed(found)
    write_json(path, found)
    with pytest.raises(ArtefactError):
        FeatureStore.open(written)


def test_nulls_where_a_store_has_none_are_refused(written: Path) -> None:
    from saescope.seals import seal_of, sealed

    file = _of("histogram")(written)
    table = pq.read_table(file)
    pq.write_table(table.cast(table.schema.set(2, table.schema.field(2).with_nullable(True))), file)
    found: dict[str, Any] = read_json(written / MANIFEST)
    del found["sha256"]
    found["tables"]["histogram"]["files"][0] |= seal_of(file)
    write_json(written / MANIFEST, sealed(found))
    with pytest.raises(ArtefactError, match=r"histogram\.count"):
        FeatureStore.open(written)


def test_annotations_lie_beside_the_folder(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FeatureStore.open(written) as store, Annotations.open(store.path) as notes:
        notes.set_label(3, "a label")
        assert notes.path == tmp_path / "large.annotations.sqlite"
    assert annotations_file(written) == annotations_file(written / MANIFEST) == notes.path
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    url = "memory://bucket/a/name"
    remote = annotations_file(url)
    assert remote == annotations_file(as_path(url) / MANIFEST) != annotations_file(f"{url}2")
    assert remote.parent == tmp_path / "data" / "saescope"
    with Annotations.open(url) as notes:
        notes.set_label(3, "a label")
    assert remote.is_file()


def test_export_sql_and_errors(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    url = "memory://tests/exported"
    command = ["export", str(made), "--out", url, "--format", "parquet-store"]
    assert main(command) == 0
    assert main(["sql", url, "SELECT count(*) AS n FROM feature"]) == 0
    assert "64" in capsys.readouterr().out
    assert main(["doctor", url]) == 0
    assert main(command) != 0
    assert main([*command, "--replace"]) == 0
    with pytest.raises(SystemExit):
        main([*command, "--features", "3"])
    assert main(["sql", "memory://tests/nothing"]) != 0
    assert "parquet-store" in capsys.readouterr().err
    path: AnyPath = as_path(url)
    name = next(name for name in file_sizes(path) if name.startswith("logit/"))
    data = bytearray(read_bytes(path.joinpath(*name.split("/"))))
    data[9] ^= 1
    put(path.joinpath(*name.split("/")), bytes(data))  # pyright: ignore[reportArgumentType]
    assert main(["doctor", url]) == 1
    assert "logit/" in capsys.readouterr().out
