"""What the three networks share: the convolution block and the stem."""

from imports import F, nn, torch
from models.dropout import Dropout


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
            Dropout(dropout),
        )


class Transition(nn.Sequential):
    """1x1 convolution without bias that mixes channels -> 2x2 max pooling that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False), nn.MaxPool2d(2))


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
