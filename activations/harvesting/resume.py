"""A harvest that is there already, against the model and the settings that are asked for now."""

from typing import TYPE_CHECKING, Any

from activations.models.config import stored
from activations.storage.reader import ActivationStore
from saescope.artefact import MANIFEST
from saescope.config import from_dict, to_dict
from saescope.errors import InputError

if TYPE_CHECKING:
    from activations.harvesting.pipeline import HarvestConfig


def check_same_settings(
    store: ActivationStore, config: "HarvestConfig", may_differ: tuple[str, ...]
) -> None:
    """Raise InputError if a store was harvested with other settings, each of them named."""
    out = store.path
    if not store.harvested:
        raise InputError(
            "holds activations that were brought, not harvested; choose another out", where=str(out)
        )
    recorded = from_dict(type(config), store.manifest["config"], str(out / MANIFEST))
    there, here = (
        _flat({k: v for k, v in stored(to_dict(each)).items() if k not in may_differ})
        for each in (recorded, config)
    )
    names = [n for n in {**there, **here} if there.get(n) != here.get(n)]
    if names:
        what = ", ".join(f"{n} is {there.get(n)!r} there and {here.get(n)!r} here" for n in names)
        raise InputError(
            f"holds a harvest of another configuration: {what}. Choose another out, or remove it",
            where=str(out),
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        flat |= {} if isinstance(value, dict) else {prefix + name: value}
    return flat
