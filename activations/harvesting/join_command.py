"""`saescope join`: one store of the sites of two harvests of the same text."""

from dataclasses import dataclass

from activations.harvesting.join import check_names, join
from activations.storage.reader import ActivationStore
from saescope.config import Config
from saescope.errors import InputError
from saescope.paths import local


@dataclass(frozen=True, kw_only=True)
class JoinConfig(Config):
    """Join two harvests of the same text, through two models, into one for crosscoders."""

    harvest_a: str
    """Folder of a finished harvest."""
    harvest_b: str
    """Another one, of the same corpus with the same settings, through another model."""
    out: str
    """Folder of the joined harvest; its files are hard links, which take no disk."""
    names: tuple[str, ...] = ()
    """What the sites of each are to begin with, as in base:blocks.9.hook_resid_post; the names of
    their folders if none are given."""


def run_join(config: JoinConfig) -> ActivationStore:
    """Join two harvests. Errors as of `activations.harvesting.join.join`."""
    folders = (config.harvest_a, config.harvest_b)
    names = config.names or tuple(local(folder).name for folder in folders)
    if len(names) != len(folders):
        raise InputError("one name a harvest", where="names", given=names, allowed="two names")
    check_names(list(names))
    return join(config.out, dict(zip(names, folders, strict=True)))
