"""All blocks of a network as one operation on a GPU, forward and backward: ``kernels.py`` calls it.

means, steps = forward(images, layers)
found = gradients(dmeans, steps)
"""

from collections import namedtuple
from typing import Any

from imports import torch
from models import gpu_kernels as kernels

# What a layer leaves. ``block`` is what ``kernels._normalization`` takes; None: a 1x1 convolution and pooling.
Step = namedtuple("Step", "read out chosen weight sizes block")


def forward(images: torch.Tensor, layers: Any) -> tuple[torch.Tensor, list[Step]]:
    """The mean over the pixels that ``layers`` leave of [N, 1, 28, 28], [N, C], and what ``gradients`` needs.

    ``layers`` are as ``models.kernels.Layers``; their running means and variances are brought up to date.
    """
    make, grid, n = images.new_empty, (kernels.PROGRAMS.value,), len(images)
    seed = torch.randint(2**31 - 1, (1,), device=images.device)
    parameters, statistics, settings = (iter(part) for part in (layers.parameters, layers.statistics, layers.settings))
    x, side, before, source, steps = images, images.shape[-1], None, kernels.IMAGE, []
    for number, is_block in enumerate(layers.blocks):
        weight = next(parameters).contiguous(memory_format=torch.channels_last)
        padding, p, momentum, eps = (next(settings) for _ in range(4)) if is_block else (0, 0.0, 0.0, 0.0)
        sizes = tuple(float(size) for size in (weight.shape[1], weight.shape[0], side, padding, n))
        block = chosen = None
        if is_block:
            side += 2 * int(padding) - 2
            out, sums = make(n, side, side, 16), make(2, *grid, 16)
            drawn = seed, float(number), p
            kernels.convolve[grid](x, out, sums, before, weight, sizes, *drawn, SOURCE=source, num_stages=1)
            norm, running = (next(parameters), next(parameters)), (next(statistics) for _ in range(3))
            block = (sums, make(2, 16), *norm, *running, eps, momentum, 1 / (1 - p))
        else:
            side //= 2
            out = make(n, side, side, 16)
            chosen = torch.empty_like(out, dtype=torch.int8)
            kernels.mix_and_pool[grid](x, out, chosen, before, weight, sizes, num_stages=1)
        steps.append(Step(x, out, chosen, weight, sizes, block))
        x, before, source = out, block, kernels.BLOCK if is_block else kernels.POOLED
    means, last = make(n, len(weight)), (float(len(weight)), 0.0, float(side), 0.0, float(n))
    kernels.mean[(n,)](x, means, before, last)
    return means, steps


def gradients(dmeans: torch.Tensor, steps: list[Step]) -> list[torch.Tensor]:
    """The gradients of ``layers.parameters``, from that of the means and what ``forward`` left."""
    make, grid, last = dmeans.new_empty, (kernels.PROGRAMS.value,), steps[-1]
    du, sums = torch.empty_like(last.out), make(2, *grid, 16)
    sizes = last.sizes[1], 0.0, float(last.out.shape[1]), 0.0, last.sizes[4]
    kernels.mean_back[grid](dmeans.contiguous(), last.out, du, sums, sizes, last.block[-1])
    found: list[torch.Tensor] = []
    for number, (x, out, chosen, weight, sizes, block) in reversed(list(enumerate(steps))):
        before = steps[number - 1].block if number else None
        source = kernels.IMAGE if not number else kernels.POOLED if before is None else kernels.BLOCK
        mine = [torch.empty_like(part) for part in (weight, *(block[2:4] if block else ()))]
        kind, y, behind, rows, used, k = kernels.BLOCK, out, None, 3, 48, 64
        if block is None:
            kind, y, rows, used, k = kernels.POOLED, chosen, 1, 16, 16
        else:
            behind = block[1:3]
        if not number:
            rows, used, k = 1, 9, 16
        parts = make(rows, kernels.WEIGHT_PROGRAMS.value, k, 16)
        read = None if before is None else (*before[1:4], before[-1])
        layer = {"KIND": kind, "SOURCE": source, "num_stages": 1}
        kernels.back_to_weights[(kernels.WEIGHT_PROGRAMS.value, rows)](
            du, y, sums, behind, x, read, parts, tuple(mine[1:]), sizes, K=k, **layer
        )
        kernels.add_parts[(rows, used)](parts, mine[0], sizes, TAPS=9 if block else 1, K=k)
        found = mine + found
        if number:
            dx, sums_out, rescale = torch.empty_like(x), make(2, *grid, 16), before[-1] if before else 1.0
            kernels.back[grid](du, y, sums, behind, x, dx, sums_out, weight, sizes, rescale, **layer)
            du, sums = dx, sums_out
    return found
