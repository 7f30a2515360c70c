"""SAEs that a metric has to rank below a trained one, and one that it has to rank above.

A metric that puts a control beside the trained SAE does not measure what training found:

* permuted: the trained SAE whose features write each other's directions;
* random: random decoder directions of the same lengths, the encoder along them;
* untrained: the same architecture and configuration at its start;
* pca: as many principal components as the trained SAE has features active on a row.

Families with texts of their own measure some controls themselves, beside the SAE
(`OwnTexts.controls`): there, random is as many of its features drawn by chance.

With planted data there is an oracle too: the true directions. `sae.evaluation.ranks` says how a
metric ranks them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.core.base import SparseAutoencoder
from sae.core.batch import TrainingBatch
from sae.evaluation.recovery import principal_directions
from saescope.errors import InputError


@torch.no_grad()
def controls(
    sae: SparseAutoencoder, rows: Tensor, *, seed: int = 0
) -> Iterator[tuple[str, SparseAutoencoder]]:
    """The controls of a trained SAE by name, one after another.

    rows: of the training split, [n, d_in], for PCA and for thresholds, which are set anew so that
    a control has the L0 that its configuration asks for.

    Raises InputError for an SAE of several sites, or one that reconstructs other activations than
    it reads.
    """
    if sae.site_normalisers or sae.transcodes or sae.d_in != sae.d_out:
        raise InputError(
            "controls are of an SAE of one site that reconstructs what it reads", where="controls"
        )
    generator = torch.Generator().manual_seed(seed)
    permuted = sae.clone()
    order = torch.randperm(sae.d_sae, generator=generator)
    _written(permuted).copy_(sae.decoder_directions()[order])
    yield "permuted", permuted
    random = sae.clone()
    drawn = torch.randn(sae.W_dec.shape, generator=generator).to(sae.W_dec)
    length = sae.W_dec.norm(dim=1, keepdim=True)
    _written(random).copy_(functional.normalize(drawn, dim=1) * length)
    random.W_enc_T.copy_(functional.normalize(drawn, dim=1) * sae.W_enc_T.norm(dim=1, keepdim=True))
    yield "random", _calibrated(random, rows)
    yield "untrained", _calibrated(_untrained(sae, rows, seed), rows)
    l0 = float(sae.encode_sparse(rows).compact().l0().double().mean())
    count = max(1, min(round(l0), sae.d_in))
    yield "pca", _projection(sae, principal_directions(rows, count), rows.double().mean(0))


def _projection(sae: SparseAutoencoder, directions: Tensor, mean: Tensor) -> SparseAutoencoder:
    """Orthonormal directions [count, d_in] as an SAE: its features are the coordinates along them,
    of either sign, and all of them are active."""
    found = AbsTopKSAE(AbsTopKConfig(d_sae=len(directions), k=len(directions)), sae.d_in)
    found.W_enc_T.copy_(directions)
    found.W_dec.copy_(directions)
    found.b_dec.copy_(mean)
    found.metadata.update(sae.metadata)
    return found.eval()


def _written(sae: SparseAutoencoder) -> Tensor:
    """The decoder's own weights; InputError where it is made of others."""
    parameter = dict(sae.named_parameters()).get("W_dec")
    if parameter is None:
        raise InputError(
            "the decoder of this architecture is made of other weights", where="controls"
        )
    return parameter


def _untrained(sae: SparseAutoencoder, rows: Tensor, seed: int) -> SparseAutoencoder:
    """An SAE as training of one like this would begin."""
    fresh = sae.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
        y = fresh.normaliser.apply(rows.float())
        fresh.start(TrainingBatch.of(y, variance=float(y.var(0).sum())))
    return fresh


def _calibrated(sae: SparseAutoencoder, rows: Tensor) -> SparseAutoencoder:
    sae.calibrate(lambda: iter([sae.normaliser.apply(rows.float())]))
    return sae
