"""`saescope index`: encode a whole harvest with an SAE, and write a feature store."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from activations import ActivationStore, Model
from sae.commands.effects import EffectsConfig, measure_effects
from sae.core.base import kind_of
from sae.data.harvests import kind_of_model, knows_model, load_harvested_model, open_harvest
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.evaluation.written import ROWS, measured_values
from sae.formats.hub import SCHEME, evaluation_of
from sae.formats.load import load
from sae.indexing.build import build_store
from sae.indexing.encoding import Encoder, at_work, left_behind, pieces_of
from sae.indexing.ends import indexed
from sae.indexing.growth import ledger_meta, old_part
from sae.indexing.inputs import Inputs, inputs_of
from sae.indexing.layers import layer_facts
from sae.indexing.pending import Pending, decisive, other_words
from saescope.artefact import read_json, sha256_json
from saescope.config import Config, to_dict
from saescope.errors import ArtefactError, InputError, check_range
from saescope.leftovers import remove_leftovers
from saescope.paths import if_local, local
from saescope.process_rank import this_rank
from saescope.progress import say, silent
from saescope.replacing import check_apart, check_replaceable
from saescope.system import system_errors
from store import FeatureStore
from store.checking import STORE
from store.database import STORE_FILE
from store.results import BOTH_ENDS

_STARTED = time.time() - 2
"""about when this process was started, by the clocks of files"""


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Config):
    """Build the feature store of an SAE."""

    run: str
    """Folder of a trained run or of an SAE, in any known format, or its URL: s3://bucket/name,
    hf://owner/repo/folder."""
    out: str
    """Folder of the store to write; its name is the SAE's name in the explorer."""
    harvest: str | None = None
    """Folder of the harvest to encode; the one it was trained on if not given."""
    site: str | None = None
    """The layer to use an SAE of several layers at; of someone else's SAE, where it reads, if its
    files do not say."""
    target_site: str | None = None
    """Where someone else's transcoder writes, if its files do not say."""
    logits: int = 10
    """Most raised and most lowered tokens kept of each feature."""
    vocabulary: str | None = None
    """JSON list of the text of each token id, where the harvest does not know its model."""
    neighbours: int = 10
    """Nearest decoder directions kept of each feature."""
    map: bool = True
    """Lay the features out by their decoder directions, for the explorer's page Map."""
    topic_field: str = "topic"
    """Field of the corpus's records that says what a document is about, where they have one."""
    layer_tokens: int = 16_384
    """Tokens on which an SAE of several layers is measured at each of them; 0 for none."""
    allow_other_model: bool = False
    """Index a harvest of another model than the SAE was trained on."""
    pictures: int = 1000
    """Of a diffusion model: prompts that are drawn again as thumbnails, those on which features are
    strongest first; 0 for none."""
    effects: int = 0
    """Positions of each feature at which its effect on the next token is measured, as `saescope
    effects` does; 0 for none."""
    replace: bool = False
    """Build anew even if the store is there already."""
    append: bool = False
    """Add what the harvest has grown by to the store that is there, whose rows are not encoded
    again."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    def __post_init__(self) -> None:
        if self.append and self.replace:
            raise InputError("keeps what is there, and replace does not: give one", where="append")
        check_range("logits", self.logits, low=1)
        check_range("neighbours", self.neighbours, low=1)
        check_range("layer_tokens", self.layer_tokens, low=0)
        check_range("pictures", self.pictures, low=0)
        check_range("effects", self.effects, low=0)


@system_errors()
def index(config: IndexConfig) -> Path:
    """Build the feature store of an SAE; the path of its file. One that is there is left as it is.

    Several processes that torchrun has started encode together, and rank 0 makes the store. A
    build that was interrupted, or killed, goes on when it is called again: what was encoded is
    kept beside the store until that is there.

    Raises InputError if the harvest does not fit the SAE, something else is where the store is to
    be, or another index was begun there; ArtefactError if either cannot be read, the disk is full,
    or another process builds the same store.
    """
    path = local(config.out) / STORE_FILE
    check_replaceable(path, STORE, replace=True)
    check_apart(path.parent, *(if_local(each) for each in (config.run, config.harvest) if each))
    if this_rank().number == 0:
        _index(config, path)
        if config.effects:
            trusted = config.trust_remote_code
            measure_effects(
                EffectsConfig(store=str(path), positions=config.effects, trust_remote_code=trusted)
            )
        return path
    try:
        with silent():
            return _index(config, path)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # rank 0 says what there is to say


def _index(config: IndexConfig, path: Path) -> Path:
    if path.exists() and not (config.replace or config.append):
        _tidy(path)
        say(f"{path}: already built (--replace builds it anew)")
        return path
    whole = load(config.run, target_site=config.target_site)
    harvest, placement = open_harvest(
        whole,
        config.harvest,
        config.site,
        allow_other_model=config.allow_other_model,
    )
    meta = _meta(config, placement, harvest)
    old = old_part(path, harvest, meta) if config.append else None
    if old and old.is_all:
        _tidy(path)
        say(f"{path}: has all of its harvest already, {harvest.n_rows():,} rows")
        return path
    pieces = pieces_of(harvest, old.chunks if old else 0)
    cuts = [[chunk.index for chunk in piece.chunks] for piece in pieces]
    pending = Pending(path, {**decisive(meta), "pieces": sha256_json(cuts)})
    encoder = Encoder(indexed(placement.sae), placement.read, harvest, pieces, pending)
    if this_rank().number:
        with at_work(path) as team:
            if team.wait_for(lambda: _begun(path, pending, config)):
                encoder.run(team)
        return path
    model, inputs = _inputs(config, harvest)
    with at_work(path) as team:
        remove_leftovers(path)
        pending.open(replace=config.replace)
        encoder.run(team)
        rows = build_store(
            path,
            placement,
            harvest,
            model,
            meta=meta,
            inputs=inputs,
            activations=chain(old.activations() if old else (), encoder.activations()),
            logits=config.logits,
            neighbours=config.neighbours,
            with_map=config.map,
            topic_field=config.topic_field,
            layers=layer_facts(whole, placement, harvest, config.layer_tokens),
            replace=config.replace or config.append,
        )
        pending.remove()
    sae = placement.sae
    say(
        f"{path}: {sae.d_sae:,} features{' of two ends' if sae.signed else ''}, "
        f"{rows['activation_by_feature']:,} activations, "
        f"{path.stat().st_size / 1e6:,.0f} MB"
    )
    return path


def _begun(path: Path, pending: Pending, config: IndexConfig) -> bool | None:
    """Whether rank 0 has begun the store; False if it is there already, None if neither."""
    if pending.is_open():
        return True
    written = path.stat().st_mtime if path.exists() else 0.0
    if written and (not (config.replace or config.append) or written > _STARTED):
        return False
    return None


def _tidy(path: Path) -> None:
    """Remove what a build that was killed at its end left beside its finished store."""
    remove_leftovers(path)
    if this_rank().number or not left_behind(path):
        return
    with suppress(ArtefactError), at_work(path):  # else others are at work, and tidy up themselves
        with FeatureStore.open(path) as store:
            own = decisive(store.meta)
        pending = Pending(path, own)
        if other_words(pending.begun() or own, own):
            say(f"{path}: an index with --replace was begun here; the same command goes on with it")
        else:
            pending.remove()


def _inputs(config: IndexConfig, harvest: ActivationStore) -> tuple[Model | None, Inputs]:
    """The language model of a harvest, if it is of one, and what its model was given."""
    model, texts = None, None
    trusted = config.trust_remote_code
    if not knows_model(harvest):
        texts = _texts(config.vocabulary, harvest)
    elif config.vocabulary is not None:
        raise InputError(
            "the model has its own texts of tokens", where="vocabulary", given=config.vocabulary
        )
    elif kind_of_model(harvest) == "language":
        model = load_harvested_model(harvest, "float32", trust_remote_code=trusted)
    return model, inputs_of(harvest, model, texts, draws=config.pictures, trust_remote_code=trusted)


def _texts(vocabulary: str | None, harvest: ActivationStore) -> list[str]:
    """Texts of the token ids of a harvest that knows no model: as given, or their numbers."""
    count = int(harvest.manifest["model"]["d_vocab"])
    if not count:
        return [""]  # no tokens are known: all are written as 0
    if vocabulary is None:
        return [f"⟨{number}⟩" for number in range(count)]
    texts = read_json(vocabulary)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError("is no list of texts", where=vocabulary)
    if len(texts) < count:
        raise InputError(
            "has fewer texts than there are token ids",
            where=vocabulary,
            given=len(texts),
            allowed=f"at least {count}",
        )
    return texts


def _meta(config: IndexConfig, placement: Placement, harvest: ActivationStore) -> dict[str, Any]:
    sae = placement.sae
    measured = evaluation_of(config.run) or {}
    spec: str | None = harvest.manifest["model"]["spec"]
    return {
        "name": local(config.out).resolve().name,
        "model": harvest.manifest["model"]["name"],
        "model_spec": spec and _absolute(spec),
        "model_revision": harvest.manifest["model"]["revision"],
        "model_hash": harvest.manifest["model"]["weights_hash"],
        **({"allow_other_model": True} if config.allow_other_model else {}),
        "site": placement.read[0],
        **({"sites": list(placement.read)} if len(placement.read) > 1 else {}),
        **({"target_site": placement.written[0]} if placement.written != placement.read else {}),
        "architecture": kind_of(sae.config),
        "sae_config": to_dict(sae.config),
        "d_in": sae.d_in,
        **({BOTH_ENDS: sae.d_sae} if sae.signed else {}),
        "sae_path": (
            sae.metadata["source"]  # with the commit that was read
            if config.run.startswith(SCHEME)
            else _absolute(config.run)
        ),
        "sae_hash": weights_hash(sae),
        "created": _now().isoformat(timespec="seconds"),
        "harvest": harvest.hash,
        **ledger_meta(harvest),
        "harvest_path": str(harvest.path.resolve()),
        "corpus": harvest.manifest["config"]["corpus"],
        "tokens_trained": sae.metadata.get("tokens_trained"),
        "metrics": measured_values(measured),
        **({"metric_rows": measured[ROWS]} if ROWS in measured else {}),
        "protocol": measured.get("protocol_hash"),
    }


def _now() -> datetime:
    """The time, or the one of SOURCE_DATE_EPOCH: all else in a store depends on its inputs alone.

    Raises InputError if that is not a number of seconds since 1970.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        return datetime.now(UTC)
    try:
        return datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        raise InputError(
            "is not a time", where="SOURCE_DATE_EPOCH", given=given, allowed="seconds since 1970"
        ) from None


def _absolute(name: str) -> str:
    """The absolute path of what is a folder here; the name of what is in a hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
