"""Which prebuilt library is loaded, on a small source; tests/e2e/test_prebuilt.py has a wheel."""

import ctypes
import shutil
from pathlib import Path

import pytest

from saescope import compiled, prebuilt
from saescope.compiler import NotBuilt
from saescope.errors import InputError
from saescope.prebuilt import Variant

NEW, OLD = (
    Variant(name, "Any", "any", (f"-DANSWER={answer}",), frozenset(needs))
    for name, answer, needs in (("new", 2, ["wide"]), ("old", 1, ["narrow"]))
)
UNKNOWN = Variant("unknown", "Any", "any", ("-march=no-such-processor",))
_SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source, with libraries for two kinds of processors; this one has all that either needs."""
    for name in ("CXX", "SAESCOPE_CXXFLAGS", "SAESCOPE_PREBUILT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prebuilt, "variants", lambda: [NEW, OLD])
    monkeypatch.setattr(prebuilt, "features", lambda: frozenset({"wide", "narrow"}))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(_SOURCE)
    (folder / "answer.h").touch()
    assert len(prebuilt.build("some", folder, folder / prebuilt.FOLDER)) == 2
    return folder


def answer(folder: Path) -> int | None:
    """What the library answers that is loaded; None if there is none."""
    found = compiled.load("some", folder, what="answers", instead="guessing")
    return None if found is None else found.answer()


def without_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))


def test_the_best_that_fits_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(folder, monkeypatch)
    assert answer(folder) == 2
    monkeypatch.setattr(prebuilt, "features", lambda: frozenset({"narrow"}))
    assert answer(folder) == 1
    assert not (folder.parent / "cache").exists()


def test_one_of_other_sources_is_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "answer.cpp").write_text(_SOURCE.replace("ANSWER", "3"))
    assert answer(folder) == 3
    assert capsys.readouterr().err == ""
    without_compiler(folder, monkeypatch)
    assert answer(folder) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no compiler: neither g++ nor clang++ was found; " in said
    assert "of those prebuilt (new, old) none is of these sources and for this processor" in said


def test_damaged_ones_are_named_and_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compiler(folder, monkeypatch)
    for name, left in (("new", 1), ("old", None)):
        (path,) = (folder / prebuilt.FOLDER).glob(f"some-{name}-*")
        whole = path.read_bytes()
        path.unlink()  # this process has it in memory
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert answer(folder) == left
        assert f"{path} is damaged and is not used" in capsys.readouterr().err


def test_what_cannot_be_loaded_is_compiled_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nonsense(*_: object) -> Path:
        return folder / "answer.h"

    monkeypatch.setattr(prebuilt, "find", nonsense)
    (folder / "answer.cpp").write_text(_SOURCE.replace("ANSWER", "3"))
    assert answer(folder) == 3
    assert "answer.h cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("SAESCOPE_PREBUILT", "0"), ("SAESCOPE_CXXFLAGS", "-O1"), ("CXX", "g++")]
)
def test_a_local_compile_is_preferred(
    name: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "answer.cpp").write_text(_SOURCE.replace("ANSWER", "3"))
    shutil.rmtree(folder / prebuilt.FOLDER)
    prebuilt.build("some", folder, folder / prebuilt.FOLDER)
    monkeypatch.setenv(name, value)
    loaded: list[str] = []
    whole = ctypes.CDLL
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda path: loaded.append(path) or whole(path))
    assert answer(folder) == 3
    assert [Path(path).parent.name for path in loaded] == ["cache"]


def test_a_switch_has_two_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_PREBUILT", "never")
    with pytest.raises(InputError, match=r"SAESCOPE_PREBUILT: .*'never'; allowed: 0, 1"):
        answer(folder)


def test_a_variant_that_the_compiler_does_not_know_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prebuilt, "variants", lambda: [UNKNOWN, OLD])
    (built,) = prebuilt.build("some", folder, folder / "more")
    assert built.name.startswith("some-old-")
    said = capsys.readouterr().err
    assert said.startswith("saescope: no some for unknown: g++ failed: ")
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(NotBuilt, match="no compiler"):
        prebuilt.build("some", folder, folder / "more")


def test_a_checkout_has_none(folder: Path) -> None:
    assert prebuilt.find("another", folder) is None
    for name in ("sae/kernels", "activations/loading", "store"):
        assert not (Path(__file__).parents[2] / name / prebuilt.FOLDER).exists()


def test_every_variant_is_named_once_and_the_best_is_first() -> None:
    assert len({each.name for each in prebuilt.VARIANTS}) == len(prebuilt.VARIANTS)
    assert not any("-" in each.name for each in prebuilt.VARIANTS)
    x86 = [each.needs for each in prebuilt.VARIANTS if each.machine == "x86_64"]
    assert x86 == sorted(x86, key=len, reverse=True)
    assert x86[-1] < x86[0]
