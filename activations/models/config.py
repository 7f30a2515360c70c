"""Which model, and how it is run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from activations.models.devices import DTYPES
from activations.models.packaged import PACKAGED_MODELS
from saescope.config import Config
from saescope.errors import InputError, check_choice, check_range

_TRUST = "trust_remote_code"
KINDS = ("language", "text_encoder", "vision", "diffusion")


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(Config):
    """How a diffusion model is run on a prompt, and at which of its steps it is read."""

    steps: int = 1
    """Denoising steps of a run."""

    at: tuple[int, ...] = (0,)
    """The steps that are read, from 0; a prompt has a sequence for each, in this order."""

    guidance: float = 0.0
    """Classifier-free guidance; above 1 the model runs on each prompt and on none, and the prompt's
    half is read."""

    pixels: int | None = None
    """Height and width of the picture; the model's own if not given."""

    def __post_init__(self) -> None:
        check_range("model.diffusion.steps", self.steps, low=1)
        check_range("model.diffusion.guidance", self.guidance, low=0)
        if self.pixels is not None:
            check_range("model.diffusion.pixels", self.pixels, low=1)
        if not self.at or list(self.at) != sorted({n for n in self.at if 0 <= n < self.steps}):
            raise InputError(
                "steps are read in order, each once",
                where="model.diffusion.at",
                given=list(self.at),
                allowed=f"some of 0 to {self.steps - 1}",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Which model, in which precision, where."""

    spec: str = "smollm2-135m"
    """A packaged model (smollm2-135m, minilm, efficientnet-lite0), a folder, or a hub name."""

    kind: str = "language"
    """language (causal, named sites), text_encoder, vision or diffusion (sites by module)."""

    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: whichever of the first two is faster here."""

    device: str = "cpu"
    """cpu, cuda, cuda:N, or spread over the devices there are: auto, balanced, sequential."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""

    diffusion: DenoisingConfig = field(default_factory=DenoisingConfig)
    """How a diffusion model is run."""

    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it. Whoever wrote it can then do on this
    machine what you can, so read it first. Never stored: to be given anew each time."""

    @property
    def reads_tokens(self) -> bool:
        """Whether the tokens of a sequence are all that its activations are computed from."""
        return self.kind in ("language", "text_encoder")

    def __post_init__(self) -> None:
        if self.kind != "diffusion" and self.diffusion != DenoisingConfig():
            raise InputError(
                "is for models of the kind diffusion", where="model.diffusion", given=self.kind
            )
        check_choice("unknown precision", "model.dtype", self.dtype, ("auto", *DTYPES))
        check_choice("unknown kind of model", "model.kind", self.kind, KINDS)
        if not self.spec:
            raise InputError("empty", where="model.spec", given=self.spec, allowed=PACKAGED_MODELS)


def stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a harvest as they are stored: without the trust in a model's code.

    A harvest may come from others, and who trusts a model's code says so each time.
    """
    model = {name: each for name, each in settings["model"].items() if name != _TRUST}
    return {**settings, "model": model}
