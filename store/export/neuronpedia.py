"""Neuronpedia's export: the folder that its importer reads, one source (an SAE at a layer).

    release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl     one line each
    features/batch-N.jsonl.gz  activations/batch-N.jsonl.gz  explanations/batch-N.jsonl.gz

The fields are those of Neuronpedia's tables (apps/webapp/prisma/schema.prisma; its own converter is
utils/neuronpedia-utils/neuronpedia_utils/convert-saedashboard-to-neuronpedia-export.py).
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from store.annotations import Annotations
from store.export.record import FeatureRecord, figures, read_records
from store.export.saedashboard import dashboard_activations, dashboard_feature, layer_number
from store.feature_store import FeatureStore

BATCH = 1024
"""features of a file"""
LOCAL_CREATOR = "clkht01d40000jv08hvalcvly"
"""the account that an installation of Neuronpedia on one's own machine has from the start"""
_SAME = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
"""fields of a feature that SAEDashboard and Neuronpedia call the same"""


class NeuronpediaExport:
    """The names under which a store's features go to Neuronpedia, and its rows."""

    def __init__(
        self,
        store: FeatureStore,
        *,
        layer: int | None = None,
        source_set: str | None = None,
        creator: str = LOCAL_CREATOR,
    ) -> None:
        self.store = store
        self.model = str(store.meta.get("model") or "unknown")
        self.source_set = source_set or str(store.meta.get("name") or "saescope")
        self.source = f"{layer_number(store, layer)}-{self.source_set}"
        self.creator = creator
        self.created = str(store.meta.get("created") or "1970-01-01T00:00:00+00:00")

    def heads(self) -> dict[str, dict[str, Any]]:
        """The four files of one line, by name."""
        overview = self.store.overview()
        made = {"creatorId": self.creator, "createdAt": self.created}
        of_model = {"modelId": self.model, **made}
        return {
            "release": {
                "name": self.source_set,
                "description": f"{overview.architecture} SAEs of {self.model}",
                "descriptionShort": self.source_set,
                "creatorName": "saescope",
                "creatorNameShort": "saescope",
                "urls": [],
                **made,
            },
            "model": {
                "id": self.model,
                "instruct": False,
                "displayNameShort": self.model,
                "displayName": self.model,
                "updatedAt": self.created,
                **made,
            },
            "sourceset": {
                "name": self.source_set,
                "description": f"{overview.site}, {overview.d_sae:,} features",
                "creatorName": "saescope",
                "releaseName": self.source_set,
                "visibility": "PUBLIC",
                **of_model,
            },
            "source": {
                "id": self.source,
                "setName": self.source_set,
                "visibility": "PUBLIC",
                "dataset": str((self.store.meta.get("corpus") or {}).get("source") or ""),
                "num_prompts": overview.n_sequences,
                "num_tokens_in_prompt": overview.context,
                **of_model,
            },
        }

    def _keys(self, number: int) -> dict[str, str]:
        return {"modelId": self.model, "layer": self.source, "index": str(number)}

    def feature(self, record: FeatureRecord) -> dict[str, Any]:
        """The row of `Neuron`."""
        found = dashboard_feature(self.store, record)
        return {
            **self._keys(record.feature.feature),
            "sourceSetName": self.source_set,
            "creatorId": self.creator,
            "createdAt": self.created,
            "maxActApprox": figures(record.feature.max),
            "hasVector": False,
            "vector": [],
            "hookName": str(self.store.meta.get("site") or ""),
            "topkCosSimIndices": [each.feature for each in record.neighbours],
            "topkCosSimValues": [figures(each.cosine) for each in record.neighbours],
            **{name: found[name] for name in _SAME},
        }

    def activations(self, record: FeatureRecord) -> Iterator[dict[str, Any]]:
        """The rows of `Activation`."""
        number = record.feature.feature
        for rank, found in enumerate(dashboard_activations(self.store, record)):
            values = found["values"]
            yield {
                "id": self._id("activation", number, rank),
                **self._keys(number),
                "tokens": found["tokens"],
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "binMin": found["bin_min"],
                "binMax": found["bin_max"],
                "binContains": found["bin_contains"],
                "qualifyingTokenIndex": found["qualifying_token_index"],
                "creatorId": self.creator,
                "createdAt": self.created,
            }

    def explanations(self, record: FeatureRecord) -> Iterator[dict[str, Any]]:
        """The rows of `Explanation`: the label and the machines' best one, if there are any."""
        number, written, machine = record.feature.feature, record.annotation, record.machine_label
        found = [(written.label, written.note or None)] if written.label else []
        if machine is not None:
            score = "" if machine.score is None else f", balanced accuracy {machine.score:.3f}"
            found.append((machine.label, f"saescope, machine label ({machine.method}{score})"))
        for rank, (description, note) in enumerate(found):
            yield {
                "id": self._id("explanation", number, rank),
                **self._keys(number),
                "description": description,
                "authorId": self.creator,
                "notes": note,
                "typeName": None,
                "explanationModelName": None,
                "createdAt": self.created,
            }

    def _id(self, *parts: object) -> str:
        """An id of the length and the alphabet of a cuid, the same at every export."""
        text = json.dumps([self.model, self.source, *parts])
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def write_neuronpedia(
    folder: Path,
    store: FeatureStore,
    notes: Annotations,
    features: Sequence[int],
    *,
    layer: int | None = None,
    source_set: str | None = None,
    creator: str = LOCAL_CREATOR,
) -> Iterator[int]:
    """Write the export into a folder; yields how many more features are written."""
    export = NeuronpediaExport(store, layer=layer, source_set=source_set, creator=creator)
    for name, row in export.heads().items():
        (folder / f"{name}.jsonl").write_bytes(_lines([row]))
    tables = ("features", "activations", "explanations")
    for name in tables:
        (folder / name).mkdir()
    for batch, first in enumerate(range(0, len(features), BATCH)):
        files = [folder / name / f"batch-{batch}.jsonl.gz" for name in tables]
        for record in read_records(store, notes, features[first : first + BATCH]):
            rows = [
                [export.feature(record)],
                export.activations(record),
                export.explanations(record),
            ]
            for file, each in zip(files, rows, strict=True):
                # a gzip file may have several members; mtime 0: the same bytes at every export
                with file.open("ab") as stream:
                    stream.write(gzip.compress(_lines(each), mtime=0))
            yield 1


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(
        json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows
    ).encode()
