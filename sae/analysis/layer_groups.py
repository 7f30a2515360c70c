"""Which layers share an SAE: clusters of similar layers, and what they save.

Group-SAE (Ghilardi et al. 2024): layers are clustered on their distances (sae.analysis.layers) by
complete linkage, and the number of groups G is the smallest whose AMAD is below a threshold:
    AMAD(G) = mean over the G groups of the largest distance within the group
    C(G)    = A + T G, against A + T L for one SAE a layer
with A the cost of computing the activations (the language model's forward pass, paid either way)
and T the cost of training one SAE.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from activations.sites.names import layer_of
from sae.analysis.layers import LayerDistances
from saescope.artefact import read_json, write_report
from saescope.errors import InputError, check_range
from saescope.integers import as_index
from saescope.progress import say
from saescope.replacing import Kind

Groups = tuple[tuple[int, ...], ...]
"""The layers (as numbers of rows of a distance matrix) of each group, in order."""


def _are_groups(path: Path) -> bool:
    found = read_json(path)
    return isinstance(found, dict) and {"sites", "distances", "chosen"} <= found.keys()


_GROUPS = Kind("groups of layers", _are_groups)


def cluster_layers(distances: ArrayLike, groups: int) -> Groups:
    """Agglomerative clustering by complete linkage on a matrix of distances [n, n].

    Starting from single layers, the two groups whose farthest members are nearest are joined until
    `groups` are left; of equals, the first pair. Groups are ordered by their first layer.

    Raises InputError for a matrix that is not one of distances, or groups not from 1 to n.

    >>> cluster_layers([[0, 1, 4], [1, 0, 3], [4, 3, 0]], 2)
    ((0, 1), (2,))
    """
    matrix = _checked(distances)
    groups = as_index(groups, where="groups", low=1, high=len(matrix))
    return _partitions(matrix)[groups]


def amad(distances: ArrayLike, groups: Groups) -> float:
    """Mean over groups of the largest distance within the group (0 for a single layer).

    >>> amad([[0, 1, 4], [1, 0, 3], [4, 3, 0]], ((0, 1), (2,)))
    0.5
    """
    matrix = _checked(distances)
    return float(np.mean([matrix[np.ix_(group, group)].max() for group in groups]))


def amad_curve(distances: ArrayLike) -> dict[int, float]:
    """AMAD of the best grouping for each number of groups, 1 to n.

    >>> amad_curve([[0, 1, 4], [1, 0, 3], [4, 3, 0]])
    {1: 4.0, 2: 0.5, 3: 0.0}
    """
    matrix = _checked(distances)
    partitions = _partitions(matrix)
    return {count: amad(matrix, partitions[count]) for count in sorted(partitions)}


def choose_groups(distances: ArrayLike, threshold: float) -> Groups:
    """The grouping with the fewest groups whose AMAD is below the threshold.

    Raises InputError unless the threshold is above 0.

    >>> choose_groups([[0, 1, 4], [1, 0, 3], [4, 3, 0]], threshold=0.6)
    ((0, 1), (2,))
    """
    check_range("threshold", threshold, above=0)
    curve = amad_curve(distances)
    fewest = min(count for count, value in curve.items() if value < threshold)
    return cluster_layers(distances, fewest)


def is_contiguous(groups: Groups) -> bool:
    """Whether every group is a run of neighbouring layers.

    >>> is_contiguous(((0, 1), (2,))), is_contiguous(((0, 2), (1,)))
    (True, False)
    """
    return all(max(group) - min(group) == len(group) - 1 for group in groups)


@dataclass(frozen=True)
class Cost:
    """Costs of SAEs for all layers, in the unit of A and T."""

    grouped: float
    """A + T G"""
    per_layer: float
    """A + T L"""

    @property
    def speedup(self) -> float:
        """per_layer / grouped"""
        return self.per_layer / self.grouped


def cost(*, activation: float, training: float, groups: int, layers: int) -> Cost:
    """Cost of one SAE a group against one a layer (Ghilardi et al. 2024).

    Args: activation is A, the language model's forward over the tokens, paid once either way;
    training is T, one SAE on as many rows as there are tokens; both in one unit (seconds, FLOPs).
    Raises InputError for costs below 0, or groups not from 1 to layers.

    >>> cost(activation=10.0, training=5.0, groups=3, layers=9)
    Cost(grouped=25.0, per_layer=55.0)
    """
    check_range("activation", activation, low=0)
    check_range("training", training, above=0)
    check_range("groups", groups, low=1, high=layers)
    return Cost(activation + training * groups, activation + training * layers)


@dataclass(frozen=True)
class LayerGroups:
    """A grouping of layers with what it was chosen from.

    >>> matrix = np.array([[0, 0.1, 0.4], [0.1, 0, 0.3], [0.4, 0.3, 0]])
    >>> distances = LayerDistances(("a", "b", "c"), matrix, 1000, "mean")
    >>> chosen = LayerGroups.choose(distances, 0.06, activation=10.0, training=5.0)
    >>> for line in chosen.lines():
    ...     print(line)
    mean angular distances of 3 layers over 1,000 tokens, centred by mean
      G   1  AMAD 0.4000  cost 15 of 25 (1.67x)  {a-c}
      G   2  AMAD 0.0500  cost 20 of 25 (1.25x)  {a-b} {c}  <- chosen
      G   3  AMAD 0.0000  cost 25 of 25 (1.00x)  {a} {b} {c}
    """

    distances: LayerDistances
    threshold: float
    chosen: int
    """number of groups: the smallest with AMAD below the threshold"""
    groups: dict[int, Groups]
    """for each number of groups"""
    amad: dict[int, float]
    costs: dict[int, Cost] | None

    @classmethod
    def choose(
        cls,
        distances: LayerDistances,
        threshold: float,
        *,
        activation: float | None = None,
        training: float | None = None,
    ) -> "LayerGroups":
        """Every grouping, and the chosen one; costs where A and T are given (see `cost`)."""
        layers = len(distances.sites)
        groups = _partitions(_checked(distances.matrix))
        costs = None
        if activation is not None and training is not None:
            costs = {
                count: cost(activation=activation, training=training, groups=count, layers=layers)
                for count in sorted(groups)
            }
        return cls(
            distances,
            threshold,
            len(choose_groups(distances.matrix, threshold)),
            dict(sorted(groups.items())),
            amad_curve(distances.matrix),
            costs,
        )

    def sites(self) -> list[tuple[str, ...]]:
        """The sites of each chosen group: what a stream of drawn layers is made from."""
        names = self.distances.sites
        return [tuple(names[n] for n in group) for group in self.groups[self.chosen]]

    def lines(self) -> list[str]:
        """For people: a line for each number of groups."""
        found = self.distances
        lines = [
            f"mean angular distances of {len(found.sites)} layers over {found.tokens:,} tokens, "
            f"centred by {found.centre}"
        ]
        for count, groups in self.groups.items():
            text = f"  G {count:>3}  AMAD {self.amad[count]:.4f}"
            if self.costs is not None:
                c = self.costs[count]
                text += f"  cost {c.grouped:.6g} of {c.per_layer:.6g} ({c.speedup:.2f}x)"
            text += "  " + " ".join(self._named(group) for group in groups)
            text += "" if is_contiguous(groups) else "  (not contiguous)"
            lines.append(text + ("  <- chosen" if count == self.chosen else ""))
        return lines

    def _named(self, group: tuple[int, ...]) -> str:
        layers = [layer_of(site) for site in self.distances.sites]
        names = [
            site if layer is None else str(layer)
            for site, layer in zip(self.distances.sites, layers, strict=True)
        ]
        if not is_contiguous((group,)):
            return "{" + ",".join(names[n] for n in group) + "}"
        first, last = names[group[0]], names[group[-1]]
        return "{" + (first if len(group) == 1 else f"{first}-{last}") + "}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        found = self.distances
        table = [
            {
                "groups": [list(group) for group in groups],
                "amad": self.amad[count],
                "contiguous": is_contiguous(groups),
                "cost": None if self.costs is None else vars(self.costs[count]),
            }
            for count, groups in self.groups.items()
        ]
        return {
            "sites": list(found.sites),
            "tokens": found.tokens,
            "centre": found.centre,
            "distances": found.matrix.tolist(),
            "threshold": self.threshold,
            "chosen": self.chosen,
            "table": table,
        }

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Write JSON, and print the lines; with `replace`, over groups that are there.

        Raises InputError for anything else that is there, ArtefactError if it cannot be written.
        """
        write_report(path, self.to_dict(), _GROUPS, replace=replace)
        for line in self.lines():
            say(line)


def _checked(distances: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(distances, np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise InputError("not a square matrix of distances", where="distances", given=matrix.shape)
    if not np.allclose(matrix, matrix.T) or np.diag(matrix).any():
        raise InputError("distances are symmetric and 0 to oneself", where="distances")
    return matrix


def _partitions(matrix: NDArray[np.float64]) -> dict[int, Groups]:
    """The grouping by complete linkage for every number of groups, from n down to 1."""
    groups: list[tuple[int, ...]] = [(n,) for n in range(len(matrix))]
    # linkage[a, b]: the largest distance between a member of group a and one of group b
    linkage = matrix.copy()
    np.fill_diagonal(linkage, np.inf)
    found = {len(groups): tuple(groups)}
    while len(groups) > 1:
        a, b = sorted(np.unravel_index(int(linkage.argmin()), linkage.shape))
        joined = np.maximum(linkage[a], linkage[b])
        linkage[a], linkage[:, a] = joined, joined
        linkage[a, a] = np.inf
        linkage = np.delete(np.delete(linkage, b, axis=0), b, axis=1)
        groups[a] = tuple(sorted(groups[a] + groups[b]))
        del groups[b]
        found[len(groups)] = tuple(sorted(groups))
    return found
