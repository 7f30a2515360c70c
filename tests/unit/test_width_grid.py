"""A grid of widths and L0, trained, measured and compared at one FVU by three commands."""

import re
from pathlib import Path

import pytest

from sae.analysis.description_length import Described, at_equal_distortion
from sae.evaluation.metric_table import read_metric_table
from sae.evaluation.written import read_evaluation
from saescope.__main__ import main
from tests.tiny import make_tiny_harvest, make_tiny_model

GRID = """
harvest = "{harvest}"
out = "{out}"

[base]
trainer.batch_size = 64

[[grid]]
"sae.kind" = "topk"
"sae.d_sae" = [32, 64]
"sae.k" = [2, 8]
"""


@pytest.mark.parametrize("suites", ["core,description_length", "description_length"])
def test_the_width_that_takes_fewest_bits_is_said(
    trained: Path, suites: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained), "--suite", suites, "--tokens", "0", "--replace"]) == 0
    capsys.readouterr()
    assert main(["report", str(trained), "--out", str(tmp_path / "grid.md")]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    saes = []
    for path in sorted(trained.glob("*/evaluation.json")):
        written = read_evaluation(path)
        values = {row["name"]: row["value"] for row in read_metric_table(path, written)}
        (d_sae,) = {row["d_sae"] for row in read_metric_table(path, written)}
        fvu, bits = values["fvu_quantised"], values["description_bits"]
        saes.append(Described(d_sae=d_sae, l0=values.get("l0", 0.0), fvu=fvu, bits=bits))
    assert len(saes) == 4
    best = at_equal_distortion(saes)
    shown = {int(w): float(b) for w, b in re.findall(r"d_sae (\d+): ([\d.]+) bits", said)}
    assert shown == {width: pytest.approx(bits, abs=0.05) for width, bits in best.bits.items()}
    assert len(shown) == 2
    assert said.startswith(f"At equal distortion, FVU {best.fvu:.4f}: ")
    assert said.endswith(f"; fewest: d_sae {best.d_sae}.")
    assert ("at L0" in said) == ("core" in suites)
    assert said.replace("_", "\\_") in (tmp_path / "grid.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep's folder."""
    root = tmp_path_factory.mktemp("grid")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    file = root / "grid.toml"
    file.write_text(GRID.format(harvest=harvest, out=root / "widths"))
    assert main(["sweep", str(file)]) is not None
    return root / "widths"
