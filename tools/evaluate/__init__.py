"""What a careful engineer wants to know of a trained network: ``python -m tools.evaluate --name mnist_model_1``."""
