"""Better settings for a network on a data set: ``python -m tools.tune``, or ``main`` from a script."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command, for a script that registers a network of its own before. Returns its exit status."""
    from tools.tune.__main__ import main

    return main(argv)
