"""Tuned lens: an affine map of each layer's residual stream to the last layer's (Belrose et al.
2023), as MLSAE trains on it (Lawson et al. 2024).

    lens_l(h) = h + A_l h + b_l      trained to minimise  E KL(final logits || head(lens_l(h)))
    inverse   = (I + A_l)^-1 (h' - b_l)

with the model's own final norm and unembedding as head. An SAE trained behind a lens is measured
on both sides of the inverse: FVU before it (in the lens's space), the model's loss after it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from activations import ActivationLoader, ActivationStore, Model
from activations.loading.unshuffled import aligned_rows
from activations.models.unembedding import Unembedding
from sae.analysis.layers import residual_sites
from sae.evaluation.divergence import divergence_terms
from saescope.artefact import MANIFEST, atomic_path, read_manifest, sha256_json, write_manifest
from saescope.config import Config, to_dict
from saescope.errors import ArtefactError, InputError, check_range
from saescope.metrics import metric
from saescope.paths import local
from saescope.progress import Progress
from saescope.replacing import Kind, only_files
from saescope.seals import check_files, seals_of
from saescope.system import system_errors

KIND, SCHEMA, SEALED_SINCE = "lens", 2, 2
WEIGHTS = "weights.safetensors"


def _is_lens(folder: Path) -> bool:
    read_manifest(folder, kind=KIND, schema=SCHEMA)
    return only_files(folder, (MANIFEST, WEIGHTS))


_LENS = Kind("a lens", _is_lens)
LARGEST_CONDITION = 1e7
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class LensConfig(Config):
    """How to train tuned lenses."""

    steps: int = 250
    """Optimiser steps."""
    tokens: int = 256
    """Tokens a step, drawn from the harvest; each costs one unembedding a site."""
    lr: float = 1e-3
    """Peak learning rate of Adam; it falls linearly to 0."""
    seed: int = 0
    """Order of the tokens."""
    evaluation_tokens: int = 1024
    """Held-out tokens on which the divergence is measured before and after."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "evaluation_tokens"):
            check_range(f"lens.{name}", getattr(self, name), low=1)
        check_range("lens.lr", self.lr, above=0)
        check_range("lens.seed", self.seed, low=0)


class TunedLens:
    """An affine map for each of some sites, and its exact inverse.

    Args: A [site, d, d] and b [site, d]; metadata is what its manifest says.

    >>> lens = TunedLens(("a",), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.ones(1, 2))
    >>> lens.apply("a", torch.tensor([[3.0, 4.0]])).tolist()
    [[7.0, 5.0]]
    >>> lens.invert("a", torch.tensor([[7.0, 5.0]])).tolist()
    [[3.0, 4.0]]
    """

    def __init__(
        self,
        sites: Sequence[str],
        A: Float[Tensor, "site d d"],
        b: Float[Tensor, "site d"],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.A, self.b = A.detach(), b.detach()
        self.metadata = metadata or {}
        width = b.shape[-1]
        expected = ((len(self.sites), width, width), (len(self.sites), width))
        if (tuple(A.shape), tuple(b.shape)) != expected:
            raise InputError(
                "A must be [site, d, d] and b [site, d]",
                where="TunedLens",
                given=(tuple(A.shape), tuple(b.shape)),
            )
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def identity(cls, sites: Sequence[str], d: int) -> "TunedLens":
        """A lens that changes nothing (the logit lens)."""
        return cls(sites, torch.zeros(len(sites), d, d), torch.zeros(len(sites), d))

    @property
    def hash(self) -> str:
        """sha256 of sites and weights."""
        digest = hashlib.sha256(sha256_json(list(self.sites)).encode())
        for tensor in (self.A, self.b):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def apply(self, site: str, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """x + A x + b, in the precision of x. Raises InputError for a site without a lens."""
        n = self._number(site)
        return x + functional.linear(x, self.A[n].to(x), self.b[n].to(x))

    def invert(self, site: str, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """(I + A)^-1 (x - b), solved in float64, in the precision of x.

        Raises InputError for a site without a lens, or one that cannot be inverted: the condition
        number of I + A is above 1e7.
        """
        n = self._number(site)
        if site not in self._factors:
            self._factors[site] = self._factor(n)
        moved = (x.double() - self.b[n].to(x.device, torch.float64)).T
        lu, pivots = (each.to(x.device) for each in self._factors[site])
        return torch.linalg.lu_solve(lu, pivots, moved).T.to(x.dtype)

    def condition(self, site: str) -> float:
        """Condition number of I + A; infinite where it is singular."""
        return float(torch.linalg.cond(self._matrix(self._number(site))))

    def around(
        self, site: str, replacement: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """A function of rows seen through the lens, as one of the model's own rows.

        For splicing an SAE trained behind the lens: rows go through the lens, the SAE and the
        inverse. Raises InputError as `invert`.

        >>> model.edit({site: replace(lens.around(site, lambda x: sae(x).x_hat))})  # doctest: +SKIP
        """
        self._number(site)
        return lambda x: self.invert(site, replacement(self.apply(site, x)))

    def save(self, folder: str | Path, *, replace: bool = False) -> None:
        """Write weights and manifest; with `replace`, over a lens that is there.

        Raises InputError for anything else that is there, ArtefactError if the disk is full.
        """
        holder = atomic_path(local(folder), _LENS, replace=replace)
        with system_errors(str(folder)), holder as temporary:
            temporary.mkdir()
            tensors = {"A": self.A.contiguous(), "b": self.b.contiguous()}
            save_file(tensors, temporary / WEIGHTS)
            write_manifest(
                temporary,
                kind=KIND,
                schema=SCHEMA,
                config=self.metadata.get("config", {}),
                parent=self.metadata.get("harvest_hash"),
                sealed=True,
                sites=list(self.sites),
                metadata=self.metadata,
                files=seals_of(temporary, [WEIGHTS]),
            )

    @classmethod
    def load(cls, folder: str | Path) -> "TunedLens":
        """Read what `save` wrote. ArtefactError if it is missing, damaged, or newer."""
        folder = local(folder)
        manifest = read_manifest(folder, kind=KIND, schema=SCHEMA, sealed_since=SEALED_SINCE)
        if manifest["schema"] >= SEALED_SINCE:
            check_files(folder, manifest, [WEIGHTS], "lens")
        try:
            tensors = load_file(Path(folder) / WEIGHTS)
            return cls(manifest["sites"], tensors["A"], tensors["b"], manifest["metadata"])
        except (OSError, SafetensorError, KeyError, InputError) as error:
            raise ArtefactError(f"damaged lens: {error}", where=str(folder)) from error

    def _number(self, site: str) -> int:
        if site not in self.sites:
            raise InputError("no lens for this site", where="lens", given=site, allowed=self.sites)
        return self.sites.index(site)

    def _matrix(self, n: int) -> Tensor:
        a = self.A[n].double()
        return a + torch.eye(len(a), dtype=torch.float64, device=a.device)

    def _factor(self, n: int) -> tuple[Tensor, Tensor]:
        site = self.sites[n]
        condition = self.condition(site)
        if not condition <= LARGEST_CONDITION:
            raise InputError(
                "this lens cannot be inverted: I + A is singular or nearly so",
                where=site,
                given=f"condition number {condition:.3g}",
                allowed=f"up to {LARGEST_CONDITION:.0e}",
            )
        lu, pivots = torch.linalg.lu_factor(self._matrix(n))
        return lu, pivots


def train_lens(
    model: Model,
    store: ActivationStore,
    sites: Sequence[str] | None = None,
    config: LensConfig | None = None,
) -> TunedLens:
    """Train a lens for each site of a harvest (by default all residual streams behind blocks).

    The harvest must hold the last block's residual stream, which gives the targets; that site's
    own lens is the identity. metadata has the held-out divergence before and after ("kl"), where
    there are held-out rows, and the condition numbers.

    Raises InputError if the harvest is of another model or lacks the last block's residual stream,
    or a site is unknown or of another width.

    >>> lens = train_lens(model, store)  # doctest: +SKIP
    >>> lens.save("data/lens")  # doctest: +SKIP
    """
    config = config or LensConfig()
    names = tuple(sites) if sites is not None else residual_sites(store, include_last=True)
    head = Unembedding(model)
    _check(model, store, names, head)
    trained = [site for site in names if site != head.site]
    lens = TunedLens.identity(names, model.d_model)
    if trained:
        A, b = _fit(head, store, trained, model.d_model, config)
        for site, a, offset in zip(trained, A, b, strict=True):
            lens.A[names.index(site)], lens.b[names.index(site)] = a, offset
    kl = None
    if store.n_rows("held_out"):
        before, after = (
            divergence(model, store, names, through, rows=config.evaluation_tokens)
            for through in (None, lens)
        )
        kl = {site: {"without": before[site], "with": after[site]} for site in names}
    conditions = {site: lens.condition(site) for site in names}
    lens.metadata = {
        "config": to_dict(config),
        "model": store.manifest["model"]["name"],
        "weights_hash": model.weights_hash,
        "harvest_hash": store.hash,
        "kl": kl,
        "condition": {s: c if c < float("inf") else None for s, c in conditions.items()},
    }
    return lens


@torch.no_grad()
def divergence(
    model: Model,
    store: ActivationStore,
    sites: Sequence[str],
    lens: TunedLens | None = None,
    *,
    split: str = "held_out",
    rows: int | None = 1024,
) -> dict[str, float]:
    """E KL(final logits || head(x)) of each site in nats a token; with a lens, of lens(x).

    Raises InputError if there are no rows, and as `train_lens`.
    """
    head = Unembedding(model)
    _check(model, store, sites, head)
    total, count = torch.zeros(len(sites), dtype=torch.float64), 0
    read = list(dict.fromkeys([*sites, head.site]))
    pieces = aligned_rows(store, read, split=split, limit=rows, piece=_ROWS, spread=True)
    for by_site, _ in pieces:
        at = dict(zip(read, by_site, strict=True))
        target = head(at[head.site]).log_softmax(-1)
        seen = (lens.apply(site, at[site]) if lens else at[site] for site in sites)
        total += torch.stack([_kl(target, head(x)).double().sum() for x in seen])
        count += len(target)
    if count == 0:
        raise InputError("no rows to measure", where="divergence", given=split)
    return dict(zip(sites, (total / count).tolist(), strict=True))


def _check(model: Model, store: ActivationStore, sites: Iterable[str], head: Unembedding) -> None:
    known = store.manifest["model"]["weights_hash"]
    if known is not None and known != model.weights_hash:
        raise InputError("was harvested from another model", where=str(store.path))
    if head.site not in store.sites:
        raise InputError(
            "the harvest lacks the last block's residual stream, which gives the targets",
            where=str(store.path),
            given=store.sites,
            allowed=head.site,
        )
    for site in sites:
        if store.d_in(site) != model.d_model:
            raise InputError(
                "a lens is for residual streams",
                where=site,
                given=store.d_in(site),
                allowed=str(model.d_model),
            )


@torch.enable_grad()
def _fit(
    head: Unembedding, store: ActivationStore, sites: Sequence[str], d: int, config: LensConfig
) -> tuple[Tensor, Tensor]:
    """A [site, d, d] and b [site, d] after training."""
    A = [torch.zeros(d, d, requires_grad=True) for _ in sites]
    b = [torch.zeros(d, requires_grad=True) for _ in sites]
    optimiser = torch.optim.Adam([{"params": A, "lr": config.lr}])
    for site, offset in zip(sites, b, strict=True):
        # a step of A moves a row by about lr sqrt(d) of its size; b is to move no slower
        scale = store.statistics(site).mean_square ** 0.5
        optimiser.add_param_group({"params": [offset], "lr": config.lr * scale})
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=config.steps)
    loader = ActivationLoader(
        store, [*sites, head.site], batch_size=config.tokens, seed=config.seed
    )
    with Progress("tuning lenses", config.steps, "steps") as progress:
        for _, (*rows, last) in zip(range(config.steps), loader, strict=False):
            with torch.no_grad():
                target = head(last).log_softmax(-1)
            optimiser.zero_grad(set_to_none=True)
            total = 0.0
            # one site at a time: logits are the largest thing in memory
            for x, a, offset in zip(rows, A, b, strict=True):
                loss = _kl(target, head(x + functional.linear(x, a, offset))).mean()
                loss.backward()
                total += float(loss.detach())
            optimiser.step()
            schedule.step()
            progress.advance(1, metric("kl").text(total / len(sites)))
    return torch.stack(A).detach(), torch.stack(b).detach()


def _kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) of each row; target is log-probabilities."""
    return divergence_terms(target, logits.log_softmax(-1)).sum(-1)
