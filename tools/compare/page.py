"""The comparison as a table, and as one HTML file, drawn by the page's own script."""

import re
from collections.abc import Sequence
from dataclasses import asdict

from common.files import PROJECT_DIR
from tools.compare.comparer import Comparison, RunRow
from tools.output import as_html_json, filled

STATIC = PROJECT_DIR / "tools" / "web" / "static"


def print_table(rows: Sequence[RunRow]) -> None:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    line = "{:<{width}} {:>9} {:>10} {:>8} {:>6} {:>8} {:>8}  {}".format
    width = max(len(row.name) for row in rows)
    print(line("run", "accuracy", "parameters", "bytes", "epochs", "seconds", "ms/image", "status", width=width))
    for row in rows:
        known = f"{shown(row.accuracy, '.2f')}%", f"{row.parameters:,}", shown(row.bytes, ","), shown(row.epochs, "d")
        took = shown(row.seconds, ".1f"), shown(row.latency_ms, ".2f")
        print(line(row.name, *known, *took, row.status, width=width))


def comparison_html(comparison: Comparison) -> str:
    """One HTML file that shows ``comparison`` and needs nothing else, the internet least of all."""
    from plotly.offline import get_plotlyjs

    # modules cannot import one another inside a file: the two that it takes stand one after the other
    sources = [(STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "compare.js")]
    parts = {
        "style": (STATIC / "style.css").read_text(encoding="utf-8"),
        "script": "\n".join(re.sub(r"^import .*\n|^export ", "", source, flags=re.MULTILINE) for source in sources),
        "data": as_html_json(asdict(comparison)),
        "plotly": get_plotlyjs(),
    }
    return filled(STATIC / "comparison.html", parts)
