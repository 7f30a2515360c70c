"""Transcoder: sparse features of one site that predict another, such as an MLP's input and output.

Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits"; Paulo et al. 2025,
"Transcoders beat sparse autoencoders for interpretability". The formulae are in `_transcoding`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sae.architectures import register
from sae.architectures._transcoding import Transcoding, TranscodingConfig
from sae.core.base import SAEConfig


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(TranscodingConfig):
    """Configuration of the transcoder."""

    kind: Literal["transcoder"] = "transcoder"
    """Name of the architecture."""


@register
class Transcoder(Transcoding):
    """Predicts the output site from the features alone."""

    Config: ClassVar[type[SAEConfig]] = TranscoderConfig
    config: TranscoderConfig
