"""Labels by a language model that is run in this process, through the interface of an address."""

from pathlib import Path
from typing import Any

import pytest

from activations import Model
from sae.commands.label import local_answers
from saescope.__main__ import main
from saescope.errors import InputError
from store import Annotations, FeatureStore
from store.labels.command import LabelConfig, label_store
from tests.planted_store import TOKEN, make_planted_store
from tests.unit.test_model_labels import knows_rivers


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_planted_store(tmp_path)


def test_a_model_run_here_labels_as_one_at_an_address_would(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        asked.append(request)
        _, body = knows_rivers(request)
        return body["choices"][0]["message"]["content"], {"prompt_tokens": 7}

    config = LabelConfig(
        store=str(made),
        features=str(TOKEN),
        url="local:small-one",
        windows=20,
        window=16,
        cache=str(tmp_path / "answers"),
    )
    label_store(config, (answer, "abc"))
    said = capsys.readouterr().out
    assert f"local:small-one was asked: {len(asked)} requests, {7 * len(asked)} tokens in" in said
    with FeatureStore.open(made) as store, Annotations.open(store.path, sae_hash="5ae") as notes:
        (label,) = notes.machine_labels([TOKEN])
    assert (label.method, label.label, label.score) == ("small-one", "the word river", 1.0)
    first = len(asked)
    label_store(LabelConfig(**{**vars(config), "replace": True}), (answer, "abc"))
    assert len(asked) == first, "answers are kept under the hash of what was asked"
    label_store(config, (answer, "other weights"))
    assert len(asked) == 2 * first, "another model's answers are others"


def test_what_a_model_run_here_answers(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}answer:"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    messages = [{"role": "system", "content": "the old"}, {"role": "user", "content": "harbour"}]
    request = {"messages": messages, "temperature": 0, "max_tokens": 5}
    answer = local_answers(tiny_model)
    said, usage = answer(request)
    ids = tiny_model.tokenize("the old harbour answer:")
    new = list(tiny_model.stream_ids(ids, max_new_tokens=5))
    assert said == "".join(tiny_model.token_strings(new)).strip()
    assert usage == {"prompt_tokens": len(ids), "completion_tokens": len(new)}
    with pytest.raises(InputError, match="longer than the model's context"):
        answer({**request, "max_tokens": 500})
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no chat template"):
        answer(request)


def test_a_dry_run_loads_no_model(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label", str(made), "--features", str(TOKEN), "--dry-run"]
    assert main([*words, "--url", "local:there-is-none"]) == 0
    assert "local:there-is-none would be asked: " in capsys.readouterr().out
    with pytest.raises(InputError, match="names no model"):
        LabelConfig(store=str(made), url="local:")
    with pytest.raises(InputError, match="give --url and --model together"):
        LabelConfig(store=str(made), url="http://localhost:1")
