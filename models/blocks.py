"""What the three networks share: the convolution block, its fast BatchNorm and dropout, the stem."""

import math
from typing import Any

from imports import F, nn, once_differentiable, torch


class _DropInPlace(torch.autograd.Function):
    """Scale a tensor and zero the given positions of it, in place; the same for its gradient.

    Positions count in the order of memory. The gradient may arrive in another layout than the activation had,
    so it is written into a fresh tensor of the activation's strides, where a position means the same element.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale, ctx.stride = scale, x.stride()
        ctx.save_for_backward(positions)
        ctx.mark_dirty(x)
        _in_memory_order(x.mul_(scale)).index_fill_(0, positions, 0.0)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,), (positions,) = grads, ctx.saved_tensors
        out = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device)
        torch.mul(grad, ctx.scale, out=out)
        _in_memory_order(out).index_fill_(0, positions, 0.0)
        return out, None, None


def _in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """A flat view of a tensor without gaps, whatever its layout."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


class Dropout(nn.Dropout):
    """``nn.Dropout`` that draws one random number per *dropped* activation instead of one per activation.

    On a CPU ``nn.Dropout`` draws from a serial generator once for every activation, which costs more than a
    third of a training step of these networks. Here the distances between dropped positions are drawn:
    in a row of independent trials of probability ``p`` they are geometrically distributed, so every
    activation is still dropped independently with probability ``p``. On other devices, for a ``p`` so large
    that little is gained, and for few activations, this is ``nn.Dropout`` itself.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        expected = self.p * input.numel()
        if not self.training or input.device.type != "cpu" or self.p > 0.2 or expected < FEWEST_DROPPED:
            return super().forward(input)
        scale = 1.0 / (1.0 - self.p)
        if torch.compiler.is_compiling():
            # In the order of memory, if that is channels_last, so that nothing is copied.
            x = (input * scale).permute(0, 2, 3, 1) if input.dim() == 4 else input * scale
            dropped = x.reshape(-1).index_fill(0, _opaque_positions(input, self.p), 0.0).view(x.shape)
            return dropped.permute(0, 3, 1, 2) if input.dim() == 4 else dropped
        # In place where that is asked for, else on a copy, which has no gaps in memory.
        x = input if self.inplace and _has_no_gaps(input) else input.clone()
        out: torch.Tensor = _DropInPlace.apply(x, dropped_positions(x.numel(), self.p), scale)
        return out


def _has_no_gaps(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


FEWEST_DROPPED = 100  # expected; below, the chance exp(-expected) that none is dropped would count


def dropped_positions(n: int, p: float) -> torch.Tensor:
    """Draw which of ``n`` independent trials of probability ``p`` succeed; at least ``FEWEST_DROPPED`` expected.

    Returns:
        int64 [_draws(n, p)], each in [0, n): the successes, ascending, then the first of them again and again.
    """
    # floor(Exponential of rate -log(1 - p)) + 1 is Geometric(p) on 1, 2, 3, ... (Devroye 1986, ch. X.2)
    gaps = torch.empty(_draws(n, p), dtype=torch.float64).exponential_(-math.log1p(-p)).long()
    positions = gaps.add_(1).cumsum(0).sub_(1)
    return torch.where(positions < n, positions, positions[0])


def _draws(n: int, p: float) -> int:
    # Eight standard deviations more than expected: the chance that n is not reached is below 1e-14. A fixed
    # number, so that torch.compile knows every shape.
    return math.ceil(n * p + 8.0 * math.sqrt(n * p) + 20.0)


# torch.compile takes this as it is. The tag keeps it from drawing anew for the backward pass.
@torch.library.custom_op(
    "small_networks::dropped_positions", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _opaque_positions(x: torch.Tensor, p: float) -> torch.Tensor:
    return dropped_positions(x.numel(), p)


@_opaque_positions.register_fake
def _(x: torch.Tensor, p: float) -> torch.Tensor:
    return x.new_empty(_draws(x.numel(), p), dtype=torch.int64)


class _BatchNormFunction(torch.autograd.Function):
    """Batch normalisation of a channels_last float32 batch, with a backward pass of its own.

    PyTorch's backward pass sums each thread's share into a row of C numbers. Rows of 8 or 10 lie in one cache
    line, which the threads then take from each other at every addition: with two threads it took 23 ms where one
    alone took 0.8 (8 channels of 26x26, batch 128, torch 2.14.1), a third of the whole training step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        out, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        channels, n = len(weight), x.numel() // len(weight)
        # Several pixels a row: wide rows fill the vector registers and whole cache lines.
        pixels = math.gcd(n, 16)
        x_rows, grad_rows = (_in_memory_order(t).view(-1, pixels * channels) for t in (x, grad))
        grad_sum = grad_rows.sum(0).view(pixels, channels).sum(0)
        grad_x_sum = (grad_rows * x_rows).sum(0).view(pixels, channels).sum(0)
        # Ioffe and Szegedy 2015 (arXiv:1502.03167), section 3, solved for dx = a * grad + b * x + c
        weight_grad = (grad_x_sum - mean * grad_sum) * inverse_std
        a = weight * inverse_std
        b = -a * inverse_std * weight_grad / n
        c = -a * grad_sum / n - b * mean
        x_grad = torch.empty_like(x)
        rows = _in_memory_order(x_grad).view(-1, pixels * channels)
        torch.addcmul(c.repeat(pixels), grad_rows, a.repeat(pixels), out=rows).addcmul_(x_rows, b.repeat(pixels))
        return x_grad, weight_grad, grad_sum, None, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, faster in the training of few channels on several CPU threads."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        fast = (
            self.training
            and input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.dim() == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling()
        )
        if not fast or self.momentum is None or self.num_batches_tracked is None:
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        out: torch.Tensor = _BatchNormFunction.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return out


class ConvBlock(nn.Sequential):
    """3x3 convolution without bias -> ReLU -> BatchNorm -> Dropout.

    A subclass of ``nn.Sequential`` on purpose: torchsummary counts the output of every module that is not
    one, and would count the block's output twice.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, padding: int = 0) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding, bias=False),
            nn.ReLU(inplace=True),  # safe: neither convolution nor BatchNorm needs the overwritten values
            BatchNorm2d(out_channels),
            Dropout(dropout, inplace=True),  # nor does BatchNorm need its own output
        )


class Transition(nn.Sequential):
    """1x1 convolution without bias that mixes channels -> 2x2 max pooling that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.MaxPool2d(2),
        )


class Stem(nn.Sequential):
    """The first stages, the same in all three networks: 28x28x1 -> 12x12x10."""

    def __init__(self, dropout: float) -> None:
        super().__init__(
            ConvBlock(1, 8, dropout),  # input block: 28x28x1 -> 26x26x8
            ConvBlock(8, 16, dropout),  # block 1: -> 24x24x16
            Transition(16, 10),  # -> 24x24x10 -> 12x12x10
        )


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits of any shape with 10 classes an image into log-probabilities [N, 10]."""
    return F.log_softmax(logits.flatten(1), dim=1)
