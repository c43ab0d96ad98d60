"""Noting what is finished, so that an interrupted command continues, without spending its time on notes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from dsno_cluster.errors import WorkError

_CHEAP_SECONDS = 0.1  # a note that takes no longer is made after every piece
_SHARE = 0.05  # largest share of the time for notes: each names all that is finished, so it is longer than the last


@contextlib.contextmanager
def noting(note: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each finished piece: it calls `note`, or now and then if that takes long.

    `note` is also called if the block is stopped.
    """
    noted, lasted = float("-inf"), 0.0

    def finished() -> None:
        nonlocal noted, lasted
        began = time.monotonic()
        if lasted <= _CHEAP_SECONDS or began - noted > lasted / _SHARE:
            note()
            noted = time.monotonic()
            lasted = noted - began

    try:
        yield finished
    except BaseException:
        with contextlib.suppress(WorkError):  # report what stopped it
            note()
        raise
