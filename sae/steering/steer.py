"""Steering: change chosen features of a model's activations, and nothing else.

With f the features of an activation h and f' the edited ones, the model goes on with
    h' = decode(f') + (h - decode(f)) = h + sum_i (f'_i - f_i) W_dec,i,
so what the SAE does not explain (the error term, taken from the unedited reconstruction) is kept,
and an edit that changes nothing changes no bit. Edits depend on a position's own activation alone,
so they are the same with and without a KV cache, and in a padded batch as for a text alone. A
transcoder's features are read at its input site and change its output site, by the same formula. A
crosscoder cannot steer: its features are known only after its last site, when it is too late to
change the first.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from activations import Model
from activations.sites.hooks import PositionedEdit
from activations.sites.kept import TokenPositions
from sae.core.base import SparseAutoencoder
from sae.data.model_expectations import warn_of_model
from sae.data.placement import Placement, placement_of
from sae.data.provenance import check_trained_on
from saescope.errors import InputError
from saescope.integers import as_index, as_indices

Positions = Literal["kept", "all"] | slice | Sequence[int]
Change = Callable[[Tensor, Tensor], Tensor]
"""x [rows, d_in] float32 that features are read from, and h [rows, d_out], to the new h"""


@dataclass(frozen=True)
class FeatureEdits:
    """What to do to which features; strengths and values are in the model's units."""

    add: Mapping[int, float]
    """h += strength * W_dec[feature], whether it fires or not"""
    clamp: Mapping[int, float]
    """f[feature] := value"""
    scale: Mapping[int, float]
    """f[feature] := factor * f[feature]"""

    @classmethod
    def make(
        cls,
        d_sae: int,
        add: Mapping[int, float] | None,
        clamp: Mapping[int, float] | None,
        ablate: Collection[int] | None,
        scale: Mapping[int, float] | None,
    ) -> "FeatureEdits":
        """Checked edits; `ablate` is a clamp at 0.

        Raises InputError for a feature that does not exist, a number that is not finite, or a
        feature that is edited twice.
        """
        allowed: Any = {"low": 0, "high": d_sae - 1, "what": "no such feature"}
        off = [] if ablate is None else as_indices(ablate, where="ablate", **allowed)
        given = {"add": add, "clamp": clamp, "ablate": dict.fromkeys(off, 0.0), "scale": scale}
        found: dict[str, dict[int, float]] = {}
        seen: dict[int, str] = {}
        for name, edits in given.items():
            found[name] = {}
            for key, value in (edits or {}).items():
                feature = as_index(key, where=name, **allowed)
                if feature in seen:
                    raise InputError(
                        f"feature {feature} is in both {seen[feature]} and {name}", where="steer"
                    )
                found[name][feature] = _finite(value, where=f"{name}[{feature}]")
                seen[feature] = name
        return cls(found["add"], {**found["clamp"], **found["ablate"]}, found["scale"])

    def __bool__(self) -> bool:
        return bool(self.add or self.clamp or self.scale)


def _finite(value: Any, *, where: str) -> float:
    """A finite number, of any library, as Python's."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError("not a finite number", where=where, given=value)
    return number


@contextmanager
def steer(
    model: Model,
    sae: SparseAutoencoder,
    *,
    add: Mapping[int, float] | None = None,
    clamp: Mapping[int, float] | None = None,
    ablate: Collection[int] | None = None,
    scale: Mapping[int, float] | None = None,
    positions: Positions = "kept",
    site: str | None = None,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, every run of the model has the SAE's features edited at its site.

    Args:
        positions: "kept" (those that SAEs are trained on: not a text's first token, no special
            token), "all", a slice, or a list of positions. They count each text's own tokens from
            0, on whatever side a batch is padded; padding is never edited.
        site: where, if not the site the SAE was trained at; which layer, for one of several.
        allow_other_model: steer with an SAE of another model (a base model's on what was fine-tuned
            from it); it is said.

    Raises InputError for wrong features, positions, or a site of another width, for an SAE of
    several layers without a site, for a crosscoder, and for an SAE that was trained on other
    weights than the model's.

    >>> with steer(model, sae, add={123: 8.0}):                              # doctest: +SKIP
    ...     model.generate("The weather today", max_new_tokens=40)
    """
    edits = FeatureEdits.make(sae.d_sae, add, clamp, ablate, scale)
    selects = _selector(positions)
    placement = placement_in(model, sae, site, where="steer", allow_other_model=allow_other_model)
    if not edits:
        yield
        return
    with model.edit_with_positions(
        _site_edits(placement, _steering_change(placement.sae, edits), selects)
    ):
        yield


@contextmanager
def splice(
    model: Model,
    sae: SparseAutoencoder,
    *,
    positions: Positions = "kept",
    site: str | None = None,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, the model goes on with the SAE's reconstruction, without the error term.

    Raises InputError as `steer` does.
    """
    selects = _selector(positions)
    placement = placement_in(model, sae, site, where="splice", allow_other_model=allow_other_model)

    def change(x: Tensor, h: Tensor) -> Tensor:
        return placement.sae(x).x_hat.to(h.dtype)

    with model.edit_with_positions(_site_edits(placement, change, selects)):
        yield


def placement_in(
    model: Model,
    sae: SparseAutoencoder,
    site: str | None,
    *,
    where: str | None = None,
    allow_other_model: bool = False,
) -> Placement:
    """The SAE at its sites of a model.

    Raises InputError if no site is known, if a site's width is not the SAE's, and, unless it is
    allowed, if the SAE was trained on another model.

    Args: where names what cannot be done with a crosscoder, and refuses one.
    """
    if where is not None and sae.concatenates:
        raise InputError(
            "a crosscoder's features are known only after the last of its sites, so none of them "
            "can be changed",
            where=where,
            allowed="SAEs of one site, transcoders",
        )
    placement = placement_of(sae, site)
    warn_of_model(
        sae,
        where=model.name,
        has_bos=model.bos_token_id is not None,
        layer_norm=any(isinstance(each, torch.nn.LayerNorm) for each in model.hf.modules()),
    )
    read, written = tuple(model.resolve(placement.read)), tuple(model.resolve(placement.written))
    for names, width in ((read, sae.d_in), (written, sae.d_out)):
        found = sum(model.d_in(name) for name in names)
        if found != width:
            raise InputError(
                "width differs from the SAE's",
                where=", ".join(names),
                given=found,
                allowed=str(width),
            )
    check_trained_on(model, sae, where=where or "SAE", allow_other_model=allow_other_model)
    return placement._replace(read=read, written=written)


def _selector(positions: Positions) -> Callable[[TokenPositions], Tensor]:
    """A function from the positions of tokens to bool [batch, pos]: which are edited."""
    if isinstance(positions, str):
        if positions not in ("kept", "all"):
            raise InputError(
                "no such choice",
                where="positions",
                given=positions,
                allowed="kept, all, a slice, a list",
            )
        return lambda at: at.kept if positions == "kept" else at.position >= 0
    if isinstance(positions, slice):
        return _in_slice(positions)
    wanted = torch.tensor(as_indices(positions, where="positions", low=0), dtype=torch.int64)
    return lambda at: torch.isin(at.position, wanted.to(at.position.device))


def _in_slice(positions: slice) -> Callable[[TokenPositions], Tensor]:
    given = {"start": positions.start, "stop": positions.stop, "step": positions.step}
    bounds = {
        name: None if value is None else as_index(value, where="positions")
        for name, value in given.items()
    }
    start, stop, step = bounds["start"] or 0, bounds["stop"], bounds["step"]
    step = 1 if step is None else step
    if start < 0 or step < 1 or (stop is not None and stop < 0):
        raise InputError(
            "must count forwards from the start, because a continuation has no known end",
            where="positions",
            given=positions,
        )

    def chosen(at: TokenPositions) -> Tensor:
        found = (at.position >= start) & ((at.position - start) % step == 0)
        return found if stop is None else found & (at.position < stop)

    return chosen


def _site_edits(
    placement: Placement, change: Change, selects: Callable[[TokenPositions], Tensor]
) -> dict[str, PositionedEdit]:
    """Edits of a model that apply a change at chosen positions."""
    (read,), (written,) = placement.read, placement.written
    seen: list[tuple[Tensor, TokenPositions]] = []

    @torch.no_grad()
    def remember(h: Tensor, at: TokenPositions) -> None:
        seen[:] = [(h[selects(at).to(h.device)].float(), at)]

    @torch.no_grad()
    def edit(h: Tensor, at: TokenPositions) -> Tensor | None:
        chosen = selects(at).to(h.device)
        if not chosen.any():
            return None
        before = h[chosen]
        x = before.float()
        if read != written:
            if not seen or seen[0][1] is not at:
                raise InputError(
                    "is computed before what its features are read from", where=written, given=read
                )
            x, _ = seen.pop()
        out = h.clone()
        out[chosen] = change(x, before)
        return out

    return {written: edit} if read == written else {read: remember, written: edit}


def _steering_change(sae: SparseAutoencoder, edits: FeatureEdits) -> Change:
    device = sae.W_dec.device
    features = torch.tensor([*edits.clamp, *edits.scale], dtype=torch.int64, device=device)
    factor = torch.tensor([0.0] * len(edits.clamp) + list(edits.scale.values()), device=device)
    offset = torch.tensor(list(edits.clamp.values()) + [0.0] * len(edits.scale), device=device)
    added = torch.zeros(sae.d_out, device=device)
    for feature, strength in edits.add.items():
        added += strength * sae.W_dec[feature].detach()

    def change(x: Tensor, h: Tensor) -> Tensor:
        delta = added.expand(h.shape)
        if len(features):
            before = sae.encode_sparse(x).columns(features)
            delta = delta + (before * (factor - 1) + offset) @ sae.W_dec[features]
        return h + delta.to(h.dtype)

    return change
