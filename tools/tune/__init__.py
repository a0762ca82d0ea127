"""Better settings for a network on a data set: ``python -m tools.tune``, or ``main`` from a script.

space.py     what is searched, and a trial's draw from it
study.py     a study from its start to what it leaves: settings, tables, the report, the confirmation
storage.py   the study's database
workers.py   processes that take trials and train them
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command, for a script that registers a network of its own before. Returns its exit status."""
    from tools.tune.__main__ import main

    return main(argv)
