"""What features of a transformer block do to pictures of the digits' diffusion models.

Pictures are [batch, 3, 16, 16] in [0, 1], as they are seen; a change is the mean absolute
difference of their pixels.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from activations import load_model
from activations.models.config import DenoisingConfig
from activations.models.diffusion import DiffusionModel, Prompt
from activations.models.digit_diffusion import (
    BLOCKS,
    COLOURS,
    DIGITS,
    GRID,
    PIXELS,
    prompt,
    scans,
)
from sae.core.base import SparseAutoencoder
from sae.steering.steer import splice, steer

_BATCH = 64


class Drawer:
    """A model that draws digits in so many steps, seen and edited at one block."""

    def __init__(self, folder: Path, block: str, steps: int, at: Sequence[int] = (0,)) -> None:
        denoising = DenoisingConfig(steps=steps, at=tuple(at))
        model = load_model(str(folder), kind="diffusion", dtype="float32", diffusion=denoising)
        assert isinstance(model, DiffusionModel)
        self.model, self.at = model, tuple(at)
        self.site = f"module:{BLOCKS[block]}:update"

    def updates(self, prompts: Sequence[Prompt]) -> dict[int, Float[Tensor, "batch pos d_in"]]:
        """What the block adds, by step."""
        found: dict[int, list[Tensor]] = {step: [] for step in self.at}
        for part in parts(prompts):
            asked = [(text, seed, step) for step in self.at for text, seed, _ in part]
            x = self.model.capture(asked, [self.site])[self.site].float()
            for step, each in zip(self.at, x.split(len(part)), strict=True):
                found[step].append(each)
        return {step: torch.cat(each) for step, each in found.items()}

    def draw(self, prompts: Sequence[Prompt]) -> Float[Tensor, "batch 3 side side"]:
        """Pictures of prompts, some at a time."""
        return torch.cat([self.model.pictures(part) for part in parts(prompts)])

    def added(
        self, prompts: Sequence[Prompt], delta: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Pictures where something is added to the block's update, at every step."""
        found = []
        for part, change in zip(parts(prompts), delta.split(_BATCH), strict=True):
            with self.model.edit_with_positions({self.site: lambda h, _, c=change: h + c.to(h)}):
                found.append(self.model.pictures(part))
        return torch.cat(found)

    @contextmanager
    def replaced(self, by: Float[Tensor, " d_in"]) -> Iterator[None]:
        """Within the block, its update is this vector everywhere."""
        edit = lambda h, _: by.to(h).expand_as(h)  # noqa: E731
        with self.model.edit_with_positions({self.site: edit}):
            yield


def parts(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """Prompts in batches."""
    for start in range(0, len(prompts), _BATCH):
        yield prompts[start : start + _BATCH]


def random_prompts(count: int, chance: torch.Generator) -> list[Prompt]:
    """Prompts of random digits and colours, with noise that no harvest has seen."""
    digit = torch.randint(len(DIGITS), (count,), generator=chance).tolist()
    colour = torch.randint(len(COLOURS), (count,), generator=chance).tolist()
    noise = torch.randint(1 << 32, (count,), generator=chance).tolist()
    names = list(COLOURS)
    each = zip(digit, colour, noise, strict=True)
    return [(prompt(d, names[c], 0), seed, 0) for d, c, seed in each]


def fvu(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """The share of the rows' variance that is not reconstructed."""
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


class Principal:
    """Reconstruction by so many principal components of some rows."""

    def __init__(self, x: Float[Tensor, "row d"], count: int) -> None:
        self.mean = x.mean(0)
        self._axes = torch.linalg.eigh((x - self.mean).T @ (x - self.mean))[1][:, -count:]

    def __call__(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        return self.mean + (x - self.mean) @ self._axes @ self._axes.T


@torch.no_grad()
def spliced(drawer: Drawer, sae: SparseAutoencoder, mean: Tensor, prompts: Any) -> dict[str, float]:
    """How much pictures change with the reconstruction for the update, with its mean, with none."""
    plain, found = drawer.draw(prompts), {}
    for name in ("spliced", "mean", "none"):
        with ExitStack() as stack:
            if name == "spliced":
                stack.enter_context(splice(drawer.model, sae, allow_other_model=True))
            else:
                stack.enter_context(drawer.replaced(mean if name == "mean" else 0 * mean))
            found[name] = float((drawer.draw(prompts) - plain).abs().mean())
    return found


def with_random_directions(sae: SparseAutoencoder, chance: torch.Generator) -> SparseAutoencoder:
    """The same SAE whose decoder has random directions, each as long as before."""
    other = sae.clone()
    with torch.no_grad():
        rows = torch.randn(sae.W_dec.shape, generator=chance).to(sae.W_dec)
        lengths = sae.W_dec.norm(dim=1, keepdim=True)
        other.W_dec.copy_(functional.normalize(rows, dim=1) * lengths)
    return other


@torch.no_grad()
def in_regions(
    drawer: Drawer,
    saes: Sequence[SparseAutoencoder],
    strongest: dict[int, float],
    strengths: Sequence[float],
    pictures: int,
    chance: torch.Generator,
) -> Float[Tensor, "sae strength feature side"]:
    """The change inside and outside 3 x 3 cells in which a feature's direction is added.

    Args: saes, of which the feature's direction is taken; strongest, features with the largest
    activation of each, of which strengths are multiples; pictures, how many for each feature.
    """
    features = list(strongest)
    found = torch.zeros(len(saes), len(strengths), len(features), 2)
    for column, feature in enumerate(features):
        prompts = random_prompts(pictures, chance)
        region = torch.zeros(pictures, GRID, GRID, dtype=torch.bool)
        for each in region:
            row, left = torch.randint(GRID - 2, (2,), generator=chance).tolist()
            each[row : row + 3, left : left + 3] = True
        plain = drawer.draw(prompts)
        for number, sae in enumerate(saes):
            many = [(*prompts,)] * len(strengths)
            amounts = [s * strongest[feature] for s in strengths for _ in prompts]
            regions = region.repeat(len(strengths), 1, 1)
            with steer(drawer.model, sae, add={feature: amounts}, region=regions):
                edited = drawer.model.pictures([each for row in many for each in row])
            change = (edited.unflatten(0, (len(strengths), pictures)) - plain).abs().mean(2)
            inside = _pixels(region)
            found[number, :, column, 0] = _mean(change, inside)
            found[number, :, column, 1] = _mean(change, ~inside)
    return found


def _pixels(cells: Bool[Tensor, "batch high wide"]) -> Bool[Tensor, "batch side side"]:
    times = PIXELS // GRID
    return cells.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _mean(change: Tensor, where: Tensor) -> Tensor:
    """Over the pixels that are chosen, of the last three axes."""
    return (change * where).sum((-3, -2, -1)) / where.sum()


@torch.no_grad()
def ablated(
    drawer: Drawer,
    sae: SparseAutoencoder,
    other: SparseAutoencoder,
    features: Sequence[int],
    prompts: Sequence[Prompt],
    codes: Float[Tensor, "batch pos d_sae"],
    pictures: int,
) -> Float[Tensor, "what feature side"]:
    """The change where a feature fires, and elsewhere, if it is taken out; and if as much of
    `other`'s direction is taken out in its place. Of the pictures in which it is strongest; NaN
    elsewhere for one that fires in all of their cells."""
    found = torch.zeros(2, len(features), 2)
    for column, feature in enumerate(features):
        order = codes[:, :, feature].amax(1).argsort(descending=True)[:pictures]
        chosen = [prompts[n] for n in order.tolist()]
        own = codes[order][:, :, feature]
        active = _pixels((own > 0).unflatten(1, (GRID, GRID)))
        plain = drawer.draw(chosen)
        with steer(drawer.model, sae, ablate=[feature]):
            without = drawer.draw(chosen)
        instead = drawer.added(chosen, -own[:, :, None] * other.W_dec[feature])
        for number, edited in enumerate((without, instead)):
            change = (edited - plain).abs().mean(1)
            found[number, column, 0] = _mean(change, active)
            found[number, column, 1] = _mean(change, ~active)
    return found


@torch.no_grad()
def agreement(
    codes: Float[Tensor, "picture d_sae"], labels: Int[Tensor, "picture kind"], most: int
) -> Float[Tensor, "feature kind"]:
    """How often two of a feature's strongest pictures agree in a label; of features that fire in
    as many pictures."""
    fires = (codes > 0).sum(0) >= most
    order = codes[:, fires].topk(most, dim=0).indices.T
    given = labels[order]
    same = (given[:, :, None] == given[:, None]).double().sum((1, 2)) - most
    return same / (most * (most - 1))


class Judge:
    """Says which digit a picture shows, and in which colour."""

    def __init__(self) -> None:
        shades, which = scans()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            self._net = nn.Sequential(nn.Linear(PIXELS**2, 128), nn.ReLU(), nn.Linear(128, 10))
            optimiser = torch.optim.Adam(self._net.parameters(), lr=2e-3)
            order = torch.randperm(len(shades))
            known, new = order[:-1000], order[-1000:]
            for _ in range(12):
                for part in known[torch.randperm(len(known))].split(100):
                    shift = torch.randint(-1, 2, (2,)).tolist()
                    x = shades[part].roll(shift, (1, 2)).flatten(1)
                    loss = functional.cross_entropy(self._net(x), which[part])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        self._palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        with torch.no_grad():
            told = self._net(shades[new].flatten(1)).argmax(1)
        self.accuracy = float((told == which[new]).double().mean())
        """on digits of real people that it was not trained on"""

    @torch.no_grad()
    def digit(self, pictures: Float[Tensor, "batch 3 side side"]) -> Int[Tensor, " batch"]:
        """The number of the digit."""
        return self._net(pictures.amax(1).flatten(1)).argmax(1)

    def colour(self, pictures: Float[Tensor, "batch 3 side side"]) -> Int[Tensor, " batch"]:
        """The number of the nearest colour to that of the ink, whatever its brightness."""
        ink = pictures.square().sum((2, 3)) / pictures.sum((2, 3)).clamp_min(1e-6)
        hue = functional.normalize(ink, dim=1)
        return (hue @ functional.normalize(self._palette, dim=1).T).argmax(1)


def labels(prompts: Sequence[Prompt]) -> Int[Tensor, "batch 2"]:
    """The digit and the colour that prompts ask for, by number."""
    names = list(COLOURS)
    words = [text.split() for text, _, _ in prompts]
    return torch.tensor([[DIGITS.index(each[1]), names.index(each[0])] for each in words])


@torch.no_grad()
def turned(
    drawer: Drawer,
    sae: SparseAutoencoder,
    judge: Judge,
    kind: int,
    pairs: int,
    strengths: Sequence[float],
    most: int,
    chance: torch.Generator,
) -> dict[str, list[float]]:
    """How far a few features turn a picture into that of another prompt, from the same noise.

    The prompts differ in the digit (kind 0) or the colour (1). At every cell the `most` features
    that differ most between the two runs are set from one run's to the other's; the null is the
    same change, turned by a random rotation of the block's space. By strength: the change's part
    along the difference of the two pictures, and the share that is now seen as the other.
    """
    sources = random_prompts(pairs, chance)
    count = (len(DIGITS), len(COLOURS))[kind]
    steps = torch.randint(1, count, (pairs,), generator=chance).tolist()
    targets = [next_of([each], kind, step)[0] for each, step in zip(sources, steps, strict=True)]
    wanted = labels(targets)
    delta = _difference(drawer, sae, sources, targets, most)
    width = delta.shape[-1]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=chance))[0]
    plain, goal = drawer.draw(sources), drawer.draw(targets)
    along = (goal - plain).flatten(1)
    found: dict[str, list[float]] = {}
    for name, change in (("features", delta), ("rotated", delta @ rotation)):
        for strength in strengths:
            edited = drawer.added(sources, strength * change)
            moved = ((edited - plain).flatten(1) * along).sum(1) / along.square().sum(1)
            seen = (judge.digit, judge.colour)[kind](edited) == wanted[:, kind]
            found.setdefault(f"{name}_progress", []).append(float(moved.mean()))
            found.setdefault(f"{name}_seen", []).append(float(seen.double().mean()))
    return found


def next_of(prompts: Sequence[Prompt], kind: int, step: int = 1) -> list[Prompt]:
    """Prompts of the digit (kind 0) or the colour (1) that comes so many later, with their noise.

    >>> next_of([("red nine take 0", 5, 0)], 0)
    [('red zero take 0', 5, 0)]
    """
    names, found = list(COLOURS), []
    for (_, seed, at), (digit, colour) in zip(prompts, labels(prompts).tolist(), strict=True):
        digit = (digit + step * (kind == 0)) % len(DIGITS)
        colour = (colour + step * (kind == 1)) % len(names)
        found.append((prompt(digit, names[colour], 0), seed, at))
    return found


def _difference(
    drawer: Drawer,
    sae: SparseAutoencoder,
    sources: Sequence[Prompt],
    targets: Sequence[Prompt],
    most: int,
) -> Float[Tensor, "batch pos d_in"]:
    """What the features that differ most between two runs, over all cells, add in the other one."""
    before, after = (
        sae.encode(drawer.updates(each)[0].flatten(0, 1)).unflatten(0, (len(sources), -1))
        for each in (sources, targets)
    )
    difference = after - before
    score = difference.abs().mean(1)
    chosen = torch.zeros_like(score).scatter_(1, score.topk(most, dim=1).indices, 1.0)
    return (difference * chosen[:, None]) @ sae.W_dec


def turned_once(
    drawer: Drawer,
    sae: SparseAutoencoder,
    sources: Sequence[Prompt],
    targets: Sequence[Prompt],
    most: int,
    strength: float,
) -> Float[Tensor, "batch 3 side side"]:
    """Pictures of prompts whose `most` features are moved towards those of other prompts."""
    return drawer.added(sources, strength * _difference(drawer, sae, sources, targets, most))


def halves(
    drawer: Drawer,
    sae: SparseAutoencoder,
    prompts: Sequence[Prompt],
    strength: float,
    chance: torch.Generator,
) -> list[Float[Tensor, "batch 3 side side"]]:
    """Pictures with a random feature of each added in the lower half; with a random direction."""
    x = drawer.updates(prompts)[0]
    codes = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).amax(1)
    firing = (codes > 0).any(0).nonzero()[:, 0]
    feature = firing[torch.randint(len(firing), (len(prompts),), generator=chance)]
    region = torch.zeros(GRID, GRID, 1)
    region[GRID // 2 :] = 1
    length = strength * codes.amax(0)[feature][:, None, None]
    directions = (sae.W_dec, with_random_directions(sae, chance).W_dec)
    return [
        drawer.added(prompts, region.view(1, -1, 1) * length * d[feature][:, None])
        for d in directions
    ]


def sheet(rows: Sequence[Float[Tensor, "batch 3 side side"]]) -> str:
    """Pictures in rows, as PNG in base64, each pixel five wide."""
    many = torch.stack([*rows])
    framed = functional.pad(many, [1] * 4, value=1.0)
    joined = framed.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((joined * 255).round().to(torch.uint8).numpy())
    image = image.resize((image.width * 5, image.height * 5), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
