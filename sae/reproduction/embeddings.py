"""Embeddings that papers share: texts by MiniLM, handwritten digits by EfficientNet-Lite0.

Both models and both sets of data are packaged. Each is embedded once, into the folder that all
papers share.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from activations import load_model
from activations.corpora.digits import SIDE, digits
from activations.corpora.sources import PACKAGED_CORPORA
from activations.models.sentences import Sentences
from saescope.artefact import atomic_path
from saescope.assets import read_member
from saescope.replacing import PLAIN_FILE

_CHARACTERS = 60
"""of a lead that are embedded"""
_PIXELS = 112
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_POOLED = "module:_avg_pooling:output"
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings whose classes are known."""

    x: Float[NDArray[np.float32], "row d_in"]
    y: Int[NDArray[np.int64], " row"]
    """number of each row's class"""
    queries: Float[NDArray[np.float32], "row d_in"] | None = None
    """another text about the same thing as each row, embedded"""


def topics() -> tuple[str, ...]:
    """The classes of Wikipedia's leads, by number."""
    return tuple(sorted({each["topic"] for each in _articles()}))


def leads(folder: Path, most: int | None = None) -> Embedded:
    """The beginnings of Wikipedia's leads, with their topics, and what they are about in a phrase.

    `most`: that many of them, from all over, if not all 9,033.
    """

    def compute() -> Mapping[str, NDArray[Any]]:
        articles = _spread(_articles(), most)
        model, number = Sentences(), {name: n for n, name in enumerate(topics())}
        return {
            "x": _texts(model, lead_texts(most)),
            "queries": _texts(model, [each["description"] or "" for each in articles]),
            "y": np.array([number[each["topic"]] for each in articles]),
        }

    return Embedded(**_kept(folder, f"leads-{most or 'all'}", compute))


def lead_texts(most: int | None = None) -> list[str]:
    """The texts that `leads` embeds, in its order."""
    return [each["extract"][:_CHARACTERS] for each in _spread(_articles(), most)]


def words(folder: Path, most: int) -> tuple[tuple[str, ...], Float[NDArray[np.float32], "word d"]]:
    """The most frequent words of the leads, of four letters or more, each embedded by itself."""
    found = Counter(
        word for each in _articles() for word in set(re.findall(r"[a-z]{4,}", each["extract"]))
    )
    chosen = tuple(word for word, _ in sorted(found.items(), key=lambda w: (-w[1], w[0]))[:most])
    kept = _kept(folder, f"words-{most}", lambda: {"x": _texts(Sentences(), chosen)})
    return chosen, kept["x"]


def digit_pictures(folder: Path, most: int | None = None) -> Embedded:
    """Pictures of digits, at 112 pixels, by the network's pooled last features (1280)."""

    def compute() -> Mapping[str, NDArray[Any]]:
        pixels, y = digits()
        chosen = np.array(_spread(range(len(y)), most))
        model = load_model("efficientnet-lite0", kind="vision", dtype="float32")
        found = [
            model.capture(_prepared(part), [_POOLED])[_POOLED].flatten(1).float().numpy()
            for part in torch.from_numpy(pixels[chosen]).split(_BATCH)
        ]
        return {"x": np.concatenate(found), "y": y[chosen]}

    return Embedded(**_kept(folder, f"digits-{most or 'all'}", compute))


def _prepared(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [batch, 784] in [0, 1] as the network takes them [batch, 3, 112, 112]."""
    grey = pixels.view(-1, 1, SIDE, SIDE)
    large = torch.nn.functional.interpolate(grey, size=(_PIXELS, _PIXELS), mode="bicubic")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in _IMAGENET)
    return (large.clamp(0, 1) - mean) / std


def _articles() -> list[Mapping[str, str]]:
    known = json.loads(read_member("wikipedia", PACKAGED_CORPORA["wikipedia"])).values()
    return [each for each in known if each["topic"] != "Uncategorized"]


def _spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """So many of the items, at equal distances."""
    at = np.linspace(0, len(items), min(most or len(items), len(items)), endpoint=False)
    return [items[int(each)] for each in at]


def _texts(model: Sentences, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings of texts in their order; texts of one length together, which pads least."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    found = np.concatenate([model.embed([texts[n] for n in part]) for part in _batches(order)])
    embedded = np.empty_like(found)
    embedded[order] = found
    return embedded


def _batches(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]


def _kept(
    folder: Path, name: str, compute: Callable[[], Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """Arrays of a file beside a paper's folder, which are computed once."""
    path = folder.parent / "embeddings" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, PLAIN_FILE, replace=True) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **compute())
    with np.load(path) as kept:
        return dict(kept)
