"""How fast this machine is, and a network on it."""

import statistics
import time
from collections.abc import Callable

from imports import nn, torch

CPU = torch.device("cpu")
COPIED = 1 << 28  # bytes of the copy that stands for what the memory can do


def seconds_of(function: Callable[[], object], device: torch.device = CPU) -> float:
    """How long one call takes, until ``device`` has done it."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_ms(model: nn.Module, images: int = 1, passes: int = 50) -> float:
    """The median time of ``images`` at once through ``model``, which is in evaluation mode, in milliseconds."""
    batch = torch.zeros(images, 1, 28, 28)
    with torch.inference_mode():
        times = [seconds_of(lambda: model(batch)) for _ in range(passes + 5)]
    return 1000 * statistics.median(times[5:])  # the first passes allocate


def matrix_flops(device: torch.device = CPU) -> float:
    """Floating-point operations a second of a large float32 matrix product, the best of three."""
    side = 2048 if device.type == "cpu" else 8192
    left, right = torch.rand(2, side, side, device=device)
    return 2 * side**3 / min(seconds_of(lambda: left @ right, device) for _ in range(3))


def copied_bytes(device: torch.device = CPU) -> float:
    """Bytes a second that are read or written while a large tensor is copied, the best of three."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED / min(seconds_of(lambda: target.copy_(source), device) for _ in range(3))
