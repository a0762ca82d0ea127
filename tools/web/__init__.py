"""The page: draw a digit, compare the runs, watch them train: ``python -m tools.web``."""
