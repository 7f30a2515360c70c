"""A run of a model that is cut where SAEs write, and gradients from any node back to the cuts.

What is written at a site, and the tokens' embeddings, become leaves: no gradient goes through them.
So the gradient of what a node reads, times what another node writes, is what comes straight from
one to the other: between them are only attention, norms and the residual stream, and they are
linear where they are held (`activations.models.frozen`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from activations import Model
from activations.models.frozen import frozen
from activations.sites.hooks import EditFunction
from sae.circuits.parts import Part

EMBEDDING = "hook_embed"
FINAL = "ln_final.hook_out"
"""what the unembedding reads"""


class CutRun:
    """One forward pass over a text, with the gradients of what is read at each site kept ready."""

    def __init__(
        self, model: Model, parts: Sequence[Part], tokens: Sequence[int], *, linear: bool
    ) -> None:
        """Run the model; `linear` holds attention patterns and norms' scales.

        Raises InputError for a model whose attention or norms cannot be held.
        """
        self._model = model
        self._parts = parts
        self._tokens = torch.tensor([list(tokens)])
        self.leaves: dict[str, Tensor] = {}
        """by written site, and of the embedding: [1, pos, d]"""
        self.read: dict[str, Tensor] = {}
        """what is read at each site [1, pos, d], as a function of the leaves"""
        self.from_biases: dict[str, Tensor] = {}
        """what is read at each site [pos, d] without any node: of a linear run"""
        with frozen(model, hold=linear) as held:
            with torch.enable_grad(), model.edit(self._edits(self.read, {})):
                held.run(self._tokens)
            if linear:
                held.check()
                found: dict[str, Tensor] = {}
                constants = {part.written: part.constant for part in parts}
                with torch.no_grad(), model.edit(self._edits(found, constants)):
                    held.run(self._tokens)
                self.from_biases = {site: x[0].float() for site, x in found.items()}

    def _edits(
        self, read: dict[str, Tensor], constants: Mapping[str, Tensor]
    ) -> dict[str, EditFunction]:
        """Edits that cut the run, and put what is read into `read`.

        Args: constants, if there are any, take the leaves' place, and 0 that of the embedding.
        """
        written = {part.written: part for part in self._parts}
        reading = {FINAL, *(part.read for part in self._parts)}

        def edit(x: Tensor, site: str) -> Tensor | None:
            if site in reading:
                read[site] = x
            if site not in written and site != EMBEDDING:
                return None
            skip = self._skip(written.get(site), read)
            if constants:
                other = constants.get(site)
                leaf = torch.zeros_like(x) if other is None else other[: x.shape[1]][None].to(x)
            else:
                leaf = (x if skip is None else x - skip).detach().clone().requires_grad_()
                self.leaves[site] = leaf
            return leaf if skip is None else leaf + skip

        return {
            site: lambda x, _position, site=site: edit(x, site)
            for site in (EMBEDDING, *written, *reading)
        }

    def _skip(self, part: Part | None, read: Mapping[str, Tensor]) -> Tensor | None:
        """What a linear path beside the features brings, where the SAE reads."""
        if part is None or part.skip is None:
            return None
        x = read[part.read]
        kept = self._model.keep_mask(self._tokens).to(x.device)
        return (x * kept[..., None]) @ part.skip.to(x.dtype)

    def gradients(self, site: str, position: Tensor, direction: Tensor) -> dict[str, Tensor]:
        """Of x[position] . direction at a site, with respect to each leaf before it.

        Args: position [batch] and direction [batch, d] have a node a row.

        Returns [batch, pos, d] in float32 by the leaf's site.
        """
        x = self.read[site]
        rows = torch.arange(len(position), device=x.device)
        outputs = torch.zeros(len(position), *x.shape, dtype=x.dtype, device=x.device)
        outputs[rows, 0, position.to(x.device)] = direction.to(x)
        found = torch.autograd.grad(
            x,
            list(self.leaves.values()),
            grad_outputs=outputs,
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        pairs = zip(self.leaves, found, strict=True)
        return {name: each[:, 0].float() for name, each in pairs if each is not None}
