"""At which layers the features of a multi-layer SAE are active (MLSAE, Lawson et al. 2024).

From activations a[l, t, j] of feature j on token t at layer l, a joint distribution of layer, token
and feature is defined, P(l, t, j) proportional to a[l, t, j]:
    P(L=l | j)    = sum_t a[l, t, j] / sum_l,t a[l, t, j]
    P(L=l | t, j) = a[l, t, j] / sum_l a[l, t, j]            where feature j is active on token t
    ratio         = E Var(L | T, J) / E Var(L | J), between 0 and 1 by the law of total variance
Near 0, a feature has one layer on one token, though which differs between tokens; near 1, a token
tells nothing more. Both are shown beside a null in which each token's layer labels are shuffled.

The authors' code averages over all pairs of token and feature, active or not, which is no
conditional variance; that version is given beside ours under "published", for comparison. It
depends on where layers are counted from (here 0) and on how often features fire:
    E_j E_t Var(L | t, j), an inactive pair counting 0
    E_j (q E[L^2 | j] - q^2 E[L | j]^2), q the fraction of tokens that j is active on
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae.analysis.similarity import cosines_with_others
from sae.core.batch import RawBatch
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from saescope.integers import as_index

_FEATURES = 1024


class Encoder(Protocol):
    """Anything that encodes rows to codes, as an SAE does."""

    d_sae: int

    def encode_sparse(self, x: Tensor) -> SparseCodes: ...


@dataclass(frozen=True, kw_only=True)
class LayerVariances:
    """Variances of the layer of an activation, in layers squared; layers count from 0."""

    single_token: float
    """E Var(L | T, J)"""
    aggregated: float
    """E Var(L | J)"""
    total: float
    """Var(L)"""
    ratio: float | None
    """single_token / aggregated; None if every feature keeps to one layer"""
    published_single_token: float
    """mean over all tokens and features, inactive pairs counting 0"""
    published_aggregated: float
    """mean over features of q E[L^2] - q^2 E[L]^2"""
    published_ratio: float | None
    """their ratio, as the authors' code has it"""


@dataclass(frozen=True, kw_only=True)
class LayerUseSummary:
    """What is reported of a multi-layer SAE."""

    tokens: int
    layers: int
    used_features: int
    """features active on any token at any layer"""
    layers_per_pair: float
    """mean number of layers at which a feature is active on a token where it is active at all"""
    mean_std: float
    """mean over used features of the standard deviation of L | j, in layers"""
    relative_std: float
    """mean_std over the number of layers"""
    variances: LayerVariances
    null: LayerVariances
    """the same with each token's layer labels shuffled"""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.used_features:,} used features, {self.layers} layers, {self.tokens:,} tokens",
            f"  std of a feature's layer  {self.mean_std:.3f} ({self.relative_std:.3f} of layers)",
            f"  layers active on a token  {self.layers_per_pair:.2f}",
        ]
        named = (("E Var(L|T,J) / E Var(L|J)", self.variances), ("  layers shuffled", self.null))
        for name, found in named:
            ratio = "undefined" if found.ratio is None else f"{found.ratio:.4f}"
            lines.append(
                f"  {name:<25} {ratio} = {found.single_token:.4f} / {found.aggregated:.4f}"
            )
        return lines


class LayerUse:
    """Sums over tokens that the distributions over layers are computed from.

    >>> use = LayerUse(d_sae=2, n_layers=2)
    >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    >>> use.add(codes, group=torch.tensor([0, 1]), row_token=torch.tensor([5, 5]))
    >>> use.probability().tolist()
    [[0.25, 0.0], [0.75, 1.0]]
    >>> use.expected_layer().tolist()
    [0.75, 1.0]
    """

    def __init__(self, d_sae: int, n_layers: int, *, seed: int = 0) -> None:
        self.d_sae = d_sae = as_index(d_sae, where="d_sae", low=1)
        self.n_layers = n_layers = as_index(n_layers, where="n_layers", low=1)
        self.tokens = 0
        self._sums = _Sums(d_sae, n_layers)
        self._shuffled = _Sums(d_sae, n_layers)
        self._generator = torch.Generator().manual_seed(as_index(seed, where="seed"))

    @property
    def totals(self) -> Float64[Tensor, "n_layers d_sae"]:
        """Sum over tokens of each feature's activation at each layer."""
        return self._sums.totals

    def add(
        self, codes: SparseCodes, group: Int64[Tensor, " rows"], row_token: Int64[Tensor, " rows"]
    ) -> None:
        """Add codes of rows, each of the layer `group` of the token `row_token`.

        All the rows of a token must come in one call. Raises InputError for a layer out of range, a
        row that comes twice, or a negative activation, which makes no probability.
        """
        found = _Entries.of(codes, group, row_token, self.n_layers)
        self.tokens += found.tokens
        self._sums.add(found)
        order = torch.rand(found.tokens, self.n_layers, generator=self._generator).argsort(1)
        self._shuffled.add(found.relabelled(order))

    def probability(self) -> Float64[Tensor, "n_layers d_sae"]:
        """P(L=l | j); 0 in the column of a feature that is never active."""
        return self.totals / self.totals.sum(0).clamp_min(torch.finfo(torch.float64).tiny)

    def expected_layer(self) -> Float64[Tensor, " d_sae"]:
        """E[L | j], by which features are sorted in a heat map; NaN for one never active."""
        return self._sums.moments()[0]

    def layer_variance(self) -> Float64[Tensor, " d_sae"]:
        """Var(L | j); NaN for a feature that is never active."""
        return self._sums.moments()[1]

    def summary(self) -> LayerUseSummary:
        """The figures to report. Raises InputError if no feature was ever active."""
        used = self.totals.sum(0) > 0
        if not used.any():
            raise InputError("no feature was active", where="LayerUse", given=self.tokens)
        std = float(self.layer_variance()[used].clamp_min(0).sqrt().mean())
        return LayerUseSummary(
            tokens=self.tokens,
            layers=self.n_layers,
            used_features=int(used.sum()),
            layers_per_pair=self._sums.entries / self._sums.pairs,
            mean_std=std,
            relative_std=std / self.n_layers,
            variances=self._sums.variances(self.tokens),
            null=self._shuffled.variances(self.tokens),
        )


@torch.no_grad()
def layer_use(
    sae: Encoder, batches: Iterable[RawBatch], n_layers: int, *, seed: int = 0
) -> LayerUse:
    """Layer use of an SAE over batches of all layers' rows (held-out rows of AllLayers).

    `seed` decides the null's shuffles. Raises InputError for batches without groups or tokens, and
    as `LayerUse.add`.

    >>> stream = make_stream(store, layers, mix_layers="all", batch_size=4096)  # doctest: +SKIP
    >>> use = layer_use(sae, stream.held_out(10_000)(), len(layers))  # doctest: +SKIP
    >>> use.summary().variances.ratio  # doctest: +SKIP
    """
    use = LayerUse(sae.d_sae, n_layers, seed=seed)
    for batch in batches:
        if batch.group is None or batch.row_token is None:
            raise InputError("batches must name each row's layer and token", where="layer_use")
        use.add(sae.encode_sparse(batch.x), batch.group, batch.row_token)
    return use


def token_layers(
    codes: SparseCodes,
    group: Int64[Tensor, " rows"],
    row_token: Int64[Tensor, " rows"],
    n_layers: int,
) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"], Float64[Tensor, "pairs n_layers"]]:
    """Token, feature and P(L=l | t, j) of each active pair, by token, then feature.

    Errors as of `LayerUse.add`.

    >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    >>> token, feature, p = token_layers(codes, torch.tensor([0, 1]), torch.tensor([5, 5]), 2)
    >>> token.tolist(), feature.tolist(), p.tolist()
    ([5, 5], [0, 1], [[0.25, 0.75], [0.0, 1.0]])
    """
    found = _Entries.of(codes, group, row_token, n_layers)
    key, pair = (found.token * codes.d_sae + found.feature).unique(return_inverse=True)
    p = torch.zeros(len(key), n_layers, dtype=torch.float64)
    p.index_put_((pair, found.layer), found.value, accumulate=True)
    token = row_token.unique()[key // codes.d_sae]
    return token, key % codes.d_sae, p / p.sum(1, keepdim=True)


def max_cosine(W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, " d_sae"]:
    """Largest cosine of each decoder row with any other row; its mean is the MMCS.

    Raises InputError for fewer than two rows.

    >>> max_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -3.0]])).tolist()
    [0.0, 0.0, 0.0]
    """
    if len(W_dec) < 2:
        raise InputError("needs two features or more", where="max_cosine", given=len(W_dec))
    blocks = cosines_with_others(W_dec.detach().float(), _FEATURES)
    return torch.cat([cosine.amax(1) for _, cosine in blocks])


@dataclass(frozen=True)
class _Entries:
    """The active (layer, token, feature) of some rows."""

    layer: Tensor
    token: Tensor
    """numbered from 0 in the order of row_token"""
    feature: Tensor
    value: Tensor
    """float64, above 0"""
    tokens: int

    @classmethod
    def of(cls, codes: SparseCodes, group: Tensor, row_token: Tensor, n_layers: int) -> "_Entries":
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < n_layers:
            raise InputError(
                "layer out of range",
                where="group",
                given=sorted(set(group.tolist())),
                allowed=f"0 to {n_layers - 1}",
            )
        codes = codes.compact()
        if (codes.value < 0).any():
            raise InputError(
                "negative activations have no law over layers",
                where="codes",
                given=float(codes.value.min()),
            )
        known, token = row_token.unique(return_inverse=True)
        if len((token * n_layers + group).unique()) < len(group):
            raise InputError("a token has two rows of one layer", where="row_token")
        rows = codes.rows()
        return cls(group[rows], token[rows], codes.index, codes.value.double(), len(known))

    def relabelled(self, order: Tensor) -> "_Entries":
        """The same with layer l of token t called order[t, l]."""
        layer = order[self.token, self.layer]
        return _Entries(layer, self.token, self.feature, self.value, self.tokens)


class _Sums:
    """Float64 sums whose ratios are the distributions over layers."""

    def __init__(self, d_sae: int, n_layers: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.totals = zeros(n_layers, d_sae)
        self.within = 0.0
        """sum over pairs of (mass of the pair) Var(L | t, j)"""
        self.pair_variance = 0.0
        """sum over pairs of Var(L | t, j)"""
        self.first, self.second = zeros(d_sae), zeros(d_sae)
        """sums over tokens of E[L | t, j] and E[L^2 | t, j]"""
        self.pairs = self.entries = 0

    def add(self, found: _Entries) -> None:
        d_sae = self.totals.shape[1]
        self.totals.index_put_((found.layer, found.feature), found.value, accumulate=True)
        key, pair = (found.token * d_sae + found.feature).unique(return_inverse=True)
        layer = found.layer.double()
        mass, first, second = (
            torch.zeros(len(key), dtype=torch.float64).index_add_(0, pair, found.value * power)
            for power in (torch.ones_like(layer), layer, layer.square())
        )
        mean, mean_square = first / mass, second / mass
        # below 0 only by rounding
        variance = (mean_square - mean.square()).clamp_min(0)
        self.within += float((mass * variance).sum())
        self.pair_variance += float(variance.sum())
        feature = key % d_sae
        self.first.index_add_(0, feature, mean)
        self.second.index_add_(0, feature, mean_square)
        self.pairs += len(key)
        self.entries += len(found.value)

    def moments(self) -> tuple[Tensor, Tensor]:
        """E[L | j] and Var(L | j), NaN where there is no mass."""
        layer = torch.arange(len(self.totals), dtype=torch.float64)[:, None]
        p = self.totals / self.totals.sum(0)
        mean = (p * layer).sum(0)
        return mean, (p * (layer - mean).square()).sum(0)

    def variances(self, tokens: int) -> LayerVariances:
        mass = self.totals.sum(0)
        whole = mass.sum()
        mean, variance = self.moments()
        used = mass > 0
        aggregated = float((mass[used] * variance[used]).sum() / whole)
        centre = (mass[used] * mean[used]).sum() / whole
        between = float((mass[used] * (mean[used] - centre).square()).sum() / whole)
        single = self.within / float(whole)
        published = self.pair_variance / (tokens * len(mass))
        unnormalised = self.second / tokens - (self.first / tokens).square()
        return LayerVariances(
            single_token=single,
            aggregated=aggregated,
            total=aggregated + between,
            ratio=single / aggregated if aggregated > 0 else None,
            published_single_token=published,
            published_aggregated=float(unnormalised.mean()),
            published_ratio=published / float(unnormalised.mean()) if unnormalised.any() else None,
        )
