import math

import pytest

from imports import nn, torch
from models.dropout import Dropout, dropped_positions


@pytest.mark.parametrize(("n", "p"), [(10_000, 0.01), (4_000, 0.025), (500, 0.2)])
def test_dropped_positions_are_independent_trials(n, p):
    torch.manual_seed(3)
    rounds = 2000
    drawn = torch.zeros(rounds, n)
    for row in drawn:
        row[dropped_positions(n, p)] = 1.0
    trials, std = n * rounds, math.sqrt(p * (1 - p))
    assert abs(drawn.mean() - p) < 5 * std / math.sqrt(trials)
    # every position is dropped equally often: its count is binomial, so chi-square / n is 1 +- sqrt(2 / n)
    chi_square = ((drawn.sum(0) - rounds * p) ** 2 / (rounds * p * (1 - p))).mean()
    assert abs(chi_square - 1) < 5 * math.sqrt(2 / n)
    # and so is the number dropped in a round
    assert abs(drawn.sum(1).var() / (n * p * (1 - p)) - 1) < 5 * math.sqrt(2 / rounds)
    # neighbours, near and far, are uncorrelated
    for distance in (1, 2, 7, 100):
        covariance = ((drawn[:, distance:] - p) * (drawn[:, :-distance] - p)).mean()
        assert abs(covariance) < 5 * std**2 / math.sqrt(trials - rounds * distance)
    # and one round tells nothing of the next
    covariance = ((drawn[1:] - p) * (drawn[:-1] - p)).mean()
    assert abs(covariance) < 5 * std**2 / math.sqrt(trials - n)


def test_dropped_positions_reach_both_ends_and_never_leave():
    torch.manual_seed(0)
    seen = torch.zeros(500, dtype=torch.bool)
    for _ in range(300):
        positions = dropped_positions(500, 0.2)
        assert 0 <= positions.min() <= positions.max() < 500
        assert (positions.diff() > 0).all()
        seen[positions] = True
    assert seen.all()


@pytest.mark.parametrize("shape", [(64, 8, 12, 12), (100, 500)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_and_its_gradient_too(shape, layout, dtype):
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=dtype) + 1
    x = (x.to(memory_format=layout) if len(shape) == 4 else x).requires_grad_()
    before, dropout = x.detach().clone(), Dropout(0.1)
    out, again = dropout(x), dropout(x)
    kept = out != 0
    assert abs(kept.float().mean() - 0.9) < 0.01
    assert not torch.equal(again != 0, kept)
    assert out.dtype == dtype
    torch.testing.assert_close(out, before * kept / 0.9)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (kept / 0.9).to(dtype))
    assert torch.equal(x.detach(), before)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize(("p", "images"), [(0.5, 16), (0.01, 2), (0.0, 16), (1.0, 2)])
def test_other_probabilities_or_few_activations_are_torchs_own(p, images):
    x = torch.rand(images, 8, 6, 6)
    outputs = []
    for dropout in (Dropout(p), nn.Dropout(p)):
        torch.manual_seed(1)
        outputs.append(dropout(x))
    assert torch.equal(*outputs)
