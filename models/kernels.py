"""Networks of such blocks as one operation on the CPU, forward and backward, in ``kernels.cpp``.

    load_kernels(print)                 # training/native.py: compiled once a machine
    fast = KernelNetwork(network)       # computes what the network computes, with the same parameters

A library's convolution is made for hundreds of channels; with 8 to 16, much of its time and of what stands between two
convolutions is not arithmetic. Here the images of a batch lie side by side in the lanes of the vector registers, 8 with
AVX2 and 16 with AVX-512, so that any number of channels fills them. BatchNorm's numbers and dropout are computed where
they are needed, so that nothing stands between two blocks either.

The networks know nothing of this: what one computes is read off its graph, as torch.fx traces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imports import F, fx, nn, once_differentiable, torch

IMAGE = (1, 28, 28)  # channels, height, width


class UnknownLayersError(ValueError):
    """The network has something that the kernels do not know; one line says what."""


@dataclass
class Plan:
    """What the kernels are to compute: blocks and pooling layers, the mean over all pixels, a linear layer."""

    parameters: list[torch.Tensor] = field(default_factory=list)  # in the order in which they are used
    statistics: list[torch.Tensor] = field(default_factory=list)  # running mean, variance, batches of each block
    blocks: list[int] = field(default_factory=list)  # 1 for a block, 0 for a 1x1 convolution and pooling
    settings: list[float] = field(default_factory=list)  # of each block: padding, dropout, BatchNorm's momentum and eps

    @property
    def shape(self) -> tuple[list[torch.Tensor], list[int], list[float]]:
        """What an operation needs besides the parameters."""
        return self.statistics, self.blocks, self.settings


class KernelNetwork(nn.Module):
    """``network`` as the kernels compute it, in training and in evaluation, on [N, 1, 28, 28] in float32 on the CPU.

    Gradients are those of the parameters, in training. Whatever else is asked for, ``network`` computes itself.

    Raises:
        UnknownLayersError: it has a layer that the kernels do not know, or one with a hook.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_of(network)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        here = images.device.type == "cpu" and images.dtype == torch.float32 and images.shape[1:] == IMAGE
        wants_gradients = torch.is_grad_enabled()
        if not here or images.requires_grad or wants_gradients is not self.training:
            out: torch.Tensor = self.network(images)
        elif self.training:
            out = _Train.apply(images.contiguous(), self.plan, *self.plan.parameters)
        else:
            out = torch.ops.small_networks.evaluate(images.contiguous(), self.plan.parameters, *self.plan.shape)
        return out


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, plan: Plan, *parameters: torch.Tensor) -> torch.Tensor:
        seed = int(torch.empty((), dtype=torch.int64).random_())  # of PyTorch's generator, which checkpoints keep
        out: torch.Tensor
        out, saved = torch.ops.small_networks.train(images, parameters, *plan.shape, seed)
        ctx.save_for_backward(out, *saved, *parameters)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: Plan = ctx.plan
        out, *others = ctx.saved_tensors
        saved, parameters = others[: -len(plan.parameters)], others[-len(plan.parameters) :]
        return None, None, *torch.ops.small_networks.gradients(grads[0], out, saved, parameters, *plan.shape)


# ---------------------------------------------------------------------------------------------------------------------
# What a network computes
# ---------------------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def plan_of(network: nn.Module) -> Plan:
    """What ``network`` computes, in the kernels' terms.

    Raises:
        UnknownLayersError: it cannot be said in them.
    """
    plan, layers = Plan(), _chain(network)
    channels, side, _ = IMAGE
    while True:
        match layers:
            case [nn.Conv2d() as conv, nn.ReLU(), nn.BatchNorm2d() as norm, nn.Dropout() as dropout, *rest] if (
                _is_plain(conv, 3) and norm.affine and norm.track_running_stats and norm.momentum and dropout.p < 1
            ):
                padding = int(conv.padding[0])
                plan.parameters += [conv.weight, norm.weight, norm.bias]
                plan.statistics += norm.buffers()
                plan.blocks.append(1)
                plan.settings += [padding, dropout.p, norm.momentum, norm.eps]
                side += 2 * padding - 2
            case [nn.Conv2d() as conv, nn.MaxPool2d() as pool, *rest] if (
                _is_plain(conv, 1)
                and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (2, 2, 0, 1)
                and side % 2 == 0
            ):
                plan.parameters.append(conv.weight)
                plan.blocks.append(0)
                side //= 2
            case _:
                break
        channels, layers = conv.out_channels, rest
    if not plan.blocks:
        raise UnknownLayersError("it does not begin with a block")
    plan.parameters += _linear_of_mean(layers, channels, side)
    return plan


def _linear_of_mean(layers: list[nn.Module | str], channels: int, side: int) -> list[torch.Tensor]:
    """The parameters of the layer that follows pooling to one pixel, if ``layers`` are that and a log-softmax."""
    while True:
        match layers:
            case [nn.AvgPool2d() as pool, *rest] if (
                pool.kernel_size == pool.stride
                and pool.padding == 0
                and not pool.divisor_override
                and isinstance(pool.kernel_size, int)
                and side % pool.kernel_size == 0
            ):
                side //= pool.kernel_size
            case [nn.AdaptiveAvgPool2d() as adaptive, *rest] if adaptive.output_size == 1:
                side = 1
            case [nn.Conv2d() as linear, "log_softmax"] if side == 1 and _is_plain(linear, 1):
                return [linear.weight]
            case [nn.Linear() as linear, "log_softmax"] if side == 1 and linear.in_features == channels:
                return list(linear.parameters())
            case _:
                raise UnknownLayersError(f"{layers[0] if layers else 'its output'} is not a layer that they know there")
        layers = rest


def _chain(network: nn.Module) -> list[nn.Module | str]:
    """The layers of ``network``, each of which reads what the one before made; a function by its name.

    Reshaping is left out: a linear layer that fits what was pooled to one pixel has been given that.

    Raises:
        UnknownLayersError: it is not such a chain, or a layer has a hook.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever the network's own code says to a stand-in for a tensor
        raise UnknownLayersError(f"its forward pass cannot be traced: {error}") from None
    layers: list[nn.Module | str] = []
    before: list[fx.Node] = []
    for node in graph.nodes:
        if node.all_input_nodes != before:
            raise UnknownLayersError(f"{node} does not read what the layer before it made, and that alone")
        before = [node]
        if node.op == "call_module":
            layers.append(network.get_submodule(str(node.target)))
        elif node.target is F.log_softmax and node.kwargs["dim"] == 1 and node.kwargs["dtype"] is None:
            layers.append("log_softmax")
        elif node.op not in ("placeholder", "output") and node.target not in ("flatten", "view"):
            raise UnknownLayersError(f"{node.target} is not a function that they know")
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise UnknownLayersError("a layer has a hook that waits to see it run")
    return layers


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
