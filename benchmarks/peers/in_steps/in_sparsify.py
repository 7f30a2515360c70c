"""sparsify's training step: its own `Trainer.fit`, over a model that hands on the given rows.

Settings: "signum" (its default optimiser, schedule-free) and "adam". It runs in a thread, which
waits in the model's forward pass for the next rows. AuxK, off by default, is on where features are
dead.
"""

import importlib.metadata
import queue
import tempfile
import threading
from typing import Any

import step_protocol
import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn

AUXK = 1 / 32
SITE = "site"


class _Stopped(Exception):
    """No more rows."""


class _Sequences:
    """Token ids for as many sequences as a long run would have; what they are does not matter."""

    def __init__(self, length: int) -> None:
        self.item = {"input_ids": torch.zeros(length, dtype=torch.int64)}

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.item


class _Source(nn.Module):
    """A model without weights; its one site's activations are the rows it is given."""

    device = torch.device("cpu")

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.given: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.over: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.dummy_inputs = {"input_ids": None}
        self.d_in, self.begun = d_in, False

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:  # the trainer asks for the width
            return self.site(torch.zeros(1, 1, self.d_in))
        if self.begun:
            self.over.put(None)
        self.begun = True
        x = self.given.get()
        if x is None:
            raise _Stopped
        return self.site(x[None])


class Step:
    """A trainer whose loop waits for the rows of each step."""

    def __init__(self, given: dict[str, Tensor], kind: str, l0: float, setting: str) -> None:
        assert kind == "topk", "the only activation it shares with the others"
        self.version = importlib.metadata.version("eai-sparsify")
        _, batch, d_in = given["x"].shape
        auxk = AUXK if given["dead"].any() else 0.0
        self.options = f"optimizer={setting}, auxk_alpha={auxk:g}, eager decoder"
        self.source = _Source(d_in)
        self.trainer = Trainer(
            TrainConfig(
                SaeConfig(num_latents=len(given["W_dec"]), k=int(l0)),
                batch_size=1, optimizer=setting, lr=step_protocol.LR, auxk_alpha=auxk,
                hookpoints=[SITE], log_to_wandb=False,
                save_dir=tempfile.mkdtemp(prefix="steps-in-sparsify-"),
            ),
            _Sequences(batch),
            self.source,
        )  # fmt: skip
        self.sae = self.trainer.saes[SITE]
        with torch.no_grad():
            self.sae.encoder.weight.copy_(given["W_enc_T"])
            self.sae.encoder.bias.copy_(given["b_enc"])
            self.sae.W_dec.copy_(given["W_dec"])
        self.dead = 0
        threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._fit, args=(threads,), daemon=True)
        self.thread.start()

    def _fit(self, threads: int) -> None:
        torch.set_num_threads(threads)  # it is set thread by thread
        try:
            self.trainer.fit()
        except _Stopped:
            pass
        except BaseException as error:
            self.source.over.put(error)

    def mark(self, dead: Tensor) -> None:
        counters = self.trainer.num_tokens_since_fired[SITE]
        counters[dead] = step_protocol.DEAD
        self.dead = int((counters > self.trainer.cfg.dead_feature_threshold).sum())

    def step(self, x: Tensor) -> None:
        self.source.given.put(x)
        error = self.source.over.get()
        if error is not None:
            raise error

    @torch.no_grad()
    def found(self, x: Tensor) -> dict[str, Any]:
        top = self.sae.encode(x)
        x_hat = self.sae.decode(top.top_acts, top.top_indices)
        return step_protocol.measured(x, top.top_acts, x_hat, self.dead)

    def close(self) -> None:
        """End the loop."""
        self.source.given.put(None)
        self.thread.join()


if __name__ == "__main__":
    step_protocol.serve(Step)
