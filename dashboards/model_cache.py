"""The model and the SAE that a store was made with, loaded when a reader first types a text.

The store says which they are, but may come from a stranger: `dashboards.find_stores` decides
whether they may be loaded, and both must have the weights that the store was made with.
"""

import itertools
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from dashboards import find_stores
from saescope.errors import ArtefactError, InputError

if TYPE_CHECKING:
    import numpy as np

    from sae import Attribution, DoseResponse, TextFeatures
    from sae.steering.positions import Positions
    from store import FeatureStore

# hooks are on the one model that all sessions share, so one text at a time
_LOCK = threading.Lock()


@dataclass(frozen=True)
class StoreOrigin:
    """The model and SAE of a store: where they are loaded from, and the hashes they must have."""

    model_spec: str
    sae_path: str
    site: str
    model_hash: str
    sae_hash: str
    revision: str | None
    target_site: str | None
    other_model: bool
    """whether the store was made on purpose with a model that the SAE was not trained on"""
    store: str


@dataclass(frozen=True)
class LoadedPair:
    """A store's model and SAE; `site` is where to use the SAE, None if the SAE itself says it."""

    model: Any
    sae: Any
    site: str | None


def origin_of(store: "FeatureStore") -> StoreOrigin:
    """The model and SAE of a store.

    Raises ArtefactError if the store does not say which model and SAE it was made with, or they may
    not be loaded (see `find_stores.source_to_load`).
    """
    meta, where = store.meta, str(store.path)
    wanted = ("model_spec", "sae_path", "site", "model_hash", "sae_hash")
    if not all(isinstance(meta.get(name), str) and meta[name] for name in wanted) or not all(
        isinstance(meta.get(name), str | None) for name in ("model_revision", "target_site")
    ):
        raise ArtefactError("does not say which model and SAE made it", where=where)
    return StoreOrigin(
        model_spec=find_stores.source_to_load("model", meta["model_spec"], where),
        sae_path=find_stores.source_to_load("sae", meta["sae_path"], where),
        revision=meta.get("model_revision"),
        target_site=meta.get("target_site"),
        other_model=meta.get("allow_other_model") is True,
        store=where,
        **{name: meta[name] for name in ("site", "model_hash", "sae_hash")},
    )


# two precisions of one model at most: as features are read, and as `saescope steer` runs it
@st.cache_resource(max_entries=2, show_spinner="Loading the model, once: 10 to 60 seconds …")
def _model(spec: str, revision: str | None, wanted_hash: str, dtype: str) -> Any:
    import activations

    model = activations.load_model(spec, dtype=dtype, revision=revision)
    if model.weights_hash != wanted_hash:
        raise ArtefactError(
            "this is not the model that the store was made with: its weights are others",
            where=spec,
        )
    return model


@st.cache_resource(max_entries=8, show_spinner="Loading the SAE, once: a few seconds …")
def _sae(what: StoreOrigin) -> Any:
    import sae
    from sae.data.provenance import check_indexed

    loaded = sae.load(what.sae_path, target_site=what.target_site)
    check_indexed(loaded, vars(what), where=what.store)
    return loaded


@st.cache_resource(max_entries=2, show_spinner=False)
def load(what: StoreOrigin, dtype: str = "float32") -> LoadedPair:
    """Load both, which takes seconds: torch and transformers are imported.

    Args: dtype "auto" is the precision that `saescope steer` chooses.

    Raises ArtefactError if one of them is not what the store was made with.
    """
    loaded = _sae(what)
    if dtype == "auto":
        from activations.models.devices import device_of, resolve_dtype

        dtype = resolve_dtype("auto", device_of("cpu"))
    site = None if loaded.transcodes or loaded.concatenates else what.site
    return LoadedPair(_model(what.model_spec, what.revision, what.model_hash, dtype), loaded, site)


def forget_all() -> None:
    """Drop every model and SAE that is loaded."""
    load.clear()
    _model.clear()
    _sae.clear()


def features_of_text(store: "FeatureStore", text: str) -> "TextFeatures":
    """The features that fire on each token of a text.

    Raises ArtefactError if the store's model and SAE may not be loaded, or have other weights by
    now; InputError if the text is empty or too long.
    """
    import sae
    from sae.indexing.ends import by_ends

    what = origin_of(store)
    with _LOCK:
        pair = load(what)
        found = sae.features_of_text(
            pair.model, pair.sae, text, site=pair.site, allow_other_model=what.other_model
        )
        return by_ends(found, pair.sae.d_sae) if pair.sae.signed else found


def loss_effects(store: "FeatureStore", found: "TextFeatures") -> "np.ndarray":
    """How much the next token's loss would rise without each entry of `features_of_text`.

    To first order, in nats, float32 [entries]; see `sae.steering.loss_effects`.

    Raises InputError for a crosscoder or a long text, and ArtefactError as `features_of_text` does.
    """
    from sae.indexing.ends import of_both_ends
    from sae.steering.loss_effects import loss_effects as effects

    what = origin_of(store)
    with _LOCK:
        pair = load(what)
        own = of_both_ends(found, pair.sae.d_sae) if pair.sae.signed else found
        return effects(
            pair.model, pair.sae, own, site=pair.site, allow_other_model=what.other_model
        )


def attribution(
    store: "FeatureStore", feature: int, token_ids: Sequence[int], position: int | None
) -> "Attribution":
    """What a feature's pre-activation at a position of a text is the sum of; see `sae.attribute`.

    Args: feature is the store's: of a signed SAE one end, whose pre-activation has its own sign.

    Raises InputError as `sae.attribute` does, and ArtefactError as `features_of_text` does.
    """
    import sae
    from sae.indexing.ends import feature_and_sign

    what = origin_of(store)
    with _LOCK:
        pair = load(what)
        own, sign = feature_and_sign(feature, pair.sae.d_sae if pair.sae.signed else None)
        found = sae.attribute(
            pair.model,
            pair.sae,
            token_ids,
            own,
            position,
            site=pair.site,
            allow_other_model=what.other_model,
        )
    return found if sign > 0 else found.negated()


def dose_response(
    store: "FeatureStore", feature: int, factors: Sequence[float], *, texts: int, new_tokens: int
) -> "DoseResponse":
    """The dose-response of a feature on held-out text of the store (`sae.commands.dose`).

    Raises InputError for a crosscoder or a feature that is never active, and ArtefactError as
    `features_of_text` does.
    """
    from sae.commands.dose import DoseRequest, dose_of

    what = origin_of(store)
    asked = DoseRequest(feature=feature, factors=tuple(factors), texts=texts, new_tokens=new_tokens)
    with _LOCK:
        pair = load(what, "auto")
        return dose_of(
            pair.model,
            pair.sae,
            store,
            asked,
            site=pair.site,
            allow_other_model=what.other_model,
        )


def chat_text(store: "FeatureStore", messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as the model's chat template writes it, up to where its answer begins.

    Raises InputError if the model has no template or it refuses the conversation, and ArtefactError
    as `features_of_text` does.
    """
    what = origin_of(store)
    with _LOCK:
        return load(what).model.codec.render_chat(messages, with_answer_begun=True)


@dataclass(frozen=True)
class SteeredText:
    """A prompt and its continuation, token by token."""

    tokens: list[str]
    """texts; joined, they are the whole"""
    prompt: int
    """how many of them are the prompt's"""
    edited: list[bool]
    """whether the edit was made at a token's position"""


_OTHER_BOUND = {"at_least": "at_most", "at_most": "at_least"}


def _of_the_sae(edits: Mapping[str, Any], sae: Any) -> dict[str, Any]:
    """Edits of a store's features as edits of the SAE's: of a signed one a feature is an end.

    Raises InputError if both ends of a feature are edited.
    """
    from sae.indexing.ends import feature_and_sign

    if not sae.signed:
        return dict(edits)
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for kind, features in edits.items():
        for number in features:
            feature, sign = feature_and_sign(number, sae.d_sae)
            if feature in seen:
                raise InputError("both ends are edited", where="steer", given=f"feature {feature}")
            seen.add(feature)
            if kind == "ablate":
                found.setdefault(kind, []).append(feature)
                continue
            if kind == "cap" and sign < 0:
                raise InputError(
                    "only a feature's positive end can be capped", where="steer", given=number
                )
            name = _OTHER_BOUND.get(kind, kind) if sign < 0 else kind
            value = features[number] * (1 if kind in ("scale", "project") else sign)
            found.setdefault(name, {})[feature] = value
    return found


def continuations(
    store: "FeatureStore",
    prompt: str | Sequence[Mapping[str, str]],
    edits: Mapping[str, Any],
    options: Mapping[str, Any],
    positions: "Positions" = "kept",
) -> Generator[SteeredText, None, None]:
    """A prompt's continuation, again with each token that comes: what `saescope steer` prints.

    Args: prompt is a text, or the messages of a chat; edits are the arguments of `sae.steer` (none:
    the untouched model), options those of the model's `stream_ids`, positions those that are edited
    (of a chat, a role's too).

    Raises what `sae.steer` and the model raise, and ArtefactError as `features_of_text` does.
    """
    import torch

    import activations
    import sae
    from activations.sites.kept import TokenPositions
    from sae.steering.positions import selector

    what = origin_of(store)
    with _LOCK:
        pair = load(what, "auto")
        model = pair.model
        chat = None if isinstance(prompt, str) else activations.chat_tokens(model, prompt)
        ids = list(chat.ids) if chat else model.tokenize(prompt)
        count, limit = len(ids), int(options["max_new_tokens"])
        own = _of_the_sae(edits, pair.sae)
        wanted = selector(positions, chat)

        def shown(last: int) -> SteeredText:
            tokens = torch.tensor([ids])
            at = TokenPositions(
                torch.arange(len(ids))[None], tokens, model.special_token_ids, lengths=count
            )
            edited = [chosen and n < last for n, chosen in enumerate(wanted(at)[0].tolist())]
            return SteeredText(model.token_strings(ids), count, edited)

        with sae.steer(
            model,
            pair.sae,
            **own,
            positions=positions,
            chat=chat,
            site=pair.site,
            allow_other_model=what.other_model,
        ):
            for token in itertools.chain([None], model.stream_ids(ids, **options)):
                ids += [] if token is None else [token]
                # what is chosen last has not been through the model, unless an end came after it
                yield shown(len(ids) - 1)
            if len(ids) < count + limit:
                yield shown(len(ids))
