import copy
import os
import shutil
import subprocess
import sys
import threading

import pytest

from file_utils import PROJECT_DIR
from imports import nn, torch
from models import kernels, model_v1, model_v2, model_v3
from models.blocks import ConvBlock, Stem, Transition, run_stages
from train_config import TrainConfig
from trainer import train_and_evaluate
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
        expected = theirs(torchs)
        grad = torch.randn_like(expected)
        out.backward(grad), expected.backward(grad)
        assert_close(out, expected)
        assert_close(mine.grad, torchs.grad)
        for ours, other in zip(stages[0].parameters(), theirs.parameters(), strict=True):
            assert_close(ours.grad, other.grad)
            ours.grad = other.grad = None
        for ours, other in zip(stages[0].buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(ours, other)


@needs_compiler
@pytest.mark.parametrize(
    ("network", "compiled"), [(model_v1, False), (model_v2, False), (model_v3, False), (model_v3, True)]
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
    with kernels.using_kernels(True):
        mine = step(images)
    expected = theirs(images.double())
    assert_close(mine.double(), expected)
    for out in (mine, expected):
        nn.functional.nll_loss(out, labels).backward()
    for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
        assert_close(ours.grad.double(), other.grad, tolerance=1e-2)
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
    expected = plain([[transition]])(theirs)
    grad = torch.randn_like(expected)
    out.backward(grad), expected.backward(grad)
    assert torch.equal(out, expected)
    assert_close(mine.grad, theirs.grad)


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_dropped_has_no_part_in_the_gradients(lanes, compiled):
    """The second block makes visible what the first dropped: it adds up each pixel's 3x3 surroundings."""
    torch.manual_seed(0)
    p, images = 0.1, 8 * lanes
    block = ConvBlock(1, 8, dropout=p).train()
    step = torch.compile(run_stages, dynamic=False) if compiled else run_stages
    with kernels.using_kernels(True):
        out = step(torch.randn(images, 1, 12, 12), nn.Sequential(block))
        again = step(torch.randn(images, 1, 12, 12), nn.Sequential(block))
    kept = out.detach() != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    assert not torch.equal(again.detach() != 0, kept)
    scaled = out.detach()[kept]
    # BatchNorm leaves mean 0 and variance 1, which dropout's scale makes 1 / (1 - p)
    assert abs(scaled.mean()) < 0.02
    assert abs(scaled.std() - 1 / (1 - p)) < 0.02

    x = torch.randn(images, 8, 12, 12, requires_grad=True)
    activations = kernels.from_images(x, lanes)
    dropped = (torch.rand(x.numel()) < p).nonzero().flatten()
    conv, norm = nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)
    result = kernels.conv_block(activations._replace(dropped=dropped), conv, norm, 0.0)
    mask = torch.ones(x.numel()).index_fill_(0, dropped, 0).view_as(activations.x)
    expected = norm(conv(x * kernels.to_images(activations._replace(x=mask))).relu())
    assert_close(kernels.to_images(result), expected)
    grad = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(y, (x, conv.weight), grad) for y in (kernels.to_images(result), expected))
    for ours, other in zip(mine, theirs, strict=True):
        assert_close(ours, other)


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
        return any("ConvRelu" in str(node) for node in graph_of(net(images)))


def graph_of(out):
    """The operations that autograd would go back through."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return seen


@needs_compiler
def test_they_are_used_where_they_can_be_and_left_out_elsewhere(lanes):
    net, images = model_v1.Net().train(), torch.randn(64, 1, 28, 28)
    assert ran_as_kernels(net, images)
    assert not any("ConvRelu" in str(node) for node in graph_of(net(images)))  # nobody asked for them
    assert not ran_as_kernels(net, images[:-1])  # not whole groups
    assert not ran_as_kernels(model_v1.Net(dropout=0.5).train(), images)  # more than positions are drawn for
    with torch.autocast("cpu", torch.bfloat16):
        assert not ran_as_kernels(net, images)
    for module in (net.block2, net.block2[1], net.block2[1][1], net.stem[2], net.stem[2][1]):
        seen = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        assert not ran_as_kernels(net, images)
        assert seen
        hook.remove()
    assert ran_as_kernels(net, images)
    net.block2[0][2].momentum = None
    assert not ran_as_kernels(net, images)


@needs_compiler
def test_a_network_in_evaluation_never_uses_them(lanes):
    net, images = model_v1.Net().eval(), torch.randn(64, 1, 28, 28)
    assert not ran_as_kernels(net, images)
    with kernels.using_kernels(True):
        inside = net(images)
    assert torch.equal(net(images), inside)


@needs_compiler
def test_a_run_says_whether_it_used_them(tiny_mnist, tmp_path):
    settings = {"epochs": 1, "batch_size": 32, "data_dir": str(tiny_mnist), "output_dir": str(tmp_path)}
    results = {}
    for wanted in (True, False):
        result = train_and_evaluate(TrainConfig(**settings, kernels=wanted, name=f"run_{wanted}"), lambda line: None)
        results[wanted] = result.metrics["train_losses"]
        assert load_metrics_json(f"run_{wanted}", tmp_path)["environment"]["kernels"] is wanted
    assert results[True] != results[False]  # the last bits
    assert results[True][0] == pytest.approx(
        results[False][0], rel=1e-2
    )  # but for those, and what is dropped, the same


# Having them


def load_in_a_process(cache, **env):
    """Load them with nothing but ``cache``; what the process printed."""
    code = "from models.kernels import load_kernels; load_kernels(print); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_DIR,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **env},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@needs_compiler
def test_they_are_compiled_once_even_by_several_processes_and_anew_when_damaged(tmp_path):
    outputs: list[str] = []
    threads = [threading.Thread(target=lambda: outputs.append(load_in_a_process(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(output.endswith("loaded\n") for output in outputs)
    assert sum("compiling" in output for output in outputs) == 1
    assert load_in_a_process(tmp_path, CXX="c++") == "loaded\n"
    (library,) = (tmp_path / "small_networks").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    assert load_in_a_process(tmp_path).startswith("Note: compiling the CPU kernels")
    assert load_in_a_process(tmp_path) == "loaded\n"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "No such file or directory: '/nonexistent/c++'"),
        ({"CXX": "false"}, "false: exit status 1"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory: '/dev/null/small_networks"),
    ],
)
def test_why_they_cannot_be_had_is_told_in_one_line(tmp_path, env, reason):
    output = load_in_a_process(tmp_path, **env)
    assert output.splitlines()[-1].startswith("models.kernels.KernelsError: ")
    assert reason in output.splitlines()[-1]
    assert not list(tmp_path.rglob("*.so"))
