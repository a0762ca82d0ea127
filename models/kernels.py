"""All blocks of a network as one operation, forward and backward: ``kernels.cpp`` on a CPU, ``gpu_layers.py`` on a GPU.

    load_kernels(print)                 # training/native.py: the CPU's, compiled once a machine
    fast = KernelNetwork(network)       # computes what the network computes, with the same parameters

A library's convolution is made for hundreds of channels, not for 8 to 16: docs/speed.md tells what is done instead. The
networks know nothing of this: what one computes is read off its graph, as torch.fx traces it.
"""

from dataclasses import dataclass, field
from typing import Any

from imports import F, fx, nn, once_differentiable, torch

IMAGE = (1, 28, 28)  # channels, height, width


class UnknownLayersError(ValueError):
    """The kernels cannot run a network; one line says why."""


@dataclass
class Layers:
    """What the kernels run: blocks, and 1x1 convolutions with pooling, one after the other."""

    parameters: list[torch.Tensor] = field(default_factory=list)  # in the order in which they are used
    statistics: list[torch.Tensor] = field(default_factory=list)  # running mean, variance, batches of each block
    blocks: list[int] = field(default_factory=list)  # 1 for a block, 0 for a 1x1 convolution and pooling
    settings: list[float] = field(default_factory=list)  # of each block: padding, dropout, BatchNorm's momentum and eps

    @property
    def others(self) -> tuple[list[torch.Tensor], list[int], list[float]]:
        """What an operation needs besides the parameters."""
        return self.statistics, self.blocks, self.settings


class KernelNetwork(nn.Module):
    """``network``, which begins with blocks and pooling to one pixel, with those run by the kernels.

    In training gradients are those of the parameters. What the kernels do not do is done by ``network`` itself: other
    number formats and devices, the images' gradients, gradients in evaluation, evaluation on a GPU. Raises as
    ``divided``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.layers, self.head = divided(network)
        self.train(network.training)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        where = ("cpu", "cuda") if self.training else ("cpu",)
        as_planned = images.device.type in where and images.dtype == torch.float32 and images.shape[1:] == IMAGE
        if not as_planned or images.requires_grad or torch.is_grad_enabled() is not self.training:
            out: torch.Tensor = self.network(images)
        else:
            images, layers = images.contiguous(), self.layers
            if self.training:
                means = _Train.apply(images, layers, *layers.parameters)
            else:
                means, _ = torch.ops.small_networks.forward(images, layers.parameters, *layers.others, False, 0)
            out = self.head(means[:, :, None, None])
        return out


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, layers: Layers, *parameters: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if images.device.type == "cuda":
            from models import gpu_layers  # needs Triton

            out, ctx.steps = gpu_layers.forward(images, layers)
            return out
        seed = int(torch.empty((), dtype=torch.int64).random_())  # of PyTorch's generator, which checkpoints keep
        out, saved = torch.ops.small_networks.forward(images, parameters, *layers.others, True, seed)
        ctx.save_for_backward(*parameters, *saved)
        ctx.layers = layers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if grads[0].device.type == "cuda":
            from models import gpu_layers

            return None, None, *gpu_layers.gradients(grads[0], ctx.steps)
        layers: Layers = ctx.layers
        count = len(layers.parameters)
        parameters, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        return None, None, *torch.ops.small_networks.gradients(grads[0], saved, parameters, *layers.others)


# What a network begins with


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def divided(network: nn.Module) -> tuple[Layers, nn.Module]:
    """The layers that ``network`` begins with, as far as the kernels know them, and what follows them.

    An UnknownLayersError if it does not begin with blocks and pooling to one pixel, or a layer has a hook.
    """
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise UnknownLayersError(f"a hook waits to see {type(module).__name__} run")
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever the network's own code says to a stand-in for a tensor
        raise UnknownLayersError(f"{type(network).__name__}: {str(error).splitlines()[0]}") from None
    images, *nodes = _chain(graph)
    layers, left = _known_layers([network.get_submodule(str(node.target)) for node in nodes])
    mine = nodes[: len(nodes) - len(left)]
    mine[-1].replace_all_uses_with(images)
    for node in reversed(mine):
        graph.erase_node(node)
    head = fx.GraphModule(network, graph)
    if left and isinstance(left[0], nn.Conv2d) and _is_plain(left[0], 1):
        head.set_submodule(str(nodes[len(mine)].target), _OnePixel(left[0]))
    return layers, head


class _OnePixel(nn.Module):
    """A 1x1 convolution of one pixel, as the matrix product that it is: in a tenth of a convolution's time."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), self.conv.weight.flatten(1))[:, :, None, None]


def _chain(graph: fx.Graph) -> list[fx.Node]:
    """The images, and the modules that run one after the other from there on, each on what the one before made."""
    chain = list(graph.nodes)[:1]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        if user.op != "call_module" or user.args != (chain[-1],) or user.kwargs:
            break
        chain.append(user)
    return chain


def _known_layers(modules: list[nn.Module]) -> tuple[Layers, list[nn.Module]]:
    """What the kernels run of ``modules``, from the first on, and those that are left. Raises as ``divided``."""
    layers, left, side = Layers(), modules, IMAGE[1]
    while True:
        match left:
            case [
                nn.Conv2d(padding=(int(padding), _)) as conv,
                nn.ReLU(),
                nn.BatchNorm2d(affine=True, track_running_stats=True, momentum=float(momentum)) as norm,
                nn.Dropout(p=p),
                *rest,
            ] if _is_plain(conv, 3) and p < 1:
                layers.parameters += [conv.weight, norm.weight, norm.bias]
                layers.statistics += norm.buffers()
                layers.blocks.append(1)
                layers.settings += [padding, p, momentum, norm.eps]
                side += 2 * padding - 2
            case [nn.Conv2d() as conv, nn.MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1), *rest] if (
                _is_plain(conv, 1) and side % 2 == 0
            ):
                layers.parameters.append(conv.weight)
                layers.blocks.append(0)
                side //= 2
            case _:
                break
        left = rest
    while side > 1:
        match left:
            case [nn.AvgPool2d(kernel_size=int(size), stride=stride, padding=0, divisor_override=None), *rest] if (
                stride == size and side % size == 0
            ):
                side //= size
            case [nn.AdaptiveAvgPool2d(output_size=1), *rest]:
                side = 1
            case _:
                where = f"after {len(layers.blocks)} blocks" if layers.blocks else "first"
                raise UnknownLayersError(f"{left[0] if left else 'a function'} is not what they know {where}")
        left = rest
    return layers, left


def _is_plain(conv: nn.Conv2d, size: int) -> bool:
    """Whether ``conv`` is a convolution as the blocks have them: only its channels and its padding may be others."""
    return (
        conv.kernel_size == (size, size)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in [(border, border) for border in range(size)]
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.bias is None
    )
