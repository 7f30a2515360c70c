"""The harvest behind an SAE: open it, choose its sites, read its rows, load its model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations import ActivationStore, Model, load_model
from activations.loading.unshuffled import aligned_rows
from activations.models.base import HarvestModel
from activations.sites.names import is_pattern, layer_of, select
from activations.storage.reader import Chunk
from sae.core.base import SparseAutoencoder, kind_of
from sae.data.model_expectations import warn_of_model
from sae.data.placement import Placement, placement_of
from sae.data.provenance import differing, refuse_other
from sae.evaluation.rows import Piece
from sae.synthetic.config import PREFIX
from saescope.errors import InputError

_PIECE_ROWS = 16384


def open_complete(path: str) -> ActivationStore:
    """Open a harvest; InputError if it is not finished, or is a synthetic world."""
    if path.startswith(PREFIX):
        raise InputError(
            "this needs a harvest, and a synthetic world has no text and no model; its runs are "
            "scored by `saescope synth`",
            where=path,
        )
    harvest = ActivationStore.open(path)
    if not harvest.complete:
        raise InputError("this harvest is not finished; run `saescope harvest` again", where=path)
    return harvest


def check_held_out(harvest: ActivationStore) -> None:
    """Raise InputError if nothing of a harvest was held out of training."""
    if harvest.n_rows("held_out") == 0:
        raise InputError(
            "the harvest has no held-out rows, on which a run is measured and its thresholds are "
            "set; harvest more text, or with a larger held_out_fraction",
            where=str(harvest.path),
            given=f"{harvest.n_rows('train'):,} training rows, 0 held out",
        )


def choose_site(harvest: ActivationStore, site: str | None) -> str:
    """The site to use; InputError if it is not in the harvest, or none of several is chosen."""
    if site is None and len(harvest.sites) == 1:
        return harvest.sites[0]
    if site is None or site not in harvest.sites:
        what = "not in the harvest" if site else "must be chosen: the harvest has several"
        raise InputError(what, where="site", given=site, allowed=harvest.sites)
    return site


def choose_sites(
    harvest: ActivationStore,
    cls: type[SparseAutoencoder],
    *,
    site: str | None,
    sites: Sequence[str],
    target_site: str | None,
    target_sites: Sequence[str] = (),
    mix_layers: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that an SAE of an architecture is to read, and those that it is to write.

    Several are read by a crosscoder, by one SAE of several layers (`mix_layers`), or by a
    cross-layer transcoder: those that `sites` names, or its patterns match, or all of the
    harvest's. What is written is empty where it is what is read.

    Raises InputError for sites that the harvest has not, or that the architecture cannot read.
    """
    across = cls.transcodes and cls.concatenates
    if across:
        return _layers_read_and_written(harvest, site, sites, target_site, target_sites, mix_layers)
    if target_sites:
        raise InputError(
            "several sites are written by a cross-layer transcoder alone",
            where="target_sites",
            given=target_sites,
        )
    if cls.transcodes != (target_site is not None):
        what = (
            "a transcoder needs the site to reconstruct"
            if cls.transcodes
            else f"{kind_of(cls.Config())} reconstructs what it reads"
        )
        raise InputError(what, where="target_site", given=target_site)
    several = cls.concatenates or mix_layers is not None
    if cls.concatenates and mix_layers is not None:
        raise InputError(
            "a crosscoder reads all sites at once", where="mix_layers", given=mix_layers
        )
    if (cls.transcodes or not several) and sites:
        raise InputError(
            "several sites need a crosscoder, or mix_layers",
            where="sites",
            given=sites,
            allowed="mix_layers = all, drawn",
        )
    if several and site is not None:
        raise InputError("several sites are read here: give sites", where="site", given=site)
    targets = () if target_site is None else (choose_site(harvest, target_site),)
    if several:
        return _named(harvest, sites or harvest.sites), targets
    return (choose_site(harvest, site),), targets


def _named(harvest: ActivationStore, names: Sequence[str]) -> tuple[str, ...]:
    """The harvest's sites of these names, and those that patterns among them match."""
    found: list[str] = []
    for name in names:
        if name in harvest.sites or not is_pattern(name):
            found.append(choose_site(harvest, name))
        else:
            found += select([name], harvest.sites, where=str(harvest.path))
    return tuple(dict.fromkeys(found))


def _layers_read_and_written(
    harvest: ActivationStore,
    site: str | None,
    sites: Sequence[str],
    target_site: str | None,
    target_sites: Sequence[str],
    mix_layers: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a cross-layer transcoder reads and writes, in the order of the layers."""
    for name, given in (
        ("site", site),
        ("target_site", target_site),
        ("mix_layers", mix_layers),
    ):
        if given is not None:
            raise InputError(
                "a cross-layer transcoder reads and writes several sites",
                where=name,
                given=given,
                allowed="sites and target_sites",
            )
    if not sites or not target_sites:
        raise InputError(
            "a cross-layer transcoder needs the sites that it reads, and those that it writes",
            where="sites" if not sites else "target_sites",
            given=(),
            allowed='such as "blocks.*.ln2.hook_normalized", and "blocks.*.hook_mlp_out"',
        )
    read, written = (_by_layer(harvest, names) for names in (sites, target_sites))
    layers = [[layer_of(name) for name in names] for names in (read, written)]
    if layers[0] != layers[1] or len(set(layers[0])) < len(read):
        raise InputError(
            "one of them for each layer that is read",
            where="target_sites",
            given=f"layers {layers[1]}",
            allowed=f"layers {layers[0]}, each once",
        )
    for name, names in (("sites", read), ("target_sites", written)):
        widths = sorted({harvest.d_in(each) for each in names})
        if len(widths) > 1:
            raise InputError("layers are of one width", where=name, given=widths)
    return read, written


def _by_layer(harvest: ActivationStore, names: Sequence[str]) -> tuple[str, ...]:
    found = _named(harvest, names)
    outside = [name for name in found if layer_of(name) is None]
    if outside:
        raise InputError("is in no layer", where="sites", given=outside[0])
    return tuple(sorted(found, key=lambda name: layer_of(name) or 0))


def held_out_rows(
    harvest: ActivationStore, site: str, limit: int | None
) -> Callable[[], Iterator[Tensor]]:
    """Fresh iterators over the first `limit` held-out rows (None: all), float32 [n, d_in]."""

    def rows() -> Iterator[Tensor]:
        for (x,), _ in aligned_rows(harvest, (site,), split="held_out", limit=limit):
            yield x

    return rows


def split_pieces(
    harvest: ActivationStore, placement: Placement, split: str, limit: int | None
) -> Callable[[], Iterator[Piece]]:
    """Fresh iterators over `limit` rows of a split (None: all) that an SAE reads.

    Float32 [n, d_in], with what is at the sites it writes [n, d_out], and each row's document;
    where rows are of tokens, also its position and how common its token is. Held-out rows are the
    first ones, training rows are from all over the split.
    """
    names = tuple(dict.fromkeys((*placement.read, *placement.written)))
    document = torch.from_numpy(np.asarray(harvest.document[:])).flatten()
    share = _token_shares(harvest)

    def beside(sites: Sequence[str], by_name: Sequence[Tensor]) -> Tensor:
        chosen = [by_name[names.index(site)] for site in sites]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def rows() -> Iterator[Piece]:
        size = max(1, _PIECE_ROWS // len(names))
        spread = split == "train"
        found = aligned_rows(harvest, names, split=split, limit=limit, piece=size, spread=spread)
        for by_name, row_token in found:
            x = beside(placement.read, by_name)
            target = (
                x if placement.read == placement.written else beside(placement.written, by_name)
            )
            known = document[row_token].long()
            if share is None:
                yield Piece(x, target, known)
            else:
                yield Piece(x, target, known, row_token % harvest.context, share[row_token])

    return rows


def _token_shares(harvest: ActivationStore) -> Tensor | None:
    """Of each token of a harvest, flat, the part of all tokens with a row that are the same one.

    float64; None where rows are not of tokens.
    """
    if not harvest.harvested or kind_of_model(harvest) not in ("language", "text_encoder"):
        return None
    tokens = torch.from_numpy(np.asarray(harvest.tokens[:])).flatten()
    kept = torch.from_numpy(np.asarray(harvest.keep[:])).flatten()
    _, own = tokens.unique(return_inverse=True)
    count = own[kept].bincount(minlength=int(own.max()) + 1).double()
    return (count / count.sum())[own]


def read_chunk(harvest: ActivationStore, sites: Sequence[str], chunk: Chunk) -> tuple[Tensor, ...]:
    """A chunk's activations at sites, side by side [rows, sum of widths], and its row_token."""
    read = [harvest.read_chunk(site, chunk.index) for site in sites]
    x = [x.float() for x, _ in read]
    return x[0] if len(x) == 1 else torch.cat(x, dim=-1), torch.as_tensor(read[0][1])


def open_harvest(
    sae: SparseAutoencoder,
    path: str | None,
    site: str | None = None,
    *,
    behind_lens: bool = False,
    allow_other_model: bool = False,
) -> tuple[ActivationStore, Placement]:
    """The harvest given, or the one an SAE was trained on, and the SAE at its sites there.

    Args: site is for an SAE of several layers, or one that names none; allow_other_model, for a
    harvest of another model than the SAE was trained on.

    Raises InputError if it is not complete or does not fit the SAE.
    """
    chosen = path or sae.metadata.get("harvest")
    if not chosen:
        raise InputError("this SAE names no harvest; give one", where="harvest")
    harvest = open_complete(chosen)
    if not (site or sae.transcodes or sae.site_normalisers or sae.metadata.get("site")):
        site = choose_site(harvest, None)
    placement = placement_of(sae, site, behind_lens=behind_lens)
    for names, width in ((placement.read, sae.d_in), (placement.written, sae.d_out)):
        found = sum(harvest.d_in(choose_site(harvest, name)) for name in names)
        if found != width:
            raise InputError(
                f"width of {', '.join(names)} differs from the SAE's",
                where=str(chosen),
                given=found,
                allowed=str(width),
            )
    model = harvest.manifest["model"]
    refuse_other(sae, differing(sae, model), model["spec"], str(chosen), allow_other_model)
    has_bos = harvest.manifest["config"].get("prepend_bos")
    if has_bos is None:  # as the tokenizer does
        has_bos = harvest.manifest["model"].get("bos_token_id") is not None
    warn_of_model(sae, where=str(chosen), has_bos=has_bos)
    return harvest, placement


def knows_model(harvest: ActivationStore) -> bool:
    """Whether a harvest names its model; rows that somebody brought may have none."""
    return harvest.manifest["model"]["spec"] is not None


def load_harvested_model(
    harvest: ActivationStore, dtype: str, *, trust_remote_code: bool = False
) -> Model:
    """The language model of a harvest, whose activations are made as the harvest's were.

    Raises InputError if its model is of another kind, or if what its name stands for has other
    weights by now.
    """
    facts = harvest.manifest["model"]
    kind = facts.get("kind", "language")
    if not knows_model(harvest):
        raise InputError(
            "this needs the model, and nobody said of which one these activations are",
            where=str(harvest.path),
        )
    if kind != "language":
        raise InputError(
            "this needs a language model, and the harvest is of one of another kind (eval does "
            "without it with tokens = 0)",
            where=str(harvest.path),
            given=kind,
        )
    model = load_model(
        facts["spec"],
        dtype=dtype,
        revision=facts["revision"],
        trust_remote_code=trust_remote_code,
    )
    _check_hashes(model, facts)
    # not those that are faster now: what is measured would differ from run to run in its last bits
    model.products = facts.get("products", "own")
    return model


def kind_of_model(harvest: ActivationStore) -> str:
    """language, text_encoder, vision or diffusion; harvests from before this was said are of the
    first."""
    return harvest.manifest["model"].get("kind", "language")


def token_texts(harvest: ActivationStore, *, trust_remote_code: bool = False) -> list[str | bytes]:
    """The text of every token id of a text encoder's harvest.

    Raises InputError if what its name stands for has other weights by now.
    """
    facts = harvest.manifest["model"]
    model = load_model(
        facts["spec"],
        dtype="float32",
        revision=facts["revision"],
        kind=kind_of_model(harvest),
        trust_remote_code=trust_remote_code,
    )
    _check_hashes(model, facts)
    texts = model.vocabulary()
    if texts is None:
        raise InputError("its inputs are not tokens", where=facts["spec"])
    return texts


def _check_hashes(model: HarvestModel, facts: Mapping[str, Any]) -> None:
    for name in ("weights_hash", "tokenizer_hash", "inputs_hash", "code_hash"):
        if facts.get(name) is not None and getattr(model, name) != facts[name]:
            what = f"is not the model that was harvested ({name} differs)"
            raise InputError(what, where=facts["spec"])
