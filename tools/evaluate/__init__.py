"""What a careful engineer wants to know of a trained network: ``python -m tools.evaluate --name mnist_model_1``.

measures.py      functions on tensors: confusion, calibration, saliency
corruptions.py   images spoilt in 16 ways
report.py        everything together, as a dictionary and as tables
figures.py       the pictures of it
"""
