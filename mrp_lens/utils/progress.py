"""Progress bars."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from mrp_lens.utils.processes import is_first

DELAY = 1.0  # seconds
RARELY = 30.0  # seconds between two lines of a bar that goes into a file


def progress_bar(
    iterable: Iterable[Any] | None = None, *, desc: str, progress: bool, total: int | None = None, **options: Any
) -> tqdm:
    """A bar that appears once the work has taken a second, so that `progress=True` can be the default of quick calls.

    (`set_postfix_str` shows the bar at once, unless it is told `refresh=False`.) In a file, such as the log of a batch job, a bar is a
    line every 30 seconds.

    Args:
        iterable: to go through; None: the bar is updated by hand.
        desc: what is done.
        progress: False: no bar. Of several processes that share a fit the first shows one.
        total: steps; None: as many as the iterable has.
        options: of tqdm, such as `unit`.
    """
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        options = {"mininterval": RARELY, "maxinterval": RARELY} | options
    return tqdm(iterable, desc=desc, total=total, disable=not (progress and is_first()), delay=DELAY, **options)
