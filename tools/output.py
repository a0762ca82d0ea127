"""What the tools write: JSON and pictures, each renamed into place when it is whole, and pages of one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imports
from common.files import atomic_write, write_whole


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_figure(path: Path, figure: imports.Figure, dpi: int = 120) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, grid: Any = None, **options: Any
) -> tuple[imports.Figure, Any]:
    """A figure of so many inches and its axes, open at the top and the right, with lines along ``grid``: x, y or both.
    The ``options`` are those of ``Figure.subplots``."""
    figure = imports.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        if grid is not None:
            panel.grid(axis=grid, alpha=0.3)
    return figure, axes


def rendered(template: Path, **values: Any) -> str:
    """The Jinja file ``template`` with ``values`` in it."""
    from jinja2 import StrictUndefined, Template

    escape, text = template.suffix == ".html", template.read_text(encoding="utf-8")
    options: Any = {"undefined": StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    page = Template(text, autoescape=escape, **options)
    page.environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # of its tojson, which sorts keys otherwise
    return str(page.render(values))
