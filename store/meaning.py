"""Search of labels and notes by meaning: the nearest embeddings to that of a text.

Who asks hands over the embedding as a function, since this package has no models. Embeddings are
kept in a file of their own beside the annotations, by the hashes of text and model: it may be taken
away at any time, and is made anew.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saescope.errors import InputError
from saescope.integers import as_index
from store.annotations import Annotations

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""from n texts to their embeddings [n, d], each of length one"""
SUFFIX = ".embeddings.sqlite"
_AT_ONCE = 64
_TABLE = (
    "CREATE TABLE IF NOT EXISTS embedding"
    " (model TEXT, text TEXT, vector BLOB, PRIMARY KEY (model, text))"
)


@dataclass(frozen=True)
class Meant:
    """A feature whose label or note is near to what was looked for."""

    feature: int
    cosine: float
    text: str
    """the label or note that is nearest"""


def search_meaning(
    notes: Annotations, text: str, embed: Embed, *, model: str, limit: int = 50
) -> list[Meant]:
    """Features whose label, note or machine label means about the same as a text, nearest first.

    Args:
        embed: gives the embeddings of texts; it is asked for those alone that are not kept yet.
        model: names the model behind `embed`, by the hash of its weights.

    Cost: 1 ms for 1,000 labels, and the embedding of `text` and of labels that are new.

    Raises InputError for an empty text, and for embeddings that are not [n, d] of length one.
    """
    limit = as_index(limit, where="limit", low=0)
    if not isinstance(text, str) or not text.strip():
        raise InputError("has no words", where="text", given=text)
    about = notes.texts()
    if not about:
        return []
    known = sorted({said for _, said in about})
    vectors = _embedded(notes.path, [*known, text.strip()], embed, model)
    cosine = dict(zip(known, (vectors[:-1] @ vectors[-1]).tolist(), strict=True))
    found: dict[int, Meant] = {}
    for feature, said in about:
        if feature not in found or cosine[said] > found[feature].cosine:
            found[feature] = Meant(feature, cosine[said], said)
    return sorted(found.values(), key=lambda each: (-each.cosine, each.feature))[:limit]


def _embedded(
    annotations: Path, texts: Sequence[str], embed: Embed, model: str
) -> NDArray[np.float32]:
    """Embeddings [n, d] of texts: as they are kept, else made, and kept but for the last one's."""
    file = annotations.with_name(annotations.name.split(".annotations")[0] + SUFFIX)
    kept = _read(file, model)
    names = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    missing = [at for at, name in enumerate(names) if name not in kept]
    for begin in range(0, len(missing), _AT_ONCE):
        some = missing[begin : begin + _AT_ONCE]
        made = np.asarray(embed([texts[at] for at in some]), dtype=np.float32)
        lengths = np.linalg.norm(made, axis=1) if made.ndim == 2 else np.zeros(1)
        if len(made) != len(some) or not np.allclose(lengths, 1, atol=1e-3):
            allow = f"[{len(some)}, d], each of length one"
            raise InputError("gives no embeddings", where="embed", given=made.shape, allowed=allow)
        new = {names[at]: vector for at, vector in zip(some, made, strict=True)}
        kept |= new
        asked = names[-1]
        _save(file, model, ((name, each) for name, each in new.items() if name != asked))
    return np.stack([kept[name] for name in names])


def _read(file: Path, model: str) -> dict[str, NDArray[np.float32]]:
    """What is kept of a model, by hash of the text; nothing of a file that cannot be read."""
    found: dict[str, NDArray[np.float32]] = {}
    if not file.is_file():
        return found
    with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as con:
        rows = con.execute("SELECT text, vector FROM embedding WHERE model = ?", [model])
        for name, vector in rows:
            if isinstance(vector, bytes) and len(vector) % 4 == 0:
                found[name] = np.frombuffer(vector, dtype="<f4")
    sizes = [len(vector) for vector in found.values()]
    usual = max(set(sizes), key=sizes.count) if sizes else 0
    return {name: each for name, each in found.items() if len(each) == usual and _is_unit(each)}


def _is_unit(vector: NDArray[np.float32]) -> bool:
    return bool(abs(float(np.linalg.norm(vector)) - 1) < 1e-3)


def _save(file: Path, model: str, vectors: Iterable[tuple[str, NDArray[np.float32]]]) -> None:
    """Keep embeddings; where the file cannot be written, they are made again the next time."""
    rows = [(model, name, each.astype("<f4").tobytes()) for name, each in vectors]
    with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=5)) as con, con:
        con.execute(_TABLE)
        con.executemany("INSERT OR REPLACE INTO embedding VALUES (?, ?, ?)", rows)
