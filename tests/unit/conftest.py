"""Shared by the unit tests: one tiny model a session."""

from pathlib import Path

import pytest
import torch

from activations import Model, load_model
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with grouped queries, as a Hugging Face folder."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> Model:
    """The same, loaded in float32."""
    return load_model(str(tiny_folder), dtype="float32")


@pytest.fixture
def sae(tiny_model: Model) -> SparseAutoencoder:
    """A random SAE whose features fire on the tiny model."""
    torch.manual_seed(0)
    made = TopKSAE(TopKConfig(d_sae=64, k=8), tiny_model.d_model).eval()
    made.metadata = {"site": "blocks.1.hook_resid_post"}
    return made
