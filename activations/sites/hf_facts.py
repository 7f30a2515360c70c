"""Facts about a model of transformers that its architectures name differently."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_MULTIPLIED = ("logit_scale", "lm_head_multiplier")
_DIVIDED = ("logits_scaling",)


def longest_text(module: Any) -> int | None:
    """The most tokens of a text; None where the model sets no limit (recurrent ones, ALiBi's).

    Some embed position p at row p + padding_idx + 1 of their table, which leaves fewer than it has
    rows: RoBERTa's 514 are 512.
    """
    config = module.config.get_text_config()
    given = [getattr(config, name, None) for name in _LIMITS]
    limits = [int(each) for each in given if isinstance(each, int) and each > 0][:1]
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name.rpartition(".")[2]:
            offset = 0 if table.padding_idx is None else table.padding_idx + 1
            limits += [table.num_embeddings - offset] if offset else []
    return min(limits, default=None)


def d_vocab(hf: Any) -> int:
    """How many tokens a language model tells apart in its logits."""
    table = hf.get_output_embeddings() or hf.get_input_embeddings()
    return int(table.weight.shape[0])


def final_norm(hf: Any, adapter: Any) -> nn.Module | None:
    """The norm between the last block and the logits, if there is one."""
    component = adapter.get_component_mapping().get("ln_final")
    try:
        return None if component is None else hf.get_submodule(component.name)
    except AttributeError:
        return None


def projection_out(hf: Any) -> nn.Linear | None:
    """What brings a stream to the embeddings' width, where that is another (OPT-350m)."""
    found = [m for name, m in hf.named_modules() if name.rpartition(".")[2] == "project_out"]
    return found[0] if found and isinstance(found[0], nn.Linear) else None


def logits_factor(hf: Any) -> float:
    """What a model multiplies its logits by, behind the unembedding."""
    config = hf.config.get_text_config()
    factor = 1.0
    for name in _MULTIPLIED:
        factor *= float(getattr(config, name, None) or 1.0)
    for name in _DIVIDED:
        factor /= float(getattr(config, name, None) or 1.0)
    return factor


def unembedding_matrix(hf: Any) -> Float[Tensor, "d_model d_vocab"]:
    """All that is linear between the last norm and the logits, without a bias, in float32."""
    table = hf.get_output_embeddings() or hf.get_input_embeddings()
    w_u = table.weight.detach().float().T
    inner = projection_out(hf)
    if inner is not None:
        w_u = inner.weight.detach().float().T @ w_u
    factor = logits_factor(hf)
    return w_u if factor == 1 else torch.mul(w_u, factor)
