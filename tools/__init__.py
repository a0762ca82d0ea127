"""Commands that stand on a trained network or on the training itself: ``python -m tools.NAME``."""
