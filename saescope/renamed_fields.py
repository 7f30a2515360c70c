"""Old names of configuration fields that have been renamed.

A renamed field says what it was called before:

    mix_layers: ... = field(default=None, metadata={WAS: "mix"})

Files, options and dictionaries are read under either name; the old one is answered with one line
that says the new one, and both together are an error. What is saved (manifests, hashes, the
settings of a run) keeps the old name, so that a setting is the same to every version.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from saescope.errors import InputError
from saescope.terminal import complain

WAS = "was"
_said: set[tuple[str, str]] = set()


def saved_name(field: Field[Any]) -> str:
    """The name that a field has in what is saved."""
    return field.metadata.get(WAS, field.name)


def with_current_names(
    cls: type, values: Mapping[str, Any], where: str, *, _path: str = ""
) -> dict[str, Any]:
    """Raw values of a configuration class, and of the tables in it, under the fields' new names.

    Raises InputError for a field that is given under both of its names.
    """
    found = dict(values)
    hints = field_types(cls)
    for field in fields(cls):
        old = field.metadata.get(WAS)
        if old is not None and old in found:
            if field.name in found:
                raise _given_twice(f"{_path}{old}", f"{_path}{field.name}", where)
            _say(f"{_path}{old}", f"{_path}{field.name}", where)
            found[field.name] = found.pop(old)
        if field.name in found:
            inside = f"{_path}{field.name}."
            for table in _tables(hints[field.name]):
                found[field.name] = _in_tables(table, found[field.name], where, inside)
    return found


def _in_tables(cls: type, value: Any, where: str, path: str) -> Any:
    if isinstance(value, Mapping):
        return with_current_names(cls, value, where, _path=path)
    if isinstance(value, list):
        return [_in_tables(cls, each, where, path) for each in value]
    return value


def with_current_options(cls: type, words: Sequence[str]) -> list[str]:
    """Command-line words with the new names in `--a.b`, `--a.b=value` and `--a.no-b`.

    Raises InputError for a field that is given under both of its names.
    """
    found, renamed = [], {}
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            old = option.removeprefix("--").replace("-", "_")
            new = ".".join(_current_path(cls, old.split(".")))
            if new != old:
                renamed[new] = old
                word = f"--{new}{equals}{value}"
        found.append(word)
    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words]
    for new, old in renamed.items():
        if new in given:
            raise _given_twice(f"--{old}", f"--{new}", "command line")
        _say(f"--{old}", f"--{new}", "command line")
    return found


def _current_path(cls: type, path: list[str]) -> Iterator[str]:
    """The new names of a path's fields; what is no field stays as it is."""
    for depth, name in enumerate(path):
        off = "no_" if name.startswith("no_") else ""
        for field in fields(cls):
            if name in (field.name, field.metadata.get(WAS)):
                name = field.name
            elif off and name == f"{off}{field.metadata.get(WAS)}":
                name = f"{off}{field.name}"
        yield name
        tables = _tables(field_types(cls).get(name))
        if not tables:
            yield from path[depth + 1 :]
            return
        cls = tables[0]


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(cls)


def _tables(hint: Any) -> list[type]:
    """The dataclasses in a type: itself, or of which it is an option or a tuple."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [table for each in get_args(hint) for table in _tables(each)]


def _given_twice(old: str, new: str, where: str) -> InputError:
    return InputError(f"{old} is the old name of {new}: give one of them", where=where)


def _say(old: str, new: str, where: str) -> None:
    """Say once in a process what a field is called now."""
    if (old, new) not in _said:
        _said.add((old, new))
        complain(f"{where}: {old} is called {new} now; the old name is still read")
