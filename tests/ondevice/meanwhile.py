"""Another thread that acts in the middle of what a test does."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(
    reached: Callable[[], bool], act: Callable[[], object], delay: float = 0.0
) -> Iterator[None]:
    """While the block runs, act once, `delay` seconds after something is reached."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if reached():
                time.sleep(delay)
                act()
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def interrupt_main() -> None:
    """Ctrl-C, delivered to the main thread."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
