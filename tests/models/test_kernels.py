import copy
import os
import shutil

import pytest
from conftest import finished

import model_strategy
from imports import F, nn, torch
from models import model_v1, model_v2, model_v3
from models.blocks import ConvBlock, Transition, log_probabilities
from models.kernels import KernelNetwork, UnknownLayersError
from training.config import TrainConfig
from training.native import KernelsError, load_kernels, with_kernels
from training.train import train_and_evaluate
from visualization import load_metrics_json

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")


class Small(nn.Module):
    """``blocks``, which make ``channels``, then what all networks end with."""

    def __init__(self, channels, *blocks):
        super().__init__()
        self.blocks, self.pool, self.output = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 10)

    def forward(self, x):
        return log_probabilities(self.output(self.pool(self.blocks(x)).flatten(1)))


@pytest.fixture(scope="module")
def lanes():
    """How many images the kernels, which are loaded now, take at once."""
    load_kernels(print)
    return torch.ops.small_networks.lanes()


def randomised(net):
    """``net`` with BatchNorm's parameters drawn too, in training."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -1, 1)
    return net.train()


def assert_close(mine, theirs, tolerance=1e-4):
    """Within a part of the largest value, since the additions are in another order."""
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6)


def assert_same_gradients(mine, theirs, tolerance=1e-4):
    """Of the parameters of two networks, one by one."""
    for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None)
        if other.grad is not None:
            assert_close(ours.grad.double(), other.grad.double(), tolerance)


def used_kernels(out):
    """Whether autograd would go back from ``out`` through the kernels."""
    waiting = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        waiting += [after for after, _ in node.next_functions if after is not None]
        if type(node).__name__ == "_TrainBackward":
            return True
    return False


def assert_trains_alike(net, theirs, images):
    """By the kernels as in double precision by its layers.

    Of many pixels some are so near to 0, or to each other where they are pooled, that rounding decides.
    """
    theirs = theirs.double()
    labels = torch.randint(10, (len(images),))
    mine, expected = KernelNetwork(net)(images), theirs(images.double())
    assert used_kernels(mine)
    assert_close(mine.double(), expected)
    for out in (mine, expected):
        F.nll_loss(out, labels).backward()
    assert_same_gradients(net, theirs, tolerance=1e-3 if len(images) < 10 else 5e-2)
    for ours, other in zip(net.buffers(), theirs.buffers(), strict=True):
        assert_close(ours.double(), other.double())


# What is computed

NETWORKS = {
    "model 1": lambda: model_v1.Net(dropout=0.0),
    "model 2": lambda: model_v2.Net(dropout=0.0),
    "model 3": lambda: model_v3.Net(dropout=0.0),
    "paddings": lambda: Small(3, ConvBlock(1, 7, 0.0, 2), ConvBlock(7, 5, 0.0, 1), Transition(5, 3)),
    "pooling first": lambda: Small(13, Transition(1, 2), Transition(2, 6), ConvBlock(6, 13, 0.0)),
}


@needs_compiler
@pytest.mark.parametrize("images", [40, 3])  # not whole groups
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_its_layers_in_training(lanes, name, images):
    torch.manual_seed(0)
    net = randomised(NETWORKS[name]()).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(net)
    for _ in range(2):  # the second time on statistics that moved
        assert_trains_alike(net, theirs, torch.randn(images, 1, 28, 28))
        net.zero_grad(), theirs.zero_grad()


@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_its_layers_in_evaluation(lanes, name):
    torch.manual_seed(0)
    net = randomised(NETWORKS[name]())
    net(torch.randn(20, 1, 28, 28))  # moves the running statistics
    fast, images = KernelNetwork(net).eval(), torch.randn(2 * lanes + 3, 1, 28, 28)
    with torch.inference_mode():
        assert_close(fast(images), net(images))
        assert_close(fast(images[:1]), net(images[:1]))
        assert fast(images[:0]).shape == (0, 10)


@needs_compiler
def test_the_first_of_equal_pixels_is_pooled(lanes):
    torch.manual_seed(0)
    net = Small(4, ConvBlock(1, 4, 0.0), Transition(4, 4)).train()
    for layer in (net.blocks[0][0], net.blocks[1][0]):
        nn.init.constant_(layer.weight, 1.0)  # sums of whole numbers: many are equal
    assert_trains_alike(net, copy.deepcopy(net), torch.randint(0, 2, (lanes, 1, 28, 28)).float())


def positions_of(net, images, seed=5):
    """Of every block what dropout drops, as a mask [N, C, H, W], as the kernels draw with ``seed``."""
    layers = KernelNetwork(net).layers
    _, saved = torch.ops.small_networks.forward(images, layers.parameters, *layers.others, True, seed)
    masks = []
    for x, extra in zip(saved[3::3], saved[5::3], strict=True):  # of every layer: activations, numbers, positions
        if extra.dtype == torch.int32:
            groups, height, channels, width, _ = x.shape
            mask = torch.ones(groups, x[0].numel())
            for row, drawn in zip(mask, extra.tolist(), strict=True):
                row[drawn[: drawn.index(len(row))]] = 0.0
            mask = mask.view(x.shape).permute(0, 4, 2, 1, 3).reshape(-1, channels, height, width)
            masks.append(mask[: len(images)])
    return masks


class Masked(nn.Module):
    def __init__(self, mask, p):
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x):
        return x * self.mask / (1 - self.p)


@needs_compiler
@pytest.mark.parametrize("network", [model_v1, model_v3])
def test_what_is_dropped_has_no_part_in_anything(lanes, network, monkeypatch):
    torch.manual_seed(0)
    net, images = randomised(network.Net(dropout=0.2)), torch.randn(lanes + 5, 1, 28, 28)
    theirs, masks = copy.deepcopy(net), iter(positions_of(copy.deepcopy(net), images))
    for block in theirs.modules():
        if isinstance(block, ConvBlock):
            block[3] = Masked(next(masks), 0.2)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self: self.fill_(5))
    assert_trains_alike(net, theirs, images)


@needs_compiler
@pytest.mark.parametrize("p", [0.01, 0.1, 0.9])
def test_dropped_positions_are_independent_trials(lanes, p):
    torch.manual_seed(0)
    net, images = Small(4, ConvBlock(1, 4, p), ConvBlock(4, 4, p)), torch.zeros(20 * lanes, 1, 28, 28)
    first, second = positions_of(net, images)
    for mask in (first, second):
        n, variance = mask.numel(), p * (1 - p)
        assert abs(mask.mean() - (1 - p)) < 5 * (variance / n) ** 0.5
        per_place = mask.sum(0)  # binomial, so chi-square / places is 1 +- sqrt(2 / places)
        chi_square = ((per_place - len(images) * (1 - p)) ** 2 / (len(images) * variance)).mean()
        assert abs(chi_square - 1) < 5 * (2 / per_place.numel()) ** 0.5
        for distance in (1, 2, 24, lanes):  # of images, as they lie side by side and in groups
            covariance = ((mask[distance:] - 1 + p) * (mask[:-distance] - 1 + p)).mean()
            assert abs(covariance) < 5 * variance / n**0.5
    assert all(torch.equal(*pair) for pair in zip(positions_of(net, images), (first, second), strict=True))
    assert not torch.equal(positions_of(net, images, seed=6)[0], first)
    assert not torch.equal(first[:, :, :24, :24], second)


@needs_compiler
def test_pytorchs_generator_decides_what_is_dropped(lanes):
    torch.manual_seed(0)
    net, images = KernelNetwork(model_v1.Net(dropout=0.1).train()), torch.randn(lanes, 1, 28, 28)
    state = torch.get_rng_state()
    first, second = net(images), net(images)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(net(images), first)


@needs_compiler
def test_behind_a_frozen_convolution_the_rest_learns(lanes):
    torch.manual_seed(0)
    net = randomised(Small(4, ConvBlock(1, 8, 0.0), ConvBlock(8, 4, 0.0)))
    net.blocks[0][0].weight.requires_grad_(False)
    assert_trains_alike(net, copy.deepcopy(net), torch.randn(2 * lanes, 1, 28, 28))


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
def test_images_may_lie_anywhere(lanes, training):
    images = torch.randn(2 * lanes, 1, 28, 28)
    elsewhere = torch.cat([torch.zeros(1), images.flatten()])[1:].view_as(images)  # a float past any boundary
    net = KernelNetwork(model_v1.Net(dropout=0.0).train(training))
    assert torch.equal(net(images), net(elsewhere))
    assert torch.equal(net(images), net(images.flip(0).contiguous().flip(0)))


@needs_compiler
def test_any_number_of_threads_computes_the_same(lanes):
    images, before = torch.randn(4 * lanes, 1, 28, 28), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            net = model_v1.Net().train()
            fast = KernelNetwork(net)
            fast.head = nn.Flatten()  # PyTorch's own
            out = fast(images)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in fast.layers.parameters), *net.buffers()])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


# When they are used


@needs_compiler
def test_what_is_not_theirs_the_network_computes_itself(lanes):
    torch.manual_seed(0)
    net, images = model_v1.Net(dropout=0.0), torch.randn(lanes, 1, 28, 28)
    fast = KernelNetwork(net)
    for training in (True, False):
        fast.train(training)
        wanted = images.clone().requires_grad_()
        fast(wanted)[0, 0].backward()
        assert wanted.grad.abs().sum() > 0
    assert torch.equal(fast(images), net(images))  # in evaluation, with gradients
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="channels"):  # the network's own words
            fast(torch.randn(lanes, 3, 28, 28))
        assert torch.equal(fast.double()(images.double()), net(images.double()))


class Branched(Small):
    def forward(self, x):
        block = self.blocks[0]
        return super().forward(block(x) + x)


class Sensitive(Small):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def replaced(block, place, layer):
    """A network of ``block``, whose layer in ``place`` is ``layer``."""
    block[place] = layer
    return Small(4, nn.Sequential(block))


@needs_compiler
@pytest.mark.parametrize(
    "net",
    [
        replaced(ConvBlock(1, 4, 0.0), 0, nn.Conv2d(1, 4, 5, bias=False)),
        replaced(ConvBlock(1, 4, 0.0), 0, nn.Conv2d(1, 4, 3)),
        replaced(ConvBlock(1, 4, 0.0), 0, nn.Conv2d(1, 4, 3, bias=False, stride=2)),
        replaced(ConvBlock(1, 4, 0.0), 0, nn.Conv2d(1, 4, 3, bias=False, padding=1, padding_mode="reflect")),
        replaced(ConvBlock(2, 4, 0.0), 0, nn.Conv2d(2, 4, 3, bias=False, groups=2)),
        replaced(ConvBlock(1, 4, 0.0), 1, nn.GELU()),
        replaced(ConvBlock(1, 4, 0.0), 2, nn.BatchNorm2d(4, momentum=None)),
        replaced(ConvBlock(1, 4, 0.0), 2, nn.BatchNorm2d(4, affine=False)),
        replaced(ConvBlock(1, 4, 0.0), 2, nn.BatchNorm2d(4, track_running_stats=False)),
        replaced(ConvBlock(1, 4, 0.0), 2, nn.Identity()),
        replaced(ConvBlock(1, 4, 0.0), 3, nn.Dropout(1.0)),
        replaced(ConvBlock(1, 4, 0.0), 3, nn.Identity()),
        replaced(Transition(1, 4), 0, nn.Conv2d(1, 4, 3, bias=False)),
        replaced(Transition(1, 4), 1, nn.MaxPool2d(3)),
        replaced(Transition(1, 4), 1, nn.AvgPool2d(2)),
        Small(4, ConvBlock(1, 4, 0.0), nn.Tanh()),
        Small(4, *[Transition(1, 1)] * 2, Transition(1, 4)),  # of 7x7 pixels
        Branched(1, ConvBlock(1, 1, 0.0, 1)),
        Sensitive(4, ConvBlock(1, 4, 0.0)),
        nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1)),
    ],
)
def test_a_network_of_other_layers_is_computed_as_it_is(lanes, net):
    with pytest.raises(UnknownLayersError):
        KernelNetwork(net)
    lines = []
    assert with_kernels(net, lines.append) is net
    (line,) = lines
    assert line.startswith("Note: without the CPU kernels, so slower: ")
    assert "\n" not in line


class Sharpened(Small):
    def forward(self, x):
        pooled = self.pool(self.blocks(x)).flatten(1)
        return log_probabilities(self.output(pooled * pooled.sigmoid()))


@needs_compiler
def test_what_follows_the_pooling_pytorch_runs(lanes):
    torch.manual_seed(0)
    net = randomised(Sharpened(4, ConvBlock(1, 4, 0.0)))
    assert_trains_alike(net, copy.deepcopy(net), torch.randn(3, 1, 28, 28))


@needs_compiler
@pytest.mark.parametrize("name", ["", "block2", "block2.1", "block2.1.1", "stem.2.1"])
def test_a_layer_with_a_hook_is_run(lanes, name):
    net = model_v1.Net()
    hook = net.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(UnknownLayersError, match="hook"):
        KernelNetwork(net)
    hook.remove()
    KernelNetwork(net)


class OwnStrategy(model_strategy.ModelStrategy):
    def build(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))


@needs_compiler
def test_a_run_says_whether_it_used_them(lanes, tiny, tmp_path, monkeypatch):
    settings = {"epochs": 1, "data_dir": str(tiny), "output_dir": str(tmp_path), "device": "cpu"}
    monkeypatch.setitem(model_strategy._REGISTRY, "own", OwnStrategy)
    results, lines = {}, []
    for name, others in {"with": {}, "without": {"kernels": False}, "own": {"model": "own"}}.items():
        config = TrainConfig(**{**settings, "batch_size": 60, **others}, name=name)
        results[name] = train_and_evaluate(config, lines.append).metrics["train_losses"]
        assert load_metrics_json(name, tmp_path)["environment"]["kernels"] is (name == "with")
    assert results["with"] != results["without"]
    assert results["with"][0] == pytest.approx(results["without"][0], rel=1e-2)  # not the same are dropped
    assert len([line for line in lines if "without the CPU kernels" in line]) == 1


# Having them


LOAD = "from training.native import load_kernels; load_kernels(print); print('loaded')"


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
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), "CXX": "c++", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KernelsError) as caught:
        load_kernels(print)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.so"))
