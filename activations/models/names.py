"""Names of models: TransformerLens' short ones, which other people's SAEs have, and the hub's."""

from functools import cache


@cache
def _hub_names() -> dict[str, str]:
    from transformer_lens.supported_models import MODEL_ALIASES

    return {alias: name for name, aliases in MODEL_ALIASES.items() for alias in aliases}


def hub_name(name: str) -> str:
    """The hub's name of a model that TransformerLens has a short name for; any other as it is.

    >>> hub_name("gpt2-small"), hub_name("gemma-2-2b"), hub_name("google/gemma-3-1b-pt")
    ('gpt2', 'google/gemma-2-2b', 'google/gemma-3-1b-pt')
    """
    return _hub_names().get(name, name)
