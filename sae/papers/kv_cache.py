"""A KV cache kept as sparse codes (CSR, Lexico), beside quantised caches of equal bits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from activations.models.coded_cache import EXACT_BITS, CodedCache, losses
from sae.reproduction.claims import Claim, claim, column, spread
from sae.reproduction.kv_codecs import fit
from sae.reproduction.kv_subject import Scale, exact_losses, model_of, scored, texts
from sae.reproduction.paper import Findings, Paper, Row, Settings
from sae.reproduction.trials import flat, run_trials
from saescope.config import from_dict, read_toml
from saescope.pieces import Chart, Table, by_name

_MARGIN = 0.02
"""nats a token by which delta CE may be larger and still be on par"""
_NAMES = {
    "sparse": "sparse codes",
    "samples": "sparse codes, vectors of training text as atoms",
    "random": "sparse codes, random atoms",
    "calibrated": "a channel's levels fixed by training text",
    "kivi": "KIVI: keys by channel, values by token, groups of 32",
    "principal": "principal components",
    "mean": "the mean of training text",
}


def trials(quick: bool) -> list[Settings]:
    """Every codec at its sizes, with each seed's own dictionaries and held-out texts."""
    if quick:
        scale = Scale(training_tokens=1920, vectors=2048, atoms=256)
        # nulls that so few texts tell from sparse codes; others' intervals are too wide
        return _trials(scale, {"sparse": (3,), "random": (3,), "kivi": (1,)})
    return _trials(Scale(), _SIZES)


_SIZES: Mapping[str, Sequence[int]] = {
    "mean": (0,),
    "sparse": (3, 6, 10),
    "samples": (3,),
    "random": (3,),
    "calibrated": (1, 2, 4),
    "kivi": (1, 2),
    "principal": (3,),
}
"""atoms a vector; bits a number; of principal components, the atoms whose bits they may take"""


def _trials(scale: Scale, sizes: Mapping[str, Sequence[int]]) -> list[Settings]:
    found: list[Settings] = []
    for seed in range(3):
        known = {"seed": seed, "keys": "rotated", "scale": asdict(scale)}
        found += [
            {**known, "method": method, "size": size}
            for method, own in sizes.items()
            for size in own
        ]
        if "samples" in sizes:
            found.append({**known, "method": "samples", "size": 3, "keys": "unrotated"})
    return found


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Delta CE of held-out texts that are read through a coded cache, and the bits of its codes."""
    scale = from_dict(Scale, settings["scale"], where="scale")
    fitted = fit(scale, settings, folder)
    coded = CodedCache(fitted.codecs, window=scale.window, group=scale.group)
    tokens = texts(scale, settings["seed"])
    found, exact = losses(model_of(scale), tokens, coded), exact_losses(scale, settings["seed"])
    layers = coded.layers
    share = layers[0].coded / scale.context
    numbers = sum(each.numbers for each in layers)
    code_bits = sum(each.coded_bits for each in layers)
    values: dict[str, Any] = {
        # of keys and values that are coded; of what is kept once, spread over one token's
        "code_bits": code_bits / (numbers * share),
        "constant_bits": fitted.constant_bits / (numbers / tokens.numel()),
        "bits_as_run": coded.bits_a_number,
    }
    for name, which in scored(scale).items():
        values[f"{name}_ce"] = float(exact[:, which].mean())
        values[name] = float((found - exact)[:, which].mean())
    return values


def true_bits(row: Row, held: int | None = None, caches: int | None = None) -> float:
    """Bits a channel of `caches` caches of `held` tokens: codes, the window, and what is kept once.

    The window is counted at its longest: just before a group is coded.
    """
    scale = from_dict(Scale, row["scale"], where="scale")
    held, caches = held or scale.held, caches or scale.caches
    exact = (scale.window + scale.group) / held
    codes = row["code_bits"] * (1 - exact) + EXACT_BITS * exact
    return codes + row["constant_bits"] / (held * caches)


def at_scale(config: str | Path, folder: str | Path) -> list[dict[str, Any]]:
    """All trials at the sizes of a file, kept in `folder`; the rows, with their true bits.

    Raises InputError for a wrong file, and what running the model raises.
    """
    scale = from_dict(Scale, read_toml(Path(config)), where=str(config))
    sized = replace(PAPER, trials=lambda _: _trials(scale, _SIZES))
    rows = flat(run_trials("kv-cache", sized, Path(folder), quick=False))
    return [{**row, "true_bits": true_bits(row)} for row in rows]


# ---- what came out --------------------------------------------------------------------------

_SCORES = {"text": "new text", "recall": "a repeated stretch"}


def findings(rows: Sequence[Row]) -> Findings:
    """Sparse codes beside quantised caches and beside their nulls, at no fewer bits than theirs."""
    whole = any(row["method"] == "principal" for row in rows)
    return Findings(
        claims=(*_claims(rows, whole),),
        why=_why(rows) if whole else "Few trials, for a look.",
        tables=(_table(rows), *([_bits_table(rows)] if whole else [])),
        charts=(*(_chart(rows, score) for score in _SCORES),) if whole else (),
    )


def _of(rows: Sequence[Row], score: str, method: str, size: int) -> list[float]:
    return column(rows, score, method=method, size=size, keys="rotated")


def _bits(rows: Sequence[Row], method: str, size: int) -> float:
    """True bits of a codec with rotated keys."""
    kind = (method, size, "rotated")
    found = (row for row in rows if (row["method"], row["size"], row["keys"]) == kind)
    return true_bits(next(found))


def _claims(rows: Sequence[Row], whole: bool) -> Iterator[Claim]:
    """Fixed before the held-out texts were read: each null has at least as many true bits."""
    below: dict[str, list[tuple[int, str]]] = {}
    on_par = {}
    if whole:
        below["calibrated"] = [(1, "1 bit with a channel's fixed levels")]
    below["random"] = [(3, "3 random atoms")]
    if whole:
        below["samples"] = [(3, "3 atoms that are training vectors")]
        below["principal"] = [(3, "principal components at as many bits")]
        on_par = {
            6: ("calibrated", 2, "2 bits with a channel's fixed levels"),
            10: ("kivi", 2, "KIVI at 2 bits (3 with its groups' ends)"),
        }
    below["kivi"] = [(1, "KIVI at 1 bit (2 with its groups' ends)")]
    pairs = [(3, method, size) for method, each in below.items() for size, _ in each]
    pairs += [(k, method, size) for k, (method, size, _) in on_par.items()]
    for k, method, size in pairs:
        if whole and _bits(rows, method, size) < _bits(rows, "sparse", k):
            raise ValueError(f"{method} of {size} has fewer true bits than {k} atoms")
    for score, words in _SCORES.items():
        ours = _of(rows, score, "sparse", 3)
        for method, each in below.items():
            for size, name in each:
                yield claim(
                    f"delta CE of {words} with 3 atoms is below that of {name}",
                    ours,
                    _of(rows, score, method, size),
                    lower=True,
                )
        for k, (method, size, name) in on_par.items():
            null = [value + _MARGIN for value in _of(rows, score, method, size)]
            yield claim(
                f"delta CE of {words} with {k} atoms is no more than "
                f"{_MARGIN} above that of {name}: the null is that much above it",
                _of(rows, score, "sparse", k),
                null,
                lower=True,
            )


def _why(rows: Sequence[Row]) -> str:
    def mean(score: str, method: str, size: int) -> float:
        return float(np.mean(_of(rows, score, method, size)))

    def bits(method: str, size: int) -> str:
        own = column(rows, "code_bits", method=method, size=size, keys="rotated")
        return f"{own[0]:.2g}"

    words = []
    for score, name in _SCORES.items():
        words.append(
            f"On {name} 3 atoms, {bits('sparse', 3)} bits a channel, cost "
            f"{mean(score, 'sparse', 3):.2f} nats a "
            f"token, one bit with fixed levels {mean(score, 'calibrated', 1):.2f}, KIVI's one "
            f"bit, which is {bits('kivi', 1)} with its groups' ends, "
            f"{mean(score, 'kivi', 1):.2f}, and no old cache but its mean "
            f"{mean(score, 'mean', 0):.2f}; at {bits('sparse', 10)} bits 10 atoms cost "
            f"{mean(score, 'sparse', 10):.3f}, at {bits('kivi', 2)} "
            f"KIVI {mean(score, 'kivi', 2):.3f}."
        )
    return " ".join(words)


def _kinds(rows: Sequence[Row]) -> list[tuple[str, int, str]]:
    found = {(row["method"], row["size"], row["keys"]) for row in rows}
    return sorted(found, key=lambda each: (list(_NAMES).index(each[0]), each[2], each[1]))


def _label(method: str, size: int, keys: str) -> str:
    unit = {"sparse": "atoms", "samples": "atoms", "random": "atoms"}.get(method, "bits")
    if method == "principal":
        unit = "atoms' bits"
    number = f", {size} {unit if size > 1 else unit.rstrip('s')}" if size else ""
    return _NAMES[method] + number + (", keys before rotation" if keys == "unrotated" else "")


def _table(rows: Sequence[Row]) -> Table:
    cells = []
    for method, size, keys in _kinds(rows):
        own = [
            row for row in rows if (row["method"], row["size"], row["keys"]) == (method, size, keys)
        ]
        scores = (spread(column(own, score, method=method)) for score in _SCORES)
        bits = own[0]["code_bits"], true_bits(own[0])
        cells.append((_label(method, size, keys), *(f"{each:.2f}" for each in bits), *scores))
    scale = from_dict(Scale, rows[0]["scale"], where="scale")
    return Table(
        title="Delta CE, nats a token",
        about="Bits a channel: of codes alone, with their groups' ends; and of "
        f"{scale.caches} caches of {scale.held:,} tokens that share their dictionaries, with "
        f"these and with the {scale.window + scale.group} newest tokens in 16 bits. ± is half of "
        "a 95% interval over seeds.",
        columns=("cache", "code bits", "true bits", "new text", "a repeated stretch"),
        rows=tuple(cells),
    )


def _bits_table(rows: Sequence[Row]) -> Table:
    """What true bits are of, for other amounts of text."""
    shown = [("sparse", 3), ("sparse", 10), ("principal", 3), ("calibrated", 1), ("kivi", 2)]
    cells = []
    for method, size in shown:
        row = next(
            row
            for row in rows
            if (row["method"], row["size"], row["keys"]) == (method, size, "rotated")
        )
        uses = [(512, 1), (8192, 1), (8192, 16), (8192, 1024)]
        found = [f"{true_bits(row, held, caches):.2f}" for held, caches in uses]
        cells.append((_label(method, size, "rotated"), *found))
    return Table(
        title="True bits by how much text shares a dictionary",
        about="One text of 512 tokens, as is run here; one of 8,192; and 16 and 1,024 of these.",
        columns=("cache", "1 x 512", "1 x 8,192", "16 x 8,192", "1,024 x 8,192"),
        rows=tuple(cells),
    )


def _chart(rows: Sequence[Row], score: str) -> Chart:
    lines = {}
    for method in ("sparse", "random", "principal", "calibrated", "kivi"):
        own = [size for name, size, keys in _kinds(rows) if (name, keys) == (method, "rotated")]
        line = {}
        for size in own:
            mean = float(np.mean(_of(rows, score, method, size)))
            line[_bits(rows, method, size)] = (float(np.log10(max(mean, 1e-4))), None)
        lines[_NAMES[method]] = line
    return Chart(
        key=score,
        title=f"Delta CE of {_SCORES[score]} against true bits",
        about="Means over seeds, in powers of ten of nats a token, but at least -4.",
        x="bits a channel",
        y="log10 of delta CE",
        series=(*by_name(lines),),
        form=".2f",
    )


PAPER = Paper(
    title="CSR: achieving 1 bit key-value cache via sparse representation",
    citation="Zhang et al., AAAI 2025, arXiv 2412.11741; and Lexico, Kim et al., ICML 2025, "
    "arXiv 2412.08890",
    claim="Each key and value vector of a KV cache is a few atoms of a dictionary that is learnt "
    "once for all texts: kept as indices and low-bit weights it takes about one bit a channel and "
    "the model still works, where quantised caches of so few bits fail; at the bits of the best "
    "quantised caches (KIVI's 2 bits) it is on par with them.",
    run=(
        "SmolLM2-135M in float32, 3 key and value heads of 64 channels in each of 30 layers. The "
        "cache that attention reads is the coded one: tokens are read 32 at a time, before each "
        "32 all whole groups of 32 that are older than the newest 32 are coded, and what their "
        "codes say takes their place for good. That equals token-by-token generation under the "
        "same rule (`tests/unit/test_coded_cache.py`). Keys are coded as the cache has them, "
        "rotated (as Lexico's code and KIVI do); one row of the table codes them "
        "before rotation.",
        "Sparse codes: a dictionary of 1,024 atoms for keys and one for values in each layer, "
        "shared by its heads, which are SAEs (`matching_pursuit`, orthogonal, k = 4) trained on "
        f"{Scale().vectors:,} vectors of {Scale().training_tokens:,} tokens of Wikipedia; k atoms "
        "by orthogonal matching pursuit, 10 bits an index and an 8-bit float a value. The "
        "learning rate was chosen (two layers, of 0.003, 0.01 and 0.02) by error on other training "
        "text. Beside them: random atoms; training vectors as atoms; "
        "principal components of each head with 4 bits a coordinate, as many as take the bits of "
        "sparse codes and their dictionary; "
        "uniform levels about each channel's mean, set on training text (no bits but the levels'); "
        "KIVI, keys in groups of 32 tokens of a channel and values in "
        "groups of 32 channels of a token, with 32 bits for each group's ends. All have the same "
        "window.",
        f"Held-out text: each seed has {Scale().texts} sequence of its own of 512 tokens, joined "
        "leads of documents that nothing was fitted on: 320 tokens of new text, then 192 of them "
        "once more, which show whether the old cache can still be looked up. Delta CE is against "
        "the model without a cache, over tokens that read codes. A seed also draws the vectors, "
        "the dictionaries' start and the order of training.",
        "True bits are for 16 caches of 8,192 tokens, the model's context, that share their "
        "dictionaries: codes, groups' ends, the window at its longest (64 tokens in 16 bits, 0.125 "
        "bits a channel), and all that is kept once, in 16 bits a number (0.042 bits for the "
        "dictionaries). Comparisons are with nulls of at least as many bits.",
    ),
    easier="It is the paper's claim in cross-entropy instead of in scores of LongBench, with "
    "texts of 512 tokens, where the paper's are of thousands. Repeating a stretch "
    "stands in for tasks that look things up. Bits are usually "
    "counted of codes alone; here dictionary and window are in them. A single text of "
    "512 tokens does not pay for a dictionary: the last table says so. The paper's NeuralDict is "
    "a network that makes the dictionary; here an SAE is trained, by gradient as Lexico's is, "
    "with a smaller dictionary and far less text. KIVI's keys and values are "
    "in its groups of 32, with ends in 16 bits; no kernels are run and no time is measured. "
    "Min-max levels of 1 bit are KIVI's rule, not something its authors recommend.",
    trials=trials,
    measure=measure,
    findings=findings,
    configs=("kv-cache.toml",),
    scale="Llama-3.1-8B-Instruct with Lexico's sizes (4,096 atoms, WikiText-103, a window of 128): "
    "hours of one GPU, and 20 GB for the vectors. Not run here. "
    "`sae.papers.kv_cache.at_scale(file, folder)` runs it.",
)
