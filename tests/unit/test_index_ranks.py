"""Several processes build one store: each encodes pieces, rank 0 makes the store of them."""

import signal
from pathlib import Path

import pytest
import torch

from activations import ActivationStore
from activations.harvesting import window_locks
from sae import IndexConfig, index
from sae.indexing.encoding import pieces_of
from saescope.errors import ArtefactError
from tests.tiny import D_MODEL
from tests.torture.child import index_rank
from tests.unit.test_index_stream import SITE, Tables, is_whole, save_sae, tables


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest without a model, of three pieces, and an SAE."""
    folder = tmp_path_factory.mktemp("ranks")
    x = torch.randn(40_000, D_MODEL, generator=torch.Generator().manual_seed(0))
    ActivationStore.from_arrays(
        folder / "harvest", {SITE: x}, documents=torch.arange(40_000) // 600, chunk_rows=4096,
        window_chunks=4, held_out_fraction=0.2,
    )  # fmt: skip
    save_sae(folder / "sae-0")
    return folder


def config_of(root: Path, out: Path) -> IndexConfig:
    return IndexConfig(run=str(root / "sae-0"), harvest=str(root / "harvest"), out=str(out))


@pytest.fixture(scope="module")
def whole(root: Path) -> Tables:
    """What one process makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        named = tables(index(config_of(root, root / "whole" / "store")))
    named["meta"] = [row for row in named["meta"] if row[0] != "name"]
    return named


@pytest.mark.slow
def test_ranks_make_what_one_process_does(root: Path, whole: Tables, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "store")
    total = len(pieces_of(ActivationStore.open(root / "harvest")))
    assert total == 3
    logs = [tmp_path / str(number) for number in range(2)]
    # the first has one piece and stands still: the other encodes the rest
    first = index_rank(config, logs[0], 0, 2, waits_for=total - 1)
    second = index_rank(config, logs[1], 1, 2)
    for process, log in ((first, logs[0]), (second, logs[1])):
        process.join(120)
        assert process.exitcode == 0, log.read_text()
    shown = [log.read_text().splitlines() for log in logs]
    assert shown[0][-1] == "pieces: 1"
    assert shown[1] == [f"pieces: {total - 1}"]
    is_whole(tmp_path / "store" / "features.duckdb", whole)
    late = index_rank(config, logs[1], 1, 2)
    late.join(120)
    assert late.exitcode == 0
    assert logs[1].read_text() == "pieces: 0\n"


def test_what_a_dead_rank_had_is_encoded_by_another(
    root: Path, whole: Tables, tmp_path: Path
) -> None:
    config = config_of(root, tmp_path / "store")
    second = index_rank(config, tmp_path / "1", 1, 2, dies_at=2)
    first = index_rank(config, tmp_path / "0", 0, 2, waits_for=1)
    for process in (first, second):
        process.join(120)
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 0, (tmp_path / "0").read_text()
    assert (tmp_path / "0").read_text().splitlines()[-1] == "pieces: 2"
    is_whole(tmp_path / "store" / "features.duckdb", whole)


@pytest.mark.timeout(60)
def test_without_rank_0_the_others_say_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_locks, "_PATIENCE", 0.3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArtefactError, match="rank 0, which alone finishes an index, has not been"):
        index(config_of(root, tmp_path / "new" / "store"))
    assert list(tmp_path.iterdir()) == []
