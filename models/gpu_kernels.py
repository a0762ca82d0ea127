"""The kernels of ``gpu_layers.py``, in Triton.

As in ``kernels.cpp``, what stands between two convolutions is computed where it is needed. In memory there is one
tensor a layer, [N, H, W, 16]: what ReLU or pooling left, and in the sign whether dropout drops it; channels that a
layer has not are zero. BatchNorm's numbers come from sums that the programs of one kernel leave and each of the next
adds up, in the same order every time.
"""

import triton
import triton.language as tl
from triton.language import constexpr

PROGRAMS = constexpr(256)  # that share the pixels of a layer; a power of two
WEIGHT_PROGRAMS = constexpr(128)
TILE = constexpr(128)  # pixels that a program has at a time
IMAGE, BLOCK, POOLED = (constexpr(kind) for kind in range(3))  # what a layer reads, or computes


@triton.jit
def _whole(sizes):
    """Inputs, outputs, side, padding, images: floats so far, since for integers Triton makes kernels of their own."""
    a, b, c, d, e = sizes
    return tl.cast(a, tl.int32), tl.cast(b, tl.int32), tl.cast(c, tl.int32), tl.cast(d, tl.int32), tl.cast(e, tl.int32)


@triton.jit
def _places(start, total, side):
    """Pixels from ``start`` on, their images, rows and columns, [TILE, 1] each, and whether there are such."""
    pixel = (start + tl.arange(0, TILE))[:, None]
    return pixel, pixel // (side * side), pixel // side % side, pixel % side, pixel < total


@triton.jit
def _kernel(weight, inputs, outputs, tap, TAPS: constexpr):
    """The weights [in, out] of a place in a kernel of ``TAPS`` places."""
    i, o = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    return tl.load(weight + (o * TAPS + tap) * inputs + i, (i < inputs) & (o < outputs), 0.0)


@triton.jit
def _write_sums(sums, one, two):
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(sums + at, one)
    tl.store(sums + PROGRAMS * 16 + at, two)


@triton.jit
def _read_sums(sums):
    at = sums + tl.arange(0, PROGRAMS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    return tl.sum(tl.load(at), 0), tl.sum(tl.load(at + PROGRAMS * 16), 0)


@triton.jit
def _normalization(block, channels, count):
    """What BatchNorm and dropout multiply by and add, [16] each; the first program keeps what others need."""
    sums, moments, weight, bias, running_mean, running_variance, batches, eps, momentum, rescale = block
    c = tl.arange(0, 16)
    one, two = _read_sums(sums)
    mean = one / count
    variance = tl.maximum(two / count - mean * mean, 0.0)
    inverse = 1 / tl.sqrt(variance + eps)
    if tl.program_id(0) == 0:
        tl.store(moments + c, mean)
        tl.store(moments + 16 + c, inverse)
        mine = c < channels
        old = tl.load(running_mean + c, mine)
        tl.store(running_mean + c, old + momentum * (mean - old), mine)
        old = tl.load(running_variance + c, mine)
        tl.store(running_variance + c, old + momentum * (variance * count / (count - 1) - old), mine)
        tl.store(batches, tl.load(batches) + 1)
    scale = tl.load(weight + c, c < channels, 0.0) * inverse
    shift = tl.load(bias + c, c < channels, 0.0) - mean * scale
    return scale * rescale, shift * rescale


@triton.jit
def _dropped(x):
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _read(x, at, there, scale, shift, SOURCE: constexpr):
    """What a layer reads."""
    value = tl.load(x + at, there, 0.0)
    if SOURCE == BLOCK:
        value = tl.where(there & ~_dropped(value), value * scale + shift, 0.0)
    return value


@triton.jit
def convolve(x, out, sums, before, weight, sizes, seed, layer, drop, SOURCE: constexpr):
    """A block up to its ReLU: ``out``, and the sums that its BatchNorm needs."""
    inputs, outputs, side, padding, images = _whole(sizes)
    to = side + 2 * padding - 2
    c = tl.arange(0, 16)[None, :]
    scale, shift = 0.0, 0.0
    if SOURCE == BLOCK:
        scale, shift = _normalization(before, inputs, images * side * side)
    total = images * to * to
    one, two = tl.zeros([16], tl.float32), tl.zeros([16], tl.float32)
    for start in range(tl.program_id(0) * TILE, total, PROGRAMS * TILE):
        pixel, image, row, column, there = _places(start, total, to)
        if SOURCE == IMAGE:  # of one channel: the nine places are the matrix product's inner side
            y, x_ = row + c // 3 - padding, column + c % 3 - padding
            inside = there & (c < 9) & (y >= 0) & (y < side) & (x_ >= 0) & (x_ < side)
            k = tl.arange(0, 16)[:, None]
            kernel = tl.load(weight + c * 9 + k, (k < 9) & (c < outputs), 0.0)
            values = tl.dot(_read(x, (image * side + y) * side + x_, inside, scale, shift, SOURCE), kernel)
        else:
            values = tl.zeros([TILE, 16], tl.float32)
            for tap in tl.static_range(9):
                y, x_ = row + tap // 3 - padding, column + tap % 3 - padding
                inside = there & (y >= 0) & (y < side) & (x_ >= 0) & (x_ < side) & (c < 16)
                read = _read(x, ((image * side + y) * side + x_) * 16 + c, inside, scale, shift, SOURCE)
                values = tl.dot(read, _kernel(weight, inputs, outputs, tap, 9), values)
        values = tl.maximum(values, 0.0)
        one += tl.sum(values, 0)
        two += tl.sum(values * values, 0)
        dropped = tl.rand(tl.load(seed) + tl.cast(layer, tl.int32), pixel * 16 + c) < drop
        marked = values.to(tl.int32, bitcast=True) | (dropped.to(tl.int32) << 31)
        tl.store(out + pixel * 16 + c, marked.to(tl.float32, bitcast=True), there & (c < 16))
    _write_sums(sums, one, two)


@triton.jit
def mix_and_pool(x, out, chosen, before, weight, sizes):
    """A 1x1 convolution and 2x2 max pooling: ``out``, and which of the four is the largest."""
    inputs, outputs, side, _, images = _whole(sizes)
    c = tl.arange(0, 16)[None, :]
    scale, shift = _normalization(before, inputs, images * side * side)
    total = images * (side // 2) * (side // 2)
    kernel = _kernel(weight, inputs, outputs, 0, 1)
    for start in range(tl.program_id(0) * TILE, total, PROGRAMS * TILE):
        pixel, image, row, column, there = _places(start, total, side // 2)
        there = there & (c < 16)
        best = tl.full([TILE, 16], float("-inf"), tl.float32)
        which = tl.zeros([TILE, 16], tl.int8)
        for corner in tl.static_range(4):
            at = (image * side + 2 * row + corner // 2) * side + 2 * column + corner % 2
            value = tl.dot(_read(x, at * 16 + c, there, scale, shift, BLOCK), kernel)
            which = tl.where(value > best, corner, which).to(tl.int8)
            best = tl.maximum(value, best)
        tl.store(out + pixel * 16 + c, best, there)
        tl.store(chosen + pixel * 16 + c, which, there)


@triton.jit
def mean(x, out, before, sizes):
    """The mean over the pixels of the image that has this program's number."""
    inputs, _, side, _, images = _whole(sizes)
    c = tl.arange(0, 16)
    scale, shift = _normalization(before, inputs, images * side * side)
    total = tl.zeros([16], tl.float32)
    for start in range(0, side * side, 64):
        pixel = (start + tl.arange(0, 64))[:, None]
        at = (tl.program_id(0) * side * side + pixel) * 16 + c[None, :]
        total += tl.sum(_read(x, at, (pixel < side * side) & (c[None, :] < 16), scale, shift, BLOCK), 0)
    tl.store(out + tl.program_id(0) * inputs + c, total / (side * side), c < inputs)


@triton.jit
def mean_back(dmeans, x, out, sums, sizes, rescale):
    """The gradient of what ``mean`` read, before dropout, and the sums that the gradient of BatchNorm needs."""
    inputs, _, side, _, images = _whole(sizes)
    c = tl.arange(0, 16)[None, :]
    total = images * side * side
    one, two = tl.zeros([16], tl.float32), tl.zeros([16], tl.float32)
    for start in range(tl.program_id(0) * TILE, total, PROGRAMS * TILE):
        pixel, image, _row, _column, there = _places(start, total, side)
        before = tl.load(x + pixel * 16 + c, there & (c < inputs), 0.0)
        values = tl.load(dmeans + image * inputs + c, there & (c < inputs), 0.0) * (rescale / (side * side))
        values = tl.where(_dropped(before), 0.0, values)
        tl.store(out + pixel * 16 + c, values, there & (c < 16))
        one += tl.sum(values, 0)
        two += tl.sum(values * tl.abs(before), 0)
    _write_sums(sums, one, two)


@triton.jit
def _behind(sums, moments, weight, channels, count):
    """How the gradient of a block's convolution follows from that of its BatchNorm, whose own gradients come last.

    Factors of the gradient and of the value, and what is added: [16] each.
    """
    c = tl.arange(0, 16)
    mean, inverse = tl.load(moments + c), tl.load(moments + 16 + c)
    of_bias, with_value = _read_sums(sums)
    of_weight = (with_value - mean * of_bias) * inverse
    scale = tl.load(weight + c, c < channels, 0.0) * inverse
    slope = -scale * inverse * of_weight / count
    return scale, slope, -scale * of_bias / count - slope * mean, of_weight, of_bias


@triton.jit
def _gradient(du, y, image, row, column, there, to, factors, KIND: constexpr):
    """The gradient of a convolution's output at some places, [.., 16]."""
    c = tl.arange(0, 16)[None, :]
    if KIND == BLOCK:
        at = ((image * to + row) * to + column) * 16 + c
        value = tl.load(y + at, there, 0.0)
        gradient = tl.load(du + at, there, 0.0) * factors[0] + tl.abs(value) * factors[1] + factors[2]
        return tl.where(value != 0, gradient, 0.0)
    at = ((image * to + row // 2) * to + column // 2) * 16 + c
    return tl.where(tl.load(y + at, there, -1) == row % 2 * 2 + column % 2, tl.load(du + at, there, 0.0), 0.0)


@triton.jit
def back(du, y, sums, behind, x, out, sums_out, weight, sizes, rescale, KIND: constexpr, SOURCE: constexpr):
    """The gradient of what a layer read; of a block's output before dropout, with the sums of ``mean_back``."""
    inputs, outputs, side, padding, images = _whole(sizes)
    to = side + 2 * padding - 2 if KIND == BLOCK else side // 2
    c = tl.arange(0, 16)[None, :]
    factors = (0.0, 0.0, 0.0)
    if KIND == BLOCK:
        scale, slope, shift, _, _ = _behind(sums, behind[0], behind[1], outputs, images * to * to)
        factors = (scale, slope, shift)
    total = images * side * side
    one, two = tl.zeros([16], tl.float32), tl.zeros([16], tl.float32)
    for start in range(tl.program_id(0) * TILE, total, PROGRAMS * TILE):
        pixel, image, row, column, there = _places(start, total, side)
        there = there & (c < 16)
        values = tl.zeros([TILE, 16], tl.float32)
        for tap in tl.static_range(9 if KIND == BLOCK else 1):
            y_, x_ = row + padding - tap // 3, column + padding - tap % 3
            inside = there
            if KIND == BLOCK:
                inside = inside & (y_ >= 0) & (y_ < to) & (x_ >= 0) & (x_ < to)
            kernel = _kernel(weight, inputs, outputs, tap, 9 if KIND == BLOCK else 1)
            values = tl.dot(_gradient(du, y, image, y_, x_, inside, to, factors, KIND), tl.trans(kernel), values)
        before = tl.load(x + pixel * 16 + c, there, 0.0)
        if SOURCE == BLOCK:
            values = tl.where(there & ~_dropped(before), values * rescale, 0.0)
        tl.store(out + pixel * 16 + c, values, there)
        one += tl.sum(values, 0)
        two += tl.sum(values * tl.abs(before), 0)
    _write_sums(sums_out, one, two)


@triton.jit
def back_to_weights(
    du, y, sums, behind, x, before, parts, of_norm, sizes, KIND: constexpr, SOURCE: constexpr, K: constexpr
):
    """Parts of the weights' gradient, [row of the kernel, program, K, 16], and all of BatchNorm's.

    K are the inputs by the places in a row, or the nine places of the image.
    """
    inputs, outputs, side, padding, images = _whole(sizes)
    c, k = tl.arange(0, 16), tl.arange(0, K)
    to = side + 2 * padding - 2 if KIND == BLOCK else side // 2
    factors = (0.0, 0.0, 0.0)
    if KIND == BLOCK:
        scale, slope, shift, of_weight, of_bias = _behind(sums, behind[0], behind[1], outputs, images * to * to)
        factors = (scale, slope, shift)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(of_norm[0] + c, of_weight, c < outputs)
            tl.store(of_norm[1] + c, of_bias, c < outputs)
    scale, shift = 0.0, 0.0
    if SOURCE == BLOCK:
        moments, weight, bias, rescale = before
        i = k % 16
        scale = tl.load(weight + i, i < inputs, 0.0) * tl.load(moments + 16 + i) * rescale
        shift = tl.load(bias + i, i < inputs, 0.0) * rescale - tl.load(moments + i) * scale
    k = k[None, :]
    wide = to if KIND == BLOCK else side
    total = images * wide * wide
    values = tl.zeros([K, 16], tl.float32)
    for start in range(tl.program_id(0) * TILE, total, WEIGHT_PROGRAMS * TILE):
        _pixel, image, row, column, there = _places(start, total, wide)
        gradient = _gradient(du, y, image, row, column, there & (c[None, :] < 16), to, factors, KIND)
        if SOURCE == IMAGE:
            y_, x_, used = row + k // 3 - padding, column + k % 3 - padding, k < 9
        else:
            y_, x_, used = row + tl.program_id(1) - padding, column + k // 16 - padding, k < 48
        at = (image * side + y_) * side + x_
        if SOURCE != IMAGE:
            at = at * 16 + k % 16
        inside = there & used & (y_ >= 0) & (y_ < side) & (x_ >= 0) & (x_ < side)
        values = tl.dot(tl.trans(_read(x, at, inside, scale, shift, SOURCE)), gradient, values)
    at = (tl.program_id(1) * WEIGHT_PROGRAMS + tl.program_id(0)) * K + tl.arange(0, K)
    tl.store(parts + at[:, None] * 16 + c[None, :], values)


@triton.jit
def add_parts(parts, out, sizes, TAPS: constexpr, K: constexpr):
    """The weights' gradient: the sum over all programs, for a row of the kernel and one of its K."""
    inputs, outputs, _, _, _ = _whole(sizes)
    row, k, c = tl.program_id(0), tl.program_id(1), tl.arange(0, 16)
    at = ((row * WEIGHT_PROGRAMS + tl.arange(0, WEIGHT_PROGRAMS)) * K + k)[:, None] * 16 + c[None, :]
    i, tap = (0, k) if TAPS == 9 and K == 16 else (k % 16, row * 3 + k // 16)
    tl.store(out + (c * TAPS + tap) * inputs + i, tl.sum(tl.load(parts + at), 0), (c < outputs) & (i < inputs))
