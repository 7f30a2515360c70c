"""Architectures of other packages: named by --plugin, by a variable, by an entry point."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sae.architectures as registry
import sae.evaluation as evaluation
from activations import ActivationStore
from sae.architectures import architecture, list_architectures
from sae.formats import format_named
from sae.formats.load import load
from saescope import plugins
from saescope.__main__ import main
from saescope.commands import COMMANDS
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from store.database import STORE_FILE

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""A ReLU SAE whose pre-activations are doubled, as somebody might write one."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sae import kernels
from sae.architectures import register
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingOutput
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class DoubledConfig(SAEConfig):
    """Configuration of the doubled architecture."""

    kind: Literal["doubled"] = "doubled"
    """Name of the architecture."""
    cost: float = 0.5
    """Weight of the penalty."""


@register
class Doubled(SparseAutoencoder):
    """f = 2 ReLU(W_enc^T (y - b_dec) + b_enc)."""

    Config: ClassVar[type[SAEConfig]] = DoubledConfig
    plain_rules: ClassVar[tuple[Rule, ...]] = ("relu",)
    penalised = True

    def _codes(self, centred):
        found = kernels.encode_above(centred, 2 * self.W_enc_T, 2 * self.b_enc, 0.0)
        return SparseCodes(*found, self.d_sae)

    def encode_normalised(self, y):
        return self._codes(self.encoder_input(y))

    def training_output(self, batch, state):
        codes = self._codes(self.centred(batch))
        found = self.reconstruct(codes, batch)
        loss = found.loss + self.config.cost * state.penalty * batch.mean(codes.value)
        return TrainingOutput(loss, {"fvu": found.loss.detach()}, codes.counts(), found)

    def plain_parts(self) -> dict[str, Any]:
        return {"activation": "relu", "W_enc": 2 * self.W_enc, "b_enc": 2 * self.b_enc}

    def decoder_directions(self):
        return -self.W_dec.flip(0)  # so that a store shows whose word counts
'''


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that knows no plug-in, before and after."""
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    list_architectures()
    known, modules = dict(registry._REGISTRY), set(sys.modules)
    monkeypatch.setattr(registry, "_LOADED", set())
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)
    for name in set(sys.modules) - modules:
        if name.startswith("my_package"):
            del sys.modules[name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a package my_package that has my_package.doubled."""
    here = tmp_path / "here"
    (here / "my_package").mkdir(parents=True)
    (here / "my_package" / "__init__.py").touch()
    (here / "my_package" / "doubled.py").write_text(SOURCE)
    importlib.invalidate_caches()
    monkeypatch.chdir(here)
    return here


PLUGIN = ("--plugin", "my_package.doubled")


def test_every_command_knows_it(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated, indexed, exported and read again; nothing of saescope was edited."""
    harvest, rows = str(tmp_path / "harvest"), torch.randn(3000, 32).numpy()
    ActivationStore.from_arrays(harvest, {"mlp": rows}, tokens=np.arange(3000) % 50)
    run, stores = str(tmp_path / "run"), tmp_path / "store"
    words = ["train", "--harvest", harvest, "--out", run, "--sae.kind", "doubled", "--sae.d-sae"]
    words += ["24", "--sae.cost", "0.25", "--trainer.batch-size", "256", "--passes", "1"]
    assert main([*words, *PLUGIN]) == 0
    assert main([PLUGIN[0] + "=" + PLUGIN[1], "eval", run]) == 0
    assert main(["index", run, "--out", str(stores), *PLUGIN]) == 0
    for to in ("saelens", "dictionary_learning", "gemma_scope"):
        assert main(["convert", run, "--to", to, "--out", str(tmp_path / to), *PLUGIN]) == 0
    ours, x = load(run), torch.randn(20, 32)
    assert ours.config.cost == 0.25  # type: ignore[attr-defined]
    assert type(ours).__module__ == "my_package.doubled"
    for to in ("saelens", "dictionary_learning", "gemma_scope"):
        again = format_named(to).read(tmp_path / to)
        torch.testing.assert_close(again.encode(x), ours.encode(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"sparsify: cannot hold this architecture .*doubled"):
        format_named("sparsify").write(ours, tmp_path / "no")
    with FeatureStore.open(stores / STORE_FILE) as store:
        assert store.meta["architecture"] == "doubled"
        unit = torch.nn.functional.normalize(ours.decoder_directions().detach(), dim=1)
        cosine = unit @ unit.T - 2 * torch.eye(24)
        for feature in (0, 7):
            nearest = store.neighbours(feature)[0]
            assert nearest.feature == int(cosine[feature].argmax())
            assert nearest.cosine == pytest.approx(float(cosine[feature].max()), abs=1e-5)
        assert "encoder_bias" in store.feature(7).more
    capsys.readouterr()


def test_without_it_an_sae_says_what_is_missing(package: Path, tmp_path: Path) -> None:
    with plugins.taken_from(PLUGIN):
        architecture("doubled")(architecture("doubled").Config(d_sae=6), 4).save(tmp_path / "sae")
    words = [sys.executable, "-m", "saescope", "convert", str(tmp_path / "sae"), "--out", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert found.returncode == 2
    assert "unknown architecture" in found.stderr
    assert "'doubled'" in found.stderr
    assert "--plugin my_package.doubled" in found.stderr
    registry._REGISTRY.pop("doubled")
    with pytest.raises(ArtefactError, match=r"SAESCOPE_PLUGINS=my_package\.doubled"):
        load(tmp_path / "sae")


def test_processes_that_are_started_know_it(package: Path, tmp_path: Path) -> None:
    """Wherever they run, as the explorer's server does in a folder of its own."""
    code = "from sae.architectures import architecture; print(architecture('doubled').__name__)"
    with plugins.taken_from(["explore", *PLUGIN]) as rest:
        assert rest == ["explore"]
        words = [sys.executable, "-c", code]
        found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "Doubled\n"
    assert plugins.VARIABLE not in os.environ
    assert str(package) not in sys.path
    assert str(package) not in os.environ.get("PYTHONPATH", "")


@pytest.mark.slow
def test_help_shows_its_fields(package: Path) -> None:
    words = [sys.executable, "-m", "saescope", "train", *PLUGIN, "--sae.kind", "doubled", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert found.returncode == 0
    assert "--sae.cost" in found.stdout
    assert "--plugin my.module" in found.stdout


def test_an_installed_package_names_it_by_an_entry_point(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = package / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[saescope.architectures]\nanything = my_package.doubled\n"
    )
    monkeypatch.syspath_prepend(str(package))
    assert "doubled" in list_architectures()
    (package / "my_package" / "doubled.py").unlink()
    (info / "entry_points.txt").write_text("[saescope.architectures]\ngone = my_package.gone\n")
    monkeypatch.setattr(registry, "_LOADED", set())
    plugins._installed.cache_clear()
    with pytest.raises(InputError, match="entry point gone of my-package: cannot be imported"):
        list_architectures()


@pytest.mark.usefixtures("own_metrics")
def test_a_module_of_metrics_alone_is_one_too(package: Path) -> None:
    (package / "my_package" / "measured.py").write_text(
        "from saescope.metrics import Metric\n"
        "from sae.evaluation import metric_family\n"
        "from sae.evaluation.rows import RowSums\n"
        "row = Metric(name='mine', label='mine', help='of mine', better='lower')\n"
        "@metric_family('mine', needs='activations', metrics=[row])\n"
        "class Mine(RowSums):\n"
        "    pass\n"
    )
    with plugins.taken_from(["eval", "--plugin", "my_package.measured"]):
        list_architectures()
        assert "mine" in evaluation.families()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "--plugin: cannot be imported: ModuleNotFoundError: .*given: 'my_package.other'"),
        ("1 / 0", "--plugin: cannot be imported: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "--plugin: cannot be imported: SystemExit: 3"),
        ("import sae", "--plugin: registers no architecture .*given: 'my_package.other'"),
        (
            SOURCE.replace('"doubled"', '"topk"'),
            "my_package.other: registers an architecture under a name that is taken "
            r"\(given: 'topk'; allowed: another name; 'topk' is sae.architectures.topk's",
        ),
    ],
)
def test_what_is_wrong_with_a_plug_in(
    source: str | None, message: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source is not None:
        (package / "my_package" / "other.py").write_text(source)
    known = dict(registry._REGISTRY)
    with (
        plugins.taken_from(["--plugin", "my_package.other"]),
        pytest.raises(InputError, match=message),
    ):
        list_architectures()
    assert known == registry._REGISTRY
    assert main(["convert", "nothing", "--out", "x", "--plugin", "my_package.other"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saescope: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--plugin"], "--plugin: is no module's name"),
        (["train", "--plugin", "my-package"], "--plugin: is no module's name"),
        (["train", "--plugin=my/file.py"], "--plugin: is no module's name"),
        (["harvest", *PLUGIN], "saescope harvest: loads no SAEs"),
        (list(PLUGIN), "no such command"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_every_command_that_loads_saes_says_so() -> None:
    what_was_made = {
        "annotations",
        "diff",
        "export",
        "label",
        "report",
        "reproduce",
        "search",
        "sql",
    }
    others = {name for name, command in COMMANDS.items() if not command.loads_saes}
    assert others <= {"demo", "init", "harvest", "join", "reproduce", *what_was_made}
