"""Text encoders: each text by itself, rows of tokens and means, against plain transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activations import (
    ActivationLoader,
    ActivationStore,
    CorpusConfig,
    HarvestConfig,
    ModelConfig,
    harvest,
)
from activations.corpora.sequences import PackingCounts
from activations.harvesting.corpus_reader import CorpusReader
from activations.models.load import load_model
from activations.models.module_model import ModuleModel
from activations.recompute.doctor import DoctorConfig, doctor
from saescope.errors import InputError
from tests.tiny import SENTENCES
from tests.tiny_raw import D_MODEL, make_tiny_encoder

LAST = "module:encoder.layer.1:output"
POOLER = "module:pooler:output"
TEXTS = [" ".join(SENTENCES[n % 7].split()[: 1 + n % 9]) for n in range(40)] + [SENTENCES[0] * 2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    make_tiny_encoder(folder / "model")
    lines = [json.dumps({"text": f"{text} {n}"}) for n, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def config_of(root: Path, out: Path, **fields: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(spec=str(root / "model"), kind="text_encoder", dtype="float32"),
        "corpus": CorpusConfig(source=str(root / "texts.jsonl")),
        "sites": (LAST,), "out": str(out), "context": 24, "chunk_rows": 64, "window_chunks": 4,
        "batch_sequences": 4, "held_out_fraction": 0.2, **fields,
    }  # fmt: skip
    return HarvestConfig(**settings)


@pytest.fixture(scope="module")
def store(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    sites = (LAST, "module:encoder.layer.0:update")
    return harvest(config_of(root, tmp_path_factory.mktemp("out") / "rows", sites=sites))


def by_row(store: ActivationStore, site: str) -> dict[int, Tensor]:
    """Activation of each row by its row_token."""
    found = {}
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            x, row_token = store.read_chunk(site, chunk.index)
            found |= dict(zip(row_token.tolist(), x.float(), strict=True))
    return found


def hidden_states(root: Path, tokens: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """What transformers says, with every sequence filled up to the context."""
    from transformers import AutoModel

    hf = AutoModel.from_pretrained(root / "model").eval()
    with torch.no_grad():
        return hf(tokens.long(), real.long(), output_hidden_states=True).hidden_states


def test_every_text_begins_a_sequence_and_a_long_one_has_several(
    root: Path, store: ActivationStore
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokens, document = store.tokens[:], store.document[:]
    expected = {}
    for number, text in enumerate(TEXTS):
        ids = tokenizer(f"{text} {number}", add_special_tokens=False).input_ids
        expected[number] = [[1, *ids[s : s + 22], 2] for s in range(0, len(ids), 22)]
    assert max(map(len, expected.values())) > 1
    for number, parts in expected.items():
        mine = [row[row != 0].tolist() for row in tokens[document[:, 0] == number]]
        assert mine == parts
    assert np.array_equal(document >= 0, tokens != 0)
    assert np.array_equal(store.keep[:], tokens > 2)
    counts = store.manifest["corpus"]
    assert sum(counts[split]["documents"] for split in counts) == len(TEXTS)
    assert sum(counts[split]["tokens"] for split in counts) == (tokens != 0).sum()


def test_rows_are_the_encoders_own_hidden_states(root: Path, store: ActivationStore) -> None:
    tokens = torch.from_numpy(store.tokens[:])
    states = hidden_states(root, tokens, tokens != 0)
    expected = {LAST: states[2], "module:encoder.layer.0:update": states[1] - states[0]}
    for site, x in expected.items():
        rows = by_row(store, site)
        assert sorted(rows) == np.flatnonzero(store.keep[:]).tolist()
        flat = x.flatten(0, 1)
        for place, row in rows.items():
            assert (row - flat[place]).norm() < 0.01 * flat[place].norm()
    assert store.manifest["model"]["kind"] == "text_encoder"


def test_results_do_not_depend_on_the_batch_nor_the_order_of_running(
    root: Path, tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortest_first(lengths: np.ndarray) -> np.ndarray:
        return np.argsort(lengths, kind="stable")

    monkeypatch.setattr("activations.harvesting.row_selection.running_order", shortest_first)
    other = harvest(config_of(root, tmp_path / "other", sites=(LAST,), batch_sequences=8))
    assert np.array_equal(other.tokens[:], store.tokens[:])
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            here, there = (each.read_chunk(LAST, chunk.index) for each in (other, store))
            assert torch.equal(here[1], there[1])  # the same rows at the same places of the disk
            torch.testing.assert_close(here[0].float(), there[0].float(), rtol=0.01, atol=1e-4)


def test_the_longest_are_run_first_and_padding_is_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    original = ModuleModel.capture

    def note(self: ModuleModel, inputs: Any, sites: Any) -> dict[str, Tensor]:
        widths.append(inputs[0].shape[1])
        assert (inputs[0] == 0).all(0).sum() == 0
        return original(self, inputs, sites)

    monkeypatch.setattr(ModuleModel, "capture", note)
    harvest(config_of(root, tmp_path / "out", held_out_fraction=0.0, window_chunks=64))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] == 24


def test_means_over_the_kept_tokens(root: Path, tmp_path: Path) -> None:
    store = harvest(config_of(root, tmp_path / "means", sites=(LAST, POOLER), rows="mean"))
    tokens = torch.from_numpy(store.tokens[:])
    states = hidden_states(root, tokens, tokens != 0)[-1]
    keep = tokens > 2
    rows = by_row(store, LAST)
    assert len(rows) == len(tokens) == store.n_rows()
    for place, row in rows.items():
        sequence, position = divmod(place, store.context)
        mean = states[sequence][keep[sequence]].mean(0)
        assert (row - mean).norm() < 0.01 * mean.norm()
        assert position == keep[sequence].nonzero().max()
    assert store.keep[:].sum(1).tolist() == [1] * len(tokens)
    from transformers import AutoModel

    hf: Any = AutoModel.from_pretrained(root / "model").eval()
    with torch.no_grad():
        pooled = hf(tokens.long(), (tokens != 0).long()).pooler_output
    for place, row in by_row(store, POOLER).items():
        torch.testing.assert_close(row, pooled[place // store.context], rtol=0.01, atol=1e-3)
    assert store.d_in(POOLER) == D_MODEL
    store.verify()


@pytest.mark.parametrize("rows", ["position", "mean"])
def test_what_is_damaged_is_computed_again(root: Path, tmp_path: Path, rows: str) -> None:
    config = config_of(root, tmp_path / "out", rows=rows)
    store = harvest(config)
    zarr = store.path / "activations.zarr"
    for file in (zarr / LAST / "c" / "0" / "0", zarr / "row_token" / "c" / "1", zarr / "keep" /
                 "c" / "0" / "0"):  # fmt: skip
        before = file.read_bytes()
        file.write_bytes(b"\0" * len(before))
        assert doctor(DoctorConfig(path=config.out, repair=True)) == 0
        assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": (POOLER,)}, "pooler.*1 positions for 4 tokens.*rows = mean"),
        ({"sites": ("resid_post:1",)}, "no such site"),
        ({"sites": ("module:encoder.layer.7:output",)}, r"encoder\.layer\.1:output"),
        ({"sites": ("module:encoder.layer.1:outputs",)}, "no such site"),
        ({"context": 65}, "context.*3 to 64"),
        ({"context": 2}, "context.*3 to 64"),
        ({"model": ModelConfig(spec="minilm")}, "model.kind.*text_encoder"),
    ],
)
def test_bad_input_writes_nothing(
    root: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        harvest(config_of(root, tmp_path / "out", **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_tokens(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "out", max_tokens=10 * 24)
    assert harvest(config).n_sequences == 10
    model = load_model(config.model.spec, kind="text_encoder", dtype="float32")
    text, counts = CorpusReader.of(config), PackingCounts()
    groups = list(text.packed("train", model, per_group=3, counts=counts, limit=8))
    assert [len(group.tokens) for group in groups] == [3, 3, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precisions(root: Path, dtype: str) -> None:
    full, half = (
        load_model(str(root / "model"), kind="text_encoder", dtype=each)
        for each in ("float32", dtype)
    )
    assert isinstance(full, ModuleModel)
    assert isinstance(half, ModuleModel)
    assert half.dtype_name == dtype
    x, rounded = (model.capture(model.example(2), [LAST])[LAST] for model in (full, half))
    assert rounded.dtype == half.dtype
    assert (rounded.float() - x).norm() < 0.05 * x.norm()
    assert half.weights_hash == full.weights_hash


def test_what_needs_a_language_model_says_so(store: ActivationStore) -> None:
    from sae.data.harvests import load_harvested_model

    with pytest.raises(InputError, match=r"needs a language model.*given: 'text_encoder'"):
        load_harvested_model(store, "float32")


def test_its_rows_are_batches_for_training(store: ActivationStore) -> None:
    loader = ActivationLoader(store, [LAST, *store.sites[1:]], batch_size=32, epochs=1)
    batches = list(loader)
    assert len(batches) == store.n_rows("train") // 32
    assert all(part.shape == (32, D_MODEL) for batch in batches for part in batch)


def test_a_text_that_brings_its_special_token_has_one(root: Path) -> None:
    encoder = load_model(str(root / "model"), kind="text_encoder", dtype="float32")
    assert isinstance(encoder, ModuleModel)
    (root / "marked.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("[CLS]the river", "the river"))
    )
    text = CorpusReader(
        corpus=CorpusConfig(source=str(root / "marked.jsonl")), context=12, held_out_fraction=0.0
    )
    (group,) = text.packed("train", encoder, per_group=4, counts=PackingCounts(), limit=None)
    assert group.tokens[0].tolist() == group.tokens[1].tolist()
