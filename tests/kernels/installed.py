"""What an installed saescope computes with, as JSON on standard output; run where it is installed.

`python installed.py` fails unless all libraries are prebuilt ones, `python installed.py any` does
not mind. A wheel's build tests the wheel with it.
"""

import json
import sys
from pathlib import Path

import torch

from activations.loading import gather
from sae import kernels
from sae.kernels import cpp_library
from store import counting

_ROWS, _FEATURES, _D, _K = 256, 2048, 128, 8


def computed() -> dict[str, list[float]]:
    """Encoded and decoded rows: sums are exact in whatever order, and no two features are equal."""
    generator = torch.Generator().manual_seed(0)
    x, W = (
        torch.randint(-3, 4, (rows, _D), generator=generator).float() for rows in (_ROWS, _FEATURES)
    )
    index, value = kernels.encode_topk(x, W, torch.arange(_FEATURES) / _FEATURES, _K)
    index, order = index.sort(1)
    value = value.gather(1, order)
    row_ptr = torch.arange(0, _ROWS * _K + 1, _K)
    decoded = kernels.decode(row_ptr, index.flatten(), value.flatten(), W)
    named = {"index": index, "value": value, "decoded": decoded[:, :4]}
    return {name: tensor.flatten().tolist() for name, tensor in named.items()}


def main(only_prebuilt: bool) -> int:
    """Exit status: 1 if a library is not one of the wheel."""
    libraries = (cpp_library.library(), gather.library(), counting.library())
    paths = [None if each is None else each._name for each in libraries]
    with kernels.using("cpu"):
        said = {
            "backend": kernels.backend(),
            "libraries": paths,
            "runtimes": len(cpp_library._openmp_runtimes()),
            **computed(),
        }
    print(json.dumps(said))  # noqa: T201
    prebuilt = [path is not None and Path(path).parent.name == "prebuilt" for path in paths]
    return int(only_prebuilt and not all(prebuilt))


if __name__ == "__main__":
    raise SystemExit(main(only_prebuilt=sys.argv[1:] != ["any"]))
