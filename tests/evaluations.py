"""Evaluations as `saescope eval` writes them, of hand-set numbers, with all tables beside them."""

from pathlib import Path
from typing import Any

from sae.evaluation import families
from sae.evaluation.metric_table import write_metric_table
from saescope.artefact import sha256_json
from saescope.metrics import described
from saescope.seals import sealed, write_sealed

_EDGES = [-8 + number / 4 for number in range(33)]


def make_evaluation(
    folder: Path,
    *,
    l0: float = 8.0,
    fvu: float = 0.25,
    bits: float | None = 50.0,
    d_sae: int = 64,
    rows: int = 1000,
    tables: bool = False,
) -> Path:
    """folder/evaluation.json and what is beside it; with `tables`, of probing and absorption too.

    rows: in the protocol, so that other numbers are other protocols.
    """
    families()  # declares their rows
    protocol: dict[str, Any] = {
        "version": 2,
        "harvest": "0" * 64,
        "site": "blocks.1.hook_resid_post",
        "rows": rows,
        "probing": {"seeds": [0, 1]},
    }
    about = {"rows": rows, "documents": 6}
    densities = [0] * 20 + [9, 40, 7] + [0] * 9
    of_groups = {"rows": 9, "l0": l0}
    found: dict[str, Any] = {
        "schema": 2,
        "protocol": protocol,
        "protocol_hash": sha256_json(protocol),
        "reconstruction": about
        | {
            "l0": l0,
            "fvu": fvu,
            "fvu_interval": 0.01,
            "cosine": 0.9,
            "dead_fraction": 0.125,
            "density_histogram": {
                "log10_edges": _EDGES,
                "features": densities,
            },
            "fvu_by_site": {},
        },
        "row_groups": about
        | {
            "fvu_early": None,
            "fvu_early_interval": None,
            "fvu_document_p90": 1.2 * fvu,
            "by_position": [
                {"from": 1, "below": 2, **of_groups, "fvu": fvu / 2, "fvu_interval": None},
                {"from": 2, "below": 4, **of_groups, "fvu": fvu, "fvu_interval": 0.02},
                {
                    "from": 4,
                    "below": 8,
                    "rows": 36,
                    "l0": l0,
                    "fvu": fvu * 1.1,
                    "fvu_interval": 0.01,
                },
            ],
            "by_token_share": [
                {
                    "from": 0.0,
                    "below": 1e-6,
                    "rows": 9,
                    "l0": l0,
                    "fvu": fvu * 2,
                    "fvu_interval": 0.1,
                },
                {"from": 0.1, "below": 1.0, **of_groups, "fvu": fvu, "fvu_interval": 0.01},
            ],
            "by_document": {
                "quantiles": [0.1, 0.5, 0.9],
                "fvu": [fvu / 2, fvu, fvu * 1.2],
                "l0": [l0 - 1, l0, l0 + 1],
            },
        },
        "downstream": {
            "tokens": 64,
            "documents": 1,
            "delta_ce": fvu / 2,
            "delta_ce_interval": None,
            "kl": fvu / 3,
            "kl_interval": 0.02,
        },
    }
    if bits is not None:
        found["description_length"] = about | {
            "description_bits": bits,
            "description_bits_interval": 1.5,
            "index_bits": bits / 2,
            "value_bits": bits / 2,
            "fvu_quantised": fvu,
        }
    if tables:
        found["probing"] = {"sets": 2, "probing_auc_k1": 0.7, "probing_auc_k1_interval": 0.05}
        found["ravel"] = {"pairs": 9, "ravel_cause": 0.5}
        found["unlearning"] = {"forget_texts": 9}
        found["scr"] = {"divisions": 2}
        found["absorption"] = {"words": 30, "absorption_fraction": 0.25}
    found["metrics"] = described(
        name for each in found.values() if isinstance(each, dict) for name in each
    )
    path = folder / "evaluation.json"
    write_sealed(path, found)
    sae = {"run": str(folder), "sae_hash": "ab" * 32, "architecture": "topk", "d_in": 16}
    write_metric_table(path, sealed(found), {**sae, "d_sae": d_sae})
    if tables:
        _write_tables(folder, found["protocol_hash"])
    return path


def _write_tables(folder: Path, protocol_hash: str) -> None:
    over_sets = [
        {
            "setting": setting,
            "method": method,
            "k": k,
            "sets": 2,
            "auc": auc,
            "auc_interval": 0.02,
            "accuracy": auc,
            "accuracy_interval": 0.02,
            "majority": 0.5,
        }
        for setting in ("normal", "scarce")
        for method, k, auc in (
            ("sae", 1, 0.7),
            ("sae", 4, 0.8),
            ("untrained", 1, 0.55),
            ("untrained", 4, 0.6),
            ("raw", 16, 0.9),
        )
    ]
    write_sealed(
        folder / "evaluation.probing.json",
        {
            "schema": 1,
            "protocol_hash": protocol_hash,
            "over_sets": over_sets,
            "by_set": [],
            "methods": {"sae": "the SAE's features", "raw": "all coordinates"},
        },
    )
    write_sealed(
        folder / "evaluation.ravel.json",
        {
            "schema": 1,
            "protocol_hash": protocol_hash,
            "by_attribute": [
                {
                    "kind": "city",
                    "attribute": "country",
                    "method": "sae",
                    "k": 4,
                    "cause": 0.5,
                    "isolation": 0.75,
                    "disentangle": 0.625,
                }
            ],
        },
    )
    scores = [
        {"method": "sae", "n": 2, "pair": None, "scr": 0.25, "scr_interval": 0.125},
        {"method": "sae", "n": 2, "pair": "a", "scr": 0.5},
    ]
    write_sealed(
        folder / "evaluation.scr.json",
        {"schema": 1, "protocol_hash": protocol_hash, "scores": scores, "results": []},
    )
    clamp = {"method": "sae", "texts": "test", "n": 2, "strength": 4.0}
    write_sealed(
        folder / "evaluation.unlearning.json",
        {
            "schema": 1,
            "protocol_hash": protocol_hash,
            "scores": [],
            "results": [{**clamp, "forget_rise": 0.5, "retain_rise": -0.25}],
        },
    )
    write_sealed(
        folder / "evaluation.absorption.json",
        {
            "schema": 1,
            "protocol_hash": protocol_hash,
            "by_letter": [
                {"method": method, "letter": letter, "words": 9, "fraction": fraction, "full": 0.0}
                for method, letter, fraction in (
                    ("sae", "A", 0.25),
                    ("sae", "S", 0.5),
                    ("untrained", "A", 0.1),
                )
            ],
        },
    )
