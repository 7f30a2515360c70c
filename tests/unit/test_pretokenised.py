"""Corpora that are tokenised already, long and odd records, BOS by choice, what a harvest says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from activations import ActivationStore, CorpusConfig, HarvestConfig, Model, ModelConfig, harvest
from activations.corpora.documents import documents
from activations.corpora.long_texts import encoded_in_pieces
from activations.corpora.sequences import PackingCounts, PackingOptions
from activations.harvesting.corpus_reader import CorpusReader
from saescope.errors import InputError
from tests.tiny import SENTENCES, make_tiny_model

TEXTS = [f"{SENTENCES[n % 7]} Number {n}." for n in range(60)]
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def ids(tiny_model: Model) -> list[list[int]]:
    """As a tokenizer gives them, with BOS and, of some, EOS."""
    eos = [tiny_model.eos_token_id or 0]
    return [tiny_model.tokenize(text) + eos * (n % 2) for n, text in enumerate(TEXTS)]


def harvested(model: Path, out: Path, corpus: CorpusConfig, **fields: Any) -> ActivationStore:
    settings: dict[str, Any] = {"context": 16, "chunk_rows": 512, "held_out_fraction": 0.2}
    return harvest(
        HarvestConfig(
            model=ModelConfig(spec=str(model), dtype="float32"), corpus=corpus, sites=(SITE,),
            out=str(out), **{**settings, **fields},
        )
    )  # fmt: skip


def saved(kind: str, folder: Path, ids: list[list[int]]) -> CorpusConfig:
    """The same ids in each kind of file."""
    import datasets

    folder.mkdir()
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "title": ["x"] * len(ids)})
    path = folder / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, 7)
    else:
        data = datasets.Dataset(table)
        whole: Any = datasets.DatasetDict({"train": data}) if kind == "splits" else data
        whole.save_to_disk(folder / "saved", **({} if kind == "splits" else {"num_shards": 2}))
        path = folder / "saved"
    return CorpusConfig(source=str(path), tokens_field="input_ids")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow", "saved", "splits"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_token_ids_are_harvested_as_their_text_is(
    tmp_path: Path, tiny_folder: Path, ids: list[list[int]], kind: str
) -> None:
    lines = [json.dumps({"text": text, "title": "x"}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    of_text = harvested(
        tiny_folder, tmp_path / "text", CorpusConfig(source=str(tmp_path / "texts.jsonl"))
    )
    of_ids = harvested(tiny_folder, tmp_path / "ids", saved(kind, tmp_path / "files", ids))
    assert of_text.n_rows("held_out") > 0
    for array in ("tokens", "document", "keep", "split"):
        assert np.array_equal(getattr(of_text, array), getattr(of_ids, array)), array
    for index in range(len(of_text.windows[0].chunks(512))):
        assert of_text.read_chunk(SITE, index)[0].equal(of_ids.read_chunk(SITE, index)[0])
    assert of_text.manifest["corpus"]["train"]["hash"] == of_ids.manifest["corpus"]["train"]["hash"]


def test_rows_that_fill_a_context_stay_sequences(tmp_path: Path, tiny_model: Model) -> None:
    """With packing "separate" and their length as context."""
    rows = [[0, *range(5 + n, 20 + n)] for n in range(30)]
    corpus = saved("parquet", tmp_path / "files", rows)
    text = CorpusReader(corpus=corpus, context=16, held_out_fraction=0.0, packing="separate")
    (group,) = text.packed("train", tiny_model, per_group=99, counts=PackingCounts(), limit=None)
    assert group.tokens.tolist() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[5, 400]],
            r"a.jsonl:1: is no token of this model's tokenizer.*given: 400; allowed: 0 to",
        ),
        ([[5], [-1]], r"a.jsonl:2: is no token of this model's tokenizer.*given: -1"),
        ([[5, 1.0]], "a.jsonl:1: field 'input_ids' is not a list of token ids"),
        ([[True]], "not a list of token ids"),
        ([[10**30]], "not a list of token ids"),
        (["text"], "not a list of token ids"),
        ([[]], "no text"),
    ],
)
def test_wrong_ids(tmp_path: Path, tiny_model: Model, rows: list[Any], message: str) -> None:
    lines = [json.dumps({"input_ids": row}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig(source=str(tmp_path / "a.jsonl"), tokens_field="input_ids")
    text = CorpusReader(corpus=corpus, context=16, held_out_fraction=0.0)
    with pytest.raises(InputError, match=message):
        list(text.packed("train", tiny_model, per_group=9, counts=PackingCounts(), limit=None))


def test_what_is_suggested_is_not_then_refused(tmp_path: Path, ids: list[list[int]]) -> None:
    corpus = saved("parquet", tmp_path / "files", ids)
    with pytest.raises(InputError, match=r'corpus\.tokens_field = "input_ids"'):
        list(documents(CorpusConfig(source=corpus.source)))
    with pytest.raises(InputError, match=r"not text \(for token ids set corpus.tokens_field\)"):
        list(documents(CorpusConfig(source=corpus.source, text_field="input_ids")))
    with pytest.raises(InputError, match="need a language model"):
        list(documents(corpus))
    with pytest.raises(InputError, match="read from one field"):
        CorpusConfig(source="a", tokens_field="input_ids", messages_field="messages")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="has no fields, so no token ids either"):
        list(documents(CorpusConfig(source=str(tmp_path / "a.txt"), tokens_field="input_ids")))
    with pytest.raises(InputError, match="no data set was saved to it"):
        list(documents(CorpusConfig(source=str(tmp_path))))


@pytest.mark.parametrize("end", [100, -40])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables(tmp_path: Path, ids: list[list[int]], kind: str, end: int) -> None:
    corpus = saved(kind, tmp_path / "files", ids)
    path = Path(corpus.source)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(InputError, match=f"a.{kind}: not a readable"):
        list(documents(corpus))


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"a":' * 100_000, '{"text": Infinity}', '{"text": ' + "9" * 5000 + "}",
     '{"text": "a\0b"}', '{"text": 1e999}', '{"text": "half', "\0"],
)  # fmt: skip
def test_odd_lines_are_one_line_of_error_with_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:2: ") as caught:
        list(documents(CorpusConfig(source=str(tmp_path / "a.jsonl"))))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_halves_of_surrogate_pairs_are_replaced_in_titles_too(
    tmp_path: Path, tiny_folder: Path
) -> None:
    lines = [json.dumps({"text": text, "title": f"\ud83d {n}"}) for n, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = harvested(tiny_folder, tmp_path / "out", CorpusConfig(source=str(tmp_path / "a.jsonl")))
    counts = store.manifest["corpus"]
    assert sum(counts[split]["replaced_documents"] for split in counts) == len(TEXTS)
    assert store.read_documents(0)["title"].to_pylist()[0].startswith("? ")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_long_text_has_the_tokens_of_the_whole_and_stops_where_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    from activations import load_model

    model = load_model(str(make_tiny_model(tmp_path / "model", architecture)), dtype="float32")
    text = "\n\n".join(" ".join(SENTENCES[n % 7] for n in range(k, k + 3)) for k in range(40))
    expected = model.tokenize_batch([text])[0]
    monkeypatch.setattr("activations.corpora.long_texts.LONG_CHARACTERS", 500)
    monkeypatch.setattr("activations.corpora.packing.LONG_CHARACTERS", 500)
    monkeypatch.setattr("activations.corpora.long_texts._PIECE_CHARACTERS", 100)
    pieces = list(encoded_in_pieces(text, model.tokenize_batch))
    assert len(pieces) > 10
    assert [each for piece in pieces for each in piece] == expected
    assert model.tokenize_batch([text, "short"])[0] == expected
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    found = list(documents(CorpusConfig(source=str(tmp_path / "a.jsonl"))))
    for packing in ("joined", "separate"):
        counts = PackingCounts()
        options = PackingOptions(kind=packing)
        groups = list(
            model.sequences(found, context=9, per_group=4, counts=counts, packing=options)
        )
        first = int(model.bos_token_id is not None)
        tokens = np.concatenate([group.tokens[:, first:] for group in groups]).ravel()
        assert tokens[: len(expected)].tolist() == expected[: len(tokens)]
        fills = packing == "separate" and len(expected) % (9 - first) == 0
        assert (counts.documents, counts.tokens) == (1, len(expected) + (not fills))
        few = PackingCounts()
        (group,) = model.sequences(
            found, context=9, per_group=4, counts=few, packing=options, limit=2
        )
        assert len(group.tokens) == 2
        assert few.documents == 1
        assert few.tokens < len(expected) / 2


def test_bos_by_choice(tmp_path: Path, tiny_model: Model) -> None:
    from activations import load_model

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    corpus = CorpusConfig(source=str(tmp_path / "a.jsonl"))
    gpt2 = load_model(str(make_tiny_model(tmp_path / "gpt2", "gpt2")), dtype="float32")

    def tokens(model: Model, prepend_bos: bool | None) -> np.ndarray:
        text = CorpusReader(
            corpus=corpus, context=16, held_out_fraction=0.0, prepend_bos=prepend_bos
        )
        (group,) = text.packed("train", model, per_group=999, counts=PackingCounts(), limit=None)
        return group.tokens

    assert (tokens(gpt2, True)[:, 0] == gpt2.tokenizer.bos_token_id).all()
    assert np.array_equal(tokens(gpt2, False), tokens(gpt2, None))
    assert np.array_equal(tokens(tiny_model, True), tokens(tiny_model, None))
    assert not (tokens(tiny_model, False) == tiny_model.bos_token_id).any()
    flow = tokens(gpt2, None).ravel()
    assert np.array_equal(tokens(gpt2, True)[:, 1:].ravel()[:200], flow[:200])
    gpt2.tokenizer.bos_token = None
    with pytest.raises(InputError, match="prepend_bos: this model's tokenizer has no BOS"):
        tokens(gpt2, True)


def test_a_harvest_says_what_the_corpus_did_not_have(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(TEXTS))
    corpus = CorpusConfig(source=str(tmp_path / "book.txt"))
    store = harvested(
        tiny_folder, tmp_path / "out", corpus, max_tokens=100_000, held_out_fraction=0.0
    )
    said = capsys.readouterr().out
    assert f"ended after {store.n_tokens:,} of the 100,000 tokens" in said
    assert "no held-out rows" in said
