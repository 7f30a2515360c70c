"""Options of TopK, BatchTopK and Matryoshka: a LISTA step, a falling k, prefixes by frequency."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae as saes
from sae.analysis.attention.encoder import Encoder
from sae.architectures.batchtopk import BatchTopKConfig, BatchTopKSAE
from sae.architectures.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.train import train
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.formats import format_named, formats
from sae.training.run_folder import identity
from sae.training.trainer import Trainer
from saescope.artefact import SEAL, sha256_json
from saescope.config import to_dict
from saescope.errors import InputError

ETA = 0.3
KINDS: dict[str, Any] = {
    "topk": (TopKSAE, TopKConfig),
    "batchtopk": (BatchTopKSAE, BatchTopKConfig),
    "matryoshka": (MatryoshkaSAE, MatryoshkaConfig),
}


def make(kind: str, *, d_sae: int = 24, d_in: int = 6, **options: Any) -> SparseAutoencoder:
    """Random weights, biases and all, in float64."""
    torch.manual_seed(0)
    cls, config = KINDS[kind]
    sae = cls(config(d_sae=d_sae, **{"k": 3, "k_aux": 2, **options}), d_in).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.normalise_decoder()
    return sae


def rows(count: int = 20, d_in: int = 6) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pre_activations(sae: SparseAutoencoder, y: Tensor) -> Tensor:
    return (y - sae.b_dec) @ sae.W_enc + sae.b_enc


def strongest(pre: Tensor, sae: SparseAutoencoder) -> Tensor:
    """Dense codes: what TopK or a selector over the batch keeps."""
    positive, k = pre.relu(), sae.config.k  # type: ignore[attr-defined]
    if isinstance(sae, TopKSAE):
        bar = positive.detach().sort(dim=1, descending=True).values[:, k - 1 : k]
    else:
        bar = positive.detach().flatten().sort(descending=True).values[round(k * len(pre)) - 1]
    return positive * (positive >= bar)


def by_hand(sae: SparseAutoencoder, y: Tensor) -> Tensor:
    """Codes [batch, d_sae] after the step, as Gregor and LeCun write it, all dense."""
    pre = pre_activations(sae, y)
    first = strongest(pre, sae)
    return strongest(pre + ETA * (y - sae.b_dec - first @ sae.W_dec) @ sae.W_enc, sae)


@pytest.mark.parametrize("kind", KINDS)
def test_lista_step_and_its_gradient_against_dense_products(kind: str) -> None:
    more = {"prefix_widths": (24,), "include_empty": False} if kind == "matryoshka" else {}
    sae, y = make(kind, lista_eta=ETA, **more), rows()
    batch = TrainingBatch.of(y, variance=2.0)
    output = sae.training_output(batch, TrainingState(dead=torch.zeros(24, dtype=torch.bool)))
    codes = by_hand(sae, y)
    expected = (codes @ sae.W_dec + sae.b_dec - y).square().sum(1).mean() / 2
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.counts, (codes != 0).sum(0))
    parameters = list(sae.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    for own, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(own, other)
    plain = strongest(pre_activations(sae, y), sae)
    assert not torch.equal(plain != 0, codes != 0)  # the step changes which features fire


def test_lista_steps_gradient_by_finite_differences() -> None:
    sae, y = make("topk", lista_eta=ETA, d_sae=8, k=2), rows(4)
    names = [name for name, _ in sae.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        found = torch.func.functional_call(
            _Loss(sae), {f"sae.{n}": v for n, v in own.items()}, (y,)
        )
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in sae.parameters()])


class _Loss(torch.nn.Module):
    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, y: Tensor) -> Tensor:
        return self.sae.training_output(TrainingBatch.of(y), TrainingState()).loss


def test_topk_infers_as_it_trains() -> None:
    sae, y = make("topk", lista_eta=ETA), rows()
    torch.testing.assert_close(sae.encode_normalised(y).dense(), by_hand(sae, y))


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_thresholds_of_both_steps(kind: str) -> None:
    """Each passes k a row where it is calibrated; codes are those of two thresholds."""
    sae, y = make(kind, lista_eta=ETA), rows(400)
    sae.eval().calibrate(lambda: iter([y]))
    assert isinstance(sae, BatchTopKSAE | MatryoshkaSAE)
    pre = pre_activations(sae, y)
    first = pre * (pre > sae.first_threshold)
    assert int((first != 0).sum()) == 3 * 400
    second = pre + ETA * (y - sae.b_dec - first @ sae.W_dec) @ sae.W_enc
    expected = second * (second > sae.threshold)
    torch.testing.assert_close(sae.encode_normalised(y).dense(), expected)
    assert int((expected != 0).sum()) == 3 * 400


def test_the_first_steps_threshold_follows_training() -> None:
    sae, y = make("batchtopk", lista_eta=ETA).train(), rows()
    assert isinstance(sae, BatchTopKSAE)
    sae.training_output(TrainingBatch.of(y), TrainingState())
    least = pre_activations(sae, y).flatten().sort(descending=True).values[59]
    torch.testing.assert_close(sae.first_threshold.double(), least.detach(), rtol=1e-6, atol=0)
    assert int(sae.first_threshold_updates) == 1


def test_hidden_coordinates_stay_hidden_in_the_step() -> None:
    """What the encoder may not see has no part in what the first choice leaves."""
    sae, y = make("topk", lista_eta=ETA), rows()
    visible = torch.tensor([True, True, True, False, True, False])
    other = torch.where(visible, y, y + 5.0)
    found = []
    for each in (y, other):
        batch = TrainingBatch.of(each, visible=visible)
        found.append(sae.training_output(batch, TrainingState()).counts)
    assert torch.equal(*found)
    with torch.no_grad():
        moved = sae.clone()
        moved.W_dec[:, ~visible] += 3.0
    again = moved.training_output(TrainingBatch.of(y, visible=visible), TrainingState())
    assert torch.equal(again.counts, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_folded_and_saved_it_is_the_same(kind: str, tmp_path: Path) -> None:
    sae = make(kind, lista_eta=ETA).float()
    x = 5 * rows(300).float() + 2
    sae.normaliser = Normaliser.fit(
        "centred", mean=x.mean(0), mean_square=float(x.square().sum(1).mean())
    )
    sae.eval().calibrate(lambda: iter([sae.normaliser.apply(x)]))
    torch.testing.assert_close(sae.fold()(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.fold().encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    sae.save(tmp_path / "sae")
    again = saes.load(tmp_path / "sae")
    assert again.config == sae.config
    assert torch.equal(again.encode(x), sae.encode(x))


@pytest.mark.parametrize("kind", KINDS)
def test_files_from_before_are_read_as_they_were(kind: str, tmp_path: Path) -> None:
    sae = make(kind).float()
    assert not any("first_threshold" in name for name in sae.state_dict())
    sae.save(tmp_path / "sae")
    path = tmp_path / "sae" / "config.json"
    saved = json.loads(path.read_text())
    later = {"lista_eta", "detach_prefixes", "sort_by_frequency"}
    if kind != "topk":
        later |= {"k_start", "k_anneal_fraction"}
    assert later & saved["config"].keys()
    saved["config"] = {k: v for k, v in saved["config"].items() if k not in later}
    saved[SEAL] = sha256_json({name: value for name, value in saved.items() if name != SEAL})
    path.write_text(json.dumps(saved))
    assert saes.load(tmp_path / "sae").config == sae.config


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_before_is_the_same_run(kind: str) -> None:
    config = to_dict(make(kind).config)
    older = {k: v for k, v in config.items() if k not in ("lista_eta", "sort_by_frequency")}
    assert older != config
    trainer: dict[str, Any] = {}
    now, then = ({"sae": each, "trainer": trainer} for each in (config, older))
    assert identity(now) == identity(then)
    assert identity({"sae": {**config, "lista_eta": 0.1}, "trainer": trainer}) != identity(then)


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_refuse_it_by_name(kind: str, tmp_path: Path) -> None:
    sae, plain = make(kind, lista_eta=ETA).float(), make(kind).float()
    refused = 0
    for name in sorted(formats().keys() - {"saescope"}):
        (tmp_path / name).mkdir()
        try:
            format_named(name).write(plain, tmp_path / name)
        except InputError:
            continue  # holds no such architecture at all
        with pytest.raises(InputError, match="chooses its features in two steps"):
            format_named(name).write(sae, tmp_path / f"{name}-lista")
        refused += 1
    assert refused >= 2
    with pytest.raises(InputError, match=r"attribute: .*in two steps"):
        Encoder.of(sae, 0)
    if isinstance(sae, MatryoshkaSAE):
        with pytest.raises(InputError, match=r"prefix: .*in two steps"):
            sae.prefix(0)


def test_no_step_where_something_else_is_reconstructed() -> None:
    for cls, config in KINDS.values():
        with pytest.raises(InputError, match=r"lista_eta: what is left of the input"):
            cls(config(d_sae=8, k=2, lista_eta=ETA), 6, 5)
        with pytest.raises(InputError, match=r"sae\.lista_eta"):
            config(d_sae=8, k=2, lista_eta=-1.0)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_k_falls(kind: str) -> None:
    sae, y = make(kind, k_start=9, k_anneal_fraction=0.5), rows()
    batch = TrainingBatch.of(y)
    with torch.no_grad():
        sae.b_enc.add_(10.0)  # all are positive
    kept = []
    for step in range(6):
        state = TrainingState(step=step, total_steps=8)
        kept.append(int(sae.training_output(batch, state).counts.sum()) / len(y))
    assert kept == [9, 7.5, 6, 4.5, 3, 3]
    with pytest.raises(InputError, match=r"sae\.k_start"):
        make(kind, k_start=2)
    with pytest.raises(InputError, match=r"sae\.k_start"):
        make(kind, k_start=25)


WIDTHS = (4, 10, 24)


def nested_by_hand(sae: MatryoshkaSAE, y: Tensor, number: Tensor) -> list[Tensor]:
    """Each prefix's error with what came before it detached, but for the last; number [d_sae]."""
    codes = strongest(pre_activations(sae, y), sae)
    found, before = [(sae.b_dec - y).square().sum(1).mean()], sae.b_dec
    for low, high in zip((0, *WIDTHS[:-1]), WIDTHS, strict=True):
        own = (number >= low) & (number < high)
        whole = sae.b_dec + (codes * (number < high)) @ sae.W_dec
        here = before.detach() if low > 0 and high < 24 else before
        part = here + (codes * own) @ sae.W_dec
        found.append(((whole if high == 24 else part) - y).square().sum(1).mean())
        before = whole
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sort", [True, False])
def test_detached_prefixes_against_dense_products(
    fused: bool, sort: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(TrainingBatch, "by_squares", False)
    weights = (0.1, 0.2, 0.3, 0.4)
    options = {"prefix_widths": WIDTHS, "prefix_weights": weights, "detach_prefixes": True}
    sae, y = make("matryoshka", sort_by_frequency=sort, **options).eval(), rows()
    assert isinstance(sae, MatryoshkaSAE)
    number = torch.arange(24)
    if sort:
        sae.density.copy_(torch.rand(24, generator=torch.Generator().manual_seed(3)))
        number = (sae.density[None] > sae.density[:, None]).sum(1)  # how many fire more often
    loss = sae.training_output(TrainingBatch.of(y), TrainingState()).loss
    expected = sum(
        w * each for w, each in zip(weights, nested_by_hand(sae, y, number), strict=True)
    )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(loss, expected)
    parameters = list(sae.parameters())
    found = torch.autograd.grad(loss, parameters)
    for own, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_whom_a_prefixs_loss_teaches_by_finite_differences(level: int) -> None:
    """Its own rows by the slope of its loss; smaller prefixes' not at all, but for the last."""
    weights = tuple(float(n == level + 1) for n in range(4))
    options = {"prefix_widths": WIDTHS, "prefix_weights": weights, "auxk_coefficient": 0.0}
    sae, y = make("matryoshka", detach_prefixes=True, **options), rows()
    batch = TrainingBatch.of(y)
    sae.training_output(batch, TrainingState()).loss.backward()
    assert sae.W_dec.grad is not None
    edges = (0, *WIDTHS)
    for other in range(3):
        inside = slice(edges[other], edges[other + 1])
        slopes = torch.zeros_like(sae.W_dec[inside])
        with torch.no_grad():
            for cell in range(slopes.numel()):
                at = (inside.start + cell // 6, cell % 6)
                values = []
                for step in (1e-5, -1e-5):
                    sae.W_dec[at] += step
                    values.append(sae.training_output(batch, TrainingState()).loss)
                    sae.W_dec[at] -= step
                slopes.view(-1)[cell] = (values[0] - values[1]) / 2e-5
        taught = other == level or (level == 2 and other < 2)
        if taught:
            torch.testing.assert_close(sae.W_dec.grad[inside], slopes, rtol=1e-5, atol=1e-7)
            assert slopes.any()
        else:
            assert not sae.W_dec.grad[inside].any()
            assert slopes.any() == (other < level)  # the loss itself does depend on smaller ones


def permuted(sae: MatryoshkaSAE, order: Tensor) -> MatryoshkaSAE:
    other = sae.clone()
    with torch.no_grad():
        for name in ("W_enc_T", "b_enc", "W_dec", "density"):
            getattr(other, name).copy_(getattr(sae, name)[order])
    return other


@pytest.mark.parametrize("aux_per_level", [True, False])
def test_by_frequency_the_numbers_of_features_do_not_count(aux_per_level: bool) -> None:
    options = {"prefix_widths": WIDTHS, "aux_per_level": aux_per_level}
    sae, y = make("matryoshka", sort_by_frequency=True, **options).eval(), rows()
    assert isinstance(sae, MatryoshkaSAE)
    sae.density.copy_(torch.rand(24, generator=torch.Generator().manual_seed(3)))
    dead = torch.arange(24) % 3 == 0
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    losses = [
        each.training_output(TrainingBatch.of(y), TrainingState(dead=mask)).loss
        for each, mask in ((sae, dead), (permuted(sae, order), dead[order]))
    ]
    torch.testing.assert_close(*losses)
    own = make("matryoshka", **options).eval()
    unsorted = own.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
    assert not torch.allclose(unsorted, losses[0])
    by_number = permuted(sae, sae.density.argsort(descending=True))
    dead = dead[sae.density.argsort(descending=True)]
    plain = by_number.clone()
    plain.config = MatryoshkaConfig(d_sae=24, k=3, k_aux=2, **options)
    same = [
        each.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
        for each in (by_number, plain)
    ]
    assert torch.equal(*same)


def test_features_are_put_in_order_when_training_ends() -> None:
    sae, y = make("matryoshka", sort_by_frequency=True, prefix_widths=WIDTHS), rows(300)
    assert isinstance(sae, MatryoshkaSAE)
    sae.density.copy_(torch.rand(24, generator=torch.Generator().manual_seed(3)))
    order = sae.density.argsort(descending=True)
    before = sae.clone()
    before.config = MatryoshkaConfig(d_sae=24, k=3, k_aux=2, prefix_widths=WIDTHS)
    for each in (sae, before):
        each.eval().calibrate(lambda: iter([y]))
    assert sae.density.diff().max() < 0
    assert torch.equal(sae.encode(y), before.encode(y)[:, order])
    torch.testing.assert_close(sae(y).x_hat, before(y).x_hat)
    again = sae.clone()
    again.calibrate(lambda: iter([y]))
    assert torch.equal(again.W_dec, sae.W_dec)
    assert torch.equal(sae.prefix(0).W_dec, before.W_dec[order[:4]])


def test_all_together_resume_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(3000, 8).float() @ torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {
        "d_sae": 48, "k": 4, "k_start": 8, "k_anneal_fraction": 1.0, "lista_eta": ETA,
        "prefix_widths": (6, 12, 48), "detach_prefixes": True, "sort_by_frequency": True,
        "batch_size": 128, "passes": 2, "checkpoint_every": 10, "lr": 3e-3,
    }  # fmt: skip
    whole = train(x, "matryoshka", out=str(tmp_path / "whole"), **options)
    advance = Trainer.advance

    def killed(self: Trainer, raw: Any) -> str:
        if self.step == 25:
            raise KeyboardInterrupt
        return advance(self, raw)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(x, "matryoshka", out=str(tmp_path / "killed"), **options)
    resumed = train(x, "matryoshka", out=str(tmp_path / "killed"), **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert isinstance(whole, MatryoshkaSAE)
    assert whole.density.diff().max() <= 0
    held_out = whole.metadata["held_out"]
    assert held_out["l0"] == pytest.approx(4, rel=0.1)
    assert held_out["fvu"] < 0.8
