"""KL finish: the last part of a run goes through the model (Karvonen 2025, arXiv 2503.17272).

A run reads stored rows first, and reconstructs; its last batches are whole training sequences of
the same harvest, and their loss is that of end-to-end training, balanced with the reconstruction's:

    loss = (alpha KL + FVU) / 2,   alpha = FVU / KL of the batch, without gradient

so that the loss is as large as the FVU alone, and what it is weighed against (the penalties of an
architecture) fits it still. As in the paper, all of the SAE is trained, what is before the finish
has a whole schedule of its own, down to 0, and the finish begins at a low learning rate that falls
to 0 over it. One optimiser goes on through both parts; the paper's begins anew, as that of
`start_from` does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from activations import ActivationStore
from sae.core.batch import RawBatch
from sae.data.streams import OneSite
from sae.training.end_to_end import EndToEnd
from sae.training.end_to_end_stream import EndToEndStream
from sae.training.optimisers import OptimiserKind
from sae.training.schedules import base_lr
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say


@dataclass(frozen=True, kw_only=True)
class FinishConfig(Config):
    """The last part of a run."""

    objective: Literal["kl"] | None = None
    """What the last part trains for: kl, the model's predictions and the reconstruction in equal
    shares; the same as before if not given."""
    fraction: float = 0.2
    """Fraction of the run's tokens that go through the model, at its end. 0.2 is the default of
    trainer.decay_fraction; 1 with start_from fine-tunes an SAE that is there."""
    tokens: int | None = None
    """So many tokens, in place of fraction; the paper has 25 million."""
    lr: float | None = None
    """Learning rate at the start of the finish, over which it falls to 0."""
    lr_multiplier: float = 0.5
    """Where lr is not given: so many times 2e-4 / sqrt(d_sae / 2^14), whatever the run's own is.
    0.5 was measured on 25,600 tokens; the paper's, on 25 million, is 0.25."""
    sequences_at_once: int = 4
    """Sequences that go through the model at once; bounds the memory for their logits."""

    def __post_init__(self) -> None:
        check_range("finish.fraction", self.fraction, above=0, high=1)
        check_range("finish.sequences_at_once", self.sequences_at_once, low=1)
        check_range("finish.lr_multiplier", self.lr_multiplier, above=0)
        if self.tokens is not None:
            check_range("finish.tokens", self.tokens, low=1)
        if self.lr is not None:
            check_range("finish.lr", self.lr, above=0)
        for name in ("tokens", "lr"):
            if self.objective is None and getattr(self, name) is not None:
                raise InputError(
                    "says how a finish is to be, and there is none",
                    where=f"finish.{name}",
                    given=getattr(self, name),
                    allowed='only with finish.objective = "kl"',
                )

    def steps(self, total_steps: int, batch_size: int) -> int:
        """Steps of the finish in a run of so many.

        Raises InputError if that is none, or more than the run has.

        >>> FinishConfig(objective="kl").steps(1000, 64)
        200
        >>> FinishConfig(objective="kl", tokens=6400).steps(1000, 64)
        100
        """
        if self.tokens is None:
            return max(1, round(self.fraction * total_steps))
        steps = round(self.tokens / batch_size)
        if not 1 <= steps <= total_steps:
            raise InputError(
                "less than a batch, or more than the run has",
                where="finish.tokens",
                given=self.tokens,
                allowed=f"{batch_size} to {total_steps * batch_size}",
            )
        return steps

    def peak_lr(self, d_sae: int, optimiser: OptimiserKind) -> float:
        """The learning rate that it begins with.

        >>> FinishConfig(objective="kl").peak_lr(2**14, "adam")
        0.0001
        >>> FinishConfig(objective="kl", lr=1e-3).peak_lr(2**14, "adam")
        0.001
        """
        return self.lr_multiplier * base_lr(d_sae, optimiser) if self.lr is None else self.lr


class FinishStream(OneSite):
    """Batches of a site's stored rows, and then of whole sequences that go through the model.

    Args:
        end_to_end: the loss of the second part.
        first_batches: batches of stored rows before it.
        options: of `Stream`.

    Raises InputError as OneSite and EndToEndStream do.
    """

    KIND = "finish"

    def __init__(
        self, store: ActivationStore, end_to_end: EndToEnd, *, first_batches: int, **options: Any
    ) -> None:
        super().__init__(store, [end_to_end.site], **options)
        self.first_batches, self.end_to_end = first_batches, end_to_end
        shared = {name: options.get(name) for name in ("batch_size", "outliers")}
        self.sequences = EndToEndStream(store, end_to_end, seed=self._seed, **shared)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[RawBatch]:
        if self._number < self.first_batches:
            for batch in super().__iter__():
                yield batch
                if self._number >= self.first_batches:
                    break
            say("the finish begins: from here on batches go through the model")
        removed = self.sequences.removed
        for batch in self.sequences:
            self.removed += self.sequences.removed - removed
            removed = self.sequences.removed
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where both parts stand; JSON-able."""
        return {**super().state_dict(), "sequences": self.sequences.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state_dict` was taken.

        Raises InputError if the state is of another stream.
        """
        super().load_state_dict(state)
        self.sequences.load_state_dict(state["sequences"])

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "first_batches": self.first_batches}
