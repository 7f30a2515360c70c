"""The harvest's benchmark: the bare forward is what is harvested, rows, targets, memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from activations.models.language import Model
from activations.models.load import load_model
from benchmarks import harvest, loader, performance_data
from benchmarks.harvest import HarvestBenchConfig, forward, measure
from sae.bench import rows
from saescope.errors import InputError
from tests.tiny import SENTENCES, make_tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HarvestBenchConfig:
    root = tmp_path_factory.mktemp("bench")
    text = root / "text.txt"
    text.write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    return HarvestBenchConfig(
        results=str(root / "harvest.csv"), work=str(root / "work"),
        model=str(make_tiny_model(root / "model")), source=str(text), block=1, context=32, batch=4,
        dtypes=("float32",), windows=3, saelens=False, tiny=True, threads=torch.get_num_threads(),
    )  # fmt: skip


def test_the_bare_forward_is_of_the_site_and_stops_there(config: HarvestBenchConfig) -> None:
    model = load_model(config.model, dtype="float32")
    assert isinstance(model, Model)
    tokens = torch.arange(20).view(2, 10)
    assert model.sites()  # found in a pass through the whole model
    calls: list[int] = []
    model.hf.get_submodule("model.layers.2").register_forward_hook(lambda *_: calls.append(1))
    found = forward(model, 1, [tokens])
    assert torch.equal(found, model.capture(tokens, config.sites(1))[config.sites(1)[0]])
    assert not calls
    with pytest.raises(InputError, match="threads"):
        HarvestBenchConfig(threads=0)


@pytest.mark.slow
def test_rows_for_each_and_for_memory_are_added(config: HarvestBenchConfig) -> None:
    measure(config)
    found = rows.read(Path(config.results), harvest.COLUMNS)
    assert [(row["library"], row["setting"], row["sites"]) for row in found] == [
        ("transformers", "forward", "1"), ("saescope", "computed", "1"),
        ("saescope", "written", "1"), ("saescope", "computed", "3"), ("saescope", "written", "3"),
        ("saescope", "memory", "1"),
    ]  # fmt: skip
    assert found[0]["ratio_to_forward"] == "1.000"
    assert {row["tokens"] for row in found[:-1]} == {"2048"}
    assert found[-1]["windows"] == "3"
    assert not list((Path(config.work) / "harvest").glob("store"))
    page = "\n".join(performance_data.section(found, (), None))
    assert page.count("| harvest of ") == 2
    assert "SAELens |" not in page


def row(**fields: Any) -> dict[str, str]:
    names = {*harvest.COLUMNS, *loader.COLUMNS}
    return dict.fromkeys(names, "1") | {name: str(value) for name, value in fields.items()}


def test_targets_of_the_harvest() -> None:
    def timed(library: str, setting: str, sites: int, rate: int) -> dict[str, str]:
        return row(library=library, setting=setting, sites=sites, tokens_per_s=rate,
                   dtype="float32")  # fmt: skip

    found = [
        timed("transformers", "forward", 1, 1000), timed("saescope", "computed", 1, 960),
        timed("saescope", "written", 1, 800), timed("saescope", "computed", 3, 890),
        timed("SAELens", "cached-activations runner", 1, 500),
        row(setting="memory", dtype="float32", first_window_mib=600, peak_mib=700, windows=5),
    ]  # fmt: skip
    measured = {what: (shown, holds) for what, _, shown, holds in
                performance_data.harvest_targets(found)}  # fmt: skip
    assert measured == {
        "harvest of one site, fp32, over the bare forward": ("0.960", True),
        "harvest of three sites, fp32, over the bare forward": ("0.890", False),
        "what writing adds to the forward, fp32": ("20.8%", False),  # 1000 (1/800 - 1/960)
        "harvest, written, fp32, over SAELens": ("1.60x (the bare forward: 2.00x)", True),
        "peak memory above the model's, fp32": ("700 MiB", True),
        "the same after 5 windows, over that after one": ("1.17", True),
    }


def test_targets_of_the_loader() -> None:
    def read(library: str, setting: str, storage: str, batches: str, rate: float) -> Any:
        return row(library=library, setting=setting, storage=storage, batches=batches,
                   tokens_per_s=rate)  # fmt: skip

    found = [
        read("saescope", "chunks", "bfloat16", "float32", 9e6),
        read("saescope", "spread", "bfloat16", "float32", 1.2e6),
        read("safetensors", "4 at a time", "bfloat16", "float32", 1e6),
        read("SAELens", "64 sequences", "float16", "float32", 1e5),
        read("SAELens", "64 sequences", "float32", "float32", 2e5),
    ]
    measured = [(shown, holds) for _, _, shown, holds in
                performance_data.loader_targets(found, 4e4)]  # fmt: skip
    assert measured == [("1.20 M", False), ("30x", True), ("6.00x", False), ("1.20x", True)]
