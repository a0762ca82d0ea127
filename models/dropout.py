"""Dropout that draws which activations are dropped, rather than for each of them whether it is."""

import math

from imports import nn, torch

HIGHEST_P = 0.2  # above, drawing the dropped positions gains little
FEWEST_DROPPED = 100  # expected; below, the chance exp(-expected) that none is dropped would count


class Dropout(nn.Dropout):
    """``nn.Dropout``, faster on the CPU: PyTorch draws from a serial generator once for every activation there."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        few = self.p <= HIGHEST_P and input.numel() * self.p >= FEWEST_DROPPED
        if not (self.training and few and input.device.type == "cpu"):
            return super().forward(input)
        # as it lies in memory, so that no copy is made: channels_last, or not
        scaled = input.permute(0, 2, 3, 1).contiguous() if input.dim() == 4 else input.contiguous()
        out = (scaled / (1 - self.p)).view(-1).index_fill(0, dropped_positions(input.numel(), self.p), 0)
        out = out.view(scaled.shape)
        return out.permute(0, 3, 1, 2) if input.dim() == 4 else out


def dropped_positions(n: int, p: float) -> torch.Tensor:
    """Draw which of ``n`` independent trials of probability ``p`` succeed: int64 [k] from [0, n), ascending.

    The distances between successes in a row of trials are independent and geometrically distributed, so one draw for
    each success does what one draw for each trial does.
    """
    # Eight standard deviations more than expected: the chance that n is not reached is below 1e-14.
    draws = math.ceil(n * p + 8.0 * math.sqrt(n * p) + 20.0)
    # floor(log U / log(1 - p)) + 1 is Geometric(p) on 1, 2, 3, ... for uniform U (Devroye 1986, ch. X.2); U is
    # 1 - rand(), which is never 0
    gaps = torch.rand(draws).neg_().log1p_().mul_(1 / math.log1p(-p)).add_(1).long()
    positions = gaps.cumsum(0).sub_(1)
    return positions[: int(torch.searchsorted(positions, n))]
