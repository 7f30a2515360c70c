"""The KL finish: its loss by hand, its stream, and runs that end with it."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from activations import ActivationStore
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.train import train
from sae.core.batch import RawBatch, TrainingBatch
from sae.data.harvests import load_harvested_model
from sae.evaluation.divergence import divergence_terms
from sae.training.config import TrainConfig
from sae.training.end_to_end import EndToEnd, EndToEndConfig, SequenceRows, balance
from sae.training.finish import FinishConfig, FinishStream
from sae.training.run import Run
from sae.training.run_folder import identity
from sae.training.snapshots import find_snapshots
from sae.training.telemetry import read_metrics
from sae.training.trainer import Trainer
from saescope.config import from_dict
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"
NONE = {"objective": None, "lr": None}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("finish")
    model = make_tiny_model(folder / "model")
    reading_few_coordinates(model)
    return ActivationStore.open(make_tiny_harvest(folder, model, sites=(SITE,)))


def reading_few_coordinates(folder: Path) -> None:
    """Let the predictions depend on 4 of 32 coordinates: a KL unlike the squared error."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[:4] = 30.0
        model.model.norm.weight[4:] = 0.0
    model.save_pretrained(folder)


def config(store: ActivationStore, out: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "harvest": str(store.path), "out": str(out), "passes": 2.0, "evaluation_rows": 200,
        "finish": {"objective": "kl", "fraction": 0.3, "lr": 3e-3, "sequences_at_once": 32},
        "sae": {"kind": "topk", "d_sae": 48, "k": 6},
        "trainer": {"batch_size": 128, "lr": 3e-3, "evaluate_every": 8, "dead_after_tokens": 400},
    }  # fmt: skip
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return from_dict(TrainConfig, values, "test")


def test_balance_by_hand() -> None:
    """Of KL 0.5 and FVU 0.2: the value 0.2; a unit of KL counts 0.2, one of FVU 0.5."""
    kl, fvu = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 0.2))
    loss = balance(kl, fvu)
    assert loss.item() == pytest.approx(0.2, abs=1e-12)
    slopes = torch.autograd.grad(loss, (kl, fvu))
    assert [s.item() for s in slopes] == pytest.approx([0.5 * 0.2 / 0.5, 0.5], abs=1e-12)
    none = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    loss = balance(none, fvu)
    assert loss.item() == pytest.approx(0.1)
    assert torch.autograd.grad(loss, none)[0].item() == 0


def test_the_gradient_is_half_of_each_loss_at_the_fvus_size(store: ActivationStore) -> None:
    """Against the two losses' own gradients in x_hat, weighed by hand."""
    model = load_harvested_model(store, "float32")
    tokens = torch.from_numpy(store.tokens[:3]).long()
    keep = torch.from_numpy(store.keep[:3])
    plain, balanced = (EndToEnd(model, SITE, EndToEndConfig(), balanced=on) for on in (False, True))
    x, sequences = plain.capture(tokens, keep)
    torch.manual_seed(0)
    trained = TopKSAE(TopKConfig(d_sae=48, k=6), x.shape[1])
    raw = SequenceRows(x, sequences=sequences)
    y_hat = (x + 0.2 * torch.randn_like(x)).requires_grad_()
    usual = TrainingBatch.of(x, variance=float((x - x.mean(0)).square().sum(1).mean()))
    kl = plain.loss(sequences, y_hat).loss
    fvu = usual.reconstruction(y_hat)
    slopes = [torch.autograd.grad(each, y_hat, retain_graph=True)[0] for each in (kl, fvu)]
    loss = balanced.batch(trained, raw, usual).reconstruction(y_hat)
    (found,) = torch.autograd.grad(loss, y_hat)
    expected = 0.5 * (fvu / kl).detach() * slopes[0] + 0.5 * slopes[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(loss, fvu)


def stream(store: ActivationStore, first: int = 3) -> FinishStream:
    model = load_harvested_model(store, "float32")
    end_to_end = EndToEnd(model, SITE, EndToEndConfig(), balanced=True)
    return FinishStream(store, end_to_end, first_batches=first, batch_size=256, seed=1)


def tokens_of(raw: RawBatch) -> list[int]:
    assert raw.row_token is not None
    return raw.row_token.tolist()


def test_stored_rows_first_and_then_training_sequences(store: ActivationStore) -> None:
    batches = list(islice(stream(store), 6))
    assert [isinstance(raw, SequenceRows) for raw in batches] == [False] * 3 + [True] * 3
    sequences = {token // store.context for raw in batches[3:] for token in tokens_of(raw)}
    assert {int(store.split[n]) for n in sequences} == {0}
    assert all(isinstance(raw, SequenceRows) for raw in islice(stream(store, 0), 2))


def test_the_stream_resumes_exactly_in_either_part(store: ActivationStore) -> None:
    expected = list(islice(stream(store), 6))
    for killed_after in (2, 3, 5):
        killed = stream(store)
        for _ in islice(killed, killed_after):
            pass
        state = json.loads(json.dumps(killed.state_dict()))
        again = stream(store)
        again.load_state_dict(state)
        for before, after in zip(expected[killed_after:], again, strict=False):
            assert tokens_of(before) == tokens_of(after)
            assert torch.equal(before.x, after.x)
    with pytest.raises(InputError, match="first_batches differs"):
        stream(store, 2).load_state_dict(state)


def kl_of(store: ActivationStore, trained: sae.SparseAutoencoder) -> tuple[float, float]:
    """Mean KL on held-out sequences with the SAE spliced in, and L0: no code of the training."""
    model = load_harvested_model(store, "float32")
    held = store.split == 1
    tokens = torch.from_numpy(store.tokens[held]).long()
    keep = torch.from_numpy(store.keep[held])
    x = model.capture(tokens, [SITE])[SITE][keep]
    out = trained(x)
    clean = model.logits(tokens)[keep].log_softmax(-1)
    with model.edit({SITE: lambda h, _: torch.index_put(h, (keep,), out.x_hat.to(h))}):
        spliced = model.logits(tokens)[keep].log_softmax(-1)
    kl = divergence_terms(clean, spliced).mean()
    return float(kl), len(out.codes.index) / len(x)


def test_a_finish_lowers_the_kl_at_equal_l0(store: ActivationStore, tmp_path: Path) -> None:
    """Of two runs of as many tokens, that with a finish disturbs the model less."""
    more: dict[str, Any] = {"passes": 3.0, "trainer": {"decay_fraction": 0.5}}
    plain = train(config(store, tmp_path / "plain", finish=NONE, **more))
    ended = train(config(store, tmp_path / "ended", finish={"fraction": 0.5}, **more))
    assert plain is not None
    assert ended is not None
    (kl, l0), (lower, same) = kl_of(store, plain), kl_of(store, ended)
    assert l0 == same == 6
    assert lower < 0.8 * kl
    facts = [each.metadata["tokens_trained"] for each in (plain, ended)]
    assert facts[0] == facts[1]
    assert "finish" not in plain.metadata
    assert ended.metadata["finish"]["objective"] == "kl"


def rates(folder: Path) -> list[float]:
    return [each["train"]["lr"] for each in read_metrics(folder / "metrics.jsonl")]


def test_the_finish_has_a_rate_of_its_own(store: ActivationStore, tmp_path: Path) -> None:
    """Before it the rate rises and falls as in a run of that length; in it, from its own to 0."""
    whole = {"passes": 1.0, "trainer": {"evaluate_every": 1, "lr": 0.01, "warmup_fraction": 0.2}}
    train(config(store, tmp_path / "ended", finish={"lr": 4e-4}, **whole))
    found = rates(tmp_path / "ended")
    last = round(0.3 * len(found))
    before, in_it = found[:-last], found[-last:]
    assert in_it == pytest.approx([4e-4 * (last - n) / last for n in range(last)])
    train(
        config(
            store, tmp_path / "plain", finish=NONE,
            **{**whole, "passes": (len(before) + 0.5) * 128 / store.n_rows("train")},
        )
    )  # fmt: skip
    assert before == pytest.approx(rates(tmp_path / "plain"))
    free = {**whole, "trainer": {**whole["trainer"], "optimiser": "schedule_free_adam"}}
    train(config(store, tmp_path / "free", finish={"lr": None, "lr_multiplier": 2.0}, **free))
    steady = 2 * 2e-4 / (48 / 2**14) ** 0.5
    assert rates(tmp_path / "free")[-last:] == pytest.approx([steady] * last)


def test_a_killed_run_ends_with_the_same_bits(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first part and in the finish; with snapshots that say what they had."""
    every = {"trainer": {"checkpoint_every": 3, "snapshots": 3}}
    whole = train(config(store, tmp_path / "whole", **every))
    run = Run(config(store, tmp_path / "whole", **every), store)
    first = run.total_steps - run.finish_steps
    advance = Trainer.advance
    for kill_at in (first // 2, first + 2):

        def killed(self: Trainer, raw: Any, at: int = kill_at) -> str:
            if self.step == at:
                raise KeyboardInterrupt
            return advance(self, raw)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "advance", killed)
            with pytest.raises(KeyboardInterrupt):
                train(config(store, tmp_path / "killed", **every))
    resumed = train(config(store, tmp_path / "killed", **every))
    assert whole is not None
    assert resumed is not None
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    lines = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert ["kl" in each["train"] for each in lines] == [each["step"] > first for each in lines]
    assert {True, False} <= {"kl" in each["train"] for each in lines}
    kept = [sae.load(each.path).metadata for each in find_snapshots(tmp_path / "killed")]
    assert [each["finish"]["after_tokens"] for each in kept] == [first * 128] * 3
    assert [each["tokens_trained"] for each in kept] == sorted(each["step"] * 128 for each in kept)


def test_an_sae_that_is_there_gets_a_finish(store: ActivationStore, tmp_path: Path) -> None:
    first = train(config(store, tmp_path / "first", finish=NONE, passes=2.0))
    assert first is not None
    tuned = train(
        config(
            store, tmp_path / "tuned", start_from=str(tmp_path / "first"), trainer={"lr": 1.0},
            finish={"fraction": 1.0, "lr": 1e-3},
        )
    )  # fmt: skip
    assert tuned is not None
    assert tuned.metadata["finish"]["after_tokens"] == 0
    assert kl_of(store, tuned)[0] < 0.8 * kl_of(store, first)[0]


def test_the_estimate_counts_the_finish(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = config(store, tmp_path / "run", plan=True)
    assert train(planned) is None
    steps = Run(planned, store).finish_steps
    said = capsys.readouterr().out
    assert f"in the finish: {steps} steps through the model" in said
    assert "ms each; learning rate 0.003\n" in said
    train(config(store, tmp_path / "run", plan=True, finish={"fraction": 1.0}))
    assert "; 0 ms a step" in capsys.readouterr().out  # there is no step but the finish's
    train(config(store, tmp_path / "run", plan=True, finish=NONE))
    assert "the finish" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_without_one_is_the_run_it_was(store: ActivationStore, tmp_path: Path) -> None:
    """Runs from before there was a finish go on; one with another finish is another run."""
    plain = Run(config(store, tmp_path / "run", finish=NONE), store)
    before = plain.settings
    plain.start()
    manifest = tmp_path / "run/manifest.json"
    assert "finish" in json.loads(manifest.read_text())["config"]
    older = {name: value for name, value in before.items() if name != "finish"}
    assert identity(older) == identity(before)
    with pytest.raises(InputError, match=r"differs in: finish"):
        Run(config(store, tmp_path / "run"), store)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trainer": {"accumulate": 2}}, r"trainer\.accumulate: does not go with a finish"),
        ({"trainer": {"loss": {"tilt": 1.0}}}, r"trainer\.loss\.tilt: does not go with"),
        ({"trainer": {"loss": {"visible_fraction": 0.5}}}, r"visible_fraction: does not go with"),
        ({"objective": "end_to_end"}, "objective: does not go with a finish"),
        ({"sae": {"kind": "temporal"}}, r"sae\.kind: does not go with a finish"),
        ({"target_site": SITE, "sae": {"kind": "transcoder"}}, r"finish\.objective: .*one site"),
        ({"sites": [SITE], "mix_layers": "all"}, r"finish\.objective: .*one site"),
        ({"finish": {"tokens": 3}}, r"finish\.tokens: less than a batch"),
        ({"finish": {"tokens": 10**9}}, r"finish\.tokens: .*more than the run has"),
    ],
)
def test_what_a_finish_cannot_do_is_said_at_the_start(
    store: ActivationStore, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(config(store, tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_no_model_no_finish(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.manifest["model"], "spec", None)
    with pytest.raises(InputError, match="needs the model, and nobody said of which one"):
        Run(config(store, tmp_path / "run"), store)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match=r"finish\.fraction"):
        FinishConfig(objective="kl", fraction=0)
    for name, value in (("tokens", 1000), ("lr", 1e-3)):
        with pytest.raises(InputError, match=rf"finish\.{name}: says how a finish is to be"):
            from_dict(FinishConfig, {name: value}, "test")
        with pytest.raises(InputError, match=rf"finish\.{name}"):
            from_dict(FinishConfig, {"objective": "kl", name: 0}, "test")
    with pytest.raises(InputError, match=r"finish\.lr_multiplier"):
        FinishConfig(objective="kl", lr_multiplier=0)
    assert FinishConfig(objective="kl", fraction=1e-9).steps(10, 4) == 1
