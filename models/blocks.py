"""What the three networks share: the convolution block, its dropout, the transition."""

import math
from typing import Any

from imports import F, nn, torch


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
    activation is still dropped independently with probability ``p``. On other devices, and for a ``p`` so
    large that little is gained, this is ``nn.Dropout`` itself.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or input.device.type != "cpu" or not 0.0 < self.p <= 0.2:
            return super().forward(input)
        # In place where that is asked for, else on a copy, which has no gaps in memory.
        x = input if self.inplace and _has_no_gaps(input) else input.clone()
        positions = dropped_positions(x.numel(), self.p)
        out: torch.Tensor = _DropInPlace.apply(x, positions, 1.0 / (1.0 - self.p))
        return out


def _has_no_gaps(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def dropped_positions(n: int, p: float) -> torch.Tensor:
    """Draw which of ``n`` independent trials of probability ``p`` succeed.

    Returns:
        int64 tensor with the ascending positions, each in [0, n).
    """
    # Enough gaps to pass position n but for a chance below 1e-9; the loop covers that chance.
    draws = math.ceil(n * p + 6.0 * math.sqrt(n * p) + 20.0)
    gaps: list[torch.Tensor] = []
    reached = 0
    while reached < n:
        # floor(Exponential / -log(1 - p)) + 1 is Geometric(p) on 1, 2, 3, ... (Devroye 1986, ch. X.2)
        exponential = torch.empty(draws, dtype=torch.float64).exponential_()
        gap = (exponential / -math.log1p(-p)).long() + 1
        reached += int(gap.sum())
        gaps.append(gap)
    positions = torch.cat(gaps).cumsum(0) - 1
    return positions[positions < n]


class ConvBlock(nn.Sequential):
    """3x3 convolution without bias -> ReLU -> BatchNorm -> Dropout.

    A subclass of ``nn.Sequential`` on purpose: torchsummary counts the output of every module that is not
    one, and would count the block's output twice.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, padding: int = 0) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding, bias=False),
            nn.ReLU(inplace=True),  # safe: neither convolution nor BatchNorm needs the overwritten values
            nn.BatchNorm2d(out_channels),
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
