"""The runs beside each other: ``python -m tools.compare``.

comparer.py   the comparison, as data
sources.py    the runs' metrics, MNIST's test digits
page.py       the comparison as one HTML file
"""
