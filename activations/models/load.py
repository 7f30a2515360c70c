"""Load a model of any kind, by name or folder."""

from typing import Any, overload

import torch

from activations.models.base import HarvestModel
from activations.models.config import DenoisingConfig, ModelConfig
from activations.models.devices import DTYPES, SPREAD, device_of, one_device, resolve_dtype
from activations.models.files import folder_of
from activations.models.foreign_code import hash_of_code, loading
from activations.models.language import Model
from activations.models.matmul_precision import faster_products
from activations.models.packaged import PACKAGED_MODELS
from activations.models.tokenizer import tokenizer_of
from saescope.errors import InputError

_PLAIN = DenoisingConfig()


@overload
def load_model(
    spec: str,
    *,
    dtype: str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
) -> Model: ...


@overload
def load_model(
    spec: str,
    *,
    dtype: str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    kind: str,
    diffusion: DenoisingConfig = ...,
) -> HarvestModel: ...


def load_model(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: str = "language",
    diffusion: DenoisingConfig = _PLAIN,
) -> HarvestModel:
    """Load a causal language model and its tokenizer, or a model of another kind.

    `spec` is a packaged model ("smollm2-135m", needs no hub), a local Hugging Face folder, or a hub
    name such as "gpt2" or "google/gemma-2-2b". dtype "auto" is the faster of float32 and bfloat16
    by a short measurement on the CPU, bfloat16 on CUDA. device "auto", "balanced" or "sequential"
    spreads a language model over the devices there are, as accelerate's device_map does.
    Code that comes with a model is run with trust_remote_code alone.

    Raises InputError if there is no such model, device or precision, or if it needs code of its own
    and that is not trusted.

    >>> model = load_model("smollm2-135m")  # doctest: +SKIP
    >>> model.generate("The capital of France is", max_new_tokens=2)  # doctest: +SKIP
    'The capital of France is Paris.'
    """
    ModelConfig(
        spec=spec, kind=kind, dtype=dtype, device=device, revision=revision, diffusion=diffusion
    )
    if PACKAGED_MODELS.get(spec, kind) != kind:
        raise InputError(
            f"{spec} is a model of another kind",
            where="model.kind",
            given=kind,
            allowed=PACKAGED_MODELS[spec],
        )
    precision = DTYPES[resolve_dtype(dtype, device_of(device))]
    if kind == "language":
        model: HarvestModel = _language_model(spec, revision, precision, device, trust_remote_code)
    else:
        where = one_device(kind, device)
        model = _other_model(
            kind, spec, revision, precision, where, diffusion, trusted=trust_remote_code
        )
    model.code_hash = hash_of_code(model.folder) if trust_remote_code else None
    model.products = faster_products(model.dtype, model.device)
    return model


def _language_model(
    spec: str, revision: str | None, dtype: torch.dtype, device: str, trusted: bool
) -> Model:
    folder, commit = folder_of(spec, revision, with_code=trusted)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spread = {"device_map": device} if device in SPREAD else {}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusted}
    with loading(spec, folder, "causal language model", trusted=trusted):
        hf: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, weights_only=True, **spread, **local
        )
        tokenizer = tokenizer_of(folder, lambda: AutoTokenizer.from_pretrained(folder, **local))
    hf.requires_grad_(requires_grad=False)
    hf = hf.eval() if spread else hf.to(device_of(device)).eval()
    return Model(hf, tokenizer, spec=spec, folder=folder, revision=commit)


def _other_model(
    kind: str,
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    denoising: DenoisingConfig,
    *,
    trusted: bool,
) -> HarvestModel:
    # each of these needs packages that the others do not
    if kind == "text_encoder":
        from activations.models.text_encoder import load_text_encoder

        return load_text_encoder(spec, revision, dtype, device, trusted=trusted)
    if kind == "vision":
        from activations.models.vision import load_vision_model

        return load_vision_model(spec, revision, dtype, device, trusted=trusted)
    from activations.models.diffusion import load_diffusion_model

    return load_diffusion_model(spec, revision, dtype, device, denoising, trusted=trusted)
