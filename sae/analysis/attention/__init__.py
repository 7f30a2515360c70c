"""What attention SAEs see: heads by weights, sums over source tokens, induction, families.

Public names are in `__init__.pyi`; each is imported when it is first used.
"""

from saescope.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__)
