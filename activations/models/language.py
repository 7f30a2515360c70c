"""Language models: load one by name or folder, read and replace activations, generate text."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from activations.models.config import DenoisingConfig, ModelConfig
from activations.models.files import (
    DTYPES,
    SPREAD,
    device_of,
    folder_of,
    hash_of_weights,
    resolve_dtype,
)
from activations.models.foreign_code import hash_of_code, loading
from activations.models.matmul_precision import Products, faster_products, multiplied_in
from activations.models.no_tokenizer import NoText
from activations.models.packaged import PACKAGED_MODELS
from activations.models.tokenizer import TextCodec, tokenizer_of
from activations.sites import names as vocabulary
from activations.sites.hf_facts import d_vocab, final_norm, longest_text, unembedding_matrix
from activations.sites.hooks import (
    EditFunction,
    PlacedEdit,
    by_position,
    run_until_captured,
    shapes_of,
    splicing,
)
from activations.sites.kept import Run, kept, positions_of, real_tokens
from activations.sites.modules import SiteMap
from saescope.errors import InputError, check_range
from saescope.integers import as_index, as_indices

if TYPE_CHECKING:
    from activations.corpora.packing import Sequences
    from activations.models.base import RawModel

_PLAIN = DenoisingConfig()


@overload
def load_model(
    spec: str,
    *,
    dtype: str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
) -> "Model": ...
@overload
def load_model(
    spec: str,
    *,
    dtype: str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    kind: str,
    diffusion: DenoisingConfig = ...,
) -> "Model | RawModel": ...
def load_model(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: str = "language",
    diffusion: DenoisingConfig = _PLAIN,
) -> "Model | RawModel":
    """Load a causal language model and its tokenizer, or a model of another kind.

    `spec` is a packaged model ("smollm2-135m", needs no hub), a local Hugging Face folder, or a hub
    name such as "gpt2" or "google/gemma-2-2b". dtype "auto" is the faster of float32 and bfloat16
    by a short measurement on the CPU, bfloat16 on CUDA. device "auto", "balanced" or "sequential"
    spreads a language model over the devices there are, as accelerate's device_map does.
    Code that comes with a model is run with trust_remote_code alone.

    Raises InputError if there is no such model, device or precision, or if it needs code of its own
    and that is not trusted.

    >>> model = load_model("smollm2-135m")  # doctest: +SKIP
    >>> model.generate("The capital of France is", max_new_tokens=2)  # doctest: +SKIP
    'The capital of France is Paris.'
    """
    ModelConfig(
        spec=spec, kind=kind, dtype=dtype, device=device, revision=revision, diffusion=diffusion
    )
    if PACKAGED_MODELS.get(spec, kind) != kind:
        raise InputError(
            f"{spec} is a model of another kind",
            where="model.kind",
            given=kind,
            allowed=PACKAGED_MODELS[spec],
        )
    place = device_of(device)
    precision = resolve_dtype(dtype, place)
    if kind != "language":
        from activations.models.base import load_raw_model

        raw = load_raw_model(
            kind, spec, revision, DTYPES[precision], device, diffusion, trusted=trust_remote_code
        )
        raw.products = faster_products(raw.dtype, raw.device)
        return raw
    folder, commit = folder_of(spec, revision, with_code=trust_remote_code)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spread = {"device_map": device} if device in SPREAD else {}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with loading(spec, folder, "causal language model", trusted=trust_remote_code):
        hf: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[precision], weights_only=True, **spread, **local
        )
        tokenizer = tokenizer_of(folder, lambda: AutoTokenizer.from_pretrained(folder, **local))
    hf.requires_grad_(requires_grad=False)
    hf = hf.eval() if spread else hf.to(place).eval()
    model = Model(hf, tokenizer, spec=spec, folder=folder, revision=commit)
    model.code_hash = hash_of_code(folder) if trust_remote_code else None
    model.products = faster_products(model.dtype, model.device)
    return model


class Model:
    """A causal language model with its tokenizer, and the sites of its activations.

    >>> model = load_model("smollm2-135m")  # doctest: +SKIP
    >>> tokens = torch.tensor([model.tokenize("A sparse code")])  # doctest: +SKIP
    >>> site = "blocks.9.hook_resid_post"
    >>> model.capture(tokens, [site])[site].shape  # doctest: +SKIP
    torch.Size([1, 4, 576])
    """

    def __init__(
        self, hf: Any, tokenizer: Any, *, spec: str, folder: Path, revision: str | None = None
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.spec = spec
        self.name = Path(spec).name if Path(spec).is_dir() else spec
        self.revision = revision
        self.folder = folder
        # parameters that wait on the disk or in main memory for their turn are "meta"
        here = [each for each in hf.parameters() if each.device.type != "meta"]
        self.dtype: torch.dtype = here[0].dtype
        self.device: torch.device = here[0].device
        self.products: Products = "own"
        self.code_hash: str | None = None
        self._text = (
            NoText(hf.config.get_text_config(), d_vocab(hf))
            if tokenizer is None
            else TextCodec(tokenizer)
        )
        self._sites = SiteMap(hf, spec)
        self._widths: dict[str, int] = {}
        config = hf.config.get_text_config()
        self.n_layers = self._sites.n_layers
        self.d_model = int(config.hidden_size)
        self.d_vocab = d_vocab(hf)
        self.n_ctx = longest_text(hf)
        """the most tokens of a text; None where the model sets no limit"""
        self.tokenizer_hash = self._text.hash
        self.bos_token_id = self._text.bos_token_id
        self.eos_token_id = self._text.eos_token_id
        self.special_token_ids = self._text.special_token_ids
        ends = hf.generation_config.eos_token_id
        self._ends = {self.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def dtype_name(self) -> str:
        """The precision, named as in configuration."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the model's weight files, whatever precision they were loaded in."""
        return hash_of_weights(self.folder)

    @cached_property
    def bridge(self) -> Any:
        """TransformerLens' TransformerBridge around the same weights, made on first use.

        It costs about a second and no second copy of the weights. It runs eager attention and is
        slower than `capture` (0.77 of its speed where measured): for what only it can do.
        """
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        tensors = [*self.hf.parameters(), *self.hf.buffers()]
        # the bridge replaces submodules in place: give it modules of its own, weights shared
        modules = copy.deepcopy(self.hf, {id(tensor): tensor for tensor in tensors})
        return build_bridge_from_module(
            modules,
            type(self.hf).__name__,
            hf_config=modules.config,
            tokenizer=copy.deepcopy(self.tokenizer),
            model_name=self.spec,
        )

    def sites(self, pattern: str = "*") -> list[str]:
        """Names of the sites that match a pattern (see activations.sites), in the model's order."""
        wanted = vocabulary.full_name(pattern)
        return [site for site in self._sites.names if vocabulary.matches(site, wanted)]

    def resolve(self, site: str | Sequence[str]) -> list[str]:
        """The sites that names or patterns stand for, each once.

        Raises InputError for a site this model does not have, naming the nearest that it has.
        """
        return self._sites.resolve([site] if isinstance(site, str) else site)

    def d_in(self, site: str) -> int:
        """Width of a site, found by running a token or two.

        Raises InputError for an unknown site, or a module whose activation has not one row a token.
        """
        if site in self._widths:
            return self._widths[site]
        if site.startswith(vocabulary.MODULE_PREFIX):
            self._widths[site] = self._module_width(site)
        else:
            token = torch.zeros(1, 1, dtype=torch.long)
            self._widths[site] = int(self.capture(token, [site])[site].shape[-1])
        return self._widths[site]

    def _module_width(self, site: str) -> int:
        tokens = self._checked(torch.zeros(3, 2, dtype=torch.long))
        with torch.no_grad():
            target = self._sites.target(site)
            shapes = shapes_of([target], lambda: self._run(tokens), tokens.shape)
        if shapes[site][:2] != tokens.shape:
            raise InputError(
                "this module's activation has not one row a token",
                where=site,
                given=f"{shapes[site]} of 3 sequences of 2 tokens",
            )
        return shapes[site][2]

    def _run(self, tokens: Tensor, attention_mask: Tensor | None = None) -> object:
        padding = self._padding(self.hf.base_model, tokens, attention_mask)
        return self.hf.base_model(input_ids=tokens, use_cache=False, **padding)

    def _padding(
        self, module: Any, tokens: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """How a module of transformers is told what is padding, and where each text begins."""
        if attention_mask is None:
            return {}
        real = real_tokens(tokens, attention_mask)
        if bool(real.all()):
            return {}
        takes = inspect.signature(module.forward).parameters
        if "attention_mask" not in takes:
            raise InputError(
                "this model takes no attention mask; run one text at a time", where=self.spec
            )
        found = {"attention_mask": real.long()}
        if "position_ids" in takes:
            found["position_ids"] = positions_of(real).clamp(min=0)
        return found

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[str],
        *,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """Activations at the sites, in the model's precision; nothing deeper is computed.

        Args: attention_mask [batch, pos] is 1 at tokens and 0 at padding, on whatever side, as a
        tokenizer gives it for texts of several lengths; each text's activations are then those that
        it has alone (those at padding mean nothing), and `keep_mask` with it says which count.

        Raises InputError for an unknown site, a wrong mask, or more positions than the model has.
        """
        tokens = self._checked(tokens)
        targets = [self._sites.target(site) for site in sites]
        if not targets:
            return {}
        with torch.no_grad(), multiplied_in(self.products):
            return run_until_captured(
                targets, lambda: self._run(tokens, attention_mask), tokens.shape
            )

    def inputs(self, group: "Sequences", chosen: NDArray[np.int64]) -> Int[Tensor, "batch pos"]:
        """The tokens of some sequences, without the padding that all of them have at the end."""
        longest = int((group.document[chosen] >= 0).sum(1).max())
        return torch.from_numpy(group.tokens[chosen][:, :longest])

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        attention_mask: Tensor | None = None,
        gradient: bool = False,
    ) -> Tensor:
        """Next-token logits [batch, pos, d_vocab]; `gradient`: differentiable in what edits put in.

        Args: attention_mask [batch, pos] is as for `capture`.

        Raises InputError for too many positions, or a wrong mask.
        """
        tokens = self._checked(tokens)
        padding = self._padding(self.hf, tokens, attention_mask)
        with torch.set_grad_enabled(gradient):
            return self.hf(input_ids=tokens, use_cache=False, **padding).logits

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise InputError(
                "tokens must be [batch, position]", where="tokens", given=tuple(tokens.shape)
            )
        if self.n_ctx is not None and tokens.shape[1] > self.n_ctx:
            raise InputError(
                "more positions than the model has",
                where=self.spec,
                given=tokens.shape[1],
                allowed=f"up to {self.n_ctx}",
            )
        return tokens.to(self.device, torch.long)

    @contextmanager
    def edit(self, edits: Mapping[str, EditFunction]) -> Iterator[None]:
        """Splice: while the context lasts, replace the activation at each site.

        Each function gets the activation [batch, position, d_in] and the positions [position] that
        tokens have in their texts (right under a KV cache too, in `generate` and in `hf.generate`),
        and returns the replacement of the same shape, or None to leave the very tensor alone. In a
        padded batch, whose rows begin at different places, positions are [batch, position], and -1
        at padding. Edits at one site nest: an inner context sees what the outer one made.

        Raises InputError for an unknown site or a replacement of another shape.

        >>> with model.edit({site: lambda x, position: 0 * x}):  # doctest: +SKIP
        ...     model.generate("The weather today")
        """
        with self.edit_placed({site: by_position(each) for site, each in edits.items()}):
            yield

    @contextmanager
    def edit_placed(self, edits: Mapping[str, PlacedEdit]) -> Iterator[None]:
        """`edit` with functions of the activation and its `Places`, which say what is kept."""
        targets = [(self._sites.target(site), function) for site, function in edits.items()]
        with splicing(self.hf, targets, Run(self.special_token_ids)):
            yield

    @property
    def codec(self) -> TextCodec | NoText:
        """What makes tokens of text, and text of tokens."""
        return self._text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS first where the model uses one."""
        return self._text.encode(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, without BOS."""
        return self._text.encode_batch(texts)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token's piece of the text; joined they are the whole text.

        A character spread over several tokens is shown by the last of them, the others show '';
        `store.vocabulary.join_partial` has the rule, and feature stores follow it.
        """
        return self._text.pieces(as_indices(ids, where="token_strings", low=0))

    def vocabulary(self) -> list[str | bytes]:
        """The text of every token id, by itself (bytes, for one that is part of a character)."""
        return self._text.vocabulary(self.d_vocab)

    def keep_mask(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> Bool[Tensor, "batch pos"]:
        """Which positions count in statistics, training and edits; see activations.sites.kept.

        Args: attention_mask [batch, pos] is as for `capture`; without, nothing is padding.
        """
        position = positions_of(real_tokens(tokens, attention_mask))
        return kept(tokens, position, self.special_token_ids)

    def unembedding(
        self,
    ) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_model"] | None]:
        """W_U in float32, and the final norm's scale if it has one (Gemma's 1 + weight counted).

        W_U has all that is linear between the last norm and the logits: Granite's division, the
        projection of a stream that is wider than the embeddings.

        Raises InputError for a model whose logits are not these two alone.
        """
        from activations.models.unembedding import Head

        Head(self)  # compares them with the model's own logits
        w_u = unembedding_matrix(self.hf)
        adapter = self._sites.adapter
        norm = final_norm(self.hf, adapter)
        weight: Any = getattr(norm, "weight", None)
        if weight is None:
            return w_u, None
        offset = 1.0 if getattr(adapter.cfg, "rmsnorm_uses_offset", False) else 0.0
        return w_u, weight.detach().float() + offset

    @property
    def final_norm_centres(self) -> bool:
        """Whether the final norm takes a vector's mean off it: a LayerNorm does, an RMSNorm not.

        Asked of the norm itself, by moving a vector along the direction that centring takes off.
        """
        name = self._sites.adapter.get_component_mapping()["ln_final"].name
        norm = self.hf.get_submodule(name)
        x = torch.linspace(-1, 2, self.d_model).square()
        like = next(norm.parameters(), self.hf.get_output_embeddings().weight)
        with torch.inference_mode():
            still, moved = norm(torch.stack([x, x + 1]).to(like)).float()
        return bool((moved - still).norm() < 0.05 * still.norm())

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Continue a prompt; the text of prompt and continuation (options: see `generate_ids`).

        >>> model.generate("The weather today", max_new_tokens=40)  # doctest: +SKIP
        """
        ids = self.generate_ids(prompt, **options)
        own = isinstance(prompt, str) and self._text.begins_with_bos(prompt)
        return self._text.decode(ids[1:] if ids[0] == self.bos_token_id and not own else ids)

    def generate_ids(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        use_cache: bool = True,
        stop_at_eos: bool = True,
    ) -> list[int]:
        """Continue a prompt; the token ids of prompt and continuation.

        temperature 0 takes the likeliest token; above, tokens are drawn, the same for one seed.
        Raises InputError for an empty prompt or one that leaves no room for the new tokens.
        """
        check_range("temperature", temperature, low=0)
        max_new_tokens = as_index(max_new_tokens, where="max_new_tokens", low=1)
        if isinstance(prompt, str):
            ids = self.tokenize(prompt)
        else:
            ids = as_indices(prompt, where="prompt", low=0, high=self.d_vocab - 1)
        if not ids:
            raise InputError("the prompt has no tokens", where="generate", given=prompt)
        if self.n_ctx is not None and len(ids) + max_new_tokens > self.n_ctx:
            raise InputError(
                "prompt and continuation are longer than the model's context",
                where="generate",
                given=len(ids) + max_new_tokens,
                allowed=f"up to {self.n_ctx}",
            )
        choose = _chooser(temperature, as_index(seed, where="seed"))
        past, new = None, ids
        for _ in range(max_new_tokens):
            # a model without a KV cache, or one of another kind, reads all of it again
            inputs = torch.tensor([ids if past is None else new], device=self.device)
            cached = {} if past is None else {"past_key_values": past}
            with torch.no_grad():
                out = self.hf(input_ids=inputs, use_cache=use_cache, **cached)
            past = getattr(out, "past_key_values", None) if use_cache else None
            new = [choose(out.logits[0, -1])]
            if stop_at_eos and new[0] in self._ends:
                break
            ids += new
        return ids


def _chooser(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """The rule that picks the next token from the logits."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        chances = (logits.float().cpu() / temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=generator))

    return choose
