"""Feature stores damaged or made to mislead, at random: they answer, or one line says why not."""

import random
import shutil
from pathlib import Path

import pytest

from tests.foreign_stores import (
    altered,
    damaging_statements,
    flip_bytes,
    hostile_statements,
    said_of,
)
from tests.tiny_store import make_tiny_store

FEW_OR_ALL = pytest.mark.parametrize(
    "trials", [6, pytest.param(300, marks=[pytest.mark.torture, pytest.mark.timeout(1800)])]
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("good"))


@FEW_OR_ALL
def test_statements_at_random(good: Path, tmp_path: Path, trials: int) -> None:
    proof, secret = tmp_path / "proof.txt", tmp_path / "secret.txt"
    secret.write_text("a secret")
    for trial in range(trials):
        chance = random.Random(trial)
        statements = damaging_statements(chance)
        hostile = chance.random() < 0.4
        if hostile:
            named = hostile_statements(proof, secret)
            statements = named[chance.choice(sorted(named))]
        folder = tmp_path / f"trial {trial}"
        said = said_of(altered(good, folder, statements))
        assert "a secret" not in said
        assert said or not hostile, statements
        assert not proof.exists()
        shutil.rmtree(folder)


@FEW_OR_ALL
def test_bytes_at_random(good: Path, tmp_path: Path, trials: int) -> None:
    for trial in range(trials):
        folder = tmp_path / f"trial {trial}"
        path = altered(good, folder, [])
        flip_bytes(path, random.Random(trial))
        said_of(path)
        shutil.rmtree(folder)
