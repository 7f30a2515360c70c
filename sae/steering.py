"""Steering: change chosen features of a model's activations, and nothing else.

With f the features of an activation h and f' the edited ones, the model goes on with
    h' = decode(f') + (h - decode(f)) = h + sum_i (f'_i - f_i) W_dec,i,
so what the SAE does not explain (the error term, taken from the unedited reconstruction) is kept,
and an edit that changes nothing changes no bit. Edits depend on a position's own activation alone,
so they are the same with and without a KV cache.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from activations import Model
from sae.base import SparseAutoencoder
from saescope.errors import InputError

Positions = Literal["kept", "all"] | slice | Sequence[int]
Edit = Callable[[Tensor, Tensor], Tensor | None]


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
        ablated = dict.fromkeys(ablate or (), 0.0)
        groups = {"add": add or {}, "clamp": clamp or {}, "ablate": ablated, "scale": scale or {}}
        seen: dict[int, str] = {}
        for name, edits in groups.items():
            for feature, value in edits.items():
                if not isinstance(feature, int) or not 0 <= feature < d_sae:
                    raise InputError(
                        "no such feature", where=name, given=feature, allowed=f"0 to {d_sae - 1}"
                    )
                if not torch.isfinite(torch.tensor(float(value))):
                    raise InputError("not a finite number", where=f"{name}[{feature}]", given=value)
                if feature in seen:
                    raise InputError(
                        f"feature {feature} is in both {seen[feature]} and {name}", where="steer"
                    )
                seen[feature] = name
        return cls(dict(groups["add"]), {**groups["clamp"], **ablated}, dict(groups["scale"]))

    def __bool__(self) -> bool:
        return bool(self.add or self.clamp or self.scale)


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
) -> Iterator[None]:
    """Within the block, every run of the model has the SAE's features edited at its site.

    Args:
        positions: "kept" (all but position 0, which SAEs are not trained on), "all", a slice, or a
        list
            of absolute positions.
        site: where, if not the site the SAE was trained at.

    Raises InputError for wrong features, positions, or a site of another width.

    >>> with steer(model, sae, add={123: 8.0}):                              # doctest: +SKIP
    ...     model.generate("The weather today", max_new_tokens=40)
    """
    edits = FeatureEdits.make(sae.d_sae, add, clamp, ablate, scale)
    selects = _selector(positions)
    site = site_of(model, sae, site)
    if not edits:
        yield
        return
    with model.edit({site: _steering_edit(sae, edits, selects)}):
        yield


@contextmanager
def splice(
    model: Model,
    sae: SparseAutoencoder,
    *,
    positions: Positions = "kept",
    site: str | None = None,
) -> Iterator[None]:
    """Within the block, the model goes on with the SAE's reconstruction, without the error term."""
    selects = _selector(positions)

    @torch.no_grad()
    def edit(h: Tensor, at: Tensor) -> Tensor | None:
        chosen = selects(at)
        if not chosen.any():
            return None
        x = h[:, chosen].float()
        out = h.clone()
        out[:, chosen] = sae(x.reshape(-1, sae.d_in)).x_hat.view_as(x).to(h.dtype)
        return out

    with model.edit({site_of(model, sae, site): edit}):
        yield


def site_of(model: Model, sae: SparseAutoencoder, site: str | None) -> str:
    """The site to edit; InputError if none is known or its width is not the SAE's."""
    name = site or sae.metadata.get("site")
    if name is None:
        raise InputError("this SAE does not say where it belongs; give site", where="site")
    (name,) = model.resolve(name)
    if model.d_in(name) != sae.d_in:
        raise InputError(
            "width differs from the SAE's",
            where=name,
            given=model.d_in(name),
            allowed=str(sae.d_in),
        )
    return name


def _selector(positions: Positions) -> Callable[[Tensor], Tensor]:
    """Absolute positions [pos] to bool [pos]."""
    if positions == "kept":
        return lambda at: at > 0
    if positions == "all":
        return lambda at: torch.ones_like(at, dtype=torch.bool)
    if isinstance(positions, str):
        raise InputError(
            "no such choice",
            where="positions",
            given=positions,
            allowed="kept, all, a slice, a list",
        )
    if isinstance(positions, slice):
        start, stop, step = positions.start or 0, positions.stop, positions.step or 1
        if start < 0 or step < 1 or (stop is not None and stop < 0):
            raise InputError(
                "must count forwards from the start, because a continuation has no known end",
                where="positions",
                given=positions,
            )

        def in_slice(at: Tensor) -> Tensor:
            chosen = (at >= start) & ((at - start) % step == 0)
            return chosen if stop is None else chosen & (at < stop)

        return in_slice
    wanted = list(positions)
    if any(not isinstance(p, int) or p < 0 for p in wanted):
        raise InputError("positions are whole numbers from 0", where="positions", given=wanted)
    return lambda at: torch.isin(at, torch.tensor(wanted, dtype=at.dtype, device=at.device))


def _steering_edit(
    sae: SparseAutoencoder, edits: FeatureEdits, selects: Callable[[Tensor], Tensor]
) -> Edit:
    device = sae.W_dec.device
    features = torch.tensor([*edits.clamp, *edits.scale], dtype=torch.int64, device=device)
    factor = torch.tensor([0.0] * len(edits.clamp) + list(edits.scale.values()), device=device)
    offset = torch.tensor(list(edits.clamp.values()) + [0.0] * len(edits.scale), device=device)
    added = torch.zeros(sae.d_in, device=device)
    for feature, strength in edits.add.items():
        added += strength * sae.W_dec[feature].detach()

    @torch.no_grad()
    def edit(h: Tensor, at: Tensor) -> Tensor | None:
        chosen = selects(at)
        if not chosen.any():
            return None
        x = h[:, chosen]
        delta = added.expand(x.shape)
        if len(features):
            codes = sae.encode_sparse(x.float().reshape(-1, sae.d_in))
            before = codes.columns(features)
            change = before * (factor - 1) + offset
            delta = delta + (change @ sae.W_dec[features]).view(x.shape)
        out = h.clone()
        out[:, chosen] = x + delta.to(h.dtype)
        return out

    return edit
