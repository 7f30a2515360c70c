"""An SAE and the held-out part of a harvest, on which families of metrics are measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationStore, Model
from sae.analysis.as_trained import Rows, as_trained
from sae.analysis.lens import TunedLens
from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.evaluate_texts import (
    on_texts,
    one_site,
    settings_of,
    text_facts,
)
from sae.core.base import SparseAutoencoder
from sae.data.harvests import knows_model, load_harvested_model, open_harvest, split_pieces
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.evaluation import Family, families
from sae.evaluation.in_model import InModel
from sae.evaluation.intervals import PROTOCOL
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.rows import Counted, pass_over
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import ROWS, SCHEMA, sections
from sae.formats.hub import evaluation_file
from sae.formats.load import load
from saescope import __version__
from saescope.artefact import sha256_json
from saescope.config import to_dict
from saescope.errors import InputError
from saescope.metrics import described
from saescope.paths import as_path
from saescope.progress import say


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """An SAE at its sites, and the held-out part of a harvest that it is measured on."""

    config: EvaluateConfig
    sae: SparseAutoencoder
    """as it was loaded"""
    harvest: ActivationStore
    sites: Mapping[str, Placement]
    """the SAE at each site it is measured at: several for one of several layers"""
    pooled: bool
    """whether it is of several layers and measured at all of them"""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """rows that `measure` leaves for files beside the evaluation, by family"""
    unfinished: Unfinished | None = None
    """keeps what `measure` has done of it, and has what was done before; None: nothing is kept"""
    loaded: list[Model] = field(default_factory=list)
    """the model, loaded once for all"""

    @classmethod
    def open(cls, config: EvaluateConfig, *, unfinished: Unfinished | None = None) -> "HeldOut":
        """Load the SAE and find its harvest; the errors of `evaluate`."""
        sae = load(config.run, target_site=config.target_site)
        layers = list(sae.site_normalisers) if config.site is None else []
        one = None if sae.concatenates else config.site
        opened = [
            open_harvest(
                sae,
                config.harvest,
                site,
                behind_lens=True,
                allow_other_model=config.allow_other_model,
            )
            for site in layers or [one]
        ]
        sites = {placement.read[0]: placement for _, placement in opened}
        return cls(
            config=config,
            sae=sae,
            harvest=opened[0][0],
            sites=sites,
            pooled=bool(layers),
            unfinished=unfinished,
        )

    @property
    def placement(self) -> Placement:
        """The SAE at its first site."""
        return next(iter(self.sites.values()))

    def measure(self, wanted: Sequence[Family]) -> dict[str, Any]:
        """What evaluation.json is to hold: those of the families that apply."""
        of_rows, of_model, of_texts = self._applying(wanted)
        found: dict[str, Any] = {family.section: None for family in families().values()}
        settings = self._settings([*of_rows, *of_model])
        texts = self._text_facts(of_texts)  # before minutes of measuring
        counted: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        if of_rows:
            about = {"rows": self.config.most_rows, **self._settings(of_rows)}
            counted = self._part(of_rows, about, self.measure_rows, found)
        for family in of_model:
            about = {**self._model_facts(), **self._settings([family])}
            facts = self._part([family], about, self.measure_model, found)
        for family in of_texts:
            about = {family.name: texts[family.name]}
            self._part([family], about, self.measure_texts, found)
        protocol = {**self.protocol(counted), **facts, **settings, **texts}
        carried = described(name for each in sections(found).values() for name in each)
        return {
            "schema": SCHEMA,
            "protocol": protocol,
            "protocol_hash": sha256_json(protocol),
            **found,
            **({ROWS: carried} if carried else {}),
        }

    def _part(
        self,
        wanted: Sequence[Family],
        about: Mapping[str, Any],
        measure: Callable[[Sequence[Family], dict[str, Any]], dict[str, Any]],
        found: dict[str, Any],
    ) -> dict[str, Any]:
        """Put what families measure into `found`, or what was kept of them; what `measure` says.

        Args: about is what the protocol has of them.
        """
        names = [family.name for family in wanted]

        def measured() -> dict[str, Any]:
            own: dict[str, Any] = {family.section: None for family in wanted}
            facts = measure(wanted, own)
            tables = {name: self.tables[name] for name in names if name in self.tables}
            return {"facts": facts, "sections": own, "tables": tables}

        if self.unfinished is None:
            part = measured()
        else:
            key = {
                "families": names,
                "saes": {site: weights_hash(one.sae) for site, one in self.sites.items()},
                "config": to_dict(self.placement.sae.config),
                "protocol": {**self.protocol({}), **about},
                "versions": {"torch": torch.__version__, "saescope": __version__},
            }
            part = self.unfinished.part(key, ", ".join(names), measured)
        for section, values in part["sections"].items():
            if values is not None:
                found[section] = {**(found[section] or {}), **values}
        self.tables.update(part["tables"])
        return part["facts"]

    def measured_in(self, evaluation: Mapping[str, Any], wanted: Sequence[Family]) -> bool:
        """Whether an evaluation of this SAE has these families under the protocol of now."""
        of_rows, of_model, of_texts = self._applying(wanted)
        there = sections(evaluation)
        has = [
            family.name
            for family in families().values()
            if any(row.name in there.get(family.section, {}) for row in family.metrics)
        ]
        if has != [family.name for family in (*of_rows, *of_model, *of_texts)]:
            return False
        expected = {
            **self.protocol({"rows": self._n_rows()} if of_rows else {}),
            **(self._model_facts() if of_model else {}),
            **self._settings([*of_rows, *of_model]),
            **self._text_facts(of_texts),
        }
        # the documents follow from the rows
        own = {k: v for k, v in evaluation["protocol"].items() if k != "documents"}
        return sha256_json(own) == sha256_json(expected)

    def _applying(
        self, wanted: Sequence[Family]
    ) -> tuple[list[Family], list[Family], list[Family]]:
        """Those that need activations alone, those that need the model, where they can be, and
        those with texts of their own."""
        by_needs: dict[str, list[Family]] = {"activations": [], "model": [], "texts": []}
        for family in wanted:
            by_needs[family.needs].append(family)
        of_rows, of_model, of_texts = by_needs.values()
        return of_rows, of_model if of_model and self.has_model() else [], of_texts

    def _text_facts(self, wanted: Sequence[Family]) -> dict[str, Any]:
        """What the protocol says of families with texts of their own, by family."""
        if not wanted:
            return {}
        site = one_site(self.harvest, self.placement, pooled=self.pooled)
        return text_facts(wanted, self.config, self.harvest.manifest["model"], site)

    def _on_texts(self) -> OnTexts[None]:
        """The SAE and its model, for families with texts of their own."""
        config = self.config
        return on_texts(
            self.harvest,
            self.placement,
            config.probing,
            model=self._model(),
            path=as_path(config.out) if config.out else evaluation_file(config.run).parent,
            rows=self.tables,
        )

    def _n_rows(self) -> int:
        """How many rows `measure_rows` is to count."""
        if "outliers" not in self.sae.metadata:
            there = self.harvest.n_rows("held_out")
            return len(self.sites) * min(self.config.most_rows or there, there)
        return sum(len(each.x) for one in self.sites.values() for each in self._rows(one)())

    def _rows(self, placement: Placement, training: int | None = None) -> Rows:
        """The rows that are measured at sites, or so many training ones, as training saw them."""
        split, limit = (
            ("held_out", self.config.most_rows) if training is None else ("train", training)
        )
        return as_trained(self.sae)(split_pieces(self.harvest, placement, split, limit), placement)

    def protocol(self, counted: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the numbers, besides the model's part."""
        harvest, metadata = self.harvest, self.sae.metadata
        return {
            "version": 2,
            "harvest": harvest.hash,
            "site": self.placement.read[0],
            **self._further_sites(),
            "split": "held_out",
            "positions": (
                "all but position 0 and special tokens" if harvest.harvested else "those brought"
            ),
            "mean": "of the rows evaluated (FVU); of the training rows (mean-ablation)",
            **counted,
            "intervals": PROTOCOL,
            **{name: metadata[name] for name in ("outliers", "lens") if name in metadata},
        }

    def _further_sites(self) -> dict[str, Any]:
        """What the protocol says of sites besides the first that is read."""
        read, written = self.placement.read, self.placement.written
        several = list(self.sites) if self.pooled else list(read)
        facts: dict[str, Any] = {"sites": several} if self.pooled or len(read) > 1 else {}
        return {**facts, "target_site": written[0]} if written != read else facts

    def has_model(self) -> bool:
        """Whether what needs the model is measured; InputError if it is not, and was asked for."""
        asked, why = self.config.metrics, ""
        if not self.config.most_tokens:
            why = "tokens is 0"
        elif not knows_model(self.harvest):
            why = "nobody said of which model these activations are"
            if not asked:
                say(f"{why}: its loss is not measured")
        elif self.pooled:
            why = "an SAE of several layers is put into the model at one of them: give site"
        if why and asked:
            raise InputError(
                f"what needs the model cannot be measured: {why}", where="metrics", given=asked
            )
        return not why

    def _settings(self, measured: Sequence[Family]) -> dict[str, Any]:
        """What the protocol says of families that have settings of their own."""
        quick = self.config.quick
        return {f.name: own for f in measured if (own := f.settings(quick=quick))}

    def measure_rows(self, wanted: Sequence[Family], found: dict[str, Any]) -> dict[str, Any]:
        """Put what needs activations alone into `found`; the number of rows and documents."""
        counts: list[Counted] = []
        by_family: list[dict[str, dict[str, Any]]] = [{} for _ in wanted]
        for site, placement in self.sites.items():
            columns = placement.columns(self.harvest.d_in) if len(placement.written) > 1 else None
            counted, sums = pass_over(
                placement.sae,
                self._rows(placement),
                [family.measure for family in wanted],
                columns,
                partial(self._rows, placement),
                quick=self.config.quick,
                shown=True,
            )
            counts.append(counted)
            for of_site, one in zip(by_family, sums, strict=True):
                of_site[site] = one.values(counted)
        about = {"rows": sum(each.rows for each in counts), "documents": counts[0].documents}
        for family, of_site in zip(wanted, by_family, strict=True):
            values = family.measure.pool(of_site) if self.pooled else next(iter(of_site.values()))
            _put(found, family, values, about)
        return about

    def measure_model(self, wanted: Sequence[Family], found: dict[str, Any]) -> dict[str, Any]:
        """Put what needs the model into `found`; what the protocol says of model and sequences."""
        given = self._in_model()
        for family in wanted:
            _put(found, family, family.measure(given), {})
        return {**self._model_facts(), "model": given.model.weights_hash}

    def measure_texts(self, wanted: Sequence[Family], found: dict[str, Any]) -> dict[str, Any]:
        """Put what has texts of its own into `found`, and its tables into `tables`."""
        given = self._on_texts()
        for family in wanted:
            of_family = replace(given, settings=settings_of(family, self.config))
            _put(found, family, family.measure(of_family), {})
        return {}

    def _model_facts(self) -> dict[str, Any]:
        """What the protocol says of the model, which is the harvest's, and of the sequences."""
        model = self.harvest.manifest["model"]
        facts = {
            "model": model["weights_hash"],
            "dtype": model["dtype"],
            "sequences": len(self._sequences()),
            "context": self.harvest.context,
        }
        if self._replaced()[0] != self.placement.written:
            facts["replaced"] = self.config.site
        return facts

    def _sequences(self) -> NDArray[np.int64]:
        """Indices of the sequences that the model is run on: the first that are held out."""
        held_out = np.flatnonzero(self.harvest.split == 1)
        return held_out[: max(1, self.config.most_tokens // self.harvest.context)]

    def _model(self) -> Model:
        """The harvest's model, loaded."""
        if not self.loaded:
            dtype = self.harvest.manifest["model"]["dtype"]
            trusted = self.config.trust_remote_code
            self.loaded.append(load_harvested_model(self.harvest, dtype, trust_remote_code=trusted))
        return self.loaded[0]

    def _in_model(self) -> InModel:
        """The SAE in its model, with the first held-out sequences."""
        config, harvest, placement = self.config, self.harvest, self.placement
        first = self._sequences()
        replaced, columns = self._replaced()
        lens = placement.sae.metadata.get("lens")

        def replacement(x: Tensor) -> Tensor:
            return placement.sae(x).x_hat[:, columns]

        return InModel(
            model=self._model(),
            read=placement.read,
            written=replaced,
            replacement=(
                TunedLens.load(lens).around(placement.read[0], replacement) if lens else replacement
            ),
            mean=torch.cat([torch.from_numpy(harvest.statistics(site).mean) for site in replaced]),
            tokens=torch.from_numpy(harvest.tokens[first]).long(),
            keep=torch.from_numpy(harvest.keep[first]),
            document=torch.from_numpy(harvest.document[first]).long(),
            batch=config.batch,
        )

    def _replaced(self) -> tuple[tuple[str, ...], slice]:
        """The sites replaced in the model, and their columns of the reconstruction."""
        site, written = self.config.site, self.placement.written
        if site is None or len(written) == 1:
            return written, slice(None)
        columns = self.placement.columns(self.harvest.d_in)
        if site not in columns:
            raise InputError("not a site of this SAE", where="site", given=site, allowed=columns)
        return (site,), columns[site]


def _put(
    found: dict[str, Any], family: Family, values: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Add a family's values to its section, which begins with what it was measured on."""
    written = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    found[family.section] = {**(found[family.section] or about), **written}
