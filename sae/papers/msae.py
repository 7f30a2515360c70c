"""MSAE: one SAE that is trained at many k at once, used at any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sae.analysis.concept_names import ConceptNames, like_rows, name_directions
from sae.architectures.msae import MSAEConfig
from sae.commands.train import train
from sae.core.base import SparseAutoencoder
from sae.evaluation.cknna import cknna
from sae.probing.scores import auc
from sae.reproduction.claims import claim, column, points, spread
from sae.reproduction.embeddings import lead_texts, leads, topics, words
from sae.reproduction.paper import Findings, Paper, Row, Settings
from saescope.pieces import Chart, Table, by_name
from saescope.progress import silent

_LEVELS = (4, 16, 64)
_MEASURED = (2, 4, 8, 16, 32, 64, 128)
_KINDS = {"msae": {"kind": "msae", "k": 16, "ks": _LEVELS}} | {
    f"topk {k}": {"kind": "topk", "k": k} for k in _LEVELS
}
_D_SAE, _PASSES, _HELD_OUT = 1536, 12, 1000
_ALIGNED = 500
"""held-out rows of which neighbours are compared"""
_WORDS, _NULL = 400, 1000
_STRENGTHS = (0.5, 1.0, 2.0)
"""what is added of a feature's direction, in lengths of rows less their mean"""
_EDITED, _NEAREST = 150, 10


def trials(quick: bool) -> list[Settings]:
    """MSAE, and TopK at each of its levels, with every seed."""
    rows = 3000 if quick else 6000
    return [
        {"seed": seed, "kind": kind, "rows": rows, "passes": _PASSES}
        for seed in range(3)
        for kind in _KINDS
    ]


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one SAE; what it reconstructs at every k, what its features are called and change."""
    data, seed = leads(folder, settings["rows"]), settings["seed"]
    order = np.random.default_rng(seed).permutation(len(data.x))
    held = order[: min(_HELD_OUT, len(order) // 4)]
    known = order[len(held) :]
    x, new = torch.from_numpy(data.x[known]), torch.from_numpy(data.x[held])
    with silent():
        sae = train(
            x,
            _KINDS[settings["kind"]],
            d_sae=_D_SAE,
            passes=settings["passes"],
            batch_size=256,
            normaliser="centred",
            seed=seed,
        )
    found = {"fvu": {}, "cknna": {}}
    for k in _MEASURED:
        found["fvu"][str(k)], found["cknna"][str(k)] = _at(sae, k, new)
    texts = lead_texts(settings["rows"])
    named = _named(sae, x, folder, seed, new, [texts[n] for n in held])
    y = torch.from_numpy(data.y)
    edited = _edited(sae, x, y[known], new, y[held], seed)
    return {**found, **named, **edited}


def _used_at(sae: SparseAutoencoder, k: int) -> SparseAutoencoder:
    """The same SAE that keeps another number of features."""
    other = sae.clone()
    kept: dict[str, Any] = {"k": k}
    if isinstance(sae.config, MSAEConfig):
        kept["ks"] = sae.config.levels
    other.config = replace(sae.config, **kept)
    return other


@torch.no_grad()
def _at(sae: SparseAutoencoder, k: int, x: Tensor) -> tuple[float, float | None]:
    """FVU over all of x at k, and how far codes have the neighbours of rows."""
    used = _used_at(sae, k)
    codes = used.encode_sparse(x)
    error = (x - used.decode(codes, like=x)).square().sum()
    few = used.encode(x[:_ALIGNED])
    return float(error / (x - x.mean(0)).square().sum()), cknna(x[:_ALIGNED], few)


@torch.no_grad()
def _named(
    sae: SparseAutoencoder, x: Tensor, folder: Path, seed: int, new: Tensor, texts: Sequence[str]
) -> dict[str, Any]:
    """How many features have a name, and whether texts with that word have the feature."""
    vocabulary, embedded = words(folder, _WORDS)
    fires = sae.encode_sparse(x).counts() > 0
    directions = functional.normalize(sae.decoder_directions(), dim=1)[fires]
    null = like_rows(x, _NULL, seed=seed)
    names = name_directions(directions, torch.from_numpy(embedded), null)
    others = name_directions(
        like_rows(x, len(directions), seed=1000 + seed), torch.from_numpy(embedded), null
    )
    told, shuffled = _told(names, sae.encode(new)[:, fires], vocabulary, texts, seed)
    return {
        "alive": int(fires.sum()),
        "named": float(names.named.double().mean()),
        "named_random": float(others.named.double().mean()),
        "told": told,
        "told_shuffled": shuffled,
    }


def _told(
    names: ConceptNames, codes: Tensor, vocabulary: Sequence[str], texts: Sequence[str], seed: int
) -> tuple[float, float]:
    """Mean AUC of named features for their word in held-out texts, and for another one's."""
    there = {
        word: np.array([str(vocabulary[word]) in str(each).lower() for each in texts])
        for word in names.word[names.named].unique().tolist()
    }
    chosen = [
        (feature, int(names.word[feature]))
        for feature in names.named.nonzero()[:, 0].tolist()
        if there[int(names.word[feature])].sum() > 1
    ]
    given = [word for _, word in chosen]
    mixed = np.random.default_rng(seed).permutation(given).tolist()
    scores = codes.double().numpy()
    return tuple(  # type: ignore[return-value]
        float(np.mean([auc(scores[:, n], there[w]) for (n, _), w in zip(chosen, by, strict=True)]))
        if chosen
        else 0.5
        for by in (given, mixed)
    )


@torch.no_grad()
def _edited(
    sae: SparseAutoencoder,
    x: Tensor,
    y: Tensor,
    new: Tensor,
    of_new: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Rows of other topics with a topic's feature raised: their neighbours, and what a probe says.

    The feature is the one that tells the topic best among training rows. The rows' error stays.
    """
    codes, mean = sae.encode(x), x.mean(0)
    length = float((x - mean).norm(dim=1).mean())
    unit, weight = functional.normalize(x, dim=1), _probe(x - mean, y)
    null = like_rows(x, len(topics()), seed=2000 + seed)
    found: dict[str, list[dict[str, float]]] = {"feature": [], "random": []}
    for number in range(len(topics())):
        label = y == number
        difference = codes[label].mean(0) - codes[~label].mean(0)
        chosen = int((difference / codes.std(0).clamp_min(1e-6)).argmax())
        rows = new[of_new != number][:_EDITED]
        for name, direction in (
            ("feature", functional.normalize(sae.decoder_directions()[chosen], dim=0)),
            ("random", null[number]),
        ):
            at: dict[str, float] = {}
            for strength in (0.0, *_STRENGTHS):
                moved = rows + strength * length * direction
                nearest = (functional.normalize(moved, dim=1) @ unit.T).topk(_NEAREST).indices
                called = ((moved - mean) @ weight).argmax(1) == number
                at[f"neighbours {strength:g}"] = float(label[nearest].double().mean())
                at[f"called {strength:g}"] = float(called.double().mean())
            found[name].append(at)
    return {
        name: {key: float(np.mean([each[key] for each in many])) for key in many[0]}
        for name, many in found.items()
    }


def _probe(centred: Tensor, y: Tensor) -> Tensor:
    """Weights [d_in, class] of a ridge regression on which class a row is of."""
    wanted = functional.one_hot(y).double()
    rows = centred.double()
    square = rows.T @ rows
    ridge = 0.01 * float(square.diagonal().mean()) * torch.eye(len(square), dtype=square.dtype)
    return torch.linalg.solve(square + ridge, rows.T @ (wanted - wanted.mean(0))).float()


def findings(rows: Sequence[Row]) -> Findings:
    """MSAE beside TopK of each k, over all k; names and edits beside random directions."""
    claims = [
        claim(
            f"FVU, mean over k of {_MEASURED[0]} to {_MEASURED[-1]}, is below {_called(kind)}",
            _over_ks(rows, "fvu", "msae"),
            _over_ks(rows, "fvu", kind),
            lower=True,
        )
        for kind in _KINDS
        if kind != "msae"
    ]
    claims += [
        claim(
            f"codes have more of the rows' neighbours (CKNNA, mean over k) than {_called(kind)}",
            _over_ks(rows, "cknna", "msae"),
            _over_ks(rows, "cknna", kind),
        )
        for kind in _KINDS
        if kind != "msae"
    ]
    claims.append(
        claim(
            "features are nearer to a word than 99% of random directions, more often than others",
            column(rows, "named", kind="msae"),
            column(rows, "named_random", kind="msae"),
        )
    )
    claims.append(
        claim(
            "named features tell held-out texts that have the word (AUC), beside another's word",
            column(rows, "told", kind="msae"),
            column(rows, "told_shuffled", kind="msae"),
        )
    )
    for key, says in (
        ("neighbours 1", "neighbours of a row are of a topic whose feature is raised"),
        ("called 1", "a probe calls a row by a topic whose feature is raised"),
    ):
        claims.append(
            claim(
                f"{says}, more often than along a random direction",
                _edit(rows, "feature", key),
                _edit(rows, "random", key),
            )
        )
    return Findings(
        claims=(*claims,),
        why=_WHY,
        tables=(*_tables(rows),),
        charts=(*_charts(rows),),
    )


_WHY = (
    "MSAE is near the best at every k, and above the TopK SAEs of 16 and 64 at their own; that "
    "of 4 is a little better at 2 and 4, that of 64 at 128, and each fails far from its k. That "
    "its codes keep more of the rows' neighbours is not so: the sparser an SAE was trained, the "
    "more they keep. One feature in six has a name that is nearer than those of 99% of random "
    "directions, and tells texts with that word better than another's. Raising a topic's "
    "feature moves search and a probe almost wholly, a random direction of the same length "
    "hardly."
)


def _called(kind: str) -> str:
    return "MSAE" if kind == "msae" else f"TopK trained at k = {kind.split()[1]}"


def _at_each(rows: Sequence[Row], value: str, kind: str) -> list[Mapping[str, float]]:
    """A value by k, or by strength, of every seed."""
    found: Any = column(rows, value, kind=kind)
    return found


def _over_ks(rows: Sequence[Row], value: str, kind: str) -> list[float]:
    return [float(np.mean(list(each.values()))) for each in _at_each(rows, value, kind)]


def _edit(rows: Sequence[Row], name: str, key: str) -> list[float]:
    return [each[key] for each in _at_each(rows, name, "msae")]


def _tables(rows: Sequence[Row]) -> list[Table]:
    kinds = tuple(kind for kind in _KINDS if column(rows, "alive", kind=kind))
    by_k = [
        Table(
            title=title,
            about="On held-out rows, by the k that is used; ± is half of a 95% interval over "
            "seeds.",
            columns=("trained as", *map(str, _MEASURED)),
            rows=tuple(
                (
                    _called(kind),
                    *(
                        spread([each[str(k)] for each in _at_each(rows, value, kind)])
                        for k in _MEASURED
                    ),
                )
                for kind in kinds
            ),
        )
        for value, title in (("fvu", "FVU"), ("cknna", "CKNNA of codes and rows"))
    ]
    names = Table(
        title="Names",
        about="Share of features that are nearer to one of "
        f"{_WORDS} words than 99% of random directions, and of other random directions; AUC of "
        "named features for held-out texts with the word, and with another feature's word.",
        columns=("trained as", "named", "random", "AUC", "another's word"),
        rows=tuple(
            (
                _called(kind),
                *(
                    spread(column(rows, key, kind=kind))
                    for key in ("named", "named_random", "told", "told_shuffled")
                ),
            )
            for kind in kinds
        ),
    )
    return [*by_k, names, _edits(rows)]


def _edits(rows: Sequence[Row]) -> Table:
    return Table(
        title="Raising a topic's feature of MSAE in rows of other topics",
        about="Share of ten nearest training rows, and of rows called so by a linear probe, that "
        "are of the topic; mean over topics. Strengths are in mean lengths of rows.",
        columns=("strength", "neighbours", "random direction", "probe", "random direction, probe"),
        rows=tuple(
            (
                f"{strength:g}",
                *(
                    spread(_edit(rows, name, f"{key} {strength:g}"))
                    for key in ("neighbours", "called")
                    for name in ("feature", "random")
                ),
            )
            for strength in (0.0, *_STRENGTHS)
        ),
    )


def _charts(rows: Sequence[Row]) -> list[Chart]:
    return [
        Chart(
            key=value,
            title=title,
            x="k used",
            y=y,
            log_x=True,
            series=(*by_name({_called(kind): _line(rows, value, kind) for kind in _KINDS}),),
            form=".3f",
        )
        for value, title, y in (
            ("fvu", "Reconstruction at every k", "FVU"),
            ("cknna", "Neighbours that codes keep, at every k", "CKNNA"),
        )
    ]


def _line(rows: Sequence[Row], value: str, kind: str) -> Mapping[float, Any]:
    return {
        float(k): points(
            [{**row, "at": row[value][str(k)], "k": k} for row in rows], "at", "k", kind=kind
        )[k]
        for k in _MEASURED
    }


PAPER = Paper(
    title="Interpreting CLIP with hierarchical sparse autoencoders (MSAE)",
    citation="Zaigrajew, Baniecki and Biecek, ICML 2025, arXiv 2502.20578",
    claim="An SAE of CLIP embeddings whose loss is over nested TopK levels reconstructs at every "
    "sparsity nearly as well as one trained for it alone, where TopK trained at one k fails at "
    "others, and its codes keep the embeddings' neighbours. Its features can be named by words' "
    "embeddings, over a hundred of them surely; raising one moves similarity search and an "
    "attribute classifier as the name says.",
    run=(
        "Embeddings of MiniLM (384 dimensions) of the first 60 characters of 6,000 of Wikipedia's "
        f"leads, with their 11 topics; 1,000 are held out, drawn by the seed. Dictionaries of "
        f"{_D_SAE:,} features, {_PASSES} passes, the same batches for all kinds of a seed. MSAE's "
        f"levels are {', '.join(map(str, _LEVELS))}, weighted equally; TopK is trained at each of "
        f"them. Every SAE is used at {', '.join(map(str, _MEASURED))} features.",
        f"Words are the leads' {_WORDS} most frequent of four letters or more, embedded by "
        "themselves. The null of a name is Gaussian directions with the rows' covariance: a "
        "feature has a name if it is nearer to its word than 99% of them are to theirs. Whether "
        "the name is right is asked of held-out texts: does the feature tell those that have the "
        "word, beside words dealt out anew among the features? For an edit a topic's feature is "
        "the one that tells it best in training rows; it is raised in held-out rows of other "
        "topics, beside a random direction of the same length, and their error stays.",
    ),
    easier="It is the paper's claim with sentences in place of pictures and a thousandth of its "
    "rows, for one modality: MiniLM has no second tower, so words are embedded by the same "
    "encoder, which is easier than CLIP's text naming picture features. The paper encodes with all "
    "positive pre-activations unless k is given; here k is always given. Topics, chosen by labels, "
    "stand for the paper's faces' attributes.",
    trials=trials,
    measure=measure,
    findings=findings,
    configs=("msae-harvest.toml", "msae.toml"),
    scale="CLIP ViT-L/14 itself over pictures that you bring, on one GPU; not run here. What is "
    "harvested is its pooled state of 1,024 dimensions; the paper takes the 768 after the "
    "projection that joins pictures and texts, which names by CLIP's text tower need.",
)
