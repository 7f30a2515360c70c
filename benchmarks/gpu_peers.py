"""Training steps of other libraries on a GPU, where they can be imported (`benchmarks.gpu_step`).

Each at the weights of the inputs, with Adam, by the calls that the library's own trainer makes.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sae.bench.dense import LR
from sae.bench.inputs import Inputs

Step = Callable[[Tensor], float]
"""a training step on rows [batch, d_in]: the fraction of variance it left unexplained"""


def peers(k: int, *, autocast: bool) -> Iterator[tuple[str, Callable[[Inputs], Step]]]:
    """Names of the libraries that are here and of their settings, and what makes their steps."""
    if find_spec("sparsify"):
        yield "sparsify", lambda inputs: _sparsify(inputs, k)
    if find_spec("sae_lens"):
        yield "SAELens", lambda inputs: _saelens(inputs, k, autocast=autocast)
        sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        yield "SAELens sparse", lambda inputs: _saelens(inputs, k, autocast=autocast, **sparse)


def _sparsify(inputs: Inputs, k: int) -> Step:
    """Its decoder is in Triton where that is installed; its forward pass is under bfloat16."""
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    d_sae, d_in = inputs.W_dec.shape
    config = SparseCoderConfig(num_latents=d_sae, k=k)
    sae = SparseCoder(d_in, config, device=inputs.x.device, dtype=inputs.x.dtype)
    with torch.no_grad():
        sae.encoder.weight.copy_(inputs.W_enc_T)
        sae.encoder.bias.copy_(inputs.b_enc)
        sae.W_dec.copy_(inputs.W_dec)
        sae.b_dec.zero_()
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    silent = torch.zeros(d_sae, dtype=torch.int64, device=inputs.x.device)

    def step(x: Tensor) -> float:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        fired = torch.zeros_like(silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        silent.add_(len(x)).masked_fill_(fired, 0)
        return out.fvu.item()

    return step


def _saelens(inputs: Inputs, k: int, *, autocast: bool, **options: Any) -> Step:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    _, batch, d_in = inputs.x.shape
    device = inputs.x.device.type
    config = TopKTrainingSAEConfig(
        d_in=d_in, d_sae=len(inputs.W_dec), k=k, normalize_activations="none", device=device,
        dtype=str(inputs.x.dtype).removeprefix("torch."), **options,
    )  # fmt: skip
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(inputs.W_enc_T.T)
        sae.W_dec.copy_(inputs.W_dec)
        sae.b_enc.copy_(inputs.b_enc)
    settings = SAETrainerConfig(
        total_training_samples=10**6 * batch, train_batch_size_samples=batch, lr=LR, lr_end=LR,
        device=device, autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, iter(()))
    variance = inputs.variance

    def step(x: Tensor) -> float:
        trainer.maybe_reset_sparsity()
        found = trainer.step(x)
        trainer.n_training_steps += 1
        return float(found.losses["mse_loss"]) / variance

    return step
