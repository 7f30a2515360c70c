"""Directions of large worlds, kept in the cache folder: pushing them apart takes a minute and more.

Each is one file, worlds/HASH-CHECKSUM.npy: the hash of the world's configuration, the file's own
crc32c. What is read back is to the last bit what was made, on however many threads that was.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.synthetic.config import WorldConfig
from saescope.artefact import sha256_json, write_bytes
from saescope.cache import cache_dir
from saescope.config import to_dict
from saescope.errors import SaescopeError
from saescope.progress import say
from saescope.seals import crc32c_text

DEAR = 10**11
"""multiplications from which making directions costs more than reading them"""


def kept_directions(config: WorldConfig, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, [features, d_in]; where that is dear, from the cache once it is there.

    A cache that cannot be read or written costs time, and is no error.
    """
    if config.orthogonalisation_steps * config.features * config.d_in**2 < DEAR:
        return make()
    name = sha256_json(to_dict(config))[:16]
    try:
        folder = cache_dir() / "worlds"
        found = _read(folder, name)
    except (OSError, SaescopeError):
        return make()
    if found is not None and found.shape == (config.features, config.d_in):
        return found
    directions = make()
    buffer = io.BytesIO()
    np.save(buffer, directions.numpy())
    data = buffer.getvalue()
    try:
        write_bytes(folder / f"{name}-{crc32c_text(data)}.npy", data)
    except (OSError, SaescopeError) as error:
        say(f"the directions of the world are not kept, and will be made anew: {error}")
    return directions


def _read(folder: Path, name: str) -> Tensor | None:
    """The directions of the first file of this name that matches its checksum."""
    for path in sorted(folder.glob(f"{name}-*.npy")):
        data = path.read_bytes()
        if path.name == f"{name}-{crc32c_text(data)}.npy":
            return torch.from_numpy(np.load(io.BytesIO(data)))
    return None
