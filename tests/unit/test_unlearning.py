"""Unlearning by clamping: definitions by hand, a model whose losses are known, and the command."""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sae
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evaluation import clamping
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.unlearning import best_clamp, divided, unlearning
from sae.evaluation.written import read_evaluation
from sae.probing.unlearning import Firing, alike, clamp_values, clamped, firing, of_subject
from sae.probing.unlearning_config import UnlearningConfig
from saescope.__main__ import main
from saescope.errors import InputError
from tests.artefacts import train_config
from tests.tiny import make_tiny_harvest, make_tiny_model

V = 12
"""tokens: 0 begins a text, 1 to 5 are of the others, 6 to 10 of the subject, 11 of both"""


class Planted:
    """A model that expects each token again: its activation has the token's coordinate at 2."""

    bos_token_id = 0
    edits: Any = None

    def facts(self) -> dict[str, Any]:
        return {"weights_hash": "w", "tokenizer_hash": "t", "dtype": "float32"}

    def d_in(self, _: str) -> int:
        return V

    def tokenize_batch(self, texts: Any) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def keep_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens.shape[1]).expand(tokens.shape) > 0

    def capture(self, tokens: torch.Tensor, sites: Any) -> dict[str, torch.Tensor]:
        return {site: 2 * torch.eye(V)[tokens] for site in sites}

    @contextmanager
    def edit(self, edits: Any) -> Iterator[None]:
        self.edits = edits
        yield
        self.edits = None

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        h = 2 * torch.eye(V)[tokens]
        for function in (self.edits or {}).values():
            found = function(h, torch.arange(tokens.shape[1]))
            h = h if found is None else found
        return h


def identity() -> TopKSAE:
    """Of a feature a token."""
    found = TopKSAE(TopKConfig(d_sae=V, k=1), V)
    with torch.no_grad():
        found.W_enc_T.copy_(torch.eye(V))
        found.W_dec.copy_(torch.eye(V))
        found.b_enc.zero_()
        found.b_dec.zero_()
    return found.eval()


def planted_texts(path: Path, shared: str) -> Path:
    """80 texts, each a token eight times or more: as often one of the subject as one of the others.
    What is shared is in front of all."""
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("prompt", "target"))
        for number in range(80):
            token = 1 + number // 2 % 5 + 5 * (number % 2)
            rows.writerow((shared + " ".join([str(token)] * (8 + number // 10)), number % 2))
    return path


def given(folder: Path, shared: str = "", **settings: Any) -> OnTexts[UnlearningConfig]:
    subject = str(planted_texts(folder / "subject.csv", shared))
    values: dict[str, Any] = {
        "model": Planted(),
        "site": "site",
        "sae": identity(),
        "sae_hash": "h" * 64,
        "seen": lambda x: x,
        "some_rows": lambda: torch.rand(64, V, generator=torch.Generator().manual_seed(0)),
        "settings": UnlearningConfig(subject=subject, texts=40, **settings),
        "cache": folder / "texts",
        "cache_limit": 1 << 30,
    }
    return OnTexts(**values)


# ---- definitions ---------------------------------------------------------------------------------


def test_features_are_clamped_where_they_fire_and_the_error_is_kept() -> None:
    torch.manual_seed(0)
    some = TopKSAE(TopKConfig(d_sae=30, k=3), 8).eval()
    x = torch.randn(50, 8)
    with torch.no_grad():
        codes = some.encode(x)
        chosen = codes.sum(0).argsort(descending=True)[:2].tolist()
        mean = np.arange(1.0, 31.0)
        values = clamp_values(chosen, mean, 2.0)
        found = clamped(some, x, values)
        edited = codes.clone()
        for each in chosen:
            edited[codes[:, each] != 0, each] = -2.0 * float(mean[each])
        expected = x + some.decode(edited) - some.decode(codes)
        fires = (codes[:, chosen] != 0).any(1)
    assert 0 < fires.sum() < 50
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found[~fires], x[~fires])
    assert torch.equal(clamped(some, x, clamp_values([], mean, 2.0)), x)


def test_firing_and_choice_by_hand() -> None:
    x = torch.tensor([[0.0, 2.0, 0.0], [0.0, 4.0, 1.0], [3.0, 0.0, 0.0]])
    found = firing(_passing(), x)
    assert found.rate.tolist() == [1 / 3, 2 / 3, 1 / 3]
    assert found.mean.tolist() == [3.0, 3.0, 1.0]
    forget = Firing(100, np.array([9.0, 50.0, 0.0, 30.0]), np.zeros(4))
    retain = Firing(100, np.array([0.0, 1.0, 0.0, 0.0]), np.zeros(4))
    assert of_subject(forget, retain, 0.01).tolist() == [3, 0]
    assert of_subject(forget, retain, 0.02).tolist() == [1, 3, 0]


def _passing() -> Any:
    from sae.kernels.codes import SparseCodes

    return SimpleNamespace(d_sae=3, encode_sparse=SparseCodes.from_dense)


def test_random_features_fire_about_as_often_and_are_others() -> None:
    fired = np.repeat([0.0, 10.0, 1000.0], 40)
    both = Firing(5000, fired, fired)
    chosen = np.array([41, 100, 42])
    for seed in range(3):
        found = alike(chosen, both, seed)
        assert fired[found].tolist() == [10.0, 1000.0, 10.0]
        assert len({*found.tolist(), *chosen.tolist()}) == 6
    assert alike(chosen, both, 0).tolist() != alike(chosen, both, 1).tolist()


def test_the_best_clamp_does_no_more_harm_than_allowed() -> None:
    rows = [
        {"n": n, "forget_rise": rise, "retain_rise": harm, "retain_clean": 2.0}
        for n, rise, harm in ((1, 0.5, 0.0), (2, 0.9, 0.02), (3, 1.5, 0.021))
    ]
    best = best_clamp(rows, 0.01)
    assert best is not None
    assert best["n"] == 2
    assert best_clamp(rows[2:], 0.01) is None


def test_texts_are_of_one_part_alone() -> None:
    labels = np.arange(100) % 2 == 0
    parts = divided([f"t{number}" for number in range(100)], labels, 40)
    for name, even in (("forget", True), ("retain", False)):
        own = [part[name] for part in (parts.features, parts.choice, parts.test)]
        assert [len(each) for each in own] == [20, 10, 10]
        assert len({text for each in own for text in each}) == 40
        assert all((int(text[1:]) % 2 == 0) == even for each in own for text in each)
    with pytest.raises(InputError, match=r"needs 16 texts with the label.*2 without"):
        divided(["a"] * 20, np.arange(20) > 1, 40)


# ---- a model whose losses are known --------------------------------------------------------------


def test_a_subject_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    """A logit of 2 among eleven of 0 becomes one of -2 m; tokens of other texts are not touched."""
    on = given(tmp_path, ns=(10,), strengths=(0.5, 1.0), draws=2)
    found = unlearning(on)

    def loss(logit: float) -> float:
        return math.log(math.exp(logit) + V - 1) - logit

    assert found["unlearning_forget"] == pytest.approx(loss(-2.0) - loss(2.0), abs=1e-6)
    assert found["unlearning_retain"] == found["unlearning_retain_kl"] == 0.0
    own = [row for row in on.tables["unlearning"] if row["method"] == "sae"]
    assert [(row["texts"], row["strength"]) for row in own] == [
        ("choice", 0.5),
        ("choice", 1.0),
        ("test", 1.0),
    ]
    assert sorted(own[0]["features"][0]) == [6, 7, 8, 9, 10]
    assert own[0]["forget_rise"] == pytest.approx(loss(-1.0) - loss(2.0), abs=1e-6)
    # random ones are the features of the other texts: all harm is there
    assert found["unlearning_forget_random"] == 0.0
    assert found["unlearning_retain_random"] > 1.0
    assert not list((tmp_path / "texts").glob("results-*"))


def test_no_clamp_that_harms_too_much_is_chosen(tmp_path: Path) -> None:
    on = given(tmp_path, "11 11 11 ", ns=(10,), strengths=(1.0,), sparse=1.0)
    found = unlearning(on)  # the feature of all texts is clamped too
    assert found["unlearning_forget"] is None
    assert {row["texts"] for row in on.tables["unlearning"]} == {"choice"}


def test_transcoders_and_wrong_settings_are_named(tmp_path: Path) -> None:
    on = given(tmp_path)
    object.__setattr__(on, "sae", SimpleNamespace(transcodes=True, metadata={}))
    with pytest.raises(InputError, match="unlearning is of SAEs that reconstruct"):
        unlearning(on)
    object.__setattr__(on, "sae", SimpleNamespace(transcodes=False, metadata={"lens": "x"}))
    with pytest.raises(InputError, match="behind a tuned lens"):
        unlearning(on)
    with pytest.raises(InputError, match=r"unlearning\.strengths: needs different"):
        UnlearningConfig(strengths=())
    with pytest.raises(InputError, match=r"unlearning\.texts.*15"):
        UnlearningConfig(texts=15)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a on a tiny harvest, and subject.csv."""
    root = tmp_path_factory.mktemp("unlearning")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    sae.train(train_config(harvest, root / "runs" / "a"))
    with (root / "subject.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("prompt", "target"))
        for number in range(40):
            word = "river bridge harbour" if number % 2 else "winter bread library"
            rows.writerow((f"{word} {number} {'mill ' * (number % 3)}", number % 2))
    return root


def words(root: Path, folder: Path) -> list[str]:
    return [
        *("eval", str(root / "runs" / "a"), "--suite", "unlearning", "--replace"),
        *("--out", str(folder / "e.json"), "--probing.cache", str(folder / "texts")),
        *("--unlearning.subject", str(root / "subject.csv"), "--unlearning.ns", "2"),
        *("--unlearning.strengths", "1.0", "--unlearning.sparse", "0.5"),
        *("--unlearning.harm", "10", "--unlearning.draws", "1"),
    ]


def test_runs_agree_after_a_kill_too_and_whatever_is_run_together(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("whole", "killed", "small"):
        (tmp_path / folder).mkdir()
    assert main(words(root, tmp_path / "whole")) == 0
    shown = capsys.readouterr().out
    assert "texts of a subject" in shown
    assert "random (test)" in shown
    done: list[int] = []
    of_batch = clamping.Clamping._batch

    def dies(self: Any, clamps: Any, tokens: Any) -> Any:
        if len(done) == 2:
            raise InputError("killed here", where="test")
        done.append(len(tokens))
        return of_batch(self, clamps, tokens)

    monkeypatch.setattr(clamping.Clamping, "_batch", dies)
    assert main(words(root, tmp_path / "killed")) == 2
    done.append(0)  # the two batches that are done are not among what follows
    again: list[Any] = []

    def counts(self: Any, clamps: Any, tokens: Any) -> Any:
        again.append(tokens)
        return of_batch(self, clamps, tokens)

    monkeypatch.setattr(clamping.Clamping, "_batch", counts)
    assert main(words(root, tmp_path / "killed")) == 0
    after_kill = len(again)
    monkeypatch.setattr(clamping, "_TOKENS", 24)
    assert main(words(root, tmp_path / "small")) == 0
    assert len(again) - after_kill > after_kill
    evaluation, table = (
        {f: (tmp_path / f / name).read_bytes() for f in ("whole", "killed", "small")}
        for name in ("e.json", "e.unlearning.json")
    )
    assert evaluation["whole"] == evaluation["killed"]
    assert table["whole"] == table["killed"]
    one, other = (read_evaluation(tmp_path / f / "e.json") for f in ("whole", "small"))
    assert one["protocol_hash"] == other["protocol_hash"]
    for name, value in one["unlearning"].items():
        assert other["unlearning"][name] == pytest.approx(value, abs=1e-5), name
    assert one["unlearning"]["unlearning_retain_kl"] > 0
    assert json.loads(table["whole"])["protocol_hash"] == one["protocol_hash"]
