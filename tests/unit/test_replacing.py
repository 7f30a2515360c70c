"""What may be replaced, in one step, and what a kill leaves behind."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from saescope import exchange, leftovers, replacing
from saescope.artefact import atomic_path, parse_json, read_json, write_json
from saescope.errors import ArtefactError, InputError
from saescope.replacing import PLAIN_FILE, Kind, check_apart, only_files
from saescope.system import reserve

PAIR = Kind("a pair", lambda folder: only_files(folder, ("a", "b")))


def make_pair(folder: Path, text: str, *, replace: bool = False, kind: Kind | None = PAIR) -> None:
    with atomic_path(folder, kind, replace=replace) as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture(params=["exchanged", "two steps"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems that can exchange two names, and those that cannot."""
    if request.param == "two steps":
        monkeypatch.setattr(exchange, "_system_call", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("both")
def test_one_of_the_kind_is_replaced_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "x"
    make_pair(target, "old")
    with pytest.raises(InputError, match=r"x: holds a pair already; --replace"):
        make_pair(target, "new")
    assert content(target) == {"a": "old", "b": "old"}
    make_pair(target, "old")  # the same to the byte
    make_pair(target, "new", replace=True)
    assert content(target) == {"a": "new", "b": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def one_file_more(target: Path) -> None:
    make_pair(target, "old")
    (target / "thesis.txt").write_text("three years")


def one_folder_more(target: Path) -> None:
    make_pair(target, "old")
    (target / "mine").mkdir()


def a_link_inside(target: Path) -> None:
    make_pair(target, "old")
    (target.parent / "elsewhere").write_text("mine")
    (target / "b").unlink()
    (target / "b").symlink_to("../elsewhere")


def a_link_to_a_pair(target: Path) -> None:
    make_pair(target.parent / "elsewhere", "old")
    target.symlink_to("elsewhere")


def a_link_to_nothing(target: Path) -> None:
    target.symlink_to("elsewhere")


def a_file(target: Path) -> None:
    target.write_text("mine")


def one_file_less(target: Path) -> None:
    target.mkdir()
    (target / "a").write_text("mine")


@pytest.mark.parametrize(
    "there",
    [
        one_file_more, one_folder_more, a_link_inside, a_link_to_a_pair, a_link_to_nothing, a_file,
        one_file_less,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [PAIR, None])
@pytest.mark.usefixtures("both")
def test_nothing_else_is_ever_replaced(
    tmp_path: Path, there: Callable[[Path], None], kind: Kind | None
) -> None:
    there(tmp_path / "x")
    before = content(tmp_path)
    links = sorted(p.name for p in tmp_path.rglob("*") if p.is_symlink())
    with pytest.raises(InputError, match=r"x: (holds|is a symbolic link)"):
        make_pair(tmp_path / "x", "new", replace=True, kind=kind)
    assert content(tmp_path) == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_symlink()) == links


@pytest.mark.usefixtures("both")
def test_what_came_while_it_was_prepared_stays(tmp_path: Path) -> None:
    """Nothing was there when it began; or a pair, into which somebody put a file."""
    new, old = tmp_path / "new", tmp_path / "old"
    make_pair(old, "old")
    for target in (new, old):

        def meanwhile(target: Path = target) -> None:
            with atomic_path(target, PAIR, replace=True) as temporary:
                temporary.mkdir()
                target.mkdir(exist_ok=True)
                (target / "thesis.txt").write_text("three years")

        with pytest.raises(InputError, match="holds something else than a pair of ours"):
            meanwhile()
        assert (target / "thesis.txt").read_text() == "three years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_what_came_between_the_last_look_and_the_exchange_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path / "x", "old")
    original = replacing.exchange

    def late(one: Path, other: Path) -> bool:
        (tmp_path / "x" / "thesis.txt").write_text("three years")
        monkeypatch.setattr(replacing, "exchange", original)
        return original(one, other)

    monkeypatch.setattr(replacing, "exchange", late)
    with pytest.raises(InputError, match="holds something else than a pair"):
        make_pair(tmp_path / "x", "new", replace=True)
    assert content(tmp_path / "x") == {"a": "old", "b": "old", "thesis.txt": "three years"}


def test_what_fails_leaves_no_folders(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "a" / "b" / "x", tmp_path / "there" / "x"):
        with pytest.raises(RuntimeError), atomic_path(path):
            raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    make_pair(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"a": "new", "b": "new"}
    (tmp_path / "y").mkdir()
    with (
        pytest.raises(FileExistsError),
        atomic_path(tmp_path / "y", PLAIN_FILE, replace=True) as file,
    ):
        file.write_text("a file in a folder's place")
    assert (tmp_path / "y").is_dir()


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do work in a process that is killed before its so-manieth rename or removal; if it was."""
    pid = os.fork()
    if pid == 0:
        counted = [0]

        def hook(event: str, _: object) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                counted[0] += 1
                if counted[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        import sys

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_at_every_instant_the_old_one_or_the_new_one_is_there(tmp_path: Path, both: str) -> None:
    whole = ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    step, killed, missing = 1, True, 0
    while killed:
        target = tmp_path / str(step) / "x"
        make_pair(target, "old")
        killed = killed_at(step, lambda t=target: make_pair(t, "new", replace=True))
        missing += not target.exists()
        leftovers.settle(target)  # as every reader and every writer does
        assert content(target) in whole
        make_pair(target, "new", replace=True)
        assert content(target) == whole[1]
        assert [path.name for path in target.parent.iterdir()] == ["x"]
        step += 1
    assert step > 3
    assert missing == (1 if both == "two steps" else 0)


def test_readers_put_back_what_a_kill_left_without_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_system_call", lambda: None)
    kind = Kind("one", lambda folder: only_files(folder, ("m.json",)))
    missing = 0
    for step in range(1, 12):
        folder = tmp_path / str(step) / "x"
        write_json(folder / "m.json", 1)

        def work(folder: Path = folder) -> None:
            with atomic_path(folder, kind, replace=True) as temporary:
                write_json(temporary / "m.json", 2)

        killed_at(step, work)
        missing += not folder.exists()
        assert read_json(folder / "m.json") in (1, 2)
    assert missing == 1


def test_a_failed_second_step_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_system_call", lambda: None)
    make_pair(tmp_path / "x", "old")
    original = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if to == tmp_path / "x" and path.name == "x":
            raise OSError(errno.EIO, "gone")
        return original(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="gone"):
        make_pair(tmp_path / "x", "new", replace=True)
    assert content(tmp_path / "x") == {"a": "old", "b": "old"}


def test_leftovers_are_of_nobody_at_work(tmp_path: Path) -> None:
    """What a living process prepares is none; a dead one's is, found by doctor and removed."""
    with atomic_path(tmp_path / "runs" / "x", PAIR) as temporary:
        temporary.mkdir()
        holder = temporary.parent
        assert not leftovers.is_leftover(holder)
        assert list(leftovers.leftovers(tmp_path)) == []
        assert not leftovers.remove_leftover(holder)
        make_pair(tmp_path / "runs" / "y", "other")
        leftovers.remove_leftovers(tmp_path / "runs" / "x")
        assert temporary.is_dir()
        for name in "ab":
            (temporary / name).touch()
    made = tmp_path / "runs" / ".x.abcd1234.partial"
    (made / "x").mkdir(parents=True)
    (made / "scratch").mkdir()
    (made / ".x.abcd1234.partial").mkdir()  # what is prepared in what is prepared
    (tmp_path / ".runs.abcd1234.partial").mkdir()
    building = tmp_path / "runs" / ".building-abcd1234"
    (building / "spill").mkdir(parents=True)
    for strange in (".z.abcd1234.partial", ".building-zzzz1234"):
        (tmp_path / "runs" / strange / "thesis").mkdir(parents=True)
    found = {*leftovers.leftovers(tmp_path / "runs")}
    assert found == {tmp_path / ".runs.abcd1234.partial", made, building}
    leftovers.remove_leftovers(tmp_path / "runs" / "x")
    assert not made.exists()
    assert leftovers.remove_leftover(building)
    assert (tmp_path / "runs" / ".z.abcd1234.partial" / "thesis").is_dir()


def test_source_and_target_lie_apart(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs")
    check_apart(tmp_path / "out", run)
    check_apart(tmp_path / "runs" / "b", run)
    for target in ("runs/a", "runs/a/sae", "runs", "link/a", "link/a/new/x", "runs/../runs/a"):
        with pytest.raises(InputError, match="may not lie in what is read"):
            check_apart(tmp_path / target, run)


def test_a_reserved_file_has_its_room(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(b"abc")
    reserve(path, 100_000)
    assert path.stat().st_blocks * 512 >= 100_000
    assert path.read_bytes() == b"abc" + bytes(99_997)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON: Exceeds the limit"),
        (b"[NaN]", "NaN is no number"),
        (b"-Infinity", "-Infinity is no number"),
        (b'"caf\xe9"', "not valid JSON: 'utf-8'"),
        (b"{", "not valid JSON"),
    ],
)
def test_json_that_is_none_or_too_much(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ArtefactError, match=said):
        read_json(path)
    with pytest.raises(ArtefactError, match=said):
        parse_json(text, where="x")


def test_json_is_read_from_plain_files_of_some_size(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('"' + "x" * 1000 + '"')
    assert len(read_json(path)) == 1000
    with pytest.raises(ArtefactError, match=r"too large .*1,002 bytes'; allowed: up to 1,000\)"):
        read_json(path, largest=1000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (
        ("pipe", "is no plain file"),
        (".", "is a folder"),
        ("loop", "symbolic links lead in a circle"),
        ("x.json/y", "is no folder, or lies below"),
        ("x" * 300, "the name is too long"),
        ("nowhere", "no such file"),
        ("a\0b", "may not hold a NUL"),
    ):
        with pytest.raises(ArtefactError, match=said):
            read_json(tmp_path / name)


def test_an_interrupt_while_the_preparation_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = leftovers.remove, []

    def interrupted_once(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(leftovers, "remove", interrupted_once)
    with pytest.raises(KeyboardInterrupt), leftovers.preparing(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
