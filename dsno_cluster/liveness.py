"""Signs of life of this process's work, by which whoever watches it distinguishes slow work from work that hangs.

Work lives while its place in the code changes or its count of moves does. Only loops that wait at one place,
such as those that poll, must call `moved`. No clock is read: a watcher counts its own ticks, so that a job that
was suspended is not taken for one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent) + os.sep
# a thread that waits for other ranks is in one of these, which send and receive for us
_PEERS = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}")

# how long work may show no sign of life; a job's profile may say otherwise (hang_minutes)
limit_seconds = 1800.0
guarded = False  # whether another process ends this one if it hangs

_moves = _progress = 0
_waiting = False


@dataclass(frozen=True)
class Sign:
    """Where the work is, for people, and a `mark` that changes while it lives.

    `waits`: it waits for other ranks. `progress`: how often its progress was counted.
    """

    mark: str
    where: str
    waits: bool = False
    progress: int = 0


def moved() -> None:
    """Note that the work lives, in a loop that is nearly always at the same place."""
    global _moves
    _moves += 1


def progressed() -> None:
    """Note that a unit of the work is done."""
    global _progress
    _progress += 1
    moved()


@contextlib.contextmanager
def waiting_for_peers() -> Iterator[None]:
    """Within, the work waits for other ranks, as on a GPU, where the code that waits does not show it."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False


def sign_of(thread: int | None) -> Sign:
    """The sign of life of a thread."""
    stack = _stack(sys._current_frames().get(thread or 0))
    innermost = stack[0].f_code.co_filename if stack else ""
    waits = _waiting or any(part in innermost for part in _PEERS)
    return Sign(f"{_moves} {_places(stack)}", _shown(stack), waits, _progress)


def sign_of_threads() -> Sign:
    """The sign of life of all other threads that run code of this package, as in an actor."""
    own = threading.get_ident()
    stacks = [_stack(frame) for thread, frame in sys._current_frames().items() if thread != own]
    ours = [stack for stack in stacks if any(_is_ours(frame) for frame in stack)]
    shown = [_shown(stack) for stack in ours]
    return Sign(f"{_moves} {[_places(stack) for stack in ours]}", " and ".join(shown))


def _stack(frame: FrameType | None) -> list[FrameType]:
    """The frames of a thread, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _places(stack: list[FrameType]) -> list[tuple[str, int]]:
    return [(frame.f_code.co_filename, frame.f_lasti) for frame in stack]


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_PACKAGE) and file != __file__


def _shown(stack: list[FrameType]) -> str:
    """The innermost line of this package, and the function that runs."""
    if not stack:
        return "its end"
    frame = next((frame for frame in stack if _is_ours(frame)), stack[0])
    place = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
    inner = stack[0].f_code.co_name
    return place if frame is stack[0] else f"{place} ({inner})"
