"""What `saescope eval` gives to families with texts of their own: the SAE, its model, settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations import ActivationStore
from sae.analysis.lens import TunedLens
from sae.data.harvests import held_out_rows, kind_of_model, knows_model, load_harvested_model
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.evaluation import Family
from sae.evaluation.on_texts import OnTexts
from sae.probing import first_letter, suite, tables, text_rows
from sae.probing.config import ProbingConfig
from sae.probing.first_letter import AbsorptionConfig
from sae.probing.labelled_sets import labelled_sets
from saescope.errors import InputError
from saescope.paths import AnyPath, local

_CACHE = "probing-texts"
_ROWS = 8192
"""held-out rows that an untrained SAE is set up with"""


def one_site(harvest: ActivationStore, placement: Placement, *, pooled: bool) -> str:
    """The site that an SAE reads; InputError where texts cannot be shown to it there."""
    why = None
    site, *others = placement.read
    if pooled or others:
        why = "an SAE that reads several sites is probed at one of them: give site"
    elif not knows_model(harvest):
        why = "nobody said of which model these activations are"
    elif kind_of_model(harvest) != "language":
        why = "the harvest is of no language model"
    if why:
        raise InputError(
            f"texts cannot be probed: {why}", where="suite", given=", ".join(placement.read)
        )
    return site


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings of the families with texts of their own."""

    probing: ProbingConfig
    absorption: AbsorptionConfig

    def facts(
        self, wanted: Sequence[Family], model: Mapping[str, Any], site: str
    ) -> dict[str, Any]:
        """What the protocol says of families, by name: settings, and what decides their rows."""
        known = {"probing": self._probing, "absorption": self._absorption}
        return {
            family.name: known[family.name](model, site)
            if family.name in known
            else dict(family.protocol)
            for family in wanted
        }

    def _probing(self, model: Mapping[str, Any], site: str) -> dict[str, Any]:
        config = self.probing
        sets = labelled_sets(config.sets)
        return {
            **suite.protocol(config),
            "rows": text_rows.protocol(model, site, config.representation, config.max_tokens),
            "sets": {
                name: [asdict(origin) for origin in source.origins()]
                for name, source in sets.items()
            },
        }

    def _absorption(self, model: Mapping[str, Any], site: str) -> dict[str, Any]:
        rows = text_rows.protocol(model, site, "last", first_letter.MAX_TOKENS)
        return {**first_letter.protocol(self.absorption), "rows": rows}


def write_tables(
    evaluation: AnyPath, rows: Mapping[str, list[dict[str, Any]]], protocol_hash: str
) -> None:
    """Write the tables of families beside an evaluation's file, in the place of earlier ones.

    Raises InputError if something else is there, ArtefactError if they cannot be written.
    """
    if "probing" in rows:
        tables.write_tables(evaluation, rows["probing"], protocol_hash)
    if "absorption" in rows:
        first_letter.write_letters(evaluation, rows["absorption"], protocol_hash)


def table_lines(rows: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The tables of families as lines for people."""
    if "probing" in rows:
        yield from tables.lines(rows["probing"])


def on_texts(
    harvest: ActivationStore,
    placement: Placement,
    settings: TextSettings,
    *,
    path: AnyPath,
    rows: dict[str, list[dict[str, Any]]],
    trust_remote_code: bool,
) -> OnTexts:
    """The SAE at its site with its model loaded, and where activations of texts are kept:
    beside `path` if the settings name none, or in the current folder if that is remote."""
    model = load_harvested_model(
        harvest, harvest.manifest["model"]["dtype"], trust_remote_code=trust_remote_code
    )
    site = placement.read[0]
    lens = placement.sae.metadata.get("lens")
    through = TunedLens.load(lens) if lens else None

    def seen(x: Tensor) -> Tensor:
        return x if through is None else through.apply(site, x)

    def some_rows() -> Tensor:
        return seen(torch.cat(list(held_out_rows(harvest, site, _ROWS)())))

    return OnTexts(
        model=model,
        site=site,
        sae=placement.sae,
        sae_hash=weights_hash(placement.sae),
        seen=seen,
        some_rows=some_rows,
        probing=settings.probing,
        absorption=settings.absorption,
        cache=local(cache) if (cache := settings.probing.cache) else _beside(path),
        tables=rows,
    )


def _beside(path: AnyPath) -> Path:
    return path.parent / _CACHE if isinstance(path, Path) else Path(_CACHE)
