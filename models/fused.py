"""ReLU, BatchNorm and dropout of a training step on the CPU, as one operation instead of three.

With 8 to 16 channels a training step spends more time on these three than on its convolutions (torch 2.14.1):
``nn.Dropout`` draws from a serial generator once for every activation, BatchNorm sums into rows of C numbers, which
lie in one cache line that the threads take from each other at every addition, and each of the three reads and writes
all activations anew. Here only the dropped positions are drawn, dropout's scale is a part
of BatchNorm's, and what is computed per channel is computed for a whole row of pixels side by side.

There is one implementation of PyTorch's own operations for a step as it is, and one for ``torch.compile``.
Where the kernels of ``models/kernels.py`` run the blocks, only ``dropped_positions`` is used.
"""

import math
from typing import Any

from imports import nn, once_differentiable, torch

HIGHEST_P = 0.2  # above, drawing the dropped positions gains little
FEWEST_DROPPED = 100  # expected; below, the chance exp(-expected) that none is dropped would count


def can_draw_positions(n: int, p: float) -> bool:
    """Whether ``dropped_positions`` serves for ``n`` activations dropped with probability ``p``."""
    return p <= HIGHEST_P and n * p >= FEWEST_DROPPED


def dropped_positions(n: int, p: float) -> torch.Tensor:
    """Draw which of ``n`` independent trials of probability ``p`` succeed, if ``can_draw_positions(n, p)``.

    The distances between successes in a row of trials are independent and geometrically distributed, so one draw for
    each success does what one draw for each trial does.

    Returns:
        int64 [k], each in [0, n): the successes, ascending. For torch.compile, which must know every shape, they are
        followed by the last of them again and again.
    """
    # Eight standard deviations more than expected: the chance that n is not reached is below 1e-14.
    draws = math.ceil(n * p + 8.0 * math.sqrt(n * p) + 20.0)
    # floor(log U / log(1 - p)) + 1 is Geometric(p) on 1, 2, 3, ... for uniform U (Devroye 1986, ch. X.2); U is
    # 1 - rand(), which is never 0
    gaps = torch.rand(draws).neg_().log1p_().mul_(1 / math.log1p(-p)).add_(1).long()
    positions = gaps.cumsum(0).sub_(1)
    if torch.compiler.is_compiling():
        last = torch.where(positions < n, positions, 0).amax()
        return torch.where(positions < n, positions, last)
    return positions[: int(torch.searchsorted(positions, n))]


def relu_norm_dropout(x: torch.Tensor, norm: nn.BatchNorm2d, p: float) -> torch.Tensor:
    """Dropout of BatchNorm of ReLU of ``x``, as in training, on the CPU.

    Args:
        x: float32 or bfloat16 [N, C, H, W], its own and nobody else's: it is overwritten. The operation that made it
            must not need its output for its gradient; a convolution does not.
        norm: with weight, bias, momentum and running statistics, which are updated.
        p: dropout's; 0 or one for which ``can_draw_positions``.

    Returns:
        [N, C, H, W], channels_last.
    """
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    x = x.contiguous(memory_format=torch.channels_last)
    if not torch.compiler.is_compiling():
        statistics = norm.running_mean, norm.running_var
        out: torch.Tensor = _Fused.apply(x, norm.weight, norm.bias, *statistics, norm.momentum, norm.eps, p)
        return out
    channels, width = x.shape[1], x.shape[3]
    tile = torch.eye(channels).repeat(1, width)
    positions = dropped_positions(x.numel(), p) if p > 0 else None
    out, mean, var = _FusedForCompile.apply(x, norm.weight, norm.bias, positions, tile, norm.eps, 1 / (1 - p))
    n = x.numel() // channels
    with torch.no_grad():
        _update_running_statistics(norm.running_mean, norm.running_var, mean, var, norm.momentum, n)
    return out


def _rows(x: torch.Tensor, channels: int) -> torch.Tensor:
    """A view of channels_last activations with up to 16 pixels side by side in a row.

    So a row fills the vector registers and whole cache lines.
    """
    pixels = math.gcd(x.numel() // channels, 16)
    return x.as_strided((x.numel() // (pixels * channels), pixels * channels), (pixels * channels, 1))


def _as_activations(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The way back: ``rows`` as [N, C, H, W], channels_last."""
    images, channels, height, width = shape
    return rows.view(images, height, width, channels).permute(0, 3, 1, 2)


def _row_sums(
    rows: torch.Tensor, of: torch.Tensor, mean: torch.Tensor, inverse_std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each column of ``rows``: the sum of ``rows * (of - mean) * inverse_std``, and the sum of ``rows``.

    It is what BatchNorm's backward pass sums; of float32 or bfloat16, the threads together, without copies.
    """
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        rows[:, :, None, None], of[:, :, None, None], None, None, None, mean, inverse_std, True, 0.0,
        [False, True, True],
    )  # fmt: skip
    return products, sums


def _update_running_statistics(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    n: int,
) -> None:
    """What BatchNorm keeps for evaluation, from ``n`` activations a channel: the variance without bias."""
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (n / (n - 1)), momentum)


def _input_gradient(
    weight: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    weight_grad: torch.Tensor,
    bias_grad: torch.Tensor,
    scale: float,
    n: int,
) -> list[torch.Tensor]:
    """BatchNorm's gradient as a line, dx = a * grad + b * x + c a channel (Ioffe and Szegedy 2015, section 3).

    Args:
        scale: what the outputs were multiplied by after BatchNorm, as was the gradient of weight and bias.
        n: activations a channel.

    Returns:
        a, b and c, each [C].
    """
    slope = weight * inverse_std
    b = slope * inverse_std * weight_grad / -n
    c = slope * bias_grad / -n - b * mean
    return [slope * scale, b, c]


def _side_by_side(values: list[torch.Tensor], pixels: int) -> torch.Tensor:
    """Values of the channels [C], each repeated for a row of pixels: [len(values), pixels * C]."""
    channels = len(values[0])
    return torch.stack(values).unsqueeze(1).expand(-1, pixels, channels).reshape(len(values), -1)


def _scale_and_shift(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """``rows * scale + shift`` for rows of any type and float32 scale and shift, in the type of the rows."""
    if rows.dtype == torch.float32 and shift is not None:
        return torch.addcmul(shift, rows, scale)
    # What BatchNorm does in evaluation, given statistics that change nothing: the one operation that takes the types
    # as they are. Others would convert all rows first.
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    out: torch.Tensor = torch.native_batch_norm(rows[:, :, None, None], scale, shift, zero, one, False, 0.0, 0.0)[0]
    return out.view(rows.shape)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
        p: float,
    ) -> torch.Tensor:
        channels, n, scale = len(weight), x.numel() // len(weight), 1 / (1 - p)
        rows = _rows(x.relu_(), channels)
        pixels = rows.shape[1] // channels
        none, one = torch.zeros(rows.shape[1]), torch.ones(rows.shape[1])  # a mean and a deviation that change nothing
        square_sums, sums = _row_sums(rows, rows, none, one)
        mean, square = torch.stack([sums, square_sums]).view(2, pixels, channels).sum(1) / n
        var = (square - mean * mean).clamp_min_(0)
        inverse_std = torch.rsqrt(var + eps)
        _update_running_statistics(running_mean, running_var, mean, var, momentum, n)
        slope = weight * inverse_std * scale
        out = _scale_and_shift(rows, *_side_by_side([slope, bias * scale - mean * slope], pixels))
        positions = None
        if p > 0:
            positions = dropped_positions(x.numel(), p)
            out.view(-1).index_fill_(0, positions, 0)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, mean, inverse_std, positions)
        return _as_activations(out, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse_std, positions = ctx.saved_tensors
        channels, n = len(weight), x.numel() // len(weight)
        x_rows, grad_rows = _rows(x, channels), _rows(grads[0].contiguous(memory_format=torch.channels_last), channels)
        pixels, grad = x_rows.shape[1] // channels, grad_rows.view(-1)
        if positions is not None:  # zeroed in place and put back below: a copy of all others would cost more
            dropped = grad.index_select(0, positions)
            grad.index_fill_(0, positions, 0)
        sums = _row_sums(grad_rows, x_rows, *_side_by_side([mean, inverse_std], pixels))
        weight_grad, bias_grad = torch.stack(sums).view(2, pixels, channels).sum(1) * ctx.scale
        line = _input_gradient(weight, mean, inverse_std, weight_grad, bias_grad, ctx.scale, n)
        a, b, c = _side_by_side(line, pixels)
        out = _scale_and_shift(grad_rows, a, c)
        if positions is not None:
            grad.put_(positions, dropped)
        if x.dtype == torch.float32:
            out.addcmul_(x_rows, b)
        else:
            out.add_(_scale_and_shift(x_rows, b, None))
        torch.ops.aten.threshold_backward.grad_input(out, x_rows, 0, grad_input=out)  # the ReLU's
        return _as_activations(out, x.shape), weight_grad, bias_grad, None, None, None, None, None


class _FusedForCompile(torch.autograd.Function):
    """The same in operations that torch.compile makes few loops of.

    It vectorises a loop along which every operand has a stride of one. So the parameters of the channels are laid out
    for a whole row of pixels, by a matrix product with ``tile`` [C, W * C] (0 and 1), which is never merged
    into the loop that uses it; and dropout's positions are overwritten, since a mask would be read in every loop.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        positions: torch.Tensor | None,
        tile: torch.Tensor,
        eps: float,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images, channels, height, width = x.shape
        n = images * height * width
        rows = x.permute(0, 2, 3, 1).reshape(images, height, width * channels)
        positive = rows.float().relu()
        with torch.autocast("cpu", enabled=False):
            sums = torch.stack([positive.sum(1).sum(0), (positive * positive).sum(1).sum(0)])
            mean, square = sums @ tile.t() / n
            var = (square - mean * mean).clamp_min(0)
            inverse_std = torch.rsqrt(var + eps)
            slope = weight * inverse_std * scale
            a, b = torch.stack([slope, bias * scale - mean * slope]) @ tile
        out = (positive * a + b).to(x.dtype)
        if positions is not None:
            out = out.view(-1).index_fill(0, positions, 0)
        ctx.save_for_backward(rows, positions, weight, mean, inverse_std, tile)
        ctx.scale = scale
        return out.view(images, height, width, channels).permute(0, 3, 1, 2), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, positions, weight, mean, inverse_std, tile = ctx.saved_tensors
        images, channels, height, width = grads[0].shape
        positive = rows.float().relu()
        grad = grads[0].permute(0, 2, 3, 1).reshape(rows.shape)
        if positions is not None:
            grad = grad.view(-1).index_fill(0, positions, 0).view(rows.shape)
        grad = grad.float()
        with torch.autocast("cpu", enabled=False):
            sums = torch.stack([grad.sum(1).sum(0), (grad * positive).sum(1).sum(0)]) @ tile.t() * ctx.scale
            bias_grad = sums[0]
            weight_grad = (sums[1] - mean * bias_grad) * inverse_std
            n = images * height * width
            line = _input_gradient(weight, mean, inverse_std, weight_grad, bias_grad, ctx.scale, n)
            a, b, c = torch.stack(line) @ tile
        x_grad = torch.where(positive > 0, grad * a + positive * b + c, 0.0).to(rows.dtype)
        x_grad = x_grad.view(images, height, width, channels).permute(0, 3, 1, 2)
        return x_grad, weight_grad, bias_grad, None, None, None, None


class MaxPoolForCompile(torch.autograd.Function):
    """Max pooling on the CPU that torch.compile leaves to PyTorch's own operations, forward and backward.

    The compiler's own loops for it are not vectorised, and it converts the indices between them (torch 2.14.1).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> torch.Tensor:
        out: torch.Tensor
        out, indices = _max_pool(x, size)
        ctx.save_for_backward(x, indices)
        ctx.size = size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, indices = ctx.saved_tensors
        return _max_pool_gradient(grads[0], x, indices, ctx.size), None


@torch.library.custom_op("small_networks::max_pool", mutates_args=())
def _max_pool(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, indices = torch.ops.aten.max_pool2d_with_indices(x, [size, size])
    return out, indices


@_max_pool.register_fake
def _(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, indices = torch.ops.aten.max_pool2d_with_indices(x, [size, size])
    return out, indices


@torch.library.custom_op("small_networks::max_pool_gradient", mutates_args=())
def _max_pool_gradient(grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
    windows = [size, size], [size, size], [0, 0], [1, 1]  # side by side: size, stride, padding, dilation
    out: torch.Tensor = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *windows, False, indices)
    return out


@_max_pool_gradient.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
    return torch.empty_like(x)
