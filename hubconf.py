"""The trained networks for torch.hub:

network = torch.hub.load("path/to/this/checkout", "mnist_model_3", source="local")
row = network(network.normalize(pixels.float()))      # of uint8 [N, 1, 28, 28], white on black
pixels = network.preprocess("seven.png")              # a picture of a digit, in that form
network.classes                                       # ("0", "1", ...), one an output
"""

import functools
from pathlib import Path

from data_utils import normalize
from image_data.facts import MNIST
from image_data.form import read_grey, to_mnist
from imports import nn, torch
from model_strategy import get_strategy
from visualization import load_model_params

dependencies = ["torch", "torchvision", "numpy", "PIL", "cv2"]


def preprocess(picture: str | Path) -> torch.Tensor:
    """A picture of one digit in MNIST's form: uint8 [1, 1, 28, 28]. Raises as ``read_grey`` and ``to_mnist``."""
    return torch.from_numpy(to_mnist(read_grey(picture)))[None, None]


def _trained(model: str, pretrained: bool = True) -> nn.Module:
    """[N, 1, 28, 28] normalised images -> [N, 10] log-probabilities; with the shipped weights, in evaluation mode."""
    network = get_strategy(model).build()
    if pretrained:
        load_model_params(network, f"mnist_model_{model}")
    for name, what in {"classes": MNIST.classes, "normalize": normalize, "preprocess": preprocess}.items():
        setattr(network, name, what)
    return network


mnist_model_1, mnist_model_2, mnist_model_3 = (functools.partial(_trained, model) for model in "123")
