"""SAEs attached to a model, by the names that people know from SAELens' HookedSAETransformer.

    model.saes(saes=[a, b])                              with sae.saes(model, [a, b]):
    model.run_with_saes(tokens, saes=[a])                sae.run_with_saes(model, tokens, [a])
    model.run_with_cache_with_saes(tokens, saes=[a])     sae.run_with_cache_with_saes(...)
    sae.use_error_term = True                            use_error_term=True
    model.run_with_hooks_with_saes(tokens, saes=[a],     with sae.steer(model, a, clamp={5: 2.0}):
        fwd_hooks=[(".hook_sae_acts_post", set_5_to_2)])     model.logits(tokens)

Three things differ. SAEs are used at the positions that they are trained on, unless `positions` is
"all": not at a text's first token, nor at special tokens. The model is any that `sae.steer` takes.
Nothing stays attached: `reset_saes` has no counterpart.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from activations import model_around
from activations.models.base import HarvestModel
from activations.sites.kept import TokenPositions
from sae.core.base import SparseAutoencoder
from sae.data.model_placement import placement_in
from sae.data.placement import Placement
from sae.steering.positions import Positions, selector
from sae.steering.steer import Change, site_edits
from saescope.errors import InputError

Cache = dict[str, Tensor]
"""by site and name, as SITE.hook_sae_acts_post"""


@contextmanager
def saes(
    model: HarvestModel | nn.Module,
    saes: SparseAutoencoder | Sequence[SparseAutoencoder],
    *,
    use_error_term: bool = False,
    positions: Positions = "kept",
    cache: Cache | None = None,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, each run of the model goes through SAEs at their sites.

    Args:
        use_error_term: the model goes on with its own activation (reconstruction and error), and
            SAEs are only looked at; without, with the reconstruction, as in `sae.splice`.
        positions: where SAEs are used; as for `sae.steer`.
        cache: is filled by each run with [batch, pos, width] tensors in float32, zero where an SAE
            is not used: for each site SITE.hook_sae_input, .hook_sae_acts_post (features, dense),
            .hook_sae_recons, .hook_sae_error and .hook_sae_output.

    Raises InputError as `sae.splice` does, and for two SAEs at one site with a cache.

    >>> with saes(model, [dictionary]):  # doctest: +SKIP
    ...     model.generate("The weather today")
    """
    listed = [saes] if isinstance(saes, SparseAutoencoder) else list(saes)
    own, chosen = model_around(model), selector(positions)
    with ExitStack() as stack:
        seen: set[str] = set()
        for each in listed:
            place = placement_in(own, each, None, where="saes", allow_other_model=allow_other_model)
            site = place.written[0]
            if cache is not None and site in seen:
                raise InputError("two SAEs are at one site", where="cache", given=site)
            seen.add(site)
            now: list[Tensor] = []

            def selects(at: TokenPositions, now: list[Tensor] = now) -> Tensor:
                now[:] = [chosen(at)]
                return now[0]

            change = _seen(place, now, cache, use_error_term=use_error_term)
            stack.enter_context(own.edit_with_positions(site_edits(place, change, selects)))
        yield


_attached = saes  # where `saes` is an argument


def _seen(
    place: Placement, now: list[Tensor], cache: Cache | None, *, use_error_term: bool
) -> Change:
    """What an SAE makes of the activations at the positions that are `now` chosen; and keep it."""

    def change(x: Tensor, h: Tensor, _row: Tensor) -> Tensor:
        x_hat = place.sae(x).x_hat.to(h.dtype)
        output = h if use_error_term else x_hat
        if cache is not None:
            found = {
                "input": x,
                "acts_post": place.sae.encode(x),
                "recons": x_hat,
                "error": h - x_hat,
                "output": output,
            }
            for name, rows in found.items():
                whole = rows.new_zeros((*now[0].shape, rows.shape[1]), dtype=torch.float32)
                whole[now[0].to(rows.device)] = rows.float()
                cache[f"{place.written[0]}.hook_sae_{name}"] = whole
        return output

    return change


def run_with_saes(
    model: HarvestModel | nn.Module,
    tokens: str | Tensor,
    saes: SparseAutoencoder | Sequence[SparseAutoencoder],
    **options: Any,
) -> Tensor:
    """Next-token logits [batch, pos, d_vocab] with SAEs at their sites (options: see `saes`).

    Raises InputError as `saes` does, and for a text with a model that has no tokenizer of ours.
    """
    own: Any = model_around(model)
    if isinstance(tokens, str):
        if not hasattr(own, "tokenize"):
            raise InputError("wants tokens [batch, pos]", where="tokens", given=tokens[:40])
        tokens = torch.tensor([own.tokenize(tokens)])
    with _attached(model, saes, **options), torch.no_grad():
        return own.logits(tokens) if hasattr(own, "logits") else own.hf(tokens)


def run_with_cache_with_saes(
    model: HarvestModel | nn.Module,
    tokens: str | Tensor,
    saes: SparseAutoencoder | Sequence[SparseAutoencoder],
    **options: Any,
) -> tuple[Tensor, Cache]:
    """`run_with_saes`, and what SAEs had at their sites (see the cache of `saes`).

    >>> logits, cache = run_with_cache_with_saes(model, tokens, [dictionary])  # doctest: +SKIP
    >>> cache["blocks.9.hook_resid_post.hook_sae_acts_post"].shape  # doctest: +SKIP
    torch.Size([1, 12, 4096])
    """
    cache: Cache = {}
    return run_with_saes(model, tokens, saes, **options, cache=cache), cache
