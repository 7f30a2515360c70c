"""The packaged model: converted once, atomically, and said to be what it is."""

import errno
from pathlib import Path

import pytest
import torch

from activations import load_model
from activations.packaged import packaged_folder
from saescope.assets import wheel
from saescope.errors import ArtefactError
from tests.tiny import make_tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    return tmp_path


def test_converted_once_and_said_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = []

    def convert(name: str, folder: Path) -> None:
        converted.append(name)
        make_tiny_model(folder)

    monkeypatch.setattr("activations.packaged._convert", convert)
    model = load_model("smollm2-135m", dtype="float32")
    said = capsys.readouterr().out
    assert "Instruct" in said
    assert "de-quantised" in said
    assert (model.name, model.spec) == ("smollm2-135m", "smollm2-135m")
    assert model.folder.parent == cache / "models"
    load_model("smollm2-135m", dtype="float32")
    assert converted == ["smollm2-135m"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), ArtefactError)],
)
def test_an_interrupted_conversion_leaves_nothing(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    def convert(name: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr("activations.packaged._convert", convert)
    with pytest.raises(raised):
        packaged_folder("smollm2-135m")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.slow
def test_the_real_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("SAESCOPE_CACHE")
        shipped = wheel("smollm2-135m")
    (cache / "assets").mkdir()
    (cache / "assets" / shipped.name).symlink_to(shipped)
    model = load_model("smollm2-135m", dtype="float32")
    assert sorted(path.suffix for path in model.folder.iterdir()).count(".gguf") == 0
    assert (model.d_model, model.n_layers, model.n_ctx, model.d_vocab) == (576, 30, 8192, 49152)
    assert model.bos_token_id is None
    assert model.generate("The capital of France is", max_new_tokens=1).endswith(" Paris")
    tokens = torch.tensor([model.tokenize("The river rose in the night and the bridge closed.")])
    states = model.hf(tokens, output_hidden_states=True).hidden_states
    site = "blocks.9.hook_resid_post"
    torch.testing.assert_close(model.capture(tokens, [site])[site], states[10])
