r"""Feature pages by SAEDashboard and by us: the same SAE, features and activations, timed in turn.

    python -m benchmarks.dashboards --harvest data/smollm2-135m-quick \
        --sae runs/smollm2-135m-topk-quick

SAEDashboard reads the harvest's rows as its own cached activations, and makes a page of each of 256
features. We build the feature store of the whole SAE, without the map of directions, and
export pages of the same features. Both write one HTML file a feature. Their histograms, densities
and strongest positions are then compared with what the store's activations give by SAEDashboard's
definitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from activations import ActivationStore
from activations.models.files import folder_of
from benchmarks.harvest import timed
from benchmarks.peers.environments import DASHBOARDS
from benchmarks.running import run, run_peer
from dashboards.export_command import ExportConfig, export
from sae.bench import rows as results
from sae.commands.convert import ConvertConfig, convert
from sae.commands.index import IndexConfig, index
from sae.data.harvests import read_chunk
from saescope.config import Config
from saescope.errors import ArtefactError, InputError, check_range
from saescope.paths import remove
from saescope.progress import say, silent
from store import FeatureStore

COLUMNS = (
    "date", "library", "version", "step", "features", "tokens", "d_in", "d_sae", "round", "seconds",
    "processor_seconds", "bytes_a_page", "threads", "processor", "commit",
)  # fmt: skip
BUFFER = 5
"""tokens on each side of an example, as SAEDashboard has it"""
TOP = 20
BINS = 50


@dataclass(frozen=True, kw_only=True)
class DashboardsConfig(Config):
    """Make feature pages with SAEDashboard and with saescope, and compare them."""

    harvest: str
    """Folder of the harvest."""
    sae: str
    """Folder of the run or SAE, of one site of a language model."""
    features: int = 256
    """Features that pages are made of, evenly spread over those that fire."""
    rounds: int = 3
    """Times that both are timed, in turn."""
    threads: int = 2
    """Threads of torch, in both."""
    work: str = "build/peers"
    """Folder for the environment and for what is written."""
    results: str = "benchmarks/results/dashboards.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        for name in ("features", "rounds", "threads"):
            check_range(name, getattr(self, name), low=1)

    @property
    def folder(self) -> Path:
        """Of what is written; removed at the end."""
        return Path(self.work) / "dashboards"


def special_tokens(tokens: np.ndarray, keep: np.ndarray) -> list[int]:
    """Ids of tokens that are never kept; position 0, which is not kept either, is left out.

    Raises InputError if a position is not kept for another reason: SAEDashboard cannot be told.
    """
    dropped = np.unique(tokens[:, 1:][~keep[:, 1:]])
    if np.isin(tokens[:, 1:][keep[:, 1:]], dropped).any() or keep[:, 0].any():
        raise InputError(
            "positions are left out for other reasons than their token or index", where="harvest"
        )
    return [int(each) for each in dropped]


def write_inputs(config: DashboardsConfig, harvest: ActivationStore, site: str) -> dict[str, Any]:
    """The harvest's tokens and rows as files of arrays; the settings that name them."""
    tokens, rows = config.folder / "tokens.npy", config.folder / "rows.npy"
    np.save(tokens, harvest.tokens[:])
    shape = (harvest.n_sequences, harvest.context, harvest.d_in(site))
    placed = np.lib.format.open_memmap(rows, mode="w+", dtype=np.float32, shape=shape)
    flat = placed.reshape(-1, shape[2])
    for chunk in [*harvest.chunks("train"), *harvest.chunks("held_out")]:
        x, row_token = read_chunk(harvest, [site], chunk)
        flat[row_token.numpy()] = x.numpy()
    placed.flush()
    return {
        "tokens": str(tokens.absolute()),
        "rows": str(rows.absolute()),
        "site": site,
        "ignore_tokens": special_tokens(harvest.tokens[:], harvest.keep[:]),
        "ignore_positions": [0],
    }


def ours(config: DashboardsConfig, store: Path, features: Sequence[int] | None) -> dict[str, Any]:
    """Seconds of the store's build and, given features, of their pages; bytes a page."""
    # SAEDashboard draws no map of directions, and no page shows it
    settings = IndexConfig(
        run=config.sae, harvest=config.harvest, out=str(store), map=False, replace=True
    )
    pages = config.folder / "pages"
    with silent():
        built = timed(lambda: index(settings))
        if features is None:
            return {}
        wanted = ",".join(map(str, features))
        chosen = ExportConfig(
            store=str(store), out=str(pages), format="html", features=wanted, replace=True
        )
        written = timed(lambda: export(chosen))
    sizes = [page.stat().st_size for page in pages.glob("feature-*.html")]
    return {"build": built, "pages": written, "bytes": sum(sizes) / len(sizes)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one feature's page has, beside what the store's activations give by its definitions."""

    same_histogram: bool
    misplaced: int
    """activations in another bin, of all"""
    same_density: bool
    same_top: bool
    """the strongest positions are the same ones, but for the order of equal activations"""
    repeated: int
    """sequences among the strongest that are there more than once"""
    zeros: int
    """examples of the lowest interval at which the feature is silent"""
    shared_logits: int
    """of ten most raised tokens"""


def compare(found: dict[str, Any], store: FeatureStore, feature: int) -> Comparison:
    """Compare SAEDashboard's page of a feature with the store.

    Bars are fifty between the least and the largest activation; the strongest positions leave out
    six at the start and five at the end of a sequence; the density is of all tokens.
    """
    position, activation = store.activations(feature)
    inside = activation.astype(np.float32)
    counts = np.histogram(inside, bins=BINS, range=(float(inside.min()), float(inside.max())))[0]
    theirs = np.array(found["histogram"])
    at = position % store.context
    shown = (at > BUFFER) & (at < store.context - BUFFER)
    best = position[shown][:TOP], activation[shown][:TOP]
    top = found["groups"][0]
    places = np.array([s * store.context + i for s, i in top["at"]])[: len(best[0])]
    values = np.array([each[BUFFER] for each in top["activations"]])[: len(best[0])]
    equal_values = np.allclose(values, best[1], rtol=1e-3, atol=2e-4)
    weakest = best[1][-1] if len(best[1]) else 0.0
    sure = set(best[0][best[1] > weakest * 1.001].tolist())
    sequences = [s for s, _ in top["at"]][: len(best[0])]
    lowest = found["groups"][-1]
    raised = {each.token_id for each in store.logits(feature).top}
    tokens = int(store.meta["n_tokens"])
    return Comparison(
        same_histogram=bool((counts == theirs).all()),
        misplaced=int(np.abs(np.cumsum(counts - theirs)).sum()),
        same_density=abs(found["density"] - len(activation) / tokens) < 1e-5,
        same_top=bool(equal_values and sure <= set(places.tolist())),
        repeated=len(sequences) - len(set(sequences)),
        zeros=sum(each[BUFFER] == 0 for each in lowest["activations"]),
        shared_logits=len(raised & set(found["logits_top"][:10])),
    )


def summary(found: Sequence[Comparison]) -> list[str]:
    """The comparison in sentences."""
    n = len(found)
    return [
        f"histograms equal in every bar: {sum(each.same_histogram for each in found)} of {n} "
        f"(activations in a neighbouring bar of the others: {sum(c.misplaced for c in found)})",
        f"densities equal: {sum(each.same_density for each in found)} of {n}",
        f"the {TOP} strongest positions equal: {sum(each.same_top for each in found)} of {n}",
        f"of their {TOP} strongest, in a sequence that is there already: "
        f"{sum(each.repeated for each in found) / n:.1f} a feature",
        f"of their 5 examples of the lowest interval, silent: "
        f"{sum(each.zeros for each in found) / n:.1f} a feature",
        f"most raised tokens shared: {sum(each.shared_logits for each in found) / n:.1f} of 10",
    ]


def measure(config: DashboardsConfig) -> None:
    """Time both, add rows to the results, and say how the pages compare."""
    remove(config.folder)
    config.folder.mkdir(parents=True)
    harvest = ActivationStore.open(config.harvest)
    store_path, saelens = config.folder / "store", config.folder / "sae"
    with silent():
        convert(ConvertConfig(source=config.sae, to="saelens", out=str(saelens)))
    ours(config, store_path, None)  # once to warm up, and to know what fires
    with FeatureStore.open(store_path) as store:
        site, live = str(store.meta["site"]), store.live_features()
        shape = {"d_in": store.meta["d_in"], "d_sae": store.d_sae, "tokens": store.meta["n_tokens"]}
        model = str(folder_of(str(store.meta["model_spec"]), None)[0])
    if len(live) < config.features:
        raise InputError(
            "more features than fire",
            where="features",
            given=config.features,
            allowed=f"at most {len(live)}",
        )
    spread = np.linspace(0, len(live) - 1, config.features).round().astype(int)
    features = [live[each] for each in spread]
    settings = {
        **write_inputs(config, harvest, site),
        "model": model, "sae": str(saelens.absolute()), "features": features,
        "threads": config.threads, "folder": str((config.folder / "peer").absolute()),
    }  # fmt: skip
    peer: dict[str, Any] = {}
    ratios: list[float] = []
    for turn in range(config.rounds):
        peer = run_peer(
            DASHBOARDS, DASHBOARDS.script, settings, Path(config.work), config.folder
        )  # fmt: skip
        own = ours(config, store_path, features)
        # our build loads the model and the SAE too
        steps = ("load_seconds", "seconds", "html_seconds")
        theirs = sum(peer[name] for name in steps) / len(features)
        mine = own["build"][0] / len(live) + own["pages"][0] / len(features)
        ratios.append(theirs / mine)
        say(
            f"round {turn + 1}: SAEDashboard {1e3 * theirs:.1f} ms a feature, "
            f"saescope {1e3 * mine:.2f} ms: {theirs / mine:.1f}x"
        )
        results.append(
            Path(config.results), _rows(config, turn, peer, own, len(live), shape), COLUMNS
        )
    with FeatureStore.open(store_path) as store:
        found = [compare(peer["features"][str(each)], store, each) for each in features]
    say(f"median {float(np.median(ratios)):.1f}x a feature")
    for line in summary(found):
        say(line)
    if not all(each.same_top and each.same_density for each in found):
        raise ArtefactError("the pages differ where their definitions agree", where="SAEDashboard")
    remove(config.folder)


def _rows(
    config: DashboardsConfig,
    turn: int,
    peer: dict[str, Any],
    own: dict[str, Any],
    live: int,
    shape: dict[str, Any],
) -> list[dict[str, Any]]:
    machine = results.facts("cpu")
    common = {
        "date": datetime.now(UTC).date().isoformat(), "round": turn + 1, **shape,
        "threads": config.threads, "processor": machine["processor"], "commit": machine["commit"],
    }  # fmt: skip
    theirs = {"library": "SAEDashboard", "version": peer["version"], **common}
    ours = {"library": "saescope", "version": machine["saescope"], **common}
    pages = config.features
    return [
        {**theirs, "step": "loading", "features": pages, "seconds": peer["load_seconds"],
         "processor_seconds": peer["load_processor_seconds"]},
        {**theirs, "step": "data of features", "features": pages, "seconds": peer["seconds"],
         "processor_seconds": peer["processor_seconds"]},
        {**theirs, "step": "HTML", "features": pages, "seconds": peer["html_seconds"],
         "processor_seconds": peer["html_processor_seconds"],
         "bytes_a_page": round(peer["html_bytes"] / pages)},
        {**ours, "step": "store of all features", "features": live, "seconds": own["build"][0],
         "processor_seconds": own["build"][1]},
        {**ours, "step": "HTML", "features": pages, "seconds": own["pages"][0],
         "processor_seconds": own["pages"][1], "bytes_a_page": round(own["bytes"])},
    ]  # fmt: skip


if __name__ == "__main__":
    run(DashboardsConfig, measure)
