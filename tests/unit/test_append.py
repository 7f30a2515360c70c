"""Harvests that grow: what was there stays, the rest is as if it had been harvested at once."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import (
    ActivationLoader,
    ActivationStore,
    CorpusConfig,
    HarvestConfig,
    Model,
    ModelConfig,
    append,
    harvest,
)
from activations.harvesting import resume
from activations.recompute.doctor import DoctorConfig, doctor
from activations.storage.verify import examine
from activations.storage.writer import HarvestWriter
from saescope.errors import InputError
from tests.damage import as_schema_1, assert_same_content, files_of
from tests.tiny import SENTENCES, make_tiny_corpus

SITE = "blocks.1.hook_resid_post"
Make = Callable[..., HarvestConfig]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    """A small harvest of three training windows and one or two held-out ones."""
    make_tiny_corpus(tmp_path, documents=25)
    more = [f"{SENTENCES[n % 7]} More of it, number {n}." for n in range(25)]
    lines = [json.dumps({"text": text}) + "\n" for text in more]
    (tmp_path / "more.jsonl").write_text("".join(lines))

    def build(name: str = "out", **fields: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(tiny_folder), dtype="float32"),
            "corpus": CorpusConfig(source=str(tmp_path / "corpus.jsonl")),
            "sites": (SITE,), "out": str(tmp_path / name), "context": 16, "chunk_rows": 128,
            "window_chunks": 6, "batch_sequences": 15, "held_out_fraction": 0.3,
        }  # fmt: skip
        return HarvestConfig(**(settings | fields))

    return build


def more(config: HarvestConfig, **fields: Any) -> HarvestConfig:
    source = str(Path(config.out).parent / "more.jsonl")
    return dataclasses.replace(config, corpus=CorpusConfig(source=source, **fields))


def grown(config: HarvestConfig) -> ActivationStore:
    harvest(config)
    return append(more(config))


def test_a_harvest_grows_and_keeps_what_it_has(make: Make, tiny_model: Model) -> None:
    config = make()
    before = harvest(config)
    old, n_old, tokens, splits = (
        files_of(before.path),
        before.n_sequences,
        before.tokens[:],
        before.split,
    )
    documents, checked = before.document_table().to_pylist(), before.verify()
    store = append(more(config))
    new = files_of(store.path)
    changed = {name for name in old if new[name] != old[name]}
    last = (n_old - 1) // store.manifest["sequences_per_window"]
    assert all(
        name in ("manifest.json", "windows.jsonl") or name.endswith("zarr.json")
        or (f"/c/{last}" in name and SITE not in name and "row_token" not in name)
        for name in changed
    ), changed  # fmt: skip
    assert new["windows.jsonl"].startswith(old["windows.jsonl"])
    assert np.array_equal(store.tokens[:n_old], tokens)
    assert np.array_equal(store.split[:n_old], splits)
    assert store.document_table().to_pylist()[: len(documents)] == documents
    assert store.verify() > checked
    assert store.complete
    assert store.hash != before.hash
    # the new text: numbers go on, it is in both splits, and rows are what the model says
    table = store.document_table().to_pylist()
    assert [entry["document"] for entry in table[len(documents) :]] == [
        *range(25, 25 + len(table) - len(documents))
    ] or {entry["document"] for entry in table} == set(range(50))
    assert {entry["split"] for entry in table[len(documents) :]} == {0, 1}
    x, row_token = store.read_chunk(SITE, store.chunks("train")[-1].index)
    assert int(row_token.min()) >= n_old * 16
    plain = tiny_model.capture(torch.from_numpy(store.tokens[:]), [SITE])[SITE].flatten(0, 1)
    assert torch.allclose(x.float(), plain[row_token], rtol=0.01, atol=0.01)
    kept = plain[torch.from_numpy(store.keep[:].reshape(-1))]
    train = np.repeat(store.split == 0, 16)[store.keep[:].reshape(-1)]
    mean = kept[torch.from_numpy(train)].to(torch.bfloat16).double().mean(0)
    assert np.allclose(store.statistics(SITE).mean, mean.numpy(), rtol=1e-3, atol=1e-3)
    loader = ActivationLoader(store, SITE, batch_size=64, epochs=1, drop_last=False)
    rows = torch.cat([where for _, where in loader.with_rows()])
    assert len(rows) == len(set(rows.tolist())) == store.n_rows("train")
    (entry,) = store.manifest["appended"]
    assert entry["corpus"]["source"].endswith("more.jsonl")
    assert (entry["first_window"], entry["first_sequence"]) == (len(before.windows), n_old)
    assert sum(entry["counts"][split]["documents"] for split in entry["counts"]) + sum(
        entry["counts"][split]["unused_documents"] for split in entry["counts"]
    ) == 25  # fmt: skip
    assert store.manifest["corpus"] == before.manifest["corpus"]


def test_growing_again_and_being_there_already(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make()
    store = grown(config)
    third = tmp_path / "third.jsonl"
    third.write_text((tmp_path / "more.jsonl").read_text().replace("More", "Still more"))
    last = dataclasses.replace(config, corpus=CorpusConfig(source=str(third)), max_tokens=640)
    twice = append(last)
    assert [part["max_tokens"] for part in twice.manifest["appended"]] == [None, 640]
    assert twice.n_tokens == store.n_tokens + 640
    assert twice.verify() > 0

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded a model for nothing")

    monkeypatch.setattr(resume, "load_model", fail)
    for again in (last, more(config), config):
        assert append(again).hash == twice.hash
    assert harvest(config).hash == twice.hash


@pytest.mark.parametrize("finish", ["append", "harvest"])
def test_an_interrupted_append_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, finish: str
) -> None:
    whole = grown(make("whole"))
    n_old = whole.manifest["appended"][0]["first_window"]
    for at in (0, 1, len(whole.windows) - n_old - 1):
        config = make(f"at-{at}")
        harvest(config)
        left, original = [at], HarvestWriter.write

        def write(
            self: HarvestWriter, data: Any, left: list[int] = left, original: Any = original
        ) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            original(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(HarvestWriter, "write", write)
            with pytest.raises(KeyboardInterrupt):
                append(more(config))
        begun = ActivationStore.open(config.out)
        assert not begun.complete
        assert len(begun.windows) == n_old + at
        begun.verify()
        if finish == "append":
            other = dataclasses.replace(more(config), max_tokens=320)
            with pytest.raises(InputError, match="is not finished"):
                append(other)
        done = append(more(config)) if finish == "append" else harvest(config)
        assert_same_content(done.path, whole.path)


@pytest.mark.parametrize("held_out_fraction", [0.3, 0.0])
def test_what_was_appended_is_repaired(make: Make, held_out_fraction: float) -> None:
    store = grown(make(held_out_fraction=held_out_fraction))
    whole = files_of(store.path)
    (part,) = store.manifest["appended"]
    window = store.windows[part["first_window"]]
    chunk = f"activations.zarr/{SITE}/c/{window.first_chunk}/0"
    tokens = f"activations.zarr/tokens/c/{window.first_sequence // 45}/0"
    listed = f"documents.parquet/part-{part['first_window']:06d}.parquet"
    for name in (chunk, tokens, listed):
        (store.path / name).write_bytes(b"damage")
    assert {fault.path for fault in examine(store).faults} >= {chunk, tokens, listed}
    assert doctor(DoctorConfig(path=str(store.path), repair=True)) == 0
    (store.path / "windows.jsonl").write_bytes(b"damage")
    assert doctor(DoctorConfig(path=str(store.path), repair=True)) == 0
    assert files_of(store.path) == whole


def test_only_new_texts_are_appended_where_repetitions_are_left_out(
    make: Make, tmp_path: Path
) -> None:
    corpus = CorpusConfig(source=str(tmp_path / "corpus.jsonl"), deduplicate=True)
    config = make(corpus=corpus)
    before = harvest(config)
    held_out = set(before.document_table().filter(
        np.equal(before.document_table()["split"].to_numpy(), 1)
    )["number"].to_pylist())  # fmt: skip
    both = tmp_path / "both.jsonl"
    both.write_text((tmp_path / "corpus.jsonl").read_text() + (tmp_path / "more.jsonl").read_text())
    new = CorpusConfig(source=str(both), deduplicate=True)
    store = append(dataclasses.replace(config, corpus=new))
    counts = store.manifest["appended"][0]["counts"]
    assert sum(counts[split]["duplicate_documents"] for split in counts) == 25
    table = store.document_table()
    numbers = table["number"].to_pylist()
    assert len(set(numbers)) == len(numbers)
    train = np.equal(table["split"].to_numpy(), 0)
    assert not held_out & set(table.filter(train)["number"].to_pylist())
    with pytest.raises(InputError, match=r"corpus\.deduplicate: must be as in.*allowed: true"):
        append(more(config))


def test_an_older_harvest_grows(make: Make) -> None:
    config = make("old")
    as_schema_1(harvest(config).path)
    assert_same_content(append(more(config)).path, grown(make("new")).path)


def test_what_cannot_be_appended(make: Make, tmp_path: Path) -> None:
    config = make()
    with pytest.raises(Exception, match="no harvest here"):
        append(more(config))
    harvest(config)
    with pytest.raises(InputError, match=r"held_out_fraction is 0\.3 there and 0\.1 here"):
        append(dataclasses.replace(more(config), held_out_fraction=0.1))
    (tmp_path / "more.jsonl").write_text('{"text": "few"}\n')
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="not enough text"):
        append(more(config))
    assert files_of(tmp_path) == before
