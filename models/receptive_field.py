"""What each layer of a network sees of the image: its output's shape, its parameters, its receptive field.

    print(format_table(receptive_fields(model_v1.Net())))

A layer of kernel k and stride s makes of its input's field r and jump j

    r_out = r + (k - 1) * j,    j_out = j * s,    with r = j = 1 for the image;

see Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill, 2019,
https://distill.pub/2019/computing-receptive-fields (doi:10.23915/distill.00021).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from imports import nn, torch

Shape = tuple[int, int, int]  # channels, height, width

IMAGE: Shape = (1, 28, 28)
# Each unit of their output depends on one position of their input.
POINTWISE = (nn.ReLU, nn.BatchNorm2d, nn.Dropout, nn.Identity)
KNOWN = (*POINTWISE, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear)


@dataclass(frozen=True)
class LayerField:
    """One layer, as the network runs it. All extents are the side of a square."""

    name: str  # path of the module in the network, as model.get_submodule takes it
    kind: str
    output: Shape  # a vector of n numbers is (n, 1, 1)
    parameters: int
    kernel: int  # units of the layer's input, as the stride
    stride: int
    jump: int  # pixels of the image between two neighbouring units of the output
    field: int  # pixels that one of them depends on, with the zeros that padding adds around the image


def receptive_fields(model: nn.Module) -> list[LayerField]:
    """Every layer of ``model`` (its modules without children) in the order in which they run on a 28x28 image.

    They must run one after another, without branches; a ValueError if one is of a kind that is not known here, or its
    kernel or stride is not a square. ``model`` itself is left as it is.
    """
    model = copy.deepcopy(model).cpu().eval()
    names = {module: name for name, module in model.named_modules()}
    rows = [LayerField("", "", IMAGE, 0, kernel=1, stride=1, jump=1, field=1)]

    def follow(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        before = rows[-1]
        channels, height, width = (*output.shape[1:], 1, 1)[:3]
        shape = channels, height, width
        kernel, stride = _kernel_and_stride(layer, before.output, shape)
        jump, field = before.jump * stride, before.field + (kernel - 1) * before.jump
        parameters = sum(p.numel() for p in layer.parameters())
        rows.append(LayerField(names[layer], type(layer).__name__, shape, parameters, kernel, stride, jump, field))

    for module in names:
        if not list(module.children()):
            module.register_forward_hook(follow)
    with torch.inference_mode():
        model(torch.zeros(1, *IMAGE))
    return rows[1:]


def _kernel_and_stride(layer: nn.Module, before: Shape, after: Shape) -> tuple[int, int]:
    """How many neighbouring units of the layer's input, of shape ``before``, one of its output depends on."""
    if isinstance(layer, POINTWISE):
        return 1, 1
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        dilation = _side(getattr(layer, "dilation", 1))
        return (_side(layer.kernel_size) - 1) * dilation + 1, _side(layer.stride)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        if before[1] % after[1] or before[2] % after[2]:
            raise ValueError(f"{layer} of {before[1]}x{before[2]} units has windows of several sizes")
        window = _side((before[1] // after[1], before[2] // after[2]))
        return window, window
    if isinstance(layer, nn.Linear):  # a convolution whose kernel covers all that was flattened
        return _side(before[1:]), 1
    known = ", ".join(kind.__name__ for kind in KNOWN)
    raise ValueError(f"{layer} is not a layer whose receptive field is known here; known: {known}")


def _side(size: int | tuple[int, ...]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"{height}x{width} is not a square; only square kernels and strides are supported")
    return height


def format_table(rows: Iterable[LayerField]) -> str:
    """``rows`` as plain text, one line a layer under a line of headings."""
    line = "{:<12} {:<18} {:>9} {:>11} {:>7} {:>7} {:>10} {:>11}".format
    lines = [line("layer", "type", "output", "parameters", "kernel", "stride", "jump [px]", "field [px]")]
    for row in rows:
        cells = vars(row) | {"output": "x".join(map(str, row.output)), "parameters": f"{row.parameters:,}"}
        lines.append(line(*cells.values()))
    return "\n".join(lines)
