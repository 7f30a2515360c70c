"""A model that was loaded elsewhere, as one of ours: of transformers, or a TransformerBridge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from activations.models.base import HarvestModel
from activations.models.language import Model
from activations.models.tokenizer import tokenizer_of
from activations.sites import names as vocabulary
from activations.sites.hooks import HookTarget, PositionedEdit, run_until_captured, splicing
from activations.sites.kept import Run
from saescope.errors import InputError

_KNOWN: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()


class LoadedModel(Model):
    """A model of transformers that its owner loaded, and may have changed since.

    No hash of its weights is claimed, so an SAE cannot be checked against them.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any) -> None:
        spec = str(getattr(hf.config, "name_or_path", "") or type(hf).__name__)
        super().__init__(hf, tokenizer, spec=spec, folder=Path(spec))
        if tokenizer is None:
            self.tokenizer_hash = ""
            ends = vars(getattr(hf, "generation_config", None) or object)
            found = [ends.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
            ids = [i for each in found for i in (each if isinstance(each, list) else [each])]
            known = {i for i in ids if isinstance(i, int) and 0 <= i < self.d_vocab}
            self.special_token_ids = self.special_token_ids | known

    @cached_property
    def weights_hash(self) -> str:
        """Not known."""
        return ""


class BridgedModel:
    """A TransformerBridge of TransformerLens, edited at its own hook points."""

    weights_hash = tokenizer_hash = ""

    def __init__(self, bridge: Any) -> None:
        self.hf = bridge
        self.name = self.spec = str(bridge.cfg.model_name)
        tokenizer = bridge.tokenizer
        self.bos_token_id = getattr(tokenizer, "bos_token_id", None)
        self.special_token_ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._widths: dict[str, int] = {}

    def resolve(self, site: str | Sequence[str]) -> list[str]:
        """The names of hook points. InputError for one that the bridge does not have."""
        wanted = [site] if isinstance(site, str) else list(site)
        for name in wanted:
            self._target(name)
        return wanted

    def _target(self, site: str) -> HookTarget:
        point = self.hf.hook_dict.get(site)
        if point is None:
            raise vocabulary.unknown_site(site, list(self.hf.hook_dict), where=self.name)
        return HookTarget(site=site, module=point, side="output")

    def d_in(self, site: str) -> int:
        """Width of a site, found by running a token."""
        if site not in self._widths:
            token = torch.zeros(1, 1, dtype=torch.long, device=next(self.hf.parameters()).device)
            with torch.no_grad():
                found = run_until_captured([self._target(site)], lambda: self.hf(token))
            self._widths[site] = found[site].shape[-1]
        return self._widths[site]

    @contextmanager
    def edit_with_positions(self, edits: Mapping[str, PositionedEdit]) -> Iterator[None]:
        """See `Model.edit_with_positions`."""
        targets = [(self._target(site), function) for site, function in edits.items()]
        with splicing(self.hf, targets, Run(self.special_token_ids)):
            yield


def model_around(model: Any, tokenizer: Any = None) -> Any:
    """A model of ours as it is; one of transformers, or a TransformerBridge, as one.

    Args: tokenizer is for a model of transformers, and says which tokens are special; without it,
    the one in the folder it was loaded from, if that is there, or else the tokens that the model's
    configuration names.

    Raises InputError for what is none of these, or an architecture without sites.

    >>> model_around(AutoModelForCausalLM.from_pretrained(folder))  # doctest: +SKIP
    """
    if isinstance(model, HarvestModel | BridgedModel):
        return model
    bridged = hasattr(model, "hook_dict") and hasattr(model, "original_model")
    of_transformers = isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")
    if not (bridged or of_transformers):
        raise InputError(
            "is no language model",
            where="model",
            given=type(model).__name__,
            allowed="of activations.load_model, of transformers, or a TransformerBridge",
        )
    if model not in _KNOWN or tokenizer is not None:
        _KNOWN[model] = (
            BridgedModel(model) if bridged else LoadedModel(model, tokenizer or _tokenizer(model))
        )
    return _KNOWN[model]


def _tokenizer(hf: Any) -> Any:
    folder = Path(str(getattr(hf.config, "name_or_path", "")))
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return tokenizer_of(
        folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True)
    )
