"""A feature store from what was encoded of a harvest, and what follows from the weights alone.

Activations are handed on sparse, a piece at a time: nothing of size [tokens, d_sae] exists.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from activations import ActivationStore, Model
from activations.models.attention import HeadOutputs
from sae.analysis.attention.heads import attention_site, head_norms
from sae.analysis.similarity import cosines_with_others
from sae.data.placement import Placement
from sae.indexing.drawn import Strongest, drawn
from sae.indexing.ends import Indexed, indexed
from sae.indexing.groups import add_document_groups
from sae.indexing.inputs import Inputs
from sae.indexing.layers import LayerFacts
from sae.indexing.layout import NEAREST, lay_out
from sae.indexing.pending import Arrays
from saescope.errors import InputError
from saescope.progress import Progress, say
from saescope.system import system_errors
from store import StoreWriter
from store.fact_writer import LOGIT_BINS

LARGEST_LOGIT = "largest_logit_effect"
_HEADS = ".hook_z"
"""how the names of sites end that are attention heads side by side"""
_INSIDE = tuple(f"attn.hook_{name}" for name in "qkv")
"""how the names of sites end that may be as wide as the residual stream, and are not in it"""
_SEQUENCES = 4096
_FEATURES = 512


def build_store(
    path: Path,
    placement: Placement,
    harvest: ActivationStore,
    model: Model | None,
    *,
    meta: dict[str, Any],
    inputs: Inputs,
    activations: Iterable[Arrays],
    logits: int = 10,
    neighbours: int = 10,
    with_map: bool = True,
    topic_field: str = "topic",
    layers: LayerFacts | None = None,
    replace: bool = False,
) -> dict[str, int]:
    """Write the store of an SAE's features on a harvest; the rows of each of its tables.

    Args:
        path: the file to write.
        placement: the SAE at its sites of the harvest.
        model: of a language model's harvest; without it there are no logit effects.
        meta: what the store says of itself.
        inputs: what the model was given, as the store shows it.
        activations: position, feature and activation [n each], piece by piece.
        logits: most raised and most lowered tokens kept of each feature.
        neighbours: nearest decoder directions kept of each feature.
        with_map: whether to lay out the map of decoder directions.
        topic_field: of the corpus's records, which says what a document is about.
        layers: what the features of an SAE of several layers do at each.
        replace: write over the store that is there.

    Raises ArtefactError if the harvest cannot be read or the disk is full; an interrupted build
    leaves nothing behind.
    """
    sae = indexed(placement.sae)
    with (
        system_errors(str(path)),
        torch.inference_mode(),
        StoreWriter(
            path,
            meta={**meta, **inputs.meta(), **({"layer_use": layers.summary} if layers else {})},
            d_sae=sae.d_sae,
            context=harvest.context,
            replace=replace,
        ) as writer,
    ):
        _add_inputs(writer, harvest, inputs)
        add_document_groups(writer, harvest, topic_field)
        _add_activations(writer, harvest, inputs, activations)
        decided = _add_logits(writer, sae, placement, model, logits)
        columns = {name: each.float().numpy() for name, each in sae.feature_columns().items()}
        writer.add_features({**columns, **decided})
        if layers is not None:
            layers.write(writer)
        _add_heads(writer, sae, placement, model)
        _add_neighbours(writer, sae, neighbours, with_map=with_map)
        return writer.finish()


def _add_inputs(writer: StoreWriter, harvest: ActivationStore, inputs: Inputs) -> None:
    writer.add_vocabulary(inputs.texts)
    writer.add_documents(harvest.document_table())
    for numbers, images in inputs.pictures(harvest):
        writer.add_pictures(numbers, images)
    for first in range(0, harvest.n_sequences, _SEQUENCES):
        rows = slice(first, min(first + _SEQUENCES, harvest.n_sequences))
        writer.add_sequences(
            first,
            inputs.tokens(harvest, rows),
            harvest.document[rows],
            harvest.keep[rows],
            harvest.split[rows],
        )


def _add_activations(
    writer: StoreWriter, harvest: ActivationStore, inputs: Inputs, activations: Iterable[Arrays]
) -> None:
    """Write the activations, and pictures of prompts on which they are strongest."""
    strongest = Strongest(writer.d_sae)
    for piece in activations:
        writer.add_activations(**piece)
        if inputs.draws:
            strongest.add(**piece)
    sequences, trusted = strongest.sequences(harvest.context), inputs.trust_remote_code
    for numbers, images in drawn(harvest, sequences, inputs.draws, trust_remote_code=trusted):
        writer.add_pictures(numbers, images)


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
    writer: StoreWriter, sae: Indexed, placement: Placement, model: Model | None, count: int
) -> dict[str, Any]:
    """Write each feature's most raised and lowered tokens; the largest effect, as a column.

    A feature's direction is what it writes: at a transcoder's output, a crosscoder's last site.
    """
    if model is None:
        say("logit effects: left out, as there is no language model")
        return {}
    try:
        columns = placement.columns(model.d_in)
    except InputError:  # of harvests that were joined, which are of several models
        say("logit effects: left out, because the sites are not those of one model")
        return {}
    site, own = list(columns.items())[-1]
    directions = _in_stream(model, site, sae.W_dec[:, own])
    if directions is None:
        return {}
    W_U, norm_weight = model.unembedding()
    centred = model.final_norm_centres
    largest = []
    with Progress("effects on logits", sae.d_sae, "features") as progress:
        for first in range(0, sae.d_sae, _FEATURES):
            rows = directions[first : first + _FEATURES]
            effect = direct_logits(rows, W_U, norm_weight, centred=centred)
            largest.append(effect.amax(1))
            writer.add_logit_histograms(
                np.arange(first, first + len(rows)), *logit_histograms(effect)
            )
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


def _in_stream(model: Model, site: str, directions: Tensor) -> Tensor | None:
    """What directions [n, d] of a site add to the residual stream [n, d_model], up to a scale.

    None, which is said, where that is not known.
    """
    if site.endswith(_HEADS):
        try:
            out = HeadOutputs.of(model, attention_site(site)[0]).up_to_scale()
        except InputError as error:
            say(f"logit effects: left out, because of what is behind the heads: {error}")
            return None
        return directions @ out.to(directions)
    if directions.shape[1] != model.d_model or site.endswith(_INSIDE):
        say("logit effects: left out, because the site is not in the residual stream")
        return None
    return directions


def logit_histograms(effect: Tensor) -> tuple[Any, Any, Any]:
    """Lowest and highest effect [n] of features on the logits [n, d_vocab], and counts [n, 40] of
    the equal bins from one to the other; all in the first bin where all effects are equal.

    >>> low, high, counts = logit_histograms(torch.tensor([[0.0, 1.0, 1.9, 40.0]]))
    >>> low.tolist(), high.tolist(), counts[0, [0, 1, 39]].tolist()
    ([0.0], [40.0], [1, 2, 1])
    """
    low, high = effect.aminmax(dim=1)
    counts = torch.zeros(len(effect), LOGIT_BINS)
    for row, values in enumerate(effect):
        begin, end = float(low[row]), float(high[row])
        if begin < end:
            counts[row] = torch.histc(values, LOGIT_BINS, begin, end)
        else:
            counts[row, 0] = len(values)
    return low.numpy(), high.numpy(), counts.to(torch.int32).numpy()


def _add_heads(
    writer: StoreWriter, sae: Indexed, placement: Placement, model: Model | None
) -> None:
    """Write the norm of what each feature writes to each head, at the outputs of heads."""
    if model is None or len(placement.written) != 1 or not placement.written[0].endswith(_HEADS):
        return
    heads = getattr(model.hf.config.get_text_config(), "num_attention_heads", None)
    if not heads or sae.W_dec.shape[1] % heads:
        say("norms of heads: left out, because the model does not say how many it has")
        return
    writer.add_head_norms(head_norms(sae.W_dec, heads).numpy())


def _add_neighbours(writer: StoreWriter, sae: Indexed, count: int, *, with_map: bool) -> None:
    """Write each feature's nearest decoder directions, and if wanted the map on which these are
    near."""
    directions = sae.decoder_directions()
    count = min(count, sae.d_sae - 1)
    most = min(max(count, NEAREST), sae.d_sae - 1) if with_map else count
    nearest = []
    with Progress("nearest directions", sae.d_sae, "features") as progress:
        for first, cosine in cosines_with_others(directions, _FEATURES):
            value, other = cosine.topk(most, dim=1)
            nearest.append(other[:, :NEAREST])
            value, other = value[:, :count], other[:, :count]
            feature, rank = _grid(first, value)
            writer.add_neighbours(
                feature, rank.numpy(), other.flatten().numpy(), value.flatten().numpy()
            )
            progress.advance(len(cosine))
    if with_map:
        writer.add_map(*lay_out(directions, torch.cat(nearest).numpy()).T)


def _grid(first: int, values: Tensor) -> tuple[Any, Tensor]:
    """Feature and rank of each entry of a [features, ranks] block, flat."""
    n, ranks = values.shape
    feature = repeat(torch.arange(first, first + n), "feature -> (feature rank)", rank=ranks)
    rank = repeat(torch.arange(ranks), "rank -> (feature rank)", feature=n)
    return feature.numpy(), rank
