"""How the papers on embeddings measure: on clusters whose neighbours are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from sae.architectures.msae import MSAEConfig
from sae.architectures.topk import TopKConfig
from sae.commands.train import train
from sae.papers import csr, msae
from sae.reproduction.embeddings import Embedded
from saescope.progress import silent

CLUSTERS, EACH = 6, 20


@pytest.fixture(autouse=True)
def _clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows near one of six axes; a query is the very row it asks for, a little moved."""
    draw = np.random.default_rng(0)
    y = np.repeat(np.arange(CLUSTERS), EACH)
    x = (np.eye(40)[y] + 0.05 * draw.normal(size=(len(y), 40))).astype(np.float32)
    queries = (x + 0.001 * draw.normal(size=x.shape)).astype(np.float32)
    data = Embedded(x=x, y=y, queries=queries)
    monkeypatch.setattr(csr, "leads", lambda folder, rows: data)
    monkeypatch.setitem(csr._WIDTH, "texts", 48)


def measured(tmp_path: Path, method: str, size: int) -> dict[str, Any]:
    settings = {"seed": 0, "data": "texts", "rows": 0, "passes": 60, "method": method, "size": size}
    return csr.measure(settings, tmp_path)


def test_the_whole_embedding_finds_everything(tmp_path: Path) -> None:
    found = measured(tmp_path, "whole", 0)
    assert (found["accuracy"], found["neighbours"], found["found"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("method", "size"), [("pca", 6), ("matryoshka", 8)])
def test_short_ones_lose_by_their_length(tmp_path: Path, method: str, size: int) -> None:
    assert measured(tmp_path, method, size)["accuracy"] == 1.0
    few = measured(tmp_path, "random", 4)
    assert few["neighbours"] < measured(tmp_path, method, size)["neighbours"] < 1


def test_codes_are_searched_by_cosine() -> None:
    x = torch.from_numpy(csr.leads(Path(), 0).x)
    with silent():
        sae = train(x, TopKConfig(d_sae=48, k=3), passes=20, batch_size=30)
    dense = functional.normalize(sae.encode(x), dim=1)
    nearest = csr._Sparse(x, sae).nearest(x[:9], 4)
    cosines = dense[:9] @ dense.T
    torch.testing.assert_close(cosines.gather(1, nearest), cosines.topk(4, dim=1).values)


@pytest.mark.parametrize(
    "config", [TopKConfig(d_sae=48, k=3), MSAEConfig(d_sae=48, k=4, ks=(2, 4, 8))]
)
def test_an_sae_is_used_at_another_k(config: Any) -> None:
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(12345))
    with silent():
        sae = train(x, config, passes=2, batch_size=30)
    used = msae._used_at(sae, 1)
    assert int(used.encode_sparse(x).l0().max()) == 1
    assert int(sae.encode_sparse(x).l0().max()) == config.k
    error = (x - used(x).x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert msae._at(sae, 1, x)[0] == pytest.approx(float(error.detach()))
