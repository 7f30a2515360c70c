"""Text to steered model, by the command line and by Python, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

import activations
import sae
import store
from sae.formats.hub import EVALUATION_FILE
from sae.indexing.build import direct_logits
from saescope.__main__ import main
from saescope.errors import ArtefactError
from store.database import STORE_FILE
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model's harvest in it."""
    folder = tmp_path_factory.mktemp("work")
    make_tiny_harvest(folder, make_tiny_model(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    """A run trained on the harvest by the command line, from a file and options."""
    config = work / "train.toml"
    config.write_text(
        f'harvest = "{work / "harvest"}"\nout = "{work / "run"}"\npasses = 6.0\n'
        "[sae]\nd_sae = 128\nk = 9\n[trainer]\nbatch_size = 64\nlr = 0.003\n"
        "dead_after_tokens = 1000\nevaluate_every = 10\ncheckpoint_every = 20\n"
    )
    assert main(["train", str(config), "--sae.k", "6"]) == 0
    return work / "run"


@pytest.fixture(scope="module")
def built(run: Path, work: Path) -> Path:
    """The run evaluated and indexed."""
    assert main(["eval", str(run), "--tokens", "200"]) == 0
    assert main(["index", str(run), "--out", str(work / "stores" / "tiny")]) == 0
    return work / "stores" / "tiny" / STORE_FILE


def test_run_folder(run: Path) -> None:
    trained = sae.load(run)
    assert trained.config.k == 6  # type: ignore[attr-defined]
    assert trained.metadata["site"] == SITE
    assert trained.normaliser.kind == "none"  # folded into the weights
    assert trained.metadata["held_out"]["l0"] <= 6
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["sae"]["d_sae"] == 128
    assert manifest["parent"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out"]["fvu"] < lines[0]["held_out"]["fvu"]
    assert lines[-1]["held_out"]["fvu"] < 0.9


def test_training_again_changes_nothing(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "sae" / "weights.safetensors").read_bytes()
    assert main(["train", str(work / "train.toml"), "--sae.k", "6"]) == 0
    assert "already trained" in capsys.readouterr().out
    assert (run / "sae" / "weights.safetensors").read_bytes() == before
    assert main(["train", str(work / "train.toml"), "--sae.k", "7"]) == 2
    assert "holds another run (differs in: sae)" in capsys.readouterr().err


def test_another_architecture_by_one_option(work: Path) -> None:
    words = ["--sae.kind", "relu", "--sae.d-sae", "64", "--trainer.batch-size", "64"]
    harvest = ["--harvest", str(work / "harvest"), "--out", str(work / "relu")]
    assert main(["train", *harvest, *words, "--passes", "1"]) == 0
    assert type(sae.load(work / "relu")).__name__ == "ReLUSAE"


def test_evaluation_equals_a_direct_computation(built: Path, run: Path, work: Path) -> None:
    del built
    result = json.loads((run / EVALUATION_FILE).read_text())
    harvest = activations.ActivationStore.open(work / "harvest")
    trained = sae.load(run)
    rows = torch.cat(
        [harvest.read_chunk(SITE, chunk.index)[0].float() for chunk in harvest.chunks("held_out")]
    )
    x_hat = trained(rows).x_hat.detach().double()
    x = rows.double()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result["reconstruction"]["rows"] == len(rows)
    assert result["reconstruction"]["fvu"] == pytest.approx(float(fvu), rel=1e-6)
    downstream = result["downstream"]
    assert downstream["delta_ce"] == pytest.approx(downstream["ce"] - downstream["ce_clean"])
    assert 0 < downstream["tokens"] <= 200
    assert result["protocol_hash"]


def test_store_equals_encoding_the_text_again(built: Path, run: Path, work: Path) -> None:
    """Every stored activation is what model and SAE give for that token, and none is lost."""
    harvest = activations.ActivationStore.open(work / "harvest")
    model = activations.load_model(str(work / "model"), dtype="float32")
    trained = sae.load(run)
    with store.FeatureStore.open(built) as features:
        assert features.d_sae == 128
        total = 0
        for sequence in range(0, harvest.n_sequences, 5):
            tokens = torch.from_numpy(harvest.tokens[sequence]).long()[None]
            x = model.capture(tokens, [SITE])[SITE][0].bfloat16().float()
            dense = trained.encode(x).detach()
            dense[~torch.from_numpy(harvest.keep[sequence])] = 0
            active = features.features_of_sequence(sequence)
            found = torch.zeros_like(dense)
            place = torch.as_tensor(active.position) % harvest.context
            found[place.long(), torch.as_tensor(active.feature).long()] = torch.as_tensor(
                active.activation
            )
            torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
            total += len(active.feature)
        assert total > 0


def test_logits_and_neighbours(built: Path, run: Path, work: Path) -> None:
    model = activations.load_model(str(work / "model"), dtype="float32")
    trained = sae.load(run)
    W_U = model.hf.get_output_embeddings().weight.detach().T
    gain = model.hf.model.norm.weight.detach()
    effect = (trained.W_dec[17].detach() * gain) @ W_U
    effect = effect - effect.mean()
    torch.testing.assert_close(
        direct_logits(trained.W_dec[17:18].detach(), W_U, gain)[0], effect, rtol=1e-4, atol=1e-5
    )
    unit = torch.nn.functional.normalize(trained.W_dec.detach(), dim=1)
    cosine = unit @ unit[17]
    cosine[17] = -2
    with store.FeatureStore.open(built) as features:
        logits = features.logits(17)
        assert logits.top[0].token_id == int(effect.argmax())
        assert logits.top[0].value == pytest.approx(float(effect.max()), rel=1e-4)
        assert logits.bottom[0].token_id == int(effect.argmin())
        assert logits.bottom[0].value == pytest.approx(float(effect.min()), rel=1e-4)
        assert features.neighbours(17)[0].feature == int(cosine.argmax())
        assert features.neighbours(17)[0].cosine == pytest.approx(float(cosine.max()), rel=1e-4)


def test_steering_command(
    built: Path, run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del built
    words = ["--prompt", "The river", "--max-new-tokens", "5"]
    assert main(["steer", str(run), *words, "--add", "3=40"]) == 0
    shown = capsys.readouterr().out
    assert "untouched: The river" in shown
    assert "steered (add {3: 40.0}): The river" in shown
    assert main(["steer", str(run), *words, "--store", str(work / "stores" / "tiny")]) in (0, 2)
    stored = ["--store", str(work / "stores" / "tiny")]
    where = ["--when", "5=0.1", "--positions", "generated", "--only-active"]
    assert main(["steer", str(run), *words, *stored, "--add", "3=2x", *where]) == 0
    shown = capsys.readouterr().out
    expected = "steered (add {3: '2x'}, where active, where {5: 0.1}, at generated tokens): The"
    assert expected in shown
    assert main(["steer", str(run), *words, "--add", "3=2x"]) == 2
    assert "known from a feature store" in capsys.readouterr().err
    bounds = ["--at-least", "3=5", "--at-most", "3=6", "--project", "4=0", "--cap", "5=1"]
    assert main(["steer", str(run), *words, *bounds]) == 0
    assert "at least {3: 5.0}, at most {3: 6.0}, project {4: 0.0}" in capsys.readouterr().out
    assert main(["steer", str(run), *words, *bounds, "--when", "5=1x"]) == 2
    assert "when: not a number" in capsys.readouterr().err
    assert main(["steer", str(run), *words]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main(["steer", str(run), *words, "--add", "3:40"]) == 2
    assert "FEATURE=NUMBER" in capsys.readouterr().err


def test_python_face(built: Path, run: Path, work: Path) -> None:
    """The few lines that the README shows."""
    model = activations.load_model(str(work / "model"))
    harvest = activations.ActivationStore.open(work / "harvest")
    trained = sae.load(run)
    features = store.FeatureStore.open(built)
    with sae.steer(model, trained, add={12: 8.0}):
        text = model.generate("The weather today", max_new_tokens=10)
    assert text.startswith("The weather today")
    assert harvest.n_rows() == features.overview().n_kept
    features.close()


def test_bad_input_is_one_line(work: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "bad"
    harvest = ["--harvest", str(work / "harvest"), "--out", str(out)]
    small = ["--sae.d-sae", "64", "--sae.k", "4"]
    cases = [
        (["train", *harvest, *small, "--site", "blocks.7.hook_resid_post"], "not in the harvest"),
        (["train", *harvest, *small, "--trainer.batch-size", "100000"], "training rows|has only"),
        (["train", "--harvest", str(work / "none"), "--out", str(out)], "no harvest here"),
        (["train", *harvest, "--sae.kind", "tpk"], "no such architecture"),
        (["eval", str(run), "--harvest", str(work / "none")], "no harvest here"),
        (["index", str(work / "harvest"), "--out", str(out)], "no SAE here|not finished"),
        (["explore", str(work / "none")], "none"),
    ]
    for words, message in cases:
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("saescope: "), words
        assert error.count("\n") == 1, words
        assert any(part in error for part in message.split("|")), (words, error)
        assert not out.exists(), words


def test_an_unfinished_run_says_so(work: Path) -> None:
    folder = work / "half"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not finished"):
        sae.load(folder)
