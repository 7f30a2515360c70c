"""dictionary_learning's training step: its trainers' `update`, on the given weights.

Beyond the steps in which thresholds are not yet averaged and penalties not yet in force.
"""

import importlib.metadata

import step_protocol
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

TRAINERS = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "relu": StandardTrainer,
}
FIRST_STEP = 5000


class Step:
    """A trainer whose `update` is called one by one, as its `trainSAE` does."""

    def __init__(self, given: dict[str, Tensor], kind: str, l0: float, setting: str) -> None:
        del setting
        self.version = importlib.metadata.version("dictionary-learning")
        cls = TRAINERS[kind]
        self.options = cls.__name__
        more = {"k": int(l0)} if kind in ("topk", "batchtopk") else {}
        if kind == "jumprelu":
            more = {"target_l0": float(l0)}
        self.kind, self.number, self.dead = kind, FIRST_STEP, 0
        self.trainer = cls(
            steps=10**6, activation_dim=given["x"].shape[-1], dict_size=len(given["W_dec"]),
            layer=0, lm_name="stored activations", device="cpu", lr=step_protocol.LR, **more,
        )  # fmt: skip
        ae = self.trainer.ae
        with torch.no_grad():
            if kind == "jumprelu":
                ae.W_enc.copy_(given["W_enc_T"].T)
                ae.W_dec.copy_(given["W_dec"])
                ae.b_enc.copy_(given["b_enc"])
                ae.threshold.copy_(given["threshold"])
            else:
                ae.encoder.weight.copy_(given["W_enc_T"])
                ae.decoder.weight.copy_(given["W_dec"].T)
                ae.encoder.bias.copy_(given["b_enc"])

    def mark(self, dead: Tensor) -> None:
        if self.kind in ("topk", "batchtopk"):
            counters = self.trainer.num_tokens_since_fired
            counters[dead] = step_protocol.DEAD
            self.dead = int((counters >= self.trainer.dead_feature_threshold).sum())

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.number, x)
        self.number += 1

    @torch.no_grad()
    def found(self, x: Tensor) -> dict[str, float]:
        ae = self.trainer.ae
        features = ae.encode(x, use_threshold=False) if self.kind == "batchtopk" else ae.encode(x)
        return step_protocol.measured(x, features, ae.decode(features), self.dead)

    def close(self) -> None:
        """Nothing outlives it."""


if __name__ == "__main__":
    step_protocol.serve(Step)
