"""What `saescope eval` gives to families with texts of their own: the SAE, its model, settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations import ActivationStore, Model
from sae.analysis.lens import TunedLens
from sae.data.harvests import held_out_rows, kind_of_model, knows_model
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.evaluation import Family, families
from sae.evaluation.on_texts import OnTexts
from sae.probing.config import ProbingConfig
from saescope.config import Config
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


def settings_of(family: Family, config: Config) -> Any:
    """The settings of a family with texts of its own: of the configuration's field of their class,
    or those it has by default; quick ones if `config.quick`."""
    assert family.texts is not None
    of_class = family.texts.settings
    given = (getattr(config, field.name) for field in fields(config))  # type: ignore[arg-type]
    found = next((each for each in given if isinstance(each, of_class)), None) or of_class()
    return found.quick() if getattr(config, "quick", False) else found


def text_facts(
    wanted: Sequence[Family], config: Config, model: Mapping[str, Any], site: str
) -> dict[str, Any]:
    """What the protocol says of families with texts of their own, by name."""
    return {
        family.name: {
            **family.protocol,
            **family.texts.facts(settings_of(family, config), model, site),
        }
        for family in wanted
        if family.texts is not None
    }


def write_tables(
    evaluation: AnyPath, rows: Mapping[str, list[dict[str, Any]]], protocol_hash: str
) -> None:
    """Write the tables of families beside an evaluation's file, in the place of earlier ones.

    Raises InputError if something else is there, ArtefactError if they cannot be written.
    """
    for name, table in rows.items():
        texts = families()[name].texts
        if texts is not None and texts.write is not None:
            texts.write(evaluation, table, protocol_hash)


def table_lines(rows: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The tables of families as lines for people."""
    for name, table in rows.items():
        texts = families()[name].texts
        if texts is not None and texts.lines is not None:
            yield from texts.lines(table)


def on_texts(
    harvest: ActivationStore,
    placement: Placement,
    probing: ProbingConfig,
    *,
    model: Model,
    path: AnyPath,
    rows: dict[str, list[dict[str, Any]]],
) -> OnTexts[None]:
    """The SAE at its site with its model, and where activations of texts are kept: where the
    settings of probing say, or beside `path`, or in the current folder if that is remote."""
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
        settings=None,
        cache=local(probing.cache) if probing.cache else _beside(path),
        cache_limit=round(probing.cache_gb * 1e9),
        tables=rows,
    )


def _beside(path: AnyPath) -> Path:
    return path.parent / _CACHE if isinstance(path, Path) else Path(_CACHE)
