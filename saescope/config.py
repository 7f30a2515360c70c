"""Configuration: frozen dataclasses, read from TOML, checked strictly, overridden by options.

Every field has a docstring, which is its help text; unknown keys are errors that name their path.
A field that was renamed is read under its old name, too (renamed_fields).
"""

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from saescope.errors import ArtefactError, InputError, SaescopeError
from saescope.examples import how_to_get
from saescope.integers import as_index, as_indices
from saescope.paths import local
from saescope.renamed_fields import (
    field_types,
    saved_name,
    with_current_names,
    with_current_options,
)
from saescope.system import read_whole, system_errors
from saescope.terminal import complain, harmless_errors


class Config:
    """Base of every configuration dataclass; carries how pydantic is to check it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    SELECTORS: ClassVar[tuple[str, ...]] = ()
    """Dotted fields whose value decides which class another field has (see `specialise`)."""

    SPELLED: ClassVar[Mapping[str, str]] = {}
    """Options by words that cannot name a field, and the fields that they stand for."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a class's own checks see Python's numbers."""
        super().__init_subclass__(**options)
        checks = vars(cls).get("__post_init__")
        if checks is None:
            return

        @wraps(checks)
        def post_init(self: Config) -> None:
            _use_pythons_numbers(self)
            checks(self)

        cls.__post_init__ = post_init  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        _use_pythons_numbers(self)

    @classmethod
    def specialise(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class for these raw values; overridden where a field's class depends on them."""
        del values
        return cls


ConfigT = TypeVar("ConfigT", bound=Config)
_DEEPEST, _LARGEST_FILE = 50, 1 << 20


def _use_pythons_numbers(config: Config) -> None:
    """Replace numbers of NumPy and torch in a configuration by Python's.

    Raises InputError for a whole number's field that has something else.
    """
    hints = field_types(type(config))
    for field in fields(config):  # type: ignore[arg-type]
        given: Any = getattr(config, field.name)
        kind = hints[field.name]
        if given is None and kind is not int:
            continue
        if kind in (int, int | None):
            found: Any = as_index(given, where=field.name)
        elif kind == tuple[int, ...]:
            found = tuple(as_indices(given, where=field.name))
        elif given is not None and getattr(given, "ndim", None) == 0:
            found = given.item()
        else:
            continue
        object.__setattr__(config, field.name, found)


def to_dict(config: object) -> Any:
    """A configuration as it is saved: nested dicts, lists, strings, numbers, None.

    Fields have the names that they had first, whatever they are called now.
    """
    return _plain(config, saved_name)


def _plain(config: object, name_of: Callable[[Field[Any]], str]) -> Any:
    if is_dataclass(config) and not isinstance(config, type):
        return {
            name_of(field): _plain(getattr(config, field.name), name_of) for field in fields(config)
        }
    if isinstance(config, tuple | list):
        return [_plain(item, name_of) for item in config]
    if isinstance(config, Mapping):
        return {str(key): _plain(value, name_of) for key, value in config.items()}
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Build a configuration from raw values.

    Raises InputError, with the path of the field, on an unknown key, a wrong type or a value out of
    range.
    """
    from pydantic import TypeAdapter, ValidationError

    _check_plain(values, where)
    values = with_current_names(cls.specialise(values), values, where)
    try:
        # JSON mode: strict types, yet lists become tuples and nested tables become dataclasses
        text = json.dumps(values)
        return TypeAdapter(cls.specialise(values)).validate_json(text)
    except ValidationError as error:
        raise InputError(_explain(error.errors(), cls, values), where=where) from None
    except TypeError as error:
        raise InputError(
            f"a value of a kind that configuration cannot hold: {error}", where=where
        ) from None


def _explain(problems: Sequence[Any], cls: type, values: Mapping[str, Any]) -> str:
    lines = []
    for problem in problems:
        path = ".".join(map(str, problem["loc"]))
        kind = problem["type"]
        if kind == "unexpected_keyword_argument":
            line = f"unknown key {path!r}"
            known = _known_fields(cls, values, problem["loc"][:-1])
            if known:
                line += f"; known here: {', '.join(known)}"
        elif kind in ("missing", "missing_argument"):
            line = f"{path} is required"
        elif kind == "value_error":
            line = str(problem["ctx"]["error"])
        else:
            line = f"{path}: {problem['msg']}, given {problem['input']!r}"
        lines.append(line)
    return "; ".join(lines)


def _known_fields(cls: type, values: Mapping[str, Any], path: Sequence[Any]) -> list[str]:
    here: Any = cls.specialise(values) if issubclass(cls, Config) else cls
    for name in path:
        here = get_type_hints(here).get(name)
        if not is_dataclass(here):
            return []
    return [field.name for field in fields(here)]


def _check_plain(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError, with the path of the field, for values that no setting has.

    These are numbers that are not finite or of more than 64 bits, texts with a NUL or of a
    megabyte, and tables in tables without end.
    """
    waiting: list[tuple[str, Any, int]] = [(str(key), value, 1) for key, value in values.items()]
    while waiting:
        path, value, depth = waiting.pop()
        wrong = None
        if depth > _DEEPEST:
            wrong = "is nested too deeply"
        elif isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", each, depth + 1) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}.{n}", each, depth + 1) for n, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            wrong = f"is no finite number, given {value}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            wrong = "is a number of more than 64 bits"
        elif isinstance(value, str) and "\0" in value:
            wrong = "has a NUL character in it"
        if wrong is not None:
            raise InputError(f"{path}: {wrong}", where=where)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; InputError if it is missing, no plain file, or not TOML."""
    try:
        values = tomllib.loads(read_whole(local(path), largest=_LARGEST_FILE).decode())
        _check_plain(values, str(path))
        return values
    except ArtefactError as error:
        raise InputError(str(error)) from None
    except RecursionError:
        raise InputError("not valid TOML: nested too deeply", where=str(path)) from None
    except FileNotFoundError:
        hint = how_to_get(path)
        raise InputError(
            f"no such configuration file{'; ' if hint else ''}{hint}", where=str(path)
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise  # of TOML, UTF-8, or an integer of thousands of digits
        raise InputError(f"not valid TOML: {error}", where=str(path)) from None


def load(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Read a configuration file.

    Raises InputError if it is missing, not TOML, or does not fit `cls`.
    """
    return from_dict(cls, read_toml(path), where=str(path))


def parse(
    cls: type[ConfigT],
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    positional: str | None = None,
) -> ConfigT:
    """A configuration from command-line words: `[CONFIG.toml] [--field value ...]`.

    A first word that is no option is the configuration file if it ends in .toml, else the value of
    the field named by `positional`; where that names several fields, separated by spaces, the next
    words are the values of the next ones, and one that ends in ... takes all that are left. Raises
    InputError for a bad file; exits with 2 for bad options.
    """
    import tyro

    words = list(arguments)
    values: dict[str, Any] = {}
    where = "command line"
    if words and not words[0].startswith("-"):
        first = words.pop(0)
        if first.endswith(".toml"):
            values, where = read_toml(first), first
        elif positional:
            words = _named_words([first, *words], positional)
        else:
            raise InputError(
                "not a configuration file", where=program, given=first, allowed="*.toml"
            )
    words = [_field_option(cls, word) for word in words]
    for name in cls.SELECTORS:
        _select(values, name, words)
    concrete: Any = cls.specialise(values)
    values = with_current_names(concrete, values, where)
    words = with_current_options(concrete, words)
    for name in _required(concrete):
        _select(values, name, words)
    options: dict[str, Any] = {}
    if not asks_for_help(words):
        options["default"] = from_dict(cls, values, where)
    elif values:
        options["default"] = _unfinished(concrete, values, where)
    if asks_for_help(words):
        _join_help_lines(concrete)
    with harmless_errors(), system_errors("standard output"):
        chosen = tyro.cli(
            tyro.conf.AvoidSubcommands[concrete],  # type: ignore[valid-type]
            args=words,
            prog=f"{program} {_first_word(cls, positional)}".rstrip(),
            description=description,
            **options,
        )
    return from_dict(cls, _plain(chosen, lambda field: field.name), where)


def _named_words(words: list[str], positional: str) -> list[str]:
    """Command-line words in which the first ones, which are no options, have become options.

    >>> _named_words(["a", "b", "c", "--d", "1"], "run runs...")
    ['--run=a', '--runs', 'b', 'c', '--d', '1']
    """
    names, count = positional.split(), 0
    while count < len(words) and not words[count].startswith("-"):
        count += 1
    named: list[str] = []
    given, rest = words[:count], words[count:]
    for name in names:
        if given and name.endswith("..."):
            named += [f"--{name.removesuffix('...')}", *given]
            given = []
        elif given:
            named.append(f"--{name}={given.pop(0)}")
    return [*named, *given, *rest]


def _unfinished(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """A configuration to show in help: what is required may be missing.

    Raises InputError as `from_dict` does.
    """
    import tyro

    missing = [name for name in _required(cls) if name not in values]
    found = from_dict(cls, {**values, **dict.fromkeys(missing, "missing")}, where)
    for name in missing:
        object.__setattr__(found, name, tyro.MISSING)
    return found


def _first_word(cls: type[Config], positional: str | None) -> str:
    """What may stand before the options: a value, a configuration file, or either."""
    if positional is None:
        return "[CONFIG.toml]" if fields(cls) else ""  # type: ignore[arg-type]
    return f"[{positional.upper()} | CONFIG.toml]"


def _join_help_lines(cls: type) -> None:
    """Have each field's docstring shown as one text: a line that ends in it is no end in help."""
    import docstring_parser

    for each in field_types(cls).values():
        for inner in (each, *get_args(each)):
            if isinstance(inner, type) and is_dataclass(inner):
                _join_help_lines(inner)
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found = docstring_parser.parse_from_object(base).params
        texts |= {each.arg_name: each.description for each in found if each.description}
    for field in fields(cls):
        if field.name in texts and "help" not in field.metadata:
            text = " ".join(texts[field.name].split())
            field.metadata = MappingProxyType({**field.metadata, "help": text})  # type: ignore[misc]


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether command-line words ask for help."""
    return "--help" in words or "-h" in words


def _required(cls: type[Config]) -> list[str]:
    """Names of the fields without a default; all of ours are strings."""
    found = fields(cls)  # type: ignore[arg-type]
    return [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]


def _field_option(cls: type[Config], word: str) -> str:
    name, equals, value = word.partition("=")
    field = cls.SPELLED.get(name.removeprefix("--")) if name.startswith("--") else None
    return word if field is None else f"--{field}{equals}{value}"


def _select(values: dict[str, Any], selector: str, words: list[str]) -> None:
    """Move `--a.kind value` from the words into the raw values, before they are checked."""
    for index, word in enumerate(words):
        name, _, inline = word.partition("=")
        if name.replace("-", "_") != f"__{selector}":
            continue
        if not inline and index + 1 >= len(words):
            return  # tyro says that the value is missing
        chosen = inline or words[index + 1]
        *path, last = selector.split(".")
        here = values
        for table in path:
            here = here.setdefault(table, {})
        here[last] = chosen
        del words[index : index + (1 if inline else 2)]
        return


def fail(error: SaescopeError) -> int:
    """Print an error of ours as one line on standard error; the exit code for it."""
    complain(str(error))
    return 2
