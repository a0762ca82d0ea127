"""How fast this machine is, and a network on it."""

import statistics
import time
from collections.abc import Callable

from imports import nn, torch

MATRIX = 2048  # side of the float32 matrix product that stands for what the cores can do


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def forward_ms(model: nn.Module, images: int = 1, passes: int = 50) -> float:
    """The median time of ``images`` at once through ``model``, which is in evaluation mode, in milliseconds."""
    batch = torch.zeros(images, 1, 28, 28)
    with torch.inference_mode():
        times = [seconds_of(lambda: model(batch)) for _ in range(passes + 5)]
    return 1000 * statistics.median(times[5:])  # the first passes allocate


def matrix_flops() -> float:
    """Floating-point operations a second of a large float32 matrix product, the best of three."""
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    return 2 * MATRIX**3 / min(seconds_of(lambda: left @ right) for _ in range(3))
