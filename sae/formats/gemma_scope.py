"""Gemma Scope: params.npz, or Gemma Scope 2's params.safetensors (Lieberum et al. 2024).

JumpReLU without a pre-encoder bias: f = z where z = x W_enc + b_enc > threshold. Keys W_enc [d_in,
d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold, in some files w_enc and w_dec; transcoders
may have affine_skip_connection [d_in, d_out].

Gemma Scope 2 has a config.json that says the kind and both hook points. Gemma Scope 1 has nothing
but its folders' names (see `_gemma_scope_names`). Embedding SAEs read the embedding before the
model multiplies it by sqrt(d_in); they are brought to the scaled one, which a hook sees.
"""

import re
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch

from sae.core.base import SparseAutoencoder
from sae.core.plain import PlainSAE, Rule
from sae.formats import register
from sae.formats._claim import Claim
from sae.formats._format import Format, released_as
from sae.formats._gemma_scope_names import Facts, facts_of, kind_of_config
from sae.formats._given import Given
from sae.formats._ours import sae_of
from sae.formats._weights import Weights
from saescope.artefact import atomic_path
from saescope.errors import ArtefactError, InputError

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
CONFIG = "config.json"
_SKIP = "affine_skip_connection"


@register
class GemmaScope(Format):
    """The folder that Gemma Scope keeps one SAE in."""

    name: ClassVar[str] = "gemma_scope"
    files: ClassVar[tuple[str, ...]] = (NPZ,)
    further_files: ClassVar[tuple[str, ...]] = (SAFETENSORS, CONFIG)
    rules: ClassVar[tuple[Rule, ...]] = ("relu", "jumprelu")

    def recognise(self, folder: Path) -> bool:
        """By either release's file."""
        return (folder / NPZ).is_file() or (folder / SAFETENSORS).is_file()

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        given = _config(folder)
        facts = facts_of(given, released_as(folder, released))
        weights = _weights(folder)
        d_in, d_sae = weights.matrix("W_enc")
        d_out = weights.matrix("W_dec")[1]
        scale = weights.take("scaling_factor", (d_sae,)) if "scaling_factor" in weights else None
        if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
            raise InputError(
                "has factors for its features, whose meaning is not published",
                where=weights.where,
                given="scaling_factor",
            )
        has_skip = _skip_agrees(given, weights)
        plain = PlainSAE(
            activation="jumprelu",
            W_enc=weights.take("W_enc", (d_in, d_sae)),
            W_dec=weights.take("W_dec", (d_sae, d_out)),
            b_enc=weights.take("b_enc", (d_sae,)),
            b_dec=weights.take("b_dec", (d_out,)),
            # what is not above 0 is rectified away, so a negative threshold acts as 0
            threshold=weights.take("threshold", (d_sae,)).clamp_min(0),
            W_skip=weights.take(_SKIP, (d_in, d_out)) if has_skip else None,
            pre_bias=False,
            transcoder=_transcodes(facts, has_skip or d_in != d_out, weights.where),
        )
        weights.finish()
        if facts.embedding:
            plain = plain.scale_input(d_in**-0.5)
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        sae.metadata = {"format": self.name, **facts.metadata()}
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write params.npz; see `Format.write`."""
        self.check_writable(sae)
        plain = sae.plain()
        tensors = plain.with_pre_bias(False).tensors()
        tensors.setdefault("threshold", torch.zeros(plain.d_sae))  # ReLU is JumpReLU at 0
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            np.savez(temporary / NPZ, **{n: v.numpy() for n, v in tensors.items()})  # type: ignore[arg-type]

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """The L0 in the folder's name, or in Gemma Scope 2's configuration."""
        del sae
        found = re.fullmatch(r"average_l0_(\d{1,6})", folder.name)
        if found and int(found[1]):
            return Claim(l0=float(found[1]), source=f"the folder's name, {folder.name}")
        given = _config(folder)
        stated = given.number("l0", low=0) if "l0" in given else None
        return Claim(l0=stated, source=f"its {CONFIG}") if stated else None


def _transcodes(facts: Facts, shaped: bool, where: str) -> bool:
    """Whether it is a transcoder: as the files say, else as the release's names do, else by shape.

    Args: shaped is whether its tensors can only be a transcoder's.
    """
    if shaped and facts.transcodes is False:
        raise ArtefactError(
            "its tensors are a transcoder's, and it is said to be a plain SAE", where=where
        )
    return shaped if facts.transcodes is None else facts.transcodes


def _skip_agrees(given: Given, weights: Weights) -> bool:
    """Whether there is a skip connection, as config.json says if it says anything."""
    stated = given.flag("affine_connection") if "affine_connection" in given else None
    if stated is not None and stated != (_SKIP in weights):
        raise ArtefactError(
            f"{CONFIG} and the weights differ in whether there is an affine connection",
            where=weights.where,
            given=stated,
        )
    return _SKIP in weights


def _config(folder: Path) -> Given:
    path = folder / CONFIG
    given = Given.read(path) if path.is_file() else Given({}, str(path))
    kind_of_config(given)
    return given


def _weights(folder: Path) -> Weights:
    path = folder / NPZ
    found = Weights.npz(path) if path.is_file() else Weights.safetensors(folder / SAFETENSORS)
    lower = {name: f"W_{name[2:]}" for name in found.left if name.startswith("w_")}
    found.rename(lower)
    return found
