"""The store: what it says, what it reads, and that damage is found and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from activations import ActivationStore, load_model
from saescope.errors import ArtefactError, InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE, OTHER = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    return make_tiny_harvest(root, make_tiny_model(root / "model"), sites=(SITE, OTHER))


@pytest.fixture(scope="module")
def store(folder: Path) -> ActivationStore:
    return ActivationStore.open(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def all_rows(store: ActivationStore, site: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    read = [store.read_chunk(site, chunk.index) for chunk in store.chunks(split)]
    return torch.cat([x for x, _ in read]), torch.cat([row for _, row in read])


def test_facts(store: ActivationStore) -> None:
    assert store.complete
    assert store.sites == (SITE, OTHER)
    assert (store.context, store.d_in(SITE)) == (16, 32)
    assert store.n_tokens == 16 * store.n_sequences == store.tokens[:].size
    assert store.n_rows() == store.n_rows("train") + store.n_rows("held_out")
    assert store.n_rows() == int(store.keep[:].sum())
    assert len(store.hash) == 64
    chunks = len(store.chunks("train") + store.chunks("held_out"))
    sequence_chunks = -(-store.n_sequences // 64)
    # of two sites and row_token; of four arrays of sequences; lists; descriptions and the group's
    assert store.verify() == 3 * chunks + 4 * sequence_chunks + len(store.windows) + 7 + 1


def test_rows_are_the_kept_positions_each_once(store: ActivationStore) -> None:
    keep = store.keep[:]
    for number, split in enumerate(("train", "held_out")):
        _, row_token = all_rows(store, SITE, split)
        expected = np.flatnonzero(keep & (store.split == number)[:, None])
        assert sorted(row_token.tolist()) == expected.tolist()


def test_a_row_is_the_models_activation_at_its_token(store: ActivationStore, folder: Path) -> None:
    model = load_model(store.manifest["model"]["spec"], dtype="float32")
    expected = model.capture(torch.from_numpy(store.tokens[:]), [SITE, OTHER])
    for site in (SITE, OTHER):
        x, row_token = all_rows(store, site, "train")
        assert x.dtype == torch.bfloat16
        flat = expected[site].flatten(0, 1)[row_token]
        assert torch.allclose(x.float(), flat, rtol=2**-8, atol=1e-6)


def test_rows_are_shuffled_within_a_window_but_not_beyond(store: ActivationStore) -> None:
    window = store.windows[0]
    assert window.sequences == 64
    chunk = store.chunks("train")[0]
    _, row_token = store.read_chunk(SITE, chunk.index)
    sequences = (row_token // 16).numpy()
    assert (np.diff(row_token.numpy()) < 0).any()
    # 128 of the 950 rows of 64 sequences: a fair sample comes from most of them
    assert len(np.unique(sequences)) > 40
    assert sequences.max() < 64


def test_statistics_are_those_of_the_stored_train_rows(store: ActivationStore) -> None:
    for site in store.sites:
        x = all_rows(store, site, "train")[0].double().numpy()
        found = store.statistics(site)
        assert found.count == len(x)
        assert found.mean.dtype == np.float64
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.mean_square, (x**2).sum(1).mean(), rtol=1e-9)


def test_it_is_plain_zarr(store: ActivationStore) -> None:
    group: Any = zarr.open_group(store.path / "activations.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    array = group[SITE]
    assert array.dtype == np.uint16
    assert array.chunks == (128, 32)
    assert array.fill_value == 0x7FC0
    assert dict(array.attrs) == {"bits_of": "bfloat16", "site": SITE}
    chunk = store.chunks("held_out")[-1]
    x, row_token = store.read_chunk(SITE, chunk.index)
    rows = slice(128 * chunk.index, 128 * chunk.index + chunk.rows)
    assert np.array_equal(array[rows], x.view(torch.uint16).numpy())
    assert np.array_equal(group["row_token"][rows], row_token.numpy())
    assert (group["row_token"][rows.stop :] == -1).all()
    assert (array[rows.stop :] == 0x7FC0).all()
    assert np.array_equal(group["tokens"][:], store.tokens[:])
    assert np.array_equal(group["split"][:], store.split)


def test_documents(store: ActivationStore) -> None:
    table = store.document_table()
    assert table.column_names == ["document", "key", "title", "split"]
    frame = table.to_pandas().set_index("document")
    assert frame.index.is_unique
    document = store.document[:]
    assert set(np.unique(document)) == set(frame.index)
    assert frame.title[7] == "Document 7"
    # no document is in both splits, and each is in the one its sequences are in
    for number in (0, 1):
        inside = np.unique(document[store.split == number])
        assert (frame.split[inside] == number).all()


def test_sequence_arrays_index_like_numpy(store: ActivationStore) -> None:
    whole = np.asarray(store.tokens)
    assert store.tokens.shape == whole.shape
    assert len(store.tokens) == store.n_sequences
    mask = store.split == 1
    for key in (3, -1, slice(2, 9), slice(None, None, 3), [5, 2, 2], np.array([70, 1]), mask,
                slice(5, 5), np.array([], int), slice(None, None, -1)):  # fmt: skip
        assert np.array_equal(store.tokens[key], whole[key])
    with pytest.raises(IndexError):
        store.tokens[store.n_sequences]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "zero"])
def test_a_damaged_chunk_is_named(copy: Path, damage: str) -> None:
    path = copy / "activations.zarr" / SITE / "c" / "2" / "0"
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[100] ^= 1
        content = {"flip": content, "truncate": content[:-9], "zero": bytes(len(content))}[damage]
        path.write_bytes(content)
    store = ActivationStore.open(copy)
    store.read_chunk(SITE, 1)
    store.read_chunk(OTHER, 2)
    for read in (lambda: store.read_chunk(SITE, 2), store.verify):
        with pytest.raises(ArtefactError, match=f"chunk 2 of {SITE} is (damaged|missing)"):
            read()


@pytest.mark.parametrize("name", ["tokens", "document", "keep", "split", "row_token"])
def test_damage_elsewhere_is_found_too(copy: Path, name: str) -> None:
    path = next(p for p in (copy / "activations.zarr" / name / "c").rglob("*") if p.is_file())
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ArtefactError, match=f"of {name} is missing"):
        ActivationStore.open(copy).verify()
    if name in ("tokens", "document", "keep"):
        with pytest.raises(ArtefactError, match=f"chunk . of {name} is missing"):
            np.asarray(getattr(ActivationStore.open(copy), name))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=f"of {name} is damaged"):
        ActivationStore.open(copy).verify()


def test_a_missing_list_of_documents_is_found(copy: Path) -> None:
    (copy / "documents.parquet" / "part-000001.parquet").unlink()
    with pytest.raises(ArtefactError, match="part-000001"):
        ActivationStore.open(copy).verify()


def test_what_is_no_store(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no harvest here"):
        ActivationStore.open(tmp_path / "nowhere")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema": 3}))
    with pytest.raises(ArtefactError, match=r"newer saescope \(schema 3.*up to 2"):
        ActivationStore.open(copy)
    for changes in ({"complete": False}, {"schema": 1}, {"sha256": "0"}):
        (copy / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(ArtefactError, match="does not match its own sha256"):
            ActivationStore.open(copy)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "kind": "run"}))
    with pytest.raises(ArtefactError, match="wrong kind"):
        ActivationStore.open(copy)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "activations.zarr" / "zarr.json").unlink()
    with pytest.raises(ArtefactError, match=r"activations\.zarr is missing"):
        ActivationStore.open(copy)


def test_wrong_names(store: ActivationStore) -> None:
    with pytest.raises(InputError, match=f"no such site.*{SITE}"):
        store.read_chunk("blocks.7.hook_resid_post", 0)
    with pytest.raises(InputError, match="no such committed chunk"):
        store.read_chunk(SITE, 999)
    with pytest.raises(InputError, match="no such split"):
        store.chunks("test")


def test_the_hash_does_not_depend_on_the_path(copy: Path, store: ActivationStore) -> None:
    assert ActivationStore.open(copy).hash == store.hash
