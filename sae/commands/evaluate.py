"""`saescope eval`: an SAE on held-out text, under a protocol that is written down and hashed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations import ActivationStore
from activations.loading.outliers import OutlierFilter
from sae.analysis.lens import TunedLens
from sae.core.base import SparseAutoencoder
from sae.data.harvests import held_out_pieces, knows_model, load_harvested_model, open_harvest
from sae.data.placement import Placement
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.intervals import PROTOCOL
from sae.evaluation.reconstruction import Piece, Reconstruction, measure_reconstruction, pool
from sae.evaluation.written import SCHEMA, report
from sae.formats.hub import evaluation_file
from sae.formats.load import load
from saescope.artefact import read_json, sha256_json, write_report
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import say
from saescope.replacing import Kind, check_replaceable
from saescope.seals import sealed
from saescope.system import system_errors


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Measure an SAE on the held-out part of a harvest."""

    run: str
    """Folder of a trained run or of an SAE, in any known format, or hf://owner/repo/folder."""
    harvest: str | None = None
    """Folder of the harvest to measure on; the one it was trained on if not given."""
    site: str | None = None
    """Of an SAE of several layers, the one to measure at (without it FVU and the like are measured
    at all, and the model's loss is not); of a crosscoder, the only site to replace in the model;
    of someone else's SAE, where it reads, if its files do not say."""
    target_site: str | None = None
    """Where someone else's transcoder writes, if its files do not say."""
    rows: int | None = None
    """Held-out activation rows for L0, FVU and the like; all of them if not given."""
    tokens: int = 8192
    """Held-out tokens that the model is run on for delta CE and KL; 0 leaves these out."""
    batch: int = 4
    """Sequences a run of the model."""
    allow_other_model: bool = False
    """Measure on a harvest of another model than the SAE was trained on."""
    out: str | None = None
    """File to write; if not given, evaluation.json in the run's folder, and for an SAE on the hub
    OWNER--REPO--FOLDER.evaluation.json here."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    replace: bool = False
    """Write in the place of an evaluation that is there and says something else."""

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_range("rows", self.rows, low=1)
        check_range("tokens", self.tokens, low=0)
        check_range("batch", self.batch, low=1)


def _is_evaluation(path: Path) -> bool:
    found = read_json(path)
    return isinstance(found, dict) and "protocol_hash" in found


EVALUATION = Kind("an evaluation", _is_evaluation)


@system_errors()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print and write the core metrics; the written dictionary.

    Raises InputError if the harvest does not fit the SAE, or if there is another evaluation, or
    something else, where it is to be written; ArtefactError if either cannot be read.
    """
    path = local(config.out) if config.out is not None else evaluation_file(config.run)
    check_replaceable(path, EVALUATION, replace=True)
    sae = load(config.run, target_site=config.target_site)
    layers = list(sae.site_normalisers) if config.site is None else []
    one = None if sae.concatenates else config.site
    harvest, place = open_harvest(
        sae,
        config.harvest,
        layers[0] if layers else one,
        behind_lens=True,
        allow_other_model=config.allow_other_model,
    )
    measured = _reconstruction(config, sae, harvest, place, layers)
    reconstruction = {k: v for k, v in vars(measured).items() if k != "density"}
    protocol: dict[str, Any] = {
        "version": 2,
        "harvest": harvest.hash,
        "site": place.read[0],
        **_further_sites(place, layers),
        "split": "held_out",
        "positions": (
            "all but position 0 and special tokens" if harvest.harvested else "those brought"
        ),
        "mean": "of the rows evaluated (FVU); of the training rows (mean-ablation)",
        "rows": measured.rows,
        "documents": measured.documents,
        "intervals": PROTOCOL,
        **{name: sae.metadata[name] for name in ("outliers", "lens") if name in sae.metadata},
    }
    downstream: dict[str, Any] | None = None
    if config.tokens and not knows_model(harvest):
        say("nobody said of which model these activations are: its loss is not measured")
    elif config.tokens and not layers:
        downstream, facts = _downstream(place, harvest, config)
        protocol.update(facts)
    result = {
        "schema": SCHEMA,
        "protocol": protocol,
        "protocol_hash": sha256_json(protocol),
        "reconstruction": reconstruction,
        "downstream": downstream,
    }
    try:
        write_report(path, sealed(result), EVALUATION, replace=config.replace)
    finally:  # what was measured is told, wherever it cannot be written
        for line in report(result):
            say(line)
    return result


def _further_sites(place: Placement, layers: list[str]) -> dict[str, Any]:
    """What the protocol says of sites besides the first that is read."""
    several = layers or (list(place.read) if len(place.read) > 1 else None)
    facts: dict[str, Any] = {} if several is None else {"sites": several}
    if place.written != place.read:
        facts["target_site"] = place.written[0]
    return facts


def _reconstruction(
    config: EvaluateConfig,
    sae: SparseAutoencoder,
    harvest: ActivationStore,
    place: Placement,
    layers: list[str],
) -> Reconstruction:
    seen = _as_trained(sae)
    if not layers:
        rows = seen(held_out_pieces(harvest, place, config.rows), place)
        columns = place.columns(harvest.d_in) if len(place.written) > 1 else None
        return measure_reconstruction(place.sae, rows, columns=columns)
    found = {}
    for site in layers:
        _, here = open_harvest(
            sae, config.harvest, site, behind_lens=True, allow_other_model=config.allow_other_model
        )
        rows = seen(held_out_pieces(harvest, here, config.rows), here)
        found[site] = measure_reconstruction(here.sae, rows)
    return pool(found)


Rows = Callable[[], Iterator[Piece]]


def _as_trained(sae: SparseAutoencoder) -> Callable[[Rows, Placement], Rows]:
    """What was done to rows in training is done here: outliers left out, a lens put before."""
    outliers, lens = sae.metadata.get("outliers"), sae.metadata.get("lens")
    keeps = outliers and OutlierFilter(multiple=outliers["multiple"], median=outliers["median"])
    through = TunedLens.load(lens) if lens else None

    def seen(rows: Rows, place: Placement) -> Rows:
        if not (keeps or through):
            return rows
        if len(place.read) > 1:
            raise InputError(
                "a crosscoder trained without outliers can only be measured without them",
                where="eval",
                given=sae.metadata["outliers"],
            )

        def changed() -> Iterator[Piece]:
            for each in rows():
                own = each.target is each.x
                if keeps:
                    kept = keeps.keep(place.read[0], each.x)
                    if not own:
                        kept &= keeps.keep(place.written[0], each.target)
                    x = each.x[kept]
                    document = None if each.document is None else each.document[kept]
                    each = Piece(x, x if own else each.target[kept], document)
                if through:
                    x = through.apply(place.read[0], each.x)
                    each = each._replace(x=x, target=x if own else each.target)
                yield each

        return changed

    return seen


def _downstream(
    place: Placement, harvest: ActivationStore, config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    model = load_harvested_model(
        harvest, harvest.manifest["model"]["dtype"], trust_remote_code=config.trust_remote_code
    )
    held_out = torch.from_numpy(harvest.split == 1).nonzero()[:, 0]
    chosen = held_out[: max(1, config.tokens // harvest.context)].numpy()
    tokens = torch.from_numpy(harvest.tokens[chosen]).long()
    keep = torch.from_numpy(harvest.keep[chosen])
    replaced: tuple[str, ...] = place.written
    part = slice(None)
    if config.site is not None and len(replaced) > 1:
        columns = place.columns(harvest.d_in)
        if config.site not in columns:
            raise InputError(
                "not a site of this SAE", where="site", given=config.site, allowed=columns
            )
        replaced, part = (config.site,), columns[config.site]
    means = [torch.from_numpy(harvest.statistics(site).mean) for site in replaced]
    lens = place.sae.metadata.get("lens")

    def replacement(x: Tensor) -> Tensor:
        return place.sae(x).x_hat[:, part]

    measured = measure_downstream(
        model,
        place.read,
        TunedLens.load(lens).around(place.read[0], replacement) if lens else replacement,
        torch.cat(means),
        tokens,
        keep,
        target=replaced,
        document=torch.from_numpy(harvest.document[chosen]).long(),
        batch=config.batch,
    )
    described = {
        "model": model.weights_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sequences": len(chosen),
        "context": harvest.context,
    }
    if replaced != place.written:
        described["replaced"] = config.site
    return asdict(measured), described
