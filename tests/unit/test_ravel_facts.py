"""The facts that the suite `ravel` ships, and its command on a model that knows none of them."""

from pathlib import Path

import pytest

import sae
from sae.ravel.entities import SLOT, entity_kinds
from saescope.__main__ import main
from tests.artefacts import train_config
from tests.tiny import make_tiny_harvest, make_tiny_model


def test_shipped_facts_are_whole() -> None:
    kinds = entity_kinds()
    assert set(kinds) == {"city", "country"}
    for kind in kinds.values():
        assert len(kind.values) > 80
        assert len(kind.sentences) == 3
        for attribute, sentences in kind.sentences.items():
            values = [row[attribute] for row in kind.values.values()]
            assert all(value.strip() == value != "" for value in values)
            assert len(set(values)) >= 5
            assert len(sentences) == 2
            for sentence in sentences:
                assert sentence.count(SLOT) == 1
                assert not sentence.startswith(SLOT)  # a first token's activation is like no other
                assert not [name for name in kind.values if name in sentence.replace(SLOT, "")]
    cities, countries = kinds["city"].values, kinds["country"].values
    for row in cities.values():  # one fact is the same wherever it is said
        if row["country"] in countries and row["country"] != "Russia":
            assert row["continent"] == countries[row["country"]]["continent"]


def test_the_command_says_what_a_model_without_knowledge_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest = make_tiny_harvest(tmp_path, make_tiny_model(tmp_path / "model"), documents=30)
    sae.train(train_config(harvest, tmp_path / "run"))
    words = ("eval", str(tmp_path / "run"), "--suite", "ravel", "--quick", "--ravel.entities", "8")
    assert main([*words, "--out", str(tmp_path / "e.json")]) == 2
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "the model knows too little" in shown
    assert "{'city': '0 of " in shown
    assert not (tmp_path / "e.json").exists()
