"""Reading corpora: mixes, repetitions, conversations, places to go on from, documents apart."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from activations import CorpusConfig, Model
from activations.corpora.documents import (
    Document,
    DocumentStream,
    MixedConfig,
    TextHashes,
    documents,
)
from activations.corpora.packing import pack
from activations.corpora.sequences import PackingCounts, PackingOptions, Sequences
from activations.harvesting.corpus_reader import CorpusReader
from activations.models.tokenizer import TextCodec
from saescope.errors import ArtefactError, InputError


def write_texts(path: Path, texts: list[Any], field: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def mixed(*members: MixedConfig, **fields: Any) -> CorpusConfig:
    return CorpusConfig(source="mix", mix=members, **fields)


def texts(config: CorpusConfig) -> list[str]:
    return [document.text for document in documents(config)]


# mixes


def test_a_mix_by_hand(tmp_path: Path) -> None:
    a = write_texts(tmp_path / "a.jsonl", ["aaaa"] * 6)
    b = write_texts(tmp_path / "b.jsonl", ["bb"] * 6)
    config = mixed(MixedConfig(source=a, weight=2.0), MixedConfig(source=b, weight=1.0))
    # bytes over weight so far: a 0 b 0, a 2 b 0, a 2 b 2, a 4 b 2, ...
    assert texts(config) == ["aaaa", "bb"] * 6
    assert [document.member for document in documents(config)] == [0, 1] * 6
    assert [document.id for document in documents(config)] == list(range(12))
    even = mixed(MixedConfig(source=a), MixedConfig(source=b))
    # b has no more when its turn comes for the seventh time: the mix ends there
    assert texts(even) == [*["aaaa", "bb", "bb"] * 3, "aaaa"]
    assert texts(mixed(*even.mix, mix_ends="last")) == ["aaaa", "bb", "bb"] * 3 + ["aaaa"] * 3


def test_a_mix_has_the_shares_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = [
        write_texts(tmp_path / f"{n}.jsonl", ["é" * int(s) for s in rng.integers(1, 99, 4000)])
        for n in range(3)
    ]
    weights = (5.0, 3.0, 2.0)
    config = mixed(
        *(MixedConfig(source=s, weight=w) for s, w in zip(sources, weights, strict=True))
    )
    sizes = np.zeros(3)
    for document in islice(documents(config), 3000):
        sizes[document.member] += len(document.text.encode())
    assert np.abs(sizes / sizes.sum() - np.array(weights) / 10).max() < 0.002


def test_each_source_of_a_mix_has_its_own_fields(tmp_path: Path) -> None:
    a = write_texts(tmp_path / "a.jsonl", ["one"], "body")
    b = write_texts(tmp_path / "b.jsonl", ["two"])
    assert texts(mixed(MixedConfig(source=a, text_field="body"), MixedConfig(source=b))) == [
        "one",
        "two",
    ]


def test_bad_mixes() -> None:
    for build, message in (
        (lambda: CorpusConfig(source="mix"), r"corpus\.source: a mixed corpus has"),
        (lambda: CorpusConfig(mix=(MixedConfig(),)), r"given: 'wikipedia'; allowed: mix"),
        (lambda: mixed(MixedConfig(), text_field="x"), r"corpus\.text_field: belongs to each"),
        (lambda: mixed(MixedConfig(source="mix")), "a mix of mixes"),
        (lambda: MixedConfig(weight=0.0), r"weight: out of range"),
        (lambda: MixedConfig(weight=float("nan")), r"weight: out of range"),
        (lambda: mixed(MixedConfig(), mix_ends=cast(Any, "never")), "mix_ends: no such end"),
    ):
        with pytest.raises(InputError, match=message):
            build()


# empty texts, and texts that are no text


def test_empty_documents_are_told_and_have_no_number(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["x", " ", "", "y\ud800"])
    found = list(DocumentStream(CorpusConfig(source=source), first=7))
    assert [(d.id, d.text, d.is_empty, d.replaced) for d in found] == [
        (7, "x", False, False), (-1, " ", True, False), (-1, "", True, False),
        (8, "y?", False, True),
    ]  # fmt: skip


# places


def corpora(tmp_path: Path) -> dict[str, CorpusConfig]:
    """One of every kind, in several files, with 6 shards of a hub's data set."""
    words = [f"text {n} {'x' * (n % 7)}" for n in range(60)]
    for shard in range(6):
        part = words[shard * 10 : shard * 10 + 10]
        write_texts(tmp_path / "files" / f"{shard}.jsonl", part)
        write_texts(tmp_path / "jsonl" / f"train-{shard}.jsonl", part)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table = pa.table({"text": part})
        parquet.write_table(
            table, tmp_path / "parquet" / f"train-{shard}.parquet", row_group_size=4
        )
    hub = MixedConfig(source=f"hf:{tmp_path}/jsonl", weight=2.0)
    files = MixedConfig(source=f"{tmp_path}/files/*.jsonl")
    return {
        "files": CorpusConfig(source=files.source),
        "hub, JSONL": CorpusConfig(source=hub.source),
        "hub, Parquet": CorpusConfig(source=f"hf:{tmp_path}/parquet"),
        "mix": mixed(hub, files, mix_ends="last"),
    }


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_a_stream_goes_on_from_any_place(tmp_path: Path) -> None:
    for name, config in corpora(tmp_path).items():
        whole = list(DocumentStream(config))
        assert [document.id for document in whole] == list(range(len(whole))), name
        for taken in (0, 1, 9, 10, 11, 33, len(whole)):
            stream = DocumentStream(config)
            first = list(islice(stream, taken))
            state = json.loads(json.dumps(stream.state))
            assert first + list(DocumentStream(config, state=state)) == whole, (
                name,
                taken,
            )


@pytest.mark.usefixtures("offline")
def test_shards_that_were_read_are_not_read_again(tmp_path: Path) -> None:
    config = corpora(tmp_path)["hub, JSONL"]
    stream = DocumentStream(config)
    whole = list(islice(stream, 35))
    state = stream.state
    whole += list(stream)
    for shard in range(2):  # of the one before, datasets skips what was read
        write_texts(tmp_path / "jsonl" / f"train-{shard}.jsonl", ["another"] * 99)
    assert list(DocumentStream(config, state=state)) == whole[35:]


@pytest.mark.usefixtures("offline")
def test_a_stream_that_breaks_off(tmp_path: Path) -> None:
    config = corpora(tmp_path)["hub, Parquet"]
    path = tmp_path / "parquet" / "train-4.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    stream = DocumentStream(config)
    with pytest.raises(ArtefactError, match=r"parquet#\d+: the stream broke off \(\w+: .*to go on"):
        list(stream)


class LetterModel:
    """A token a letter, BOS 1, EOS 2."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def tokenize_batch(self, given: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in given]


def same(one: Sequences, other: Sequences) -> bool:
    arrays = np.array_equal(one.tokens, other.tokens) and np.array_equal(
        one.document, other.document
    )
    return arrays and one.described == other.described


@pytest.mark.parametrize("packing", ["joined", "separate"])
@pytest.mark.parametrize("eos", [2, None])
def test_packing_goes_on_from_the_place_of_any_group(
    monkeypatch: pytest.MonkeyPatch, packing: str, eos: int | None
) -> None:
    if packing == "separate" and eos is None:
        return
    monkeypatch.setattr("activations.corpora.packing._BATCH_DOCUMENTS", 3)
    rng = np.random.default_rng(1)
    source = [
        Document(3 * n, f"key {n}", "abcdefghij" * int(size), "")
        for n, size in enumerate(rng.integers(0, 9, 40))
    ]

    def read(first: int, place: Any = None) -> tuple[list[Sequences], PackingCounts]:
        counts, taken = PackingCounts(), [first]

        def following() -> Any:
            for document in source[first:]:
                taken[0] += 1
                yield document

        if place:
            for name, value in place["reader"][1].items():
                setattr(counts, name, value)
        groups = pack(
            following(),
            LetterModel().tokenize_batch,
            bos=1,
            eos=eos,
            context=16,
            per_group=4,
            counts=counts,
            limit=70,
            packing=PackingOptions(
                kind=packing, state=lambda: (taken[0], counts.stored()), cursor=place
            ),
        )
        return list(groups), counts

    whole, counts = read(0)
    assert len(whole) > 10
    firsts = set()
    for number, group in enumerate(whole):
        place = json.loads(json.dumps(group.cursor))
        firsts.add(place["reader"][0])
        rest, again = read(place["reader"][0], place)
        assert len(rest) == len(whole) - number
        assert all(map(same, rest, whole[number:]))
        assert again.stored() == json.loads(json.dumps(counts.stored())) | {
            "sources": again.sources
        }
        assert [list(pair) for pair in again.sources] == [list(pair) for pair in counts.sources]
    assert len(firsts) > 5, "places must move on"


# documents apart


def test_documents_apart_by_hand() -> None:
    source = [Document(n, "", text, "") for n, text in enumerate(["abcd", "e", "fgh", "ijklmn"])]
    counts = PackingCounts()
    (group,) = pack(
        source,
        LetterModel().tokenize_batch,
        bos=1,
        eos=2,
        context=4,
        per_group=99,
        counts=counts,
        packing=PackingOptions(kind="separate"),
    )
    letters = {1: "<", 2: ">"}
    rows = ["".join(letters.get(t, chr(t)) for t in row) for row in group.tokens.tolist()]
    # "fgh" and "ijklmn" fill their last sequence, so that their EOS has no place
    assert rows == ["<abc", "<d>>", "<e>>", "<fgh", "<ijk", "<lmn"]
    assert group.document.tolist() == [
        [0, 0, 0, 0], [0, 0, 0, -1], [1, 1, 1, -1], [2] * 4, [3] * 4, [3] * 4,
    ]  # fmt: skip
    assert (counts.tokens, counts.dropped_tokens) == (16, 0)
    with pytest.raises(InputError, match="no EOS to fill"):
        list(
            pack(
                source,
                LetterModel().tokenize_batch,
                bos=1,
                eos=None,
                context=4,
                per_group=9,
                counts=PackingCounts(),
                packing=PackingOptions(kind="separate"),
            )
        )


# repetitions


def test_seen_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activations.corpora.documents._MOST_LOOSE", 10)
    rng = np.random.default_rng(0)
    given = [int(n) for n in rng.integers(0, 300, 1000)] + [2**64 - 1, 0, 2**64 - 1]
    before = [3, 5, 2**63]
    seen, known = TextHashes(before), set(before)
    for number in given:
        assert seen.add(number) == (number not in known)
        known.add(number)


def test_repetitions_are_left_out_and_counted(tmp_path: Path, tiny_model: Model) -> None:
    some = [f"This is text number {n} of those that are read." for n in range(40)]
    source = write_texts(tmp_path / "a.jsonl", [*some, *some[:25], " ", *some[20:]])
    once = write_texts(tmp_path / "b.jsonl", some)
    read, alone = (
        CorpusReader(corpus=CorpusConfig(source=name, deduplicate=apart), context=16,
             held_out_fraction=0.3)
        for name, apart in ((source, True), (once, False))
    )  # fmt: skip
    totals = np.zeros(3, int)
    for split in ("train", "held_out"):
        counts, fewer = PackingCounts(), PackingCounts()
        given: dict[str, Any] = {"per_group": 999, "limit": None}
        (found,) = read.packed(split, tiny_model, counts=counts, **given)
        (expected,) = alone.packed(split, tiny_model, counts=fewer, **given)
        assert np.array_equal(found.tokens, expected.tokens)
        assert counts.digest.hexdigest() == fewer.digest.hexdigest()
        totals += (counts.documents, counts.duplicate_documents, counts.empty_documents)
        assert all(len(entry) == 4 for entry in found.described)
        numbers = np.array([entry[3] for entry in found.described], np.uint64)
        with pytest.raises(StopIteration):
            next(read.packed(split, tiny_model, counts=PackingCounts(), before=numbers, **given))
    assert totals.tolist() == [40, 45, 1]


# conversations

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.tool is defined %} with {{ m.tool }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]


@pytest.fixture
def chatty(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", TEMPLATE)
    return tiny_model


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_what_the_template_makes_of_them(
    tmp_path: Path, chatty: Model, kind: str
) -> None:
    talks = [TALK, [{"role": "user", "content": "Bye.", "tool": "hat"}]]
    rows = [{"talk": talk} for talk in talks]
    if kind == "jsonl":
        write_texts(tmp_path / "a.jsonl", talks, "talk")
    else:
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = CorpusConfig(source=f"{tmp_path}/a.{kind}", messages_field="talk")
    render = TextCodec(chatty.tokenizer).render_chat
    found = [document.text for document in documents(config, render=render)]
    assert found == ["[user] Hello.\n[assistant] Good day.\n", "[user] Bye. with hat\n"]
    # one BOS a sequence, not one more for the template's
    text = CorpusReader(corpus=config, context=8, held_out_fraction=0.0)
    groups = text.packed("train", chatty, per_group=99, counts=PackingCounts(), limit=None)
    tokens = np.concatenate([group.tokens for group in groups])
    bos = chatty.bos_token_id
    assert (tokens == bos).sum() == len(tokens)
    assert (tokens[:, 0] == bos).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "not a list of messages.*'str'"),
        ([{"role": "user"}], 'not text with a role.*allowed: {"role"'),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text with a role"),
    ],
)
def test_bad_conversations(tmp_path: Path, content: Any, message: str) -> None:
    source = write_texts(tmp_path / "a.jsonl", [content], "talk")
    config = CorpusConfig(source=source, messages_field="talk")
    with pytest.raises(InputError, match=rf"a\.jsonl:1.*{message}"):
        list(documents(config, render=lambda _: ""))


def test_conversations_that_cannot_be_rendered(
    tmp_path: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(
        source=write_texts(tmp_path / "a.jsonl", [TALK], "talk"), messages_field="talk"
    )
    render = TextCodec(tiny_model.tokenizer).render_chat
    with pytest.raises(InputError, match=r"a\.jsonl:1: this model's tokenizer has no chat"):
        list(documents(config, render=render))
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*roles must alternate"):
        list(documents(config, render=render))
    with pytest.raises(InputError, match="needs a model's chat template"):
        list(documents(config))
    (tmp_path / "b.txt").write_text("text")
    for source in (str(tmp_path / "b.txt"), "wikipedia"):
        with pytest.raises(InputError, match="no conversations"):
            list(documents(CorpusConfig(source=source, messages_field="talk")))
    with pytest.raises(InputError, match=r"no such field: set corpus\.messages_field"):
        list(documents(CorpusConfig(source=config.source, messages_field="chat")))
