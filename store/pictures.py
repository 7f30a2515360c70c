"""A store whose sequences are no texts: thumbnails, and the grid of positions on them."""

from dataclasses import dataclass
from typing import Any

from saescope.errors import ArtefactError
from store.database import ADDED
from store.store_base import StoreBase

JPEG = b"\xff\xd8\xff"
"""how such a file begins"""
GRID = "grid"
"""names a store's fact that its positions are those of a feature map"""
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Grid:
    """The positions of a sequence on a picture, row by row, behind `first` that are not on it."""

    rows: int
    columns: int
    first: int = 0

    @classmethod
    def of(cls, positions: int) -> "Grid":
        """The grid of so many positions: a square, with or without one before it, else one row.

        >>> Grid.of(49), Grid.of(197)
        (Grid(rows=7, columns=7, first=0), Grid(rows=14, columns=14, first=1))
        >>> Grid.of(6)
        Grid(rows=1, columns=6, first=0)
        """
        for first in (0, 1):
            side = round((positions - first) ** 0.5)
            if side * side == positions - first and side:
                return cls(side, side, first)
        return cls(1, positions)

    def name(self, position: int) -> str:
        """What a position is called: its row and column, from 1."""
        at = position - self.first
        if at < 0:
            return "[class]"
        return f"[{at // self.columns + 1},{at % self.columns + 1}]"


class PictureQueries(StoreBase):
    """What a store has of pictures."""

    @property
    def grid(self) -> Grid | None:
        """The positions of a sequence on its picture; None in a store of texts.

        Raises ArtefactError if the store's fact of it is damaged.
        """
        found: Any = self.meta.get(GRID)
        if found is None:
            return None
        names = ("rows", "columns", "first")
        values = [found.get(name) for name in names] if isinstance(found, dict) else []
        numbers = [each for each in values if type(each) is int and each >= 0]
        if len(numbers) != 3 or numbers[0] * numbers[1] + numbers[2] != self.context:
            raise ArtefactError(
                "damaged: not a grid of its positions", where=f"{self.path}: meta.{GRID}"
            )
        return Grid(*numbers)

    def picture(self, document: int) -> bytes | None:
        """The thumbnail of a document, JPEG, if the store has one; a row by its key.

        Raises ArtefactError if what is there is no JPEG of moderate size.
        """
        if int(self.meta["schema"]) < ADDED["picture"]:
            return None
        rows = self._rows("SELECT image FROM db.picture WHERE document = ? LIMIT 1", [document])
        if not rows:
            return None
        image = bytes(rows[0][0])
        self._db.check_fits(image.startswith(JPEG) and len(image) <= _LARGEST, "picture")
        return image
