"""A check that training can have gradients: inference mode cannot be left from inside."""

import torch

from saescope.errors import InputError


def check_trainable(where: str) -> None:
    """Raise InputError inside `torch.inference_mode()`, whose tensors never have gradients.

    `torch.set_grad_enabled(False)` and `torch.no_grad()` are no obstacle: see `torch.enable_grad`.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "nothing can be trained inside torch.inference_mode()",
            where=where,
            allowed="the same outside of it; torch.no_grad() does no harm",
        )
