"""SDXL Turbo's transformer blocks by SAEs, on a small diffusion model of coloured digits."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activations.models.digit_diffusion import BLOCKS
from sae.probing.scores import mean_and_interval
from sae.reproduction.claims import Claim, by_seed, claim, spread, value_at
from sae.reproduction.diffusion_trials import (
    KINDS,
    RUNS,
    STRENGTHS,
    TOP,
    TURNED,
    K,
    measure_block,
    measure_models,
    measure_pictures,
)
from sae.reproduction.paper import Findings, Paper, Picture, Row, Settings
from saescope.pieces import Chart, Table, by_name

_MODELS, _PICTURES = "the models", "pictures"
_AT, _TURNED_AT = STRENGTHS.index(1.0), TURNED.index(2.0)
"""which strengths the claims are about"""
_INSIDE, _OUTSIDE = 0, 1
_FEATURE, _RANDOM = 0, 1
_Path = tuple[str | int, ...]
"""keys and indices of a value; after "%", of one that is shown in percent"""


def trials(quick: bool) -> list[Settings]:
    """The models, and an SAE of every block with every seed; few of one block if quick."""
    some = [(seed, block) for seed in range(3) for block in (["up.1"] if quick else BLOCKS)]
    return [
        {"seed": seed, "block": block, "quick": quick}
        for seed, block in ((0, _MODELS), *some, (0, _PICTURES))
    ]


def measure(settings: Settings, folder: Path) -> Mapping[str, Any]:
    """Train the models, or one block's SAE; what it reconstructs, and what its features do."""
    quick, block = settings["quick"], settings["block"]
    folder = folder / ("quick" if quick else "whole")
    if block == _MODELS:
        return measure_models(folder, quick=quick)
    if block == _PICTURES:
        return measure_pictures(folder, quick=quick)
    return measure_block(folder, block, settings["seed"], quick=quick)


def _of(rows: Sequence[Row], *blocks: str) -> list[Row]:
    return [row for row in rows if row["block"] in blocks]


def _blocks(rows: Sequence[Row]) -> list[str]:
    return [block for block in BLOCKS if _of(rows, block)]


def _all_blocks(rows: Sequence[Row]) -> bool:
    return len(_blocks(rows)) == len(BLOCKS)  # few features of one do not show all


def findings(rows: Sequence[Row]) -> Findings:
    """Reconstruction here and elsewhere, what features do to pictures, and in which blocks."""
    asked, of_blocks = _of(rows, _MODELS)[0], _of(rows, *BLOCKS)
    return Findings(
        claims=(*_reconstruction(of_blocks), *_edits(of_blocks), *_turning(of_blocks)),
        why=_why(of_blocks),
        tables=(_drawn(asked), _rebuilt(of_blocks), *_singly(of_blocks), _turned(of_blocks)),
        charts=(*_charts(of_blocks),),
        pictures=(_sheet(_of(rows, _PICTURES)[0]),),
    )


def _reconstruction(rows: Sequence[Row]) -> list[Claim]:
    below = f"the SAE's FVU is below that of {K} principal components"
    less = "pictures change less with the SAE's reconstruction than with the update's mean"
    found = []
    names = [*RUNS] if _all_blocks(rows) else [*RUNS][:1]
    for name in names:
        ours, null = by_seed(rows, "fvu", name), by_seed(rows, "principal", name)
        found.append(claim(f"{name}, {below}", ours, null, lower=True))
    for name in names:
        ours, null = (by_seed(rows, "changed", name, by) for by in ("spliced", "mean"))
        found.append(claim(f"{name}, {less}", ours, null, lower=True, form=".4f"))
    return found


def _edits(rows: Sequence[Row]) -> list[Claim]:
    added = lambda of, side, strength=_AT: by_seed(rows, "regions", of, strength, side)  # noqa: E731
    out = lambda of, side: by_seed(rows, "ablated", of, side)  # noqa: E731

    doubled = [
        min(now[n + 1] / now[n] for n in range(len(STRENGTHS) - 1))
        for now in zip(*(added(_FEATURE, _INSIDE, n) for n in range(len(STRENGTHS))), strict=True)
    ]
    found = [
        *(
            claim(
                f"a feature's strongest pictures agree in the {kind} more than an untrained SAE's",
                by_seed(rows, "alike", kind),
                by_seed(rows, "alike_untrained", kind),
            )
            for kind in KINDS
        ),
        claim(
            "a feature added in a part of the picture changes it more there than elsewhere",
            added(_FEATURE, _INSIDE),
            added(_FEATURE, _OUTSIDE),
        ),
        claim(
            "a feature added there changes more than a random direction of the same length",
            added(_FEATURE, _INSIDE),
            added(_RANDOM, _INSIDE),
        ),
        claim(
            "twice as much of it changes more: at least by this factor",
            doubled,
            [1.0] * len(doubled),
            form=".2f",
        ),
        claim(
            "a feature taken out changes the picture more where it fires than elsewhere",
            out(_FEATURE, _INSIDE),
            out(_FEATURE, _OUTSIDE),
            form=".4f",
        ),
        claim(
            "a feature taken out changes more than as much of a random direction",
            out(_FEATURE, _INSIDE),
            out(_RANDOM, _INSIDE),
            form=".4f",
        ),
    ]
    return found if _all_blocks(rows) else [each for each in found if "twice" in each.says]


def _way(rows: Sequence[Row], kind: str, of: str = "features") -> list[float]:
    return by_seed(rows, "turned", kind, f"{of}_progress", _TURNED_AT)


def _turning(rows: Sequence[Row]) -> list[Claim]:
    """That features turn pictures, and which block's turn what."""
    found = [
        claim(
            f"{TOP} features of a block turn the {kind} further than a rotation of their change",
            _way(rows, kind),
            _way(rows, kind, "rotated"),
        )
        for kind in KINDS
    ]
    for kind, block in (("digit", "down"), ("colour", "up.1")) if _all_blocks(rows) else ():
        others = [each for each in BLOCKS if each != block]
        found.append(
            claim(
                f"the features of {block} turn the {kind} further than those of the other blocks",
                _way(_of(rows, block), kind),
                _way(_of(rows, *others), kind),
            )
        )
    return found


def _why(rows: Sequence[Row]) -> str:
    inside, outside = (
        mean_and_interval(by_seed(rows, "regions", _FEATURE, _AT, side))[0]
        for side in (_INSIDE, _OUTSIDE)
    )
    left = [
        f"{100 * mean_and_interval(by_seed(rows, 'fvu', name))[0]:.0f}% with {name}"
        for name in RUNS
    ]
    best = []
    for kind in KINDS:
        by_block = {
            block: mean_and_interval(_way(_of(rows, block), kind))[0] for block in _blocks(rows)
        }
        block = max(by_block, key=by_block.__getitem__)
        best.append(f"{100 * by_block[block]:.0f}% of the way to another {kind} (by {block})")
    return (
        f"SAEs of one step's updates leave {', '.join(left)} of the variance unexplained. A "
        f"feature that is added in 3 x 3 cells changes pixels {inside / outside:.1f} times as much "
        f"inside as outside. {TOP} features of the best block take a picture {' and '.join(best)}."
    )


def _cells(rows: Sequence[Row], block: str, paths: Sequence[_Path]) -> tuple[str, ...]:
    """Values of a block over seeds; percentages where the path begins with "%"."""
    found = []
    for path in paths:
        times, keys, form = (100, path[1:], ".1f") if path[0] == "%" else (1, path, ".2f")
        found.append(spread([times * value_at(row, *keys) for row in _of(rows, block)], form))
    return (*found,)


def _drawn(asked: Row) -> Table:
    return Table(
        title="What the models draw",
        about="The share of pictures in which a small network, which is right about "
        f"{100 * asked['judge']:.0f}% of digits that people wrote, sees the digit that was asked "
        "for; and the share whose ink is nearest to the colour that was.",
        columns=("drawn by", *KINDS),
        rows=tuple(
            (name, *(f"{100 * each[kind]:.0f}%" for kind in KINDS))
            for name, each in asked["as_asked"].items()
        ),
    )


def _rebuilt(rows: Sequence[Row]) -> Table:
    looked_at = "; ".join(f"{name}: {', '.join(map(str, at))}" for name, (_, _, at) in RUNS.items())
    return Table(
        title="Reconstruction where SAEs were trained, and elsewhere",
        about=f"FVU on new prompts, the mean over steps ({looked_at}; the first is 0), beside {K} "
        "principal components of turbo's one step; and the change of pixels, in % of their range, "
        "if at every step the update is replaced by its reconstruction, by its mean, or left out. "
        "± is half of a 95% interval over seeds, here and below.",
        columns=("block", "drawn by", "FVU", "principal", "spliced", "mean", "left out"),
        rows=tuple(
            (
                block,
                name,
                *_cells(
                    rows,
                    block,
                    [("fvu", name), ("principal", name)]
                    + [("%", "changed", name, by) for by in ("spliced", "mean", "none")],
                ),
            )
            for block in _blocks(rows)
            for name in RUNS
        ),
    )


def _singly(rows: Sequence[Row]) -> Iterator[Table]:
    """What features' pictures share, and what one feature changes."""
    shared: Mapping[str, _Path] = {
        f"{words}{kind}": (of, kind)
        for kind in KINDS
        for words, of in (
            ("same ", "alike"),
            ("untrained SAE's, ", "alike_untrained"),
            ("any two, ", "alike_random"),
        )
    }
    changed: Mapping[str, _Path] = {
        "added, inside": ("%", "regions", _FEATURE, _AT, _INSIDE),
        "outside": ("%", "regions", _FEATURE, _AT, _OUTSIDE),
        "random, inside": ("%", "regions", _RANDOM, _AT, _INSIDE),
        "random, outside": ("%", "regions", _RANDOM, _AT, _OUTSIDE),
        "taken out": ("%", "ablated", _FEATURE, _INSIDE),
        "elsewhere": ("%", "ablated", _FEATURE, _OUTSIDE),
        "random taken out": ("%", "ablated", _RANDOM, _INSIDE),
    }
    for title, about, columns in (
        (
            "What features' pictures share",
            "How often two of a feature's strongest pictures have the same digit or colour, beside "
            "an untrained SAE's features, and any two pictures.",
            shared,
        ),
        (
            "One feature at a time",
            "Change of pixels, in % of their range, of features chosen at random: inside and "
            "outside 3 x 3 cells, if as much is added there as the feature ever has, or as long a "
            "random direction; and where it fires and elsewhere, if it is taken out, or as much of "
            "a random direction where it fires.",
            changed,
        ),
    ):
        yield Table(
            title=title,
            about=about,
            columns=("block", *columns),
            rows=tuple((b, *_cells(rows, b, [*columns.values()])) for b in _blocks(rows)),
        )


def _turned(rows: Sequence[Row]) -> Table:
    names = [f"{of}_{what}" for what in ("progress", "seen") for of in ("features", "rotated")]
    return Table(
        title="Pictures that are turned into another prompt's",
        about=f"{TOP} features, those that differ most, are changed by {TURNED[_TURNED_AT]:g} "
        "times the difference of the two runs: how far that takes the picture to the other one, in "
        "% of the way, and in how many it is seen, in %; beside the same in a rotated space.",
        columns=("block", "kind", "the way", "rotated", "seen", "rotated"),
        rows=tuple(
            (
                block,
                kind,
                *_cells(rows, block, [("%", "turned", kind, name, _TURNED_AT) for name in names]),
            )
            for block in _blocks(rows)
            for kind in KINDS
        ),
    )


def _sheet(row: Row) -> Picture:
    return Picture(
        key="pictures",
        title="What is drawn, and edited by features of up.1",
        about="One prompt and noise a column, not chosen. From above: base; turbo in one step; in "
        "four; in one step, with a random feature of the picture added to the lower half, twice "
        "its largest activation; with a random direction of the same length; with ten features "
        "turned towards the next colour, twice the difference; and that colour's own picture.",
        png=row["png"],
    )


def _charts(rows: Sequence[Row]) -> list[Chart]:
    """Change by strength inside and outside a region; and how far features turn pictures."""
    spatial = {
        f"{of}, {where}": {
            strength: mean_and_interval([100 * x for x in by_seed(rows, "regions", s, m, n)])
            for m, strength in enumerate(STRENGTHS)
        }
        for s, of in enumerate(("feature", "random direction"))
        for n, where in enumerate(("inside", "outside"))
    }
    turned = {
        f"{kind}, {block}": {
            strength: mean_and_interval(
                [100 * x for x in by_seed(_of(rows, block), "turned", kind, "features_progress", n)]
            )
            for n, strength in enumerate(TURNED)
        }
        for kind in KINDS
        for block in _blocks(rows)
    }
    return [
        Chart(
            key="regions",
            title="What is added in a part of the picture",
            about="Means over features, blocks and seeds.",
            x="multiples of the feature's largest activation",
            y="change of pixels, %",
            series=(*by_name(spatial),),
            form=".1f",
        ),
        Chart(
            key="turned",
            title=f"How far {TOP} features of a block turn a picture",
            x="multiples of the difference of the two runs",
            y="% of the way to the other picture",
            series=(*by_name(turned),),
            form=".0f",
        ),
    ]


PAPER = Paper(
    title="One step is enough: sparse autoencoders for text-to-image diffusion models",
    citation="Surkov, Wendler, Mari, Terekhov, Deschenaux, West, Gulcehre and Bau, NeurIPS 2025, "
    "arXiv 2410.22366",
    claim="SAEs of what four transformer blocks of SDXL Turbo's U-net add, trained on its one-step "
    "runs, reconstruct it there, in four steps, and in SDXL base, another model of many steps, "
    "without more training. Their features are specific, and causal: added in a part of the "
    "picture they change that part, and turning features of a prompt off and another's on edits "
    "the picture (RIEBench). Blocks are specialised: down.2.1 composes, up.0.0 adds local detail, "
    "up.0.1 colour, light and style.",
    run=(
        "The subjects are trained here on 5,000 digits of MNIST in six colours, at 16 x 16 pixels: "
        "base, a U-net of diffusers with cross-attention to a random frozen text encoder "
        "(velocity, DDIM in 16 steps), and turbo, which begins with base's weights and learns "
        "where its trajectories end, so that it draws in one step or in four. Both are pipelines "
        "in the layout of Stable Diffusion. Their blocks down, mid, up.0 and up.1 stand where "
        "SDXL's four do, each over 8 x 8 cells.",
        "By the commands of this package: a harvest of output less input of each block in turbo's "
        f"one step on 4,000 prompts, a row a cell; TopK SAEs with {K} of 128 features, over 32 "
        "dimensions. All else is measured on new prompts with new noise. Features are chosen at "
        "random among those that fire at one cell in a thousand, and are added by sae.steer in "
        "3 x 3 cells, or taken out; the reconstruction stands in for the update by sae.splice. To "
        "turn a picture, the features that differ most between its run and another prompt's, from "
        "the same noise, are moved by twice their difference at each cell. How far a picture went "
        "is its change's part along the difference of the two pictures. Strengths, numbers of "
        "features and the size of everything were set before results were seen.",
    ),
    easier="They are the paper's claims, in a far smaller world: an object in one of six colours, "
    "blocks of 32 dimensions, and models trained for minutes, whose digits are poor (the first "
    "table), so that a digit's claim is about strokes more than about what is read. Base is "
    "another model than turbo, but turbo was distilled from it. Nulls are as many principal "
    "components, and a rotation of the change that features make. That an edit stays where it is "
    "made is as true of a random direction: it is the network's doing. Specificity is whether "
    "pictures share the digit and colour asked for, not their CLIP similarity. An edit moves "
    "features of the whole picture, without a mask, and goes by pixels; RIEBench's are judged by "
    "CLIP and LPIPS over more kinds of edits, of which object (digit) and colour are here. Light, "
    "detail and style are not tested, as these pictures have none; that the digit is what "
    "down.2.1 would compose is our reading.",
    trials=trials,
    measure=measure,
    findings=findings,
    configs=("sdxl-unbox-harvest.toml", "sdxl-unbox.toml"),
    scale="1.5 million prompts, each 256 rows of 1280 at each of four blocks: the harvest's file "
    "stops at 100 million rows a site, a TB, and wants a GPU for hours. An SAE is trained from "
    "each site. SDXL Turbo was not run here: its layout is, by a tiny copy.",
)
