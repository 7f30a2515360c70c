"""Steering: change chosen features of a model's activations, and nothing else.

The model goes on with the edited activation (`sae.steering.edits` has the arithmetic); what the SAE
does not explain is kept, and an edit that changes nothing changes no bit. Edits depend on a
position's own activation alone, so they are the same with and without a KV cache, and in a padded
batch as for a text alone. A transcoder's features are read at its input site and change its output
site. A crosscoder cannot steer: its features are known only after its last site, when it is too
late to change the first.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from activations import Model, model_around
from activations.models.base import HarvestModel
from activations.models.chat import ChatTokens, chat_tokens
from activations.models.frozen_attention import frozen_attention
from activations.sites.hooks import PositionedEdit
from activations.sites.kept import TokenPositions, generating
from sae.core.base import SparseAutoencoder
from sae.data.model_placement import placement_in
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.steering.edits import Amounts, Arithmetic, Edit, Maxima
from sae.steering.positions import Positions, Selector, check_rows, in_pictures, selector
from saescope.errors import InputError

if TYPE_CHECKING:
    from store import FeatureStore

_WITH_PROMPT = ("prompt", "generated")
Conversation = Sequence[Mapping[str, Any]]
"""messages, each with its role and content"""
Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [rows, d_in] float32 that features are read from, h [rows, d_out] and each one's row of the
batch, to the new h"""


@contextmanager
def steer(
    model: HarvestModel | nn.Module,
    *what: SparseAutoencoder | tuple[SparseAutoencoder, Edit],
    add: Mapping[int, Amounts] | None = None,
    clamp: Mapping[int, Amounts] | None = None,
    ablate: Collection[int] | None = None,
    scale: Mapping[int, Amounts] | None = None,
    at_least: Mapping[int, Amounts] | None = None,
    at_most: Mapping[int, Amounts] | None = None,
    project: Mapping[int, Amounts] | None = None,
    cap: Mapping[int, Amounts] | None = None,
    only_active: bool = False,
    when: Mapping[int, float] | None = None,
    positions: Positions = "kept",
    region: Tensor | None = None,
    steps: Collection[int] | None = None,
    site: str | None = None,
    chat: ChatTokens | Conversation | None = None,
    store: "FeatureStore | None" = None,
    freeze_attention: bool = False,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, every run of the model has an SAE's features edited at its site.

    Args:
        model: of `activations.load_model`; or of transformers, or a TransformerBridge, whose
            weights are not checked against the SAE's (see `activations.model_around`).
        what: one SAE, with the edit in the arguments that follow (see `sae.Edit`); or any number
            of pairs of an SAE and its `sae.Edit`, made in this order.
        positions: which of each text's tokens; see `sae.steering.positions.selector`.
        region, steps: of a model of pictures; see `sae.steering.positions.in_pictures`.
        site: where, if not the site the SAE was trained at; which layer, for one of several.
        chat: what all texts are, of `activations.chat_tokens`, or messages (the answer begun).
        store: the SAE's feature store, which knows the activation that "2x" is a multiple of.
        freeze_attention: heads attend as without edits; see `activations.models.frozen_attention`.
        allow_other_model: steer with an SAE of another model; it is said.

    Raises InputError for wrong features, amounts, positions or sites, for a crosscoder, an SAE of
    another model, a store of another SAE, and attention that cannot be frozen; in the block, for
    another batch than a list of amounts has.

    >>> with steer(model, sae, add={123: 8.0}):                              # doctest: +SKIP
    ...     model.generate("The weather today", max_new_tokens=40)
    >>> with steer(model, (early, Edit(ablate=[7])), (late, Edit(add={9: 4.0}))):  # doctest: +SKIP
    ...     model.logits(tokens)
    """
    amounts: dict[str, Any] = {"add": add, "clamp": clamp, "ablate": ablate, "scale": scale}
    amounts |= {"at_least": at_least, "at_most": at_most, "when": when}
    amounts |= {"project": project, "cap": cap}
    named = {name: each for name, each in amounts.items() if each is not None}
    named |= {"positions": positions, "region": region, "steps": steps, "site": site}
    given = Edit(**named, only_active=only_active)
    with ExitStack() as stack:
        own_model, pairs = model_around(model), _pairs(what, given)
        said = _conversation(own_model, chat)
        if freeze_attention and any(edit for _, edit in pairs):
            stack.enter_context(frozen_attention(own_model))
        for each in pairs:
            _enter(stack, own_model, each, said, store, allow_other_model)
        yield


def _enter(
    stack: ExitStack,
    model: Model,
    pair: tuple[SparseAutoencoder, Edit],
    chat: ChatTokens | None,
    store: "FeatureStore | None",
    allow_other_model: bool,
) -> None:
    """Begin one edit of one SAE, which ends with the stack."""
    sae, edit = pair
    chosen = in_pictures(selector(edit.positions, chat), edit.region, edit.steps)
    place = placement_in(model, sae, edit.site, where="steer", allow_other_model=allow_other_model)
    maxima = None if store is None else _maxima_of(place.sae, store)
    arithmetic = Arithmetic(place.sae, edit, maxima)
    if not edit:
        return
    if isinstance(edit.positions, str) and edit.positions in _WITH_PROMPT:
        stack.enter_context(generating(getattr(model, "hf", None)))
    edits = site_edits(place, arithmetic, chosen, arithmetic.rows)
    stack.enter_context(model.edit_with_positions(edits))


def _conversation(model: Model, chat: ChatTokens | Conversation | None) -> ChatTokens | None:
    return chat if chat is None or isinstance(chat, ChatTokens) else chat_tokens(model, chat)


def _pairs(
    what: tuple[SparseAutoencoder | tuple[SparseAutoencoder, Edit], ...], given: Edit
) -> list[tuple[SparseAutoencoder, Edit]]:
    """Each SAE with its edit. InputError where it is not said which edit is whose."""
    if len(what) == 1 and isinstance(what[0], SparseAutoencoder):
        return [(what[0], given)]
    pairs = [each for each in what if isinstance(each, tuple) and len(each) == 2]
    fits = [isinstance(s, SparseAutoencoder) and isinstance(e, Edit) for s, e in pairs]
    if not what or len(pairs) < len(what) or not all(fits):
        raise InputError(
            "wants one SAE and its edit as arguments, or pairs of an SAE and a sae.Edit",
            where="steer",
            given=[type(each).__name__ for each in what],
        )
    own = given or given.only_active or given.when or given.site or given.steps is not None
    own = own or given.region is not None
    if own or not (isinstance(given.positions, str) and given.positions == "kept"):
        raise InputError("the edit of each pair is in its sae.Edit", where="steer")
    return pairs


def _maxima_of(sae: SparseAutoencoder, store: "FeatureStore") -> Maxima:
    if weights_hash(sae) != store.meta.get("sae_hash"):
        raise InputError("is of another SAE", where="store", given=str(store.path))
    return lambda features: [store.feature(each).max for each in features]


@contextmanager
def splice(
    model: HarvestModel | nn.Module,
    *saes: SparseAutoencoder,
    positions: Positions = "kept",
    site: str | None = None,
    chat: ChatTokens | Conversation | None = None,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, the model goes on with SAEs' reconstructions, without the error term.

    Several SAEs are spliced in their order, each seeing what those before it left.

    Raises InputError as `steer` does.
    """
    own_model = model_around(model)
    chosen = selector(positions, _conversation(own_model, chat))
    if not saes:
        raise InputError("wants an SAE", where="splice")
    with ExitStack() as stack:
        for sae in saes:
            place = placement_in(
                own_model, sae, site, where="splice", allow_other_model=allow_other_model
            )

            def change(x: Tensor, h: Tensor, _row: Tensor, own: Placement = place) -> Tensor:
                return own.sae(x).x_hat.to(h.dtype)

            edits = site_edits(place, change, chosen)
            stack.enter_context(own_model.edit_with_positions(edits))
        yield


def site_edits(
    placement: Placement, change: Change, selects: Selector, rows: int | None = None
) -> dict[str, PositionedEdit]:
    """Edits of a model that apply a change at chosen positions, in batches of so many texts."""
    (read,), (written,) = placement.read, placement.written
    seen: list[tuple[Tensor, TokenPositions]] = []

    @torch.no_grad()
    def remember(h: Tensor, at: TokenPositions) -> None:
        seen[:] = [(h[selects(at).to(h.device)].float(), at)]

    @torch.no_grad()
    def edit(h: Tensor, at: TokenPositions) -> Tensor | None:
        check_rows(rows, len(h), where="steer")
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
        out[chosen] = change(x, before, chosen.nonzero()[:, 0])
        return out

    return {written: edit} if read == written else {read: remember, written: edit}
