"""The model card of an uploaded SAE: what it is, of what, and what it measures, and how."""

from typing import Any

from sae.core.base import SparseAutoencoder, kind_of
from sae.evaluation.intervals import shown
from saescope import __version__
from saescope.config import to_dict

_NAMES = {
    "l0": "L0 (features active a row)",
    "fvu": "fraction of variance unexplained",
    "cosine": "cosine of reconstruction",
    "norm_ratio": "norm ratio of reconstruction",
    "dead_fraction": "features that never fired (fraction)",
    "delta_ce": "delta CE with the SAE in place (nats a token)",
    "kl": "KL with the SAE in place (nats a token)",
    "recovered_zero": "CE recovered against zero-ablation",
    "recovered_mean": "CE recovered against mean-ablation",
}


def model_card(
    sae: SparseAutoencoder,
    *,
    address: str,
    to: str,
    license: str | None = None,
    metrics: dict[str, Any] | None = None,
) -> str:
    """README.md with YAML front matter as the hub reads it.

    Args: address is where it will be, hf://owner/repo/...; to is the format; metrics is what
    `saescope eval` returned, with its protocol.
    """
    lines = [
        "---",
        _front_matter(sae, address=address, to=to, license=license, metrics=metrics),
        "---",
        "",
        f"# {kind_of(sae.config)} sparse autoencoder of {_model(sae) or 'a model'}",
        "",
        *_sites(sae),
        f"- d_in {sae.d_in}, d_sae {sae.d_sae}",
        f"- files: {to}, written by saescope {__version__}",
        "",
        "## Measured",
        "",
        *_measured_lines(_measured(metrics), metrics),
        "",
        "## Load",
        "",
        "```python",
        "import sae",
        "",
        f'autoencoder = sae.load("{address}")',
        "```",
        "",
        "## Configuration",
        "",
        "```",
        *(f"{name} = {value!r}" for name, value in to_dict(sae.config).items()),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(
    sae: SparseAutoencoder,
    *,
    address: str,
    to: str,
    license: str | None,
    metrics: dict[str, Any] | None,
) -> str:
    """The YAML that the hub shows and searches by: base model, tags, licence, each metric."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = _measured(metrics)
    protocol = (metrics or {}).get("protocol", {})
    model = _model(sae)
    data = ModelCardData(
        base_model=model if model and model.count("/") == 1 else None,
        library_name="saelens" if to == "saelens" else "saescope",
        license=license,
        tags=["sparse-autoencoder", "mechanistic-interpretability", kind_of(sae.config)],
        model_name=address.rpartition("/")[2] if measured else None,
        eval_results=[
            EvalResult(
                task_type="feature-extraction",
                dataset_type="activations",
                dataset_name=(
                    f"{protocol.get('split', 'held-out')} activations of {sae.metadata.get('site')}"
                ),
                dataset_revision=protocol.get("harvest"),
                metric_type=name,
                metric_name=_NAMES[name],
                metric_value=value,
            )
            for name, value in measured.items()
        ]
        or None,
    )
    return data.to_yaml().strip()


def _model(sae: SparseAutoencoder) -> str | None:
    model = sae.metadata.get("model_spec") or sae.metadata.get("model")
    return str(model) if model else None


def _sites(sae: SparseAutoencoder) -> list[str]:
    read = sae.metadata.get("sites") or [sae.metadata.get("site")]
    lines = [f"- site: {', '.join(f'`{site}`' for site in read)}"]
    target = sae.metadata.get("target_site")
    return [*lines, f"- predicts: `{target}`"] if target else lines


def _measured(metrics: dict[str, Any] | None) -> dict[str, float]:
    """The metrics by name, of both families."""
    if not metrics:
        return {}
    found = {**(metrics.get("reconstruction") or {}), **(metrics.get("downstream") or {})}
    return {name: float(found[name]) for name in _NAMES if found.get(name) is not None}


def _measured_lines(measured: dict[str, float], metrics: dict[str, Any] | None) -> list[str]:
    if not measured or metrics is None:
        return ["Nothing was measured when this was uploaded."]
    table = ["| metric | value |", "|---|---|"]
    table += [
        f"| {_NAMES[name]} | {value:.5g}{_interval(name, metrics)} |"
        for name, value in measured.items()
    ]
    protocol = metrics.get("protocol") or {}
    about = [f"- {name}: {value}" for name, value in protocol.items()]
    code = metrics.get("protocol_hash")
    said = f" (protocol {code[:12]})" if code else ""
    return [*table, "", f"On text that was held out of training{said}:", "", *about]


def _interval(name: str, metrics: dict[str, Any]) -> str:
    """What stands behind a metric that has an interval."""
    found = {**(metrics.get("reconstruction") or {}), **(metrics.get("downstream") or {})}
    key = f"{name}_interval"
    return f" {shown(found[key])}" if key in found else ""
