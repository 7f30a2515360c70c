"""Queries of tokens, phrases, documents and pairs of features against plain loops over the rows."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saescope.errors import InputError
from store import FeatureStore, StoreWriter, token_queries
from store.phrases import PhraseFinder
from store.vocabulary import Vocabulary
from tests.tiny_store import (
    CONTEXT,
    D_SAE,
    DEAD,
    EVERYWHERE,
    N_DOCUMENTS,
    N_SEQUENCES,
    RARE,
    WORDS,
    make_rows,
    make_tiny_store,
)

ROWS = make_rows()
TOKENS, KEEP, DOCUMENT = ROWS.tokens.ravel(), ROWS.keep.ravel(), ROWS.document.ravel()
BYTES = [word if isinstance(word, bytes) else word.encode() for word in WORDS]
ACTIVE = {
    (int(p), int(f)): float(a)
    for p, f, a in zip(ROWS.position, ROWS.feature, ROWS.activation, strict=True)
}
CALM = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    with FeatureStore.open(make_tiny_store(tmp_path_factory.mktemp("stores"))) as opened:
        yield opened


def stands_at(texts: set[bytes], fold: Callable[[bytes], bytes] = bytes) -> dict[int, int]:
    """By brute force: position of the last token -> most tokens that make up one of the texts."""
    found: dict[int, int] = {}
    for end, size in itertools.product(range(len(TOKENS)), range(1, 6)):
        begin = end - size + 1
        if begin < 0 or begin // CONTEXT != end // CONTEXT or DOCUMENT[begin] != DOCUMENT[end]:
            continue
        if fold(b"".join(BYTES[t] for t in TOKENS[begin : end + 1])) in texts:
            found[end] = max(size, found.get(end, 0))
    return found


def check(features: FeatureStore, of: Any, expected: dict[int, int], **options: Any) -> None:
    found = features.occurrences(of, **options)
    kept = {p: n for p, n in expected.items() if KEEP[p]}
    assert dict(zip(found.position.tolist(), found.length.tolist(), strict=True)) == kept
    assert found.position.tolist() == sorted(kept)
    assert found.n == len(kept)
    assert found.n_left_out == len(expected) - len(kept)
    assert sum(s.count for s in found.spellings) == found.n


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("the", {b"the", b" the"}),
        (" the", {b" the"}),
        ("the river", {b"the river", b" the river"}),
        (" light.", {b" light."}),
        (".,", {b".,", b" .,"}),
        ("雨", {"雨".encode(), " 雨".encode()}),
        ("\n\t", {b"\n\t"}),
        ("riv", {b"riv"}),
        ("<|endoftext|>", {b"<|endoftext|>"}),
    ],
)
def test_a_text_is_found_however_it_is_cut(
    features: FeatureStore, text: str, written: set[bytes]
) -> None:
    check(features, text, stands_at(written))


SYLLABLES = ("a", "aa", "b", "ab", " a", " ", "A", "aab", b"\xc3", b"\xa9", "", "é")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, len(SYLLABLES) - 1), max_size=40),
    st.text("aAb é", min_size=1, max_size=6),
    st.sets(st.integers(0, 39), max_size=5),
    st.booleans(),
)
def test_all_ways_to_cut_a_text_are_found(
    ids: list[int], text: str, breaks: set[int], ignore_case: bool
) -> None:
    raw = [s.encode() if isinstance(s, str) else s for s in SYLLABLES]
    texts = [s if isinstance(s, str) else "" for s in SYLLABLES]
    partial = {i: s for i, s in enumerate(SYLLABLES) if isinstance(s, bytes)}
    tokens = np.array(ids, dtype=np.int32)
    joined = np.array([i not in breaks | {0} for i in range(len(ids))], dtype=bool)
    finder = PhraseFinder(Vocabulary(texts, partial), ignore_case=ignore_case)
    index, length = finder.find(text, tokens, joined)

    def folded(given: bytes) -> bytes:
        return given.replace(b"A", b"a") if ignore_case else given

    expected = [
        (end, end - begin + 1)
        for end in range(len(ids))
        for begin in range(end, -1, -1)
        if all(joined[begin + 1 : end + 1])
        and all(raw[t] for t in ids[begin : end + 1])
        and folded(b"".join(raw[t] for t in ids[begin : end + 1])) == folded(text.encode())
    ]
    assert sorted(zip(index.tolist(), length.tolist(), strict=True)) == sorted(expected)


def test_the_tokens_of_one_character_are_found_together(features: FeatureStore) -> None:
    found = features.occurrences("雨", leading_space=False)
    assert 3 * CONTEXT + 5 in found.position.tolist()
    assert found.spellings[0].token_ids == (WORDS.index(b"\xe9\x9b"), WORDS.index(b"\xa8"))
    assert found.spellings[0].tokens == ("", "雨")


def test_the_space_before_a_text_can_be_asked_for(features: FeatureStore) -> None:
    with_space = features.occurrences("the", leading_space=True)
    assert with_space.position.tolist() == features.occurrences(" the").position.tolist()
    assert with_space.n > 0
    assert features.occurrences("the", leading_space=False).n == 0
    check(features, ".", stands_at({b"."}), leading_space=False)


@CALM
@given(st.integers(0, len(TOKENS) - 1), st.integers(1, 4), st.sampled_from([None, True, False]))
def test_every_phrase_of_the_corpus_is_found(
    features: FeatureStore, begin: int, size: int, space: bool | None
) -> None:
    raw = b"".join(BYTES[t] for t in TOKENS[begin : begin + size])
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    if text[0].isspace():
        written = {raw}
    else:
        written = {None: {raw, b" " + raw}, True: {b" " + raw}, False: {raw}}[space]
    check(features, text, stands_at(written), leading_space=space)


@CALM
@given(st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=3))
def test_tokens_are_found_by_their_ids(features: FeatureStore, ids: list[int]) -> None:
    expected = {}
    for end in range(len(TOKENS)):
        begin = end - len(ids) + 1
        joined = begin >= 0 and begin // CONTEXT == end // CONTEXT
        if joined and DOCUMENT[begin] == DOCUMENT[end] and TOKENS[begin : end + 1].tolist() == ids:
            expected[end] = len(ids)
    check(features, ids, expected)
    if len(ids) == 1:
        check(features, ids[0], expected)


def test_upper_and_lower_case(features: FeatureStore) -> None:
    assert features.occurrences("paris").n == 0
    written = {b"paris", b" paris"}
    check(features, "pARIS", stands_at(written, bytes.lower), ignore_case=True)


def test_tokens_that_begin_with_a_text(features: FeatureStore) -> None:
    ids = [i for i, raw in enumerate(BYTES) if raw.startswith((b"r", b" r"))]
    assert len(ids) == 1
    letters = [i for i, raw in enumerate(BYTES) if raw.lower().startswith((b"t", b" t"))]
    assert {WORDS[i] for i in letters} == {" the", " Tuesday"}
    expected = dict.fromkeys(np.flatnonzero(np.isin(TOKENS, letters)).tolist(), 1)
    check(features, "T", expected, match="begins", ignore_case=True)


def test_several_texts_count_once_each(features: FeatureStore) -> None:
    check(features, ["river", " river", "of"], stands_at({b" river", b" of", b"river", b"of"}))


def by_hand(positions: list[int], reach: list[int] | None = None) -> dict[int, list[float]]:
    """By brute force: feature -> its activation at each of the positions where it fires."""
    found: dict[int, list[float]] = {}
    for number, position in enumerate(positions):
        back = reach[number] if reach else 1
        for feature in range(D_SAE):
            here = [ACTIVE.get((position - b, feature), 0.0) for b in range(back)]
            if max(here) > 0:
                found.setdefault(feature, []).append(max(here))
    return found


@pytest.mark.parametrize("order", ["dice", "share", "lift", "mean", "max"])
@pytest.mark.parametrize(("of", "anywhere"), [(" the", False), (["the river", "of"], True)])
def test_features_on_a_token_or_a_phrase(
    features: FeatureStore, of: Any, anywhere: bool, order: str
) -> None:
    occurrences = features.occurrences(of)
    positions = occurrences.position.tolist()
    expected = by_hand(positions, occurrences.length.tolist() if anywhere else None)
    found = features.features_on(occurrences, order=order, limit=D_SAE, anywhere=anywhere)
    assert found.n_read == found.n_occurrences == len(positions) > 5
    assert found.n_features == len(found.feature) == len(expected)
    assert set(found.feature.tolist()) == set(expected)
    kept = KEEP.sum()
    for index, feature in enumerate(found.feature.tolist()):
        values = expected[feature]
        density = np.count_nonzero(ROWS.feature == feature) / kept
        assert found.count[index] == len(values)
        assert found.share[index] == pytest.approx(len(values) / len(positions))
        assert found.lift[index] == pytest.approx(len(values) / len(positions) / density)
        both = 2 * len(values) / (len(positions) + density * kept)
        assert found.dice[index] == pytest.approx(both)
        assert found.mean[index] == pytest.approx(np.mean(values))
        assert found.max[index] == max(values)
    ranked = getattr(found, order).tolist()
    assert ranked == sorted(ranked, reverse=True)
    top = features.features_on(occurrences, order=order, limit=3, anywhere=anywhere)
    assert top.feature.tolist() == found.feature.tolist()[:3]
    assert top.n_features == len(expected)


def test_features_on_nothing(features: FeatureStore) -> None:
    nothing = features.occurrences("zebra")
    assert (nothing.n, nothing.spellings) == (0, ())
    found = features.features_on(nothing, anywhere=True)
    assert (found.n_read, found.n_features, len(found.feature)) == (0, 0, 0)
    assert features.silent_on(EVERYWHERE, nothing).n == 0
    assert features.firing_on(EVERYWHERE, nothing)[0].n == 0


@pytest.mark.parametrize("feature", [EVERYWHERE, RARE, DEAD[0], 5])
def test_where_a_feature_fires_on_a_token_and_where_it_is_silent(
    features: FeatureStore, feature: int
) -> None:
    occurrences = features.occurrences([" the", " river", " of"])
    fires = {p: ACTIVE[p, feature] for p in occurrences.position.tolist() if (p, feature) in ACTIVE}
    firing, activation = features.firing_on(feature, occurrences)
    assert dict(zip(firing.position.tolist(), activation.tolist(), strict=True)) == fires
    assert activation.tolist() == sorted(fires.values(), reverse=True)
    silent = features.silent_on(feature, occurrences)
    assert silent.position.tolist() == [p for p in occurrences.position.tolist() if p not in fires]
    for part in (firing, silent):
        assert sum(s.count for s in part.spellings) == part.n
        for spelling in part.spellings:
            at = [p for p in part.position.tolist() if TOKENS[p] == spelling.token_ids[-1]]
            assert len(at) == spelling.count


def test_examples_at_any_positions(features: FeatureStore) -> None:
    occurrences = features.occurrences(" the")
    wanted = occurrences.position[::-1][:4]
    examples = features.examples_at(5, wanted, window=3)
    assert [e.position for e in examples] == wanted.tolist()
    for example in examples:
        sequence, index = divmod(example.position, CONTEXT)
        assert (example.sequence, example.index) == (sequence, index)
        assert example.activation == ACTIVE.get((example.position, 5), 0.0)
        shown = range(example.start, example.start + len(example.tokens))
        assert list(shown) == list(range(max(index - 3, 0), min(index + 4, CONTEXT)))
        assert example.token_ids == TOKENS.reshape(-1, CONTEXT)[sequence][list(shown)].tolist()
        assert example.activations == [
            ACTIVE.get((sequence * CONTEXT + at, 5), 0.0) for at in shown
        ]
    assert features.examples_at(5, []) == []
    with pytest.raises(InputError, match="no such sequence"):
        features.examples_at(5, [N_SEQUENCES * CONTEXT])
    with pytest.raises(InputError, match="too many positions"):
        features.examples_at(5, range(201))


PAIRS = st.tuples(st.integers(0, D_SAE - 1), st.integers(0, D_SAE - 1)).filter(
    lambda pair: pair[0] != pair[1]
)


def rows_of(feature: int) -> list[tuple[int, float]]:
    mine = sorted((-a, p) for (p, f), a in ACTIVE.items() if f == feature)
    return [(p, -a) for a, p in mine]


@CALM
@given(PAIRS)
def test_one_fires_without_the_other(features: FeatureStore, pair: tuple[int, int]) -> None:
    a, b = pair
    expected = [(p, v) for p, v in rows_of(a) if (p, b) not in ACTIVE]
    found = features.fires_without(a, b, limit=7)
    assert found.n == len(expected)
    spots = zip(found.position.tolist(), found.activation.tolist(), strict=True)
    assert list(spots) == expected[:7]


@CALM
@given(PAIRS, st.integers(0, CONTEXT - 1))
def test_both_fire_near_each_other(
    features: FeatureStore, pair: tuple[int, int], within: int
) -> None:
    a, b = pair
    expected = []
    for position, value in rows_of(a):
        begin = position // CONTEXT * CONTEXT
        near = [
            (abs(p - position), p)
            for p in range(begin, begin + CONTEXT)
            if (p, b) in ACTIVE and abs(p - position) <= within
        ]
        if near:
            other = min(near)[1]
            expected.append((position, value, other, ACTIVE[other, b]))
    found = features.fires_near(a, b, within, limit=9)
    assert found.n == len(expected)
    columns = (found.position, found.activation, found.other_position, found.other_activation)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected[:9]


def test_a_document_and_its_features(features: FeatureStore) -> None:
    for number in range(N_DOCUMENTS):
        positions = np.flatnonzero(number == DOCUMENT).tolist()
        document = features.document(number)
        assert document.position.tolist() == positions
        assert document.token_ids.tolist() == TOKENS[positions].tolist()
        assert (document.key, document.title) == (f"doc-{number}", f"Title <{number}>")
        assert document.split == ("held_out" if number == N_DOCUMENTS - 1 else "train")
        active = features.features_of_document(number)
        found = list(
            zip(
                *(getattr(active, n).tolist() for n in ("position", "feature", "activation")),
                strict=True,
            )
        )
        expected = [(p, f, a) for (p, f), a in ACTIVE.items() if p in set(positions)]
        assert found == sorted(expected, key=lambda row: (row[0], -row[2], row[1]))


def test_documents_are_found_by_their_titles(features: FeatureStore) -> None:
    page = features.documents("TITLE <1", limit=3, offset=2)
    ones = [n for n in range(N_DOCUMENTS) if str(n).startswith("1")]
    assert page.total == len(ones)
    assert page.rows == [(n, f"doc-{n}", f"Title <{n}>") for n in ones[2:5]]
    assert features.documents("doc-24").rows == [(24, "doc-24", "Title <24>")]
    assert features.documents().total == N_DOCUMENTS
    assert features.documents("%").total == features.documents("' OR 1=1 --").total == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.occurrences(""), "is no text to look for"),
        (lambda s: s.occurrences("x" * 201), "given: '201 characters'"),
        (lambda s: s.occurrences(["a", 3]), "is no text to look for"),
        (lambda s: s.occurrences("\ud800"), "has characters that are no text"),
        (lambda s: s.occurrences(len(WORDS)), "no such token"),
        (lambda s: s.occurrences([1, -1]), "no such token"),
        (lambda s: s.occurrences([]), "a phrase has a token or more"),
        (lambda s: s.occurrences(1.5), "is not a whole number"),
        (lambda s: s.occurrences("a", match="like"), "no such match"),
        (lambda s: s.features_on(s.occurrences("a"), order="feature; --"), "no such order"),
        (lambda s: s.firing_on(D_SAE, s.occurrences("a")), "no such feature"),
        (lambda s: s.silent_on(-1, s.occurrences("a")), "no such feature"),
        (lambda s: s.fires_without(5, 5), "needs two different features"),
        (lambda s: s.fires_near(5, 6, CONTEXT), "within: out of range"),
        (lambda s: s.document(N_DOCUMENTS), "no such document"),
        (lambda s: s.features_of_document("1; DROP TABLE x"), "is not a whole number"),
        (lambda s: s.documents(5), "is no text"),
    ],
)
def test_wrong_questions(
    features: FeatureStore, call: Callable[[FeatureStore], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(features)


def test_a_common_token_is_read_in_evenly_spread_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 1 at every second position, in many sequences; feature 1 fires on every fourth."""
    context, sequences = 64, 1024
    path = tmp_path / "features.duckdb"
    shape = (sequences, context)
    tokens = (np.arange(sequences * context) % 2).astype(np.int32).reshape(shape)
    with StoreWriter(path, meta={}, d_sae=2, context=context, threads=1) as writer:
        writer.add_vocabulary(["a", "b"])
        document = np.zeros(shape, dtype=np.int32)
        split = np.zeros(sequences, dtype=np.int8)
        writer.add_sequences(0, tokens, document, np.ones(shape, dtype=bool), split)
        writer.add_documents(
            pa.table({"document": [0], "key": ["k"], "title": ["t"], "split": ["train"]})
        )
        position = np.flatnonzero(np.arange(sequences * context) % 4 == 1)
        writer.add_activations(position, np.full(len(position), 1), np.full(len(position), 2.0))
        writer.finish()
    with FeatureStore.open(path) as features:
        occurrences = features.occurrences(1)
        assert occurrences.n == sequences * context // 2
        assert features.features_on(occurrences).n_read == occurrences.n, "a small store"
        monkeypatch.setattr(token_queries, "_ROW_GROUP", 256)
        some = features.features_on(occurrences)
        assert some.n_read == 32 * 1024 // 2 < some.n_occurrences
        assert (some.share.tolist(), some.lift.tolist()) == ([0.5], [2.0])
        whole = features.features_on(occurrences, exact=True)
        assert whole.n_read == occurrences.n
        assert whole.count.tolist() == [occurrences.n // 2]
