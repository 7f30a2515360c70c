"""The prefix-length test: its texts, its curves, and a model whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import Model, load_model
from sae.analysis.attention import PrefixCurve, prefix, prefix_attention, prefix_test
from sae.analysis.attention.encoder import read_at
from sae.analysis.attention.prefix import prefix_texts
from sae.architectures.relu import ReLUConfig, ReLUSAE
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, make_tiny_model

SITE = "blocks.1.hook_resid_post"
LENGTHS = (1, 2, 4)
NEXT = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


def test_texts_end_as_they_did_before_the_token(model: Model) -> None:
    made = prefix_texts(model, [NEXT, 60], lengths=LENGTHS, context=32, seed=3)
    assert made.tokens.shape == made.shuffled.shape == (3, 2, 32)
    for row, length in enumerate(LENGTHS):
        for text, following in enumerate((NEXT, 60)):
            tokens, source = made.tokens[row, text], int(made.source[text])
            assert tokens[0] == model.bos_token_id
            assert tokens[source] == following
            before = tokens[source - length : source]
            assert (tokens[-length:] == before).all()
            assert tokens[-length - 1] != tokens[source - length - 1]
            counts = np.unique(tokens, return_counts=True)[1]
            assert sorted(counts)[-length:] == [2] * length
            assert (counts == 2).sum() == length
            null = made.shuffled[row, text]
            assert sorted(null) == sorted(tokens)
            assert (null[-4:] == tokens[-4:]).all()
            at = int(made.shuffled_source[text])
            assert null[at] == following
            assert null[at - 1] != tokens[-1]
            assert (null[1:28] != tokens[1:28]).any()
    first = made.tokens[:, :, :28]
    assert (first == first[:1]).all()  # only the end differs with the length


def curve(effect: list[float], noise: float = 0.1) -> PrefixCurve:
    draw = np.random.default_rng(0)
    null = draw.normal(size=(len(effect), 20))
    repeated = null + np.array(effect)[:, None] + noise * draw.normal(size=null.shape)
    return PrefixCurve(lengths=(1, 2, 3, 4), repeated=repeated, shuffled=null)


def test_half_lengths_and_verdicts() -> None:
    short = curve([1.9, 2.0, 2.0, 2.0])
    assert short.effect == pytest.approx([1.9, 2, 2, 2], abs=0.1)
    assert (short.half_length, short.verdict) == (1, "short-prefix")
    late = curve([0.0, 0.1, 1.2, 2.0])
    assert (late.half_length, late.verdict) == (3, "long-prefix")
    assert late.half_width() == pytest.approx(2.09 * 0.1 / 20**0.5, rel=0.5)
    for nothing in (curve([0.0] * 4), curve([-2.0] * 4), curve([0.05] * 4, noise=1.0)):
        assert (nothing.half_length, nothing.verdict) == (None, "none")


def test_a_feature_that_counts_repeats(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SAE's site is replaced by what is known of the text: how many tokens repeat."""
    made = ReLUSAE(ReLUConfig(d_sae=2), D_MODEL).eval()
    with torch.no_grad():
        made.W_enc_T.copy_(torch.eye(2, D_MODEL))
    ids: list[torch.Tensor] = []
    own = model.logits

    def logits(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        ids[:] = [tokens]
        return own(tokens, **options)

    def known(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        x = torch.zeros_like(x)
        for row, text in enumerate(ids[0].tolist()):
            at = text.index(NEXT)
            n = 0
            while n < 8 and text[at - 1 - n] == text[-1 - n]:
                n += 1
            x[row, -1, 0] = float(n >= 2)
        return x

    monkeypatch.setattr(model, "logits", logits)
    place = read_at(model, made, SITE, True)
    monkeypatch.setattr(prefix, "read_at", lambda *_: place)
    monkeypatch.setattr(prefix, "_goes_on", lambda *_: False)  # `known` wants whole texts
    with model.edit({SITE: known}):
        found = prefix_test(model, made, 0, NEXT, lengths=LENGTHS, texts=4, context=32)
    assert found.activation.repeated.tolist() == [[0.0] * 4, [1.0] * 4, [1.0] * 4]
    assert found.activation.shuffled.tolist() == [[0.0] * 4] * 3
    assert (found.activation.half_length, found.activation.verdict) == (2, "short-prefix")
    assert found.log_prob.effect[0] == pytest.approx(0, abs=1e-6)
    assert abs(found.log_prob.effect[1]) > 1e-3  # what is left of the site says whether n >= 2
    tokens = prefix_texts(model, [NEXT] * 4, lengths=LENGTHS, context=32).tokens
    with model.edit({SITE: known}):
        ids[:] = [torch.from_numpy(tokens[0, :1])]
        wanted = own(ids[0])[0, -1].double().log_softmax(-1)[NEXT]
    assert found.log_prob.repeated[0, 0] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_lengths_share_is_read_once_and_changes_nothing(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_model(str(make_tiny_model(tmp_path, architecture)), dtype="float32")
    assert isinstance(found, Model)
    made = ReLUSAE(ReLUConfig(d_sae=6), D_MODEL).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(made.W_enc_T)
    torch.nn.init.constant_(made.b_enc, 4.0)
    given = {"lengths": LENGTHS, "texts": 3, "context": 32, "site": SITE, "allow_other_model": True}
    read: list[int] = []
    found.hf.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].numel())
    )
    prefix.read_at(found, made, SITE, True)  # looks at the model, once
    read.clear()
    tests = prefix.prefix_tests(found, made, [0, 4], NEXT, **given)
    in_pieces = sum(read)
    monkeypatch.setattr(prefix, "_goes_on", lambda *_: False)
    read.clear()
    plain = prefix.prefix_tests(found, made, [0, 4], NEXT, **given)
    assert sum(read) == 2 * 3 * 3 * 32
    # tried on a text (32 + 28 + 4), then each text's 28 shared tokens once and 3 ends of 4
    assert in_pieces == 64 + 2 * 3 * (28 + 3 * 4)
    assert [test.feature for test in tests] == [0, 4]
    for test, other in zip(tests, plain, strict=True):
        assert other.activation.repeated.any()
        for name in ("activation", "log_prob"):
            for curve in ("repeated", "shuffled"):
                one, two = (getattr(getattr(t, name), curve) for t in (test, other))
                assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    alone = prefix_test(found, made, 4, NEXT, **given)
    assert (alone.activation.repeated == plain[1].activation.repeated).all()


def test_attention_of_heads(model: Model, tmp_path: Path) -> None:
    curves = prefix_attention(model, 1, lengths=(1, 2), texts=2, context=16)
    assert len(curves) == 4
    for each in curves:
        assert each.repeated.shape == each.shuffled.shape == (2, 2)
        assert ((each.repeated > 0) & (each.repeated < 1)).all()
    # a head that attends to all alike puts 1 / 16 everywhere
    other = load_model(str(make_tiny_model(tmp_path)), dtype="float32")
    assert isinstance(other, Model)
    with torch.no_grad():
        other.hf.model.layers[1].self_attn.q_proj.weight.zero_()
    for each in prefix_attention(other, 1, lengths=(1, 2), texts=2, context=16):
        assert each.repeated == pytest.approx(1 / 16)
        assert each.verdict == "none"


def test_a_vocabulary_that_is_too_small(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "d_vocab", 33)
    with pytest.raises(InputError, match=r"too few tokens.*given: '30 that are not special"):
        prefix_texts(model, [5], lengths=LENGTHS, context=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (2, 1)}, "must grow"),
        ({"lengths": ()}, "must grow"),
        ({"lengths": (0, 1)}, "lengths"),
        ({"context": 13}, r"no context for these lengths.*allowed: 15 to 64"),
        ({"context": 65}, "no context for these lengths"),
        ({"texts": 1}, "texts"),
        ({"feature": 2}, "feature"),
        ({"next_token": 10**6}, "next_tokens"),
    ],
)
def test_what_is_refused(model: Model, options: dict[str, Any], message: str) -> None:
    made = ReLUSAE(ReLUConfig(d_sae=2), D_MODEL).eval()
    given = {"feature": 0, "next_token": NEXT, "lengths": LENGTHS, "context": 32, **options}
    with pytest.raises(InputError, match=message):
        prefix_test(model, made, site=SITE, allow_other_model=True, **given)
