"""End-to-end loss: against plain torch, finite differences, and in training on a tiny model."""

import copy
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations import ActivationStore, Model, load_model
from activations.loading.outliers import OutlierFilter
from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import RawBatch, TrainingBatch
from sae.core.normaliser import Normaliser
from sae.training.end_to_end import (
    EndToEnd,
    EndToEndConfig,
    SequenceRows,
    Sequences,
)
from sae.training.end_to_end_stream import EndToEndStream
from sae.training.optimisers import make_optimiser
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> ActivationStore:
    folder = tmp_path_factory.mktemp("end-to-end")
    return ActivationStore.open(make_tiny_harvest(folder, tiny_folder, sites=(SITE,)))


@pytest.fixture(scope="module")
def double(tiny_model: Model) -> Model:
    hf = copy.deepcopy(tiny_model.hf).double()
    return Model(hf, tiny_model.tokenizer, spec=tiny_model.spec, folder=tiny_model.folder)


def text(model: Model, sequences: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, model.d_vocab, (sequences, 9), generator=generator)
    keep = model.keep_mask(tokens)
    keep[:, 4] = False
    keep[-1, 2:] = False
    return tokens, keep


def objective(model: Model, site: str = SITE, **settings: Any) -> EndToEnd:
    return EndToEnd(model, site, EndToEndConfig(**settings))


def test_what_is_put_back_unchanged_costs_nothing(tiny_model: Model) -> None:
    own = objective(tiny_model, downstream_weight=1.0)
    x, sequences = own.capture(*text(tiny_model))
    x = x.requires_grad_()
    found = own.loss(sequences, x)
    assert found.loss.item() == 0
    assert found.terms == {"kl": 0, "downstream": 0}
    found.loss.backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6


def by_hand(model: Model, tokens: Tensor, keep: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """KL and the later layers' FVU, with hooks of torch's own, all sequences at once."""
    layers = model.hf.model.layers
    seen: dict[int, Tensor] = {}

    def hidden(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def see(n: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[n] = hidden(output)[keep]

        return layers[n].register_forward_hook(hook)

    def splice(_module: Any, _args: Any, output: Any) -> Any:
        changed = hidden(output).clone()
        changed[keep] = x_hat
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = [see(1), see(2)]
    clean = model.hf(input_ids=tokens).logits.log_softmax(-1)[keep]
    before = dict(seen)
    handles.append(layers[0].register_forward_hook(splice))
    spliced = model.hf(input_ids=tokens).logits.log_softmax(-1)[keep]
    for handle in handles:
        handle.remove()
    fvu = [
        (seen[n] - before[n]).square().sum() / (before[n] - before[n].mean(0)).square().sum()
        for n in (1, 2)
    ]
    kl = torch.nn.functional.kl_div(spliced, clean, log_target=True, reduction="batchmean")
    return kl, (fvu[0] + fvu[1]) / 2


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_against_plain_torch(double: Model, at_once: int) -> None:
    own = objective(double, downstream_weight=0.3, sequences_at_once=at_once)
    tokens, keep = text(double)
    x, sequences = own.capture(tokens, keep)
    assert x.shape == (int(keep.sum()), double.d_model)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    x_hat = (x + 0.3 * noise).requires_grad_()
    found = own.loss(sequences, x_hat)
    kl, downstream = by_hand(double, tokens, keep, x_hat)
    torch.testing.assert_close(found.loss, kl + 0.3 * downstream, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.terms["kl"], kl.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.terms["downstream"], downstream.detach(), rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(2 * found.loss, x_hat)
    (expected,) = torch.autograd.grad(2 * (kl + 0.3 * downstream), x_hat)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)


def test_gradient_against_finite_differences(tmp_path: Path) -> None:
    """On GPT-2, all of which computes in float64: Llama's norms go through float32."""
    model = load_model(str(make_tiny_model(tmp_path / "gpt2", "gpt2")), dtype="float32")
    double = Model(model.hf.double(), model.tokenizer, spec=model.spec, folder=model.folder)
    own = objective(double, downstream_weight=0.5, sequences_at_once=2)
    x, sequences = own.capture(*text(double, 3))
    generator = torch.Generator().manual_seed(2)
    x_hat = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    leaf = x_hat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(own.loss(sequences, leaf).loss, leaf)
    assert gradient.abs().sum(1).min() > 0
    for _ in range(3):
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        up, down = (own.loss(sequences, x_hat + s * way).loss for s in (1e-5, -1e-5))
        assert float((up - down) / 2e-5) == pytest.approx(float((gradient * way).sum()), rel=1e-6)


def test_the_models_weights_get_no_gradient(tiny_model: Model) -> None:
    own = objective(tiny_model)
    model = copy.deepcopy(tiny_model.hf).requires_grad_(requires_grad=True)
    free = EndToEnd(
        Model(model, tiny_model.tokenizer, spec=tiny_model.spec, folder=tiny_model.folder),
        SITE, own.config,
    )  # fmt: skip
    for each in (own, free):
        x, sequences = each.capture(*text(tiny_model))
        x_hat = (0.5 * x).requires_grad_()
        each.loss(sequences, x_hat).loss.backward()
        assert x_hat.grad is not None
        assert all(parameter.grad is None for parameter in each.model.hf.parameters())


def test_sites_downstream(tiny_model: Model) -> None:
    def later(site: str) -> list[str]:
        return objective(tiny_model, site, downstream_weight=1.0).later_sites

    after = [f"blocks.{n}.hook_resid_post" for n in range(3)]
    assert later(after[0]) == after[1:]
    assert later("blocks.1.hook_mlp_out") == after[1:]
    assert later("hook_embed") == after
    assert objective(tiny_model, after[0]).later_sites == []
    with pytest.raises(InputError, match="no layer follows"):
        later(after[2])


def make_sae(store: ActivationStore, cls: type, config: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = cls(config, store.d_in(SITE))
    moments = store.statistics(SITE)
    mean = torch.from_numpy(moments.mean)
    sae.normaliser = Normaliser.fit("centred", mean=mean, mean_square=moments.mean_square)
    return sae


def steps(sae: SparseAutoencoder, stream: EndToEndStream, count: int) -> Iterator[dict[str, float]]:
    """Train a few steps as a trainer does; the terms."""
    optimiser = make_optimiser("adam", sae.parameters(), lr=5e-3)
    rows = iter(stream)
    for step in range(count):
        raw = next(rows)
        assert isinstance(raw, SequenceRows)
        y = sae.normaliser.apply(raw.x)
        plain = TrainingBatch.of(y, variance=sae.normaliser.variance)
        if step == 0:
            sae.start(plain)
        batch = stream.end_to_end.batch(sae, raw, plain)
        dead = torch.zeros(sae.d_sae, dtype=torch.bool)
        state = TrainingState(step=step, total_steps=count, dead=dead)
        output = batch.finish(sae.training_output(batch, state))
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
        yield {name: float(value) for name, value in output.terms.items()}


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_training_lowers_the_kl(tiny_model: Model, store: ActivationStore, kind: str) -> None:
    if kind == "topk":
        sae = make_sae(store, TopKSAE, TopKConfig(d_sae=64, k=8))
    else:
        sae = make_sae(store, ReLUSAE, ReLUConfig(d_sae=64, l1_coefficient=1e-3))
    stream = EndToEndStream(store, objective(tiny_model, sequences_at_once=32), batch_size=128)
    terms = list(steps(sae, stream, 30))
    assert terms[-1].keys() >= {"kl", "fvu"}
    early, late = (sum(each["kl"] for each in part) / 5 for part in (terms[:5], terms[-5:]))
    assert late < 0.8 * early


def test_the_loss_takes_the_reconstructions_place(
    tiny_model: Model, store: ActivationStore
) -> None:
    """loss = KL + v downstream + w FVU + L1, and the gradient is that of the sum."""
    own = objective(tiny_model, reconstruction_weight=0.25, downstream_weight=0.5)
    stream = EndToEndStream(store, own, batch_size=64)
    raw = next(iter(stream))
    assert isinstance(raw, SequenceRows)
    sae = make_sae(store, ReLUSAE, ReLUConfig(d_sae=64, l1_coefficient=0.1, l1_warmup_fraction=0))
    plain = TrainingBatch.of(sae.normaliser.apply(raw.x), variance=sae.normaliser.variance)
    batch = own.batch(sae, raw, plain)
    output = batch.finish(sae.training_output(batch, TrainingState()))
    usual = sae.training_output(plain, TrainingState())
    terms = output.terms
    torch.testing.assert_close(terms["fvu"], usual.terms["fvu"])
    expected = (
        terms["kl"] + 0.5 * terms["downstream"] + 0.25 * terms["fvu"] + 0.1 * usual.terms["l1"]
    )
    torch.testing.assert_close(output.loss.detach(), expected)
    (found,) = torch.autograd.grad(output.loss, sae.W_dec, retain_graph=True)
    x_hat = sae(raw.x).x_hat
    fvu = plain.reconstruction(sae.decode_normalised(sae.encode_normalised(plain.y)))
    total = own.loss(raw.sequences, x_hat).loss + usual.loss + (0.25 - 1) * fvu
    (reference,) = torch.autograd.grad(total, sae.W_dec)
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-6)


def tokens_of(raw: RawBatch) -> Tensor:
    assert raw.row_token is not None
    return raw.row_token


def test_stream(tiny_model: Model, store: ActivationStore) -> None:
    """Every training sequence once an epoch; rows are the harvest's, in bfloat16."""
    stream = EndToEndStream(store, objective(tiny_model), batch_size=300, seed=3)
    rows = iter(stream)
    batches = [next(rows) for _ in range(stream.batches_per_epoch + 1)]
    seen = torch.cat([torch.unique(tokens_of(raw) // store.context) for raw in batches[:-1]])
    assert len(seen.unique()) == len(seen) == stream.sequences_per_batch * len(batches[:-1])
    assert set(store.split[seen.numpy()]) == {0}
    again = tokens_of(batches[0]), tokens_of(batches[-1])
    assert not torch.equal(*(each[: min(map(len, again))] for each in again))
    assert sum(map(len, batches)) / len(batches) == pytest.approx(300, rel=0.15)
    harvested = {}
    for chunk in store.chunks("train"):
        x, row_token = store.read_chunk(SITE, chunk.index)
        harvested |= dict(zip(row_token.tolist(), x, strict=True))
    for raw in batches[:2]:
        stored = torch.stack([harvested[token] for token in tokens_of(raw).tolist()])
        torch.testing.assert_close(raw.x.bfloat16(), stored, rtol=2e-2, atol=1e-3)


def test_resumes_with_the_same_bits(tiny_model: Model, store: ActivationStore) -> None:
    own = objective(tiny_model)
    whole = EndToEndStream(store, own, batch_size=1500)
    count = whole.batches_per_epoch + 2
    expected = list(islice(whole, count))
    for kill_at in (1, count - 2, count - 1):
        killed = EndToEndStream(store, own, batch_size=1500)
        for _ in islice(killed, kill_at):
            pass
        state = json.loads(json.dumps(killed.state_dict()))
        resumed = EndToEndStream(store, own, batch_size=1500)
        resumed.load_state_dict(state)
        for before, after in zip(expected[kill_at:], resumed, strict=False):
            assert torch.equal(tokens_of(before), tokens_of(after))
            assert torch.equal(before.x, after.x)
    for name, other in (("seed", 1), ("batch_size", 100)):
        settings: dict[str, Any] = {"batch_size": 1500, "seed": 0, name: other}
        odd = EndToEndStream(store, own, **settings)
        with pytest.raises(InputError, match=f"{name} differs"):
            odd.load_state_dict(state)


def test_outliers_stay_in_the_model(tiny_model: Model, store: ActivationStore) -> None:
    own = objective(tiny_model, downstream_weight=1.0)
    plain = next(iter(EndToEndStream(store, own, batch_size=100)))
    norm = plain.x.norm(dim=1)
    limit = OutlierFilter(multiple=1.5, median={SITE: float(norm.quantile(0.8)) / 1.5})
    stream = EndToEndStream(store, own, batch_size=100, outliers=limit)
    raw = next(iter(stream))
    assert isinstance(raw, SequenceRows)
    kept = norm <= float(norm.quantile(0.8))
    assert torch.equal(raw.x, plain.x[kept])
    assert torch.equal(tokens_of(raw), tokens_of(plain)[kept])
    assert stream.removed == int((~kept).sum()) > 0
    found = own.loss(raw.sequences, raw.x)
    assert found.loss.item() == pytest.approx(0, abs=1e-6)


def test_bad_input(tiny_model: Model, store: ActivationStore) -> None:
    own = objective(tiny_model)
    x, sequences = own.capture(*text(tiny_model))
    with pytest.raises(InputError, match="one row a kept position"):
        own.loss(sequences, x[:-1])
    with pytest.raises(InputError, match=r"no site|no such site"):
        objective(tiny_model, "blocks.9.hook_resid_post")
    with pytest.raises(InputError, match=r"end_to_end\.sequences_at_once"):
        EndToEndConfig(sequences_at_once=0)
    raw = SequenceRows(x, sequences=sequences)
    with pytest.raises(InputError, match="takes whole batches"):
        raw.select(slice(0, 2))
    sae = make_sae(store, TopKSAE, TopKConfig(d_sae=64, k=8))
    with pytest.raises(InputError, match="without tilt"):
        own.batch(sae, raw, TrainingBatch.of(x, tilt=2.0))
    assert isinstance(sequences, Sequences)


def test_nothing_is_done_where_nothing_is_kept(tiny_model: Model) -> None:
    own = objective(tiny_model, sequences_at_once=1)
    tokens, keep = text(tiny_model)
    keep[1:] = False
    x, sequences = own.capture(tokens, keep)
    found = own.loss(sequences, torch.zeros_like(x))
    alone, first = own.capture(tokens[:1], keep[:1])
    torch.testing.assert_close(found.loss, own.loss(first, torch.zeros_like(alone)).loss)
