"""MNIST's test digits, if they are on this machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from common.cli import silent
from common.files import PROJECT_DIR, UsageError
from tools.cache import FileCache

_digits: FileCache[Any] = FileCache()


def mnist_test_digits(data_dir: str | None = None) -> Any:
    """The test images uint8 [N, 28, 28] and labels [N] as arrays; None if they are not on this machine."""
    folder = PROJECT_DIR / "data" if data_dir is None else Path(data_dir)
    files = [folder / "MNIST" / "raw" / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    return _digits.get(folder, files, functools.partial(_read, folder))


def _read(folder: Path) -> Any:
    from data_utils import load_images
    from image_data.fetch import DataError, is_there

    if not is_there(folder):
        return None  # to fetch them is for the training command
    try:
        images, labels = load_images(folder, train=False, log=silent)
    except (DataError, UsageError):
        return None
    return images.numpy(), labels.numpy()
