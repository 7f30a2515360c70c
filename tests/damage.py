"""Damage done to harvests on purpose, at random, and stores of older schemas."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activations import ActivationStore
from saescope.paths import AnyPath, listing, local, read_bytes

GROUP = "activations.zarr"
SITES = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.0.hook_resid_post")
"""The first and the last are as wide, so that their chunks can be swapped."""


@dataclass(frozen=True)
class Damage:
    """What was done to which files, named relative to the store."""

    kind: str
    paths: tuple[str, ...]


def files_of(folder: AnyPath) -> dict[str, bytes]:
    """Every file or object in a folder, by its name there."""
    entries = listing(folder)

    def walk(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, is_folder in entries(parts):
            yield from walk((*parts, name)) if is_folder else [(*parts, name)]

    return {"/".join(parts): read_bytes(folder.joinpath(*parts)) for parts in walk(())}


def content(folder: AnyPath) -> dict[str, Any]:
    """Everything a store holds, but what tells when, where and with which versions it was made."""
    found: dict[str, Any] = {**files_of(folder)}
    manifest = json.loads(found["manifest.json"])
    manifest["config"]["out"] = None
    left_out = ("created", "versions", "commit", "sha256")
    found["manifest.json"] = {k: v for k, v in manifest.items() if k not in left_out}
    return found


def assert_same_content(one: AnyPath, other: AnyPath) -> None:
    first, second = content(one), content(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def chunk_files(folder: Path) -> list[Path]:
    """Chunks and lists of documents."""
    chunks = [path for path in folder.glob(f"{GROUP}/*/c/**/*") if path.is_file()]
    return sorted([*chunks, *folder.glob("documents.parquet/*")])


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(folder: Path, chance: random.Random) -> Damage:
    """One byte of any file but a manifest, whose repair is impossible, changes."""
    files = [path for path in all_files(folder) if path.name != "manifest.json"]
    path = chance.choice([file for file in files if file.stat().st_size])
    changed = bytearray(path.read_bytes())
    changed[chance.randrange(len(changed))] ^= chance.randrange(1, 256)
    if path.name == "zarr.json" and _same_json(path.read_bytes(), bytes(changed)):
        return flip(folder, chance)  # white space: not damage
    path.write_bytes(changed)
    return _damage("flip", folder, path)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def truncate(folder: Path, chance: random.Random) -> Damage:
    path = chance.choice(chunk_files(folder))
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])
    return _damage("truncate", folder, path)


def delete(folder: Path, chance: random.Random) -> Damage:
    path = chance.choice(chunk_files(folder))
    path.unlink()
    return _damage("delete", folder, path)


def swap(folder: Path, chance: random.Random) -> Damage:
    """Two whole chunks of the same size, of one site or of two, in each other's place."""
    one, other = _pair(folder, chance)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return _damage("swap", folder, one, other)


def overwrite(folder: Path, chance: random.Random) -> Damage:
    """A whole chunk in the place of another."""
    one, other = _pair(folder, chance)
    other.write_bytes(one.read_bytes())
    return _damage("overwrite", folder, other)


def _pair(folder: Path, chance: random.Random) -> tuple[Path, Path]:
    while True:
        one, other = chance.sample(chunk_files(folder), 2)
        first, second = one.read_bytes(), other.read_bytes()
        if first != second and len(first) == len(second):
            return one, other


def _damage(kind: str, folder: Path, *paths: Path) -> Damage:
    return Damage(kind, tuple(str(path.relative_to(folder)) for path in paths))


DAMAGES: tuple[Callable[[Path, random.Random], Damage], ...] = (
    flip, truncate, delete, swap, overwrite
)  # fmt: skip


def restore(folder: Path, whole: Path, damage: Damage) -> None:
    """Undo damage by copying from a whole store."""
    for name in damage.paths:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / name, folder / name)


def as_schema_1(path: AnyPath) -> None:
    """Make a store what the first schema was: windows in the manifest, nothing sealed."""
    folder = local(path)
    windows = [vars(window) for window in ActivationStore.open(folder).windows]
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("ledger", "arrays", "sha256"):
        del manifest[name]
    manifest |= {"schema": 1, "windows": windows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "windows.jsonl").unlink()
