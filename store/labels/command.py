"""`saescope label`: explain a store's features, and save the explanations with their scores."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from saescope.cache import cache_dir
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import Progress, say
from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.labels.endpoint import LOCAL, Answer, Client, Endpoint, Usage
from store.labels.explanations import METHODS
from store.labels.label import Labeller, LabelSettings, label_features, summary
from store.labels.model_labels import ModelLabeller, estimate
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
    url: str | None = None
    """OpenAI-compatible address of a language model, as http://localhost:8080/v1, that explains and
    scores instead of the methods. Text of the store is sent there. local:MODEL runs one here, as
    local:smollm2-135m or local:FOLDER, and sends nothing."""
    model: str | None = None
    """Name of the model at that address; of local:MODEL its own if not given."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that has the key, if the address needs one."""
    dry_run: bool = False
    """Only say how many requests and tokens the model would be asked for; send nothing."""
    concurrency: int = 4
    """Requests at the same time."""
    price_in: float = 0.0
    """Price of a million tokens asked, to count the cost."""
    price_out: float = 0.0
    """Price of a million tokens answered."""
    cache: str | None = None
    """Folder that keeps the model's answers; in saescope's cache if not given."""
    replace: bool = False
    """Make anew labels that were made with the same settings."""

    def __post_init__(self) -> None:
        wrong = [method for method in self.methods if method not in METHODS]
        if wrong or not self.methods:
            raise InputError("no such method", where="methods", given=wrong, allowed=METHODS)
        check_range("windows", self.windows, low=10)
        check_range("window", self.window, low=1)
        check_range("seed", self.seed, low=0)
        check_range("concurrency", self.concurrency, low=1, high=256)
        check_range("price_in", self.price_in, low=0)
        check_range("price_out", self.price_out, low=0)
        here = self.url is not None and self.url.startswith(LOCAL)
        if here and self.url == LOCAL:
            raise InputError("names no model", where="url", given=self.url, allowed="local:MODEL")
        if (self.url is None) != (self.model is None) and not here:
            raise InputError("give --url and --model together", where="label")
        if self.dry_run and self.url is None:
            raise InputError("only a language model costs anything; give --url", where="dry_run")

    @property
    def model_name(self) -> str:
        """What the model's labels are saved under."""
        return self.model or (self.url or "").removeprefix(LOCAL)


def label_store(config: LabelConfig, here: tuple[Answer, str] | None = None) -> None:
    """Label features; people's labels stay as they are.

    here: the answers of a model that is run here, and the hash of its weights.

    Raises InputError for a wrong choice of features, ArtefactError where labels cannot be saved.
    What is done when it is interrupted is kept, and the same command goes on.
    """
    with FeatureStore.open(config.store) as store, _notes(store) as notes:
        features = choose_features(store, notes, config.features, config.list)
        settings = LabelSettings(
            methods=config.methods, windows=config.windows, window=config.window, seed=config.seed
        )
        if config.url is not None:
            methods: tuple[str, ...] = (config.model_name,)
            if not _by_model(config, store, notes, features, settings, here):
                return
        else:
            methods = config.methods
            labeller = Labeller(store, settings)
            with Progress("labelling", len(features), "features") as progress:
                for count in label_features(labeller, notes, features, replace=config.replace):
                    progress.advance(count)
        labels = notes.machine_labels(features)
    say("labels  balanced accuracy   AUC  shuffled labels  top token  method")
    for row in summary(labels, methods):
        say(
            f"{row['labels']:>6,}  {row['score']:>17.3f}  {row['auc']:.3f}"
            f"  {row['shuffled']:>14.3f}  {row['top_token']:>9.3f}  {row['method']}"
        )
    say(f"{notes.path}: saved (people's labels are as they were)")


def _by_model(
    config: LabelConfig,
    store: FeatureStore,
    notes: Annotations,
    features: Sequence[int],
    settings: LabelSettings,
    here: tuple[Answer, str] | None,
) -> bool:
    """Label with a language model, or only say what it would be asked; whether it was asked."""
    answer, weights = here or (None, "")
    endpoint = Endpoint(
        url=f"{LOCAL}{weights}" if here else config.url or "",
        model=config.model_name,
        key=os.environ.get(config.key_variable),
        price_in=config.price_in,
        price_out=config.price_out,
    )
    if config.dry_run:
        usage = estimate(store, settings, features)
        say(f"{endpoint.url} would be asked: {_said(usage, endpoint)}; nothing was sent")
        return False
    cache = local(config.cache) if config.cache else cache_dir() / "answers"
    client = Client(endpoint, cache, answer=answer)
    labeller = ModelLabeller(store, client, settings, config.concurrency)
    try:
        with Progress("labelling", len(features), "features") as progress:
            for count in labeller.run(notes, features, replace=config.replace):
                progress.advance(count, note=f"{client.usage.requests:,} requests")
    finally:
        say(f"{config.url} was asked: {_said(client.usage, endpoint)}")
    return True


def _said(usage: Usage, endpoint: Endpoint) -> str:
    priced = endpoint.price_in or endpoint.price_out
    cost = f", cost {usage.cost(endpoint):.4f}" if priced else ""
    cached = f" ({usage.cached:,} more answers were there already)" if usage.cached else ""
    tokens = f"{usage.tokens_in:,} tokens in, {usage.tokens_out:,} out"
    return f"{usage.requests:,} requests{cached}, {tokens}{cost}"


def _notes(store: FeatureStore) -> Annotations:
    return Annotations.open(store.path, sae_hash=str(store.meta.get("sae_hash") or ""))
