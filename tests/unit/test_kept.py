"""One notion of kept positions: of padded batches, special tokens, texts that bring their BOS."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import Model, load_model
from activations.sites.kept import positions_of
from sae.evaluation.downstream import measure_downstream
from sae.steering.steer import Positions
from saescope.errors import InputError
from tests.tiny import make_tiny_model

SITE, AFTER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
TEXTS = ("The river", "A sparse code uses few of many features")


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    return load_model(str(folder), dtype="float32")


def padded(model: Model, side: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask of TEXTS, filled up with EOS on one side."""
    rows = [model.tokenize(text) for text in TEXTS]
    longest = max(map(len, rows))
    fill = [[model.eos_token_id] * (longest - len(row)) for row in rows]
    both = [f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [[0] * len(f) + [1] * len(r) for f, r in zip(fill, rows, strict=True)]
    mask = mask if side == "left" else [m[::-1] for m in mask]
    return torch.tensor(both), torch.tensor(mask)


def alone(model: Model) -> list[Tensor]:
    return [torch.tensor([model.tokenize(text)]) for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_activations_and_logits_of_each_text(
    model: Model, side: str
) -> None:
    tokens, mask = padded(model, side)
    found = model.capture(tokens, [SITE, "hook_embed"], attention_mask=mask)
    logits = model.logits(tokens, attention_mask=mask)
    keep = model.keep_mask(tokens, mask)
    for row, text in enumerate(alone(model)):
        real = mask[row] == 1
        expected = model.capture(text, [SITE, "hook_embed"])
        for site, x in expected.items():
            torch.testing.assert_close(found[site][row][real], x[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[row][real], model.logits(text)[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(keep[row][real], model.keep_mask(text)[0])
        assert not keep[row][~real].any()


@pytest.mark.parametrize(
    "positions", ["kept", "all", slice(1, 3), slice(0, None, 2), [0, np.int64(2)], np.array([1])]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_edits_of_a_padded_batch_are_those_of_each_text(
    model: Model, sae: sae_package.SparseAutoencoder, side: str, positions: Positions
) -> None:
    tokens, mask = padded(model, side)
    before = model.capture(tokens, [AFTER], attention_mask=mask)[AFTER]
    with sae_package.steer(model, sae, add={5: 20.0}, positions=positions):
        found = model.capture(tokens, [AFTER], attention_mask=mask)[AFTER]
        expected = [model.capture(text, [AFTER])[AFTER][0] for text in alone(model)]
    for row, x in enumerate(expected):
        real = mask[row] == 1
        torch.testing.assert_close(found[row][real], x, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[row][~real], before[row][~real])
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_in_a_left_padded_batch_is_edited_as_each_prompt_alone(
    model: Model, sae: sae_package.SparseAutoencoder, options: dict
) -> None:
    tokens, mask = padded(model, "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": model.eos_token_id}
    settings |= {"eos_token_id": None, **options}

    def run(ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = model.hf.generate(input_ids=ids, attention_mask=attention_mask, **settings)
        return out[:, ids.shape[1] :]

    plain = run(tokens, mask)
    with sae_package.steer(model, sae, add={5: 20.0}):
        found = run(tokens, mask)
        for row, text in enumerate(alone(model)):
            assert torch.equal(found[row], run(text, torch.ones_like(text))[0])
    assert not torch.equal(found, plain)


def test_an_edit_is_told_the_positions_of_tokens_in_their_texts(model: Model) -> None:
    tokens, mask = padded(model, "left")
    seen: list[Tensor] = []
    with model.edit({SITE: lambda x, position: seen.append(position)}):
        model.logits(tokens, attention_mask=mask)
        model.logits(tokens)
        model.hf(inputs_embeds=model.hf.get_input_embeddings()(tokens))
    assert torch.equal(seen[0], positions_of(mask == 1))
    assert seen[0].min() == -1
    assert seen[1].tolist() == seen[2].tolist() == list(range(tokens.shape[1]))


def test_special_tokens_are_left_alone_wherever_they_stand(
    model: Model, sae: sae_package.SparseAutoencoder
) -> None:
    text = model.tokenize(TEXTS[1])
    tokens = torch.tensor([[*text, model.eos_token_id, *text[1:4], model.eos_token_id]])
    kept = model.keep_mask(tokens)[0]
    assert kept.sum() == len(text) - 1 + 3
    before = model.capture(tokens, [AFTER])[AFTER][0]
    for edit in (sae_package.steer(model, sae, add={5: 20.0}), sae_package.splice(model, sae)):
        with edit:
            found = model.capture(tokens, [AFTER])[AFTER][0]
        assert torch.equal((found != before).any(-1), kept)


def test_kept_is_refused_where_tokens_are_not_known(
    model: Model, sae: sae_package.SparseAutoencoder
) -> None:
    embedded = model.hf.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with (
        sae_package.steer(model, sae, add={5: 1.0}),
        pytest.raises(InputError, match="given embeddings"),
    ):
        model.hf(inputs_embeds=embedded)
    with sae_package.steer(model, sae, add={5: 20.0}, positions="all"):
        found = model.hf(inputs_embeds=embedded).logits
    assert not torch.allclose(found, model.hf(inputs_embeds=embedded).logits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], r"tokens' shape.*\(1, 2\).*\(1, 3\)"),
        ([[1, 2, 1]], "1 at tokens and 0 at padding"),
        ([[0, 0, 0]], "row has no token.*row 0"),
    ],
)
def test_wrong_masks(model: Model, mask: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.capture(torch.tensor([[5, 6, 7]]), [SITE], attention_mask=torch.tensor(mask))


def test_a_padded_batch_is_measured_as_its_texts(
    model: Model, sae: sae_package.SparseAutoencoder
) -> None:
    """Against sums over the texts one by one."""
    tokens, mask = padded(model, "left")
    mean = torch.zeros(sae.d_in)

    def measured(ids: Tensor, attention_mask: Tensor | None):
        return measure_downstream(
            model,
            SITE,
            lambda x: sae(x).x_hat,
            mean,
            ids,
            model.keep_mask(ids, attention_mask),
            attention_mask=attention_mask,
        )

    found = measured(tokens, mask)
    apart = [measured(text, None) for text in alone(model)]
    assert found.tokens == sum(each.tokens for each in apart)
    for name in ("ce_clean", "ce", "kl", "ce_zero"):
        expected = sum(getattr(each, name) * each.tokens for each in apart) / found.tokens
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4)
    tokens, mask = padded(model, "right")
    assert measured(tokens, mask).ce == pytest.approx(found.ce, rel=1e-4)


def test_a_text_that_brings_its_bos_has_one(tmp_path: Path) -> None:
    model = load_model(str(make_tiny_model(tmp_path / "model", "llama")), dtype="float32")
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    message = [{"role": "user", "content": "The river"}]
    text = model.tokenizer.apply_chat_template(message, tokenize=False)
    plain = model.tokenize("The river")
    for given in (text, model.tokenizer.bos_token + text):
        assert model.tokenize(given) == plain
    assert model.tokenize_batch([text, "The river"]) == [plain[1:]] * 2
    assert model.generate_ids(text, max_new_tokens=2)[: len(plain)] == plain
    assert model.generate(text, max_new_tokens=2).startswith(text)
    without = make_tiny_model(tmp_path / "gpt2", "gpt2")
    other = load_model(str(without), dtype="float32")  # adds none: one that is written stays
    assert other.tokenize("<|endoftext|>The")[0] == other.eos_token_id
