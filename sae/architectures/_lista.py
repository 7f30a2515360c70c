"""One LISTA step: codes chosen again, from what the first ones left (Gregor and LeCun 2010).

    pi = W_enc^T u + b_enc,   f = act(pi)
    pi' = pi + eta W_enc^T (u - f W_dec),   f' = act(pi')        u = y - b_dec

pi' is the pre-activation of another input, u' = u + eta (u - f W_dec), so both steps are the
encoder's own product and selection; the gradient goes through both. Both act alike (the k largest,
the k B largest of a batch, or above a threshold of each step's own). An SAE with it is no encoder
of one product: what takes it for one (other libraries' formats, attribution) refuses it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sae import kernels
from sae.core.base import SAEConfig, SparseAutoencoder, kind_of
from sae.core.config import ADDED
from sae.distributed import FEATURES
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class ListaConfig(SAEConfig):
    """The field of architectures that can take a LISTA step."""

    lista_eta: float = field(default=0.0, metadata={ADDED: True})
    """Size of a LISTA step, after which features are chosen again by what the first choice leaves;
    0 for none. A step costs as much as encoding and decoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.lista_eta", self.lista_eta, low=0)


def step_size(config: SAEConfig) -> float:
    """eta; 0 where there is no step."""
    return config.lista_eta if isinstance(config, ListaConfig) else 0.0


def check_fits(sae: SparseAutoencoder) -> None:
    """Raise InputError for a step of an SAE that writes elsewhere, or with its features shared."""
    eta = step_size(sae.config)
    if eta and sae.d_in != sae.d_out:
        raise InputError(
            "what is left of the input is known only where it is reconstructed",
            where="sae.lista_eta",
            given=eta,
            allowed="0",
        )
    if eta and FEATURES.size > 1:
        raise InputError(
            "needs the codes of all features, which processes share out",
            where="sae.lista_eta",
            given=eta,
            allowed="0, or ranks rows",
        )


def refuse_lista(sae: SparseAutoencoder, where: str) -> None:
    """Raise InputError for an SAE whose encoder is not one product."""
    eta = step_size(sae.config)
    if eta:
        raise InputError(
            f"this {kind_of(sae.config)} SAE chooses its features in two steps (lista_eta), which "
            "cannot be said by one encoder matrix and a selection rule",
            where=where,
            given=f"lista_eta {eta:g}",
        )


def stepped(
    centred: Tensor,
    first: SparseCodes,
    W_dec: Tensor,
    eta: float,
    mask: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """u' = u + eta (u - f W_dec) of the encoder's input u [batch, d_in] and first codes f.

    Args: mask zeroes hidden coordinates, as they are in u.
    """
    seen = kernels.decode(first.row_ptr, first.index, first.value, W_dec)
    if mask is not None:
        seen = mask(seen)
    return (1 + eta) * centred - eta * seen
