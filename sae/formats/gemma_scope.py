"""Gemma Scope: params.npz, or Gemma Scope 2's params.safetensors (Lieberum et al. 2024).

JumpReLU without a pre-encoder bias: f = z where z = x W_enc + b_enc > threshold. Keys W_enc [d_in,
d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold, in some files w_enc and w_dec; transcoders
may have affine_skip_connection [d_in, d_out]. Folders are named after what they hold:
gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82. Embedding SAEs read the embedding before
the model multiplies it by sqrt(d_in); they are brought to the scaled one, which a hook sees.
"""

import re
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sae.base import SparseAutoencoder
from sae.formats import register
from sae.formats._claim import Claim
from sae.formats._format import Format
from sae.formats._ours import THRESHOLDS, plain_of, sae_of
from sae.formats._plain import PlainSAE
from sae.formats._weights import Weights
from saescope.artefact import atomic_path, read_json
from saescope.errors import ArtefactError, InputError

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
CONFIG = "config.json"
_SITES = {
    "-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z",
    "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z",
}  # fmt: skip
_SKIP = "affine_skip_connection"


@register
class GemmaScope(Format):
    """The folder that Gemma Scope keeps one SAE in."""

    name: ClassVar[str] = "gemma_scope"
    files: ClassVar[tuple[str, ...]] = (NPZ,)
    further_files: ClassVar[tuple[str, ...]] = (SAFETENSORS, CONFIG)
    writes: ClassVar[tuple[str, ...]] = ("relu", *THRESHOLDS)

    def recognise(self, folder: Path) -> bool:
        """By either release's file."""
        return (folder / NPZ).is_file() or (folder / SAFETENSORS).is_file()

    @torch.no_grad()
    def read(self, folder: Path, *, input_scale: float | None = None) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        described = _config(folder)
        weights = _weights(folder)
        d_in, d_sae = weights.shape("W_enc")
        d_out = weights.shape("W_dec")[-1]
        scale = weights.take("scaling_factor", (d_sae,)) if "scaling_factor" in weights else None
        if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
            raise InputError(
                "has factors for its features, whose meaning is not published",
                where=weights.where, given="scaling_factor",
            )  # fmt: skip
        transcoder = d_in != d_out or _SKIP in weights or "transcoder" in str(folder)
        plain = PlainSAE(
            activation="jumprelu",
            W_enc=weights.take("W_enc", (d_in, d_sae)),
            W_dec=weights.take("W_dec", (d_sae, d_out)),
            b_enc=weights.take("b_enc", (d_sae,)),
            b_dec=weights.take("b_dec", (d_out,)),
            # what is not above 0 is rectified away, so a negative threshold acts as 0
            threshold=weights.take("threshold", (d_sae,)).clamp_min(0),
            W_skip=weights.take(_SKIP, (d_in, d_out)) if _SKIP in weights else None,
            pre_bias=False,
            transcoder=transcoder or "hf_hook_point_out" in described,
        )
        weights.finish()
        if "embedding" in folder.parts:
            plain = plain.scale_input(d_in**-0.5)
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        sae.metadata = {"format": self.name, **_facts(folder, described)}
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write params.npz; see `Format.write`."""
        self.check_writable(sae)
        plain = plain_of(sae)
        tensors = plain.with_pre_bias(False).tensors()
        tensors.setdefault("threshold", torch.zeros(plain.d_sae))  # ReLU is JumpReLU at 0
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            np.savez(temporary / NPZ, **{n: v.numpy() for n, v in tensors.items()})  # type: ignore[arg-type]

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """The L0 in the folder's name, or in Gemma Scope 2's configuration."""
        del sae
        found = re.search(r"average_l0_(\d+)", folder.name)
        if found:
            return Claim(l0=float(found[1]), source=f"the folder's name, {folder.name}")
        stated = _config(folder).get("l0")
        return Claim(l0=float(stated), source=f"its {CONFIG}") if stated else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    described = read_json(path) if path.is_file() else {}
    architecture = described.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise InputError(
            "an architecture that Gemma Scope's files do not have", where=str(path),
            given=architecture, allowed="jump_relu",
        )  # fmt: skip
    return described


def _weights(folder: Path) -> Weights:
    path = folder / NPZ
    if not path.is_file():
        found = Weights.safetensors(folder / SAFETENSORS)
    else:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(np.array(stored[name])) for name in stored.files}
        except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
            raise ArtefactError(f"damaged weights: {error}", where=str(path)) from error
        found = Weights(arrays, str(path))
    found.left = {
        f"W_{name[2:]}" if name.startswith("w_") else name: value
        for name, value in found.left.items()
    }
    return found


def _facts(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The site and the model, as far as names tell: .../gemma-scope-2b-pt-res/layer_12/..."""
    path = folder.as_posix()
    facts: dict[str, Any] = {}
    layer = re.search(r"layer_(\d+)", path)
    release = re.search(r"gemma-scope-(?:2-)?(\d+[bm])-(pt|it)", path)
    site = next((name for part, name in _SITES.items() if part in path), None)
    if "embedding" in folder.parts:
        facts["site"] = "hook_embed"
    elif "transcoder" in path and layer:
        before = "hook_mlp_in" if "gemma-scope-2-" in path else "ln2.hook_normalized"
        facts["site"] = f"blocks.{layer[1]}.{before}"
        facts["target_site"] = f"blocks.{layer[1]}.hook_mlp_out"
    elif layer and site:
        facts["site"] = f"blocks.{layer[1]}.{site}"
    if described.get("model_name"):
        facts["model"] = described["model_name"]
    elif release:
        generation = "3" if "gemma-scope-2-" in path else "2"
        suffix = "-it" if release[2] == "it" else ("-pt" if generation == "3" else "")
        facts["model"] = f"google/gemma-{generation}-{release[1]}{suffix}"
    for name in ("hf_hook_point_in", "hf_hook_point_out"):
        if name in described:
            facts[name] = described[name]
    return facts
