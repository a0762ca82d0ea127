import math
import shutil

import pytest

from imports import nn, summary, torch
from model_strategy import get_strategy
from models import model_v1, model_v2, model_v3
from models.blocks import BatchNorm2d, ConvBlock, Dropout, dropped_positions

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
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.ReLU, BatchNorm2d, Dropout]
        assert block[0].bias is None
        assert block[3].p == p
    outputs = {"1": nn.Conv2d, "2": nn.Linear, "3": nn.Linear}
    assert type(model.output) is outputs[name]


# BatchNorm2d against nn.BatchNorm2d


@pytest.mark.parametrize("shape", [(16, 8, 26, 26), (16, 10, 6, 6), (3, 16, 5, 5), (1, 10, 3, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_torchs(shape, layout):
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(shape[1]), nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.uniform_(-1, 1)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):  # the second time on statistics that moved
        values, grad = torch.rand(shape) * 3, torch.randn(shape)
        results = []
        for layer in (ours, theirs):
            x = values.to(memory_format=layout).requires_grad_()
            layer.zero_grad()
            out = layer(x)
            out.backward(grad)
            results.append((out, x.grad, layer.weight.grad, layer.bias.grad))
        for mine, torchs in zip(*results, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert int(ours.num_batches_tracked) == 2


def test_batch_norm_gradient_by_differences():
    torch.manual_seed(0)
    layer = BatchNorm2d(8)
    x = torch.rand(4, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    direction, weights = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    (layer(x) * weights).sum().backward()
    step = 1e-2
    with torch.no_grad():
        ahead, behind = ((layer(x + sign * step * direction).double() * weights).sum() for sign in (1, -1))
    torch.testing.assert_close(
        (x.grad * direction).sum(), ((ahead - behind) / (2 * step)).float(), rtol=1e-2, atol=1e-2
    )


# Dropout against the definition of nn.Dropout


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
        distinct = positions[: int(positions.argmax()) + 1]
        assert (distinct.diff() > 0).all()
        assert (positions[len(distinct) :] == positions[0]).all()
        seen[positions] = True
    assert seen.all()


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
    assert 0.87 < (out != 0).float().mean() < 0.93


def test_dropout_is_the_identity_in_eval_and_has_no_state():
    layer = Dropout(0.025).eval()
    x = torch.randn(4, 8, 5, 5)
    assert layer(x) is x
    assert layer.state_dict() == {}
    assert repr(layer) == repr(nn.Dropout(0.025))


@pytest.mark.parametrize(("p", "n"), [(0.0, 10_000), (0.5, 10_000), (0.01, 1000)])
def test_dropout_of_other_probabilities_or_few_activations_is_torchs_own(p, n):
    x = torch.ones(n)
    torch.manual_seed(0)
    ours = Dropout(p).train()(x)
    torch.manual_seed(0)
    assert torch.equal(ours, nn.Dropout(p).train()(x))


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize("shape", [(64, 8, 12, 12), (100, 300)])
def test_compiled_dropout_drops_the_same_way(shape):
    torch.manual_seed(0)
    layer = torch.compile(Dropout(0.1).train(), dynamic=False)
    leaf = (torch.rand(shape) + 1.0).requires_grad_()
    x = leaf * 1.0
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    out = layer(x)
    kept = out != 0
    assert 0.89 < kept.float().mean() < 0.91
    torch.testing.assert_close(out[kept], leaf[kept] / 0.9)
    grad = torch.rand(shape) + 1.0
    out.backward(grad)
    torch.testing.assert_close(leaf.grad, torch.where(kept, grad / 0.9, torch.zeros(())))
    assert not torch.equal(layer(x) != 0, kept)  # another draw at every call
