"""The default model, small: killed and resumed on the way, from text to a steered continuation."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import activations
import sae
import store
from store.database import STORE_FILE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SITE = "blocks.2.hook_resid_post"


def saescope(*words: str) -> list[str]:
    return [sys.executable, "-m", "saescope", *words]


def run(*words: str) -> str:
    done = subprocess.run(
        saescope(*words), cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_killed(ready: Callable[[], bool], *words: str) -> None:
    """Start a command and kill it, as a power cut would, as soon as `ready`."""
    process = subprocess.Popen(
        saescope(*words), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("default")


@pytest.fixture(scope="module")
def harvest(work: Path) -> activations.ActivationStore:
    """A harvest that was killed after its first committed window."""
    out = work / "harvest"
    words = [
        "harvest", "--max-tokens", "12288", "--sites", SITE, "--out", str(out),
        "--chunk-rows", "1024", "--window-chunks", "2", "--held-out-fraction", "0.2",
        "--model.dtype", "float32",
    ]  # fmt: skip

    def one_window() -> bool:
        return (out / "manifest.json").exists() and bool(
            activations.ActivationStore.open(out).windows
        )

    run_killed(one_window, *words)
    assert not activations.ActivationStore.open(out).complete
    run(*words)
    return activations.ActivationStore.open(out)


@pytest.fixture(scope="module")
def trained(work: Path, harvest: activations.ActivationStore) -> Path:
    """A run that was killed after its first checkpoint."""
    out = work / "run"
    words = [
        "train", "--harvest", str(harvest.path), "--out", str(out), "--sae.d-sae", "1024",
        "--sae.k", "16", "--passes", "8", "--trainer.batch-size", "256",
        "--trainer.lr-multiplier", "4", "--trainer.checkpoint-every", "60",
        "--trainer.evaluate-every", "60",
    ]  # fmt: skip
    run_killed((out / "checkpoints" / "last" / "state.json").exists, *words)
    run(*words)
    return out


def test_harvest(harvest: activations.ActivationStore) -> None:
    assert harvest.complete
    assert harvest.verify() > 0
    assert harvest.n_rows("train") + harvest.n_rows("held_out") == int(harvest.keep[:].sum())
    assert harvest.d_in(SITE) == 576
    documents = [set(harvest.document[harvest.split == split].ravel()) for split in (0, 1)]
    assert not documents[0] & documents[1]


def test_training(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert lines[-1]["held_out"]["fvu"] < lines[0]["held_out"]["fvu"]


def test_evaluation_index_and_steering(trained: Path, work: Path) -> None:
    run("eval", str(trained), "--tokens", "512")
    measured = json.loads((trained / "evaluation.json").read_text())
    assert 0 < measured["reconstruction"]["fvu"] < 0.9
    downstream = measured["downstream"]
    assert downstream["ce_clean"] < 5
    assert downstream["ce_clean"] < downstream["ce"] < downstream["ce_zero"]
    assert downstream["kl"] > 0
    out = work / "stores" / "small"
    run("index", str(trained), "--out", str(out))
    with store.FeatureStore.open(out / STORE_FILE) as features:
        overview = features.overview()
        assert overview.mean_active <= 16
        assert overview.metrics["fvu"] == measured["reconstruction"]["fvu"]
        feature = features.random_live(0)
        assert feature is not None
        assert features.examples(feature)
    shown = run("steer", str(trained), "--add", f"{feature}=400", "--max-new-tokens", "8")
    plain, steered = shown.strip().splitlines()[-2:]
    assert plain.startswith("untouched: The weather today")
    assert steered.partition(": ")[2] != plain.partition(": ")[2]


def test_python_steering_is_the_same_with_and_without_cache(trained: Path) -> None:
    model = activations.load_model("smollm2-135m", dtype="float32")
    run_sae = sae.load(trained)
    with sae.steer(model, run_sae, add={3: 20.0}, scale={5: 3.0}):
        cached = model.generate_ids("The weather today", max_new_tokens=12)
        whole = model.generate_ids("The weather today", max_new_tokens=12, use_cache=False)
    assert cached == whole
