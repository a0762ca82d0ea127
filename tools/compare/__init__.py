"""The runs beside each other: ``python -m tools.compare``.

comparer.py   the comparison, as data
page.py       the comparison as a table, and as one HTML file
"""
