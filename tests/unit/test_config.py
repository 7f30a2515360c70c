"""Configuration files and options: strict, with the path of what is wrong."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saescope import config
from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """Inner."""

    k: int = 3
    """How many."""
    lr: float = 0.5
    """How fast."""

    def __post_init__(self) -> None:
        check_range("inner.k", self.k, low=1)


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    """Outer."""

    name: str
    """A name."""
    sites: tuple[str, ...] = ()
    """Some sites."""
    limit: int | None = None
    """A limit."""
    inner: Inner = field(default_factory=Inner)
    """The rest."""


def parse(*words: str) -> Outer:
    return config.parse(Outer, words, program="test", description="", positional="name")


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "a"\nsites = ["p", "q"]\n[inner]\nk = 7\nlr = 1\n')
    assert config.load(Outer, path) == Outer(name="a", sites=("p", "q"), inner=Inner(k=7, lr=1.0))
    found = parse(str(path), "--inner.k", "9", "--limit", "5", "--sites", "r")
    assert found == Outer(name="a", sites=("r",), limit=5, inner=Inner(k=9, lr=1.0))


def test_numbers_of_numpy_and_torch_become_pythons() -> None:
    inner = Inner(k=np.int64(7), lr=np.float32(0.5))  # type: ignore[arg-type]
    made = Outer(name="a", limit=torch.tensor(5), inner=inner)  # type: ignore[arg-type]
    assert made == Outer(name="a", limit=5, inner=Inner(k=7, lr=0.5))
    assert type(made.limit) is int
    assert type(made.inner.lr) is float
    assert json.dumps(config.to_dict(made))


@pytest.mark.parametrize("k", [True, 7.0, "7", np.array([7])])
def test_a_whole_number_is_nothing_else(k: Any) -> None:
    with pytest.raises(InputError, match="k: is not a whole number"):
        Inner(k=k)


@pytest.mark.parametrize("value", [True, "1", None, [1]])
def test_a_range_is_of_numbers(value: Any) -> None:
    with pytest.raises(InputError, match="lr: is not a number"):
        check_range("lr", value, low=0)


def test_positional_word_names_a_field() -> None:
    assert parse("a", "--inner.lr", "0.25") == Outer(name="a", inner=Inner(lr=0.25))


def test_positional_words_name_fields_in_turn() -> None:
    def both(*words: str) -> config.Config:
        return config.parse(
            Outer, words, program="test", description="", positional="name inner.lr"
        )

    assert both("a", "0.25", "--inner.k", "3") == Outer(name="a", inner=Inner(lr=0.25, k=3))
    assert both("a", "--inner.lr", "0.5") == Outer(name="a", inner=Inner(lr=0.5))


def test_the_last_positional_field_takes_all_words_that_are_left() -> None:
    def parsed(*words: str) -> config.Config:
        return config.parse(
            Outer, words, program="test", description="", positional="name sites..."
        )

    assert parsed("a", "p", "q", "--limit", "5") == Outer(name="a", sites=("p", "q"), limit=5)
    assert parsed("a", "--limit", "5") == Outer(name="a", limit=5)
    with pytest.raises(SystemExit):
        parse("a", "p")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a"\nnam = 1', r"unknown key 'nam'; known here: name, sites, limit, inner"),
        ('name = "a"\n[inner]\nkk = 1', r"unknown key 'inner.kk'; known here: k, lr"),
        ('name = "a"\n[inner]\nk = "1"', r"inner.k: .*valid integer, given '1'"),
        ('name = "a"\n[inner]\nk = 0', r"inner.k: out of range \(given: 0; allowed: at least 1\)"),
        ("sites = []", "name is required"),
        ('name = "a', "not valid TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        config.load(Outer, path)
    assert str(path) in str(raised.value)


DEEP = 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sites = {'[' * DEEP}{']' * DEEP}", "nested too deeply"),
        (f"x = {'{a=' * DEEP}1{'}' * DEEP}", "nested too deeply"),
        (f"{'.'.join(['a'] * DEEP)} = 1", "nested too deeply"),
        (f"limit = {'9' * 5000}", "not valid TOML: Exceeds the limit"),
        (f"limit = {'9' * 30}", "limit: is a number of more than 64 bits"),
        ("inner.lr = nan", "inner.lr: is no finite number, given nan"),
        ("inner.lr = -inf", "inner.lr: is no finite number, given -inf"),
        ('name = "a\\u0000b"', "name: has a NUL"),
        ('sites = ["a\\u0000b"]', "sites.0: has a NUL"),
        (f'name = "{"x" * 2_000_000}"', "too large"),
        ("name = 1979-05-27", "of a kind that configuration cannot hold"),
    ],
)
def test_files_that_are_too_much(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        config.load(Outer, path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 2100


def test_options_that_are_too_much() -> None:
    for words, message in (
        (("--inner.lr", "inf"), "inner.lr: is no finite number"),
        (("--limit", "9" * 30), "limit: is a number of more than 64 bits"),
    ):
        with pytest.raises(InputError, match=message):
            parse("a", *words)


def test_what_is_no_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    for name, message in (
        ("pipe.toml", "is no plain file"),
        ("loop.toml", "symbolic links lead in a circle"),
        (".", "is a folder"),
        ("latin.toml", "not valid TOML: 'utf-8'"),
        ("x" * 300, "the name is too long"),
        ("a\0b", "may not hold a NUL"),
    ):
        with pytest.raises(InputError, match=message):
            config.read_toml(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('name = "a"')
    assert config.read_toml("~/c.toml") == {"name": "a"}


def test_missing_file() -> None:
    with pytest.raises(InputError, match="no such configuration file"):
        parse("nowhere.toml")


def test_wrong_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("a", "--inner.kk", "1")
    assert raised.value.code == 2
    assert "--inner.kk" in capsys.readouterr().err


def test_round_trip() -> None:
    outer = Outer(name="a", sites=("x",), limit=3)
    assert config.from_dict(Outer, config.to_dict(outer), "test") == outer


def test_required_fields_by_option_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[inner]\nk = 7\n")
    assert parse(str(path), "--name", "b") == Outer(name="b", inner=Inner(k=7))
    assert parse(str(path), "--name=b", "--inner.k=2") == Outer(name="b", inner=Inner(k=2))
    with pytest.raises(InputError, match="name is required"):
        parse(str(path))
    with pytest.raises(InputError, match="name is required"):
        parse()
