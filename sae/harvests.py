"""The harvest behind an SAE: open it, choose its site, read its held-out rows, load its model."""

from collections.abc import Callable, Iterator

from torch import Tensor

from activations import ActivationStore, Model, load_model
from sae.base import SparseAutoencoder
from saescope.errors import InputError


def open_complete(path: str) -> ActivationStore:
    """Open a harvest; InputError if it is not finished."""
    harvest = ActivationStore.open(path)
    if not harvest.complete:
        raise InputError("this harvest is not finished; run `saescope harvest` again", where=path)
    return harvest


def choose_site(harvest: ActivationStore, site: str | None) -> str:
    """The site to use; InputError if it is not in the harvest, or none of several is chosen."""
    if site is None and len(harvest.sites) == 1:
        return harvest.sites[0]
    if site is None or site not in harvest.sites:
        what = "not in the harvest" if site else "must be chosen: the harvest has several"
        raise InputError(what, where="site", given=site, allowed=harvest.sites)
    return site


def held_out_rows(
    harvest: ActivationStore, site: str, limit: int | None
) -> Callable[[], Iterator[Tensor]]:
    """Fresh iterators over the first `limit` held-out rows (None: all), float32 [n, d_in]."""

    def rows() -> Iterator[Tensor]:
        left = limit
        for chunk in harvest.chunks("held_out"):
            if left is not None and left <= 0:
                return
            x, _ = harvest.read_chunk(site, chunk.index)
            x = x[:left] if left is not None else x
            left = None if left is None else left - len(x)
            yield x.float()

    return rows


def open_harvest(sae: SparseAutoencoder, path: str | None) -> ActivationStore:
    """The harvest given, or the one an SAE was trained on; it must be complete and fit the SAE."""
    chosen = path or sae.metadata.get("harvest")
    if not chosen:
        raise InputError("this SAE names no harvest; give one", where="harvest")
    harvest = open_complete(chosen)
    site = choose_site(harvest, sae.metadata.get("site"))
    if harvest.d_in(site) != sae.d_in:
        raise InputError(
            f"width of {site} differs from the SAE's", where=str(chosen), given=harvest.d_in(site),
            allowed=str(sae.d_in),
        )  # fmt: skip
    trained_on, found = sae.metadata.get("weights_hash"), harvest.manifest["model"]["weights_hash"]
    if trained_on and trained_on != found:
        raise InputError(
            "was harvested from another model than the SAE's", where=str(chosen), given=found,
            allowed=trained_on,
        )  # fmt: skip
    return harvest


def load_harvested_model(harvest: ActivationStore, dtype: str) -> Model:
    """The model of a harvest; InputError if what its name stands for has other weights by now."""
    facts = harvest.manifest["model"]
    model = load_model(facts["spec"], dtype=dtype, revision=facts["revision"])
    if model.weights_hash != facts["weights_hash"]:
        raise InputError("is not the model that was harvested", where=facts["spec"])
    return model
