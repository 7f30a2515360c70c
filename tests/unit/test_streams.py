"""Streams: the right rows of the right sites, exact resume, outliers out, labels right."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activations import ActivationLoader, ActivationStore
from activations.loading.outliers import OutlierFilter
from sae.data.streams import (
    AllLayers,
    Concatenated,
    DrawnLayer,
    OneSite,
    Pairs,
    RawBatch,
    Stream,
    make_stream,
)
from saescope.errors import InputError
from tests.hand_store import make_hand_store

A, B, C, WIDE = (f"blocks.{n}.hook_resid_post" for n in range(4))
LAYERS = (A, B, C)
WIDTH, CONTEXT = 3, 5
HUGE = 7
"""the training row that is an outlier at B alone"""


def rows(count: int, seed: int) -> dict[str, Tensor]:
    """Row r of layer l holds r, l, and noise below 1; small integers are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(count, dtype=torch.float32) % 128 + 40
    made = {}
    for layer, site in enumerate(LAYERS):
        noise = torch.rand(count, generator=generator)
        made[site] = torch.stack([number, torch.full((count,), float(layer)), noise], dim=1)
    made[WIDE] = torch.rand(count, 7, generator=generator)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    train = rows(240, 0)
    train[B][HUGE] = torch.tensor([64000.0, 1.0, 0.0])
    folder = tmp_path_factory.mktemp("streams") / "harvest"
    return make_hand_store(folder, train, rows(40, 1), context=CONTEXT)


def row_token_of(row: int, first: int = 0) -> int:
    """Flat token of a kept row: position 0 of each sequence has none."""
    sequence, position = divmod(row, CONTEXT - 1)
    return (first + sequence) * CONTEXT + position + 1


def stored(store: ActivationStore, site: str) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            x, row_token = store.read_chunk(site, chunk.index)
            found |= dict(zip(row_token.tolist(), x.float(), strict=True))
    return found


def tokens(batch: RawBatch) -> list[int]:
    assert batch.row_token is not None
    return batch.row_token.tolist()


def groups(batch: RawBatch) -> list[int]:
    assert batch.group is not None
    return batch.group.tolist()


def first_batches(stream: Stream, count: int) -> list[RawBatch]:
    return list(islice(stream, count))


def every_kind(store: ActivationStore, **options: Any) -> list[Stream]:
    settings = {"batch_size": 30, "seed": 4, **options}
    return [
        make_stream(store, A, **settings),
        make_stream(store, B, target_site=WIDE, **settings),
        make_stream(store, [C, WIDE], crosscoder=True, **settings),
        make_stream(store, LAYERS, mix_layers="all", **settings),
        make_stream(store, LAYERS, mix_layers="drawn", **settings),
    ]


def test_the_factory_makes_each_kind(store: ActivationStore) -> None:
    made = every_kind(store)
    assert [type(s) for s in made] == [OneSite, Pairs, Concatenated, AllLayers, DrawnLayer]
    assert [(s.d_in, s.d_out) for s in made] == [(3, 3), (3, 7), (10, 10), (3, 3), (3, 3)]
    assert [s.tokens_per_batch for s in made] == [30, 30, 30, 10, 30]
    assert [s.batches_per_epoch for s in made] == [8, 8, 8, 24, 8]


def test_one_site_is_the_loaders_rows(store: ActivationStore) -> None:
    loader = ActivationLoader(store, A, batch_size=30, seed=4)
    stream = make_stream(store, A, batch_size=30, seed=4)
    for batch, (x, row_token) in zip(first_batches(stream, 20), loader.with_rows(), strict=False):
        assert torch.equal(batch.x, x)
        assert tokens(batch) == row_token.tolist()
        assert (batch.target, batch.group, batch.labels) == (None, None, None)


def test_pairs_and_concatenated_hold_the_same_token_at_each_site(store: ActivationStore) -> None:
    at = {site: stored(store, site) for site in store.sites}
    for batch in first_batches(make_stream(store, B, target_site=WIDE, batch_size=30), 9):
        assert batch.target is not None
        for x, target, token in zip(batch.x, batch.target, tokens(batch), strict=True):
            assert torch.equal(x, at[B][token])
            assert torch.equal(target, at[WIDE][token])
    stream = make_stream(store, [WIDE, C], crosscoder=True, batch_size=30)
    assert isinstance(stream, Concatenated)
    assert stream.widths == (7, 3)
    for batch in first_batches(stream, 9):
        for x, token in zip(batch.x, tokens(batch), strict=True):
            assert torch.equal(x, torch.cat([at[WIDE][token], at[C][token]]))


def test_all_layers_gives_every_token_once_at_every_layer(store: ActivationStore) -> None:
    at = {site: stored(store, site) for site in LAYERS}
    stream = make_stream(store, LAYERS, mix_layers="all", batch_size=30)
    seen: list[tuple[int, int]] = []
    for batch in first_batches(stream, stream.batches_per_epoch):
        assert len(batch) == 30
        assert groups(batch) == [0, 1, 2] * 10
        for x, group, token in zip(batch.x, groups(batch), tokens(batch), strict=True):
            assert torch.equal(x, at[LAYERS[group]][token])
        seen += zip(tokens(batch), groups(batch), strict=True)
    assert sorted(seen) == [(row_token_of(row), layer) for row in range(240) for layer in range(3)]


def test_all_layers_wants_whole_tokens(store: ActivationStore) -> None:
    with pytest.raises(InputError, match=r"multiple of the number of sites.*allowed: 30 or 33"):
        make_stream(store, LAYERS, mix_layers="all", batch_size=31)


def test_drawn_layer_gives_every_token_once_and_layers_evenly(store: ActivationStore) -> None:
    at = {site: stored(store, site) for site in LAYERS}
    stream = make_stream(store, LAYERS, mix_layers="drawn", batch_size=30, seed=1)
    counts = np.zeros(3)
    for _ in range(10):
        seen: list[int] = []
        for batch in first_batches(stream, stream.batches_per_epoch):
            for x, group, token in zip(batch.x, groups(batch), tokens(batch), strict=True):
                assert torch.equal(x, at[LAYERS[group]][token])
            counts += np.bincount(groups(batch), minlength=3)
            seen += tokens(batch)
        assert sorted(seen) == [row_token_of(row) for row in range(240)]
    # 2400 uniform draws: the standard deviation of a count is 23
    assert counts.sum() == 2400
    assert np.abs(counts - 800).max() < 4 * 23


def test_the_draw_depends_on_seed_and_batch_only(store: ActivationStore) -> None:
    def drawn(seed: int) -> list[list[int]]:
        stream = make_stream(store, LAYERS, mix_layers="drawn", batch_size=30, seed=seed)
        return [groups(batch) for batch in first_batches(stream, 16)]

    torch.manual_seed(0)
    first = drawn(0)
    torch.manual_seed(1)
    assert drawn(0) == first
    assert drawn(1) != first
    assert len({tuple(group) for group in first}) == 16


def same(a: RawBatch, b: RawBatch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("stop", [1, 7, 8, 25])
def test_resumes_exactly(store: ActivationStore, stop: int) -> None:
    options: dict[str, Any] = {"outlier_multiple": 5.0, "labels": "document"}
    for number in range(5):
        whole = first_batches(every_kind(store, **options)[number], 40)
        first, second = (every_kind(store, **options)[number] for _ in range(2))
        first_batches(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        torch.rand(3)  # nothing may hang on the global generator
        second.load_state_dict(state)
        rest = first_batches(second, 40 - stop)
        assert all(map(same, rest, whole[stop:]))
        assert second.state_dict() != state
        first_batches(first, 40 - stop)
        assert second.state_dict() == first.state_dict()


def test_a_resumed_stream_keeps_the_medians_it_began_with(store: ActivationStore) -> None:
    stream = make_stream(store, A, batch_size=30, outlier_multiple=5.0)
    state = stream.state_dict()
    state["outliers"]["median"][A] = 1e-3
    stream.load_state_dict(state)
    assert stream.outliers is not None
    assert stream.outliers.median[A] == 1e-3


def test_a_state_of_another_stream_is_refused(store: ActivationStore) -> None:
    streams = every_kind(store)
    for stream in streams:
        for other in streams:
            if other is not stream:
                with pytest.raises(InputError, match="kind differs"):
                    other.load_state_dict(stream.state_dict())
    state = streams[0].state_dict()
    for options, name in (
        ({"seed": 5}, "seed"),
        ({"batch_size": 60}, "batch_size"),
        ({"outlier_multiple": 5.0}, "outliers"),
        ({"labels": "document"}, "labels"),
        ({"transform": Doubled()}, "transform"),
    ):
        with pytest.raises(InputError, match=f"{name} differs"):
            every_kind(store, **options)[0].load_state_dict(state)


# outliers


def test_the_outlier_rule_by_hand() -> None:
    rule = OutlierFilter(multiple=2.0, median={"a": 5.0})
    x = torch.tensor([[6.0, 8.0], [3.0, 4.0], [6.0, 8.1], [0.0, 0.0]])
    assert rule.keep("a", x).tolist() == [True, True, False, True]
    with pytest.raises(InputError, match="no median norm"):
        rule.keep("b", x)
    with pytest.raises(InputError, match=r"outliers\.multiple"):
        OutlierFilter(multiple=1.0, median={})


def test_medians_are_of_the_training_rows(store: ActivationStore) -> None:
    rule = OutlierFilter.fit(store, LAYERS, 5.0)
    for site in LAYERS:
        at = stored(store, site)
        norms = [float(at[row_token_of(row)].norm()) for row in range(240)]
        assert rule.median[site] == pytest.approx(np.median(norms), rel=1e-6)


@pytest.mark.parametrize(
    ("number", "expected_rows", "expected_removed"),
    # per pass: B alone is an outlier, at one token
    [(0, 240, 0), (1, 239, 1), (2, 240, 0), (3, 719, 1)],
)
def test_outliers_are_left_out_and_counted(
    store: ActivationStore, number: int, expected_rows: int, expected_removed: int
) -> None:
    stream = every_kind(store, outlier_multiple=5.0)[number]
    batches = first_batches(stream, stream.batches_per_epoch)
    assert sum(len(batch) for batch in batches) == expected_rows
    assert stream.state_dict()["removed"] == stream.removed == expected_removed
    assert max(float(batch.x.abs().max()) for batch in batches) < 1000
    if number == 3:
        lost = row_token_of(HUGE)
        left = [g for b in batches for t, g in zip(tokens(b), groups(b), strict=True) if t == lost]
        assert left == [0, 2]


def test_a_drawn_outlier_is_left_out_when_its_layer_is_drawn(store: ActivationStore) -> None:
    plain = make_stream(store, LAYERS, mix_layers="drawn", batch_size=30, seed=3)
    stream = make_stream(
        store, LAYERS, mix_layers="drawn", batch_size=30, seed=3, outlier_multiple=5.0
    )
    expected = 0
    for batch, filtered in zip(first_batches(plain, 80), first_batches(stream, 80), strict=True):
        pairs = zip(tokens(batch), groups(batch), strict=True)
        hit = [token == row_token_of(HUGE) and group == 1 for token, group in pairs]
        expected += sum(hit)
        assert same(filtered, batch.select(~torch.tensor(hit)))
    assert stream.removed == expected > 0


def test_a_batch_of_outliers_alone_is_passed_over(tmp_path: Path) -> None:
    x = torch.ones(8, 2)
    x[3] = 1000.0
    store = make_hand_store(tmp_path / "h", {A: x}, {A: x[:4]}, context=5, chunk_rows=4)
    # in this order neither epoch ends with the outlier
    stream = make_stream(store, A, batch_size=1, outlier_multiple=5.0, order="chunks")
    assert len(first_batches(stream, 14)) == 14
    assert stream.removed == 2
    held_out = stream.held_out()
    assert sum(len(batch) for batch in held_out()) == 3
    assert held_out.removed == 1
    assert stream.removed == 2


# labels


def test_labels(store: ActivationStore) -> None:
    for number in range(5):
        batch = first_batches(every_kind(store, labels="document")[number], 1)[0]
        assert batch.labels is not None
        assert batch.labels.dtype == torch.int64
        # in this harvest a document is a sequence
        assert batch.labels.tolist() == [token // CONTEXT for token in tokens(batch)]
    topics = torch.arange(store.n_sequences, dtype=torch.int32) % 4 - 1
    batch = first_batches(make_stream(store, A, batch_size=30, labels=topics), 1)[0]
    assert batch.labels is not None
    assert batch.labels.tolist() == [token // CONTEXT % 4 - 1 for token in tokens(batch)]
    own = torch.arange(store.n_tokens).reshape(-1, CONTEXT)
    batch = first_batches(make_stream(store, A, batch_size=30, labels=own), 1)[0]
    assert batch.labels is not None
    assert batch.labels.tolist() == tokens(batch)


def test_bad_labels(store: ActivationStore) -> None:
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(store.n_sequences)):
        with pytest.raises(InputError, match="labels must be integers"):
            make_stream(store, A, batch_size=30, labels=labels)
    wrong: Any = "topic"
    with pytest.raises(InputError, match="no such labels"):
        make_stream(store, A, batch_size=30, labels=wrong)


# transforms and statistics


class Doubled:
    """Twice the row."""

    hash = "2x"

    def apply(self, site: str, x: Tensor) -> Tensor:
        assert site in (*LAYERS, WIDE)
        return 2 * x


def test_a_transform_is_applied_everywhere(store: ActivationStore) -> None:
    for plain, doubled in zip(
        every_kind(store), every_kind(store, transform=Doubled()), strict=True
    ):
        pairs = [
            *zip(first_batches(plain, 3), first_batches(doubled, 3), strict=True),
            *zip(plain.held_out()(), doubled.held_out()(), strict=True),
        ]
        for batch, changed in pairs:
            assert torch.equal(2 * batch.x, changed.x)
            if batch.target is not None and changed.target is not None:
                assert torch.equal(2 * batch.target, changed.target)
        plain_rows, changed_rows = (
            torch.cat(list(stream.fitting_rows(stream.sites[0], 100)))
            for stream in (plain, doubled)
        )
        assert torch.equal(2 * plain_rows, changed_rows)


def test_statistics_are_of_what_the_sae_sees(store: ActivationStore) -> None:
    plain = make_stream(store, [A, B], mix_layers="all", batch_size=30)
    assert plain.statistics(B).mean_square == store.statistics(B).mean_square > 1e6
    stream = make_stream(
        store, [A, B], mix_layers="all", batch_size=30, outlier_multiple=5.0, transform=Doubled()
    )
    at = stored(store, B)
    kept = [2 * at[row_token_of(row)].double() for row in range(240) if row != HUGE]
    x = torch.stack(kept)
    found = stream.statistics(B)
    assert found.count == 239
    assert torch.allclose(torch.from_numpy(found.mean), x.mean(0), rtol=1e-12)
    assert found.mean_square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)


# held out


def test_held_out_rows(store: ActivationStore) -> None:
    at = {site: stored(store, site) for site in store.sites}
    every = [row_token_of(row, first=60) for row in range(40)]
    for number, stream in enumerate(every_kind(store)):
        held_out = stream.held_out()
        found = list(held_out())
        assert all(map(same, found, held_out()))  # fresh each time
        seen = [token for batch in found for token in tokens(batch)]
        assert sorted(set(seen)) == every
        assert len(seen) == 40 * (3 if number >= 3 else 1)
        if number >= 3:
            for batch in found:
                assert groups(batch) == [0, 1, 2] * (len(batch) // 3)
                for x, group, token in zip(batch.x, groups(batch), tokens(batch), strict=True):
                    assert torch.equal(x, at[LAYERS[group]][token])
        limited = [token for batch in stream.held_out(11)() for token in tokens(batch)]
        assert limited == seen[: 11 * (3 if number >= 3 else 1)]
        assert stream.state_dict()["loader"]["batch"] == 0


def test_held_out_needs_rows(tmp_path: Path, store: ActivationStore) -> None:
    bare = make_hand_store(tmp_path / "h", rows(40, 0), context=CONTEXT)
    with pytest.raises(InputError, match="no held-out rows"):
        make_stream(bare, A, batch_size=4).held_out()
    with pytest.raises(InputError, match="held-out rows"):
        make_stream(store, A, batch_size=4).held_out(0)


def test_what_does_not_go_together(store: ActivationStore) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (LAYERS, {}, "need mix_layers"),
        (LAYERS, {"target_site": WIDE}, "need mix_layers"),
        (LAYERS, {"mix_layers": "all", "crosscoder": True}, "choose one of"),
        (A, {"mix_layers": "some"}, "no such way to mix"),
        ([A, WIDE], {"mix_layers": "drawn"}, "one width"),
        ([A, A], {"mix_layers": "drawn"}, "each once"),
        ([], {"crosscoder": True}, "each once"),
        ("nowhere", {}, "no such site"),
        (A, {"target_site": "nowhere"}, "no such site"),
        (A, {"batch_size": 0}, "batch_size"),
        (A, {"batch_size": 1000}, "only 240 rows"),
        (A, {"outlier_multiple": 0.5}, r"outliers\.multiple"),
    ]
    for sites, options, message in wrong:
        with pytest.raises(InputError, match=message):
            make_stream(store, sites, **{"batch_size": 30, **options})
