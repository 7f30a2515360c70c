"""Checks that an existing harvest has the model and the settings that are asked for now."""

from typing import Any

from activations.harvesting.config import HarvestConfig
from activations.models.base import HarvestModel
from activations.models.config import stored
from activations.models.devices import own_device
from activations.models.load import load_model
from activations.storage.files import holds_another
from activations.storage.reader import ActivationStore
from saescope.artefact import MANIFEST
from saescope.config import from_dict, to_dict
from saescope.errors import InputError
from saescope.paths import AnyPath, exists


def check_same_settings(
    store: ActivationStore, config: HarvestConfig, may_differ: tuple[str, ...]
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


def check_same_model(model: HarvestModel, store: ActivationStore) -> None:
    """Raise InputError unless a harvest is of this very model, with the same inputs."""
    facts = store.manifest["model"]
    for name in ("weights_hash", "tokenizer_hash", "inputs_hash", "code_hash"):
        if name in facts and getattr(model, name) != facts[name]:
            raise InputError(
                f"the model is not the one this harvest began with ({name} differs)",
                where=str(store.path),
            )


def model_of(config: HarvestConfig, store: ActivationStore | None) -> HarvestModel:
    """The model of a configuration; of a harvest that is there, the same in the same precision.

    Raises InputError if it cannot be loaded, or is another one.
    """
    chosen = config.model
    dtype = chosen.dtype if store is None else store.manifest["model"]["dtype"]
    model = load_model(
        chosen.spec,
        dtype=dtype,
        device=own_device(chosen.device),
        revision=chosen.revision,
        kind=chosen.kind,
        diffusion=chosen.diffusion,
        trust_remote_code=chosen.trust_remote_code,
    )
    if store is not None:
        check_same_model(model, store)
        model.products = store.manifest["model"].get("products", "own")  # older ones do not say
    return model


def existing_harvest(config: HarvestConfig, out: AnyPath) -> ActivationStore | None:
    """The harvest that `out` already holds, if any; it must be of this configuration."""
    if not exists(out / MANIFEST):
        if holds_another(out):
            raise InputError("exists and holds no harvest; choose another folder", where=str(out))
        return None
    store = ActivationStore.open(out)
    check_same_settings(store, config, ("out",))
    return store
