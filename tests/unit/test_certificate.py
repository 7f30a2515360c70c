"""Certificates: what is in line passes; each mistake of a converter is found and named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations import Model
from sae.core.base import SparseAutoencoder
from sae.core.plain import PlainSAE
from sae.evaluation.reconstruction import measure_reconstruction
from sae.formats import format_named
from sae.formats._claim import Claim
from sae.formats._ours import sae_of
from sae.formats.certificate import certify, measure
from sae.formats.load import load
from saescope.errors import ArtefactError, InputError

D_IN, D_SAE, THRESHOLD = 48, 64, 0.5


def dictionary(width: int = D_SAE) -> Tensor:
    """Unit rows, nearly orthogonal."""
    rows = torch.randn(width, D_IN, generator=torch.Generator().manual_seed(0))
    for _ in range(200):  # push them apart
        gram = rows @ rows.T
        rows = rows - 0.1 * (gram - torch.diag(gram.diag())) @ rows
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows


OFFSET = 0.9 * torch.randn(D_IN, generator=torch.Generator().manual_seed(7))


def data(n: int = 2000, scale: float = 1.0) -> Tensor:
    """Sparse codes of about 3 features, each at least 0.9, off the origin, with some noise."""
    g = torch.Generator().manual_seed(1)
    active = torch.rand(n, D_SAE, generator=g) < 3 / D_SAE
    codes = active * (0.9 + torch.rand(n, D_SAE, generator=g))
    noise = 0.02 * torch.randn(n, D_IN, generator=g)
    return scale * (codes @ dictionary() + OFFSET + noise)


def planted() -> PlainSAE:
    """The JumpReLU SAE that data() was made with: L0 about 3, FVU near 0."""
    rows = dictionary()
    return PlainSAE(
        activation="jumprelu", W_enc=rows.T.contiguous(), W_dec=rows, b_enc=torch.zeros(D_SAE),
        b_dec=OFFSET.clone(), threshold=torch.full((D_SAE,), THRESHOLD),
    )  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> Claim:
    found = measure(sae_of(planted()), data(), data())
    assert 2.5 < found.l0 < 4
    assert found.fvu is not None
    assert found.fvu < 0.15
    return Claim(l0=found.l0, fvu=found.fvu, source="the test")


def test_measures_as_the_evaluation_does() -> None:
    sae = sae_of(planted())
    x = data(500)
    ours, wanted = measure(sae, x, x), measure_reconstruction(sae, lambda: [x])
    assert ours.l0 == pytest.approx(wanted.l0)
    assert ours.fvu == pytest.approx(wanted.fvu)
    assert ours.fvu_interval == pytest.approx(wanted.fvu_interval)


def test_in_line_gives_a_certificate(truth: Claim, tmp_path: Path) -> None:
    format_named("saelens").write(sae_of(planted()), tmp_path / "sae")
    sae = load(tmp_path / "sae", reference=data(), claimed={"l0": truth.l0, "fvu": truth.fvu})
    certificate = sae.metadata["certificate"]
    assert certificate["measured"]["rows"] == 2000
    assert certificate["measured"]["l0"] == pytest.approx(truth.l0)
    json.dumps(sae.metadata)  # it is saved with the SAE
    certify(sae, data(), claimed={"l0": 1.2 * (truth.l0 or 0)})
    certify(sae, data())


@pytest.mark.parametrize("claims", [("l0",), ("l0", "fvu")])
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("flag", r"b_dec is not subtracted from the input and should be"),
        ("other flag", r"b_dec is subtracted from the input and should not be"),
        ("threshold", r"its threshold is lost .*JumpReLU|TopK SAE with k = "),
        ("scale", r"a scale of the input that was never folded into the weights: .*sqrt\(d_in\)"),
    ],
)
def test_each_mistake_is_named(
    mistake: str, named: str, claims: tuple[str, ...], truth: Claim, tmp_path: Path
) -> None:
    """The files of a good SAE with one thing about them wrong."""
    plain, x = planted(), data()
    if mistake == "scale":  # trained on inputs of norm sqrt(d), saved unfolded
        x = data(scale=12.0)
        s = 12.0 * D_IN**0.5 / float(x.norm(dim=1).mean())
        thresholds = torch.full((D_SAE,), THRESHOLD * s)
        plain = replace(plain, b_dec=plain.b_dec * s, threshold=thresholds)
    if mistake == "other flag":
        plain = plain.with_pre_bias(False)
    sae = sae_of(planted())
    folder = tmp_path / "sae"
    format_named("saelens").write(sae, folder)
    config = json.loads((folder / "cfg.json").read_text())
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors |= plain.tensors()
    if mistake == "flag":
        config["apply_b_dec_to_input"] = False
    if mistake == "threshold":
        config["architecture"] = "standard"
        del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    stated = {name: getattr(truth, name) for name in claims}
    with pytest.raises(ArtefactError, match=rf"what looks wrong: .*({named})"):
        load(folder, reference=x, claimed=stated)


def test_weights_that_are_poor_and_have_the_claimed_l0_are_loaded_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Decoder rows of random directions: no reading of them is a good one."""
    random = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(5))
    poor, x = sae_of(replace(planted(), W_dec=5 * random)), data()
    measured = measure(poor, x, x)
    assert measured.fvu is not None
    assert measured.fvu > 1
    assert certify(poor, x, claimed={"l0": measured.l0}).measured.fvu == measured.fvu
    assert "warning: sae: on 2,000 reference rows it has FVU" in capsys.readouterr().out
    for claimed in (None, {"l0": measured.l0, "fvu": 0.1}, {"l0": 2 * measured.l0}):
        with pytest.raises(ArtefactError, match=r"predicting the mean|not 0\.1"):
            certify(poor, x, claimed=claimed)


def test_a_mistaken_bias_is_found_though_l0_is_in_line() -> None:
    """A TopK SAE has its L0 whatever is wrong with it; only the FVU tells."""
    x, near = data() - 0.7 * OFFSET, 0.3 * OFFSET
    right = replace(planted(), activation="topk", k=4, threshold=None, b_dec=near)
    certify(sae_of(right), x, claimed={"l0": 4})
    wrong = right.shift_encoder(1)  # as if b_dec were not to be subtracted
    measured = measure(sae_of(wrong), x, x)
    assert measured.l0 == 4
    assert measured.fvu is not None
    assert measured.fvu < 1
    with pytest.raises(ArtefactError, match="much better; what looks wrong: b_dec is not subtract"):
        certify(sae_of(wrong), x, claimed={"l0": 4})


def test_defect_6_a_norm_factor_that_was_lost_is_named_and_can_be_given(tmp_path: Path) -> None:
    """dictionary_learning trains on x / factor; a checkpoint whose biases were not multiplied."""
    x = data(scale=20.0)
    factor = float(x.square().sum(1).mean()) ** 0.5
    ratio = 20.0 / factor
    plain = replace(planted(), b_dec=OFFSET * ratio, threshold=torch.full((D_SAE,), 0.5 * ratio))
    folder = tmp_path / "trainer_0"
    format_named("dictionary_learning").write(sae_of(plain), folder)
    with pytest.raises(
        ArtefactError, match=rf"never folded into the weights: {1 / factor:.4g}, one over the root"
    ):
        load(folder, reference=x, claimed={"l0": 3.1})
    sae = load(folder, reference=x, claimed={"l0": 3.1}, input_scale=1 / factor)
    assert sae.metadata["certificate"]["measured"]["fvu"] < 0.15


def test_transposed_square_matrices_are_named() -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=g)).Q
    codes = (torch.rand(1500, D_IN, generator=g) < 0.06) * (1 + torch.rand(1500, D_IN, generator=g))
    x = codes @ rows
    plain = PlainSAE(
        activation="jumprelu", W_enc=rows.T.contiguous(), W_dec=rows, b_enc=torch.zeros(D_IN),
        b_dec=torch.zeros(D_IN), threshold=torch.full((D_IN,), 0.5),
    )  # fmt: skip
    certify(sae_of(plain), x, claimed={"l0": float((codes > 0).sum(1).float().mean())})
    for name, turned in (("W_dec", rows.T), ("W_enc", rows)):
        wrong = replace(plain, **{name: turned.contiguous()})
        with pytest.raises(ArtefactError, match=f"what looks wrong: {name} is transposed"):
            certify(sae_of(wrong), x)


def test_a_mistaken_architecture_is_named(truth: Claim) -> None:
    relu = replace(planted(), activation="relu", threshold=None, b_enc=torch.full((D_SAE,), -0.4))
    claim = measure(sae_of(relu), data(), data())
    wrong = replace(relu, activation="topk", k=1)
    with pytest.raises(ArtefactError, match="what looks wrong: the architecture: topk for ReLU"):
        certify(sae_of(wrong), data(), claimed={"l0": claim.l0, "fvu": claim.fvu})
    del truth


def test_another_site_is_suspected_where_nothing_helps(truth: Claim) -> None:
    x = 5 * torch.randn(500, D_IN, generator=torch.Generator().manual_seed(5))
    with pytest.raises(ArtefactError, match=r"no other way of reading .*are the reference"):
        certify(sae_of(planted()), x, claimed=truth)


def test_the_errors_of_wrong_use(tmp_path: Path) -> None:
    sae = sae_of(planted())
    with pytest.raises(InputError, match=r"reference: wrong shape .*allowed: \[rows, 48\]"):
        certify(sae, torch.zeros(3, 5))
    with pytest.raises(InputError, match=r"unknown metrics .*\['mse'\]; allowed: l0, fvu"):
        certify(sae, data(10), claimed={"mse": 1.0})
    format_named("saelens").write(sae, tmp_path / "sae")
    with pytest.raises(InputError, match="needs reference activations"):
        load(tmp_path / "sae", claimed={"l0": 3})
    with pytest.raises(InputError, match="all rows are equal"):
        certify(sae, torch.ones(4, D_IN))


def test_a_transcoder_is_measured_against_its_target() -> None:
    x, out = data(), torch.randn(D_SAE, 5, generator=torch.Generator().manual_seed(2))
    plain = replace(planted().with_pre_bias(False), transcoder=True, W_dec=out,
                    b_dec=torch.zeros(5))  # fmt: skip
    sae = sae_of(plain)
    with torch.no_grad():
        target = sae(x).x_hat + 0.1
    certificate = certify(sae, x, target=target, claimed={"fvu": 0.01})
    assert certificate.measured.fvu is not None
    assert certify(sae, x, claimed={"l0": 3.1}).measured.fvu is None
    with pytest.raises(ArtefactError, match=r"FVU .*no better than predicting the mean"):
        certify(sae, x, target=target.flip(0))


def test_claims_of_the_files_are_used(truth: Claim, tmp_path: Path) -> None:
    good = sae_of(planted())
    format_named("gemma_scope").write(good, tmp_path / "average_l0_3")
    assert load(tmp_path / "average_l0_3", reference=data()).metadata["claimed"] == {"l0": 3.0}
    format_named("gemma_scope").write(good, tmp_path / "average_l0_82")
    with pytest.raises(ArtefactError, match=r"not 82 as claimed by the folder's name"):
        load(tmp_path / "average_l0_82", reference=data())
    good.metadata["held_out"] = {"l0": 9.0, "fvu": truth.fvu, "rows": 2000, "cosine": 0.9}
    good.save(tmp_path / "ours")
    with pytest.raises(ArtefactError, match=r"L0 .*, not 9 as claimed by its config.json"):
        load(tmp_path / "ours", reference=data())
    load(tmp_path / "ours", reference=data(), claimed={"l0": truth.l0})  # the caller knows better
    format_named("saelens").write(load(tmp_path / "ours"), tmp_path / "theirs")
    with pytest.raises(ArtefactError, match=r"L0 .*, not 9 as claimed by its cfg.json"):
        load(tmp_path / "theirs", reference=data())


def test_claims_of_the_caller_go_before_those_of_the_files() -> None:
    files = Claim(l0=80, fvu=0.2, source="its files")
    assert Claim(l0=50).merge(files) == Claim(l0=50, fvu=0.2, source="the caller and its files")
    assert Claim().merge(files) == files
    assert Claim(l0=50).merge(None) == Claim(l0=50)
    assert Claim(l0=50, fvu=0.1).merge(files).source == "the caller"


def test_cross_entropy_recovered_is_measured_and_compared(
    tiny_model: Model, sae: SparseAutoencoder
) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, tiny_model.d_vocab, (6, 20), generator=g)
    site = "blocks.1.hook_resid_post"
    x = tiny_model.capture(tokens, [site])[site][tiny_model.keep_mask(tokens)].float()
    directions = torch.linalg.qr(torch.randn(32, 32, generator=g)).Q
    both = torch.cat([directions, -directions])  # x itself, as sums of opposite directions
    plain = PlainSAE(activation="relu", W_enc=both.T.contiguous(), W_dec=both,
                     b_enc=torch.zeros(64), b_dec=torch.zeros(32))  # fmt: skip
    exact = sae_of(plain)
    exact.metadata = dict(sae.metadata)
    options: dict[str, Any] = {"model": tiny_model, "tokens": tokens}
    certificate = certify(exact, x, claimed={"ce_recovered": 1.0}, **options)
    assert certificate.ce_recovered == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ArtefactError, match=r"recovers 100.00% of the cross-entropy, not 50.00%"):
        certify(exact, x, claimed={"ce_recovered": 0.5}, **options)
    with pytest.raises(InputError, match="needs tokens as well"):
        certify(exact, x, model=tiny_model)
