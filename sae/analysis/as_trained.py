"""Held-out rows as an SAE saw them in training: outliers left out, a lens put before."""

from collections.abc import Callable, Iterator

from activations.loading.outliers import OutlierFilter
from sae.analysis.lens import TunedLens
from sae.core.base import SparseAutoencoder
from sae.data.placement import Placement
from sae.evaluation.rows import Piece
from saescope.errors import InputError

Rows = Callable[[], Iterator[Piece]]
"""fresh iterators over rows"""


def as_trained(sae: SparseAutoencoder) -> Callable[[Rows, Placement], Rows]:
    """What does to the rows at a placement what was done to them in training.

    It raises InputError for a crosscoder's rows without outliers.
    """
    outliers, lens = sae.metadata.get("outliers"), sae.metadata.get("lens")
    keeps = outliers and OutlierFilter(multiple=outliers["multiple"], median=outliers["median"])
    through = TunedLens.load(lens) if lens else None

    def seen(rows: Rows, placement: Placement) -> Rows:
        if not (keeps or through):
            return rows
        if len(placement.read) > 1:
            raise InputError(
                "a crosscoder trained without outliers can only be measured without them",
                where="eval",
                given=sae.metadata["outliers"],
            )

        def changed() -> Iterator[Piece]:
            for each in rows():
                own = each.target is each.x
                if keeps:
                    kept = keeps.keep(placement.read[0], each.x)
                    if not own:
                        kept &= keeps.keep(placement.written[0], each.target)
                    each = each.rows(kept)
                if through:
                    x = through.apply(placement.read[0], each.x)
                    each = each._replace(x=x, target=x if own else each.target)
                yield each

        return changed

    return seen
