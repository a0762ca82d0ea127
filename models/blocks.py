"""What the three networks share: the convolution block and the stem."""

from imports import F, nn, torch
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
        conv, _, norm, dropout = self
        if (
            self.training
            and input.device.type == "cpu"
            and isinstance(norm, nn.BatchNorm2d)
            and norm.momentum is not None
            and isinstance(dropout, nn.Dropout)
            and not any(map(_has_hooks, self))
        ):
            x = conv(input)
            p = dropout.p if can_draw_positions(x.numel(), dropout.p) else 0.0
            x = relu_norm_dropout(x, norm, p)
            return x if p == dropout.p else dropout(x)
        out: torch.Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return out


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
