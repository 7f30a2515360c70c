"""MDL-SAE: of dictionaries that say digits equally well, the one that says them most briefly."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from activations import ActivationStore
from activations.corpora.digits import SIDE, digits
from sae.analysis.description_length import Described, Optimum, at_equal_distortion
from sae.core.base import SparseAutoencoder
from sae.formats.load import load
from sae.reproduction.claims import Claim, claim, points, spread
from sae.reproduction.paper import Findings, Paper, Picture, Row, Settings
from sae.reproduction.training import measured, trained
from saescope.pieces import Chart, Table, by_name
from saescope.progress import silent

_WIDTHS, _L0S, _STEPS = (16, 64, 256, 1024, 2048), (2, 3, 5, 8), 600
_SIDE = SIDE // 2
"""pixels in a row after 2 x 2 of them are averaged, and rows"""
_SHOWN = ((16, 8), (256, 3), (2048, 3))
"""width and L0 of the dictionaries whose features are shown: about those that are compared"""
_PICTURED, _ACROSS, _ZOOM = 24, 12, 4
_BATCH = 250


def trials(quick: bool) -> list[Settings]:
    """A grid of widths and L0."""
    widths, l0s, steps = _WIDTHS, _L0S, _STEPS
    if quick:
        widths, l0s, steps = (16, 256, 2048), (2, 3, 8), 200
    return [
        {"seed": seed, "d_sae": d_sae, "k": k, "steps": steps}
        for seed in range(3)
        for d_sae in widths
        for k in (l0s if d_sae > 16 else (5, 8))  # with fewer, 16 are far from what others reach
    ]


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one BatchTopK SAE on pixels; its bits and distortion on digits it was not shown."""
    harvest = folder / "digits"
    full, _ = digits()
    pixels = full.reshape(-1, _SIDE, 2, _SIDE, 2).mean((2, 4)).reshape(-1, _SIDE**2)
    with silent():
        ActivationStore.from_arrays(
            harvest,
            {"pixels": pixels},
            documents=np.arange(len(pixels)),
            held_out_fraction=0.2,
            storage="float32",
            chunk_rows=_BATCH * 4,
        )
    d_sae, k, seed = settings["d_sae"], settings["k"], settings["seed"]
    values = {
        "harvest": str(harvest),
        "seed": seed,
        "passes": settings["steps"] * _BATCH / (0.8 * len(pixels)),
        "normaliser": "centred",
        "sae": {"kind": "batchtopk", "d_sae": d_sae, "k": k},
        "trainer": {
            "batch_size": _BATCH,
            "lr_multiplier": 4.0,
            "evaluate_every": 300,
            "checkpoint_every": 300,
        },
    }
    run = trained(folder / "runs" / f"{d_sae}-{k}-{seed}-{settings['steps']}", values)
    found = measured(run, suite=("core", "description_length"), tokens=0)
    length = found["description_length"]
    features = _Features(load(run), torch.from_numpy(pixels))
    return {
        "l0": found["reconstruction"]["l0"],
        "fvu": length["fvu_quantised"],
        "bits": length["description_bits"],
        "index_bits": length["index_bits"],
        "dictionary_bits": length["dictionary_bits"],
        "whole": features.whole(),
        "digits_alike": _alike(features.pictures),
        "area": features.area(),
        "png": features.picture() if seed == 0 and (d_sae, k) in _SHOWN else None,
    }


class _Features:
    """Decoder rows [features, pixels] of those that fire, the most frequent first."""

    def __init__(self, sae: SparseAutoencoder, pixels: Tensor) -> None:
        with torch.no_grad():
            codes = sae.encode_sparse(pixels)
        fired = torch.bincount(codes.index, minlength=sae.d_sae)
        order = fired.argsort(descending=True, stable=True)[: int((fired > 0).sum())]
        self.rows = sae.decoder_directions().detach()[order]
        self.pictures = pixels - pixels.mean(0)

    def whole(self) -> float:
        """The greatest cosine with a picture, less the mean picture: 1 for a memorised digit."""
        cosines = functional.normalize(self.rows) @ functional.normalize(self.pictures).T
        return float(cosines.max(1).values.mean())

    def area(self) -> float:
        """The share of the pixels that a feature is spread over: (sum w^2)^2 / (n sum w^4)."""
        square = self.rows.square()
        return float((square.sum(1).square() / square.square().sum(1)).mean() / square.shape[1])

    def picture(self) -> str:
        """Some features side by side, from the most to the least frequent, as PNG in base64."""
        chosen = np.linspace(0, len(self.rows) - 1, min(_PICTURED, len(self.rows))).round()
        rows = self.rows.numpy()[chosen.astype(int)].reshape(-1, _SIDE, _SIDE)
        rows = rows / np.abs(rows).max(axis=(1, 2), keepdims=True)
        shown = np.full((_PICTURED, _SIDE + 2, _SIDE + 2), 255, np.uint8)
        shown[: len(rows), 1:-1, 1:-1] = np.uint8(127.5 + 127.5 * rows)
        return _png(shown.reshape(-1, _ACROSS, _SIDE + 2, _SIDE + 2))


def _alike(pictures: Tensor) -> float:
    """The greatest cosine of a picture with another one, on average."""
    directions = functional.normalize(pictures)
    cosines = (directions @ directions.T).fill_diagonal_(-1)
    return float(cosines.max(1).values.mean())


def _png(shown: npt.NDArray[np.uint8]) -> str:
    """Pictures [down, across, height, width] as one, in base64."""
    down, across, height, width = shown.shape
    image = Image.fromarray(shown.transpose(0, 2, 1, 3).reshape(down * height, across * width))
    size = (image.width * _ZOOM, image.height * _ZOOM)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# ---- what follows -------------------------------------------------------------------------------


def _reached(rows: Sequence[Row], widths: Sequence[int]) -> float:
    """The least FVU that all these widths reach with every seed."""
    cells = {(row["d_sae"], row["seed"]) for row in rows if row["d_sae"] in widths}
    return max(
        min(row["fvu"] for row in rows if (row["d_sae"], row["seed"]) == cell) for cell in cells
    )


def _optima(rows: Sequence[Row], fvu: float) -> dict[int, Optimum]:
    """By seed, bits of each width that reaches an FVU."""
    described = {
        seed: [
            Described(d_sae=row["d_sae"], l0=row["l0"], fvu=row["fvu"], bits=row["bits"])
            for row in rows
            if row["seed"] == seed and row["bits"] is not None
        ]
        for seed in sorted({row["seed"] for row in rows})
    }
    return {seed: at_equal_distortion(each, fvu) for seed, each in described.items()}


def _widths(optima: Mapping[int, Optimum]) -> list[int]:
    """Widths that have bits with every seed."""
    return sorted(set.intersection(*(set(each.bits) for each in optima.values())))


def _chosen(optima: Mapping[int, Optimum], *, without: int) -> int:
    """The width with the fewest bits over all seeds but one."""
    others = [each.bits for seed, each in optima.items() if seed != without]
    return min(_widths(optima), key=lambda width: sum(bits[width] for bits in others))


def _near(rows: Sequence[Row], fvu: float, *, seed: int, d_sae: int, name: str) -> float:
    """A value of the SAE of a width and seed whose FVU is nearest to this."""
    own = [row for row in rows if (row["seed"], row["d_sae"]) == (seed, d_sae)]
    return min(own, key=lambda row: abs(row["fvu"] - fvu))[name]


def findings(rows: Sequence[Row]) -> Findings:
    """Bits of every width at two distortions, where the fewest are, and how features look there."""
    widths = sorted({row["d_sae"] for row in rows})
    fvu = _reached(rows, widths)
    optima = _optima(rows, fvu)
    best = {seed: _chosen(optima, without=seed) for seed in optima}

    def near(name: str, width: int | None = None) -> list[float]:
        return [_near(rows, fvu, seed=n, d_sae=width or best[n], name=name) for n in best]

    claims = [
        *_fewer(optima, "at the FVU that all widths reach"),
        *_fewer(_optima(rows, _reached(rows, widths[1:])), "at the one that all but one reach"),
        claim(
            "the widest's features are more like one digit (cosine) than the best width's",
            near("whole", widths[-1]),
            near("whole"),
        ),
        claim(
            "the best width's features are less like one digit than digits are like each other",
            near("whole"),
            near("digits_alike"),
            lower=True,
        ),
        claim(
            "the narrowest's features cover fewer pixels (share) than the best width's",
            near("area", widths[0]),
            near("area"),
            lower=True,
        ),
    ]
    return Findings(
        claims=(*claims,),
        why=_why(rows, optima, best),
        tables=(*_tables(rows, widths),),
        charts=(_chart(rows),),
        pictures=(*_pictures(rows),),
    )


def _fewer(optima: Mapping[int, Optimum], where: str) -> list[Claim]:
    """That the best width, chosen on the other seeds, takes fewer bits than both ends."""
    widths = _widths(optima)
    best = [each.bits[_chosen(optima, without=seed)] for seed, each in optima.items()]
    return [
        claim(
            f"{where}, the best width takes fewer bits than the {words}",
            best,
            [each.bits[width] for each in optima.values()],
            lower=True,
            form=".1f",
        )
        for words, width in (("narrowest", widths[0]), ("widest", widths[-1]))
    ]


def _why(rows: Sequence[Row], optima: Mapping[int, Optimum], best: Mapping[int, int]) -> str:
    widths = _widths(optima)
    mean = _means(optima)
    least, narrow, wide = min(mean, key=mean.__getitem__), widths[0], widths[-1]
    inside = set(best.values()).isdisjoint((narrow, wide))
    sent = {row["d_sae"]: row["dictionary_bits"] / 5000 for row in rows}
    words = (
        f"At FVU {next(iter(optima.values())).fvu:.2f} the fewest bits are "
        f"{'inside' if inside else 'at an end of'} the grid, at a width of "
        f"{' or '.join(f'{each:,}' for each in sorted(set(best.values())))} (chosen on the other "
        f"seeds): {mean[least]:.1f} bits a digit with {least:,} features, {mean[narrow]:.1f} with "
        f"{narrow:,} and {mean[wide]:.1f} with {wide:,}. "
    )
    lower = _reached(rows, widths[1:])
    means = _means(_optima(rows, lower))
    words += (
        f"At FVU {lower:.2f}, which {narrow:,} features do not reach, they are at "
        f"{min(means, key=means.__getitem__):,}, "
        + (
            "the narrowest that reaches it with an L0 of the grid: whether a narrower and denser "
            "one takes more is not seen. "
            if min(means, key=means.__getitem__) == min(means)
            else "inside the grid. "
        )
    )
    return words + (
        "The dictionary is not in these bits, as in the paper; sent once for 5,000 digits, at 32 "
        f"bits a number, it would add {sent[least]:,.0f} bits to each with {least:,} features and "
        f"{sent[narrow]:,.0f} with {narrow:,}."
    )


def _means(optima: Mapping[int, Optimum]) -> dict[int, float]:
    """Bits by width, over seeds."""
    return {
        width: sum(each.bits[width] for each in optima.values()) / len(optima)
        for width in _widths(optima)
    }


def _tables(rows: Sequence[Row], widths: Sequence[int]) -> list[Table]:
    """One for each distortion: all widths reach the first, all but the narrowest the second."""
    found = []
    for within in (widths, widths[1:]):
        fvu = _reached(rows, within)
        optima = _optima(rows, fvu)
        found.append(
            Table(
                title=f"Bits a digit at FVU {fvu:.2f}",
                about="On digits that were not trained on, read off between two SAEs of the "
                "width; cosine and pixels are those of the SAE with the nearest FVU. ± is half "
                "of a 95% interval over seeds.",
                columns=("width", "L0", "bits a digit", "nearest digit, cosine", "pixels covered"),
                rows=tuple(_line(rows, optima, width, fvu) for width in _widths(optima)),
            )
        )
    return found


def _line(
    rows: Sequence[Row], optima: Mapping[int, Optimum], width: int, fvu: float
) -> tuple[str, ...]:
    whole, area = (
        [_near(rows, fvu, seed=seed, d_sae=width, name=name) for seed in optima]
        for name in ("whole", "area")
    )
    return (
        f"{width:,}",
        spread([each.l0[width] for each in optima.values()], ".1f"),
        spread([each.bits[width] for each in optima.values()], ".1f"),
        spread(whole, ".2f"),
        spread([100 * each for each in area], ".0f") + " %",
    )


def _chart(rows: Sequence[Row]) -> Chart:
    lines = {}
    for width in sorted({row["d_sae"] for row in rows}):
        kept = [row for row in rows if row["d_sae"] == width and row["bits"] is not None]
        fvu = {at: value for at, (value, _) in points(kept, "fvu", "k").items()}
        lines[f"{width:,} wide"] = {
            fvu[at] or 0.0: value for at, value in points(kept, "bits", "k").items()
        }
    return Chart(
        key="bits",
        title="Description length against distortion",
        about="Means over seeds. Lower is better, at one FVU.",
        x="FVU of what is received",
        y="bits a digit",
        series=(*by_name(lines),),
        form=".1f",
    )


def _pictures(rows: Sequence[Row]) -> list[Picture]:
    return [
        Picture(
            key=f"features-{row['d_sae']}",
            title=f"Features of {row['d_sae']:,} at L0 {row['k']}",
            about="Decoder rows, from the most to the least frequent of those that fire; grey is "
            "0, white adds ink, black takes it away.",
            png=row["png"],
        )
        for row in rows
        if row["png"] is not None
    ]


PAPER = Paper(
    title="Interpretability as compression: MDL-SAEs",
    citation="Ayonrinde, Pearce and Sharkey, 2024, arXiv 2410.11179",
    claim="An SAE is an explanation that is sent: its length is that of its codes. At equal "
    "distortion the length is least at a width and sparsity in between: very sparse and wide "
    "dictionaries memorise digits and pay for saying which, narrow and dense ones are of fragments "
    "and pay for many values. At the optimum features look like strokes.",
    run=(
        f"BatchTopK SAEs on 5,000 digits of MNIST (4,000 to train on), at {_SIDE} x {_SIDE} "
        f"pixels: a grid of widths ({', '.join(map(str, _WIDTHS))}) and L0 "
        f"({', '.join(map(str, _L0S))}), {_STEPS} steps of {_BATCH} rows at four times the "
        "default learning rate (the best of 1, 4 and 8 for training rows, 256 wide). Bits are the "
        "held-out cross-entropy of a distribution fitted on training rows, which an arithmetic "
        "coder reaches; values are quantised until FVU rises by 0.001.",
        "Widths are compared at the least FVU that all reach: on that line a narrow dictionary is "
        "dense and a wide one sparse. The best width is chosen on the other seeds; what it stands "
        "beside are both ends of the line. How much a feature is like one digit is its greatest "
        "cosine with a picture; how local it is, the share of the pixels that its squares are "
        "spread over.",
    ),
    easier="It is the paper's claim, with 500 pictures of each digit instead of 60,000, at half "
    "the resolution. It is harder in one way: bits are a held-out cross-entropy instead of the "
    "entropy of the same rows, which flatters wide dictionaries; what wide ones lose is small. "
    "That features of the optimum look like strokes is not shown: by the pictures, and by their "
    "cosine with one digit, they are nearly as much like whole digits as digits are like each "
    "other, and the widest dictionary's only a little more so. Features become local at the lower "
    "distortion, in the narrow dictionary that takes the fewest bits there. Of language models "
    "nothing is compared at equal distortion: the SAE of the quick demo, 4,096 wide with an L0 "
    "of 32, takes 335 bits a token at an FVU of 0.158 (benchmarks/results/controls.csv).",
    trials=trials,
    measure=measure,
    findings=findings,
    configs=("mdl.toml",),
    scale="SAEs of GPT-2 small on 100 million tokens of OpenWebText, at four widths, six L0 and "
    "three seeds: hours of one GPU. It was not run here.",
)
