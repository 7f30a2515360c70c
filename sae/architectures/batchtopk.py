"""BatchTopK SAE (Bussmann et al. 2024), which Ayonrinde (2024) calls Mutual Choice.

pi = W_enc^T (y - b_dec) + b_enc;   f = pi at the k B largest positive pi of a batch, else 0
inference: f = pi where pi > threshold;   y_hat = f W_dec + b_dec;   loss = FVU + 1/32 AuxK
Options: k may fall from k_start in the first part of a run, and features may be chosen again after
a LISTA step (`_lista`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sae.architectures import register
from sae.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae.architectures._falling_k import FallingKConfig
from sae.architectures._lista import ListaConfig
from sae.core.base import SAEConfig


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(BatchSelectionConfig, FallingKConfig, ListaConfig):
    """Configuration of the BatchTopK architecture."""

    kind: Literal["batchtopk"] = "batchtopk"
    """Name of the architecture."""


@register
class BatchTopKSAE(BatchSelectionSAE):
    """Keeps the k B largest positive pre-activations of a batch, whichever rows they are in."""

    Config: ClassVar[type[SAEConfig]] = BatchTopKConfig
    config: BatchTopKConfig  # type: ignore[assignment]
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "b_enc", "W_dec", "density", "underused")
