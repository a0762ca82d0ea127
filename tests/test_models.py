import math

import pytest

from imports import nn, summary, torch
from model_strategy import get_strategy
from models import model_v1, model_v2, model_v3
from models.blocks import ConvBlock, Dropout, dropped_positions

NETWORKS = {
    "1": (model_v1.Net, 7_720, "0.64"),
    "2": (model_v2.Net, 7_730, "0.64"),
    "3": (model_v3.Net, 8_650, "0.67"),
}
# Output shape after each convolution, pooling and linear layer, in order.
STEM = [(8, 26, 26), (16, 24, 24), (10, 24, 24), (10, 12, 12)]
STAGES = {
    "1": [*STEM, (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10, 1, 1)],
    "2": [*STEM, (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10,)],
    "3": [*STEM, (10, 10, 10), (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10,)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(name):
    net, parameters, _ = NETWORKS[name]
    assert sum(p.numel() for p in net().parameters()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_size_that_torchsummary_estimates(name, capsys):
    net, parameters, megabytes = NETWORKS[name]
    summary(net().eval(), (1, 28, 28), device="cpu")
    table = capsys.readouterr().out
    assert f"Total params: {parameters:,}" in table
    assert f"Estimated Total Size (MB): {megabytes}" in table


@pytest.mark.parametrize("name", NETWORKS)
def test_shape_of_every_stage(name):
    model = get_strategy(name).build().eval()
    shapes: list[tuple[int, ...]] = []
    stages = nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
    for module in model.modules():
        if isinstance(module, stages):
            module.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert shapes == STAGES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_output_is_log_probabilities(name):
    output = get_strategy(name).build().eval()(torch.randn(5, 1, 28, 28))
    assert output.shape == (5, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(5))


@pytest.mark.parametrize(("name", "p"), [("1", 0.01), ("2", 0.025), ("3", 0.025)])
def test_blocks_are_as_specified(name, p):
    model = get_strategy(name).build()
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
    assert len(blocks) == (7 if name == "3" else 6)
    for block in blocks:
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d, Dropout]
        assert block[0].bias is None
        assert block[3].p == p
    outputs = {"1": nn.Conv2d, "2": nn.Linear, "3": nn.Linear}
    assert type(model.output) is outputs[name]


# Dropout against the definition of nn.Dropout


@pytest.mark.parametrize("p", [0.01, 0.025, 0.2])
def test_dropped_positions_are_independent_trials(p):
    torch.manual_seed(3)
    n, rounds = 1000, 4000
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


def test_dropped_positions_reach_both_ends():
    torch.manual_seed(0)
    seen = torch.zeros(50, dtype=torch.bool)
    for _ in range(2000):
        seen[dropped_positions(50, 0.05)] = True
    assert seen.all()
    assert dropped_positions(1, 1e-9).numel() == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_scales_what_it_keeps_and_so_the_gradient(layout, inplace):
    torch.manual_seed(1)
    x = torch.rand(8, 3, 20, 20) + 1.0
    leaf = x.to(memory_format=layout).requires_grad_()
    out = Dropout(0.1, inplace=inplace).train()(leaf * 1.0)
    kept = out != 0
    assert 0.85 < kept.float().mean() < 0.95
    torch.testing.assert_close(out[kept], x[kept] / 0.9)
    # the gradient comes in the other memory layout: it must be zero at the same elements all the same
    other = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format
    grad = torch.rand(8, 3, 20, 20) + 1.0
    out.backward(grad.to(memory_format=other))
    torch.testing.assert_close(leaf.grad, torch.where(kept, grad / 0.9, torch.zeros(())))


def test_dropout_out_of_place_leaves_its_input_alone():
    x = torch.rand(1000)
    before = x.clone()
    Dropout(0.2).train()(x)
    assert torch.equal(x, before)


def test_dropout_of_a_tensor_with_gaps():
    torch.manual_seed(0)
    x = torch.ones(100, 200)[:, ::2]
    out = Dropout(0.1, inplace=True).train()(x)
    assert 0.85 < (out != 0).float().mean() < 0.95


def test_dropout_is_the_identity_in_eval_and_has_no_state():
    layer = Dropout(0.025).eval()
    x = torch.randn(4, 8, 5, 5)
    assert layer(x) is x
    assert layer.state_dict() == {}
    assert repr(layer) == repr(nn.Dropout(0.025))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_of_other_probabilities_is_torchs_own(p):
    x = torch.ones(1000)
    torch.manual_seed(0)
    ours = Dropout(p).train()(x)
    torch.manual_seed(0)
    assert torch.equal(ours, nn.Dropout(p).train()(x))
