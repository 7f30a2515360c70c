"""Language models: load one by name or folder, read and replace activations, generate text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from activations.corpora.documents import CorpusConfig, Document, DocumentStream
from activations.corpora.packing import pack
from activations.corpora.sequences import PLAIN, PackingCounts, PackingOptions, Sequences
from activations.models.base import HarvestModel
from activations.models.generation import check_room, chooser, continued
from activations.models.hf import bridge_around, padding_arguments
from activations.models.matmul_precision import multiplied_in
from activations.models.no_tokenizer import NoText
from activations.models.tokenizer import TextCodec
from activations.models.unembedding import final_norm_centres, unembedding_and_scale
from activations.sites import names as vocabulary
from activations.sites.hf_facts import d_vocab, longest_text
from activations.sites.hooks import (
    EditFunction,
    PositionedEdit,
    by_position,
    run_until_captured,
    shapes_of,
    splicing,
)
from activations.sites.kept import Run, kept, positions_of, real_tokens
from activations.sites.modules import SiteMap
from saescope.errors import InputError, check_range
from saescope.integers import as_index, as_indices


class Model(HarvestModel):
    """A causal language model with its tokenizer, and the sites of its activations.

    >>> model = load_model("smollm2-135m")  # doctest: +SKIP
    >>> tokens = torch.tensor([model.tokenize("A sparse code")])  # doctest: +SKIP
    >>> site = "blocks.9.hook_resid_post"
    >>> model.capture(tokens, [site])[site].shape  # doctest: +SKIP
    torch.Size([1, 4, 576])
    """

    kind = "language"

    def __init__(
        self, hf: Any, tokenizer: Any, *, spec: str, folder: Path, revision: str | None = None
    ) -> None:
        super().__init__(hf, spec=spec, folder=folder, revision=revision)
        self.hf = hf
        self.tokenizer = tokenizer
        self._text = (
            NoText(hf.config.get_text_config(), d_vocab(hf))
            if tokenizer is None
            else TextCodec(tokenizer)
        )
        self._sites = self.site_map = SiteMap(hf, spec)
        """which sites it has, and how each is read"""
        self._widths: dict[str, int] = {}
        config = hf.config.get_text_config()
        self.n_layers = self.site_map.n_layers
        self.adapter: Any = self.site_map.adapter
        """TransformerLens' adapter of this architecture: which module is which component"""
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

    def facts(self) -> dict[str, Any]:
        """What a harvest's manifest says of the model."""
        return {
            "name": self.name,
            "kind": self.kind,
            "spec": self.spec,
            "revision": self.revision,
            "weights_hash": self.weights_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "dtype": self.dtype_name,
            "products": self.products,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "special_token_ids": sorted(self.special_token_ids),
            **({"code_hash": self.code_hash} if self.code_hash else {}),
            "n_ctx": self.n_ctx,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "d_vocab": self.d_vocab,
        }

    @cached_property
    def bridge(self) -> Any:
        """TransformerLens' TransformerBridge around the same weights, made on first use.

        It costs a second, no second copy of the weights, and is slower than `capture` (0.77 of its
        speed where measured), as its attention is eager: for what only it can do.
        """
        return bridge_around(self.hf, self.tokenizer, self.spec)

    def sites(self, pattern: str = "*") -> list[str]:
        """Names of the sites that match a pattern (see activations.sites), in the model's order."""
        wanted = vocabulary.full_name(pattern)
        return [site for site in self._sites.names if vocabulary.matches(site, wanted)]

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
        padding = padding_arguments(self.hf.base_model, tokens, attention_mask, self.spec)
        return self.hf.base_model(input_ids=tokens, use_cache=False, **padding)

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

    def documents(
        self, corpus: CorpusConfig, *, first: int = 0, state: Any = None
    ) -> DocumentStream:
        """The documents of a corpus: chats rendered, and tokens spelled, as the tokenizer does."""
        render, spell = self._text.render_chat, self._text.spell
        return DocumentStream(corpus, render=render, spell=spell, first=first, state=state)

    def sequences(
        self,
        documents: Iterable[Document],
        *,
        context: int,
        per_group: int,
        counts: PackingCounts,
        limit: int | None = None,
        packing: PackingOptions = PLAIN,
    ) -> Iterator[Sequences]:
        """Packed sequences (`activations.corpora.packing`); BOS first where the tokenizer adds one.

        Raises InputError for a BOS or an EOS that is asked for and that the tokenizer has not.
        """
        return pack(
            documents,
            self.tokenize_batch,
            bos=self._first_token(packing.prepend_bos),
            eos=self.eos_token_id,
            context=context,
            per_group=per_group,
            counts=counts,
            limit=limit,
            packing=packing,
        )

    def _first_token(self, wanted: bool | None) -> int | None:
        """The token that each sequence starts with, if any."""
        if wanted is None or (wanted and self.bos_token_id is not None):
            return self.bos_token_id
        found = self.tokenizer.bos_token_id if wanted else None
        if wanted and found is None:
            raise InputError("this model's tokenizer has no BOS", where="prepend_bos", given=wanted)
        return found

    def example(self, count: int, positions: int | None = None) -> Int[Tensor, "batch pos"]:
        """Tokens of no meaning."""
        return torch.arange(positions or 2).repeat(count, 1) % self.d_vocab

    def check_rows(self, sites: Sequence[str], rows: str, context: int) -> None:
        """Raise InputError unless a sequence can have so many positions; all sites have these."""
        del sites, rows
        if context < 2 or (self.n_ctx is not None and context > self.n_ctx):
            raise InputError(
                f"longer than the context of {self.name}" if context > 1 else "too short",
                where="context",
                given=context,
                allowed="at least 2" if self.n_ctx is None else f"2 to {self.n_ctx}",
            )

    def rows_per_sequence(self, rows: str, context: int) -> int:
        """The most rows that a sequence has: its first position has none."""
        return 1 if rows == "mean" else context - 1

    def inputs(self, group: Sequences, chosen: NDArray[np.int64]) -> Int[Tensor, "batch pos"]:
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
        padding = padding_arguments(self.hf, tokens, attention_mask, self.spec)
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
        padded batch, whose rows begin at different positions, they are [batch, position], and -1
        at padding. Edits at one site nest: an inner context sees what the outer one made.

        Raises InputError for an unknown site or a replacement of another shape.

        >>> with model.edit({site: lambda x, position: 0 * x}):  # doctest: +SKIP
        ...     model.generate("The weather today")
        """
        with self.edit_with_positions({site: by_position(each) for site, each in edits.items()}):
            yield

    @contextmanager
    def edit_with_positions(self, edits: Mapping[str, PositionedEdit]) -> Iterator[None]:
        """`edit` with functions of the activation and its `TokenPositions`, which know the kept."""
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
        return unembedding_and_scale(self)

    @property
    def final_norm_centres(self) -> bool:
        """Whether the final norm takes a vector's mean off it: a LayerNorm does, an RMSNorm not."""
        return final_norm_centres(self)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Continue a prompt; the text of prompt and continuation (options: see `generate_ids`).

        >>> model.generate("The weather today", max_new_tokens=40)  # doctest: +SKIP
        """
        ids = self.generate_ids(prompt, **options)
        own = isinstance(prompt, str) and self._text.begins_with_bos(prompt)
        return self._text.decode(ids[1:] if ids[0] == self.bos_token_id and not own else ids)

    def generate_ids(self, prompt: str | Sequence[int], **options: Any) -> list[int]:
        """The token ids of a prompt and its continuation (options: see `stream_ids`)."""
        ids = self._prompt_ids(prompt)
        return [*ids, *self.stream_ids(ids, **options)]

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        is_text = isinstance(prompt, str)
        known: Any = {"where": "prompt", "low": 0, "high": self.d_vocab - 1}
        ids = self.tokenize(prompt) if is_text else as_indices(prompt, **known)
        if not ids:
            raise InputError("the prompt has no tokens", where="generate", given=prompt)
        return ids

    def stream_ids(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        use_cache: bool = True,
        stop_at_eos: bool = True,
    ) -> Iterator[int]:
        """Continue a prompt; each token id of the continuation as soon as it is known.

        temperature 0 takes the likeliest token; above, tokens are drawn, the same for one seed.
        Raises InputError for an empty prompt or one that leaves no room for the new tokens.

        >>> for token in model.stream_ids("The weather"):  # doctest: +SKIP
        ...     print(*model.token_strings([token]))
        """
        check_range("temperature", temperature, low=0)
        max_new_tokens = as_index(max_new_tokens, where="max_new_tokens", low=1)
        ids = self._prompt_ids(prompt)
        check_room(self.n_ctx, len(ids) + max_new_tokens)
        return continued(
            self.hf,
            ids,
            new_tokens=max_new_tokens,
            choose=chooser(temperature, as_index(seed, where="seed")),
            ends=self._ends,
            device=self.device,
            use_cache=use_cache,
            stop_at_eos=stop_at_eos,
        )
