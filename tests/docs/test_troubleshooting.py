"""The messages that the troubleshooting page explains are messages of the code, all themes."""

import re
import runpy
from pathlib import Path

import pytest

from saescope.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
CODE = runpy.run_path(str(ROOT / "docs" / "messages.py"))
EXPLAINED = re.compile(r"^(?P<ticks>``? ?)(?P<message>.+?)(?P<end> ?``?)\n: ", re.MULTILINE)


def explained() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [match["message"] for match in EXPLAINED.finditer(text)]


@pytest.fixture(scope="module")
def literals() -> set[str]:
    return CODE["literals"]()


def test_messages_that_are_explained_exist(literals: set[str]) -> None:
    found = explained()
    assert len(found) >= 50
    missing = [m for m in found if m not in literals and not any(m in text for text in literals)]
    assert missing == []


def test_every_block_of_the_page_is_read_as_a_message() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^: ", text, re.MULTILINE)) == len(explained())


def test_the_example_is_a_real_message() -> None:
    error = InputError("k exceeds the dictionary", where="sae.k", given=99, allowed="1 to 64")
    assert f"saescope: {error}" in PAGE.read_text(encoding="utf-8")


def test_all_messages_are_listed_by_theme() -> None:
    found = CODE["messages"]()
    assert all(found.values()), "a theme without messages"
    assert sum(map(len, found.values())) > 400
    assert "no such site of this SAE" not in found["The explorer"]
    assert "the text is longer than the model's context" in found["Steering"]
    assert "no such activation" in found["Architectures and training"]  # of check_choice
