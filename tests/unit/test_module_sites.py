"""Modules of any PyTorch model as sites: every shape, every side, and what cannot be one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activations.sites.hooks import HookTarget, run_until_captured, shapes_of, splicing
from activations.sites.modules import ModuleSites
from saescope.errors import InputError


class Toy(nn.Module):
    """A convolution, a non-linearity in place, a block by keyword, and a vector at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.scaled = Double()
        self.pair = Pair()
        self.twice = nn.Identity()
        self.unused = nn.Identity()
        self.end = nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.relu(self.convolution(pixels))
        x = self.scaled(scale=2, sample=x)
        x = self.pair(x.flatten(2).transpose(1, 2))[0]
        x = self.twice(self.twice(x))
        return self.end(x.mean(1))


class Double(nn.Module):
    def forward(self, *, scale: int, sample: Tensor) -> dict[str, Tensor]:
        return Output(sample=sample * scale)


class Output(dict):
    """As models of transformers and diffusers return theirs."""

    def flatten(self, *args: Any) -> Tensor:
        return self["sample"].flatten(*args)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "something else"


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().requires_grad_(requires_grad=False)


def captured(toy: Toy, *sites: str) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    found = ModuleSites(toy, "toy")
    targets = [found.target(f"module:{site}") for site in sites]
    seen = run_until_captured(targets, lambda: toy(pixels.clone()))
    return {site.removeprefix("module:"): x for site, x in seen.items()}


def test_every_shape_and_side(toy: Toy) -> None:
    pixels = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    maps = torch.einsum("bchw,dc->bhwd", pixels, toy.convolution.weight[:, :, 0, 0])
    assert toy.convolution.bias is not None
    maps = (maps + toy.convolution.bias).flatten(1, 2)  # [batch, height * width, channel]
    after = maps.clamp(min=0)
    expected = {
        "convolution:input": pixels.flatten(2).transpose(1, 2),
        "convolution:output": maps,  # what the non-linearity changes in place later on
        "relu:input": maps,
        "relu:output": after,
        "relu:update": after - maps,
        "scaled:input": after,
        "scaled:output": 2 * after,
        "scaled:update": after,
        "pair:output": 2 * after + 1,
        "pair:update": torch.ones_like(after),
        "end:input": (2 * after + 1).mean(1, keepdim=True),
    }
    found = captured(toy, *expected)
    for site, x in expected.items():
        torch.testing.assert_close(found[site], x, rtol=1e-5, atol=1e-5, msg=site)
    assert found["convolution:output"].shape == (2, 15, 4)
    assert captured(toy, "end:output")["end:output"].shape == (2, 1, 5)


def test_an_edit_of_an_update_changes_what_the_module_adds(toy: Toy) -> None:
    sites = ModuleSites(toy, "toy")
    pixels = torch.randn(2, 3, 3, 5)
    before = toy(pixels)
    for site in ("pair:update", "scaled:output", "convolution:output", "scaled:input"):
        with splicing(toy, [(sites.target(f"module:{site}"), lambda x, _: None)]):
            assert torch.equal(toy(pixels), before)
        with splicing(toy, [(sites.target(f"module:{site}"), lambda x, _: 3 * x + 1)]):
            assert not torch.allclose(toy(pixels), before)
    with splicing(toy, [(sites.target("module:pair:update"), lambda x, _: 0 * x)]):
        plain = toy(pixels)
    expected = before - toy.end.weight.sum(1)  # without the one that is added
    torch.testing.assert_close(plain, expected)


def test_what_cannot_be_a_site(toy: Toy) -> None:
    with pytest.raises(InputError, match=r"differ in shape.*\(2, 3, 3, 5\) and \(2, 4, 3, 5\)"):
        captured(toy, "convolution:update")
    with pytest.raises(InputError, match="never reaches the site"):
        captured(toy, "unused:output")
    sites = ModuleSites(toy, "toy")
    for name in ("nowhere:output", "pair:side", "pair"):
        with pytest.raises(InputError, match=r"no such site.*module:"):
            sites.resolve([f"module:{name}"])
    targets = [sites.target("module:twice:output")]
    with pytest.raises(InputError, match="calls this module 2 times"):
        shapes_of(targets, lambda: toy(torch.randn(2, 3, 3, 5)))


def test_shapes_of_a_whole_pass(toy: Toy) -> None:
    sites = ModuleSites(toy, "toy")
    names = sites.resolve(["module:re*:output", "module:end:output", "module:pair:update"])
    assert names == ["module:relu:output", "module:end:output", "module:pair:update"]
    targets = [sites.target(name) for name in names]
    shapes = shapes_of(targets, lambda: toy(torch.randn(2, 3, 3, 5)))
    assert shapes == {names[0]: (2, 15, 4), names[1]: (2, 1, 5), names[2]: (2, 15, 4)}


class Mixing(nn.Module):
    """A block whose update is not its input plus something exact."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) / 3


@pytest.mark.parametrize(("side", "scale"), [("update", 1.0), ("output", 0.22), ("output", 1.0)])
def test_positions_that_an_edit_leaves_alone_keep_every_bit(side: str, scale: float) -> None:
    """Through a difference and back, or a product and a quotient, some bits would be lost."""
    torch.manual_seed(0)
    module, x = Mixing().requires_grad_(requires_grad=False), torch.randn(8, 40, 4)
    target = HookTarget(site="here", module=module, side=side, scale=scale)
    plain = module(x)

    def edit(value: Tensor, _position: Tensor) -> Tensor:
        new = value.clone()
        new[:, 5] += 1.0
        return new

    with splicing(module, [(target, edit)]):
        found = module(x)
    others = [at for at in range(40) if at != 5]
    assert torch.equal(found[:, others], plain[:, others])
    torch.testing.assert_close(found[:, 5], plain[:, 5] + 1.0 / scale)
