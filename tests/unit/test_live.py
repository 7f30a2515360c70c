"""Training straight from the model: the rows, order and bits of a harvest, without its disk."""

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from activations import ActivationLoader, ActivationStore, HarvestConfig, Model, harvest
from activations.loading.epoch_order import ReadingOrder
from activations.recompute.computed_rows import ComputedRows
from activations.storage.verify import examine
from activations.storage.writer import HarvestWriter
from sae import distributed
from sae.commands.train import train
from sae.training.config import TrainConfig
from sae.training.run import Run
from sae.training.trainer import Trainer
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import InputError
from saescope.paths import local
from tests.damage import GROUP, assert_same_content
from tests.interrupt import Interrupt, Killed
from tests.tiny import make_tiny_harvest, make_tiny_model

SITES = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_k")
SITE = SITES[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    make_tiny_model(folder / "model")
    return folder


def make(root: Path, name: str, **fields: Any) -> ActivationStore:
    path = make_tiny_harvest(
        root / name, root / "model", sites=SITES, documents=30, window_chunks=4, **fields
    )
    return ActivationStore.open(path)


@pytest.fixture(scope="module")
def disk(root: Path) -> ActivationStore:
    return make(root, "disk")


@pytest.fixture(scope="module")
def text(root: Path) -> ActivationStore:
    """The same without activations."""
    return make(root, "text", storage="none")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the windows that were computed, in order."""
    numbers: list[int] = []
    original = ComputedRows._window

    def counted(own: ComputedRows, number: int) -> Any:
        split = own._store.windows[number].split
        if own._kept.get(split, (None,))[0] != number:
            numbers.append(number)
        return original(own, number)

    monkeypatch.setattr(ComputedRows, "_window", counted)
    return numbers


def test_only_text_is_on_disk(disk: ActivationStore, text: ActivationStore) -> None:
    assert not any((text.path / GROUP / site).exists() for site in SITES)
    assert text.windows == disk.windows
    assert text.sites == disk.sites
    for site in SITES:
        assert text.manifest["sums"][site] == disk.manifest["sums"][site]
    assert text.hash != disk.hash


def test_chunks_have_the_bits_that_a_harvest_stores(
    disk: ActivationStore, text: ActivationStore
) -> None:
    for split in ("train", "held_out"):
        assert text.chunks(split) == disk.chunks(split)
        for chunk in text.chunks(split):
            for site in SITES:
                for one, other in zip(
                    text.read_chunk(site, chunk.index), disk.read_chunk(site, chunk.index),
                    strict=True,
                ):  # fmt: skip
                    assert torch.equal(one, other)
                    assert one.dtype == other.dtype


def test_each_window_is_computed_once_an_epoch(text: ActivationStore, computed: list[int]) -> None:
    store = ActivationStore.open(text.path)
    loader = ActivationLoader(store, SITES, batch_size=50, epochs=2, mix_chunks=3)
    train_windows = [n for n, window in enumerate(store.windows) if window.split == "train"]
    for number, _ in enumerate(loader):
        if number % 5 == 0:  # held-out rows come from a window of their own
            store.read_chunk(SITE, store.chunks("held_out")[0].index)
    in_training = [n for n in computed if n in train_windows]
    order = ReadingOrder(store, "train", "windows", mix_chunks=3, seed=0)
    chunk_rows = int(store.manifest["chunk_rows"])
    of_chunk = {c.index: n for n in train_windows for c in store.windows[n].chunks(chunk_rows)}
    parts = [part for epoch in range(2) for group in order.groups(epoch) for part in group]
    # one that ends an epoch and begins the next is computed once for both
    assert in_training == [number for number, _ in groupby(of_chunk[part.chunk] for part in parts)]
    assert len(computed) == len(in_training) + 1


def test_other_orders_are_refused(text: ActivationStore) -> None:
    for order in ("chunks", "spread"):
        with pytest.raises(InputError, match=r"computed by windows here.*allowed: windows"):
            ActivationLoader(text, SITE, batch_size=50, order=order)


def config(harvest: ActivationStore, out: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "harvest": str(harvest.path), "out": str(out), "site": SITE, "passes": 2.5,
        "evaluation_rows": 100, "calibration_rows": 150, "order": "windows",
        "sae": {"kind": "batchtopk", "d_sae": 48, "k": 6},
        "trainer": {"batch_size": 64, "lr": 3e-3, "checkpoint_every": 5, "evaluate_every": 8},
    }  # fmt: skip
    return from_dict(TrainConfig, values | more, "test")


def trained(config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and thresholds of the run's SAE, and its telemetry."""
    train(config)
    found = sae.load(config.out)
    assert found is not None
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return found.state_dict(), [json.loads(line) for line in lines]


def assert_alike(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert [(line["step"], line["train"], line["held_out"]) for line in one[1]] == [
        (line["step"], line["train"], line["held_out"]) for line in other[1]
    ]


@pytest.fixture(scope="module")
def from_disk(disk: ActivationStore, root: Path) -> Any:
    return trained(config(disk, root / "from_disk"))


@pytest.mark.parametrize("order", ["windows", None])
def test_training_from_the_model_has_the_bits_of_training_from_the_disk(
    text: ActivationStore, tmp_path: Path, from_disk: Any, order: str | None
) -> None:
    assert_alike(trained(config(text, tmp_path / "run", order=order)), from_disk)


@pytest.mark.parametrize("kill_at", [1, 6, 21])
def test_killed_at_any_step_it_goes_on_to_the_same_bits(
    text: ActivationStore,
    tmp_path: Path,
    from_disk: Any,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
) -> None:
    step = Trainer.train_step

    def killed(own: Trainer, raw: Any) -> Any:
        if own.step == kill_at:
            raise Killed
        return step(own, raw)

    chosen = config(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(Killed):
            train(chosen)
    assert_alike(trained(chosen), from_disk)


def test_several_sites_come_straight_from_the_model_too(
    disk: ActivationStore, text: ActivationStore, tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "site": None, "sites": SITES, "sae": {"kind": "crosscoder", "d_sae": 32}, "passes": 1.0
    }  # fmt: skip
    one = trained(config(text, tmp_path / "one", **more))
    assert_alike(one, trained(config(disk, tmp_path / "other", **more)))


def test_statistics_over_some_windows(
    root: Path, disk: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    capture = Model.capture

    def counted(own: Model, tokens: Any, sites: Any) -> Any:
        if sites and tokens.numel() > 1:
            captured.append(len(tokens))
        return capture(own, tokens, sites)

    monkeypatch.setattr(Model, "capture", counted)
    some = make(root, "some", storage="none", statistics_windows=2)
    windows = [window for window in disk.windows if window.split == "train"]
    chosen = [windows[0], windows[len(windows) // 2]]
    # the model ran over these alone
    assert sum(captured) == sum(window.sequences for window in chosen)
    rows = [
        disk.read_chunk(SITE, chunk.index)[0].double()
        for window in chosen
        for chunk in window.chunks(128)
    ]
    found = some.statistics(SITE)
    assert found.count == sum(window.rows for window in chosen)
    assert found.mean == pytest.approx(torch.cat(rows).mean(0).numpy(), abs=1e-9)
    # a harvest with activations takes the same ones if it is asked to
    other = make(root, "other", statistics_windows=2)
    assert other.manifest["sums"] == some.manifest["sums"]
    with pytest.raises(InputError, match="statistics_windows"):
        HarvestConfig(statistics_windows=0)


def test_it_is_checked_and_repaired(text: ActivationStore, tmp_path: Path) -> None:
    assert examine(text).faults == []
    copy = Path(shutil.copytree(local(text.path), tmp_path / "copy"))
    (copy / GROUP / "row_token" / "c" / "2").unlink()
    (copy / GROUP / "tokens" / "c" / "1" / "0").unlink()
    (copy / GROUP / SITE).mkdir()
    assert {f.path for f in examine(ActivationStore.open(copy)).faults} == {
        f"{GROUP}/row_token/c/2", f"{GROUP}/tokens/c/1/0", f"{GROUP}/{SITE}"
    }  # fmt: skip
    assert main(["doctor", str(copy), "--repair", "--set-aside"]) == 0
    assert_same_content(copy, text.path)


def test_a_killed_harvest_of_text_goes_on_to_the_same_bytes(
    text: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**text.manifest["config"], "out": str(tmp_path / "out")}
    wanted = from_dict(HarvestConfig, values, "test")
    with monkeypatch.context() as patch:
        Interrupt(patch, HarvestWriter, "write", 3, Killed())
        with pytest.raises(Killed):
            harvest(wanted)
    assert_same_content(harvest(wanted).path, text.path)


def test_another_model_is_refused(text: ActivationStore, root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(local(text.path), tmp_path / "copy"))
    other = make_tiny_model(tmp_path / "model", seed=1)
    writer = HarvestWriter(ActivationStore.open(copy))
    writer._facts["config"]["model"]["spec"] = str(other)
    writer._write_manifest()
    store = ActivationStore.open(copy)
    with pytest.raises(InputError, match="not the one this harvest began with"):
        store.read_chunk(SITE, 0)
    with pytest.raises(InputError, match="no such site"):
        text.read_chunk("blocks.2.hook_resid_post", 0)


def test_end_to_end_training_has_an_order_of_its_own(disk: ActivationStore, tmp_path: Path) -> None:
    kind = {"kind": "topk", "d_sae": 48, "k": 6}
    with pytest.raises(InputError, match="in an order of its own"):
        Run(config(disk, tmp_path / "run", objective="end_to_end", sae=kind), disk)


def test_several_processes_that_train_one_sae_are_refused(
    text: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    Run(config(text, tmp_path / "run"), text)  # each trains SAEs of its own, as in a sweep
    monkeypatch.setattr(distributed.ALL, "size", 2)  # they train one together
    with pytest.raises(InputError, match="straight from the model runs in one process"):
        Run(config(text, tmp_path / "run"), text)


def test_the_plan_counts_the_time_in_the_model(
    text: ActivationStore, disk: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = sum(window.split == "train" for window in text.windows)
    train(config(text, tmp_path / "run", plan=True, passes=2.0))
    assert f"in the model, which computes {2 * windows} windows" in capsys.readouterr().out
    train(config(disk, tmp_path / "run", plan=True))
    assert "in the model" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_it_is_evaluated_and_indexed(
    text: ActivationStore, tmp_path: Path, computed: list[int]
) -> None:
    train(config(text, tmp_path / "run"))
    assert main(["eval", str(tmp_path / "run"), "--tokens", "100"]) == 0
    computed.clear()
    assert main(["index", str(tmp_path / "run"), "--out", str(tmp_path / "index")]) == 0
    assert computed == list(range(len(text.windows)))
