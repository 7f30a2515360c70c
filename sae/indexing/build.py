"""`saescope index`: encode a whole harvest with an SAE, and write a feature store.

Rows are encoded a chunk at a time and handed on sparse: nothing of size [tokens, d_sae] exists.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations import ActivationStore, Model
from sae.architectures.crosscoder import Crosscoder
from sae.core.base import SparseAutoencoder, kind_of
from sae.data.harvests import knows_model, load_harvested_model, open_harvest, read_chunk
from sae.data.placement import Placed
from sae.data.provenance import weights_hash
from sae.formats.hub import SCHEME, evaluation_of
from sae.formats.load import load
from saescope.artefact import read_json
from saescope.config import Config, to_dict
from saescope.errors import InputError, check_range
from saescope.leftovers import remove_leftovers
from saescope.paths import if_local, local
from saescope.progress import Progress, say
from saescope.replacing import check_apart, check_replaceable
from saescope.system import system_errors
from store import StoreWriter
from store.checking import STORE
from store.database import STORE_FILE

LARGEST_LOGIT = "largest_logit_effect"
_SEQUENCES = 4096
_FEATURES = 512


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Config):
    """Build the feature store of an SAE."""

    run: str
    """Folder of a trained run or of an SAE, in any known format, or hf://owner/repo/folder."""
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
    allow_other_model: bool = False
    """Index a harvest of another model than the SAE was trained on."""
    replace: bool = False
    """Build anew even if the store is there already."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    def __post_init__(self) -> None:
        check_range("logits", self.logits, low=1)
        check_range("neighbours", self.neighbours, low=1)


@system_errors()
def index(config: IndexConfig) -> Path:
    """Build the store; the path of its file. A store that is there already is left as it is.

    Raises InputError if the harvest does not fit the SAE, or something else is in the store's
    place; ArtefactError if either cannot be read or the disk is full; an interrupted build leaves
    nothing behind.
    """
    path = local(config.out) / STORE_FILE
    remove_leftovers(path)
    check_replaceable(path, STORE, replace=True)
    check_apart(path.parent, *(if_local(each) for each in (config.run, config.harvest) if each))
    if path.exists() and not config.replace:
        say(f"{path}: already built (--replace builds it anew)")
        return path
    harvest, place = open_harvest(
        load(config.run, target_site=config.target_site),
        config.harvest,
        config.site,
        allow_other_model=config.allow_other_model,
    )
    sae = place.sae
    if sae.signed:
        raise InputError(
            "a feature store holds activations above zero, and this SAE has negative ones",
            where=config.run,
            given=kind_of(sae.config),
        )
    model, texts = None, [""]
    if knows_model(harvest):
        trusted = config.trust_remote_code
        model = load_harvested_model(harvest, "float32", trust_remote_code=trusted)
    else:
        texts = _texts(config.vocabulary, harvest)
    if model is not None and config.vocabulary is not None:
        raise InputError(
            "the model has its own texts of tokens", where="vocabulary", given=config.vocabulary
        )
    meta = _meta(config, place, harvest)
    with (
        system_errors(str(path)),
        torch.inference_mode(),
        StoreWriter(
            path, meta=meta, d_sae=sae.d_sae, context=harvest.context, replace=config.replace
        ) as writer,
    ):
        writer.add_vocabulary(texts if model is None else model.vocabulary())
        writer.add_documents(harvest.document_table())
        _add_sequences(writer, harvest)
        _add_activations(writer, place, harvest)
        decided = _add_logits(writer, place, model, config.logits)
        writer.add_features({**_feature_columns(sae), **decided})
        _add_neighbours(writer, sae, config.neighbours)
        rows = writer.finish()
    say(
        f"{path}: {sae.d_sae:,} features, {rows['activation_by_feature']:,} activations, "
        f"{path.stat().st_size / 1e6:,.0f} MB"
    )
    return path


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


def _meta(config: IndexConfig, place: Placed, harvest: ActivationStore) -> dict[str, Any]:
    sae = place.sae
    measured = evaluation_of(config.run) or {}
    spec: str | None = harvest.manifest["model"]["spec"]
    metrics = {**(measured.get("reconstruction") or {}), **(measured.get("downstream") or {})}
    return {
        "name": local(config.out).resolve().name,
        "model": harvest.manifest["model"]["name"],
        "model_spec": spec and _absolute(spec),
        "model_revision": harvest.manifest["model"]["revision"],
        "model_hash": harvest.manifest["model"]["weights_hash"],
        **({"allow_other_model": True} if config.allow_other_model else {}),
        "site": place.read[0],
        **({"sites": list(place.read)} if len(place.read) > 1 else {}),
        **({"target_site": place.written[0]} if place.written != place.read else {}),
        "architecture": kind_of(sae.config),
        "sae_config": to_dict(sae.config),
        "d_in": sae.d_in,
        "sae_path": (
            sae.metadata["source"]  # with the commit that was read
            if config.run.startswith(SCHEME)
            else _absolute(config.run)
        ),
        "sae_hash": weights_hash(sae),
        "created": _now().isoformat(timespec="seconds"),
        "harvest": harvest.hash,
        "harvest_path": str(harvest.path.resolve()),
        "corpus": harvest.manifest["config"]["corpus"],
        "tokens_trained": sae.metadata.get("tokens_trained"),
        "metrics": metrics,
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


def _add_sequences(writer: StoreWriter, harvest: ActivationStore) -> None:
    for first in range(0, harvest.n_sequences, _SEQUENCES):
        part = slice(first, min(first + _SEQUENCES, harvest.n_sequences))
        writer.add_sequences(
            first,
            harvest.tokens[part],
            harvest.document[part],
            harvest.keep[part],
            harvest.split[part],
        )


def _add_activations(writer: StoreWriter, place: Placed, harvest: ActivationStore) -> None:
    chunks = [*harvest.chunks("train"), *harvest.chunks("held_out")]
    with Progress("encoding", sum(chunk.rows for chunk in chunks), "tokens") as progress:
        for chunk in chunks:
            x, row_token = read_chunk(harvest, place.read, chunk)
            codes = place.sae.encode_sparse(x).compact()
            position = row_token[codes.rows()]
            writer.add_activations(
                position.numpy(), codes.index.to(torch.int32).numpy(), codes.value.numpy()
            )
            progress.advance(chunk.rows)


def _feature_columns(sae: SparseAutoencoder) -> dict[str, Any]:
    """What an architecture has of norms, biases and, where both are of one space, cosines."""
    decoder = sae.W_dec.double()
    norm = decoder.norm(dim=1)
    columns = {"decoder_norm": norm}
    if hasattr(sae, "W_enc_T"):
        encoder = sae.W_enc_T.double()
        columns["encoder_norm"] = encoder.norm(dim=1)
        if not sae.transcodes:
            product = (columns["encoder_norm"] * norm).clamp_min(1e-30)
            columns["encoder_decoder_cosine"] = (encoder * decoder).sum(1) / product
    if hasattr(sae, "b_enc"):
        columns["encoder_bias"] = sae.b_enc
    return {name: column.float().numpy() for name, column in columns.items()}


def direct_logits(
    directions: Tensor, W_U: Tensor, norm_weight: Tensor | None, *, centred: bool = False
) -> Tensor:
    """Effect of directions [n, d_model] on the logits [n, d_vocab], through the final norm.

    What the direction adds to each logit up to the final norm's positive scale, relative to the
    mean over the vocabulary (a constant shift changes no probability). A final norm that takes a
    vector's mean off it (`centred`: LayerNorm, not RMSNorm) does so with a direction, too. That the
    direction changes the scale itself is left out, as it depends on what is there besides.
    """
    if centred:
        directions = directions - directions.mean(-1, keepdim=True)
    scaled = directions if norm_weight is None else directions * norm_weight
    effect = scaled @ W_U
    return effect - effect.mean(-1, keepdim=True)


def _add_logits(
    writer: StoreWriter, place: Placed, model: Model | None, count: int
) -> dict[str, Any]:
    """Write each feature's most raised and lowered tokens; the largest effect, as a column.

    A feature's direction is what it writes: at a transcoder's output, a crosscoder's last site.
    """
    if model is None:
        say("logit effects: left out, because nobody said of which model the activations are")
        return {}
    sae = place.sae
    directions = sae.W_dec[:, list(place.columns(model.d_in).values())[-1]]
    if directions.shape[1] != model.d_model:
        say("logit effects: left out, because the site is not as wide as the residual stream")
        return {}
    W_U, norm_weight = model.unembedding()
    centred = model.final_norm_centres
    largest = []
    with Progress("effects on logits", sae.d_sae, "features") as progress:
        for first in range(0, sae.d_sae, _FEATURES):
            rows = directions[first : first + _FEATURES]
            effect = direct_logits(rows, W_U, norm_weight, centred=centred)
            largest.append(effect.amax(1))
            for sign in (1, -1):
                value, token = (sign * effect).topk(min(count, effect.shape[1]), dim=1)
                feature, rank = _grid(first, value)
                writer.add_logits(
                    feature,
                    torch.full_like(rank, sign).numpy(),
                    rank.numpy(),
                    token.flatten().numpy(),
                    (sign * value).flatten().numpy(),
                )
            progress.advance(len(rows))
    return {LARGEST_LOGIT: torch.cat(largest).numpy()}


def _add_neighbours(writer: StoreWriter, sae: SparseAutoencoder, count: int) -> None:
    count = min(count, sae.d_sae - 1)
    if count == 0:
        return
    directions = sae.W_dec
    if isinstance(sae, Crosscoder):
        directions = directions * sae.norm_scale  # a site of large activations does not decide
    unit = torch.nn.functional.normalize(directions, dim=1)
    for first in range(0, sae.d_sae, _FEATURES):
        cosine = unit[first : first + _FEATURES] @ unit.T
        itself = torch.arange(len(cosine))
        cosine[itself, itself + first] = -torch.inf
        value, other = cosine.topk(count, dim=1)
        feature, rank = _grid(first, value)
        writer.add_neighbours(
            feature, rank.numpy(), other.flatten().numpy(), value.flatten().numpy()
        )


def _grid(first: int, values: Tensor) -> tuple[Any, Tensor]:
    """Feature and rank of each entry of a [features, ranks] block, flat."""
    n, ranks = values.shape
    feature = torch.arange(first, first + n).repeat_interleave(ranks)
    return feature.numpy(), torch.arange(ranks).repeat(n)
