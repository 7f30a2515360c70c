"""Harvests of streams, mixes and conversations: what is kept, counted, gone on with, repaired."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationStore, CorpusConfig, HarvestConfig, Model, ModelConfig, harvest
from activations.corpora.documents import MixedConfig
from activations.recompute.doctor import DoctorConfig, doctor
from activations.storage.verify import examine
from activations.storage.writer import HarvestWriter
from saescope.errors import ArtefactError
from tests.damage import assert_same_content
from tests.tiny import SENTENCES, make_tiny_corpus

SITES = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z")
Make = Callable[..., HarvestConfig]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    """A small harvest in windows of 45 sequences."""

    def build(name: str = "out", **fields: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(tiny_folder), dtype="float32"),
            "corpus": CorpusConfig(source=str(tmp_path / "corpus.jsonl")),
            "sites": SITES, "out": str(tmp_path / name), "context": 16, "chunk_rows": 128,
            "window_chunks": 6, "batch_sequences": 15, "held_out_fraction": 0.3,
        }  # fmt: skip
        return HarvestConfig(**(settings | fields))

    make_tiny_corpus(tmp_path, documents=40)
    return build


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of the hub's form in 8 shards of 9 documents, some of them repeated or empty."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("activations.corpora.packing._BATCH_DOCUMENTS", 4)
    (tmp_path / "set").mkdir()
    for shard in range(8):
        texts = [f"{SENTENCES[n % 7]} Number {n + shard * 7}." for n in range(8)]
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts, " "]]
        (tmp_path / "set" / f"train-{shard}.jsonl").write_text("".join(lines))
    return f"hf:{tmp_path / 'set'}"


def interrupted(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop a harvest before it commits its window number `at`."""
    written, original = [0], HarvestWriter.write

    def write(self: HarvestWriter, data: Any) -> None:
        if written[0] == at:
            raise KeyboardInterrupt
        written[0] += 1
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(HarvestWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    assert len(ActivationStore.open(config.out).windows) == at


@pytest.mark.parametrize("kind", ["hub", "hub, no repetitions", "mix, no repetitions"])
def test_a_stream_is_gone_on_with_where_it_stood(
    make: Make, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    corpus = CorpusConfig(source=hub, deduplicate="no rep" in kind)
    if kind.startswith("mix"):
        files = MixedConfig(source=str(tmp_path / "corpus.jsonl"))
        corpus = CorpusConfig(
            source="mix", mix=(MixedConfig(source=hub, weight=1.5), files), mix_ends="last",
            deduplicate=True,
        )  # fmt: skip
    whole = harvest(make("whole", corpus=corpus))
    splits = [window.split for window in whole.windows]
    assert splits.count("train") > 2 <= splits.count("held_out")
    assert "places" not in whole.manifest
    for at in (1, splits.count("train") - 1, len(splits) - 1):
        config = make(f"at-{at}", corpus=corpus)
        interrupted(config, monkeypatch, at)
        begun = ActivationStore.open(config.out).manifest["places"]
        assert begun.keys() == set(splits[:at])
        assert_same_content(harvest(config).path, whole.path)


def test_a_stream_that_has_changed_is_not_gone_on_with(
    make: Make, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(corpus=CorpusConfig(source=hub))
    interrupted(config, monkeypatch, 2)
    for shard in range(8):
        path = Path(hub.removeprefix("hf:")) / f"train-{shard}.jsonl"
        path.write_text(path.read_text().replace("Number", "Nummer"))
    with pytest.raises(ArtefactError, match="the corpus has changed"):
        harvest(config)


def test_what_is_left_out_is_counted(make: Make, hub: str) -> None:
    store = harvest(make(corpus=CorpusConfig(source=hub, deduplicate=True)))
    corpus, positions = store.manifest["corpus"], store.manifest["positions"]

    def total(name: str) -> int:
        return sum(corpus[split][name] for split in ("train", "held_out"))

    texts = {f"{SENTENCES[n % 7]} Number {n + shard * 7}." for shard in range(8) for n in range(8)}
    assert total("documents") == len(texts) < 64
    assert total("duplicate_documents") == 64 - len(texts)
    assert total("empty_documents") == 8
    tokens = sum(len(group) for group in store.document_table()["number"].chunks)
    assert tokens == len(texts)
    special = np.isin(store.tokens[:], store.manifest["model"]["special_token_ids"])
    for number, split in enumerate(("train", "held_out")):
        inside = store.split == number
        found = positions[split]
        assert sum(found.values()) == inside.sum() * store.context
        assert found["kept"] == store.n_rows(split) == store.keep[:][inside].sum()
        assert found["first"] == inside.sum()
        assert found["special"] == special[inside][:, 1:].sum()
        assert found["padding"] == found["outliers"] == 0
        used = corpus[split]["tokens"] - corpus[split]["unused_tokens"]
        assert used == inside.sum() * (store.context - 1)
        assert 0 < corpus[split]["unused_tokens"] < store.context - 1


def test_documents_apart(make: Make) -> None:
    store = harvest(make(packing="separate"))
    tokens, document, keep = store.tokens[:], store.document[:], store.keep[:]
    for row in document:
        assert len(set(row) - {-1}) == 1
    padding = document < 0
    assert (tokens[padding] == store.manifest["model"]["eos_token_id"]).all()
    assert not keep[padding].any()
    counted = store.manifest["positions"]
    assert sum(counted[split]["padding"] for split in counted) == padding.sum() > 100
    assert all(store.manifest["corpus"][split]["dropped_tokens"] == 0 for split in counted)
    assert len(set(document[~padding])) == 40


def norms(model: Model, store: ActivationStore) -> dict[str, torch.Tensor]:
    """Of a plain forward over all sequences, [sequence, position]."""
    tokens = torch.from_numpy(store.tokens[:])
    return {site: x.norm(dim=-1) for site, x in model.capture(tokens, store.sites).items()}


def test_outliers_are_not_stored(make: Make, tiny_model: Model) -> None:
    config = make(outliers=1.1)
    store, everything = harvest(config), harvest(make("all"))
    keep, candidates = store.keep[:], everything.keep[:]
    found = norms(tiny_model, store)
    facts = store.manifest["outliers"]
    expected = candidates.copy()
    for site, norm in found.items():
        first = norm[: -(-16384 // 16)][candidates & (store.split == 0)[:, None]]
        assert facts["median"][site] == pytest.approx(float(first.median()), rel=1e-6)
        expected &= (norm <= 1.1 * facts["median"][site]).numpy()
    assert np.array_equal(keep, expected)
    left_out = int(candidates.sum() - keep.sum())
    assert 20 < left_out < candidates.sum() / 2
    counted = store.manifest["positions"]
    assert sum(counted[split]["outliers"] for split in counted) == left_out
    assert store.n_rows() == keep.sum()
    assert store.statistics(SITES[0]).count == keep[store.split == 0].sum()
    x, row_token = store.read_chunk(SITES[0], 0)
    whole = tiny_model.capture(torch.from_numpy(store.tokens[:]), SITES[:1])[SITES[0]]
    expected_rows = whole.flatten(0, 1)[row_token]
    assert torch.allclose(x.float(), expected_rows, rtol=0.01, atol=0.01)
    assert keep.reshape(-1)[row_token.numpy()].all()


@pytest.mark.parametrize("array", ["keep", "row_token", SITES[1], "tokens"])
def test_a_harvest_without_outliers_and_repetitions_is_repaired(
    make: Make, monkeypatch: pytest.MonkeyPatch, array: str
) -> None:
    corpus = make().corpus
    config = make(outliers=1.1, corpus=CorpusConfig(source=corpus.source, deduplicate=True))
    interrupted(config, monkeypatch, 2)
    store = harvest(config)
    assert_same_content(store.path, harvest(make("b", outliers=1.1, corpus=config.corpus)).path)
    chunk = (
        next(p for p in (store.path / "activations.zarr" / array).glob("c/0/*") if p.is_file())
        if array != "row_token"
        else store.path / "activations.zarr" / array / "c" / "0"
    )
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes(len(whole)))
    part = store.path / "documents.parquet" / "part-000001.parquet"
    listed = part.read_bytes()
    part.unlink()
    assert len(examine(store).faults) == 2
    assert doctor(DoctorConfig(path=str(store.path), repair=True)) == 0
    assert chunk.read_bytes() == whole
    assert part.read_bytes() == listed


def test_conversations(make: Make, tmp_path: Path, tiny_model: Model, tiny_folder: Path) -> None:
    path = tmp_path / "talks.jsonl"
    talks = [
        [
            {"role": "user", "content": SENTENCES[n % 7]},
            {"role": "assistant", "content": f"No {n}."},
        ]
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    template = tiny_folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    try:
        corpus = CorpusConfig(source=str(path), messages_field="messages")
        store = harvest(make(corpus=corpus, held_out_fraction=0.0))
    finally:
        template.unlink()
    ids = store.tokens[:][:, 1:].reshape(-1)
    text = tiny_model.tokenizer.decode(ids)
    assert text.startswith(f"[user] {SENTENCES[0]}[assistant] No 0.<eos>[user] {SENTENCES[1]}")
    assert store.manifest["config"]["corpus"]["messages_field"] == "messages"


def test_a_mix_is_recorded(make: Make, tmp_path: Path, hub: str) -> None:
    files = MixedConfig(source=str(tmp_path / "corpus.jsonl"), weight=2.0)
    corpus = CorpusConfig(source="mix", mix=(files, MixedConfig(source=hub)))
    store = harvest(make(corpus=corpus))
    counted = store.manifest["corpus"]
    sources = [counted[split]["sources"] for split in ("train", "held_out")]
    assert [entry["source"] for entry in sources[0]] == [files.source, hub]
    sizes = [sum(split[n]["bytes"] for split in sources) for n in (0, 1)]
    assert sizes[0] / sizes[1] == pytest.approx(2.0, rel=0.1)
    documents = sum(entry["documents"] for split in sources for entry in split)
    assert documents == sum(counted[split]["documents"] for split in counted)
