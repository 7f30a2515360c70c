"""An edit: what to do to which features of an SAE, and the arithmetic of it.

With f the features of an activation h, f' the edited ones and d_i the unit vector of W_dec,i:

    h' = h + sum_i (f'_i - f_i) W_dec,i                      add, clamp, scale, ablate, bounds
    h'' = h' + the shortest vector in the span of the d_i with <h'', d_i> as wanted   project, cap

The first keeps what the SAE does not explain (the error term h - decode(f)). The second asks no
encoder: it is about the part of h along the decoder's directions, whatever wrote it (the orthogonal
replacement and the projection cap of Neuronpedia's steering, here exact for several directions at
once, also where they are not orthogonal).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.steering.positions import Positions
from saescope.errors import InputError
from saescope.integers import as_index, as_indices

Amount = float | str
"""in the model's units; or a text as "2x": so many times the feature's largest activation"""
Amounts = Amount | Sequence[Amount]
"""one for all texts of a batch, or one for each"""
Maxima = Callable[[list[int]], Sequence[float]]
"""from features to their largest activations"""
_FEATURES = ("add", "clamp", "scale", "ablate", "at_least", "at_most")
_DIRECTIONS = ("project", "cap")
_FACTORS = ("scale", "project")
_DEPENDENT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What to do to which features of one SAE, and where.

    Amounts are in the model's units, whatever normaliser the SAE was trained with, or, as a text
    such as "2x", in units of the feature's largest activation. A list of amounts has one for each
    text of a batch: a batch of strengths takes one pass.

    >>> Edit(add={5: 8.0}, ablate=[7], only_active=True)  # doctest: +ELLIPSIS
    Edit(add={5: 8.0}, clamp={}, scale={}, ablate=[7], ...
    """

    add: Mapping[int, Amounts] = field(default_factory=dict)
    """h += amount * W_dec[feature], whether it fires or not"""
    clamp: Mapping[int, Amounts] = field(default_factory=dict)
    """f[feature] := amount"""
    scale: Mapping[int, Amounts] = field(default_factory=dict)
    """f[feature] *= factor"""
    ablate: Collection[int] = ()
    """f[feature] := 0"""
    at_least: Mapping[int, Amounts] = field(default_factory=dict)
    """f[feature] := max(f[feature], amount), a min-clamp; with `at_most`, into a range"""
    at_most: Mapping[int, Amounts] = field(default_factory=dict)
    """f[feature] := min(f[feature], amount), a max-clamp"""
    project: Mapping[int, Amounts] = field(default_factory=dict)
    """the part of h along W_dec[feature] is multiplied by a factor: 0 takes the direction out"""
    cap: Mapping[int, Amounts] = field(default_factory=dict)
    """the part of h along W_dec[feature] is at most this long (a length of h, in its units)"""
    only_active: bool = False
    """each feature is edited only where it is active"""
    when: Mapping[int, float] = field(default_factory=dict)
    """the edit is made only where each of these features is above this activation"""
    positions: Positions = "kept"
    """which positions; see `sae.steering.positions.selector`"""
    region: Tensor | None = None
    """of a picture: true where the edit is made, bool [height, width] or [batch, height, width]"""
    steps: Collection[int] | None = None
    """of a diffusion model: the denoising steps at which the edit is made, from 0; all if None"""
    site: str | None = None
    """where, if not the site the SAE was trained at; which layer, for one of several"""

    def __bool__(self) -> bool:
        return any(len(getattr(self, name)) for name in (*_FEATURES, *_DIRECTIONS))


def _amount(value: Any, maximum: Callable[[], float], *, where: str, factor: bool) -> float:
    """A finite number, of any library or as a multiple of a maximum, as Python's."""
    times = isinstance(value, str) and value.endswith("x") and not factor
    read = value.removesuffix("x") if times else value
    try:
        number = math.nan if isinstance(read, bool | str | bytes) and not times else float(read)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = "a number" if factor else 'a number, or a multiple of the largest activation, "2x"'
        raise InputError("not a finite number", where=where, given=value, allowed=what)
    return number * maximum() if times else number


def _amounts(value: Any, maximum: Callable[[], float], *, where: str, factor: bool) -> list[float]:
    """An amount for all rows, or one for each."""
    single = isinstance(value, str | bytes) or not getattr(value, "ndim", hasattr(value, "__len__"))
    listed = [value] if single else list(value)
    if not listed:
        raise InputError("no amounts", where=where, given=value)
    return [_amount(each, maximum, where=where, factor=factor) for each in listed]


class Arithmetic:
    """An edit of one SAE as tensors.

    Raises InputError for a feature that does not exist, an amount that is not finite or has no unit
    ("2x" without the maxima), a feature that is edited twice, lists of amounts of several lengths,
    bounds that cross, and directions that depend on each other.
    """

    def __init__(self, sae: SparseAutoencoder, edit: Edit, maxima: Maxima | None) -> None:
        self._sae = sae
        self._maxima = maxima
        self._only_active = edit.only_active
        given = {
            name: self._checked(name, getattr(edit, name)) for name in (*_FEATURES, *_DIRECTIONS)
        }
        _check_once(given)
        lengths = {len(each) for edits in given.values() for each in edits.values()} - {1}
        if len(lengths) > 1:
            raise InputError(
                "lists of amounts have one for each text of a batch",
                where="steer",
                given=f"lists of {sorted(lengths)}",
            )
        self.rows = lengths.pop() if lengths else None
        """how many texts a batch must have; None for any"""
        self._codes(given)
        self._directions(given)
        when = {self._feature(key, "when"): value for key, value in edit.when.items()}
        levels = [_amount(v, _none, where=f"when[{k}]", factor=True) for k, v in when.items()]
        self._when, self._levels = self._index(when), self._tensor([[x] for x in levels])[0]
        asked = [*self._features.tolist(), *self._along.tolist() * edit.only_active, *when]
        self._asked = self._index(dict.fromkeys(asked))

    def _codes(self, given: Mapping[str, Mapping[int, list[float]]]) -> None:
        """f' = min(max(f * factor + offset, low), high) of features; and what is added to h."""
        added = given["add"]
        known = dict.fromkeys(key for name in _FEATURES[1:] for key in given[name])
        if self._only_active:
            known.update(dict.fromkeys(added))
        self._features = self._index(known)

        def column(values: Mapping[int, list[float]], other: float) -> Tensor:
            return self._tensor([values.get(key, [other]) for key in known])

        held = {**given["clamp"], **given["ablate"]}
        factors = {**given["scale"], **{key: [0.0] for key in held}}
        self._factor = column(factors, 1.0)
        self._offset = column({**held, **(added if self._only_active else {})}, 0.0)
        self._low = column(given["at_least"], -math.inf)
        self._high = column(given["at_most"], math.inf)
        if bool((self._low > self._high).any()):
            raise InputError("is above at_most", where="at_least")
        decoder = self._sae.W_dec.detach()
        self._added: Tensor | None = None
        if added and not self._only_active:
            self._added = self._tensor(list(added.values())) @ decoder[self._index(added)].float()

    def _directions(self, given: Mapping[str, Mapping[int, list[float]]]) -> None:
        """<h'', d_i> = min(factor <h', d_i>, most) of directions d_i."""
        known = {**given["project"], **given["cap"]}
        self._along = self._index(known)
        self._shrink = self._tensor([given["project"].get(key, [1.0]) for key in known])
        self._most = self._tensor([given["cap"].get(key, [math.inf]) for key in known])
        rows = self._sae.W_dec.detach()[self._along].double()
        unit = rows / rows.norm(dim=1, keepdim=True)
        gram = unit @ unit.T
        if len(known) and not float(torch.linalg.eigvalsh(gram)[0]) > _DEPENDENT:
            raise InputError(
                "the decoder's directions of these features depend on each other",
                where="project, cap",
                given=list(known),
            )
        self._unit = unit.float()
        self._dual = torch.linalg.solve(gram, unit).float() if len(known) else self._unit
        """rows of which the i-th has the product 1 with direction i and 0 with the others"""

    def __call__(
        self,
        x: Float[Tensor, "rows d_in"],
        h: Float[Tensor, "rows d_out"],
        row: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows d_out"]:
        """h edited, with features read from x (float32); row is each one's text in the batch.

        Rows that the edit comes to nothing at keep every bit.
        """
        codes = self._sae.encode_sparse(x).columns(self._asked) if len(self._asked) else x[:, :0]
        found = dict(zip(self._asked.tolist(), codes.T, strict=True))

        def of(features: Tensor) -> Tensor:
            picked = [found[each] for each in features.tolist()]
            return torch.stack(picked, 1) if picked else codes[:, :0]

        row = row if self.rows is not None else torch.zeros_like(row)
        here = (of(self._when) > self._levels).all(1, keepdim=True)
        before = h.float()
        delta = torch.zeros_like(before) if self._added is None else self._added[row]
        if len(self._features):
            f = of(self._features)
            edited = f * self._factor[row] + self._offset[row]
            change = torch.minimum(torch.maximum(edited, self._low[row]), self._high[row]) - f
            if self._only_active:
                change = change.where(f != 0, 0.0)
            delta = delta + change @ self._sae.W_dec.detach()[self._features].float()
        delta = delta * here
        if len(self._along):
            part = (before + delta) @ self._unit.T
            wanted = torch.minimum(part * self._shrink[row], self._most[row])
            moved = here & (of(self._along) != 0) if self._only_active else here
            delta = delta + (wanted - part).where(moved, 0.0) @ self._dual
        changed = (delta != 0).any(1, keepdim=True)
        return _rounded(before + delta, h.dtype).where(changed, h)

    def _checked(self, name: str, edits: Any) -> dict[int, list[float]]:
        if name == "ablate":
            several = isinstance(edits, Collection) and getattr(edits, "ndim", 1)
            if several and not isinstance(edits, str | bytes):
                edits = [_digits(each) for each in edits]
            off = as_indices(edits, where=name, **self._known())
            return _unique(((key, [0.0]) for key in off), name)
        if not isinstance(edits, Mapping):
            raise InputError("is not a mapping of features to amounts", where=name, given=edits)
        found = []
        for key, value in edits.items():
            feature = self._feature(key, name)
            given: Any = {"where": f"{name}[{feature}]", "factor": name in _FACTORS}
            found.append((feature, _amounts(value, lambda f=feature: self._maximum(f), **given)))
        return _unique(found, name)

    def _maximum(self, feature: int) -> float:
        if self._maxima is None:
            raise InputError(
                "the largest activation is known from a feature store: give store",
                where="steer",
                given=f"feature {feature}",
            )
        return float(self._maxima([feature])[0])

    def _known(self) -> dict[str, Any]:
        return {"low": 0, "high": self._sae.d_sae - 1, "what": "no such feature"}

    def _feature(self, key: Any, where: str) -> int:
        return as_index(_digits(key), where=where, **self._known())

    def _index(self, features: Collection[int]) -> Int[Tensor, " features"]:
        return torch.tensor(list(features), dtype=torch.int64, device=self._sae.W_dec.device)

    def _tensor(self, columns: Sequence[Sequence[float]]) -> Float[Tensor, "rows features"]:
        """Amounts of features, a row for each text of a batch, or one for all."""
        rows = self.rows or 1
        filled = [each if len(each) == rows else list(each) * rows for each in columns]
        values = torch.tensor(filled, device=self._sae.W_dec.device).reshape(len(columns), rows)
        return values.T


def _digits(feature: Any) -> Any:
    """A feature's number from its digits, as JSON's keys have it; anything else as it is."""
    written = isinstance(feature, str) and feature.isascii() and feature.isdigit()
    return int(feature) if written else feature


def _none() -> float:
    return math.nan


def _unique(edits: Any, name: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for feature, amounts in edits:
        if feature in found:
            raise InputError(f"feature {feature} is in both {name} and {name}", where="steer")
        found[feature] = amounts
    return found


def _check_once(given: Mapping[str, Mapping[int, Any]]) -> None:
    """InputError for a feature that is edited twice, but for the two ends of a range."""
    for names in (_FEATURES, _DIRECTIONS):
        seen: dict[int, str] = {}
        for name in names:
            for feature in given[name]:
                before = seen.get(feature)
                if before is not None and (before, name) != ("at_least", "at_most"):
                    raise InputError(
                        f"feature {feature} is in both {before} and {name}", where="steer"
                    )
                seen[feature] = name


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's precision. InputError if it has no such large number."""
    rounded = value.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & value.isfinite()).any()):
        raise InputError(
            "the edited activation is too large for the model's precision",
            where="steer",
            given=f"{float(value.abs().max()):.3g}",
            allowed="up to 65,504 in float16",
        )
    return rounded
