"""Model V2: V1 with a linear layer at the end, 7,730 parameters."""

from imports import nn, torch
from models.blocks import ConvBlock, Stem, log_probabilities


class Net(nn.Module):
    """[N, 1, 28, 28] normalised images -> [N, 10] log-probabilities."""

    def __init__(self, dropout: float = 0.025) -> None:
        super().__init__()
        self.stem = Stem(dropout)  # 28x28x1 -> 26x26x8 -> 24x24x16 -> 24x24x10 -> 12x12x10
        self.block2 = nn.Sequential(
            ConvBlock(10, 16, dropout),  # -> 10x10x16
            ConvBlock(16, 16, dropout),  # -> 8x8x16
            ConvBlock(16, 10, dropout),  # -> 6x6x10
            ConvBlock(10, 10, dropout, padding=1),  # -> 6x6x10
        )
        self.pool = nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(3))  # -> 3x3x10 -> 1x1x10
        self.output = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.block2(self.stem(x))).flatten(1)  # -> 10
        return log_probabilities(self.output(x))
