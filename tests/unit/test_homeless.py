"""A user without a home folder: the cache is named, or one clear line says how to name it."""

from pathlib import Path

import pytest

from saescope import compiled
from saescope.cache import cache_dir, remembered
from saescope.errors import ArtefactError


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", expanduser)
    for name in ("HOME", "SAESCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_the_cache_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match=r"SAESCOPE_CACHE: .*no home folder"):
        cache_dir()
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


@pytest.mark.usefixtures("homeless")
def test_it_goes_on_without_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "true")
    (tmp_path / "some.cpp").touch()
    assert compiled.load("some", tmp_path, what="kernels", instead="torch is used") is None
    assert "no home folder" in capsys.readouterr().err


@pytest.mark.usefixtures("homeless")
def test_what_cannot_be_noted_is_measured() -> None:
    assert remembered("some", ("fast", "slow"), lambda: "fast") == "fast"
