"""`store.time_limit`: the right function is called, once, and only when its block is late."""

import threading
import time

from store.time_limit import time_limit


def test_late_blocks_are_interrupted_and_the_others_are_not():
    called: list[str] = []
    over = threading.Event()

    def late(name: str) -> None:
        called.append(name)
        over.set()

    with time_limit(60, lambda: called.append("long")):
        with time_limit(30, lambda: called.append("in time")):
            pass
        # shorter than what the thread is waiting for already
        with time_limit(0.02, lambda: late("first")):
            assert over.wait(10)
        over.clear()
        with time_limit(0.02, lambda: late("second")):
            assert over.wait(10)
    time.sleep(0.05)
    assert called == ["first", "second"]


def test_many_blocks_at_once_need_one_thread():
    before = threading.active_count()
    held = [time_limit(60, lambda: None) for _ in range(200)]
    for each in held:
        each.__enter__()
    assert threading.active_count() <= before + 1
    for each in held:
        each.__exit__(None, None, None)
