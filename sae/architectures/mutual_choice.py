"""Mutual Choice SAE (Ayonrinde 2024, "Adaptive sparse allocation with mutual choice and feature
choice sparse autoencoders"): BatchTopK under its paper's name, with aux_zipf as there.

max sum S_ij pi_ij over masks S with sum_ij S_ij <= k B;   loss = FVU + 1/32 aux_zipf
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sae.architectures import register
from sae.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae.core.base import SAEConfig


@dataclass(frozen=True, kw_only=True)
class MutualChoiceConfig(BatchSelectionConfig):
    """Configuration of the Mutual Choice architecture."""

    kind: Literal["mutual_choice"] = "mutual_choice"
    """Name of the architecture."""
    auxiliary: Literal["auxk", "zipf"] = "zipf"
    """Which features predict the residual: dead ones, or all under-used ones (aux_zipf)."""


@register
class MutualChoiceSAE(BatchSelectionSAE):
    """Tokens and features choose each other: the k B largest pre-activations of a batch."""

    Config: ClassVar[type[SAEConfig]] = MutualChoiceConfig
    config: MutualChoiceConfig  # type: ignore[assignment]
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "b_enc", "W_dec", "density", "underused")
