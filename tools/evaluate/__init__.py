"""What a careful engineer wants to know of a trained network: ``python -m tools.evaluate --name mnist_model_1``.

measures.py      confusion, calibration, robustness, saliency; all together, as a dictionary and as tables
corruptions.py   images spoilt in 16 ways
figures.py       the pictures of it
"""
