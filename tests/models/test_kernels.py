import copy
import os
import shutil

import pytest
from conftest import finished

from imports import nn, torch
from models import kernels, model_v1, model_v2, model_v3
from models.blocks import ConvBlock, Stem, Transition, run_stages
from training.config import TrainConfig
from training.train import train_and_evaluate
from visualization import load_metrics_json

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")


@pytest.fixture(scope="module")
def lanes():
    """How many images the kernels, which are loaded now, take at once."""
    kernels.load_kernels(print)
    with kernels.using_kernels(True):
        return kernels.lanes_in_use()


def plain(stages):
    """The same layers, one after the other, with the same parameters, and none of our own operations."""
    layers = [copy.deepcopy(layer) for stage in stages for block in stage for layer in block]
    return nn.Sequential(*layers)


def randomised(*stages):
    """``stages`` with BatchNorm's parameters drawn too, in training."""
    for layer in nn.ModuleList(stages).modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -1, 1)
    return [stage.train() for stage in stages]


def assert_close(mine, theirs, tolerance=1e-4):
    """Within a part of the largest value, since the additions are in another order."""
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6)


def assert_same_gradients(mine, theirs, tolerance=1e-4):
    """Of the parameters of two networks, one by one."""
    for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None)
        if other.grad is not None:
            assert_close(ours.grad.to(other.grad.dtype), other.grad, tolerance)


def used_kernels(out):
    """Whether autograd would go back from ``out`` through a kernel."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return any("ConvRelu" in str(node) or "MixPool" in str(node) for node in seen)


# What is computed


@needs_compiler
@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "padding"),
    [(1, 8, 28, 0), (8, 16, 26, 0), (10, 16, 12, 0), (16, 10, 8, 0), (10, 10, 6, 1), (10, 16, 10, 1), (3, 7, 9, 1)],
)
def test_a_block_is_its_layers(lanes, inputs, outputs, side, padding):
    torch.manual_seed(0)
    stages = randomised(nn.Sequential(ConvBlock(inputs, outputs, dropout=0.0, padding=padding)))
    theirs = plain(stages)
    for _ in range(2):  # the second time on statistics that moved
        x = torch.randn(3 * lanes, inputs, side, side)
        mine, torchs = (x.clone().requires_grad_() for _ in range(2))
        with kernels.using_kernels(True):
            out = run_stages(mine, *stages)
        assert used_kernels(out)
        expected = theirs(torchs)
        grad = torch.randn_like(expected)
        out.backward(grad), expected.backward(grad)
        assert_close(out, expected)
        assert_close(mine.grad, torchs.grad)
        assert_same_gradients(stages[0], theirs)
        stages[0].zero_grad(), theirs.zero_grad()
        for ours, other in zip(stages[0].buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(ours, other)


@needs_compiler
@pytest.mark.parametrize(
    ("network", "compiled"),
    [(model_v1, False), (model_v2, False), (model_v3, False), pytest.param(model_v3, True, marks=pytest.mark.long)],
)
def test_a_network_is_its_layers(lanes, network, compiled):
    torch.manual_seed(0)
    net = network.Net(dropout=0.0)
    randomised(net.stem, net.block2)
    theirs = copy.deepcopy(net).double()  # of two float32, each would choose between two pixels about equal by chance
    for layer in theirs.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda *_: None)  # so the layers run one after the other
    step = torch.compile(net, dynamic=False) if compiled else net
    images, labels = torch.randn(2 * lanes, 1, 28, 28), torch.randint(10, (2 * lanes,))
    with kernels.using_kernels(True), torch.profiler.profile() as profile:
        mine = step(images)
    assert "small_networks::conv_relu" in {event.key for event in profile.key_averages()}
    expected = theirs(images.double())
    assert_close(mine.double(), expected)
    for out in (mine, expected):
        nn.functional.nll_loss(out, labels).backward()
    assert_same_gradients(net, theirs, tolerance=1e-2)
    for ours, other in zip(net.buffers(), theirs.buffers(), strict=True):
        assert_close(ours.double(), other.double())


@needs_compiler
def test_the_first_of_equal_pixels_is_pooled(lanes):
    torch.manual_seed(0)
    transition = Transition(4, 3).train()
    nn.init.constant_(transition[0].weight, 1.0)  # sums of whole numbers: many are equal
    x = torch.randint(0, 2, (lanes, 4, 24, 24)).float()
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    with kernels.using_kernels(True):
        out = run_stages(mine, nn.Sequential(transition))
    assert used_kernels(out)
    expected = plain([[transition]])(theirs)
    grad = torch.randn_like(expected)
    out.backward(grad), expected.backward(grad)
    assert torch.equal(out, expected)
    assert_close(mine.grad, theirs.grad)


@needs_compiler
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_dropout_drops_others_every_time_and_keeps_the_scale(lanes, compiled):
    torch.manual_seed(0)
    p, images = 0.1, 8 * lanes
    block = ConvBlock(1, 8, dropout=p).train()
    step = torch.compile(run_stages, dynamic=False) if compiled else run_stages
    with kernels.using_kernels(True):
        out, again = (step(torch.randn(images, 1, 12, 12), nn.Sequential(block)).detach() for _ in range(2))
    kept = out != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    assert not torch.equal(again != 0, kept)
    # BatchNorm leaves mean 0 and variance 1, which dropout's scale makes 1 / (1 - p)
    assert abs(out[kept].mean()) < 0.02
    assert abs(out[kept].std() - 1 / (1 - p)) < 0.02


@needs_compiler
@pytest.mark.parametrize("network", [kernels.conv_block, kernels.transition])
def test_what_is_dropped_has_no_part_in_anything(lanes, network):
    torch.manual_seed(0)
    read = (torch.randn(8 * lanes, 8, 12, 12), torch.rand(8) + 0.5, torch.randn(8))
    dropped = (torch.rand(read[0].numel()) < 0.1).nonzero().flatten()
    dropped = torch.cat([dropped, dropped[-1:].expand(5)])  # as torch.compile has them
    conv, norm = nn.Conv2d(8, 5, 3 if network is kernels.conv_block else 1, bias=False), nn.BatchNorm2d(5)
    results = []
    for as_kernel in (True, False):
        x, scale, shift = (tensor.clone().requires_grad_() for tensor in read)
        laid_out = kernels.from_images(x, lanes)
        if as_kernel:
            activations = kernels.Activations(laid_out.x, scale, shift, dropped)
            others = (norm, 0.0) if network is kernels.conv_block else ()
            out = kernels.to_images(network(activations, conv, *others))
        else:
            mask = torch.ones(x.numel()).index_fill_(0, dropped, 0).view_as(laid_out.x)
            out = conv((x * scale[:, None, None] + shift[:, None, None]) * kernels.to_images(laid_out._replace(x=mask)))
            out = norm(out.relu()) if network is kernels.conv_block else nn.functional.max_pool2d(out, 2)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, (x, scale, shift, conv.weight), grad)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, tolerance=1e-3)


@needs_compiler
def test_behind_a_frozen_convolution_the_rest_learns(lanes):
    torch.manual_seed(0)
    stages = randomised(nn.Sequential(ConvBlock(1, 8, dropout=0.0), ConvBlock(8, 4, dropout=0.0)))
    stages[0][0][0].weight.requires_grad_(False)
    theirs, images = plain(stages), torch.randn(2 * lanes, 1, 10, 10)
    with kernels.using_kernels(True):
        out = run_stages(images, *stages)
    assert used_kernels(out)
    expected = theirs(images)
    grad = torch.randn_like(expected)
    out.backward(grad), expected.backward(grad)
    assert_same_gradients(stages[0], theirs)


@needs_compiler
def test_the_operations_are_what_pytorch_is_told_of_them(lanes):
    torch.manual_seed(0)
    operations = torch.ops.small_networks
    x, weight = torch.randn(2, 6, 4, 6, lanes), torch.randn(5, 4, 3, 3)
    read = x, torch.rand(4), torch.rand(4), torch.tensor([3, 70]), weight.to(memory_format=torch.channels_last)
    out, sums = operations.conv_relu(*read, 1)
    mixing = *read[:4], torch.randn(5, 4, 1, 1)
    pooled, places = operations.mix_pool(*mixing)
    for operation, arguments in (
        (operations.conv_relu, (*read, 1)),
        (operations.conv_relu_gradients, (torch.rand_like(out), torch.rand_like(sums), out, *read, 1, True)),
        (operations.mix_pool, mixing),
        (operations.mix_pool_gradients, (torch.rand_like(pooled), places, *mixing)),
    ):
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
def test_activations_may_lie_anywhere(lanes):
    torch.manual_seed(0)

    def elsewhere(x):
        return torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)

    operations = torch.ops.small_networks
    x, weight = torch.randn(2, 6, 4, 6, lanes), torch.randn(5, 4, 3, 3)
    channels = torch.rand(4), torch.rand(4), torch.tensor([3, 70])
    out, sums = operations.conv_relu(x, *channels, weight, 1)
    assert torch.equal(operations.conv_relu(elsewhere(x), *channels, weight, 1)[0], out)
    grad = torch.randn_like(out)
    results = [
        operations.conv_relu_gradients(place(grad), sums, place(out), place(x), *channels, weight, 1, True)
        for place in (lambda tensor: tensor, elsewhere)
    ]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@needs_compiler
def test_any_number_of_threads_computes_the_same(lanes):
    torch.manual_seed(0)
    stem = Stem(dropout=0.0).train()
    images, before = torch.randn(4 * lanes, 1, 28, 28), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            stem.zero_grad()
            with kernels.using_kernels(True):
                out = run_stages(images, stem)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in stem.parameters())])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


# When they are used


def ran_as_kernels(net, images):
    """Whether ``net`` did."""
    with kernels.using_kernels(True):
        return used_kernels(net(images))


@needs_compiler
def test_they_are_used_where_they_can_be_and_left_out_elsewhere(lanes):
    net, images = model_v1.Net().train(), torch.randn(64, 1, 28, 28)
    assert ran_as_kernels(net, images)
    assert not used_kernels(net(images))  # nobody asked for them
    assert not ran_as_kernels(net, images[:-1])  # not whole groups
    assert not ran_as_kernels(net, images[:lanes])  # too few activations to draw dropout's positions
    assert not ran_as_kernels(model_v1.Net(dropout=0.5).train(), images)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ran_as_kernels(net, images)
    for module in (net.block2, net.block2[1], net.block2[1][1], net.stem[2], net.stem[2][1]):
        seen = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        assert not ran_as_kernels(net, images)
        assert seen
        hook.remove()
    assert ran_as_kernels(net, images)


@needs_compiler
@pytest.mark.parametrize(
    ("block", "place", "layer"),
    [
        (ConvBlock(4, 4, dropout=0.0), 0, nn.Conv2d(4, 4, 5, bias=False)),
        (ConvBlock(4, 4, dropout=0.0), 0, nn.Conv2d(4, 4, 3)),
        (ConvBlock(4, 4, dropout=0.0), 0, nn.Conv2d(4, 4, 3, bias=False, groups=2)),
        (ConvBlock(4, 4, dropout=0.0), 0, nn.Conv2d(4, 4, 3, bias=False, stride=2)),
        (ConvBlock(4, 4, dropout=0.0), 0, nn.Conv2d(4, 4, 3, bias=False, padding=1, padding_mode="reflect")),
        (ConvBlock(4, 4, dropout=0.0), 1, nn.GELU()),
        (ConvBlock(4, 4, dropout=0.0), 2, nn.BatchNorm2d(4).eval()),
        (ConvBlock(4, 4, dropout=0.0), 2, nn.BatchNorm2d(4, momentum=None)),
        (ConvBlock(4, 4, dropout=0.0), 2, nn.Identity()),
        (ConvBlock(4, 4, dropout=0.0), 3, nn.Identity()),
        (Transition(4, 4), 0, nn.Conv2d(4, 4, 3, bias=False)),
        (Transition(4, 4), 1, nn.MaxPool2d(3)),
        (Transition(4, 4), 1, nn.AvgPool2d(2)),
    ],
)
def test_a_layer_that_was_replaced_is_computed_as_it_is(lanes, block, place, layer):
    torch.manual_seed(0)
    block = copy.deepcopy(block).train()
    x = torch.randn(lanes, 4, 12, 12)
    assert ran_as_kernels(lambda images: run_stages(images, nn.Sequential(block)), x)
    block[place] = copy.deepcopy(layer)
    theirs = plain([[block]])
    with kernels.using_kernels(True):
        out = run_stages(x, nn.Sequential(block))
    assert not used_kernels(out)
    assert_close(out, theirs(x))


@needs_compiler
def test_an_odd_number_of_rows_is_pooled_as_ever(lanes):
    transition, x = Transition(4, 4).train(), torch.randn(lanes, 4, 9, 12)
    with kernels.using_kernels(True):
        assert torch.equal(run_stages(x, nn.Sequential(transition)), plain([[transition]])(x))


@needs_compiler
def test_a_network_in_evaluation_never_uses_them(lanes):
    net, images = model_v1.Net().eval(), torch.randn(64, 1, 28, 28)
    assert not ran_as_kernels(net, images)
    with kernels.using_kernels(True):
        inside = net(images)
    assert torch.equal(net(images), inside)


@needs_compiler
def test_a_run_says_whether_it_used_them(lanes, tiny, tmp_path):
    settings = {"epochs": 1, "data_dir": str(tiny), "output_dir": str(tmp_path), "device": "cpu"}
    results, lines = {}, []
    for name, others in {"with": {}, "without": {"kernels": False}, "odd": {"batch_size": 60}}.items():
        config = TrainConfig(**{**settings, "batch_size": 64, **others}, name=name)
        results[name] = train_and_evaluate(config, lines.append).metrics["train_losses"]
        assert load_metrics_json(name, tmp_path)["environment"]["kernels"] is (name == "with")
    assert results["with"] != results["without"]
    assert results["with"][0] == pytest.approx(results["without"][0], rel=1e-2)  # not the same are dropped
    note = f"Note: without the CPU kernels, so slower: they take multiples of {lanes} images, not 60 at a time."
    assert [line for line in lines if "kernels" in line] == [note]


# Having them


LOAD = "from models.kernels import load_kernels; load_kernels(print); print('loaded')"


@pytest.mark.long
@needs_compiler
def test_they_are_compiled_once_even_by_several_processes_and_anew_when_damaged(tmp_path, python):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "c++"}

    def load() -> str:
        return finished(python("-c", LOAD, env=env)).stdout

    outputs = [finished(process).stdout for process in [python("-c", LOAD, env=env) for _ in range(2)]]
    assert all(output.endswith("loaded\n") for output in outputs)
    assert sum("compiling" in output for output in outputs) == 1
    assert load() == "loaded\n"
    (library,) = (tmp_path / "small_networks").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    assert load().startswith("Note: compiling the CPU kernels")
    assert load() == "loaded\n"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "No such file or directory: '/nonexistent/c++'"),
        ({"CXX": "false"}, "false: exit status 1"),
        ({"CXX": "'c++"}, "No closing quotation"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory: '/dev/null/small_networks"),
    ],
)
def test_why_they_cannot_be_had_is_told_in_one_line(tmp_path, monkeypatch, env, reason):
    monkeypatch.setattr(kernels, "_lanes", 0)  # as if they had not been loaded
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), "CXX": "c++", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kernels.KernelsError) as caught:
        kernels.load_kernels(print)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.so"))
