"""The tokens of a text that is given as words or as their numbers."""

from collections.abc import Sequence

from activations import Model
from saescope.errors import InputError
from saescope.integers import as_indices


def token_ids(model: Model, text: str | Sequence[int], *, name: str, where: str) -> list[int]:
    """Token ids of a text, which errors call `name`.

    Raises InputError at `where` for an empty one, and for a number that the model does not know.
    """
    if isinstance(text, str):
        ids = model.tokenize(text) if text else []
    else:
        ids = as_indices(text, where=name, low=0, high=model.d_vocab - 1)
    if not ids:
        raise InputError(f"the {name} is empty", where=where, given=text)
    return list(ids)
