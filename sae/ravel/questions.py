"""Questions for an attribute of an entity, and what a model answers when activations are swapped.

A question is a sentence that ends where the value follows. It counts as known if the token that the
model finds most likely there is the value's first. What is swapped is the activation at the
entity's last token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.ravel.entities import SLOT, EntityKind

if TYPE_CHECKING:
    from activations import Model

_TOKENS = 1024
"""tokens of a run of the model. Fixed, as its size decides the last bits of activations"""
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One attribute of one entity, asked for by one sentence."""

    entity: str
    attribute: str
    sentence: int
    """which of the attribute's sentences"""
    tokens: tuple[int, ...]
    position: int
    """of the entity's last token"""
    answer: int
    """the first token of the value"""


def questions_of(
    model: "Model", kind: EntityKind, entities: Sequence[str], sentences: int
) -> list[Question]:
    """The questions for entities of a kind, by the first so many sentences of each attribute.

    Left out are those whose value begins with the same token as another value of the attribute, and
    those where the tokenizer joins the entity, or the value, with what stands beside it.
    """
    found: list[Question] = []
    for attribute, asking in kind.sentences.items():
        for number, sentence in enumerate(asking[:sentences]):
            values = [kind.values[entity][attribute] for entity in entities]
            asked = [
                _question(model, entity, attribute, value, number, sentence)
                for entity, value in zip(entities, values, strict=True)
            ]
            of_answer: dict[int, set[str]] = {}
            for each, value in zip(asked, values, strict=True):
                if each is not None:
                    of_answer.setdefault(each.answer, set()).add(value)
            found += [
                each for each in asked if each is not None and len(of_answer[each.answer]) < 2
            ]
    return found


def _question(
    model: "Model", entity: str, attribute: str, value: str, number: int, sentence: str
) -> Question | None:
    """The question; None if tokens of the entity or the value are joined with others."""
    before = sentence[: sentence.index(SLOT) + len(SLOT)].replace(SLOT, entity)
    text = sentence.replace(SLOT, entity)
    upto, tokens, whole = (
        tuple(model.tokenize(each)) for each in (before, text, f"{text} {value}")
    )
    if tokens[: len(upto)] != upto or whole[: len(tokens)] != tokens or whole == tokens:
        return None
    return Question(
        entity=entity,
        attribute=attribute,
        sentence=number,
        tokens=tokens,
        position=len(upto) - 1,
        answer=whole[len(tokens)],
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions with the model's activations and answers."""

    questions: Sequence[Question]
    x: Tensor
    """[questions, d_in] float32, the activation at each entity's last token"""
    known: NDArray[np.bool_]
    """[questions], whether the model answers right"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model at one site that answers questions."""

    model: "Model"
    site: str

    def ask(self, questions: Sequence[Question]) -> Asked:
        """What the model answers by itself."""
        x = torch.zeros(len(questions), self.model.d_in(self.site))
        answers = np.zeros(len(questions), np.int64)
        for batch in _batches(questions):
            at = torch.tensor([questions[index].position for index in batch])

            def see(h: Tensor, _: Tensor, batch: list[int] = batch, at: Tensor = at) -> None:
                x[batch] = h[torch.arange(len(batch)), at].float().cpu()

            answers[batch] = self._last(questions, batch, see).argmax(-1).cpu().numpy()
        right = np.array([each.answer for each in questions], np.int64)
        return Asked(questions=questions, x=x, known=answers == right)

    def swapped(self, questions: Sequence[Question], x: Tensor) -> Indices:
        """The answers [questions], as tokens, with x [questions, d_in] at the entities."""
        answers = np.zeros(len(questions), np.int64)
        for batch in _batches(questions):
            edit = _putting(x[batch], questions, batch)
            answers[batch] = self._last(questions, batch, edit).argmax(-1).cpu().numpy()
        return answers

    def margins(
        self, questions: Sequence[Question], x: Tensor, other: Indices
    ) -> tuple[Tensor, Tensor]:
        """How far the answers are ahead of other tokens, and what activations do to that.

        Args: x [questions, d_in] are the activations at the entities, other [questions] tokens.

        Returns the answer's logit less the other's [questions], and the gradient of the other's
        less the answer's at x [questions, d_in].
        """
        margin, gradient = torch.zeros(len(questions)), torch.zeros_like(x)
        right = torch.tensor([each.answer for each in questions])
        for batch in _batches(questions):
            own = x[batch].clone().requires_grad_()
            logits = self._last(questions, batch, _putting(own, questions, batch), gradient=True)
            row = torch.arange(len(batch))
            found = logits[row, right[batch]] - logits[row, torch.from_numpy(other)[batch]]
            (gradient[batch],) = torch.autograd.grad(found.sum(), own)
            margin[batch] = found.detach().float().cpu()
        return margin, gradient

    def _last(
        self,
        questions: Sequence[Question],
        batch: Sequence[int],
        edit: Callable[[Tensor, Tensor], Tensor | None],
        *,
        gradient: bool = False,
    ) -> Tensor:
        """Logits [batch, d_vocab] after the last token of questions of one length."""
        tokens = torch.tensor([questions[index].tokens for index in batch])
        with self.model.edit({self.site: edit}):
            return self.model.logits(tokens, gradient=gradient)[:, -1]


def _putting(
    x: Tensor, questions: Sequence[Question], batch: Sequence[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """An edit that puts x [batch, d_in] where the entities of these questions end."""
    at = torch.tensor([questions[index].position for index in batch])

    def put(h: Tensor, _: Tensor) -> Tensor:
        return h.index_put((torch.arange(len(at), device=h.device), at.to(h.device)), x.to(h))

    return put


def _batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Indices of questions of one length, that are run together."""
    by_length: dict[int, list[int]] = {}
    for index, each in enumerate(questions):
        by_length.setdefault(len(each.tokens), []).append(index)
    for length, own in sorted(by_length.items()):
        size = max(1, _TOKENS // length)
        for start in range(0, len(own), size):
            yield own[start : start + size]
