import copy
import math
import shutil

import pytest

from imports import nn, torch
from models.blocks import ConvBlock, Transition
from models.fused import MaxPoolForCompile, dropped_positions, relu_norm_dropout

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")


# Which are dropped


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
        assert (positions[len(distinct) :] == positions[-1]).all()
        seen[positions] = True
    assert seen.all()


# What is computed


@pytest.fixture(params=["eager", "for the compiler"])
def implementation(request, monkeypatch):
    """Each of the two, the compiler's without compiling it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param != "eager")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(16, 8, 26, 26), (31, 10, 6, 6), (3, 16, 25, 27)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_three_as_one_are_the_three_one_by_one(shape, layout, p):
    torch.manual_seed(0)
    ours = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.uniform_(-1, 1)
    theirs = copy.deepcopy(ours)
    for _ in range(2):  # the second time on statistics that moved
        values = (torch.randn(shape) * 3).to(memory_format=layout)
        grad = torch.randn(shape).to(memory_format=layout)
        mine, torchs = (values.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        ours.zero_grad()
        out = relu_norm_dropout(mine * 1.0, ours, p)
        before = grad.clone()
        out.backward(grad)
        assert torch.equal(grad, before)  # others may need it too
        kept = out.detach() != 0
        assert abs(kept.float().mean() - (1 - p)) < 0.01
        theirs.zero_grad()
        expected = theirs(torchs.relu()) * kept / (1 - p)
        expected.backward(grad)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("channels", [8, 10])
def test_in_bfloat16_it_is_about_the_same(channels):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    values, grad = (torch.randn(32, channels, 12, 12).bfloat16() for _ in range(2))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x = values.to(dtype).requires_grad_()
        norm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = relu_norm_dropout(x * 1.0, norm, 0.0)
        assert out.dtype is dtype
        out.backward(grad.to(dtype))
        assert x.grad.dtype is dtype
        results.append([t.float() for t in (out, x.grad, norm.weight.grad.clone(), norm.bias.grad.clone())])
    for exact, rounded in zip(*results, strict=True):
        error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 2**-7  # bfloat16 has 8 bits


@pytest.mark.usefixtures("implementation")
def test_in_bfloat16_the_statistics_are_those_of_float32():
    torch.manual_seed(0)
    shape = (16, 8, 24, 24)
    norm, values = nn.BatchNorm2d(8, momentum=1.0), (torch.randn(shape) + 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        relu_norm_dropout(values.clone(), norm, 0.1)
    torch.testing.assert_close(norm.running_mean, values.float().mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, values.float().var((0, 2, 3)), rtol=1e-3, atol=1e-3)


# The block that uses it


def plain(block):
    """The same layers, one after the other, with the same parameters."""
    return nn.Sequential(*copy.deepcopy(block))


def test_block_without_dropout_is_its_layers():
    torch.manual_seed(0)
    block = ConvBlock(1, 8, dropout=0.0).train()
    theirs = plain(block)
    x = torch.rand(8, 1, 28, 28)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.state_dict(), theirs.state_dict())
    assert int(block[2].num_batches_tracked) == 1
    block.eval(), theirs.eval()
    torch.testing.assert_close(block(x), theirs(x))


@pytest.mark.parametrize(("p", "images"), [(0.5, 16), (0.01, 2)])
def test_dropout_of_other_probabilities_or_few_activations_is_torchs_own(p, images):
    torch.manual_seed(0)
    block = ConvBlock(1, 8, dropout=p).train().to(memory_format=torch.channels_last)  # both draw in its order
    theirs = plain(block)
    x = torch.rand(images, 1, 8, 8).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    out = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, theirs(x), rtol=1e-4, atol=1e-4)


def test_a_hook_on_a_layer_of_a_block_is_called_in_training():
    block = ConvBlock(1, 8, dropout=0.1).train()
    seen = []
    hook = block[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    block(torch.rand(8, 1, 28, 28))
    assert seen == [(8, 8, 26, 26)]
    hook.remove()
    block(torch.rand(8, 1, 28, 28))
    assert len(seen) == 1


def test_statistics_without_momentum_are_the_mean_of_all_batches():
    torch.manual_seed(0)
    block = ConvBlock(1, 8, dropout=0.1).train()
    block[2].momentum = None  # as torch.optim.swa_utils.update_bn sets it
    theirs = plain(block)
    for _ in range(2):
        x = torch.rand(8, 1, 28, 28)
        block(x), theirs(x)
    torch.testing.assert_close(block[2].running_mean, theirs[2].running_mean)


def test_two_draws_of_one_seed_are_the_same_and_the_next_is_another():
    torch.manual_seed(0)
    block = ConvBlock(1, 8, dropout=0.1).train()
    x = torch.rand(8, 1, 28, 28)
    torch.manual_seed(1)
    first = block(x)
    torch.manual_seed(1)
    assert torch.equal(block(x), first)
    assert not torch.equal(block(x) == 0, first == 0)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("amp", [False, True])
def test_compiled_block_is_the_block(amp):
    torch.manual_seed(0)
    block = nn.Sequential(ConvBlock(1, 8, dropout=0.1), ConvBlock(8, 16, dropout=0.1)).train()
    block = block.to(memory_format=torch.channels_last)
    x = torch.rand(32, 1, 28, 28)
    compiled = torch.compile(copy.deepcopy(block), dynamic=False)
    results = []
    for network in (block, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = network(x).float()
        assert 0.89 < (out != 0).float().mean() < 0.91
        assert not torch.equal(network(x) != 0, out != 0)  # another draw at every call
        (out**2).mean().backward()
        results.append((out.std(), out.mean((0, 2, 3)), *(p.grad for p in network.parameters())))
    # Not the same draws, so only about the same; with this many activations that is close.
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)


@pytest.mark.long
@needs_compiler
def test_compiled_gradients_are_those_of_what_was_kept():
    torch.manual_seed(0)
    norm, p = nn.BatchNorm2d(8), 0.1
    theirs = copy.deepcopy(norm)
    values, grad = (torch.randn(16, 8, 26, 26).to(memory_format=torch.channels_last) for _ in range(2))
    mine, torchs = (values.clone().requires_grad_() for _ in range(2))
    out = torch.compile(lambda x: relu_norm_dropout(x * 1.0, norm, p), dynamic=False)(mine)
    before = grad.clone()
    out.backward(grad)
    assert torch.equal(grad, before)
    kept = out.detach() != 0
    expected = theirs(torchs.relu()) * kept / (1 - p)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-2)


# Pooling for the compiler


def test_pooling_for_the_compiler_is_pytorchs_with_the_first_of_equals():
    torch.manual_seed(0)
    values = torch.randint(0, 3, (4, 10, 24, 24)).float().to(memory_format=torch.channels_last)  # many are equal
    mine, theirs = (values.clone().requires_grad_() for _ in range(2))
    out, expected = MaxPoolForCompile.apply(mine, 2), nn.functional.max_pool2d(theirs, 2)
    grad = torch.randn_like(out)
    out.backward(grad), expected.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_compiler_knows_the_layout_of_what_is_pooled(layout):
    x = torch.randn(4, 10, 24, 24).to(memory_format=layout)
    operation = torch.ops.small_networks.max_pool.default
    torch.library.opcheck(operation, (x, 2), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("amp", [False, True])
def test_compiled_transition_is_the_transition(amp):
    torch.manual_seed(0)
    transition = Transition(16, 10).train().to(memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(transition), dynamic=False)
    x = torch.randn(32, 16, 24, 24).to(memory_format=torch.channels_last)
    results = []
    for network in (transition, compiled):
        image = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = network(image)
        out.float().square().mean().backward()
        results.append((out.float(), image.grad, *(p.grad for p in network.parameters())))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if amp else 1e-4, atol=1e-4)
