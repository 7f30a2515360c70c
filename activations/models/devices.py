"""Devices and precisions: what a configuration may name, and what that is on this machine."""

import torch

from activations.models.matmul_precision import faster_precision
from saescope.errors import InputError
from saescope.process_rank import this_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SPREAD = ("auto", "balanced", "sequential")
"""Ways of accelerate's device_map to spread a model over what the machine has."""


def device_of(device: str) -> torch.device:
    """The device of this name; of a model that is spread, the first.

    Raises InputError for one that does not exist or that this machine does not have.
    """
    if device in SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            "no such device",
            where="model.device",
            given=device,
            allowed=f"cpu, cuda, cuda:N, {', '.join(SPREAD)}",
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this machine has no usable CUDA device",
            where="model.device",
            given=device,
            allowed="cpu",
        )
    return found


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The precision that "auto" stands for on this machine; any other as it is.

    CPUs differ by a factor of ten in how fast their bfloat16 is against their float32, and no flag
    tells which is faster, so a product of a small model's size is timed in both, once a machine.
    """
    if dtype != "auto":
        return dtype
    if device.type != "cpu":
        return "bfloat16"
    return faster_precision()


def one_device(kind: str, device: str) -> torch.device:
    """The device for a model that is not spread. Raises InputError."""
    if device in SPREAD:
        raise InputError(
            f"a {kind} model is not spread over devices",
            where="model.device",
            given=device,
            allowed="cpu, cuda, cuda:N",
        )
    return device_of(device)


def own_device(device: str) -> str:
    """The device of this rank: of several on a machine each takes a card, if any, in turn."""
    here = this_rank()
    if here.local_size > 1 and device in ("cuda", "auto") and torch.cuda.device_count() > 0:
        return f"cuda:{here.local % torch.cuda.device_count()}"
    return device
