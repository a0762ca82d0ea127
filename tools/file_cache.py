"""What was read or made of files, kept until one of them changes."""

import threading
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class FileCache(Generic[T]):
    """Safe to use from several threads; what one of them makes the others wait for."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[tuple[int, int] | None], T]] = {}
        self._lock = threading.Lock()

    def get(self, files: Iterable[Path], make: Callable[..., T], *key: Hashable) -> T:
        """What ``make(*key)`` returned: called anew when one of ``files`` is another one than it was then."""
        stamps = [_stamp(path) for path in files]
        with self._lock:
            if key not in self._kept or self._kept[key][0] != stamps:
                self._kept[key] = stamps, make(*key)
            return self._kept[key][1]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
