"""Augmentation of whole batches, float grey levels 0-255 [N, 1, H, W], each image by its own draws.

policy = get_policy("affine")      # policies.py has them all; python -m tools.augment shows what they do
draws = torch.rand(len(images), policy.draws)
images = augment(images, policy, draws)
"""

import functools
import math

from image_data.policies import GRID, Policy
from imports import F, torch

FILL = 1  # grey level (of 255) of what the specification's rotation brings in from outside: its fill=(1,)


def augment(images: torch.Tensor, policy: Policy, draws: torch.Tensor) -> torch.Tensor:
    """Change each image by its own ``draws``, uniform from [0, 1), [N, policy.draws]."""
    if policy.nearest:
        return rotate(images, (2 * draws[:, 0] - 1) * policy.rotation)
    of = dict(zip(policy.parts, draws.split([*policy.parts.values()], dim=1), strict=True))
    if "affine" in of or "elastic" in of:
        matrix = displacement = None
        if "affine" in of:
            angle, x, y, scale, shear = (2 * of["affine"] - 1).unbind(1)
            matrix = inverse_affine(
                angle * policy.rotation,
                torch.stack([x, y], dim=1) * policy.shift,
                1 + scale * policy.scale,
                shear * policy.shear,
                images.shape[-2:],
            )
        if "elastic" in of:
            points = (2 * of["elastic"] - 1).view(-1, 2, GRID, GRID) * policy.elastic
            displacement = smooth_displacement(points, images.shape[-2:])
        images = warp(images, matrix, displacement)
    if "thickness" in of:
        images = thicken(images, (2 * of["thickness"][:, 0] - 1) * policy.thickness)
    if "erase" in of:
        images = erase(images, of["erase"], policy.erase)
    return images


# What is made from numbers of the host is made once a device: a CUDA graph cannot record that.
@functools.cache
def _half_size(height: int, width: int, device: torch.device) -> torch.Tensor:
    """[2]: x and y from the centre to the edge, in pixels."""
    return torch.tensor([width / 2, height / 2], device=device)


@functools.cache
def _pixel_centres(height: int, width: int, device: torch.device) -> torch.Tensor:
    """[2, H * W]: x and y of every pixel's centre, from -1 to 1 between the image's edges, as grid_sample counts."""
    y, x = (torch.arange(size, device=device) * (2 / size) + (1 / size - 1) for size in (height, width))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)])


def rotate(images: torch.Tensor, degrees: torch.Tensor, fill: float = FILL) -> torch.Tensor:
    """Rotate each image about its centre by its own ``degrees`` [N], counter-clockwise, taking the nearest pixel.

    The same as torchvision's ``RandomRotation`` on PIL images (nearest is its default), but for pixels whose
    source lies on the border of two cells, where rounding decides. ``fill`` is of pixels whose source lies outside.
    """
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # where an output pixel takes its value from: the inverse rotation, y downwards
    matrix = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2)
    height, width = images.shape[-2:]
    grid = (matrix @ _pixel_centres(height, width, images.device)).view(-1, 2, height, width).permute(0, 2, 3, 1)
    # grid_sample can only fill with zeros
    sampled = F.grid_sample(images - fill, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled.add_(fill)


def inverse_affine(
    degrees: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, shear: torch.Tensor, size: torch.Size
) -> torch.Tensor:
    """Where each output pixel takes its value from: the inverse of shear along x, scale, rotation, then shift.

    The convention is that of ``torchvision.transforms.functional.affine``: ``degrees`` [N] are clockwise, ``shift``
    [N, 2] pixels to the right and down, ``scale`` and ``shear`` (degrees) [N], ``size`` (H, W) of the images.

    Returns [N, 2, 3], for coordinates from -1 to 1 between the image's edges.
    """
    angle, slope = degrees * (math.pi / 180), (shear * (math.pi / 180)).tan()
    cos, sin = angle.cos(), angle.sin()
    # the forward matrix is scale * [[cos, -cos * slope - sin], [sin, -sin * slope + cos]], of determinant scale^2
    linear = torch.stack([cos - sin * slope, cos * slope + sin, -sin, cos], dim=1).view(-1, 2, 2)
    linear = linear / scale.view(-1, 1, 1)
    pixels = _half_size(size[0], size[1], shift.device)
    offset = linear @ -shift.unsqueeze(2)
    to_units = pixels.view(2, 1) / pixels.view(1, 2)  # 1 but for images that are not square
    return torch.cat([linear / to_units, offset / pixels.view(2, 1)], dim=2)


@functools.cache
def _bicubic(points: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """[points^2, H * W]: what each control point of a square grid over the image adds to each pixel."""
    unit = torch.eye(points * points, device=device).view(-1, 1, points, points)
    return F.interpolate(unit, (height, width), mode="bicubic", align_corners=True).view(points * points, -1)


def smooth_displacement(points: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """A smooth field through the displacements of a grid of control points, the outer ones on the image's border.

    ``points`` are pixels along x and y, [N, 2, G, G], ``size`` (H, W). Returns [N, 2, H * W] in units of which the
    image's sides have 2.
    """
    height, width = size
    field = points.flatten(2) @ _bicubic(points.shape[-1], height, width, points.device)
    return field * (1 / _half_size(height, width, points.device)).view(2, 1)


def warp(images: torch.Tensor, matrix: torch.Tensor | None, displacement: torch.Tensor | None) -> torch.Tensor:
    """Resample each image once, bilinear, black outside: by a ``matrix`` as of ``inverse_affine``, and with a
    ``displacement`` as of ``smooth_displacement`` added to where a pixel takes its value from.
    """
    height, width = images.shape[-2:]
    grid = _pixel_centres(height, width, images.device).expand(len(images), -1, -1)
    if matrix is not None:
        grid = torch.baddbmm(matrix[:, :, 2:], matrix[:, :, :2], grid)
    if displacement is not None:
        grid = grid + displacement
    grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def thicken(images: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Move each image towards its 3x3 dilation (``amount`` [N] 1) or erosion (-1), which is what a pen's width does."""
    amount = amount.view(-1, 1, 1, 1)
    sign = torch.where(amount < 0, -1.0, 1.0)
    signed = images * sign  # the erosion is the dilation of the negative
    return torch.lerp(signed, F.max_pool2d(signed, 3, stride=1, padding=1), amount.abs()) * sign


def erase(images: torch.Tensor, draws: torch.Tensor, largest: float) -> torch.Tensor:
    """Blacken a square in each image, of a side of up to ``largest`` pixels.

    ``draws``, uniform from [0, 1), [N, 3]: the centre's x and y in the image, the side as a part of ``largest``.
    """
    height, width = images.shape[-2:]
    half = draws[:, 2:] * (largest / 2)
    inside = []
    for place, size in ((draws[:, 1:2] * height, height), (draws[:, 0:1] * width, width)):
        centres = torch.arange(size, device=images.device) + 0.5
        inside.append((centres - place).abs() < half)  # [N, size]
    return images.masked_fill((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), 0.0)
