"""Cross-layer transcoders against a plain double loop over layers in float64, and on a harvest."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae as saescope_sae
from activations import ActivationStore
from sae.architectures.cross_layer_transcoder import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
)
from sae.commands.convert import ConvertConfig, convert
from sae.core.base import TrainingState
from sae.core.batch import RawBatch, TrainingBatch
from sae.core.normaliser import Normaliser
from sae.data.placement import placement_of
from sae.data.streams import make_stream
from sae.formats import format_named
from sae.formats.load import load
from sae.training.batch_maker import BatchMaker, LossConfig
from sae.training.config import TrainConfig
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from tests.tiny import make_tiny_harvest, make_tiny_model

LAYERS, F, D_IN, D_OUT = 3, 10, 6, 4


def make(**options: Any) -> CrossLayerTranscoder:
    """Random weights; what is read is wider than what is written, so that no axis is mistaken."""
    torch.manual_seed(0)
    config = CrossLayerTranscoderConfig(d_sae=LAYERS * F, **{"layers": LAYERS, **options})
    sae = CrossLayerTranscoder(config, LAYERS * D_IN, LAYERS * D_OUT)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.uniform_(0.1, 0.8) if name == "threshold" else parameter.normal_(std=0.5)
    return sae


def codes_by_hand(sae: CrossLayerTranscoder, y: Tensor) -> list[Tensor]:
    """Features of each layer [batch, F], from that layer's input alone."""
    found = []
    for layer in range(LAYERS):
        own = slice(layer * F, (layer + 1) * F)
        z = y[:, layer * D_IN : (layer + 1) * D_IN] @ sae.W_enc_T[own].T + sae.b_enc[own]
        bar = sae.theta[own]
        if sae.config.activation == "topk":
            bar = z.topk(sae.config.k + 1, dim=1).values[:, -1:].clamp_min(0)  # the next largest
        found.append(z * (z > bar))
    return found


def written_by_hand(sae: CrossLayerTranscoder, codes: list[Tensor]) -> Tensor:
    """sum over l <= m of f^l W^{l,m}, for each m; decoders[l] has W^{l,l}, W^{l,l+1}, ..."""
    out = []
    for m in range(LAYERS):
        total = sae.b_dec[m * D_OUT : (m + 1) * D_OUT].expand(len(codes[0]), D_OUT)
        for layer in range(m + 1):
            start = (m - layer) * D_OUT
            total = total + codes[layer] @ sae.decoders[layer][:, start : start + D_OUT]
        out.append(total)
    return torch.cat(out, dim=1)


def rows(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, LAYERS * D_IN, dtype=torch.float64, generator=g)
    return y, torch.randn(n, LAYERS * D_OUT, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk"])
def test_features_read_one_layer_and_write_to_those_from_it_on(activation: str) -> None:
    sae = make(activation=activation, k=4).double()
    y, _ = rows()
    codes = codes_by_hand(sae, y)
    torch.testing.assert_close(sae.encode(y), torch.cat(codes, dim=1))
    torch.testing.assert_close(sae(y).x_hat, written_by_hand(sae, codes))
    torch.testing.assert_close(sae.encode(y) @ sae.W_dec + sae.b_dec, sae(y).x_hat)
    assert sae.features_of(1) == slice(F, 2 * F)
    assert sae.decoder(1).shape == (F, LAYERS - 1, D_OUT)
    assert torch.equal(sae.decoder(1)[:, 1], sae.decoders[1][:, D_OUT:])
    with pytest.raises(InputError, match=r"layer.*given: 3"):
        sae.decoder(3)
    by_site = sae.W_dec.detach().unflatten(1, (LAYERS, D_OUT)).norm(dim=-1)
    torch.testing.assert_close(sae.site_norms(), by_site)
    assert not sae.site_norms()[2 * F :, :2].any()


def loss_by_hand(sae: CrossLayerTranscoder, data: TrainingBatch, dead: Tensor) -> Tensor:
    """Straight-through slopes as tangents in theta, added where theta is the threshold itself."""
    config, theta = sae.config, sae.theta
    s_in = (sae.normaliser.variance / (LAYERS * D_IN)) ** 0.5
    s_out = (data.variance / (LAYERS * D_OUT)) ** 0.5
    eps = config.bandwidth * s_in
    codes, z = [], []
    for layer, hard in enumerate(codes_by_hand(sae, data.y)):
        own = slice(layer * F, (layer + 1) * F)
        z.append(data.y[:, layer * D_IN : (layer + 1) * D_IN] @ sae.W_enc_T[own].T + sae.b_enc[own])
        near = ((z[-1] - theta[own]).abs() < eps / 2).double().detach()
        slope = theta[own].detach() / eps * near
        codes.append(hard - slope * (theta[own] - theta[own].detach()))
    fvu = (data.target - written_by_hand(sae, codes)).square().sum(1).mean() / data.variance
    norms = torch.cat([decoder.square().sum(1).sqrt() for decoder in sae.decoders])
    f = torch.cat(codes, dim=1)
    penalty = torch.tanh(config.tanh_scale * f * norms / s_out).sum(1).mean() / (LAYERS * D_IN)
    below = torch.relu(theta - torch.cat(z, dim=1)) * norms
    short = below[:, dead].sum(1).mean() / s_out / (LAYERS * D_IN)
    return fvu + config.l0_coefficient * penalty + config.pre_act_coefficient * short


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_loss_and_gradients_equal_the_plain_formula(activation: str) -> None:
    sae = make(activation=activation, l0_warmup_fraction=0.0, pre_act_coefficient=0.1).double()
    sae.normaliser = Normaliser.identity(LAYERS * D_IN, variance=14.0)
    y, target = rows()
    data = TrainingBatch(y=y, target=target, variance=9.0)
    dead = torch.isin(torch.arange(LAYERS * F), torch.tensor([3, 8, 21]))
    output = sae.training_output(data, TrainingState(dead=dead))
    output.loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    assert set(fast) == set(dict(sae.named_parameters()))
    sae.zero_grad()
    expected = loss_by_hand(sae, data, dead)
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.counts, (sae.encode(y) != 0).sum(0))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_loss_of_topk_is_the_error_and_what_dead_features_make_of_it() -> None:
    sae = make(activation="topk", k=3, k_aux=2, auxk_coefficient=0.7).double()
    y, target = rows()
    data = TrainingBatch(y=y, target=target, variance=9.0)
    dead = torch.isin(torch.arange(LAYERS * F), torch.tensor([3, 8, 9, 21]))  # none of layer 1
    output = sae.training_output(data, TrainingState(dead=dead))
    output.loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    assert set(fast) == set(dict(sae.named_parameters()))  # there are no thresholds
    sae.zero_grad()
    codes = codes_by_hand(sae, y)
    assert all(int((each != 0).sum(1).max()) == 3 for each in codes)
    error = target - written_by_hand(sae, codes)
    expected = error.square().sum(1).mean() / 9.0
    for layer in range(LAYERS):
        own = dead[layer * F : (layer + 1) * F]
        left = error.detach()[:, layer * D_OUT :]
        rows_of = slice(layer * F, (layer + 1) * F)
        W, b = sae.W_enc_T[rows_of][own], sae.b_enc[rows_of][own]
        z = torch.relu(y[:, layer * D_IN : (layer + 1) * D_IN] @ W.T + b)
        if z.shape[1] > 2:
            z = z * (z >= z.topk(2, dim=1).values[:, -1:])
        if own.any():
            made = z @ sae.decoders[layer][own]
            auxk = (left - made).square().sum() / (left - left.mean(0)).square().sum()
            expected = expected + 0.7 * auxk / LAYERS
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.counts, (sae.encode(y) != 0).sum(0))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)
    assert not sae.penalised


@pytest.mark.parametrize("kind", ["none", "unit_mean_square", "sqrt_d", "centred"])
def test_folding_saving_and_coming_back(kind: str, tmp_path: Path) -> None:
    """Every site has a scale of its own, inside and outside."""
    sae = make().eval()
    y, target = (each.float() for each in rows(200))
    y, target = y * torch.arange(1, 19) + 3, 70 * target * torch.arange(1, 13) - 11

    def fitted(x: Tensor, width: int) -> Normaliser:
        return Normaliser.side_by_side(
            [
                Normaliser.fit(
                    kind,  # type: ignore[arg-type]
                    mean=part.double().mean(0),
                    mean_square=float(part.double().square().sum(1).mean()),
                    sample=part,
                )
                for part in x.split(width, dim=1)
            ]
        )

    sae.normaliser, sae.output_normaliser = fitted(y, D_IN), fitted(target, D_OUT)
    folded = sae.fold()
    f, x_hat = sae.encode(y), sae(y).x_hat.detach()
    assert 0.1 < float((f > 0).double().mean()) < 0.9
    size = x_hat.abs().max()
    torch.testing.assert_close(folded.encode(y), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(y).x_hat / size, x_hat / size, rtol=1e-5, atol=1e-5)
    plain = torch.cat(codes_by_hand(folded, y), dim=1)  # weights are in the model's units
    torch.testing.assert_close(plain, folded.encode(y), rtol=1e-5, atol=1e-5)
    back = folded.unfold(sae.normaliser, sae.output_normaliser)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    sae.save(tmp_path / "clt")
    again = load(tmp_path / "clt")
    assert again.config == sae.config
    assert torch.equal(again(y).x_hat, x_hat)


def test_thresholds_are_brought_to_the_l0_asked_for() -> None:
    sae = make()
    sae.config = sae.config.with_target_l0(5.0)
    y = rows(600)[0].float()
    sae.calibrate(lambda: iter(y.split(250)))
    assert float(sae.encode_sparse(y).l0().double().mean()) == pytest.approx(5.0, abs=0.01)


def test_wrong_configurations() -> None:
    with pytest.raises(
        InputError, match=r"shared out equally.*given: 32; allowed: a multiple of 3"
    ):
        CrossLayerTranscoderConfig(d_sae=32, layers=3)
    with pytest.raises(InputError, match="no such activation"):
        CrossLayerTranscoderConfig(activation="batchtopk")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sae\.k.*given: 11"):
        CrossLayerTranscoderConfig(d_sae=30, layers=3, activation="topk", k=11)
    topk = CrossLayerTranscoderConfig(d_sae=30, layers=3, activation="topk", k=2)
    with pytest.raises(InputError, match=r"target_l0.*same in each layer.*a multiple of 3"):
        topk.with_target_l0(10)
    assert topk.with_target_l0(12).k == 4
    with pytest.raises(InputError, match=r"sae\.penalty.*given: 'step'; allowed: tanh"):
        CrossLayerTranscoderConfig(activation="relu", penalty="step")
    with pytest.raises(InputError, match="has a layer a site"):
        CrossLayerTranscoderConfig(d_sae=30, layers=3).for_sites(2)
    with pytest.raises(InputError, match=r"d_in: layers are of one width.*given: 19"):
        CrossLayerTranscoder(CrossLayerTranscoderConfig(d_sae=30, layers=3), 19, 12)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clt")
    hooks = ("hook_resid_mid", "hook_mlp_out")
    names = tuple(f"blocks.{n}.{hook}" for n in range(3) for hook in hooks)
    return make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=names)


def settings(harvest: Path, out: Path, **more: Any) -> TrainConfig:
    values = {
        "harvest": str(harvest),
        "out": str(out),
        "sites": ["blocks.*.hook_resid_mid"],
        "target_sites": ["blocks.*.hook_mlp_out"],
        "passes": 2.0,
        "sae": {"kind": "cross_layer_transcoder", "d_sae": 96},
        "trainer": {"batch_size": 64, "target_l0": 12.0},
    }
    return from_dict(TrainConfig, values | more, "test")


def test_it_trains_on_all_layers_of_a_harvest(harvest: Path, tmp_path: Path) -> None:
    sae = saescope_sae.train(settings(harvest, tmp_path / "run"))
    assert sae is not None
    store = ActivationStore.open(str(harvest))
    read = [f"blocks.{n}.hook_resid_mid" for n in range(3)]
    written = [f"blocks.{n}.hook_mlp_out" for n in range(3)]
    assert (sae.metadata["sites"], sae.metadata["target_sites"]) == (read, written)
    placement = placement_of(sae)
    assert (placement.read, placement.written) == (tuple(read), tuple(written))
    assert sae.config.layers == 3  # type: ignore[attr-defined]
    stream = make_stream(store, read, batch_size=50, target_sites=written, crosscoder=True)
    raw = next(iter(stream))
    assert raw.target is not None
    stored = [
        torch.cat([store.read_chunk(site, n.index)[0].float() for n in store.chunks("train")])
        for site in (read[1], written[2])
    ]
    width = store.d_in(read[0])
    for rows, own in zip(
        stored, (raw.x[:, width : 2 * width], raw.target[:, 2 * width :]), strict=True
    ):
        assert all((rows == row).all(1).any() for row in own)
    # better than the mean, and not by its biases alone
    held_out = next(stream.held_out(500)())
    assert held_out.target is not None
    error = (sae(held_out.x).x_hat.detach() - held_out.target).square().sum()
    assert error < 0.9 * (held_out.target - held_out.target.mean(0)).square().sum()
    again = saescope_sae.train(settings(harvest, tmp_path / "run"))
    assert torch.equal(again.decoders[0], sae.decoders[0])  # type: ignore[index]


def test_topk_trains_indexes_and_is_not_circuit_tracers(harvest: Path, tmp_path: Path) -> None:
    rule = {"kind": "cross_layer_transcoder", "d_sae": 96, "activation": "topk"}
    sae = saescope_sae.train(settings(harvest, tmp_path / "run", sae=rule))
    assert sae is not None
    again = load(tmp_path / "run")
    assert again.config.k == 4  # type: ignore[attr-defined]  # of 12 over three layers
    x = torch.randn(20, sae.d_in)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert int(again.encode_sparse(x).l0().max()) <= 12
    with pytest.raises(InputError, match="have no TopK"):
        format_named("circuit_tracer").write(again, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sites": []}, r"sites: .*needs the sites that it reads"),
        ({"target_sites": []}, r"target_sites: .*needs the sites"),
        ({"target_sites": ["blocks.0-1.hook_mlp_out"]}, r"layers \[0, 1\].*layers \[0, 1, 2\]"),
        ({"site": "blocks.0.hook_resid_mid"}, "several sites.*allowed: sites and target_sites"),
        ({"target_sites": ["blocks.*.hook_mlp"]}, "no site of this model matches"),
        ({"sae": {"kind": "crosscoder"}}, "cross-layer transcoder alone"),
        ({"sae": {"kind": "cross_layer_transcoder", "d_sae": 32}}, "a multiple of 3"),
    ],
)
def test_wrong_sites(harvest: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        saescope_sae.train(settings(harvest, tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_the_first_step_starts_at_the_mean() -> None:
    sae = make()
    y, target = (each.float() for each in rows(300))
    sae.reset_parameters()
    batch = BatchMaker(sae, LossConfig()).make(RawBatch(y + 20, target), torch.Generator())
    sae.start(batch)
    torch.testing.assert_close(sae(y + 20).x_hat, target.mean(0).expand_as(target))
    counts = sae.encode_sparse(y + 20).counts()
    assert int((counts > 0).sum()) > 0.9 * LAYERS * F


# ---- circuit-tracer's layout ----------------------------------------------------------------


def theirs(folder: Path, *, jump: bool) -> Path:
    """Files as `CrossLayerTranscoder.to_safetensors` writes them, three layers, d 5, 7 features."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        encoder = {
            f"W_enc_{layer}": torch.randn(7, 5, generator=g),
            f"b_enc_{layer}": torch.randn(7, generator=g),
            f"b_dec_{layer}": torch.randn(5, generator=g),
        }
        if jump:
            encoder[f"threshold_{layer}"] = torch.rand(7, generator=g)
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        decoder = torch.randn(7, LAYERS - layer, 5, generator=g)
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
    values = {
        "model_name": "google/gemma-2-2b",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


@pytest.mark.parametrize("jump", [False, True])
def test_one_of_circuit_tracer_is_read_by_its_own_formula(jump: bool, tmp_path: Path) -> None:
    folder = theirs(tmp_path / "clt", jump=jump)
    sae = load(folder)
    assert sae.metadata["sites"] == [f"blocks.{n}.hook_resid_mid" for n in range(3)]
    assert sae.metadata["target_sites"] == [f"blocks.{n}.hook_mlp_out" for n in range(3)]
    x = torch.randn(20, LAYERS, 5, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(20, LAYERS, 5)
    for layer in range(LAYERS):
        encoder = load_file(folder / f"W_enc_{layer}.safetensors")
        decoder = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        pre = x[:, layer] @ encoder[f"W_enc_{layer}"].T + encoder[f"b_enc_{layer}"]
        f = pre * (pre > encoder.get(f"threshold_{layer}", torch.zeros(())))
        own = sae.encode(x.flatten(1))[:, layer * 7 : (layer + 1) * 7]
        torch.testing.assert_close(own, f, rtol=1e-5, atol=1e-5)
        out[:, layer:] += torch.einsum("bf,fld->bld", f, decoder)
        out[:, layer] += encoder[f"b_dec_{layer}"]
    torch.testing.assert_close(sae(x.flatten(1)).x_hat, out.flatten(1), rtol=1e-5, atol=1e-5)
    format_named("circuit_tracer").write(sae, tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_trained_one_is_converted_and_comes_back(harvest: Path, tmp_path: Path) -> None:
    saescope_sae.train(settings(harvest, tmp_path / "run"))
    sae = load(tmp_path / "run")
    config = ConvertConfig(
        source=str(tmp_path / "run"), to="circuit_tracer", out=str(tmp_path / "out")
    )
    convert(config)
    convert(config)  # the same bytes
    again = load(tmp_path / "out")
    x = torch.randn(30, sae.d_in)
    assert again.metadata["target_sites"] == sae.metadata["target_sites"]
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="saelens: cannot hold this architecture"):
        format_named("saelens").write(sae, tmp_path / "saelens")


def test_it_is_evaluated_and_indexed(harvest: Path, tmp_path: Path) -> None:
    saescope_sae.train(settings(harvest, tmp_path / "run"))
    found = saescope_sae.evaluate(
        saescope_sae.EvaluateConfig(run=str(tmp_path / "run"), tokens=200)
    )
    assert found["protocol"]["sites"] == [f"blocks.{n}.hook_resid_mid" for n in range(3)]
    path = saescope_sae.index(
        saescope_sae.IndexConfig(run=str(tmp_path / "run"), out=str(tmp_path / "store"))
    )
    with FeatureStore.open(path) as store:
        assert store.live_features()


def test_damaged_files_of_circuit_tracer(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "clt", jump=True)
    (folder / "config.yaml").unlink()
    assert "sites" not in load(folder).metadata
    with pytest.raises(InputError, match="same site in every block"):
        format_named("circuit_tracer").write(load(folder), tmp_path / "again")
    encoder = load_file(folder / "W_enc_1.safetensors")
    del encoder["threshold_1"]
    save_file(encoder, folder / "W_enc_1.safetensors")
    with pytest.raises(ArtefactError, match=r"threshold differs in shape.*or is missing"):
        load(folder)
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"of some layers are missing.*layers \[0, 2\]"):
        load(folder)
