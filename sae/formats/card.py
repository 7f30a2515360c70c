"""The model card of an uploaded SAE: what it is, of what, and what it measures, and how."""

from typing import Any

from sae.core.base import SparseAutoencoder, kind_of
from sae.evaluation.written import measured_values, rows_of
from saescope import __version__
from saescope.config import to_dict
from saescope.metrics import Metric, measured_rows, shown_with_interval


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
        *_measured_lines(metrics or {}),
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

    values, measured = _measured(metrics or {})
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
                metric_type=row.name,
                metric_name=row.title,
                metric_value=float(values[row.name]),
            )
            for row in measured
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


def _measured(metrics: dict[str, Any]) -> tuple[dict[str, Any], list[Metric]]:
    """What was measured by name, and the rows of the metrics that have a value and stand alone."""
    values = measured_values(metrics)
    rows = measured_rows(values, rows_of(metrics))
    return values, [row for row in rows if not row.minor and values[row.name] is not None]


def _measured_lines(metrics: dict[str, Any]) -> list[str]:
    values, measured = _measured(metrics)
    if not measured:
        return ["Nothing was measured when this was uploaded."]
    table = ["| metric | value | what it is |", "|---|---|---|"]
    table += [
        f"| {_cell(row.title)} | {shown_with_interval(row, values)} | {_cell(row.about)} |"
        for row in measured
    ]
    protocol = metrics.get("protocol") or {}
    about = [f"- {name}: {value}" for name, value in protocol.items()]
    code = metrics.get("protocol_hash")
    said = f" (protocol {code[:12]})" if code else ""
    return [*table, "", f"On text that was held out of training{said}:", "", *about]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
