"""Speed of a training step and accuracy of a recipe: ``python -m tools.benchmark``.

throughput.py   images/s of each way to train, against a tutorial's loop and what the cores can do
accuracy.py     a recipe over seeds, and the file that keeps the series
"""
