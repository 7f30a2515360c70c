"""What a harvest will take: told beforehand, near to the truth, and refused if it cannot fit."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activations import ActivationStore, CorpusConfig, HarvestConfig, ModelConfig, append, harvest
from activations.harvesting.command import HarvestCommand, run
from activations.harvesting.plan import needs
from activations.storage.writer import HarvestWriter
from saescope.__main__ import main
from saescope.errors import InputError
from saescope.paths import local
from tests.tiny import make_tiny_corpus

Make = Callable[..., Any]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    source = make_tiny_corpus(tmp_path / "text", documents=40)

    def build(kind: Any = HarvestConfig, **fields: Any) -> Any:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(tiny_folder), dtype="float32"),
            "corpus": CorpusConfig(source=str(source)), "sites": ("blocks.1.hook_resid_post",),
            "out": str(tmp_path / "data" / "out"), "context": 16, "chunk_rows": 128,
            "window_chunks": 6, "batch_sequences": 15, "held_out_fraction": 0.3,
        }  # fmt: skip
        return kind(**(settings | fields))

    return build


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("c/**/*") if path.is_file())


def shown(output: str, name: str) -> list[float]:
    """The numbers of a line of the plan."""
    line = next(line for line in output.splitlines() if line.startswith(name))
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\.?\d+", line)]


def test_what_is_needed_by_hand() -> None:
    facts = {
        "config": {"context": 11}, "chunk_rows": 100, "sequences_per_window": 30,
        "sites": {"a": 8, "b": 4},
    }  # fmt: skip
    # 70 sequences: two windows of 300 rows in 3 chunks each, one of 100; held out 5: 50 rows
    found = needs(facts, {"train": 70, "held_out": 5})
    tables = 75 * (11 * 9 + 1)
    assert found.rows == 750
    assert found.size == (3 + 3 + 1 + 1) * 100 * (8 + 24) + tables + 7 * 4096
    # with half of the positions: 150 rows in 2 chunks, 50 in 1, 25 in 1
    half = needs(facts, {"train": 70, "held_out": 5}, 0.5)
    assert (half.rows, half.size) == (375, 600 * 32 + tables + 7 * 4096)


def test_the_plan_is_near_to_what_is_taken(
    make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(make(HarvestCommand, plan=True)) is None
    output = capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    store = harvest(make())
    planned = store.manifest["planned_sequences"]
    assert shown(output, "train")[:2] == [planned["train"], planned["train"] * 16]
    assert shown(output, "held out")[0] == planned["held_out"]
    assert shown(output, "rows")[0] == pytest.approx(store.n_rows(), rel=0.02)
    facts = store.manifest
    share = store.n_rows() / (store.n_sequences * 15)
    assert needs(facts, planned, share).size == pytest.approx(on_disk(local(store.path)), rel=0.1)
    assert "tokens/s" in output
    assert re.search(r"memory +about [\d.]+ [GM]B; \d+ GB in this machine", output)
    run(make(HarvestCommand, plan=True))
    assert "complete already" in capsys.readouterr().out


def test_the_plan_of_what_is_left(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written, original = [0], HarvestWriter.write

    def write(self: HarvestWriter, data: Any) -> None:
        if written[0] == 2:
            raise KeyboardInterrupt
        written[0] += 1
        original(self, data)

    config = make()
    with monkeypatch.context() as patch:
        patch.setattr(HarvestWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    begun = ActivationStore.open(config.out)
    capsys.readouterr()
    run(make(HarvestCommand, plan=True))
    left = begun.manifest["planned_sequences"]["train"] - begun.n_sequences
    assert shown(capsys.readouterr().out, "train")[0] == left > 0
    harvest(config)
    more = CorpusConfig(source=str(make_tiny_corpus(tmp_path / "more", documents=30)))
    capsys.readouterr()
    run(make(HarvestCommand, plan=True, append=True, corpus=more))
    sequences = shown(capsys.readouterr().out, "train")[0]
    assert not ActivationStore.open(config.out).manifest.get("appended")
    store = run(make(HarvestCommand, append=True, corpus=more))
    assert store is not None
    assert store.manifest["appended"][0]["planned_sequences"]["train"] == sequences


def test_what_cannot_fit_is_refused_before_it_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = make()
    store = harvest(make(out=str(tmp_path / "else" / "out")))
    size = needs(store.manifest, store.manifest["planned_sequences"]).size
    free = [size // 2]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    message = r"out: does not fit on the disk: [\d,]+ rows take \d+\.\d MB.*--ignore-space"
    for refused in (
        lambda: harvest(config),
        lambda: run(make(HarvestCommand)),
        lambda: run(make(HarvestCommand, plan=True)),
        lambda: append(dataclasses.replace(config, out=str(store.path), max_tokens=1600)),
    ):
        free[0] = 1000 if refused is not None else 0
        with pytest.raises(InputError, match=message):
            refused()
    assert not (tmp_path / "data" / "out").exists()
    words = [
        "harvest", "--model.spec", str(tiny_folder), "--model.dtype", "float32",
        "--corpus.source", config.corpus.source, "--sites", config.sites[0], "--out", config.out,
        "--context", "16", "--chunk-rows", "128", "--plan",
    ]  # fmt: skip
    assert main(words) == 2
    assert "time " in capsys.readouterr().out
    assert main([*words[:-1], "--ignore-space"]) == 0
    assert ActivationStore.open(config.out).complete
