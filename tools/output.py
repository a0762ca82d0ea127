"""What the tools write: JSON and pictures, each renamed into place when it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imports
from common.files import atomic_write


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_figure(path: Path, figure: imports.Figure, dpi: int = 120) -> None:
    """Write ``figure`` to ``path`` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
