"""Batches in which neighbouring tokens follow each other: which rows, how often, exact resume."""

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore
from activations.loading.neighbours import paired_order
from sae.data.streams import OneSite
from saescope.errors import InputError
from tests.hand_store import make_hand_store

SITE, CONTEXT = "blocks.0.hook_resid_post", 9
ROWS = 480


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """60 sequences of 8 rows each, in one window of 4 chunks; a row is its own number."""
    x = torch.arange(ROWS, dtype=torch.float32)[:, None].repeat(1, 3)
    folder = tmp_path_factory.mktemp("neighbours") / "harvest"
    return make_hand_store(folder, {SITE: x}, {SITE: x[:40]}, context=CONTEXT, chunk_rows=128)


def loader(store: ActivationStore, **options: Any) -> ActivationLoader:
    settings = {"batch_size": 40, "epochs": 1, "order": "windows", "neighbours": True, **options}
    return ActivationLoader(store, SITE, **settings)


def pairs_of(row_token: list[int]) -> set[int]:
    """First tokens of the pairs that stand side by side."""
    return {a for a, b in pairwise(row_token) if b == a + 1 and b % CONTEXT}


def test_every_row_once_in_pairs_that_change() -> None:
    tokens = np.random.default_rng(3).permutation(
        np.concatenate([np.arange(1, 9) + CONTEXT * s for s in range(50)] + [np.array([460, 470])])
    )
    seen: list[set[int]] = []
    for seed in range(30):
        order = paired_order(tokens, CONTEXT, np.random.default_rng(seed))
        assert sorted(order.tolist()) == list(range(len(tokens)))
        found = pairs_of(tokens[order].tolist())
        # 4 pairs of 8 tokens, or 3 and the two at the ends alone; now and then a chance neighbour
        assert 3 * 50 <= len(found) <= 4 * 50 + 10
        seen.append(found)
    often = [sum(token in found for found in seen) for token in range(1, 8)]
    assert all(5 <= times <= 25 for times in often), "each two neighbours, in about half of them"
    assert paired_order(np.empty(0, np.int64), CONTEXT, np.random.default_rng(0)).size == 0


def test_pairs_are_shuffled() -> None:
    tokens = np.concatenate([np.arange(1, 9) + CONTEXT * s for s in range(50)])
    order = paired_order(tokens, CONTEXT, np.random.default_rng(0))
    place = np.argsort(order)
    assert abs(np.corrcoef(np.arange(len(place)), place)[0, 1]) < 0.2


def test_an_epoch_has_every_row_once_and_most_in_pairs(store: ActivationStore) -> None:
    batches = [(x, row.tolist()) for x, row in loader(store).with_rows()]
    rows = [row for _, each in batches for row in each]
    assert sorted(rows) == sorted(set(rows))
    assert len(rows) == ROWS
    for x, row_token in batches:
        numbers = [token // CONTEXT * 8 + token % CONTEXT - 1 for token in row_token]
        expected = torch.tensor(numbers, dtype=torch.float32).bfloat16().float()
        assert torch.equal(x[:, 0], expected)
    together = sum(len(pairs_of(each)) for _, each in batches)
    assert together > 0.4 * ROWS
    plain = loader(store, neighbours=False).with_rows()
    assert sum(len(pairs_of(row.tolist())) for _, row in plain) < 0.05 * ROWS


def test_it_resumes_exactly_and_only_as_what_it_was(store: ActivationStore) -> None:
    whole = [row.tolist() for _, row in loader(store, epochs=2).with_rows()]
    first = loader(store, epochs=2)
    list(islice(first.with_rows(), 5))
    state = first.state_dict()
    again = loader(store, epochs=2)
    again.load_state_dict(state)
    assert [row.tolist() for _, row in again.with_rows()] == whole[5:]
    with pytest.raises(InputError, match="neighbours differs"):
        loader(store, neighbours=False).load_state_dict(state)
    plain = loader(store, neighbours=False)
    older = {name: value for name, value in plain.state_dict().items() if name != "neighbours"}
    plain.load_state_dict(older)
    with pytest.raises(InputError, match="neighbours differs"):
        loader(store).load_state_dict(older)


def test_what_cannot_have_them_is_refused(store: ActivationStore) -> None:
    for order in ("spread", "chunks", None):
        with pytest.raises(InputError, match=r"^order: .*allowed: windows"):
            loader(store, order=order)
    with pytest.raises(InputError, match=r"^mix_chunks: .*given: 3; allowed: 4 or more"):
        loader(store, mix_chunks=3)


def test_a_stream_numbers_tokens_so_that_neighbours_differ_by_one(store: ActivationStore) -> None:
    stream = OneSite(store, [SITE], batch_size=40, labels="neighbours", order="windows")
    for batch in islice(stream, 12):
        assert batch.row_token is not None
        assert batch.labels is not None
        found = (batch.labels.diff() == 1).nonzero()[:, 0]
        assert set(batch.row_token[found].tolist()) == pairs_of(batch.row_token.tolist())
        assert len(found) > 12
    held_out = next(iter(stream.held_out()()))
    assert held_out.labels is not None
    other = OneSite(store, [SITE], batch_size=40, labels="document", order="windows")
    with pytest.raises(InputError, match="labels differs"):
        other.load_state_dict(stream.state_dict())


def test_the_last_token_of_a_sequence_is_no_neighbour_of_the_next_ones() -> None:
    """Where position 0 has a row too: 9 follows 8 by chance alone, 2 follows 1 often."""
    orders = [paired_order(np.arange(18), 9, np.random.default_rng(seed)) for seed in range(60)]
    pairs = [pair for order in orders for pair in pairwise(order.tolist())]
    assert pairs.count((8, 9)) < 15
    assert pairs.count((1, 2)) > 20
