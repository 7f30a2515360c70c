"""Drawing a world's rows in C++, with all of torch's threads (`sae/kernels/synthetic.cpp`)."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels import cpp_library
from sae.kernels.codes import SparseCodes
from sae.synthetic.philox import Key
from sae.synthetic.world import Tops, World

_LANES = 16
_USUAL = 96
"""features on a row that there is room for at first"""


class _Task(ctypes.Structure):
    """`Task` of the C++: a world, which rows to draw, and where to write them."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "top",
                "top_slope",
                "top_offset",
                "slope",
                "offset",
                "mean",
                "deviation",
                "first_child",
                "children",
                "directions",
                "bias",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "slots",
                "rank",
                "stride",
                "d",
                "depth",
                "exclusive",
                "scaled",
                "key",
                "first",
                "rows",
                "room",
                "threads",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("x", "counts", "index", "value")),
    )


class CppDrawing:
    """A world as the C++ reads it."""

    @staticmethod
    def usable() -> bool:
        """Whether the library is there."""
        return cpp_library.library() is not None

    def __init__(self, world: World, key: Key) -> None:
        config, trees = world.config, world.trees
        self._config, self._key = config, key[0] | key[1] << 32
        rank = config.correlation_rank
        tops = Tops.of(world)
        self._tensors = {
            "top": tops.feature.int(),
            "top_slope": tops.slope.T.contiguous(),
            "top_offset": tops.offset,
            "slope": functional.pad(world.slope, (0, -rank % _LANES)),
            "offset": world.offset,
            "mean": world.mean,
            "deviation": world.deviation,
            "first_child": trees.first_child.int(),
            "children": trees.children.int(),
            "directions": world.directions.contiguous(),
            "bias": world.bias,
        }

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [count, d_in]."""
        x = torch.empty(count, self._config.d_in)
        self._call(first, count, x=x)
        return x

    def with_codes(self, first: int, count: int) -> tuple[Tensor, SparseCodes]:
        """Rows [count, d_in] and the features that fire on each."""
        x, room = torch.empty(count, self._config.d_in), _USUAL
        while True:
            counts = torch.empty(count, dtype=torch.int64)
            index = torch.empty(count, room, dtype=torch.int64)
            value = torch.empty(count, room)
            self._call(first, count, x=x, counts=counts, index=index, value=value)
            most = int(counts.max()) if count else 0
            if most <= room:
                break
            room = most
        kept = torch.arange(room) < counts[:, None]
        row_ptr = functional.pad(counts.cumsum(0), (1, 0))
        return x, SparseCodes(row_ptr, index[kept], value[kept], self._config.features)

    def _call(self, first: int, count: int, **out: Tensor) -> None:
        library, config = cpp_library.library(), self._config
        assert library is not None, "called without `usable`"
        pointers = {**self._tensors, **out}
        task = _Task(
            **{name: cpp_library.pointer(value).value for name, value in pointers.items()},
            slots=len(self._tensors["top"]),
            rank=config.correlation_rank,
            stride=self._tensors["slope"].shape[1],
            d=config.d_in,
            depth=config.depth,
            exclusive=config.exclusive,
            scaled=config.scale_children,
            key=ctypes.c_int64(self._key).value,
            first=first,
            rows=count,
            room=out["index"].shape[1] if "index" in out else 0,
            threads=torch.get_num_threads(),
        )
        function = library.saescope_draw_synthetic
        function.argtypes, function.restype = [ctypes.POINTER(_Task)], None
        function(ctypes.byref(task))
