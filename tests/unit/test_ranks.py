"""Several processes: what two of them train is what one does, resumed by either; none hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sae import distributed
from sae.commands.train import train
from sae.core.batch import TrainingBatch
from sae.distributed import ALL, FEATURES, ROWS
from sae.training import process_group, sharded_checkpoint
from sae.training.config import TrainConfig
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from tests import ranks_worker as worker
from tests.hand_store import make_hand_store

pytestmark = pytest.mark.slow

BETWEEN = {
    "rows": ("batchtopk", "jumprelu_steered"), "features": ("batchtopk", "schedule_free"),
}  # fmt: skip
"""cases that are resumed by other numbers of processes than they were begun with"""
SITE = "blocks.1.hook_resid_post"
TIMEOUT = 240


def launched(*words: str, **options: Any) -> subprocess.Popen[str]:
    """torchrun's two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*command, "2", *words], text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def job(split: str, case: str, folder: Path, **more: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"split": split, "case": case, "folder": str(folder), **more}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one pair of processes has done everything that needs two."""
    folder = tmp_path_factory.mktemp("two")
    jobs = []
    for split, cases in (("rows", worker.CASES), ("features", worker.BY_FEATURE)):
        jobs += [job(split, case, folder / split / case) for case in cases]
        jobs.append(job(split, "contests", folder))
        for case in BETWEEN[split]:
            # begun by two, stopped at 5: from the checkpoint at 3 on by two again, or by one
            for place in (folder / split / f"{case}-2-2", folder / split / f"{case}-2-1"):
                jobs.append(job(split, case, place, stop_at=5))
            jobs.append(job(split, case, folder / split / f"{case}-2-2"))
            between = folder / split / f"{case}-1-2-1"
            worker.train(case, between, stop_at=5)
            jobs.append(job(split, case, between, stop_at=7))
    for of, message in (
        ("msae", "cannot be shared out among processes"),
        ("relu_resampled", "sae.resample_at"),
        ("mutual_choice_zipf", "sae.auxiliary"),
    ):
        jobs.append(job("features", "refused", folder / "refused", of=of, message=message))
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    process = launched("-m", "tests.ranks_worker", str(path))
    out, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, out + errors
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one process makes of a case, made once."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def found(case: str) -> dict[str, Any]:
        if case not in made:
            made[case] = worker.train(case, folder / case)
        return made[case]

    return found


def nones(terms: dict[str, Any]) -> set[str]:
    """Names of the terms that are not yet known."""
    return {name for name, value in terms.items() if value is None}


def check(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    """Every step's terms, the held-out measurements and the weights."""
    close = 1e-5 if case == "float32" else 1e-8
    for step, terms in found["losses"].items():
        wanted = expected["losses"][step]
        assert nones(terms) == nones(wanted), step
        numbers = {name: value for name, value in wanted.items() if value is not None}
        assert {name: terms[name] for name in numbers} == pytest.approx(
            numbers, rel=close, abs=close
        ), step
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=close, abs=close)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        other = found["weights"][name]
        assert other.dtype == value.dtype
        torch.testing.assert_close(other, value, rtol=close, atol=close)


def of_two(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "found.json").read_text())
    return {**found, "weights": load_file(folder / "found.safetensors")}


@pytest.mark.parametrize("case", worker.CASES)
def test_two_that_share_rows_train_what_one_does(two: Path, one: Any, case: str) -> None:
    found, expected = of_two(two / "rows" / case), one(case)
    assert len(found["losses"]) == worker.STEPS
    check(found, expected, case)


@pytest.mark.parametrize("case", worker.BY_FEATURE)
def test_two_that_share_features_train_what_one_does(two: Path, one: Any, case: str) -> None:
    found, expected = of_two(two / "features" / case), one(case)
    assert len(found["losses"]) == worker.STEPS
    check(found, expected, case)


@pytest.mark.parametrize(
    ("split", "case"), [(split, case) for split, cases in BETWEEN.items() for case in cases]
)
def test_resumed_by_any_number_of_processes(two: Path, one: Any, split: str, case: str) -> None:
    expected = one(case)
    check(of_two(two / split / f"{case}-2-2"), expected, case)
    for path in ("2-1", "1-2-1"):
        found = worker.train(case, two / split / f"{case}-{path}")
        assert min(map(int, found["losses"])) == {"2-1": 4, "1-2-1": 7}[path]
        check(found, expected, case)


def test_each_rank_writes_its_features_and_the_first_the_rest(two: Path) -> None:
    folder = two / "features" / "batchtopk" / "checkpoints" / "last"
    assert sorted(path.name for path in folder.iterdir()) == [
        "features-0.safetensors", "features-1.safetensors", "state.json", "tensors.safetensors",
    ]  # fmt: skip
    lengths = []
    for rank in range(2):
        with safe_open(folder / f"features-{rank}.safetensors", "pt") as file:
            names = set(file.keys())
            assert {"sae/W_dec", "optimiser/2.exp_avg", "run/tokens_since_fired"} <= names
            lengths += [len(file.get_tensor(name)) for name in names]
    assert set(lengths) == {worker.D_SAE // 2, worker.D_SAE - worker.D_SAE // 2}


def test_a_missing_part_of_a_checkpoint_is_named(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "features" / "abstopk", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last" / "features-1.safetensors").unlink()
    with pytest.raises(ArtefactError, match="damaged checkpoint"):
        worker.make("abstopk", tmp_path / "run")


def test_an_error_on_one_ends_all_and_is_said_once(tmp_path: Path) -> None:
    """Without torchrun's agent, which would kill those that are left."""
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([job("rows", "fails_on_one", tmp_path / "run")]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks_worker", str(path)], text=True,
            env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode != 0 for process in processes] == [True, True]
    assert "a row of the second rank: cannot be read" in errors[1]
    assert "cannot be read" not in errors[0]


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    train_rows, held_out = (
        {SITE: torch.randn(count, 12, generator=generator)} for count in (3200, 400)
    )
    path = tmp_path_factory.mktemp("ranks") / "harvest"
    make_hand_store(path, train_rows, held_out)
    return path


@pytest.mark.slow
def test_interrupted_under_torchrun_and_finished_by_one(harvest: Path, tmp_path: Path) -> None:
    values = {
        "harvest": str(harvest), "passes": 6.0, "sae": {"kind": "batchtopk", "d_sae": 33, "k": 4},
        "trainer": {"batch_size": 64, "checkpoint_every": 25, "evaluate_every": 200},
    }  # fmt: skip
    flags = [
        "--harvest", str(harvest), "--passes", "6", "--sae.kind", "batchtopk", "--sae.d_sae", "33",
        "--sae.k", "4", "--trainer.batch_size", "64", "--trainer.checkpoint_every", "25",
        "--trainer.evaluate_every", "200",
    ]  # fmt: skip
    out = tmp_path / "two"
    process = launched("-m", "saescope", "train", *flags, "--out", str(out), "--ranks", "features")
    state = out / "checkpoints" / "last" / "state.json"
    began = time.monotonic()
    while not state.exists() and process.poll() is None:
        assert time.monotonic() < began + TIMEOUT
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0, "it was finished before it could be interrupted"
    assert errors.count("run the same command again to go on") == 1, errors
    config = from_dict(TrainConfig, {**values, "out": str(out)}, "test")
    found = train(config)
    expected = train(from_dict(TrainConfig, {**values, "out": str(tmp_path / "one")}, "test"))
    assert found is not None
    assert expected is not None
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# ---- without a second process -------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """As if this were one of several that share features; nothing collective works."""
    for axis in (FEATURES, ALL):
        monkeypatch.setattr(axis, "rank", rank)
        monkeypatch.setattr(axis, "size", size)


def test_alone_nothing_changes() -> None:
    value = torch.randn(3, requires_grad=True)
    for axis in (ROWS, FEATURES, ALL):
        assert axis.sum(value) is axis.gather(value) is axis.spread(value) is value
        assert (axis.total(5), axis.before(5), axis.share(5)) == (5, 0, slice(0, 5))
    assert distributed.broadcast(value) is value
    assert distributed.everyones(7) == [7]


@pytest.mark.parametrize("total", [0, 1, 5, 16, 401])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_of_it_in_order(
    monkeypatch: pytest.MonkeyPatch, total: int, size: int
) -> None:
    found: list[int] = []
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        own = list(range(total))[FEATURES.share(total)]
        assert abs(len(own) - total / size) < 1
        found += own
    assert found == list(range(total))


@pytest.mark.parametrize(("rows", "width"), [(25, 8), (5000, 3), (8193, 7), (4097, 1), (9000, 16)])
def test_rows_are_drawn_as_by_one_process(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int
) -> None:
    torch.manual_seed(1)
    expected = nn.init.normal_(torch.empty(rows, width), std=0.5)
    then = torch.randn(3)
    parts = []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        own = FEATURES.share(rows)
        torch.manual_seed(1)
        part = torch.empty(own.stop - own.start, width)
        distributed.normal_rows_(part, rows, std=0.5)
        assert torch.equal(torch.randn(3), then)
        parts.append(part)
    assert torch.equal(torch.cat(parts), expected)


def test_the_released_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    """With tensors larger than a piece, of several types, empty ones and numbers."""
    tensors = {
        "threshold": torch.tensor(0.25),
        "W": torch.randn(70, 3, dtype=torch.float64),
        "b": torch.randn(5).to(torch.bfloat16),
        "used": torch.tensor([True, False, True]),
        "updates": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "whole.safetensors"
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(sharded_checkpoint, "_PIECE_BYTES", 100)
        sharded_checkpoint.save_whole(tensors, path, lambda _, value: value.ndim > 0)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(("rows", "parts", "fits"), [(3, 1, True), (2, 1, False), (9, 3, True),
                                                     (10, 3, False), (11, 3, True)])  # fmt: skip
def test_a_batch_has_a_row_for_each_process(
    monkeypatch: pytest.MonkeyPatch, rows: int, parts: int, fits: bool
) -> None:
    """Micro-batches of ceil(rows / parts): 10 rows are 4, 4 and 2."""
    monkeypatch.setattr(ROWS, "size", 3)
    with nullcontext() if fits else pytest.raises(InputError, match="fewer rows than processes"):
        process_group.check_batch(rows, parts)
    with pytest.raises(InputError, match="outliers left fewer rows"):
        TrainingBatch.of(torch.zeros(2, 4)).share()


def test_a_card_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_group.device("cuda") == torch.device("cuda", 1)
    assert process_group.device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="not a card for each process"):
        process_group.device("cuda")
