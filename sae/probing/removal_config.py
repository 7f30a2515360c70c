"""Settings of the suites that remove a concept: spurious correlations, targeted perturbation."""

from dataclasses import dataclass, replace
from typing import Self

from sae.probing.text_rows import Representation
from saescope.config import Config
from saescope.errors import InputError, check_range

AUDIT = (
    "An audit (Chanin 2026, arXiv 2605.18229) finds that this metric fails at its canonical "
    "settings and should not be used to rank SAEs; read it beside its controls and its interval."
)
"""in the help of both metrics"""
BETWEEN = "::"
NS = (2, 5, 10, 20, 50, 100, 500)
"""numbers of features of SAEBench"""


@dataclass(frozen=True, kw_only=True)
class SCRConfig(Config):
    """On which texts spurious correlation removal is measured."""

    pairs: tuple[str, ...] = ("ovos/person::ovos/language=fr", "ovos/woman::ovos/artist")
    """Two sets of labelled texts that have texts in common, with :: between them (see
    probing.sets); either attribute is the concept, and the other the spurious one."""
    ns: tuple[int, ...] = NS
    """Numbers of features that are ablated."""
    seeds: int = 5
    """Divisions into training and test texts, each with its own probes."""
    texts: int = 400
    """The most texts of each of the four combinations of labels, drawn by chance."""
    representation: Representation = "mean"
    """mean: averaged over a text's kept positions; last: the last kept position."""
    max_tokens: int = 128
    """Tokens of a text that are run, its last ones."""

    def __post_init__(self) -> None:
        for each in self.pairs:
            if len([name for name in each.split(BETWEEN) if name]) != 2:
                raise InputError(
                    "needs two sets with :: between them", where="scr.pairs", given=each
                )
        _check("scr", "pairs", self.pairs, self)

    def quick(self) -> Self:
        """A look in a minute: fewer texts and seeds."""
        return replace(self, texts=min(self.texts, 100), seeds=min(self.seeds, 3))


@dataclass(frozen=True, kw_only=True)
class TPPConfig(Config):
    """On which texts targeted probe perturbation is measured."""

    groups: tuple[str, ...] = (
        "ovos/topic=*",
        "sae-probes/27_art_type=*",
        "sae-probes/97_news_class=*",
        "sae-probes/108_athlete_sport=*",
    )
    """Patterns, each of which names the sets of several classes (see probing.sets)."""
    classes: int = 5
    """The most classes of a group, those of most texts."""
    ns: tuple[int, ...] = NS
    """Numbers of features that are ablated."""
    seeds: int = 5
    """Divisions into training and test texts, each with its own probes."""
    texts: int = 300
    """The most texts of a class, drawn by chance."""
    representation: Representation = "mean"
    """mean: averaged over a text's kept positions; last: the last kept position."""
    max_tokens: int = 128
    """Tokens of a text that are run, its last ones."""

    def __post_init__(self) -> None:
        check_range("tpp.classes", self.classes, low=2, high=20)
        _check("tpp", "groups", self.groups, self)

    def quick(self) -> Self:
        """A look in a minute: one group (or those chosen), fewer texts and seeds."""
        chosen = self.groups if self.groups != type(self)().groups else self.groups[:1]
        return replace(self, groups=chosen, texts=min(self.texts, 100), seeds=min(self.seeds, 3))


def _check(name: str, data: str, chosen: tuple[str, ...], config: SCRConfig | TPPConfig) -> None:
    if not chosen:
        raise InputError(f"no {data} are chosen", where=f"{name}.{data}")
    for each in config.ns:
        check_range(f"{name}.ns", each, low=1)
    if len(set(config.ns)) < len(config.ns) or not config.ns:
        raise InputError(
            "needs different numbers, one or more", where=f"{name}.ns", given=config.ns
        )
    check_range(f"{name}.seeds", config.seeds, low=1, high=100)
    check_range(f"{name}.texts", config.texts, low=10)
    check_range(f"{name}.max_tokens", config.max_tokens, low=2)
