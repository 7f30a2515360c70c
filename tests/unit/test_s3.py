"""A harvest in a bucket of a server that speaks S3, on this machine."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from activations import (
    ActivationLoader,
    ActivationStore,
    CorpusConfig,
    HarvestConfig,
    ModelConfig,
    harvest,
)
from activations.harvesting import resume
from saescope import artefact
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import as_path, exists, listing, put, remove
from tests.damage import GROUP, assert_same_content
from tests.interrupt import Interrupt, Killed
from tests.s3_server import KEYS, s3_bucket
from tests.tiny import make_tiny_corpus, make_tiny_model

s3fs = pytest.importorskip("s3fs", reason="needs s3fs, of the extra s3")
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a text, and a server with an empty bucket."""
    folder = tmp_path_factory.mktemp("s3")
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder, documents=12)
    with s3_bucket(folder / "cache") as patch:
        patch.setattr(resume, "load_model", functools.cache(resume.load_model))
        yield folder


def config_of(root: Path, out: str) -> HarvestConfig:
    return HarvestConfig(
        model=ModelConfig(spec=str(root / "model"), dtype="float32"),
        corpus=CorpusConfig(source=str(root / "corpus.jsonl")),
        sites=(SITE,), out=out, context=16, chunk_rows=64, window_chunks=3, batch_sequences=8,
        held_out_fraction=0.5, max_tokens=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_disk(root: Path) -> ActivationStore:
    return harvest(config_of(root, str(root / "out")))


@pytest.mark.slow
def test_harvest_resume_read_doctor(
    root: Path, on_disk: ActivationStore, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    url = "s3://bucket/folder/name"
    config = config_of(root, url)
    with monkeypatch.context() as patch:
        Interrupt(patch, artefact, "put", 30, Killed())
        with pytest.raises(Killed):
            harvest(config)
    assert not exists(as_path("s3://bucket/folder/.name.lock"))
    store = harvest(config)
    assert_same_content(store.path, on_disk.path)
    assert store.verify() == on_disk.verify()
    assert listing(as_path("s3://bucket/folder"))(()) == [("name", True)]
    one, other = (
        ActivationLoader(each, SITE, batch_size=50, epochs=1) for each in (store, on_disk)
    )
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))

    for name in (f"{GROUP}/{SITE}/c/1/0", "documents.parquet/part-000000.parquet"):
        remove(as_path(f"{url}/{name}"))
    content = bytearray((root / "out" / GROUP / SITE / "c" / "2" / "0").read_bytes())
    content[7] ^= 1
    artefact.write_bytes(f"{url}/{GROUP}/{SITE}/c/2/0", bytes(content))
    artefact.write_bytes(f"{url}/strange/file", b"?")
    assert main(["doctor", url]) == 1
    output = capsys.readouterr().out
    for fault in ("missing     activations", "missing     documents", "damaged  ", "foreign  "):
        assert fault in output
    assert main(["doctor", url, "--repair", "--set-aside"]) == 0
    assert_same_content(store.path, on_disk.path)


def test_only_one_writer_is_let_in(root: Path) -> None:
    url, lock = "s3://bucket/other", as_path("s3://bucket/.other.lock")
    with locked(url, "test"):
        with pytest.raises(ArtefactError, match="in use by test, process"):
            harvest(config_of(root, url))
        with pytest.raises(FileExistsError):
            put(lock, b"a second one", new=True)  # pyright: ignore[reportArgumentType]
    assert not exists(lock)
    artefact.write_bytes(lock, b'{"holder": "harvest, process 7 on some", "locks": "other"}')
    with pytest.raises(ArtefactError, match=r"in use by .* on some; .* remove s3://bucket/\.other"):
        harvest(config_of(root, url))


def test_what_cannot_be_is_one_clear_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match=r"s3://nowhere/.*: cannot be written: .* not exist"):
        harvest(config_of(root, "s3://nowhere/name"))
    with pytest.raises(ArtefactError, match="s3://nowhere/name: no harvest here"):
        ActivationStore.open("s3://nowhere/name")
    with (
        pytest.raises(InputError, match=r"s3://bucket/: is all of a bucket; .*s3://bucket/name"),
        locked("s3://bucket", "test"),
    ):
        pass
    for key in KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(root / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        ArtefactError, match=r"s3://bucket/name/.* cannot be reached: .*credentials"
    ):
        ActivationStore.open("s3://bucket/name")
    s3fs.S3FileSystem.clear_instance_cache()
