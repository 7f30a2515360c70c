"""Several processes share the windows of a harvest: all compute, rank 0 commits."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from activations.harvesting.staging import Staging
from activations.harvesting.window_locks import Team, pauses
from activations.harvesting.windows import MissingWindow
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from saescope.paths import remove
from saescope.progress import Progress


def help_with(
    missing: Iterable[MissingWindow],
    compute: Callable[[MissingWindow], WindowData],
    staging: Staging,
    team: Team,
) -> None:
    """Compute windows until all of them wait, or are committed. Raises ArtefactError as `check`."""
    _share(missing, compute, staging, team, lambda *_: None, team.check)


def lead(
    missing: Iterable[MissingWindow],
    compute: Callable[[MissingWindow], WindowData],
    writer: HarvestWriter,
    team: Team,
    progress: Progress,
) -> None:
    """Compute windows as other ranks do, and commit all, in their order."""
    store = writer.store
    staging = Staging(store)
    staging.open(len(store.windows))
    team.begin()
    names: dict[int, str] = {}
    own: set[int] = set()
    number = len(store.windows)

    def commit() -> None:
        nonlocal number
        while number in names and staging.has(names[number]):
            name = names.pop(number)
            data = staging.get(name)
            writer.write(data)
            remove(staging.folder / name)
            if number not in own:
                progress.advance(data.tokens.size)
            own.discard(number)
            number += 1

    def computed(window: MissingWindow) -> WindowData:
        own.add(window.number)
        return compute(window)

    _share(missing, computed, staging, team, names.__setitem__, commit)
    assert not names, "a window that is neither computed nor missing"
    remove(staging.folder)


def _share(
    missing: Iterable[MissingWindow],
    compute: Callable[[MissingWindow], WindowData],
    staging: Staging,
    team: Team,
    note: Callable[[int, str], None],
    settle: Callable[[], None],
) -> None:
    """Compute the windows that no other rank has, until all are computed.

    Windows that others have are kept in mind, and computed here if those die: there are never more
    of them than twice the other ranks. `note` is told each window's number and name in their order;
    `settle` is called again and again, in a thread that also puts away a window while the next is
    computed.
    """
    waiting: dict[str, MissingWindow] = {}

    def keep(name: str, data: WindowData, number: int) -> None:
        staging.put(name, data)
        team.release(number)
        settle()

    with ThreadPoolExecutor(1, "harvest-writer") as pool:
        writing: Future[None] = pool.submit(settle)
        for window in _and_then_pauses(missing, waiting):
            if window is not None:
                name = staging.name(window)
                note(window.number, name)
                waiting[name] = window
            for name, each in list(waiting.items()):
                if staging.has(name):
                    del waiting[name]
                elif team.claim(each.number):
                    del waiting[name]
                    if staging.needs(name, each.number):
                        staging.remove_torn(name)
                        data = compute(each)
                        writing.result()
                        writing = pool.submit(keep, name, data, each.number)
                    else:
                        team.release(each.number)
            if writing.done():
                writing.result()
                writing = pool.submit(settle)
        writing.result()
        pool.submit(settle).result()


def _and_then_pauses(
    missing: Iterable[MissingWindow], waiting: dict[str, MissingWindow]
) -> Iterator[MissingWindow | None]:
    """All windows, and then None after each pause for as long as there are any to wait for."""
    yield from missing
    for _ in pauses():
        if not waiting:
            return
        yield None
