"""Sparse autoencoders: train, evaluate, index, steer, convert.

Public names are in `__init__.pyi`; each is imported when it is first used, so that `import sae` is
instant.
"""

from saescope.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__)
