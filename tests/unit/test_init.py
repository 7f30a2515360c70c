"""The example configurations, and `saescope init`, which writes them."""

from pathlib import Path

import pytest

from saescope import config
from saescope.__main__ import main
from saescope.config import Config
from saescope.errors import ArtefactError, InputError
from saescope.examples import examples
from saescope.init_command import InitConfig, init

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_writes_the_tree_that_a_checkout_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "new folder")]) == 0
    written = files(tmp_path / "new folder" / "configs")
    assert written == files(ROOT / "configs")
    assert list(examples()) == sorted(f"configs/{name}" for name in written)
    said = capsys.readouterr().out
    for path in examples().values():
        assert path.name in said
    assert f"cd '{tmp_path / 'new folder'}'" in said
    assert "saescope harvest configs/harvest/smollm2-135m-wikipedia.toml --plan" in said


def test_the_current_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert files(tmp_path / "configs") == files(ROOT / "configs")
    assert "cd " not in capsys.readouterr().out


def test_writes_over_nothing(tmp_path: Path) -> None:
    own = tmp_path / "configs" / "train" / "topk.toml"
    own.parent.mkdir(parents=True)
    own.write_text("# mine")
    with pytest.raises(InputError, match=r"nothing is written.*configs/train/topk\.toml"):
        init(InitConfig(folder=str(tmp_path)))
    assert files(tmp_path) == {"configs/train/topk.toml": b"# mine"}
    own.rename(own.with_name("mine.toml"))
    init(InitConfig(folder=str(tmp_path)))
    assert files(tmp_path / "configs") == files(ROOT / "configs") | {"train/mine.toml": b"# mine"}
    with pytest.raises(InputError, match="there already"):
        init(InitConfig(folder=str(tmp_path)))


def test_what_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"file.*is no folder, or lies below"):
        init(InitConfig(folder=str(tmp_path / "file")))


def test_an_interrupted_one_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are made one after another; here the third cannot be read."""
    found = examples()
    third = list(found)[2]
    monkeypatch.setattr(
        "saescope.init_command.examples", lambda: found | {third: tmp_path / "nowhere"}
    )
    with pytest.raises(ArtefactError, match="nowhere: no such file"):
        init(InitConfig(folder=str(tmp_path / "new")))
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/harvest/gpt2-small.toml", "."),
        ("./configs/train/topk.toml", "."),
        ("my work/configs/sweep/pareto.toml", "'my work'"),
        ("configs/harvest/unheard-of.toml", None),
        ("topk.toml", None),
    ],
)
def test_a_missing_example_says_how_to_get_it(
    path: str, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such configuration file") as raised:
        config.load(Config, path)
    assert (f"`saescope init {folder}`" in str(raised.value)) == (folder is not None)
    assert ("saescope init" in str(raised.value)) == (folder is not None)
