"""A folder in a place that others share, such as /dev/shm: they can neither read nor guess it."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "rlzoo_weights_", "lock"


class PrivateFolder:
    """Files for processes of the same user, on this machine or wherever the place is mounted.

    The folder is made with a random name and mode 0700, where nothing stood. It is removed at
    `close`, or at the end of the process; what a killed process left is removed by the next one
    that makes a folder in the same place.

    Args:
        place: a directory that exists.
    """

    def __init__(self, place: Path) -> None:
        remove_left_over(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        made = self.path / "unlocked"
        self.lock = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        made.rename(self.path / LOCK)  # never there without being held, as long as its maker lives
        atexit.register(self.close)

    def close(self) -> None:
        if self.lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.lock)
            self.lock = -1
            atexit.unregister(self.close)


def remove_left_over(place: Path) -> None:
    """Removes this user's folders that no living process holds."""
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_WRONLY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or not yet locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(lock)
