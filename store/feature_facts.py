"""Queries of what stores have since schemas 4 and 5: effects on logits, groups, layers, heads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saescope.errors import ArtefactError
from store.database import ADDED
from store.fact_results import (
    DocumentGroup,
    Enrichment,
    HeadNorm,
    Layer,
    LayerShare,
    MeasuredEffect,
    MeasuredEffects,
)
from store.fact_writer import LOGIT_BINS
from store.results import Histogram
from store.store_base import StoreBase


class FeatureFacts(StoreBase):
    """Queries of a feature's facts. Each raises ArtefactError for a store of an older schema, which
    has none of them, and InputError for a feature that there is not."""

    @property
    def has_facts(self) -> bool:
        """Whether the store is new enough to have them; of some SAEs and models there are none."""
        return int(self.meta["schema"]) >= ADDED["enrichment"]

    def _need_facts(self) -> None:
        if not self.has_facts:
            raise ArtefactError(
                f"was built by an older saescope (schema {self.meta['schema']}), which did not "
                "have this; `saescope index RUN --out FOLDER --replace` builds it anew, and labels "
                "stay",
                where=str(self.path),
            )

    def logit_histogram(self, feature: int) -> Histogram | None:
        """The feature's direct effects on the logits of all tokens, in 40 equal bins.

        None for a store without effects on logits. Cost: about 1 ms.
        """
        [found] = self.logit_histograms_of([feature]).values()
        return found

    def logit_histograms_of(self, features: Sequence[int]) -> dict[int, Histogram | None]:
        """`logit_histogram` of each of these features, in one query, as in the methods below."""
        self._need_facts()
        found: dict[int, Histogram | None] = {}
        columns = "low, high, counts"
        of_each = self._rows_by_feature("logit_histogram", columns, features, "")
        for number, rows in of_each.items():
            found[number] = None
            for low, high, counts in rows[:1]:
                fits = len(counts) == LOGIT_BINS and low <= high and min(counts) >= 0
                self._db.check_fits(fits, "logit_histogram")
                edges = np.linspace(low, high, LOGIT_BINS + 1)
                found[number] = Histogram(edges, np.array(counts, np.int64))
        return found

    def document_groups(self) -> list[DocumentGroup]:
        """The topics and the sources of documents, each kind by name; none where all are alike.

        Cost: a pass over the documents, some 10 ms for 100,000.
        """
        self._need_facts()
        rows = self._rows(
            "SELECT g.kind, g.name, g.n, coalesce(e.n, 0) FROM"
            " (SELECT kind, name, count(*) AS n FROM db.document_group GROUP BY kind, name) g"
            " LEFT JOIN (SELECT kind, name, count(*) AS n FROM db.enrichment GROUP BY kind, name) e"
            " ON g.kind = e.kind AND g.name = e.name ORDER BY g.kind DESC, g.name"
        )
        return [DocumentGroup(*row) for row in rows]

    def enrichments(self, feature: int) -> list[Enrichment]:
        """The groups of documents in which a feature fires more often than by chance, surest first.

        At most 10, at a false-discovery rate of 5 % over all features and groups. Cost: about 1 ms.
        """
        [found] = self.enrichments_of([feature]).values()
        return found

    def enrichments_of(self, features: Sequence[int]) -> dict[int, list[Enrichment]]:
        """`enrichments` of each of these features."""
        self._need_facts()
        names = "kind, name, documents, expected, log_odds, q, positions, share, expected_share"
        return {
            number: [Enrichment(**dict(zip(names.split(", "), row, strict=True))) for row in rows]
            for number, rows in self._rows_by_feature("enrichment", names, features).items()
        }

    def features_of_group(self, kind: str, name: str) -> list[int]:
        """The features that fire in a group's documents more often than by chance, most so first.

        Empty for a group that there is not. Cost: a pass over the enriched groups, some 10 ms.
        """
        self._need_facts()
        rows = self._rows(
            "SELECT feature FROM db.enrichment WHERE kind = ? AND name = ?"
            " ORDER BY log_odds DESC, feature",
            [str(kind), str(name)],
        )
        return [number for (number,) in rows]

    def first_groups(self, kind: str) -> dict[int, str]:
        """The name of each feature's surest group of a kind, where it has one.

        Cost: a pass over the enriched groups, some 10 ms.
        """
        self._need_facts()
        rows = self._rows(
            "SELECT feature, arg_min(name, rank) FROM db.enrichment WHERE kind = ?"
            " GROUP BY feature ORDER BY feature",
            [str(kind)],
        )
        self._db.check_fits(all(0 <= number < self.d_sae for number, _ in rows), "enrichment")
        return dict(rows)

    def layers(self) -> list[Layer]:
        """The layers of an SAE of several; empty for an SAE of one."""
        self._need_facts()
        sql = "SELECT layer, site, tokens, cosine_next FROM db.layer ORDER BY layer"
        found = [Layer(*row) for row in self._rows(sql)]
        self._db.check_fits([each.layer for each in found] == list(range(len(found))), "layer")
        return found

    def layer_profile(self, feature: int) -> list[LayerShare]:
        """What a feature does at each layer; empty for an SAE of one, or a feature that is silent.

        Cost: about 1 ms.
        """
        [found] = self.layer_profiles_of([feature]).values()
        return found

    def layer_profiles_of(self, features: Sequence[int]) -> dict[int, list[LayerShare]]:
        """`layer_profile` of each of these features."""
        self._need_facts()
        columns = "layer, count, amount, share"
        found = self._rows_by_feature("layer_profile", columns, features, "layer")
        layers = list(range(len(self.layers()))) if any(found.values()) else []
        for rows in found.values():
            self._db.check_fits(not rows or [row[0] for row in rows] == layers, "layer_profile")
        return {number: [LayerShare(*row) for row in rows] for number, rows in found.items()}

    def layer_shares(self) -> NDArray[np.float64]:
        """P(layer | feature) of all features, [layers, d_sae]; 0 for silent features.

        Cost: a pass over the table; some 20 ms for 10^6 rows.
        """
        shares = np.zeros((len(self.layers()), self.d_sae))
        found = self._columns("SELECT feature, layer, share FROM db.layer_profile")
        for name, size in (("feature", self.d_sae), ("layer", len(shares))):
            values = found[name]
            fits = not len(values) or (values.min() >= 0 and values.max() < size)
            self._db.check_fits(bool(fits), "layer_profile")
        shares[found["layer"], found["feature"]] = found["share"]
        return shares

    def head_norms(self, feature: int) -> list[HeadNorm]:
        """What a feature writes to each attention head; empty for an SAE at another site.

        Cost: about 1 ms.
        """
        [found] = self.head_norms_of([feature]).values()
        return found

    def head_norms_of(self, features: Sequence[int]) -> dict[int, list[HeadNorm]]:
        """`head_norms` of each of these features."""
        self._need_facts()
        found = self._rows_by_feature("head_norm", "head, norm, share", features, "head")
        return {number: [HeadNorm(*row) for row in rows] for number, rows in found.items()}

    def measured_effects(self, feature: int) -> MeasuredEffects | None:
        """The effect of a feature through the network, as `saescope effects` measured it.

        None where it was not measured, in older stores too. Cost: about 1 ms.
        """
        [found] = self.measured_effects_of([feature]).values()
        return found

    def measured_effects_of(self, features: Sequence[int]) -> dict[int, MeasuredEffects | None]:
        """`measured_effects` of each of these features."""
        if int(self.meta["schema"]) < ADDED["measured_logit"]:
            return dict.fromkeys(self._check_all(features))
        columns = "sign, token_id, value, error"
        found: dict[int, MeasuredEffects | None] = {}
        for number, rows in self._rows_by_feature("measured_logit", columns, features).items():
            effects = [(s, MeasuredEffect(t, self._text(t), v, e)) for s, t, v, e in rows]
            raised, lowered = ([e for s, e in effects if s * side > 0] for side in (1, -1))
            found[number] = MeasuredEffects(raised, lowered) if rows else None
        return found
