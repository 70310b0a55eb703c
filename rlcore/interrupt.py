"""Ctrl-C and SIGTERM as a wish to stop, rather than an exception in the middle of something."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that holds the name of the first SIGINT or SIGTERM to arrive, and is empty until then.

    The second one ends the process at once, with exit code 128 plus its number: 130 for Ctrl-C. Outside the
    main thread, where Python takes no signals, the list stays empty.
    """
    asked: list[str] = []

    def handle(number: int, frame: Any) -> None:
        # A print here could meet another print half done, so this goes to the descriptor itself.
        if asked:
            os.write(2, b"\nleft at once; the last finished checkpoint is kept\n")
            os._exit(128 + number)
        asked.append(signal.Signals(number).name)
        os.write(2, b"\nstopping after this iteration; once more leaves at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
