"""How many sequences a forward pass may take within a budget of memory.

What a pass takes is counted by its tensors, not asked of the device: the number is the same on
every machine, and so are the batches and the rounding of their activations.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from activations.models.base import HarvestModel
from saescope.errors import InputError


class _Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, but for those that were there before."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self._users: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        old = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and id(value) not in old:
                self._note(value)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or key in self._before:
            return
        if key not in self._users:
            self._users[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


def pass_bytes(model: HarvestModel, sites: list[str], count: int, context: int) -> int:
    """Bytes that one forward pass over so many sequences takes, besides weights and inputs."""
    module, inputs = model.module, model.example(count, context)
    model.resolve(sites)  # which sites there are is found in a pass of its own
    with _Allocated([*module.parameters(), *module.buffers()]) as allocated:
        model.capture(inputs, sites)
    return allocated.peak


def fitting_batch(
    gib: float, model: HarvestModel, sites: list[str], context: int, most: int
) -> int:
    """The most sequences, up to `most`, whose forward pass takes no more than so many GiB.

    Raises InputError if not even one fits.
    """
    budget = gib * 2**30
    one, three = (pass_bytes(model, sites, n, context) for n in (1, 3))
    if one > budget:
        raise InputError(
            "not one sequence fits",
            where="batch_memory",
            given=gib,
            allowed=f"at least {one / 2**30:.3g}",
        )
    each = max(1, (three - one) / 2)
    return min(most, 1 + int((budget - one) / each))
