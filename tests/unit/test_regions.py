"""Edits in a part of a picture, and at some denoising steps, of vision and diffusion models."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sae as sae_package
from activations.models.config import DenoisingConfig
from activations.models.diffusion import DiffusionModel
from activations.models.load import load_model
from activations.sites.grids import GridRun, fitted
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError
from tests.tiny_raw import make_tiny_encoder, make_tiny_pipeline, make_tiny_resnet, make_tiny_vit

STAGE, LAYER = "module:encoder.stages.1:output", "module:layers.0:output"
BLOCK = "module:down_blocks.1.attentions.0:update"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regions")
    make_tiny_vit(folder / "vit")
    make_tiny_resnet(folder / "resnet")
    return folder


def dictionary(site: str, width: int) -> SparseAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TopKSAE(TopKConfig(d_sae=32, k=4), width).eval()
    made.metadata = {"site": site}
    return made


def steered(model: Any, sae: SparseAutoencoder, **edits: Any) -> AbstractContextManager[None]:
    return sae_package.steer(model, sae, **edits)


def changed(model: Any, sae: SparseAutoencoder, inputs: Any, **edits: Any) -> Tensor:
    """Which positions [batch, pos] of its own site an edit changed in any bit."""
    site = sae.metadata["site"]
    before = model.capture(inputs, [site])[site]
    with steered(model, sae, **edits):
        after = model.capture(inputs, [site])[site]
    assert torch.equal(model.capture(inputs, [site])[site], before)
    return (after != before).any(-1)


def pictures(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_cells_of_a_convolution(root: Path) -> None:
    model = load_model(str(root / "resnet"), kind="vision", dtype="float32")
    sae, inputs = dictionary(STAGE, 12), pictures(32)
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[1, 2] = region[3, 0] = True
    for edit in ({"add": {5: 3.0}}, {"clamp": {5: 3.0}}, {"project": {5: 0.0}}):
        found = changed(model, sae, inputs, region=region, **edit)
        assert torch.equal(found, region.flatten().expand(2, -1)), edit
    assert changed(model, sae, inputs, add={5: 3.0}).all()
    pixels = region.repeat_interleave(8, 0).repeat_interleave(8, 1)
    found = changed(model, sae, inputs, region=pixels.numpy(), add={5: 3.0})
    assert torch.equal(found, region.flatten().expand(2, -1))
    each = torch.stack([region, ~region])
    assert torch.equal(changed(model, sae, inputs, region=each, add={5: 3.0}), each.flatten(1))
    both = changed(model, sae, inputs, region=region, add={5: 3.0}, positions=slice(0, 8))
    assert both[0].nonzero()[:, 0].tolist() == [6]
    strengths = changed(model, sae, inputs, region=region, add={5: [0.0, 3.0]})
    assert not strengths[0].any()
    assert torch.equal(strengths[1], region.flatten())


def test_the_edit_in_the_region_is_the_algebra(root: Path) -> None:
    model = load_model(str(root / "resnet"), kind="vision", dtype="float32")
    sae, inputs = dictionary(STAGE, 12), pictures(32)
    region = torch.eye(4, dtype=torch.bool)
    before = model.capture(inputs, [STAGE])[STAGE]
    with steered(model, sae, region=region, add={5: 3.0}):
        after = model.capture(inputs, [STAGE])[STAGE]
    expected = before + 3.0 * region.flatten()[None, :, None] * sae.W_dec[5].detach()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_patches_of_a_transformer(root: Path) -> None:
    """Its class token is in no part of the picture; without a region it is edited too."""
    model = load_model(str(root / "vit"), kind="vision", dtype="float32")
    sae, inputs = dictionary(LAYER, 32), pictures(16)
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[:4, 8:] = True
    found = changed(model, sae, inputs, region=region, add={5: 3.0})
    assert found.nonzero()[:, 1].tolist() == [3, 4] * 2
    assert changed(model, sae, inputs, add={5: 3.0}).all()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (torch.ones(4, 3, dtype=torch.bool), "cannot be made the size .* exactly.*3 along"),
        (torch.eye(8, dtype=torch.bool), "cuts through a cell"),
        (torch.ones(3, 4, 4, dtype=torch.bool), r"another number of pictures .*given: 3; .*2"),
        (torch.ones(4, 4), "is a mask of true and false"),
        (torch.ones(4, dtype=torch.bool), "is a mask of true and false"),
    ],
)
def test_regions_that_do_not_fit(root: Path, region: Tensor, message: str) -> None:
    model = load_model(str(root / "resnet"), kind="vision", dtype="float32")
    with pytest.raises(InputError, match=f"region: {message}"):
        changed(model, dictionary(STAGE, 12), pictures(32), region=region, add={5: 3.0})


def test_sizes_are_changed_exactly() -> None:
    wide = torch.tensor([[True, False, False, True]])
    assert (
        fitted(wide, (2, 2 * 4)).tolist()
        == [[True, True, False, False, False, False, True, True]] * 2
    )
    tall = torch.tensor([[True, False], [True, False], [False, False], [False, False]])
    assert fitted(tall, (2, 4)).tolist() == [[True, True, False, False], [False] * 4]
    assert torch.equal(fitted(tall.expand(3, -1, -1), (2, 2)), fitted(tall, (2, 2)).expand(3, 2, 2))


@pytest.mark.parametrize(
    ("config", "size", "shape", "cells"),
    [
        ({"patch_size": 4}, (16, 24), (2, 25, 8), ((4, 6), 1)),
        ({"patch_size": (2, 4), "num_register_tokens": 4}, (8, 8), (2, 13, 8), ((4, 2), 5)),
        ({"patch_size": 4}, (16, 32), (2, 8, 8), ((2, 4), 0)),  # patches merged since
        ({}, (8, 16), (2, 32, 8), ((4, 8), 0)),
        ({"patch_size": 4}, (16, 16), (2, 77, 8), (None, 0)),  # words, beside the picture
        ({}, (16, 16), (2, 17, 8), (None, 0)),
        ({}, (16, 16), (2, 8, 3, 5), ((3, 5), 0)),
    ],
)
def test_where_positions_stand(config: dict, size: tuple, shape: tuple, cells: tuple) -> None:
    module: Any = nn.Identity()
    module.config = type("Config", (), config)
    run = GridRun(module)
    handles = run.watch([module])
    module(torch.zeros(2, 3, *size))
    value = torch.zeros(shape)
    at = run.at(value, value.flatten(2).transpose(1, 2) if value.ndim == 4 else value)
    assert (at.grid, at.before) == cells
    if at.grid is None:
        with pytest.raises(InputError, match="where this site's positions stand"):
            at.inside(torch.ones(1, 1, dtype=torch.bool))
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    pytest.importorskip("diffusers")
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("diffusion") / "pipeline")
    denoising = DenoisingConfig(steps=4, at=(0, 2))
    found = load_model(str(folder), kind="diffusion", dtype="float32", diffusion=denoising)
    assert isinstance(found, DiffusionModel)
    return found


def test_a_part_of_the_latent_picture(diffusion: DiffusionModel) -> None:
    """At an update, where input + (output - input) would lose bits outside."""
    sae = dictionary(BLOCK, diffusion.d_in(BLOCK))
    prompts = [("a river", 1, 0), ("the mill", 2, 0)]
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[0, 1:3] = True
    wanted = region.flatten().expand(2, -1)
    for given in (region, region.repeat_interleave(16, 0).repeat_interleave(16, 1)):
        found = changed(diffusion, sae, prompts, region=given, add={5: 3.0})
        assert torch.equal(found, wanted)
    rows = "module:down_blocks.1.attentions.0.transformer_blocks.0:output"
    of_rows = dictionary(rows, diffusion.d_in(rows))  # [batch, position, width]: no map of its own
    assert torch.equal(changed(diffusion, of_rows, prompts, region=region, add={5: 3.0}), wanted)


@pytest.mark.parametrize(("steps", "at"), [([2], [2, 3]), (range(1), [0, 1, 2, 3]), ([3], [3])])
def test_some_denoising_steps(diffusion: DiffusionModel, steps: Any, at: list[int]) -> None:
    """What is seen of the first edited step on differs, and nothing before."""
    sae = dictionary(BLOCK, diffusion.d_in(BLOCK))
    prompts = [("a river", 1, step) for step in range(4)]
    found = changed(diffusion, sae, prompts, add={5: 3.0}, steps=steps)
    assert found.any(-1).nonzero()[:, 0].tolist() == at
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[2, 2] = True
    found = changed(diffusion, sae, prompts, add={5: 3.0}, steps=steps, region=region)
    assert found[steps[0]].nonzero()[:, 0].tolist() == [10]


def test_pictures_are_made_with_the_pipeline(diffusion: DiffusionModel) -> None:
    sae = dictionary(BLOCK, diffusion.d_in(BLOCK))

    def picture() -> Tensor:
        return diffusion.pipeline(
            prompt=["a river"], num_inference_steps=3, guidance_scale=4.0, output_type="latent",
            generator=torch.Generator().manual_seed(0), height=64, width=64,
        ).images  # fmt: skip

    plain = picture()
    with steered(diffusion, sae, add={5: 20.0}, steps=[7]):
        assert torch.equal(picture(), plain), "there is no such step"
    with steered(diffusion, sae, add={5: 20.0}, steps=[2]):
        first = picture()
        assert torch.equal(picture(), first), "steps are counted from the beginning of each"
    assert not torch.equal(first, plain)
    assert torch.equal(picture(), plain)


def test_what_has_no_region_or_steps(
    root: Path, tiny_model: Any, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    region = torch.ones(4, 4, dtype=torch.bool)
    tokens = torch.tensor([tiny_model.tokenize("The river")])
    for given in ({"region": region}, {"steps": [0]}):
        with (
            steered(tiny_model, sae, add={5: 3.0}, **given),
            pytest.raises(InputError, match="region, steps: only pictures have them"),
        ):
            tiny_model.logits(tokens)
    model = load_model(str(root / "resnet"), kind="vision", dtype="float32")
    of_stage, inputs = dictionary(STAGE, 12), pictures(32)
    for given, message in (
        ({"steps": [0]}, "which denoising step this is is not known"),
        ({"steps": [-1]}, "steps: out of range"),
        ({"positions": "prompt"}, "no positions of a text"),
        ({"freeze_attention": True}, "only the attention of language models is frozen"),
    ):
        with pytest.raises(InputError, match=message):
            changed(model, of_stage, inputs, add={5: 3.0}, **given)
    with pytest.raises(InputError, match=r"the edit of each pair is in its sae\.Edit"):
        changed_pairs(model, of_stage, region)
    encoder = load_model(str(make_tiny_encoder(tmp_path / "encoder")), kind="text_encoder")
    site = "module:encoder.layer.0:output"
    with pytest.raises(InputError, match="only models of language and of pictures"):
        changed(encoder, dictionary(site, 32), encoder.example(1), add={5: 3.0})


def changed_pairs(model: Any, sae: SparseAutoencoder, region: Tensor) -> None:
    with sae_package.steer(model, (sae, sae_package.Edit(add={5: 1.0})), region=region):
        pytest.fail("must not be entered")
