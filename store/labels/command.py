"""`saescope label`: explain a store's features, and save the explanations with their scores."""

from dataclasses import dataclass

from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import Progress, say
from saescope.system import system_errors
from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.labels.explanations import METHODS
from store.labels.label import Labeller, LabelSettings, label_features, summary
from store.selection import choose_features


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Config):
    """Label the features of a store."""

    store: str
    """A store's file or folder."""
    features: str | None = None
    """Numbers and ranges, as 3,17,100-120; without these and without a list, all live features."""
    list: str | None = None
    """A list of people's, as favourites, instead of numbers."""
    methods: tuple[str, ...] = METHODS
    """token (tokens it fires on), ngram (runs of tokens it fires at the end of), topic (words of
    documents' titles), logit (tokens it makes likelier)."""
    windows: int = 50
    """Windows of each kind, active and silent, that a label is scored on; twice as many make it."""
    window: int = 32
    """Tokens of a window."""
    seed: int = 0
    """Decides which windows are drawn, and which documents are held out."""
    replace: bool = False
    """Make anew labels that were made with the same settings."""

    def __post_init__(self) -> None:
        wrong = [method for method in self.methods if method not in METHODS]
        if wrong or not self.methods:
            raise InputError("no such method", where="methods", given=wrong, allowed=METHODS)
        check_range("windows", self.windows, low=10)
        check_range("window", self.window, low=1)
        check_range("seed", self.seed, low=0)


@system_errors()
def label(config: LabelConfig) -> None:
    """Label features; people's labels stay as they are.

    Raises InputError for a wrong choice of features, ArtefactError where labels cannot be saved.
    What is done when it is interrupted is kept, and the same command goes on.
    """
    with FeatureStore.open(local(config.store)) as store, _notes(store) as notes:
        features = choose_features(store, notes, config.features, config.list)
        settings = LabelSettings(
            methods=config.methods, windows=config.windows, window=config.window, seed=config.seed
        )
        labeller = Labeller(store, settings)
        with Progress("labelling", len(features), "features") as progress:
            for count in label_features(labeller, notes, features, replace=config.replace):
                progress.advance(count)
        labels = notes.machine_labels(features)
    say("method  labels  balanced accuracy  AUC   shuffled labels  top token")
    for row in summary(labels, config.methods):
        say(
            f"{row['method']:<6}  {row['labels']:>6,}  {row['score']:>17.3f}  {row['auc']:.3f}"
            f"  {row['shuffled']:>14.3f}  {row['top_token']:>9.3f}"
        )
    say(f"{notes.path}: saved (people's labels are as they were)")


def _notes(store: FeatureStore) -> Annotations:
    return Annotations.open(store.path, sae_hash=str(store.meta.get("sae_hash") or ""))
