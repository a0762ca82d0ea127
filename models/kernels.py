"""The blocks of a training step on the CPU as kernels of our own, in ``kernels.cpp``.

A library's convolution is made for hundreds of channels; with 8 to 16, much of its time and of what stands between two
convolutions is not arithmetic. Here the images of a batch lie side by side in the lanes of the vector registers, 8 with
AVX2 and 16 with AVX-512, so that any number of channels fills them. A block is one operation forward and one backward:
it reads what the block before left, scales, shifts and drops that on the way, convolves it, applies the ReLU and sums
what BatchNorm needs. What is computed is what the layers compute one after the other, in float32.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.files import atomic_write
from imports import FileLock, nn, once_differentiable, torch
from models.fused import dropped_positions

SOURCE = Path(__file__).with_suffix(".cpp")
# what PyTorch calls the processor's instructions -> what compilers call them
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC"]
DIGEST_BYTES = hashlib.sha256().digest_size


class KernelsError(RuntimeError):
    """The kernels cannot be had here; one line says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Having them
# ---------------------------------------------------------------------------------------------------------------------

_lanes = 0  # that the kernels have, once they are loaded
_in_use = False


def load_kernels(log: Callable[[str], None]) -> int:
    """Load the kernels into this process. The first time on a machine they are compiled, and ``log`` hears of it.

    They are kept in the user's cache (``$XDG_CACHE_HOME``, else ``~/.cache``), under a name that changes with
    the source, the processor's instructions, the compiler's command and PyTorch.

    Returns:
        of how many images they take a multiple.

    Raises:
        KernelsError: there is no compiler that can compile them, or no place to keep them.
    """
    global _lanes
    if _lanes:
        return _lanes
    try:
        compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS]
        compiler += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
        decisive = [SOURCE.read_text(encoding="utf-8"), str(torch.__version__), platform.machine(), *compiler]
        key = hashlib.sha256("\0".join(decisive).encode())
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small_networks"
        library = cache / f"kernels-{key.hexdigest()[:16]}.so"
        if not _is_whole(library):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock")):  # processes that start together compile them once
                if not _is_whole(library):
                    log("Note: compiling the CPU kernels, once on this machine.")
                    _compile(compiler, library)
        torch.ops.load_library(library)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: of CXX; RuntimeError: there is no home, or ours
        raise KernelsError((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    _lanes = int(torch.ops.small_networks.lanes())
    return _lanes


def _is_whole(library: Path) -> bool:
    """Whether ``library`` is there and ends with the digest of the rest: loading a part of one ends the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _compile(compiler: list[str], library: Path) -> None:
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / library.name
        command = [*compiler, f"-I{home / 'include'}", str(SOURCE), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error: " in line]
            raise KernelsError(f"{compiler[0]}: {errors[0] if errors else f'exit status {done.returncode}'}")
        content = made.read_bytes()
    with atomic_write(library) as file:
        file.write(content + hashlib.sha256(content).digest())


@contextmanager
def using_kernels(wanted: bool) -> Iterator[None]:
    """Within, networks in training may run as kernels, if ``wanted`` and ``load_kernels`` did load them."""
    global _in_use
    before, _in_use = _in_use, wanted and _lanes > 0
    try:
        yield
    finally:
        _in_use = before


def lanes_in_use() -> int:
    """How many images lie side by side; 0 where the kernels are not used."""
    return _lanes if _in_use else 0


# ---------------------------------------------------------------------------------------------------------------------
# Using them
# ---------------------------------------------------------------------------------------------------------------------


class Activations(NamedTuple):
    """What a block leaves to the next: ``dropout(x * scale + shift)``, not yet computed.

    BatchNorm is but a scale and a shift a channel once its sums are known, and the next block has to read x anyway.
    """

    x: torch.Tensor  # float32 [N / lanes, H, C, W, lanes]
    scale: torch.Tensor  # [C]
    shift: torch.Tensor  # [C]
    dropped: torch.Tensor  # int64 [k], ascending: the positions in x, as it lies in memory, that dropout makes zero


def from_images(images: torch.Tensor, lanes: int) -> Activations:
    """[N, C, H, W], N a multiple of ``lanes``, as the first block reads them."""
    n, channels, height, width = images.shape
    groups = images.reshape(n // lanes, lanes, channels, height, width)
    return _unchanged(groups.permute(0, 3, 2, 4, 1).contiguous())


def to_images(activations: Activations) -> torch.Tensor:
    """The way back: [N, C, H, W], scaled, shifted and dropped."""
    x, scale, shift, dropped = activations
    groups, height, channels, width, lanes = x.shape
    out = x * scale[:, None, None] + shift[:, None, None]
    out = out.view(-1).index_fill(0, dropped, 0).view(x.shape)
    return out.permute(0, 4, 2, 1, 3).reshape(groups * lanes, channels, height, width)


def _unchanged(x: torch.Tensor) -> Activations:
    channels = x.shape[2]
    return Activations(x, torch.ones(channels), torch.zeros(channels), _nothing())


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


def conv_block(input: Activations, conv: nn.Conv2d, norm: nn.BatchNorm2d, p: float) -> Activations:
    """3x3 convolution -> ReLU -> BatchNorm -> dropout, as in training: the running statistics are updated.

    Args:
        p: dropout's; 0 or one for which ``can_draw_positions``.
    """
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    x, sums = _ConvRelu.apply(*input, conv.weight, conv.padding[0])
    n = x.numel() // x.shape[2]
    mean, square = sums / n
    var = (square - mean * mean).clamp_min(0)
    scale = norm.weight * torch.rsqrt(var + norm.eps) / (1 - p)
    shift = norm.bias / (1 - p) - mean * scale
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)
    return Activations(x, scale, shift, dropped_positions(x.numel(), p) if p > 0 else _nothing())


def transition(input: Activations, conv: nn.Conv2d) -> Activations:
    """1x1 convolution -> 2x2 max pooling."""
    return _unchanged(_MixPool.apply(*input, conv.weight))


class _ConvRelu(torch.autograd.Function):
    """Autograd goes on from the sums: what BatchNorm makes of them, and its gradient, are ordinary operations."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = torch.ops.small_networks.conv_relu(*inputs)
        *tensors, ctx.padding = inputs
        ctx.save_for_backward(out, *tensors)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_read = any(ctx.needs_input_grad[:3])  # the first block reads images, which need no gradient
        x, scale, shift, weight = torch.ops.small_networks.conv_relu_gradients(
            *grads, *ctx.saved_tensors, ctx.padding, needs_read
        )
        return (x, scale, shift, None, weight, None) if needs_read else (None, None, None, None, weight, None)


class _MixPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        out, places = torch.ops.small_networks.mix_pool(*inputs)
        ctx.save_for_backward(places, *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, shift, weight = torch.ops.small_networks.mix_pool_gradients(*grads, *ctx.saved_tensors)
        return x, scale, shift, None, weight


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch must know of the operations: their arguments and, for torch.compile, the shapes that they return
# ---------------------------------------------------------------------------------------------------------------------


def _conv_relu_shapes(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    *_, weight, padding = others
    groups, height, _, width, lanes = x.shape
    outputs, grown = len(weight), 2 * padding - 2
    return x.new_empty(groups, height + grown, outputs, width + grown, lanes), x.new_empty(2, outputs)


def _mix_pool_shapes(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    groups, height, _, width, lanes = x.shape
    shape = groups, height // 2, len(others[-1]), width // 2, lanes
    return x.new_empty(shape), x.new_empty(shape)


def _gradient_shapes(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, _dropped: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift), torch.empty_like(weight)


_READ = "Tensor x, Tensor scale, Tensor shift, Tensor dropped, Tensor weight"
_GRADIENTS = "(Tensor x, Tensor scale, Tensor shift, Tensor weight)"

for _name, _signature, _shapes in (
    ("lanes", "() -> int", None),
    # out: ReLU of a 3x3 convolution of what is read; sums [2, C]: of out and of its square, over all images and pixels
    ("conv_relu", f"({_READ}, int padding) -> (Tensor out, Tensor sums)", _conv_relu_shapes),
    (
        "conv_relu_gradients",
        f"(Tensor grad_out, Tensor grad_sums, Tensor out, {_READ}, int padding, bool needs_read) -> {_GRADIENTS}",
        lambda *inputs: _gradient_shapes(*inputs[3:8]),
    ),
    # out: the highest of each 2x2 pixels of a 1x1 convolution of what is read; places: which, 0 to 3, row by row
    ("mix_pool", f"({_READ}) -> (Tensor out, Tensor places)", _mix_pool_shapes),
    (
        "mix_pool_gradients",
        f"(Tensor grad_out, Tensor places, {_READ}) -> {_GRADIENTS}",
        lambda *inputs: _gradient_shapes(*inputs[2:]),
    ),
):
    torch.library.define(f"small_networks::{_name}", _signature)
    if _shapes is not None:
        torch.library.register_fake(f"small_networks::{_name}", _shapes)
