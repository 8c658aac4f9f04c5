"""One way to be interrupted: the step under way is finished and saved, the result says so, and callers let it through.

Who works step by step takes `deferred` around the steps and returns what it has, marked as interrupted. Who calls that hands
the result on through `complete`, which raises KeyboardInterrupt: so it reaches the program's end, with what is done kept.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class Interruption:
    """What came while a step was under way; true once something has.

    Attributes:
        signal: its number.
        elsewhere: it came to another process that works on the same, and may still come to this one.
        everywhere: all of these processes know of it.
    """

    signal: int | None = None
    elsewhere: bool = False
    everywhere: bool = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def follow(self, signals: Iterable[int | None]) -> None:
        """Stop as other processes are told to: SIGTERM if one of them was ended by it."""
        came = [number for number in signals if number is not None]
        if came:
            self.elsewhere = self.elsewhere or self.signal is None
            self.signal = signal.SIGTERM if signal.SIGTERM in came else came[0]
            self.everywhere = True

    def end_if_terminated(self) -> None:
        """Leave, if it was SIGTERM: a process that is told to end must not go on with the next line of a script.

        Raises:
            SystemExit: with the code of a process that SIGTERM ended, 143.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def deferred(*, terminate: bool) -> Iterator[Interruption]:
    """Note the first Ctrl-C, so that it does not land in the middle of a step; a second one stops at once.

    Python delivers signals to the main thread only: in another one nothing is noted.

    Args:
        terminate: note SIGTERM as well. Only where the step's end is saved: else it ends the process, as it does anywhere.

    Example:
        >>> with deferred(terminate=False) as asked:
        ...     for step in range(3):
        ...         if asked:
        ...             break
    """
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    chosen = (signal.SIGINT, signal.SIGTERM) if terminate else (signal.SIGINT,)
    previous = {number: signal.getsignal(number) for number in chosen}

    def handle(number: int, _frame: object) -> None:
        if asked and not asked.elsewhere:
            raise KeyboardInterrupt
        asked.signal, asked.elsewhere = number, False

    for number in chosen:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupted(result: Any) -> bool:
    """Whether a result was cut short: a fit by its `interrupted`, a frame by its `attrs["interrupted"]`."""
    return bool(getattr(result, "attrs", {}).get("interrupted") or getattr(result, "interrupted", False))


def complete(result: Result) -> Result:
    """The result, if nothing cut it short.

    Raises:
        KeyboardInterrupt: something did; whoever made the result has kept what was done.
    """
    if interrupted(result):
        raise KeyboardInterrupt
    return result
