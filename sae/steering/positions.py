"""Which positions an edit is made at: a choice that people give, to a mask of a pass's tokens."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from activations.models.chat import ChatTokens
from activations.sites.grids import GridPositions
from activations.sites.kept import TokenPositions
from saescope.errors import InputError
from saescope.integers import as_index, as_indices

Role = Literal["system", "user", "assistant"]
Positions = Literal["kept", "all", "prompt", "generated"] | Role | slice | Sequence[int] | Tensor
Selector = Callable[[TokenPositions], Bool[Tensor, "batch pos"]]
_WORDS: dict[str, Selector] = {
    "kept": lambda at: at.kept,
    "all": lambda at: at.position >= 0,
    "prompt": lambda at: at.kept & (at.position < at.prompt[:, None]),
    "generated": lambda at: at.kept & (at.position >= at.prompt[:, None]),
}
_ROLES = get_args(Role)
_ALLOWED = f"{', '.join((*_WORDS, *_ROLES))}, a slice, a list, a mask of true and false"


def selector(positions: Positions, chat: ChatTokens | None = None) -> Selector:
    """From the positions of tokens to bool [batch, pos]: which are edited; padding never is.

    - "kept": those that SAEs are trained on (not a text's first token, no special token);
      "prompt" and "generated": of these, the prompt's, or what comes after it; "system", "user" and
      "assistant": of these, what is said in a role's messages of `chat`, all texts being this
      conversation (what comes after it is the assistant's, if its answer is begun); "all".
    - a slice or a list: by position, which counts each text's own tokens from 0.
    - a mask [pos], or [batch, pos] with a row for each text: true where a text's own token at this
      position is edited; what comes after the mask's end is not.

    Raises InputError for anything else, and for a role without a conversation that has it; where it
    is called for a text that is not the conversation.
    """
    if isinstance(positions, str) and positions in _ROLES:
        return _in_role(positions, chat)
    if isinstance(positions, str):
        if positions not in _WORDS:
            raise InputError("no such choice", where="positions", given=positions, allowed=_ALLOWED)
        return _WORDS[positions]
    if isinstance(positions, slice):
        return _in_slice(positions)
    if "bool" in str(getattr(positions, "dtype", "")):
        return _in_mask(torch.as_tensor(positions))
    wanted = torch.tensor(as_indices(positions, where="positions", low=0), dtype=torch.int64)
    return lambda at: torch.isin(at.position, wanted.to(at.position.device))


def _in_role(role: str, chat: ChatTokens | None) -> Selector:
    if chat is None:
        raise InputError(
            "what a role says is known from a conversation: give chat",
            where="positions",
            given=role,
        )
    after = chat.answer_begun and role == "assistant"
    if role not in chat.role and not after:
        raise InputError("nobody says anything in this role", where="positions", given=role)
    said = torch.tensor([each == role for each in chat.role] + [after])
    ids = torch.tensor([*chat.ids, -1])

    def chosen(at: TokenPositions) -> Tensor:
        kept, position = at.kept, at.position.clamp(0, len(ids) - 1)
        within = (at.position >= 0) & (at.position < len(ids) - 1)
        other = within & (at.tokens != ids.to(position.device)[position])
        if bool(other.any()):
            raise InputError(
                "a text is not the conversation that the roles are of",
                where="positions",
                given=f"text {int(other.nonzero()[0, 0])} of the batch",
                allowed="the ids of chat",
            )
        return kept & said.to(position.device)[position]

    return chosen


def _in_slice(positions: slice) -> Selector:
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


def _in_mask(mask: Tensor) -> Selector:
    if mask.ndim not in (1, 2) or not mask.numel():
        raise InputError(
            "a mask is [pos] or [batch, pos]", where="positions", given=tuple(mask.shape)
        )

    def chosen(at: TokenPositions) -> Tensor:
        own = mask.to(at.position.device)
        check_rows(own.shape[0] if own.ndim == 2 else None, len(at.position), where="positions")
        own = own.expand(len(at.position), -1)
        within = (at.position >= 0) & (at.position < own.shape[1])
        return within & own.gather(1, at.position.clamp(0, own.shape[1] - 1))

    return chosen


def in_pictures(
    chosen: Selector, region: Any = None, steps: Collection[int] | None = None
) -> Selector:
    """Of what a selector chooses, what is in a part of the picture, at some denoising steps.

    Args: region is bool [height, width], or [batch, height, width] with one for each picture, of
    the feature map's size or one that `activations.sites.grids.fitted` makes it; class tokens and
    the like are in no part of the picture. steps are counted from 0.

    Raises InputError for another kind of region or steps; where it is called, for a site whose
    cells are not known, a region that does not fit, and a pass that is no denoising step.
    """
    part = None if region is None else torch.as_tensor(region)
    if part is not None and (part.dtype != torch.bool or part.ndim not in (2, 3)):
        raise InputError(
            "is a mask of true and false, [height, width] or [batch, height, width]",
            where="region",
            given=f"{part.dtype} {tuple(part.shape)}",
        )
    wanted = None if steps is None else set(as_indices(steps, where="steps", low=0))

    def within(at: TokenPositions) -> Tensor:
        if not isinstance(at, GridPositions):
            raise InputError("only pictures have them", where="region, steps")
        found = chosen(at)
        if wanted is not None and at.step is None:
            raise InputError("which denoising step this is is not known", where="steps")
        if wanted is not None and at.step not in wanted:
            return torch.zeros_like(found)
        return found if part is None else found & at.inside(part)

    return chosen if part is None and wanted is None else within


def check_rows(wanted: int | None, batch: int, **where: Any) -> None:
    """InputError if what has a value for each text of a batch has another number of them."""
    if wanted is not None and wanted != batch:
        raise InputError(
            "the batch has another number of texts", **where, given=batch, allowed=str(wanted)
        )
