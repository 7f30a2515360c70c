"""Which features of two SAEs are the same: by their decoders, or by what they fire on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from activations import ActivationStore
from sae.core.base import SparseAutoencoder
from sae.data.harvests import read_chunk
from sae.data.placement import Placement, released
from saescope.errors import InputError
from saescope.integers import as_index
from saescope.progress import Progress
from store.matching import (
    MATCHED,
    Matching,
    correlation_blocks,
    cosine_blocks,
    match_features,
)


def decoder_directions(sae: SparseAutoencoder) -> Any:
    """What each feature writes, in the model's units, as a NumPy array [d_sae, d_out]."""
    with torch.inference_mode():
        placed = sae if sae.site_normalisers else released(sae)
        return placed.decoder_directions().float().cpu().numpy()


def match_decoders(
    a: SparseAutoencoder, b: SparseAutoencoder, *, threshold: float = MATCHED
) -> Matching:
    """Match two SAEs' features by the cosine of their decoder directions.

    Compare the mean with `store.matching.expected_max_cosine`, its value for random directions.
    Raises InputError if they write activations of different widths.
    """
    blocks = cosine_blocks(decoder_directions(a), decoder_directions(b))
    return match_features(blocks, a.d_sae, b.d_sae, threshold=threshold)


def match_codes(
    harvest: ActivationStore,
    a: Placement,
    b: Placement,
    *,
    rows: int = 65_536,
    threshold: float = MATCHED,
) -> tuple[Matching, int]:
    """Match two SAEs' features by Pearson's correlation of their codes on one harvest's rows.

    rows: how many to encode at least, held-out ones first (all, if there are fewer). Returns the
    matching and the number of rows.
    """
    codes = encoded_alike(harvest, (a, b), rows=rows)
    blocks = correlation_blocks(*codes)
    matching = match_features(blocks, a.sae.d_sae, b.sae.d_sae, threshold=threshold)
    return matching, codes[0].shape[0]


def encoded_alike(
    harvest: ActivationStore, placements: Sequence[Placement], *, rows: int = 65_536
) -> list[Any]:
    """Several SAEs' codes of the same rows, each a scipy sparse array [rows, d_sae].

    rows: how many to encode at least, held-out ones first (all, if there are fewer).
    """
    rows = as_index(rows, where="rows", low=2)
    found: list[list[Any]] = [[] for _ in placements]
    done = 0
    chunks = [*harvest.chunks("held_out"), *harvest.chunks("train")]
    with Progress("encoding", min(rows, sum(c.rows for c in chunks)), "rows") as progress:
        for chunk in chunks:
            if done >= rows:
                break
            for codes, placement in zip(found, placements, strict=True):
                # all sites of a harvest have the same rows in the same order
                codes.append(_encoded(placement, harvest, chunk))
            done += chunk.rows
            progress.advance(chunk.rows)
    if not done:
        raise InputError("the harvest has no rows", where=str(harvest.path))
    from scipy.sparse import vstack

    return [vstack(codes, format="csc") for codes in found]


def _encoded(placement: Placement, harvest: ActivationStore, chunk: Any) -> Any:
    """A chunk's codes as a scipy sparse array [rows, d_sae]."""
    from scipy.sparse import csr_array

    with torch.inference_mode():
        x, _ = read_chunk(harvest, placement.read, chunk)
        codes = placement.sae.encode_sparse(x).compact()
    parts = (codes.value.double().numpy(), codes.index.numpy(), codes.row_ptr.numpy())
    return csr_array(parts, shape=(codes.batch, codes.d_sae))


def lineage(matchings: list[Matching], feature: int) -> Iterator[tuple[int, float]]:
    """A feature of the first SAE followed through a series of them, step by step.

    matchings: of the first SAE with the second, of the second with the third, and so on (versions
    of one SAE during training, or ever wider ones). For each the partner and its similarity; ends
    before the first that the feature has no partner in.
    """
    for matching in matchings:
        found = matching.matched.filter(matching.matched["feature_a"].to_numpy() == feature)
        if not len(found):
            return
        feature = found["feature_b"][0].as_py()
        yield feature, found["similarity"][0].as_py()
