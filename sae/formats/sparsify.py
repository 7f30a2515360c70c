"""sparsify (EleutherAI): cfg.json and sae.safetensors, in a folder named after the hookpoint.

encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_out] (a feature a row: it is not to be
transposed), b_dec, and W_skip [d_out, d_in]. f = the k largest of
ReLU((x - b_dec) encoder.weight^T + encoder.bias); transcoders do not subtract b_dec.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from sae.base import SparseAutoencoder
from sae.formats import register
from sae.formats._format import Format
from sae.formats._ours import TOPK, TRANSCODERS, plain_of, sae_of
from sae.formats._plain import PlainSAE
from sae.formats._weights import Weights
from saescope.artefact import atomic_path, read_json, write_json
from saescope.errors import ArtefactError, InputError

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
_KNOWN = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
    "skip_connection", "transcode", "d_in", "signed",
    "embed_skip", "gram_lookup", "lookup_max_order", "gram_table_hash",
}  # fmt: skip


@register
class Sparsify(Format):
    """The folder of one hookpoint."""

    name: ClassVar[str] = "sparsify"
    files: ClassVar[tuple[str, ...]] = (CONFIG, WEIGHTS)
    writes: ClassVar[tuple[str, ...]] = (*TOPK, "abstopk", *TRANSCODERS)

    @torch.no_grad()
    def read(self, folder: Path, *, input_scale: float | None = None) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        given = _config(folder / CONFIG)
        weights = Weights.safetensors(folder / WEIGHTS)
        d_in, transcoder = int(given["d_in"]), bool(given.get("transcode", False))
        d_sae = int(given.get("num_latents") or d_in * int(given["expansion_factor"]))
        d_out = weights.shape("b_dec")[0]
        skip = weights.take("W_skip", (d_out, d_in)).T if "W_skip" in weights else None
        plain = PlainSAE(
            activation="abstopk" if given.get("signed") else "topk",
            k=int(given["k"]),
            W_enc=weights.take("encoder.weight", (d_sae, d_in)).T,
            b_enc=weights.take("encoder.bias", (d_sae,)),
            W_dec=weights.take("W_dec", (d_sae, d_out)),
            b_dec=weights.take("b_dec", (d_out,)),
            W_skip=skip,
            pre_bias=not transcoder,
            # a skip connection makes it one of ours that has a place for it
            transcoder=transcoder or skip is not None,
        )
        weights.finish()
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        sae.metadata = {"format": self.name, "hookpoint": folder.name}
        layer = re.search(r"layers?[._](\d+)$", folder.name)
        if layer:
            sae.metadata["site"] = f"blocks.{layer[1]}.hook_resid_post"
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write cfg.json and sae.safetensors; see `Format.write`."""
        self.check_writable(sae)
        plain = plain_of(sae)
        if plain.activation not in ("topk", "abstopk"):
            raise InputError(
                "cannot hold this activation", where=self.name, given=plain.activation,
                allowed=("topk", "abstopk"),
            )  # fmt: skip
        t = plain.with_pre_bias(not plain.transcoder).tensors()
        tensors = {
            "encoder.weight": t["W_enc"].T.contiguous(),
            "encoder.bias": t["b_enc"],
            "W_dec": t["W_dec"],
            "b_dec": t["b_dec"],
        }
        if plain.W_skip is not None:
            tensors["W_skip"] = t["W_skip"].T.contiguous()
        norm = plain.W_dec.norm(dim=1)
        config: dict[str, Any] = {
            "activation": "topk",
            "expansion_factor": max(1, plain.d_sae // plain.d_in),
            "normalize_decoder": bool(torch.allclose(norm, torch.ones_like(norm), atol=1e-4)),
            "num_latents": plain.d_sae,
            "k": plain.k,
            "multi_topk": False,
            "skip_connection": plain.W_skip is not None,
            "transcode": plain.transcoder,
            "d_in": plain.d_in,
        }
        if plain.activation == "abstopk":
            config["signed"] = True
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / WEIGHTS)
            write_json(temporary / CONFIG, config)


def _config(path: Path) -> dict[str, Any]:
    given = read_json(path)
    if not isinstance(given, dict):
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    for name in ("d_in", "k"):
        if name not in given:
            raise ArtefactError(f"{name!r} is missing", where=str(path))
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise InputError(
            "keys that this reader does not know, so the SAE might be another", where=str(path),
            given=unknown, allowed=sorted(_KNOWN),
        )  # fmt: skip
    for name in ("embed_skip", "gram_lookup"):
        if given.get(name):
            raise InputError(
                "reads more than its hookpoint's activations", where=str(path), given=name
            )
    if given.get("activation", "topk") != "topk":
        raise InputError(
            "an activation function that saescope has not", where=str(path),
            given=given["activation"], allowed="topk",
        )  # fmt: skip
    return given
