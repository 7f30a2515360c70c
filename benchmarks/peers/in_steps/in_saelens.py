"""SAELens' training step: `SAETrainer.step`, on the given weights.

Settings: "default"; "sparse": sparse activations, which on a CPU need
`rescale_acts_by_decoder_norm` off. JumpReLU has its documented recipe.
"""

import importlib.metadata
from typing import Any

import sae_lens
import step_protocol
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "relu": "StandardTrainingSAE",
}
RECIPE = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_tanh_scale": 4.0,
    "jumprelu_bandwidth": 2.0,
    "pre_act_loss_coefficient": 3e-6,
}
SPARSE = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}


class Step:
    """A trainer whose steps are called one by one, as its `fit` does."""

    def __init__(self, given: dict[str, Tensor], kind: str, l0: float, setting: str) -> None:
        self.version = importlib.metadata.version("sae-lens")
        _, batch, d_in = given["x"].shape
        options: dict[str, Any] = {}
        if kind in ("topk", "batchtopk"):
            options = {"k": int(l0) if kind == "topk" else float(l0)}
        if kind == "jumprelu":
            options = dict(RECIPE)
        if setting == "sparse":
            options |= SPARSE
        self.options = ", ".join(f"{k}={v}" for k, v in options.items() if k != "k")
        cls = CLASSES[kind]
        config = getattr(sae_lens, f"{cls}Config")(
            d_in=d_in, d_sae=len(given["W_dec"]), normalize_activations="none", **options
        )
        self.sae = getattr(sae_lens, cls)(config)
        with torch.no_grad():
            self.sae.W_enc.copy_(given["W_enc_T"].T)
            self.sae.W_dec.copy_(given["W_dec"])
            self.sae.b_enc.copy_(given["b_enc"])
            if kind == "jumprelu":
                self.sae.threshold.copy_(given["threshold"])
        self.trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=10**6 * batch,
                train_batch_size_samples=batch,
                lr=step_protocol.LR,
                lr_end=step_protocol.LR,
            ),
            self.sae,
            iter(()),
        )
        self.dead = 0

    def mark(self, dead: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired[dead] = step_protocol.DEAD
        self.dead = int(self.trainer.dead_neurons.sum())

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def found(self, x: Tensor) -> dict[str, float]:
        features = self.sae.encode(x)
        x_hat = self.sae.decode(features)
        features = features.to_dense() if features.is_sparse else features
        return step_protocol.measured(x, features, x_hat, self.dead)

    def close(self) -> None:
        """Nothing outlives it."""


if __name__ == "__main__":
    step_protocol.serve(Step)
