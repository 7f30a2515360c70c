"""Directions of large worlds: made once, read back to the bit; a damaged file is not read."""

from pathlib import Path

import pytest
import torch

from sae.synthetic.config import world_config
from sae.synthetic.kept_directions import kept_directions
from sae.synthetic.world import World


def test_directions_that_are_dear_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    config, made = world_config("tiny"), []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.randn(config.features, config.d_in)

    kept_directions(config, make)
    assert not (tmp_path / "worlds").exists(), "a small world's are not kept"

    monkeypatch.setattr("sae.synthetic.kept_directions.DEAR", 1)
    first = kept_directions(config, make)
    assert torch.equal(kept_directions(config, make), first)
    assert torch.equal(World(config).directions, first), "a world reads them, too"
    assert len(made) == 2
    kept_directions(world_config("tiny", seed=7), make)
    assert len(made) == 3, "another world has other directions"

    for path in (tmp_path / "worlds").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert not torch.equal(kept_directions(config, make), first), "a damaged file is not read"
    assert len(made) == 4


def test_a_cache_that_cannot_be_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("sae.synthetic.kept_directions.DEAR", 1)
    directions = torch.eye(3)
    assert kept_directions(world_config("tiny"), lambda: directions) is directions
    assert "are not kept, and will be made anew" in capsys.readouterr().out
