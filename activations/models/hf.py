"""Helpers around transformers and TransformerLens: quiet loading, the bridge, padding."""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from activations.sites.kept import positions_of, real_tokens
from saescope.errors import InputError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and advice while it loads something of ours."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def bridge_around(hf: Any, tokenizer: Any, name: str) -> Any:
    """TransformerLens' TransformerBridge around the weights of a model of transformers."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    tensors = [*hf.parameters(), *hf.buffers()]
    # the bridge replaces submodules in place: give it modules of its own, weights shared
    modules = copy.deepcopy(hf, {id(tensor): tensor for tensor in tensors})
    return build_bridge_from_module(
        modules,
        type(hf).__name__,
        hf_config=modules.config,
        tokenizer=copy.deepcopy(tokenizer),
        model_name=name,
    )


def padding_arguments(
    module: Any, tokens: Tensor, attention_mask: Tensor | None, name: str
) -> dict[str, Tensor]:
    """How a module of transformers is told what is padding, and where each text begins.

    Raises InputError for a module that cannot be told, or a wrong mask.
    """
    if attention_mask is None:
        return {}
    real = real_tokens(tokens, attention_mask)
    if bool(real.all()):
        return {}
    takes = inspect.signature(module.forward).parameters
    if "attention_mask" not in takes:
        raise InputError("this model takes no attention mask; run one text at a time", where=name)
    found = {"attention_mask": real.long()}
    if "position_ids" in takes:
        found["position_ids"] = positions_of(real).clamp(min=0)
    return found
