"""What the three networks share: the convolution block and the stem."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeGuard

from imports import F, nn, torch
from models import kernels
from models.fused import MaxPoolForCompile, can_draw_positions, relu_norm_dropout


class ConvBlock(nn.Sequential):
    """3x3 convolution without bias -> ReLU -> BatchNorm -> Dropout.

    A subclass of ``nn.Sequential`` on purpose: torchsummary counts the output of every module that is not
    one, and would count the block's output twice.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, padding: int = 0) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding, bias=False),
            nn.ReLU(),
            nn.BatchNorm2d(out_channels),
            nn.Dropout(dropout),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In training on the CPU the last three run as one; with a hook on any of them one after the other."""
        layers = self.own_layers() if self.training and input.device.type == "cpu" else None
        if layers is not None:
            conv, norm, dropout = layers
            x = conv(input)
            p = dropout.p if can_draw_positions(x.numel(), dropout.p) else 0.0
            x = relu_norm_dropout(x, norm, p)
            return x if p == dropout.p else dropout(x)
        out: torch.Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return out

    def own_layers(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Dropout] | None:
        """Convolution, BatchNorm and dropout; None if one of the layers cannot be taken for what the block made.

        It has been replaced, is not in training, or has a hook that waits to see it run.
        """
        conv, relu, norm, dropout = self
        if (
            _is_plain(conv, 3)
            and isinstance(relu, nn.ReLU)
            and isinstance(norm, nn.BatchNorm2d)
            and norm.momentum is not None
            and isinstance(dropout, nn.Dropout)
            and all(layer.training and not _has_hooks(layer) for layer in self)
        ):
            return conv, norm, dropout
        return None

    def run_as_kernel(self, input: kernels.Activations) -> kernels.Activations:
        """What ``forward`` does in training, if the block has its ``own_layers``."""
        layers = self.own_layers()
        assert layers is not None
        conv, norm, dropout = layers
        return kernels.conv_block(input, conv, norm, dropout.p)


def _is_plain(conv: nn.Module, size: int) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a convolution as the blocks have them: only its channels and its padding may be others."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (size, size)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in [(border, border) for border in range(size)]
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.bias is None
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Transition(nn.Sequential):
    """1x1 convolution without bias that mixes channels -> 2x2 max pooling that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.MaxPool2d(2),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In a compiled training on the CPU the pooling is left to PyTorch's own operations."""
        conv, pool = self
        x: torch.Tensor = conv(input)
        if self.training and torch.compiler.is_compiling() and input.device.type == "cpu" and not _has_hooks(pool):
            pooled: torch.Tensor = MaxPoolForCompile.apply(x, pool.kernel_size)
        else:
            pooled = pool(x)
        return pooled

    def run_as_kernel(self, input: kernels.Activations) -> kernels.Activations:
        """What ``forward`` does in training, if the block ``has_own_layers``."""
        conv, _ = self
        assert isinstance(conv, nn.Conv2d)
        return kernels.transition(input, conv)

    def has_own_layers(self) -> bool:
        """Whether both layers are such as the block made, and no hook waits to see one of them run."""
        conv, pool = self
        return (
            _is_plain(conv, 1)
            and isinstance(pool, nn.MaxPool2d)
            and (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (2, 2, 0, 1, False)
            and not any(map(_has_hooks, self))
        )


class Stem(nn.Sequential):
    """The first stages, the same in all three networks: 28x28x1 -> 12x12x10."""

    def __init__(self, dropout: float) -> None:
        super().__init__(
            ConvBlock(1, 8, dropout),  # input block: 28x28x1 -> 26x26x8
            ConvBlock(8, 16, dropout),  # block 1: -> 24x24x16
            Transition(16, 10),  # -> 24x24x10 -> 12x12x10
        )


def run_stages(x: torch.Tensor, *stages: nn.Sequential) -> torch.Tensor:
    """``x`` [N, C, H, W] through ``stages``, made of ConvBlock and Transition, one after the other.

    In training on the CPU they run as the kernels of ``models/kernels.py``, where those are in use and can do it.
    """
    blocks = _blocks_for_kernels(x, stages)
    if not blocks:
        for stage in stages:
            x = stage(x)
        return x
    activations = kernels.from_images(x, kernels.lanes_in_use())
    for block in blocks:
        activations = block.run_as_kernel(activations)
    return kernels.to_images(activations)


def _blocks_for_kernels(x: torch.Tensor, stages: Iterable[nn.Sequential]) -> list[ConvBlock | Transition]:
    """The blocks of ``stages`` if they can all run as kernels, otherwise none."""
    lanes = kernels.lanes_in_use()
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not lanes or len(x) % lanes or x.device.type != "cpu" or not in_float32 or any(map(_has_hooks, stages)):
        return []
    images, _, height, width = x.shape
    blocks: list[ConvBlock | Transition] = []
    for block in itertools.chain.from_iterable(stages):
        if not block.training or _has_hooks(block):
            return []
        if isinstance(block, ConvBlock) and (layers := block.own_layers()):
            conv, _, dropout = layers
            height, width = (side + 2 * int(conv.padding[0]) - 2 for side in (height, width))
            if dropout.p and not can_draw_positions(images * conv.out_channels * height * width, dropout.p):
                return []
        elif isinstance(block, Transition) and block.has_own_layers() and height % 2 == width % 2 == 0:
            height, width = height // 2, width // 2
        else:
            return []
        blocks.append(block)
    return blocks


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits of any shape with 10 classes an image into log-probabilities [N, 10]."""
    return F.log_softmax(logits.flatten(1), dim=1)
