"""Files that appear whole, locks between processes, and how paths are shown."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsno_cluster.files import lock, locked, locked_if_possible, replace_file, shown_path, written_aside


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    replace_file(file, b"one")
    before = file.stat().st_ino
    replace_file(file, b"two")
    assert file.read_bytes() == b"two" and file.stat().st_ino != before
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(KeyboardInterrupt), written_aside(file) as aside:
        aside.write_bytes(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [file]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_lock_is_held_until_its_process_ends(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    holds = (
        "import sys, pathlib; from dsno_cluster.files import lock; "
        "lock(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BlockingIOError) as held, locked(file, wait=False):
            pass
        assert held.value.filename == str(file)
        other.kill()
    with locked(file, wait=False):
        pass


def test_a_lock_follows_no_link_and_is_only_made_if_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "lock", create=False)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        lock(tmp_path / "lock")


def test_a_lock_file_that_another_user_made_locks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be written, by anybody but root."""
    file, opened = tmp_path / "lock", os.open
    file.touch(0o644)

    def open_as_another_user(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_as_another_user)
        held = lock(file)
    with pytest.raises(BlockingIOError):
        lock(file, wait=False)
    os.close(held)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_only_a_missing_lock_is_done_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    with locked_if_possible(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock(tmp_path / "lock", wait=False)

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_if_possible(tmp_path / "lock"):
        entered.append(number)
    assert entered == [number]
    with pytest.raises(OSError) as unlocked, locked(tmp_path / "lock"):
        pass
    assert unlocked.value.errno == number
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked_if_possible(tmp_path / "lock"):
        pass


def test_paths_are_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs/evaluation") == "runs/evaluation"
    assert shown_path("/elsewhere/runs") == "/elsewhere/runs"
    assert shown_path("s3://bucket/runs") == "s3://bucket/runs"
    assert shown_path("runs") == "runs"
