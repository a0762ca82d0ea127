"""The runs beside each other: ``python -m tools.compare``."""
