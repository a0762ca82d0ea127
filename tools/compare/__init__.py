"""The runs beside each other: ``python -m tools.compare``.

comparer.py   the comparison, as data
runs.py       the runs' metrics, and whether a run still trains
digits.py     MNIST's test digits
page.py       the comparison as one HTML file
"""
