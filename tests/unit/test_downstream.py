"""Effects on the model's loss: the identity, full ablation, and a re-computation by plain torch."""

import math

import pytest
import torch
from torch import Tensor

from activations import Model
from sae.evaluation.divergence import divergence_in_place, divergence_terms
from sae.evaluation.downstream import _summarise, measure_downstream
from sae.steering.text_features import features_of_text
from saescope.errors import InputError

SITE = "blocks.1.hook_resid_post"


def batch(model: Model) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, model.d_vocab, (7, 20), generator=generator)
    keep = model.keep_mask(tokens)
    keep[:, 11] = False
    return tokens, keep


def test_identity_changes_nothing(tiny_model: Model) -> None:
    tokens, keep = batch(tiny_model)
    mean = torch.zeros(tiny_model.d_model)
    found = measure_downstream(tiny_model, SITE, lambda x: x, mean, tokens, keep, batch=3)
    assert found.tokens == int(keep[:, :-1].sum())
    assert found.delta_ce == 0
    assert found.kl == 0
    assert found.recovered_zero == pytest.approx(1)
    assert found.recovered_mean == pytest.approx(1)


def test_ablation_recovers_nothing(tiny_model: Model) -> None:
    tokens, keep = batch(tiny_model)
    mean = torch.randn(tiny_model.d_model, generator=torch.Generator().manual_seed(1))
    zero = measure_downstream(tiny_model, SITE, torch.zeros_like, mean, tokens, keep)
    assert zero.ce == pytest.approx(zero.ce_zero)
    if zero.recovered_zero is not None:
        assert zero.recovered_zero == pytest.approx(0)
    as_mean = measure_downstream(tiny_model, SITE, lambda x: mean.expand_as(x), mean, tokens, keep)
    assert as_mean.ce == pytest.approx(as_mean.ce_mean)
    assert as_mean.ce != pytest.approx(as_mean.ce_zero)
    assert as_mean.kl > 0


def test_against_plain_torch(tiny_model: Model) -> None:
    """Replace by hand after block 1, run the rest by hand, average by hand."""
    tokens, keep = batch(tiny_model)

    def shrink(x: Tensor) -> Tensor:
        return 0.5 * x

    found = measure_downstream(tiny_model, SITE, shrink, torch.zeros(32), tokens, keep, batch=2)
    hf = tiny_model.hf

    def hook(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = torch.where(keep[..., None], 0.5 * hidden, hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        clean = hf(input_ids=tokens).logits.double().log_softmax(-1)
        handle = hf.model.layers[1].register_forward_hook(hook)
        spliced = hf(input_ids=tokens).logits.double().log_softmax(-1)
        handle.remove()
    kept = keep[:, :-1]
    loss = [
        -p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][kept].mean() for p in (clean, spliced)
    ]
    kl = (clean.exp() * (clean - spliced)).sum(-1)[:, :-1][kept].mean()
    assert found.ce_clean == pytest.approx(float(loss[0]), rel=1e-5)
    assert found.ce == pytest.approx(float(loss[1]), rel=1e-5)
    assert found.delta_ce == pytest.approx(float(loss[1] - loss[0]), rel=1e-3, abs=1e-6)
    assert found.kl == pytest.approx(float(kl), rel=1e-3)


MLP_IN, MLP_OUT = "module:model.layers.1.mlp:input", "blocks.1.hook_mlp_out"


def test_a_transcoder_replaces_the_output_by_what_it_makes_of_the_input(tiny_model: Model) -> None:
    """The MLP itself is a perfect transcoder; half of it is what scaling its output does."""
    tokens, keep = batch(tiny_model)
    mlp = tiny_model.hf.model.layers[1].mlp
    mean = torch.ones(32)

    def measured(predict):
        return measure_downstream(
            tiny_model, MLP_IN, predict, mean, tokens, keep, target=MLP_OUT, batch=3
        )

    perfect = measured(mlp)
    assert perfect.delta_ce == pytest.approx(0, abs=1e-5)
    assert perfect.kl == pytest.approx(0, abs=1e-5)
    scaled = measure_downstream(tiny_model, MLP_OUT, lambda x: 3 * x, mean, tokens, keep, batch=3)
    tripled = measured(lambda x: 3 * mlp(x))
    assert tripled.kl == pytest.approx(scaled.kl, rel=1e-3)
    assert tripled.kl > 1e-4
    assert (tripled.ce_zero, tripled.ce_mean) == (scaled.ce_zero, scaled.ce_mean)


def test_several_sites_at_once_and_one_of_them(tiny_model: Model) -> None:
    """Reconstructions are made of the untouched model's activations, whatever is replaced."""
    tokens, keep = batch(tiny_model)
    sites = ["blocks.0.hook_resid_post", SITE]
    options = {"tokens": tokens, "keep": keep, "batch": 3}

    def half_of_first(x: Tensor) -> Tensor:
        return torch.cat([0.5 * x[:, :32], x[:, 32:]], dim=-1)

    same = measure_downstream(tiny_model, sites, lambda x: x, torch.zeros(64), **options)
    assert same.kl == 0
    # what the first site's change would do is undone by the untouched second
    undone = measure_downstream(tiny_model, sites, half_of_first, torch.zeros(64), **options)
    assert undone.kl == pytest.approx(0, abs=1e-6)
    one = measure_downstream(
        tiny_model, sites, lambda x: half_of_first(x)[:, :32], torch.zeros(32), target=sites[0],
        **options,
    )  # fmt: skip
    alone = measure_downstream(tiny_model, sites[0], lambda x: 0.5 * x, torch.zeros(32), **options)
    assert one == alone
    assert one.kl > 1e-6
    with pytest.raises(InputError, match=r"given: 32; allowed: 64"):
        measure_downstream(tiny_model, sites, lambda x: x, torch.zeros(32), **options)


def test_positions_that_are_not_kept_are_left_alone(tiny_model: Model) -> None:
    tokens, keep = batch(tiny_model)
    seen = []

    def watch(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    measure_downstream(tiny_model, SITE, watch, torch.zeros(32), tokens, keep, batch=7)
    assert seen == keep.sum(1).tolist(), "sequence by sequence, whatever a run of the model has"
    with pytest.raises(InputError, match="no kept positions"):
        measure_downstream(tiny_model, SITE, watch, torch.zeros(32), tokens, torch.zeros_like(keep))


def test_features_of_text(tiny_model: Model, sae) -> None:
    text = "The river runs past the mill."
    found = features_of_text(tiny_model, sae, text)
    assert "".join(found.tokens).endswith(text)
    ids = torch.tensor([found.token_ids])
    dense = sae.encode(tiny_model.capture(ids, [SITE])[SITE][0])
    assert not found.keep[0]
    assert 0 not in found.position
    for position, feature, value in zip(
        found.position, found.feature, found.activation, strict=True
    ):
        assert float(dense[position, feature].detach()) == pytest.approx(float(value), rel=1e-5)
    kept = torch.tensor(found.keep)
    assert len(found.feature) == int((dense[kept] > 0).sum())
    with pytest.raises(InputError, match="the text is empty"):
        features_of_text(tiny_model, sae, "")
    with pytest.raises(InputError, match="longer than the model's context"):
        features_of_text(tiny_model, sae, "word " * 500)


def test_documents_are_the_unit_of_intervals_and_change_nothing_else(tiny_model: Model) -> None:
    tokens, keep = batch(tiny_model)
    document = (torch.arange(tokens.numel()) // 33).view_as(tokens)
    found = [
        measure_downstream(
            tiny_model, SITE, lambda x: 0.5 * x, torch.zeros(32), tokens, keep, document=each
        )
        for each in (None, document, torch.zeros_like(document))
    ]
    for one in found[1:]:
        assert (one.ce, one.delta_ce, one.kl) == (found[0].ce, found[0].delta_ce, found[0].kl)
    assert [one.documents for one in found] == [None, 5, 1]
    intervals = [one.kl_interval for one in found]
    assert intervals[0] is not None
    assert intervals[1] is not None
    assert intervals[1] != intervals[0]
    assert intervals[2] is None
    with pytest.raises(InputError, match="needs the document of every token"):
        measure_downstream(
            tiny_model, SITE, lambda x: x, torch.zeros(32), tokens, keep, document=document[:2]
        )


def test_cross_entropies_and_what_is_recovered_by_hand() -> None:
    each = {"clean": (1.0, 2.0), "sae": (2.0, 2.5), "mean": (5.0, 4.0), "zero": (3.0, 3.0)}
    values = {name: torch.tensor(two, dtype=torch.float64) for name, two in each.items()}
    values["kl"] = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = _summarise(values, torch.tensor([0, 1]), documented=False)
    assert (found.ce_clean, found.ce, found.ce_mean, found.ce_zero) == (1.5, 2.25, 4.5, 3.0)
    assert (found.delta_ce, found.kl) == (0.75, 0.5)
    # (4.5 - 2.25) / (4.5 - 1.5) and (3 - 2.25) / (3 - 1.5)
    assert (found.recovered_mean, found.recovered_zero) == (0.75, 0.5)
    harmless = {**values, "mean": values["clean"], "zero": values["clean"] - 1}
    found = _summarise(harmless, torch.tensor([0, 1]), documented=False)
    assert (found.recovered_mean, found.recovered_zero) == (None, None)


def test_divergence_by_hand() -> None:
    clean = torch.tensor([[1 / 2, 1 / 2], [1 / 3, 2 / 3]]).log() + 7  # logits are up to a constant
    other = torch.tensor([[1 / 4, 3 / 4], [1 / 3, 2 / 3]]).log() - 3
    wanted = [math.log(2) / 2 + math.log(2 / 3) / 2, 0.0]
    terms = divergence_terms(clean.log_softmax(-1), other.log_softmax(-1))
    assert terms.sum(-1).tolist() == pytest.approx(wanted, abs=1e-6)
    assert divergence_in_place(clean, other).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_size_of_batches_decides_nothing(tiny_model: Model, sae) -> None:
    tokens, keep = batch(tiny_model)
    keep[3] = False  # a sequence of which nothing is kept
    shapes: dict[int, list[int]] = {}

    def measured(size: int) -> list[float]:
        seen = shapes.setdefault(size, [])

        def replacement(x: Tensor) -> Tensor:
            seen.extend([len(x)] if len(x) else [])
            return sae(x).x_hat

        mean = torch.zeros(tiny_model.d_model)
        found = measure_downstream(tiny_model, SITE, replacement, mean, tokens, keep, batch=size)
        return [found.ce_clean, found.ce, found.delta_ce, found.kl, found.ce_mean, found.ce_zero]

    assert measured(1) == pytest.approx(measured(8), abs=1e-5)
    assert shapes[1] == shapes[8] == [n for n in keep.sum(1).tolist() if n]
