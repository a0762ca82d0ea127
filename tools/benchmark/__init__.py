"""Speed of a training step and accuracy of a recipe: ``python -m tools.benchmark``."""
