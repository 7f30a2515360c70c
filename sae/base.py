"""What every sparse autoencoder is: parameters, encode, decode, forward, fold, save.

Units. Everything public (x, activations, x_hat, decoder rows) is in the model's own units; inside,
an SAE works at the scale of its normaliser. With y = (x - m) s and a positively homogeneous
activation function the two agree: f = f_y / s and x_hat = f W_dec + (m + b_dec / s).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae.codes import SparseCodes
from sae.normaliser import Normaliser
from saescope.artefact import atomic_path, check_schema, read_json, write_json
from saescope.config import Config, from_dict, to_dict
from saescope.errors import ArtefactError, InputError, check_range

SCHEMA = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class SAEConfig(Config):
    """What every architecture's configuration has; each adds its own fields and its `kind`."""

    d_sae: int = 8192
    """Width of the dictionary (number of features)."""

    def __post_init__(self) -> None:
        check_range("sae.d_sae", self.d_sae, low=1)


class SAEOutput(NamedTuple):
    """What `forward` returns."""

    x_hat: Tensor
    """reconstruction [batch, d_in], in the model's units"""
    codes: SparseCodes
    """feature activations, in the model's units"""


class TrainingOutput(NamedTuple):
    """What an architecture's objective returns for one batch."""

    loss: Tensor
    """scalar to minimise"""
    terms: dict[str, Tensor]
    """named parts of the loss, detached scalars"""
    fired: Tensor
    """bool [d_sae], features active somewhere in the batch"""


@dataclass
class TrainingState:
    """What an objective may know of the run."""

    step: int = 0
    total_steps: int = 1
    dead: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [d_sae], features that have not fired for `dead_after_tokens`"""


class SparseAutoencoder(nn.Module, ABC):
    """A sparse autoencoder; a subclass is one architecture in one file of `sae/architectures/`.

    W_enc_T and W_dec are both kept [d_sae, d_in], one feature a row, as the sparse kernels read
    them.
    """

    Config: ClassVar[type[SAEConfig]]

    def __init__(self, config: SAEConfig, d_in: int) -> None:
        super().__init__()
        if d_in < 1:
            raise InputError("d_in must be positive", where="sae", given=d_in)
        self.config = config
        self.d_in = d_in
        self.d_sae = config.d_sae
        self.normaliser = Normaliser.identity(d_in)
        self.metadata: dict[str, Any] = {}
        self.W_enc_T = nn.Parameter(torch.empty(self.d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.reset_parameters()

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights [d_in, d_sae] (a view of W_enc_T)."""
        return self.W_enc_T.T

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decoder rows uniform on the unit sphere, W_enc = W_dec^T, biases 0."""
        nn.init.normal_(self.W_dec)
        self.normalise_decoder()
        self.W_enc_T.copy_(self.W_dec)
        nn.init.zeros_(self.b_enc)
        nn.init.zeros_(self.b_dec)

    # ---- what an architecture says of itself ------------------------------------------------

    @abstractmethod
    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], both at the normaliser's scale."""

    @abstractmethod
    def training_output(self, y: Tensor, state: TrainingState) -> TrainingOutput:
        """The objective on a batch y [batch, d_in] at the normaliser's scale."""

    @abstractmethod
    def start(self, y: Tensor) -> None:
        """Set what the architecture initialises from data y [rows, d_in] (b_dec, say)."""

    def before_step(self) -> None:
        """Called with gradients in place, before they are clipped; projections go here."""

    def after_step(self) -> None:
        """Called after the optimiser's step; constraints on the weights go here."""

    # ---- what everybody uses ----------------------------------------------------------------

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Feature activations of x [batch, d_in], sparse, in the model's units."""
        self._check(x)
        return self.encode_normalised(self.normaliser.apply(x)).scale(1 / self.normaliser.scale)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of x [batch, d_in], dense [batch, d_sae], in the model's units."""
        return self.encode_sparse(x).dense()

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """Reconstruction [batch, d_in] from codes, or from dense activations [batch, d_sae]."""
        from sae import kernels

        if isinstance(codes, Tensor):
            if codes.shape[-1] != self.d_sae:
                raise InputError(
                    "wrong number of features", where="decode", given=tuple(codes.shape),
                    allowed=f"[batch, {self.d_sae}]",
                )  # fmt: skip
            sums = codes @ self.W_dec
        else:
            sums = kernels.decode(codes.row_ptr, codes.index, codes.value, self.W_dec)
        return sums + self.output_bias

    @property
    def output_bias(self) -> Tensor:
        """What is reconstructed when no feature fires [d_in], in the model's units."""
        return self.normaliser.invert(self.b_dec)

    def forward(self, x: Tensor) -> SAEOutput:
        """Reconstruct x [batch, d_in]."""
        codes = self.encode_sparse(x)
        return SAEOutput(self.decode(codes), codes)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[-1] != self.d_in:
            raise InputError(
                "wrong shape of activations",
                where="sae",
                given=tuple(x.shape),
                allowed=f"[batch, {self.d_in}]",
            )

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        norm = self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norm)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change its rows' norm (unit rows)."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = (gradient * self.W_dec).sum(1, keepdim=True)
            gradient.addcmul_(self.W_dec, along, value=-1)

    @torch.no_grad()
    def fold(self) -> Self:
        """An equal SAE without a normaliser: its scale and mean are put into the biases.

        Same features and reconstructions, up to rounding. Source: the algebra of Gemma Scope
        (Lieberum et al. 2024, section 3), with a mean added.
        """
        folded = type(self)(self.config, self.d_in)
        folded.load_state_dict(self.state_dict())
        folded.metadata = dict(self.metadata)
        folded.b_enc.div_(self.normaliser.scale)
        folded.b_dec.copy_(self.output_bias)
        folded.fold_parameters(self.normaliser)
        return folded

    def fold_parameters(self, normaliser: Normaliser) -> None:
        """Bring an architecture's own parameters (thresholds, say) to the model's units."""
        del normaliser

    # ---- on disk ----------------------------------------------------------------------------

    def save(self, folder: str | Path, **more: Any) -> None:
        """Write config.json and weights.safetensors into a folder, atomically.

        Keyword arguments are put into config.json beside `metadata` (measured metrics, say).
        """
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        tensors["normaliser.mean"] = self.normaliser.mean.contiguous()
        described = {
            "kind": "sae",
            "schema": SCHEMA,
            "architecture": kind_of(self.config),
            "d_in": self.d_in,
            "config": to_dict(self.config),
            "normaliser": {
                "kind": self.normaliser.kind,
                "scale": self.normaliser.scale,
                "variance": self.normaliser.variance,
            },
            "metadata": self.metadata,
            **more,
        }
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / WEIGHTS_FILE)
            write_json(temporary / CONFIG_FILE, described)


def kind_of(config: SAEConfig) -> str:
    """The name an architecture's configuration carries."""
    return str(config.kind)  # type: ignore[attr-defined]


def read_sae(folder: Path, known: Mapping[str, type[SparseAutoencoder]]) -> SparseAutoencoder:
    """Load an SAE folder, given the known architectures.

    Raises ArtefactError if files are missing, damaged, or of a newer schema.
    """
    path = folder / CONFIG_FILE
    described = read_json(path)
    if not isinstance(described, dict) or described.get("kind") != "sae":
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    check_schema(described.get("schema"), supported=SCHEMA, where=str(path))
    architecture = str(described.get("architecture"))
    if architecture not in known:
        raise ArtefactError(
            "unknown architecture", where=str(path), given=architecture, allowed=known
        )
    cls = known[architecture]
    try:
        sae = cls(from_dict(cls.Config, described["config"], where=str(path)), described["d_in"])
        tensors = load_file(folder / WEIGHTS_FILE)
        mean = tensors.pop("normaliser.mean")
        sae.load_state_dict(tensors)
        stored = described["normaliser"]
        sae.normaliser = Normaliser(stored["kind"], mean, stored["scale"], stored["variance"])
    except FileNotFoundError:
        raise ArtefactError("weights are missing", where=str(folder / WEIGHTS_FILE)) from None
    except KeyError as error:
        raise ArtefactError(f"incomplete SAE: {error} is missing", where=str(folder)) from None
    except Exception as error:
        if isinstance(error, InputError | ArtefactError):
            raise
        # safetensors and load_state_dict each have their own exceptions for a damaged file
        raise ArtefactError(f"damaged weights: {error}", where=str(folder)) from error
    sae.metadata = dict(described.get("metadata", {}))
    return sae.eval()
