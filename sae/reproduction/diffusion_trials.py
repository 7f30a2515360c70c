"""A trial of the digits' diffusion models: harvest, train an SAE of a block, edit with it.

All by the commands that a user has. What trials share is made once, in their folder: the models,
the prompts, and the harvest of turbo's one step, from which all SAEs are trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from activations import ActivationStore, HarvestConfig, harvest
from activations.corpora.documents import CorpusConfig
from activations.models.config import ModelConfig
from activations.models.digit_diffusion import (
    BLOCKS,
    COLOURS,
    DIGITS,
    GRID,
    STEPS,
    Size,
    both_models,
    prompt,
)
from sae.core.base import SparseAutoencoder
from sae.formats.load import load
from sae.reproduction import diffusion_edits as edits
from sae.reproduction.diffusion_edits import Drawer, Judge, Principal
from sae.reproduction.training import measured, trained
from saescope.artefact import atomic_path
from saescope.progress import silent
from saescope.replacing import PLAIN_FILE

WIDER, K = 4, 4
"""features for each dimension of a block, and how many are active"""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""of what is added, in largest activations of the feature"""
TURNED = (1.0, 2.0, 4.0)
"""of what turns a picture, in differences of two runs"""
TOP = 10
"""features that turn a picture"""
KINDS = ("digit", "colour")
RUNS = {"turbo in 1 step": ("turbo", 1, (0,)), "turbo in 4 steps": ("turbo", 4, (1, 2, 3))} | {
    f"base in {STEPS} steps": ("base", STEPS, tuple(range(0, STEPS, STEPS // 4)))
}
"""model, its steps, and those that are looked at"""
_BY_ROW = (RUNS[f"base in {STEPS} steps"], RUNS["turbo in 1 step"], RUNS["turbo in 4 steps"])
_WHOLE, _QUICK = Size(), Size(base_steps=120, turbo_steps=60, trajectories=192)


def measure_models(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Train the models; how often each draws what it was asked for, in the eyes of a judge."""
    models, count = _models(folder, quick), 64 if quick else 256
    judge, chance = Judge(), torch.Generator().manual_seed(1000)
    prompts, found = edits.random_prompts(count, chance), {}
    asked = edits.labels(prompts)
    for name, (model, steps, _) in RUNS.items():
        drawn = Drawer(models[model], "mid", steps).draw(prompts)
        told = {"digit": judge.digit(drawn), "colour": judge.colour(drawn)}
        found[name] = {
            kind: float((told[kind] == asked[:, n]).double().mean()) for n, kind in enumerate(KINDS)
        }
    return {"as_asked": found, "judge": judge.accuracy}


def measure_block(folder: Path, block: str, seed: int, *, quick: bool) -> dict[str, Any]:
    """Train an SAE of a block; what it reconstructs, and what its features do to pictures."""
    models = _models(folder, quick)
    data = _harvested(folder, models["turbo"], 512 if quick else 4000)
    run = _trained(folder, data, block, seed, passes=8.0 if quick else 6.0)
    sae, found = load(run), measured(run, tokens=0)["reconstruction"]
    chance = torch.Generator().manual_seed(1000 + seed)
    with silent():
        return {
            "l0": found["l0"],
            "held_out_fvu": found["fvu"],
            **_carried_over(models, block, sae, 24 if quick else 96, chance),
            **_features(models["turbo"], block, sae, quick, chance),
            "turned": _turned(models["turbo"], block, sae, quick, chance),
        }


def measure_pictures(folder: Path, *, quick: bool) -> dict[str, Any]:
    """A sheet of pictures, a prompt a column: what each draws, and what an SAE's features change.

    From above: base, turbo in one step and in four; in one step, a feature added in the lower half
    at twice its largest activation, a random direction instead; ten features turned towards the
    prompt of the next colour, and that prompt's own picture.
    """
    models, block = _models(folder, quick), "up.1"
    data = _harvested(folder, models["turbo"], 512 if quick else 4000)
    sae = load(_trained(folder, data, block, 0, passes=8.0 if quick else 6.0))
    names = list(COLOURS)
    columns = [(digit, names[digit % len(names)], digit) for digit in range(len(DIGITS))]
    prompts = [(prompt(digit, colour, 0), seed, 0) for digit, colour, seed in columns]
    rows = [Drawer(models[m], block, steps).draw(prompts) for m, steps, _ in _BY_ROW]
    drawer, chance = Drawer(models["turbo"], block, 1), torch.Generator().manual_seed(0)
    with torch.no_grad(), silent():
        rows += edits.halves(drawer, sae, prompts, 2.0, chance)
        goals = edits.next_of(prompts, 1)
        rows += [edits.turned_once(drawer, sae, prompts, goals, TOP, 2.0), drawer.draw(goals)]
    return {"png": edits.sheet(rows)}


def _models(folder: Path, quick: bool) -> Mapping[str, Path]:
    base, turbo = both_models(folder, _QUICK if quick else _WHOLE)
    return {"base": base, "turbo": turbo}


def _harvested(folder: Path, turbo: Path, prompts: int) -> Path:
    """A harvest of every block's updates in turbo's one step."""
    lines = [
        json.dumps({"text": prompt(n % len(DIGITS), list(COLOURS)[n // 10 % len(COLOURS)], n)})
        for n in range(prompts)
    ]
    corpus = folder / "prompts.jsonl"
    if not corpus.exists():
        with atomic_path(corpus, PLAIN_FILE, replace=True) as temporary:
            temporary.write_text("\n".join(lines))
    config = HarvestConfig(
        model=ModelConfig(spec=str(turbo), kind="diffusion", dtype="float32"),
        corpus=CorpusConfig(source=str(corpus)),
        sites=tuple(f"module:{module}:update" for module in BLOCKS.values()),
        out=str(folder / "harvest"),
        context=GRID**2,
        batch_sequences=64,
        chunk_rows=4096,
        held_out_fraction=0.1,
    )
    with silent():
        harvest(config)
    return folder / "harvest"


def _trained(folder: Path, data: Path, block: str, seed: int, *, passes: float) -> Path:
    site = f"module:{BLOCKS[block]}:update"
    d_in = ActivationStore.open(str(data)).d_in(site)
    values = {
        "harvest": str(data),
        "site": site,
        "seed": seed,
        "passes": passes,
        "normaliser": "unit_mean_square",
        "sae": {"kind": "topk", "d_sae": WIDER * d_in, "k": K},
        "trainer": {"batch_size": 1024, "lr_multiplier": 4.0},
    }
    return trained(folder / "runs" / f"{block}-{seed}", values)


@torch.no_grad()
def _carried_over(
    models: Mapping[str, Path],
    block: str,
    sae: SparseAutoencoder,
    pictures: int,
    chance: torch.Generator,
) -> dict[str, Any]:
    """FVU, and how pictures change with the reconstruction, in each of the three ways to draw."""
    prompts = edits.random_prompts(2 * pictures, chance)
    known, new = prompts[:pictures], prompts[pictures:]
    found: dict[str, Any] = {"fvu": {}, "principal": {}, "changed": {}}
    principal: Principal | None = None
    for name, (model, steps, at) in RUNS.items():
        drawer = Drawer(models[model], block, steps, at)
        if principal is None:
            x = drawer.updates(known)[at[0]].flatten(0, 1)
            principal = Principal(x, K)
        by_step = [each.flatten(0, 1) for each in drawer.updates(new).values()]
        for key, of in (("fvu", lambda x: sae(x).x_hat), ("principal", principal)):
            found[key][name] = sum(edits.fvu(x, of(x)) for x in by_step) / len(by_step)
        mean = torch.cat(by_step).mean(0)
        found["changed"][name] = edits.spliced(drawer, sae, mean, new[: len(new) // 2])
    return found


@torch.no_grad()
def _features(
    turbo: Path, block: str, sae: SparseAutoencoder, quick: bool, chance: torch.Generator
) -> dict[str, Any]:
    """What features' pictures share, and what adding some, and taking them out, does."""
    drawer = Drawer(turbo, block, 1)
    prompts = edits.random_prompts(128 if quick else 512, chance)
    x = drawer.updates(prompts)[0]
    codes = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    untrained = _untrained(sae).encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    labels, most = edits.labels(prompts), 8 if quick else 16
    alike, alike_untrained, alike_random = (
        edits.agreement(each.amax(1), labels, most).mean(0).tolist()
        for each in (codes, untrained, torch.rand(*codes.shape, generator=chance))
    )
    firing = (codes > 0).double().mean((0, 1))
    eligible = ((firing > 1e-3) & ((codes.amax(1) > 0).sum(0) >= most)).nonzero()[:, 0]
    count = min(6 if quick else 24, len(eligible))
    chosen = eligible[torch.randperm(len(eligible), generator=chance)[:count]].tolist()
    strongest = {n: float(codes[:, :, n].amax()) for n in chosen}
    other = edits.with_random_directions(sae, chance)
    pictures = 4 if quick else 8
    regions = edits.in_regions(drawer, (sae, other), strongest, STRENGTHS, pictures, chance)
    out = edits.ablated(drawer, sae, other, chosen, prompts, codes, pictures)
    rising = (regions[0, 1:, :, 0] > regions[0, :-1, :, 0]).all(0)
    return {
        "alive": int((firing > 0).sum()),
        "alike": dict(zip(KINDS, alike, strict=True)),
        "alike_untrained": dict(zip(KINDS, alike_untrained, strict=True)),
        "alike_random": dict(zip(KINDS, alike_random, strict=True)),
        "regions": regions.mean(2).tolist(),
        "rising": float(rising.double().mean()),
        "ablated": out.nanmean(1).tolist(),
    }


def _untrained(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE as it was before training, but for what it takes off its rows."""
    other = sae.clone()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        other.reset_parameters()
        other.b_dec.copy_(sae.b_dec)
    return other


@torch.no_grad()
def _turned(
    turbo: Path, block: str, sae: SparseAutoencoder, quick: bool, chance: torch.Generator
) -> dict[str, Any]:
    """How far features turn pictures, by kind."""
    judge, drawer = Judge(), Drawer(turbo, block, 1)
    pairs = 24 if quick else 64
    return {
        name: edits.turned(drawer, sae, judge, n, pairs, TURNED, TOP, chance)
        for n, name in enumerate(KINDS)
    }
