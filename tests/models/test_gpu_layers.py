"""The GPU's kernels by Triton's interpreter, which runs them on a CPU; tests/training/test_gpu.py has them on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from common.files import PROJECT_DIR
from imports import F, nn, torch
from model_strategy import get_strategy
from models.kernels import divided


def compare(model: str) -> None:
    """Exit with an error unless the kernels compute what PyTorch does, in float64, with the same positions dropped."""
    from triton.language import constexpr

    from models import gpu_kernels, gpu_layers

    gpu_kernels.PROGRAMS, gpu_kernels.WEIGHT_PROGRAMS = constexpr(4), constexpr(2)  # each has several tiles
    torch.manual_seed(1)
    net = get_strategy(model).build().train().to(memory_format=torch.channels_last)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.25
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    layers, same = divided(net)[0], divided(get_strategy(model).build().double())[0]
    for mine, other in zip(layers.parameters + layers.statistics, same.parameters + same.statistics, strict=True):
        other.data.copy_(mine)
    images = torch.randn(2, 1, 28, 28)
    means, steps = gpu_layers.forward(images, layers)

    x, parameters, statistics, settings = (
        images.double(),
        *map(iter, (same.parameters, same.statistics, layers.settings)),
    )
    for step, is_block in zip(steps, layers.blocks, strict=True):
        weight = next(parameters)
        if not is_block:
            x = F.max_pool2d(F.conv2d(x, weight), 2)
            continue
        padding, p, momentum, eps = (next(settings) for _ in range(4))
        norm, (mean, variance, batches) = (next(parameters), next(parameters)), [next(statistics) for _ in range(3)]
        x = F.batch_norm(F.relu(F.conv2d(x, weight, padding=int(padding))), mean, variance, *norm, True, momentum, eps)
        batches += 1
        kept = (step.out.view(torch.int32) >= 0).permute(0, 3, 1, 2)[:, : x.shape[1]]
        assert 0.1 < 1 - kept.float().mean() < 0.4
        x = x * kept / (1 - p)
    torch.testing.assert_close(means.double(), x.mean((2, 3)), rtol=1e-5, atol=1e-5)
    for mine, other in zip(layers.statistics, same.statistics, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, check_dtype=False)
    slope = torch.randn_like(means)
    expected = torch.autograd.grad(x.mean((2, 3)), same.parameters, slope.double())
    for mine, other in zip(gpu_layers.gradients(slope, steps), expected, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm(), (mine, other)


# Long, since the interpreter takes its time, and only before Triton is loaded can it be asked for.
@pytest.mark.long
@pytest.mark.skipif(not find_spec("triton"), reason="there is no Triton here, as on macOS and Windows")
@pytest.mark.parametrize("model", ["1", "3"])
def test_the_gpu_kernels_compute_what_pytorch_does(model):
    code = f"from tests.models.test_gpu_layers import compare; compare({model!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_DIR,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
