"""Activations that somebody brings: kept digit for digit, and a store like any other."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from pyarrow import parquet
from safetensors.torch import save_file

import sae
from activations import ActivationLoader, ActivationStore, load_model
from activations.harvesting.bring import bring
from activations.loading import gather
from activations.recompute.doctor import DoctorConfig, doctor
from activations.storage.writer import HarvestWriter
from sae.architectures.topk import TopKConfig
from sae.training.trainer_config import TrainerConfig
from saescope.__main__ import main
from saescope.errors import InputError
from store import FeatureStore
from tests.tiny import make_tiny_model

SITE = "blocks.1.hook_resid_post"
ROWS, D_IN, CONTEXT = 1000, 8, 16
SMALL: dict[str, Any] = {"chunk_rows": 64, "window_chunks": 4, "context": CONTEXT}
X = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)) * 3
DOCUMENTS = np.arange(ROWS) // 30


def stored(store: ActivationStore, site: str = "mlp") -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of a site and their flat tokens, by token."""
    chunks = [c for split in ("train", "held_out") for c in store.chunks(split)]
    parts = [store.read_chunk(site, chunk.index) for chunk in chunks]
    x, at = torch.cat([x for x, _ in parts]), torch.cat([at for _, at in parts])
    order = at.argsort()
    return x[order], at[order]


def given_rows(store: ActivationStore, tokens: np.ndarray) -> np.ndarray:
    """Numbers of the rows given, by flat token, where token ids are these numbers."""
    flat, keep = np.asarray(store.tokens[:]).reshape(-1), np.asarray(store.keep[:]).reshape(-1)
    assert (tokens[flat[keep]] == flat[keep]).all()
    return flat[keep]


def test_every_row_is_there_once_digit_for_digit(tmp_path: Path) -> None:
    numbers = np.arange(ROWS)
    store = ActivationStore.from_arrays(
        tmp_path / "a", {"mlp": X}, tokens=numbers, documents=DOCUMENTS, **SMALL
    )
    x, at = stored(store)
    rows = given_rows(store, numbers)
    assert x.dtype == torch.float32
    assert sorted(rows) == list(range(ROWS))
    assert torch.equal(x, X[rows])
    assert at.tolist() == np.flatnonzero(np.asarray(store.keep[:])).tolist()
    assert store.complete
    assert len(store.windows) > 3
    # rows keep their order within a split, and a split has whole documents
    split = np.repeat(store.split, CONTEXT)[np.asarray(store.keep[:]).reshape(-1)]
    for number in (0, 1):
        assert (np.diff(rows[split == number]) > 0).all()
    assert not set(DOCUMENTS[rows[split == 0]]) & set(DOCUMENTS[rows[split == 1]])
    assert len(set(DOCUMENTS[rows[split == 1]])) == 2  # of 34, 5%
    table = store.document_table().to_pydict()
    assert sorted(table["key"], key=int) == [str(n) for n in range(34)]
    document = np.asarray(store.document[:]).reshape(-1)
    assert (document[np.asarray(store.keep[:]).reshape(-1)] == DOCUMENTS[rows]).all()


def test_statistics_are_of_the_train_rows_in_float64(tmp_path: Path) -> None:
    numbers = np.arange(ROWS)
    store = ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, tokens=numbers, **SMALL)
    rows = given_rows(store, numbers)
    split = np.repeat(store.split, CONTEXT)[np.asarray(store.keep[:]).reshape(-1)]
    train = X.double().numpy()[rows[split == 0]]
    found = store.statistics("mlp")
    assert found.count == len(train) == store.n_rows("train")
    np.testing.assert_allclose(found.mean, train.mean(0), rtol=1e-12, atol=1e-14)
    assert found.mean_square == pytest.approx((train**2).sum(1).mean(), rel=1e-7)


@pytest.mark.parametrize(
    ("dtype", "storage", "kept"),
    [
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_no_digit_is_lost_unless_asked_for(
    tmp_path: Path, dtype: torch.dtype, storage: Any, kept: torch.dtype
) -> None:
    x = X.to(dtype)
    store = ActivationStore.from_arrays(
        tmp_path / "a", {"mlp": x}, storage=storage, held_out_fraction=0, **SMALL
    )
    found, _ = stored(store)
    assert found.dtype == kept
    assert torch.equal(found, x.to(kept))


def test_sequences_and_rows_that_are_left_out(tmp_path: Path) -> None:
    keep = np.ones((50, 20), np.bool_)
    keep[:, 0] = False
    tokens = np.arange(1000).reshape(50, 20)
    store = ActivationStore.from_arrays(
        tmp_path / "a",
        {"mlp": X},
        tokens=tokens,
        keep=keep,
        documents=[f"d{n}" for n in range(50)],
        chunk_rows=64,
        window_chunks=4,
    )
    assert store.context == 20
    assert store.n_rows() == 950
    assert (np.sort(np.asarray(store.tokens[:]), axis=0) == tokens).all()  # whole sequences
    assert not np.asarray(store.keep[:])[:, 0].any()
    x, _ = stored(store)
    assert torch.equal(x, X[given_rows(store, np.arange(1000))])
    positions = store.manifest["positions"]
    assert sum(split["left out"] for split in positions.values()) == 50


def test_the_manifest_says_where_rows_are_from(tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", X.numpy())
    out = str(tmp_path / "a")
    assert main(["harvest", "--from", str(tmp_path / "acts.npy"), "--out", out]) == 0
    manifest = ActivationStore.open(out).manifest
    assert manifest["brought"] == {"acts": str(tmp_path / "acts.npy")}
    mine = manifest["config"]["brought"]["acts"]
    assert (mine["rows"], mine["d_in"], mine["dtype"]) == (ROWS, D_IN, "float32")
    moved = ActivationStore.from_arrays(tmp_path / "b", {"acts": X})
    assert moved.hash == ActivationStore.open(out).hash
    other = ActivationStore.from_arrays(tmp_path / "c", {"acts": X + 1})
    assert other.manifest["config"]["brought"]["acts"]["sha256"] != mine["sha256"]


def write(folder: Path, kind: str) -> Path:
    """A file of the same rows at two sites, with tokens and documents."""
    path = folder / f"acts{kind}"
    tokens = np.arange(ROWS) % 50
    if kind == ".safetensors":
        save_file(
            {
                "mlp": X,
                "resid": X.bfloat16(),
                "tokens": torch.from_numpy(tokens),
                "documents": torch.from_numpy(DOCUMENTS),
            },
            path,
        )
    elif kind == ".parquet":
        width = pa.list_(pa.float32(), D_IN)
        flat = pa.array(X.numpy().reshape(-1))
        columns = {
            "mlp": pa.FixedSizeListArray.from_arrays(flat, type=width),
            "resid": pa.array(X.half().numpy().tolist(), pa.list_(pa.float32())),
            "tokens": pa.array(tokens),
            "documents": pa.array([f"d{n}" for n in DOCUMENTS]),
        }
        parquet.write_table(pa.table(columns), path, row_group_size=130)
    else:
        group = zarr.create_group(path)
        for name, values in (("mlp", X), ("resid", X.half())):
            group.create_array(name, data=values.numpy(), chunks=(100, D_IN))
        group.create_array("tokens", data=tokens)
        group.create_array("documents", data=DOCUMENTS)
    return path


@pytest.mark.parametrize("kind", [".safetensors", ".parquet", ".zarr"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    small = ["--chunk-rows", "64", "--window-chunks", "4", "--context", str(CONTEXT)]
    words = ["harvest", "--from", str(path), "--out", str(tmp_path / "a"), *small]
    assert main([*words, "--held-out-fraction", "0"]) == 0
    store = ActivationStore.open(tmp_path / "a")
    assert store.sites == ("mlp", "resid")
    assert torch.equal(stored(store)[0], X)
    low = X.bfloat16() if kind == ".safetensors" else X.half()
    assert torch.equal(stored(store, "resid")[0], low.float())
    assert (np.asarray(store.tokens[:]).reshape(-1)[:ROWS] == np.arange(ROWS) % 50).all()
    assert len(store.document_table()) == 34
    assert main([*words[:4], str(tmp_path / "b"), *small, "--sites", "resid"]) == 0
    assert ActivationStore.open(tmp_path / "b").sites == ("resid",)


def brought_and_killed(tmp_path: Path, windows: int) -> None:
    """A process that is killed when it has committed so many windows."""
    np.save(tmp_path / "x.npy", X.numpy())
    code = (
        "import os, signal\n"
        "import numpy as np\n"
        "from activations import ActivationStore\n"
        "from activations.storage.writer import HarvestWriter\n"
        "write, count = HarvestWriter.write, [0]\n"
        "def counted(self, data):\n"
        "    write(self, data)\n"
        "    count[0] += 1\n"
        f"    if count[0] == {windows}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "HarvestWriter.write = counted\n"
        f"x = np.load({str(tmp_path / 'x.npy')!r}, mmap_mode='r')\n"
        f"ActivationStore.from_arrays({str(tmp_path / 'a')!r}, {{'mlp': x}}, **{SMALL!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("windows", [1, 3, 5])
def test_killed_and_begun_again_it_is_the_same_store(
    tmp_path: Path, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought_and_killed(tmp_path, windows)
    half = ActivationStore.open(tmp_path / "a")
    assert (half.complete, len(half.windows)) == (False, windows)
    written = []
    write = HarvestWriter.write
    monkeypatch.setattr(
        HarvestWriter, "write", lambda self, data: (written.append(data), write(self, data))
    )
    found = ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, **SMALL)
    whole = ActivationStore.from_arrays(tmp_path / "b", {"mlp": X}, **SMALL)
    assert len(written) == 2 * len(whole.windows) - windows
    assert found.hash == whole.hash
    for name in ("activations.zarr", "documents.parquet", "windows.jsonl"):
        assert_same_files(tmp_path / "a" / name, tmp_path / "b" / name)
    written.clear()
    assert ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, **SMALL).hash == whole.hash
    assert not written
    assert doctor(DoctorConfig(path=str(tmp_path / "a"))) == 0


def assert_same_files(a: Path, b: Path) -> None:
    if a.is_file():
        assert a.read_bytes() == b.read_bytes(), a
        return
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))  # noqa: PTH208
    for path in a.iterdir():
        assert_same_files(path, b / path.name)


def test_the_whole_path_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harvest, run, out = str(tmp_path / "a"), str(tmp_path / "run"), str(tmp_path / "store")
    ActivationStore.from_arrays(harvest, {"mlp": X}, tokens=np.arange(ROWS) % 50, **SMALL)
    sizes = ["--sae.d-sae", "32", "--sae.k", "4", "--trainer.batch-size", "64"]
    assert main(["train", "--harvest", harvest, "--out", run, *sizes]) == 0
    capsys.readouterr()
    assert main(["eval", run]) == 0
    said = capsys.readouterr().out
    assert "nobody said of which model these activations are" in said
    measured = json.loads((Path(run) / "evaluation.json").read_text())
    assert measured["downstream"] is None
    assert 0 < measured["reconstruction"]["fvu"] < 1
    assert measured["protocol"]["positions"] == "those brought"
    assert main(["index", run, "--out", out]) == 0
    assert "logit effects: left out" in capsys.readouterr().out
    with FeatureStore.open(Path(out) / "features.duckdb") as features:
        page = features.features(limit=5)
        assert page.total == 32
        texts = {token for tokens in features.top_tokens([0, 1, 2]).values() for token in tokens}
    assert texts
    assert all(text.startswith("⟨") for text in texts)
    words = [f"w{n}" for n in range(50)]
    (tmp_path / "words.json").write_text(json.dumps(words))
    again = ["index", run, "--out", out + "2", "--vocabulary", str(tmp_path / "words.json")]
    assert main(again) == 0
    with FeatureStore.open(Path(out + "2") / "features.duckdb") as features:
        assert set(features.top_tokens([0])[0]) <= set(words)
    (tmp_path / "words.json").write_text(json.dumps(words[:20]))
    assert main([*again, "--replace"]) == 2
    assert "fewer texts than there are token ids" in capsys.readouterr().err


def test_an_index_without_tokens(tmp_path: Path) -> None:
    harvest, run, out = str(tmp_path / "a"), str(tmp_path / "run"), str(tmp_path / "store")
    ActivationStore.from_arrays(harvest, {"mlp": X}, **SMALL)
    sizes = ["--sae.d-sae", "32", "--sae.k", "4", "--trainer.batch-size", "64"]
    assert main(["train", "--harvest", harvest, "--out", run, *sizes]) == 0
    assert main(["index", run, "--out", out]) == 0
    with FeatureStore.open(Path(out) / "features.duckdb") as features:
        assert features.features(limit=5).total == 32


def test_damage_is_found_and_not_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    words = ["harvest", "--from", str(tmp_path / "x.npy"), "--out", str(tmp_path / "a")]
    assert main(words) == 0
    chunk = tmp_path / "a" / "activations.zarr" / "x" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    assert doctor(DoctorConfig(path=str(tmp_path / "a"), repair=True)) == 1
    assert "x.npy; bring them again" in capsys.readouterr().out


def with_bad_row(row: int) -> torch.Tensor:
    x = X.clone()
    x[row, 2] = float("nan")
    return x


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"mlp": X.double()}, {}, "mlp: would lose digits"),
        ({"mlp": X.double().numpy()}, {}, r"astype\(.float32.\)"),
        ({"mlp": X[0]}, {}, "mlp: is not rows of activations"),
        ({"mlp": X[None]}, {}, "mlp: is not rows of activations"),
        ({"mlp": X[:0]}, {}, "one row or more"),
        ({"mlp": with_bad_row(777)}, {}, "mlp: a row is not finite .given: 'row 777'"),
        ({"mlp": X, "b": X[1:]}, {}, "sites have the same rows"),
        ({}, {}, "needs the rows of one site or more"),
        (X, {}, "needs the rows of one site or more"),
        ({"a/b": X}, {}, "is no name of a site"),
        ({"mlp": X}, {"tokens": np.arange(999)}, "tokens: is not one for each row"),
        ({"mlp": X}, {"tokens": np.arange(999).reshape(9, 111)}, "another number of positions"),
        ({"mlp": X}, {"tokens": np.arange(ROWS) - 1}, "no ids of tokens"),
        ({"mlp": X}, {"tokens": np.ones(ROWS)}, "tokens: is neither"),
        ({"mlp": X}, {"documents": np.arange(10)}, "documents: is not one for each row"),
        ({"mlp": X}, {"keep": np.ones(ROWS, int)}, "keep: is not truth values"),
        ({"mlp": X}, {"keep": np.zeros(ROWS, bool)}, "keeps no row"),
        ({"mlp": X}, {"model": "gpt2"}, "is of use only with its sequences"),
        ({"mlp": X}, {"storage": "none"}, "no storage of rows that are brought"),
        ({"mlp": X}, {"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"mlp": X}, {"context": 10**6}, "less than one sequence"),
        ({"mlp": X}, {"context": 2.0}, "context: is not a whole number"),
    ],
)
def test_wrong_input_is_one_error_and_nothing_is_written(
    tmp_path: Path, arrays: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bring(tmp_path / "a", arrays, **options)
    assert not (tmp_path / "a").exists()


def test_another_store_is_not_written_over(tmp_path: Path) -> None:
    ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, **SMALL)
    with pytest.raises(InputError, match="other rows or settings"):
        ActivationStore.from_arrays(tmp_path / "a", {"mlp": X + 1}, **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no harvest"):
        ActivationStore.from_arrays(tmp_path / "mine", {"mlp": X}, **SMALL)


def test_no_pickle_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    out = str(tmp_path / "a")
    assert main(["harvest", "--from", str(tmp_path / "x.npy"), "--out", out]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for name in ("x.pt", "missing.npy"):
        assert main(["harvest", "--from", str(tmp_path / name), "--out", out]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_pickle_is_read_from_zarr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x.zarr"
    zarr.create_array(folder, data=X.numpy(), zarr_format=2, compressors=None)
    described = json.loads((folder / ".zarray").read_text())
    described["compressor"] = {"id": "pickle", "protocol": 5}
    (folder / ".zarray").write_text(json.dumps(described))
    for chunk in (p for p in folder.iterdir() if not p.name.startswith(".")):
        chunk.write_bytes(pickle.dumps(Bomb(tmp_path / "gone off")))
    words = ["harvest", "--from", str(folder), "--out", str(tmp_path / "a")]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "gone off").exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet"])
def test_a_damaged_file_is_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"x{kind}").write_bytes(b"nothing of the kind" * 20)
    words = ["harvest", "--from", str(tmp_path / f"x{kind}"), "--out", str(tmp_path / "a")]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_batches_are_the_rows(
    tmp_path: Path, dtype: Any, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(gather, "library", lambda: None)
    numbers = np.arange(ROWS)
    store = ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, tokens=numbers, **SMALL)
    loader = ActivationLoader(store, "mlp", batch_size=50, epochs=1, dtype=dtype, drop_last=False)
    seen = []
    for x, at in loader.with_rows():
        rows = np.asarray(store.tokens[:]).reshape(-1)[at.numpy()]
        assert torch.equal(x, X[rows].to(getattr(torch, dtype)))
        seen += rows.tolist()
    assert len(seen) == len(set(seen)) == store.n_rows("train")


def test_a_training_run_of_a_store_without_a_model(tmp_path: Path) -> None:
    store = ActivationStore.from_arrays(tmp_path / "a", {"mlp": X}, **SMALL)
    config = sae.TrainConfig(
        harvest=str(tmp_path / "a"),
        out=str(tmp_path / "run"),
        sae=TopKConfig(d_sae=16, k=2),
        trainer=TrainerConfig(batch_size=64),
    )
    trained = sae.train(config)
    assert trained is not None
    assert trained.metadata["harvest_hash"] == store.hash
    assert trained.metadata["model_spec"] is None


def test_a_model_that_was_named_is_used(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = load_model(str(folder), dtype="float32")
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, model.d_vocab - 1, (60, 16), generator=source)
    x = model.capture(tokens, [SITE])[SITE].reshape(-1, model.d_model)
    keep = np.ones((60, 16), np.bool_)
    keep[:, 0] = False
    ActivationStore.from_arrays(
        tmp_path / "a", {SITE: x}, tokens=tokens, keep=keep, model=str(folder), chunk_rows=128
    )
    run, out = str(tmp_path / "run"), tmp_path / "store"
    sizes = ["--sae.d-sae", "64", "--sae.k", "4", "--trainer.batch-size", "64"]
    assert main(["train", "--harvest", str(tmp_path / "a"), "--out", run, *sizes]) == 0
    assert main(["eval", run, "--tokens", "64"]) == 0
    measured = json.loads((Path(run) / "evaluation.json").read_text())
    assert measured["downstream"]["tokens"] == 3 * 14  # 15 kept, of which the last predicts nothing
    assert main(["index", run, "--out", str(out)]) == 0
    with FeatureStore.open(out / "features.duckdb") as features:
        assert features.logits(0)
