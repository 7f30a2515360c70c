"""The paper on SDXL Turbo's blocks: its subjects, its measures by hand, its configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations import HarvestConfig, ModelConfig, harvest, load_model
from activations.models.config import DenoisingConfig
from activations.models.diffusion import DiffusionModel
from activations.models.digit_diffusion import COLOURS, Size, both_models, prompt
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.train import train
from sae.core.base import SparseAutoencoder
from sae.papers import paper
from sae.reproduction import diffusion_edits as edits
from sae.training.config import TrainConfig
from saescope.config import from_dict, read_toml
from saescope.examples import examples
from saescope.progress import silent
from tests.tiny_raw import make_tiny_xl_pipeline

BLOCK = "up.1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models, hardly trained."""
    pytest.importorskip("diffusers")
    shades = torch.rand(40, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch, silent():
        known = (shades, torch.arange(40) % 10)
        patch.setattr("activations.models.digit_diffusion.scans", lambda: known)
        size = Size(base_steps=2, turbo_steps=2, trajectories=8)
        base, turbo = both_models(tmp_path_factory.mktemp("models"), size)
    return {"base": base, "turbo": turbo}


@pytest.fixture(scope="module")
def drawer(models: dict[str, Path]) -> edits.Drawer:
    return edits.Drawer(models["turbo"], BLOCK, 1)


@pytest.fixture(scope="module")
def dictionary(drawer: edits.Drawer) -> SparseAutoencoder:
    x = drawer.updates(edits.random_prompts(16, torch.Generator().manual_seed(1)))[0]
    with silent():
        sae = train(x.flatten(0, 1), "topk", d_sae=48, k=4, passes=4, batch_size=128)
    sae.metadata["site"] = drawer.site
    return sae


def test_both_are_pipelines_whose_latents_are_their_pixels(models: dict[str, Path]) -> None:
    for folder, steps in ((models["base"], 16), (models["turbo"], 1), (models["turbo"], 4)):
        model = load_model(
            str(folder), kind="diffusion", dtype="float32", diffusion=DenoisingConfig(steps=steps)
        )
        assert isinstance(model, DiffusionModel)
        given = [(prompt(3, "red", 1), 5, 0), (prompt(3, "red", 99), 5, 0)]
        pictures = model.pictures(given)
        latents = model.pipeline(
            prompt=[text for text, _, _ in given],
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(seed) for _, seed, _ in given],
            output_type="latent",
        ).images
        torch.testing.assert_close(pictures, (latents / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
        assert torch.equal(*pictures), "the number of a take is no word"
        assert not torch.equal(*model.pictures([given[0], (prompt(3, "blue", 1), 5, 0)]))


def test_what_is_made_is_not_made_again(models: dict[str, Path]) -> None:
    folder = models["base"].parent
    assert both_models(folder, Size(base_steps=10**9)) == (models["base"], models["turbo"])


def test_adding_by_hand_is_what_steering_adds(
    drawer: edits.Drawer, dictionary: SparseAutoencoder
) -> None:
    chance = torch.Generator().manual_seed(2)
    strengths = (1.0, 3.0)
    found = edits.in_regions(drawer, (dictionary,), {7: 2.0}, strengths, 3, chance)
    again = torch.Generator().manual_seed(2)
    prompts = edits.random_prompts(3, again)
    cells = torch.zeros(3, 8, 8, dtype=torch.bool)
    for each in cells:
        row, left = torch.randint(6, (2,), generator=again).tolist()
        each[row : row + 3, left : left + 3] = True
    plain = drawer.draw(prompts)
    pixels = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert int(pixels[0].sum()) == 36
    for number, strength in enumerate(strengths):
        delta = 2.0 * strength * cells.flatten(1)[..., None] * dictionary.W_dec.detach()[7]
        change = (drawer.added(prompts, delta) - plain).abs().mean(1)
        assert float(found[0, number, 0, 0]) == pytest.approx(
            float(change[pixels].mean()), rel=1e-3
        )
        assert float(found[0, number, 0, 1]) == pytest.approx(
            float(change[~pixels].mean()), rel=1e-3, abs=1e-7
        )
    assert float(found[0, 0, 0, 0]) > 0


def test_a_random_direction_is_as_long(dictionary: SparseAutoencoder) -> None:
    other = edits.with_random_directions(dictionary, torch.Generator().manual_seed(9))
    torch.testing.assert_close(other.W_dec.norm(dim=1), dictionary.W_dec.norm(dim=1))
    cosine = torch.cosine_similarity(other.W_dec.detach(), dictionary.W_dec.detach())
    assert float(cosine.abs().mean()) < 0.4


def test_taking_out_is_where_it_fires(drawer: edits.Drawer, dictionary: SparseAutoencoder) -> None:
    prompts = edits.random_prompts(6, torch.Generator().manual_seed(3))
    x = drawer.updates(prompts)[0]
    codes = dictionary.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    feature = int((codes > 0).sum((0, 1)).clamp_max(200).argmax())
    out = edits.ablated(drawer, dictionary, dictionary, [feature], prompts, codes, 3)
    # as much of its own direction instead is the same edit
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-6)
    assert float(out[0, 0, 0]) > 0


def test_all_features_of_an_exact_sae_carry_all_of_the_difference(drawer: edits.Drawer) -> None:
    width = drawer.updates(edits.random_prompts(1, torch.Generator()))[0].shape[-1]
    exact = TopKSAE(TopKConfig(d_sae=2 * width, k=width), width)
    both_ways = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        exact.W_dec.copy_(both_ways)
        exact.W_enc.copy_(both_ways.T)
        exact.b_dec.zero_()
    seen: list[Tensor] = []
    judge = _Judge(seen)
    chance = torch.Generator().manual_seed(0)
    found = edits.turned(drawer, exact, judge, 1, 4, (0.0, 1.0), 2 * width, chance)
    assert found["features_progress"][0] == found["rotated_progress"][0] == 0
    sources = edits.random_prompts(4, torch.Generator().manual_seed(0))
    steps = torch.randint(1, 6, (4,), generator=_after_prompts()).tolist()
    targets = [edits.next_of([each], 1, by)[0] for each, by in zip(sources, steps, strict=True)]
    assert [a[1] == b[1] and a[0] != b[0] for a, b in zip(sources, targets, strict=True)] == [
        True
    ] * 4
    delta = drawer.updates(targets)[0] - drawer.updates(sources)[0]
    edited, plain, goal = (drawer.added(sources, delta), drawer.draw(sources), drawer.draw(targets))
    torch.testing.assert_close(seen[1], edited, atol=1e-4, rtol=1e-3)
    along = (goal - plain).flatten(1)
    way = ((edited - plain).flatten(1) * along).sum(1) / along.square().sum(1)
    assert found["features_progress"][1] == pytest.approx(float(way.mean()), rel=1e-2, abs=1e-3)


def _after_prompts() -> torch.Generator:
    chance = torch.Generator().manual_seed(0)
    edits.random_prompts(4, chance)
    return chance


class _Judge(edits.Judge):
    """One that keeps what it is shown."""

    def __init__(self, seen: list[Tensor]) -> None:
        self._seen = seen

    def colour(self, pictures: Tensor) -> Tensor:
        self._seen.append(pictures)
        return torch.zeros(len(pictures), dtype=torch.long)


def test_the_ink_is_seen_whatever_its_brightness() -> None:
    judge = _Judge([])
    judge._palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    shade = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) ** 3
    pictures = shade * judge._palette[:, :, None, None] * 0.4
    assert edits.Judge.colour(judge, pictures).tolist() == list(range(6))


def test_agreement_by_hand() -> None:
    labels = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    codes = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    found = edits.agreement(codes, labels, 2)
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]], "the third fires too seldom"


def test_components_and_fvu() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [9.0, 4.0, 0.1, 0.1, 0.1]
    )
    two = edits.Principal(x, 2)
    assert edits.fvu(x, two(x)) < 0.01
    assert edits.fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1)
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)))
    assert edits.fvu(x, edits.Principal(x, 1)(x)) == pytest.approx(
        float(values[:-1].sum() / values.sum()), rel=1e-3
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_the_paper_ran_is_loaded_on_a_small_copy_of_its_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    assert paper("sdxl-unbox").configs == ("sdxl-unbox-harvest.toml", "sdxl-unbox.toml")
    files = [examples()[f"configs/papers/{each}"] for each in paper("sdxl-unbox").configs]
    config = from_dict(HarvestConfig, read_toml(files[0]), where="sdxl-unbox")
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(f'{{"caption": "a river {n}"}}' for n in range(4))
    )
    small = replace(config.model.diffusion, pixels=64)
    store = harvest(
        replace(
            config,
            model=ModelConfig(
                spec=str(make_tiny_xl_pipeline(tmp_path / "model")),
                kind="diffusion",
                dtype="float32",
                diffusion=small,
            ),
            corpus=replace(config.corpus, source=str(tmp_path / "prompts.jsonl")),
            out=str(tmp_path / "harvest"),
            batch_sequences=2,
            held_out_fraction=0.3,
            chunk_rows=256,
        )
    )
    assert tuple(store.sites) == config.sites
    assert store.n_rows("train") + store.n_rows("held_out") == 4 * 256
    values: dict[str, Any] = {**read_toml(files[1]), "harvest": str(tmp_path / "harvest")}
    assert values["site"] in config.sites
    assert read_toml(files[1])["harvest"] == config.out
    values |= {"device": "cpu", "out": str(tmp_path / "run"), "plan": True}
    values["trainer"]["batch_size"] = 64
    capsys.readouterr()
    assert train(from_dict(TrainConfig.specialise(values), values, where="sdxl-unbox")) is None
    assert "5120" in capsys.readouterr().out.replace(",", "")
