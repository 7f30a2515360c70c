"""The blocks of code in the documentation, and a small world in which they can be run.

A block is run as it stands, unless an HTML comment on the line before its fence says otherwise:

    <!-- not run: the reason -->            its `saescope` commands are still parsed
    <!-- config: harvest -->                a TOML file, or a piece of one, of this command
    <!-- config: harvest, file: my.toml --> the same, and later blocks can use the file
    <!-- file: my.py -->                    a module, for later blocks to import

Blocks of `text` are output and of `json` and `html` are shown only. All blocks of a page run in one
folder, in order; Python blocks share their names.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tests.tiny
from sae import architectures, evaluation
from saescope import config, metrics, plugins
from saescope.__main__ import main
from saescope.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = ("text", "json", "html")
FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>(?:not run|config|file): [^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)

INCLUDED = re.compile(r"^--8<--\n(.+?)\n--8<--\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    body: str
    mark: str = ""

    @property
    def runs(self) -> bool:
        return self.language not in SHOWN and not self.mark.startswith("not run:")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page; a file that a block includes (`--8<--`) is its body."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] or "\n" for line in match["body"].splitlines(keepends=True))
        body = INCLUDED.sub(lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), body)
        line = text.count("\n", 0, match.start("language")) + 1
        language = match["language"].split(" ")[0]
        found.append(Block(page, line, language, body, match["mark"] or ""))
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of bash, as words without comments."""
    joined = block.body.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def saescope_words(words: list[str]) -> list[str] | None:
    """What follows `saescope` (alone, or behind `torchrun ... -m`, `srun ...`), None if nothing."""
    if words[0] == "saescope":
        return words[1:]
    if words[0] in ("torchrun", "srun") and "saescope" in words:
        return words[words.index("saescope") + 1 :]
    return None


def parse(words: list[str]) -> config.Config:
    """The configuration of a command; as the command line does it, but nothing is run."""
    command = COMMANDS[words[0]]
    cls = getattr(importlib.import_module(command.module), command.config)
    with plugins.taken_from(words[1:]) as rest:
        return config.parse(
            cls, rest, program=words[0], description="", positional=command.positional
        )


def check_commands(block: Block) -> None:
    """Every saescope command of a block is one, and every make target exists."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(block):
        ours = saescope_words(words)
        if ours and not config.asks_for_help(ours):
            try:
                parse(ours)
            except SystemExit:
                pytest.fail(f"{block}: {shlex.join(words)}")
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), (str(block), target)


def run_bash(block: Block) -> None:
    """Run each command; saescope's in this process."""
    check_commands(block)
    for words in commands(block):
        if words[0] == "saescope":
            assert main(words[1:]) == 0, f"{block}: {shlex.join(words)}"
        elif words[0] == "cd":
            os.chdir(words[1])
        else:
            assert words[0] in ("mkdir", "cp", "ls", "cat", "mv"), f"{block}: {words[0]} is not run"
            subprocess.run(words, check=True)


def check_toml(block: Block) -> None:
    """Check a configuration, or what a piece of one makes of an example's."""
    fields = dict(each.split(": ") for each in block.mark.split(", ") if each)
    assert "config" in fields, f"{block}: <!-- config: COMMAND --> is missing before it"
    name = fields["config"]
    values: dict[str, Any] = tomllib.loads(block.body)
    command = COMMANDS[name]
    cls = getattr(importlib.import_module(command.module), command.config)
    if "file" in fields:
        Path(fields["file"]).write_text(block.body, encoding="utf-8")
        config.load(cls, fields["file"])
        return
    example = {"harvest": "harvest/smollm2-135m-wikipedia", "train": "train/topk"}.get(name)
    base = config.read_toml(ROOT / "configs" / f"{example}.toml") if example else {}
    config.from_dict(cls, {**base, **values}, str(block))


def run_page(found: list[Block]) -> None:
    """Run a page's blocks in the current folder."""
    names: dict[str, Any] = {"__name__": "docs"}
    for block in found:
        if not block.runs:
            if block.language == "bash":
                check_commands(block)
        elif block.language == "python" and block.mark:
            Path(block.mark.removeprefix("file: ")).write_text(block.body, encoding="utf-8")
        elif block.language == "python":
            source = "\n" * block.line + block.body
            exec(compile(source, str(block.page), "exec"), names)
        elif block.language == "bash":
            run_bash(block)
        elif block.language == "toml":
            check_toml(block)
        elif block.language == "sql":
            run_sql(block)
        else:
            pytest.fail(f"{block}: blocks of {block.language!r} are not known")


def run_sql(block: Block) -> None:
    """Each query finds something in the store of the quick demo."""
    import duckdb

    path = "stores/smollm2-135m-topk-quick/features.duckdb"
    with duckdb.connect(path, read_only=True) as connection:
        for query in filter(str.strip, block.body.split(";")):
            assert connection.execute(query).fetchall(), f"{block}: {query}"


LAYERS, CONTEXT, ARTICLES = 10, 128, 100
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def make_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demos leave behind, small: data/, runs/, stores/, beside configs/ and texts/."""
    use_tiny_packages(folder, monkeypatch)
    monkeypatch.chdir(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    run, store = "runs/smollm2-135m-topk", "stores/smollm2-135m-topk"
    for words in (
        ["harvest", "configs/harvest/smollm2-135m-wikipedia.toml"],
        ["train", "configs/train/topk.toml", "--passes", "1", "--sae.d-sae", "256"],
        ["eval", run, "--tokens", "256"],
        ["index", run, "--out", store],
    ):
        assert main(words) == 0, words
    shutil.copytree("data/smollm2-135m-wikipedia", "data/smollm2-135m-quick")
    for path in (run, store):
        shutil.copytree(path, f"{path}-quick")


@contextmanager
def known_as_before() -> Iterator[None]:
    """Architectures, metrics and modules that blocks add are forgotten at the end."""
    registries: list[Any] = [architectures._REGISTRY, evaluation._REGISTRY, metrics._TABLE]
    architectures.list_architectures()
    evaluation.families()
    before = [dict(registry) for registry in registries]
    loaded, modules = set(architectures._LOADED), set(sys.modules)
    here = {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")}
    try:
        yield
    finally:
        for registry, known in zip(registries, before, strict=True):
            registry.clear()
            registry.update(known)
        architectures._LOADED.intersection_update(loaded)
        for name in here & (set(sys.modules) - modules):
            del sys.modules[name]


def use_tiny_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged model and text are tiny ones: 10 layers of width 32; 100 articles."""
    monkeypatch.setattr(tests.tiny, "N_LAYERS", LAYERS)
    monkeypatch.setattr(tests.tiny, "N_CTX", CONTEXT)
    model = folder / "packages" / "model"
    if not model.exists():
        tests.tiny.make_tiny_model(model)
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    monkeypatch.setattr("activations.models.files.packaged_folder", lambda _: model)
    articles = {f"Article {n}": {"extract": text} for n, text in enumerate(_articles())}
    monkeypatch.setattr("saescope.assets.read_member", lambda *_: json.dumps(articles))


def _articles() -> Iterator[str]:
    for number in range(ARTICLES):
        first = number % len(tests.tiny.SENTENCES)
        second = (number * 3 + number // 7) % len(tests.tiny.SENTENCES)
        yield f"{tests.tiny.SENTENCES[first]} {tests.tiny.SENTENCES[second]} Article {number}."
