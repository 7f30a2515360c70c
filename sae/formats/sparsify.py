"""sparsify (EleutherAI): cfg.json and sae.safetensors, in a folder named after the hookpoint.

encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_out] (a feature a row: it is not to be
transposed), b_dec, and W_skip [d_out, d_in]. f = the k largest of
ReLU((x - b_dec) encoder.weight^T + encoder.bias); transcoders do not subtract b_dec.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from sae.core.base import SparseAutoencoder
from sae.core.plain import PlainSAE, Rule
from sae.formats import register
from sae.formats._format import Format, released_as
from sae.formats._given import Given
from sae.formats._ours import sae_of
from sae.formats._weights import Weights
from saescope.artefact import atomic_path, write_json
from saescope.errors import InputError

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
_KNOWN = {
    "activation",
    "expansion_factor",
    "normalize_decoder",
    "num_latents",
    "k",
    "multi_topk",
    "skip_connection",
    "transcode",
    "d_in",
    "signed",
    "embed_skip",
    "gram_lookup",
    "lookup_max_order",
    "gram_table_hash",
}
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
_HOOKPOINT = re.compile(r"(?:layers|h)\.(\d{1,3})(?:\.(mlp|self_attn|attention|attn))?")


@register
class Sparsify(Format):
    """The folder of one hookpoint."""

    name: ClassVar[str] = "sparsify"
    files: ClassVar[tuple[str, ...]] = (CONFIG, WEIGHTS)
    rules: ClassVar[tuple[Rule, ...]] = ("topk", "abstopk")
    holds_transcoders: ClassVar[bool] = True

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        given = _config(folder / CONFIG)
        weights = Weights.safetensors(folder / WEIGHTS)
        d_in, transcoder = given.count("d_in"), given.flag("transcode")
        stated = given.count("num_latents", low=0) if "num_latents" in given else 0
        d_sae = stated or d_in * given.count("expansion_factor")
        d_out = weights.vector("b_dec")
        skip = weights.take("W_skip", (d_out, d_in)).T if "W_skip" in weights else None
        plain = PlainSAE(
            activation="abstopk" if given.flag("signed") else "topk",
            k=given.count("k"),
            W_enc=weights.take("encoder.weight", (d_sae, d_in)).T,
            b_enc=weights.take("encoder.bias", (d_sae,)),
            W_dec=weights.take("W_dec", (d_sae, d_out)),
            b_dec=weights.take("b_dec", (d_out,)),
            W_skip=skip,
            # transcoders before February 2025 have no "transcode" here, and subtract it
            pre_bias=not transcoder,
            # a skip connection makes it one of ours that has such a path
            transcoder=transcoder or skip is not None,
        )
        weights.finish()
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        hookpoint = released_as(folder, released).name
        sae.metadata = {"format": self.name, "hookpoint": hookpoint}
        sae.metadata |= _sites(hookpoint, transcoder=sae.transcodes)
        if "transcode" not in given:
            sae.metadata["kind_unstated"] = True
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write cfg.json and sae.safetensors; see `Format.write`."""
        self.check_writable(sae)
        plain = sae.plain()
        if plain.activation not in self.rules:
            raise InputError(
                "cannot hold this activation",
                where=self.name,
                given=plain.activation,
                allowed=self.rules,
            )
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


def _config(path: Path) -> Given:
    given = Given.read(path)
    given.refuse_unknown(_KNOWN, sorted(_KNOWN))
    for name in ("embed_skip", "gram_lookup"):
        if given.get(name):
            raise InputError(
                "reads more than its hookpoint's activations", where=str(path), given=name
            )
    if given.get("activation", "topk") != "topk":
        raise InputError(
            "an activation function that saescope has not",
            where=str(path),
            given=given["activation"],
            allowed="topk",
        )
    return given


def _sites(hookpoint: str, *, transcoder: bool) -> dict[str, str]:
    """The sites of a hookpoint: a module of the model without its head, as sparsify names it.

    An autoencoder reads what the module gives; a transcoder reads what goes in, writes what comes
    out. A folder of another name tells nothing.
    """
    if hookpoint in _EMBEDDINGS:
        return {} if transcoder else {"site": "hook_embed"}
    found = _HOOKPOINT.fullmatch(hookpoint)
    if not found:
        return {}
    module = "mlp" if found[2] == "mlp" else "attn" if found[2] else None
    before = f"{module}.hook_in" if module else "hook_resid_pre"
    after = f"{module}.hook_out" if module else "hook_resid_post"
    block = f"blocks.{int(found[1])}"
    if transcoder:
        return {"site": f"{block}.{before}", "target_site": f"{block}.{after}"}
    return {"site": f"{block}.{after}"}
