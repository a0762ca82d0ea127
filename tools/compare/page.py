"""The comparison as one HTML file, drawn by the page's own script."""

import re
from dataclasses import asdict

from common.files import PROJECT_DIR
from tools.compare.comparer import Comparison
from tools.output import as_html_json, rendered

STATIC = PROJECT_DIR / "tools" / "web" / "static"


def comparison_html(comparison: Comparison) -> str:
    """One HTML file that shows ``comparison`` and needs nothing else, the internet least of all."""
    from plotly.offline import get_plotlyjs

    # modules cannot import one another inside a file: the two that it takes stand one after the other
    sources = [(STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "compare.js")]
    return rendered(
        STATIC / "comparison.html",
        style=(STATIC / "style.css").read_text(encoding="utf-8"),
        script="\n".join(re.sub(r"^import .*\n|^export ", "", source, flags=re.MULTILINE) for source in sources),
        data=as_html_json(asdict(comparison)),
        plotly=get_plotlyjs(),
    )
