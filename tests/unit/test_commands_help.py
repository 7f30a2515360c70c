"""What help says without importing torch is what there is."""

from sae.architectures import list_architectures
from saescope.commands import ARCHITECTURES


def test_help_names_the_architectures_that_there_are() -> None:
    assert sorted(" ".join(ARCHITECTURES).split()) == sorted(list_architectures())
