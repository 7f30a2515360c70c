"""SAEs that read and write several sites, evaluated and indexed on a harvest of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations import ActivationStore, load_model
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.architectures.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser
from sae.evaluation.downstream import measure_downstream
from sae.formats.hub import EVALUATION_FILE
from sae.formats.load import load
from sae.indexing.build import direct_logits
from saescope.__main__ import main
from saescope.errors import InputError
from store import FeatureStore
from store.database import STORE_FILE
from tests.tiny import make_tiny_harvest, make_tiny_model

EARLY, LATE, OUT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A tiny model's harvest of three sites."""
    folder = tmp_path_factory.mktemp("work")
    make_tiny_harvest(folder, make_tiny_model(folder / "model"), sites=(EARLY, LATE, OUT))
    return ActivationStore.open(folder / "harvest")


def fitted(harvest: ActivationStore, site: str) -> Normaliser:
    found = harvest.statistics(site)
    mean = torch.from_numpy(found.mean)
    return Normaliser.fit("centred", mean=mean, mean_square=found.mean_square)


def provenance(harvest: ActivationStore) -> dict[str, Any]:
    model = harvest.manifest["model"]
    return {
        "harvest": str(harvest.path), "model_spec": model["spec"],
        "weights_hash": model["weights_hash"],
    }  # fmt: skip


def randomised(sae: Any) -> Any:
    torch.manual_seed(0)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sae.eval()


def transcoder(harvest: ActivationStore) -> SkipTranscoder:
    sae = randomised(SkipTranscoder(SkipTranscoderConfig(d_sae=40, k=4), 32))
    sae.normaliser, sae.output_normaliser = fitted(harvest, EARLY), fitted(harvest, OUT)
    sae.metadata = {"site": EARLY, "target_site": OUT, **provenance(harvest)}
    return sae


def crosscoder(harvest: ActivationStore) -> Crosscoder:
    sae = randomised(Crosscoder(CrosscoderConfig(d_sae=40), 64))
    sae.normaliser = Normaliser.side_by_side([fitted(harvest, site) for site in (EARLY, LATE)])
    sites = {"site": EARLY, "sites": [EARLY, LATE], "site_widths": [32, 32]}
    sae.metadata = {**sites, **provenance(harvest)}
    return sae


def of_layers(harvest: ActivationStore) -> TopKSAE:
    sae = randomised(TopKSAE(TopKConfig(d_sae=40, k=4), 32))
    sae.site_normalisers = {site: fitted(harvest, site) for site in (EARLY, LATE)}
    sites = {"site": EARLY, "sites": [EARLY, LATE], "site_widths": [32, 32]}
    sae.metadata = {**sites, **provenance(harvest)}
    return sae


def held_out(harvest: ActivationStore, site: str) -> Tensor:
    chunks = harvest.chunks("held_out")
    return torch.cat([harvest.read_chunk(site, chunk.index)[0].float() for chunk in chunks])


def evaluated(sae: SparseAutoencoder, folder: Path, *words: str) -> dict[str, Any]:
    sae.save(folder)
    assert main(["eval", str(folder), *words]) == 0
    return json.loads((folder / EVALUATION_FILE).read_text())


def fvu_of(target: Tensor, x_hat: Tensor) -> float:
    exact = target.double()
    spread = (exact - exact.mean(0)).square().sum()
    return float((exact - x_hat.detach().double()).square().sum() / spread)


def downstream(harvest: ActivationStore, read, target, predict) -> dict[str, Any]:
    """As the command has it, put together by hand."""
    model = load_model(harvest.manifest["model"]["spec"], dtype="float32")
    chosen = torch.from_numpy(harvest.split == 1).nonzero()[:, 0]
    chosen = chosen[: max(1, 200 // harvest.context)].numpy()
    tokens = torch.from_numpy(harvest.tokens[chosen]).long()
    keep = torch.from_numpy(harvest.keep[chosen])
    mean = torch.cat([torch.from_numpy(harvest.statistics(site).mean) for site in target])
    return vars(measure_downstream(model, read, predict, mean, tokens, keep, target=target))


def test_a_transcoder_is_measured_at_its_output(harvest: ActivationStore, tmp_path: Path) -> None:
    sae = transcoder(harvest)
    found = evaluated(sae.fold(), tmp_path / "sae", "--tokens", "200")
    x, t = held_out(harvest, EARLY), held_out(harvest, OUT)
    assert found["reconstruction"]["fvu"] == pytest.approx(fvu_of(t, sae(x).x_hat), rel=1e-4)
    assert found["reconstruction"]["fvu_by_site"] == {}
    assert (found["protocol"]["site"], found["protocol"]["target_site"]) == (EARLY, OUT)
    expected = downstream(harvest, EARLY, [OUT], lambda x: sae(x).x_hat)
    assert found["downstream"]["delta_ce"] == pytest.approx(expected["delta_ce"], rel=1e-3)
    assert found["downstream"]["ce_zero"] == pytest.approx(expected["ce_zero"])


def test_a_crosscoder_is_measured_at_each_site(harvest: ActivationStore, tmp_path: Path) -> None:
    sae = crosscoder(harvest)
    found = evaluated(sae.fold(), tmp_path / "sae", "--tokens", "200")
    x = torch.cat([held_out(harvest, site) for site in (EARLY, LATE)], dim=1)
    x_hat = sae(x).x_hat
    parts = {EARLY: slice(0, 32), LATE: slice(32, 64)}
    for site, part in parts.items():
        by_site = found["reconstruction"]["fvu_by_site"][site]
        assert by_site == pytest.approx(fvu_of(x[:, part], x_hat[:, part]), rel=1e-4)
    assert found["reconstruction"]["fvu"] == pytest.approx(fvu_of(x, x_hat), rel=1e-4)
    assert found["protocol"]["sites"] == [EARLY, LATE]
    both = downstream(harvest, [EARLY, LATE], [EARLY, LATE], lambda x: sae(x).x_hat)
    assert found["downstream"]["kl"] == pytest.approx(both["kl"], rel=1e-3)
    one = evaluated(sae.fold(), tmp_path / "one", "--tokens", "200", "--site", EARLY)
    alone = downstream(harvest, [EARLY, LATE], [EARLY], lambda x: sae(x).x_hat[:, :32])
    assert one["downstream"]["kl"] == pytest.approx(alone["kl"], rel=1e-3)
    assert one["protocol"]["replaced"] == EARLY
    assert one["protocol_hash"] != found["protocol_hash"]


def test_several_layers_each_and_one(
    harvest: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = of_layers(harvest)
    every = evaluated(sae, tmp_path / "sae")
    by_layer = {
        site: fvu_of(x, sae.at(site)(x).x_hat)
        for site in (EARLY, LATE)
        for x in [held_out(harvest, site)]
    }
    found = every["reconstruction"]
    assert found["fvu_by_site"] == pytest.approx(by_layer, rel=1e-4)
    assert found["fvu"] == pytest.approx(sum(by_layer.values()) / 2, rel=1e-4)
    assert every["downstream"] is None
    assert f"at {LATE}" in capsys.readouterr().out
    one = evaluated(sae, tmp_path / "one", "--site", LATE, "--tokens", "200")
    assert one["reconstruction"]["fvu"] == pytest.approx(by_layer[LATE], rel=1e-4)
    expected = downstream(harvest, LATE, [LATE], lambda x: sae.at(LATE)(x).x_hat)
    assert one["downstream"]["kl"] == pytest.approx(expected["kl"], rel=1e-3)


def test_several_layers_saved_and_at_one(harvest: ActivationStore, tmp_path: Path) -> None:
    sae = of_layers(harvest)
    sae.save(tmp_path / "sae")
    again = load(tmp_path / "sae")
    assert list(again.site_normalisers) == [EARLY, LATE]
    for site in (EARLY, LATE):
        x = held_out(harvest, site)
        assert torch.equal(again.at(site).encode(x), sae.at(site).encode(x))
        assert torch.equal(again.at(site)(x).x_hat, sae.at(site)(x).x_hat)
        # folded: what the unfolded SAE gives with this site's normaliser
        by_hand = sae.clone()
        by_hand.normaliser, by_hand.site_normalisers = sae.site_normalisers[site], {}
        close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(again.at(site)(x).x_hat, by_hand(x).x_hat, **close)
        assert again.at(site).metadata["site"] == site
    with pytest.raises(InputError, match="not a site of this SAE"):
        again.at(OUT)


def test_wrong_sites_are_one_clear_line(
    harvest: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in {"c": crosscoder(harvest), "t": transcoder(harvest)}.items():
        made.save(tmp_path / name)
    of_layers(harvest).save(tmp_path / "l")
    out = str(tmp_path / "store")
    for words, message in [
        (["eval", "c", "--site", OUT], "not a site of this SAE"),
        (["eval", "t", "--site", LATE], "reads sites of its own"),
        (["eval", "l", "--site", OUT], "not a site of this SAE"),
        (["index", "l", "--out", out], "of several layers: choose one"),
        (["steer", "c", "--add", "3=1"], "so none of them can be changed"),
        (["steer", "l", "--add", "3=1"], "of several layers: choose one"),
    ]:
        command, folder, *rest = words
        assert main([command, str(tmp_path / folder), *rest]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.parametrize("which", ["transcoder", "crosscoder", "layers"])
def test_index(harvest: ActivationStore, tmp_path: Path, which: str) -> None:
    """Features of what is read; logit effects of what is written last."""
    made = {"transcoder": transcoder, "crosscoder": crosscoder, "layers": of_layers}[which](harvest)
    made.save(tmp_path / "sae")
    words = ["--site", LATE] if which == "layers" else []
    out = tmp_path / "store"
    assert main(["index", str(tmp_path / "sae"), "--out", str(out), *words]) == 0
    used = made.at(LATE) if which == "layers" else made.fold()
    read = {"transcoder": [EARLY], "crosscoder": [EARLY, LATE], "layers": [LATE]}[which]
    dense = torch.cat([
        used.encode(torch.cat(parts, dim=1)).detach()
        for chunk in [*harvest.chunks("train"), *harvest.chunks("held_out")]
        for parts in [[harvest.read_chunk(site, chunk.index)[0].float() for site in read]]
    ])  # fmt: skip
    model = load_model(harvest.manifest["model"]["spec"], dtype="float32")
    with FeatureStore.open(out / STORE_FILE) as features:
        assert features.meta["sites" if which == "crosscoder" else "site"] in (read, read[0])
        assert features.meta.get("target_site") == (OUT if which == "transcoder" else None)
        number = int((dense > 0).sum(0).argmax())
        row = features.feature(number)
        assert row.n_active == int((dense[:, number] > 0).sum())
        assert row.more["decoder_norm"] == pytest.approx(float(used.W_dec[number].detach().norm()))
        has_cosine = "encoder_decoder_cosine" in row.more
        assert has_cosine == (which != "transcoder")
        effect = direct_logits(used.W_dec[number, -32:].detach(), *model.unembedding())
        strongest = features.logits(number).top[0]
        assert strongest.value == pytest.approx(float(effect.max()), rel=1e-4)
