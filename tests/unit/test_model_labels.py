"""Labels by a language model, against a local server that answers as one would."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError
from store import Annotations, FeatureStore
from store.labels.endpoint import Client, Endpoint
from store.labels.label import LabelSettings
from store.labels.language_model import (
    fuzzed_marks,
    read_explanation,
    read_verdicts,
    right_marks,
    window_texts,
)
from store.labels.model_labels import ModelLabeller, estimate
from store.labels.windows import Windows
from store.vocabulary import Vocabulary
from tests.fake_endpoint import completion, fake_endpoint
from tests.planted_store import FIRST_RANDOM, TOKEN, make_planted_store

SETTINGS = LabelSettings(windows=20, window=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_store(tmp_path_factory.mktemp("planted"))


def texts_of(prompt: str) -> list[str]:
    return re.findall(r"Text \d+: (.*?)(?=\n\n|\Z)", prompt, re.DOTALL)


def knows_rivers(body: dict[str, Any]) -> tuple[int, Any]:
    """A model that explains by the commonest marked token, and judges by that word rightly."""
    system, asked = (each["content"] for each in body["messages"])
    if "EXPLANATION:" in system:
        marked = re.findall(r"<<(.*?)>>", asked)
        word = max(set(marked), key=marked.count).split()[0]
        return 200, completion(f"I think\nEXPLANATION: the word {word}")
    word = asked.splitlines()[0].removeprefix("Description: the word ").strip()
    wanted = rf"<<[^>]* ?{word}\b" if "<<" in system else rf"\b{word}\b"
    verdicts = [int(bool(re.search(wanted, text))) for text in texts_of(asked)]
    return 200, completion(json.dumps(verdicts))


def client(url: str, folder: Path, **more: Any) -> Client:
    return Client(Endpoint(url=url, model="fake", **more), folder, sleep=lambda _: None)


def test_a_model_that_knows_the_feature_is_always_right(made: Path, tmp_path: Path) -> None:
    with (
        fake_endpoint(knows_rivers) as fake,
        FeatureStore.open(made) as store,
        Annotations.open(tmp_path / "notes.duckdb") as notes,
    ):
        labeller = ModelLabeller(store, client(fake.url, tmp_path / "answers"), SETTINGS)
        assert sum(labeller.run(notes, [TOKEN, FIRST_RANDOM])) == 2
        river, at_random = notes.machine_labels([TOKEN, FIRST_RANDOM])
        assert (river.method, river.label, river.score) == ("fake", "the word river", 1.0)
        assert (river.details["fuzzing"], river.details["top_token"]) == (1.0, 1.0)
        assert river.details["shuffled"] is None, "there was no other label yet"
        assert river.details["unreadable"] == 0
        assert at_random.score is not None
        assert abs(at_random.score - 0.5) < 0.2
        assert abs(at_random.details["shuffled"] - 0.5) < 0.2
        # 1 explanation, and of 40 windows five at a time 8 requests each for detection, fuzzing
        # and, for the second, shuffled labels
        assert len(fake.requests) == 1 + 16 + 1 + 24
        planned = estimate(store, SETTINGS, [TOKEN, FIRST_RANDOM])
        assert planned.requests == len(fake.requests)
        asked = sum(len(m["content"]) for body in fake.requests for m in body["messages"]) / 4
        assert abs(planned.tokens_in / asked - 1) < 0.1
        usage = labeller.client.usage
        assert (usage.requests, usage.tokens_in, usage.tokens_out) == (42, 4200, 420)
        # once more: all labels are there; and with --replace all answers are
        assert sum(labeller.run(notes, [TOKEN, FIRST_RANDOM])) == 2
        assert sum(labeller.run(notes, [TOKEN, FIRST_RANDOM], replace=True)) == 2
        assert len(fake.requests) == 42
        assert usage.cached == 42
        assert fake.paths[0] == "/v1/chat/completions"
        assert "Authorization" not in fake.headers[0]
        assert fake.requests[0]["temperature"] == 0


def test_a_model_that_always_agrees_scores_as_chance(made: Path, tmp_path: Path) -> None:
    def agrees(body: dict[str, Any]) -> tuple[int, Any]:
        count = len(texts_of(body["messages"][1]["content"]))
        return 200, completion(json.dumps([1] * count))

    with fake_endpoint(agrees) as fake, FeatureStore.open(made) as store:
        labeller = ModelLabeller(store, client(fake.url, tmp_path), SETTINGS)
        notes = Annotations.open(tmp_path / "notes.duckdb")
        list(labeller.run(notes, [TOKEN]))
        [label] = notes.machine_labels([TOKEN])
        notes.close()
    assert (label.score, label.details["fuzzing"]) == (0.5, 0.5)


def test_answers_that_cannot_be_read_are_counted(made: Path, tmp_path: Path) -> None:
    with (
        fake_endpoint(lambda _: (200, completion("I cannot say"))) as fake,
        FeatureStore.open(made) as store,
        Annotations.open(tmp_path / "notes.duckdb") as notes,
    ):
        list(ModelLabeller(store, client(fake.url, tmp_path), SETTINGS).run(notes, [TOKEN]))
        [label] = notes.machine_labels([TOKEN])
    assert (label.label, label.score, label.details["unreadable"]) == ("I cannot say", None, 80)


def test_it_waits_and_tries_again(tmp_path: Path) -> None:
    answers = [(429, "slow down"), (503, "busy"), (200, "{broken"), (200, completion("yes"))]
    waits: list[float] = []
    with fake_endpoint(lambda _: answers.pop(0)) as fake:
        asker = Client(Endpoint(url=fake.url, model="m", key="k1"), tmp_path, sleep=waits.append)
        assert asker.ask([{"role": "user", "content": "?"}], max_tokens=5) == "yes"
        assert waits == [7.0, 2.0, 4.0], "as long as the server asks, else twice as long each time"
        assert len(fake.requests) == 4
        assert fake.headers[0]["Authorization"] == "Bearer k1"
        assert asker.ask([{"role": "user", "content": "?"}], max_tokens=5) == "yes"
        assert len(fake.requests) == 4, "the answer is on the disk"
    saved = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(saved) == 1
    assert "k1" not in saved[0]
    assert "k1" not in repr(asker.endpoint)


def test_it_gives_up_with_a_sentence(tmp_path: Path) -> None:
    with fake_endpoint(lambda _: (500, "down")) as fake:
        asker = client(fake.url, tmp_path, tries=3)
        with pytest.raises(ArtefactError, match=r"no answer in 3 tries.*HTTP 500: down"):
            asker.ask([{"role": "user", "content": "?"}], max_tokens=5)
        assert len(fake.requests) == 3
    with pytest.raises(ArtefactError, match="no answer in 2 tries"):
        client(fake.url, tmp_path, tries=2).ask([{"role": "user", "content": "!"}], max_tokens=5)
    with fake_endpoint(lambda _: (401, "no such key")) as fake:
        with pytest.raises(InputError, match="refuses: HTTP 401: no such key"):
            client(fake.url, tmp_path).ask([{"role": "user", "content": "?"}], max_tokens=5)
        assert len(fake.requests) == 1, "a refusal is not tried again"
    with pytest.raises(InputError, match="url"):
        Endpoint(url="file:///etc/passwd", model="m")


def test_command(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "k2")
    words = ["label", str(made), "--features", f"{TOKEN}", "--windows", "20", "--window", "16"]
    with fake_endpoint(knows_rivers) as fake:
        words += ["--url", fake.url, "--model", "fake", "--price-in", "10", "--price-out", "1000"]
        words += ["--cache", str(tmp_path / "answers"), "--key-variable", "SOME_KEY"]
        assert main([*words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "would be asked: 17 requests" in said
        assert "nothing was sent" in said
        assert fake.requests == []
        assert main(words) == 0
        assert fake.headers[0]["Authorization"] == "Bearer k2"
    said = capsys.readouterr().out
    # 17 requests of 100 tokens in at 10 a million, and 10 out at 1000 a million
    assert "was asked: 17 requests, 1,700 tokens in, 170 out, cost 0.1870" in said
    assert "k2" not in said
    with Annotations.open(made) as notes:
        [label] = notes.machine_labels([TOKEN])
    assert (label.method, label.score) == ("fake", 1.0)


def test_no_network_without_an_address(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("OPENAI_API_KEY", "k3")
    words = ["label", str(made), "--features", "1", "--windows", "20", "--window", "16"]
    assert main(words) == 0


VOCABULARY = Vocabulary(["a", " b", " c"], {})
WINDOWS = Windows(
    np.array([[0, 1, 2, 1], [0, 1, 1, -1]], np.int32),
    np.array([[0, 4.0, 3.0, 1.0], [0, 0, 0, 0]], np.float32),
    np.array([0, 1]),
)


def test_marks() -> None:
    marks = right_marks(WINDOWS, 4.0)
    assert marks.tolist() == [[False, True, True, False], [False] * 4]
    assert window_texts(VOCABULARY, WINDOWS, marks) == ["a<< b c>> b", "a b b"]
    assert window_texts(VOCABULARY, WINDOWS) == ["a b c b", "a b b"]
    # a window where it fires below 0.3 of its maximum has its strongest token marked
    assert right_marks(WINDOWS, 100.0)[0].tolist() == [False, True, False, False]
    fuzzed = fuzzed_marks(WINDOWS, 4.0, np.random.default_rng(0))
    assert fuzzed[0].tolist() == marks[0].tolist()
    assert fuzzed[1].sum() == 2, "as many as in an active window"
    assert not fuzzed[1, 3], "there is no token"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("```json\n[0,0,0]\n```", [False, False, False]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1 0 1]", None),
        ("no", None),
        ("", None),
    ],
)
def test_verdicts(answer: str, found: list[bool] | None) -> None:
    assert read_verdicts(answer, 3) == found


def test_explanations() -> None:
    assert read_explanation("a\nEXPLANATION: b\nEXPLANATION: rivers\n\n") == "rivers"
    assert read_explanation("it is\nrivers\n") == "rivers"
    assert read_explanation("") == ""
