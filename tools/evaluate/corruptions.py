"""Images spoilt in 16 ways at 5 strengths each, after MNIST-C (Mu and Gilmer 2019, arXiv:1906.02337).

corrupt(images, "fog", strength=3)      # uint8 [N, 28, 28] -> the same

corruptions.toml lists them with their strengths. Where it says nothing else they are those of the authors' code
(github.com/google-research/mnist-c, corruptions.py), in which every corruption has 5 severities although the published
images are of one each. Where it knows one severity only, or measures in another way, the strengths are this module's.
Not among them is canny_edges, which has no strength. The draws are our own, so that the images are not those
of the published files, but of the same kind.
"""

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from imports import F, torch

SEED = 0
SIZE = 28  # pixels, height and width
FOG_MAP = 256  # pixels; the side of the clouds that a window of 28 x 28 is cut from
FOG_MAPS = 64  # different ones
MUD = 63 / 255  # grey level of spatter
SPOT = 2.0  # pixels; the standard deviation of the blur that makes spots of mud
FROM_SIDE = torch.arange(SIZE).minimum(torch.arange(SIZE).flip(0))  # pixels from the nearer side
LINE_WIDTH = 2.3  # pixels either way within which a line fades to nothing

Images = torch.Tensor  # float [N, 1, 28, 28], from 0 (black) to 1
Apply = Callable[[Images, Any, torch.Generator], Images]  # images, a strength, draws -> spoilt ones


@dataclass(frozen=True)
class Corruption:
    """One way to spoil images: ``apply(images, strengths[strength - 1], generator)``."""

    apply: Apply
    strengths: list[Any]
    meaning: str  # of a strength's value


def corrupt(images: torch.Tensor, name: str, strength: int, seed: int = SEED) -> torch.Tensor:
    """Spoil grey levels uint8 [N, 28, 28] by one of CORRUPTIONS at a strength of 1 to 5.

    The same seed gives the same images, and the strengths share their draws.
    """
    corruption = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(seed)
    clean = images.unsqueeze(1).float() / 255
    spoilt = corruption.apply(clean, corruption.strengths[strength - 1], generator)
    return spoilt.clamp(0, 1).mul(255).round().to(torch.uint8).squeeze(1)


def impulse_noise(images: Images, share: float, generator: torch.Generator) -> Images:
    """A share of the pixels turns black or white, as often the one as the other."""
    draws = torch.rand(images.shape, generator=generator)
    return torch.where(draws < share / 2, 0.0, torch.where(draws > 1 - share / 2, 1.0, images))


def gaussian_blur(images: Images, sigma: float, generator: torch.Generator) -> Images:
    """Out of focus. Draws nothing."""
    reach = math.ceil(4 * sigma)
    blurred: Images = v2.functional.gaussian_blur(images, 2 * reach + 1, sigma)
    return blurred


def glass_blur(images: Images, values: tuple[float, int, int], generator: torch.Generator) -> Images:
    """Through frosted glass: blurred, pixels swapped with neighbours, blurred again."""
    sigma, distance, rounds = values
    pixels = gaussian_blur(images, sigma, generator).flatten(1).t().contiguous()  # [784, N]: a row a pixel
    shape = (SIZE, len(images))
    for _ in range(rounds):
        for row in range(SIZE - distance, distance, -1):
            swapped = torch.rand(shape, generator=generator) < 0.5
            down, right = (torch.randint(-distance, distance, shape, generator=generator) for _ in range(2))
            for column in range(SIZE - distance, distance, -1):
                here = row * SIZE + column
                there = here + torch.where(swapped[column], down[column] * SIZE + right[column], 0).unsqueeze(0)
                value, other = pixels[here].clone(), pixels.gather(0, there)
                pixels.scatter_(0, there, value.unsqueeze(0))
                pixels[here] = other[0]
    return gaussian_blur(pixels.t().reshape(images.shape), sigma, generator)


def motion_blur(images: Images, values: tuple[int, float], generator: torch.Generator) -> Images:
    """Smeared in a direction of up to 45 degrees from the horizontal, fading as half a Gaussian.

    As ImageMagick does it: a weighted mean of copies, each a pixel further.
    """
    reach, sigma = values
    angles = (torch.rand(len(images), generator=generator) * 2 - 1) * (math.pi / 4)
    pixels = F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIZE, SIZE], align_corners=False)
    onward = torch.stack([angles.cos(), angles.sin()], 1)[:, None, None] * (2 / SIZE)
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(2 * reach + 1)]
    smeared = torch.zeros_like(images)
    for step, weight in enumerate(weights):
        grid = pixels + step * onward
        smeared += weight * F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return smeared / sum(weights)


def contrast(images: Images, factor: float, generator: torch.Generator) -> Images:
    """Every pixel nearer to the image's mean. Draws nothing."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * factor + mean


def fog(images: Images, values: tuple[float, float], generator: torch.Generator) -> Images:
    """Clouds in front, each image with a window of its own out of larger ones."""
    (thickness, decay), line = values, torch.arange(SIZE)
    clouds = _plasma(decay, generator)
    sides, shape = (FOG_MAPS, FOG_MAP, FOG_MAP), (len(images), 1, 1)
    which, top, left = (torch.randint(side, shape, generator=generator) for side in sides)
    windows = clouds[which, (top + line.view(1, -1, 1)) % FOG_MAP, (left + line) % FOG_MAP].unsqueeze(1)
    white = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * windows) * white / (white + thickness)


def _plasma(decay: float, generator: torch.Generator) -> torch.Tensor:
    """Clouds [64, 256, 256] from 0 to 1 that tile the plane, by the diamond-square algorithm.

    Fournier, Fussell and Carpenter 1982, doi:10.1145/358523.358553. From one octave to the next the draws become
    ``decay`` squared times smaller, since MNIST-C's code multiplies with its decaying number twice.
    """
    heights = torch.zeros(FOG_MAPS, FOG_MAP, FOG_MAP)
    step, size = FOG_MAP, 1.0

    def around(corners: list[torch.Tensor]) -> torch.Tensor:
        draws = torch.rand(corners[0].shape, generator=generator) * 2 - 1
        return torch.stack(corners).mean(0) + size * draws

    while step > 1:
        half = step // 2
        corner = heights[:, ::step, ::step]
        right, below = corner.roll(-1, 2), corner.roll(-1, 1)
        heights[:, half::step, half::step] = around([corner, right, below, right.roll(-1, 1)])
        centre = heights[:, half::step, half::step]
        heights[:, ::step, half::step] = around([corner, right, centre, centre.roll(1, 1)])
        heights[:, half::step, ::step] = around([corner, below, centre, centre.roll(1, 2)])
        step, size = half, size / decay**2
    lowest, highest = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - lowest) / (highest - lowest)


def spatter(images: Images, share: float, generator: torch.Generator) -> Images:
    """Spots of dark grey mud over a share of the image: where blurred noise is highest."""
    noise = gaussian_blur(torch.randn(images.shape, generator=generator), SPOT, generator)
    threshold = noise.flatten(1).quantile(1 - share, dim=1).view(-1, 1, 1, 1)
    return torch.where(noise > threshold, MUD, images)


def dotted_line(images: Images, lines: int, generator: torch.Generator) -> Images:
    """Dots of two columns, as far apart, from the left edge to the right."""
    columns = torch.arange(SIZE)
    dots = (columns % 4 >= 2) & (columns < SIZE - 1)
    for _ in range(lines):
        start, end = torch.randint(SIZE - 1, (2, len(images), 1), generator=generator)
        images = _draw(images, start + (end - start) * columns / (SIZE - 1), dots)
    return images


def zigzag(images: Images, lines: int, generator: torch.Generator) -> Images:
    """Lines that go up and down by two pixels, every eight columns the same."""
    first, last, columns = 2, 25, torch.arange(SIZE)
    waves = 2 - ((columns - first + 2) % 8 - 4).abs()  # 0 at the first column, 2 and -2 two and six columns further
    inside = (columns >= first) & (columns < last)
    for _ in range(lines):
        start = torch.randint(SIZE - 1, (len(images), 1), generator=generator)
        rise = torch.randint(-5, 5, (len(images), 1), generator=generator)
        images = _draw(images, start + rise * (columns - first) / (last - first) + waves, inside)
    return images


def _draw(images: Images, rows: torch.Tensor, columns: torch.Tensor) -> Images:
    """Draw a white curve that passes through the row ``rows[n, column]`` in the ``columns`` that are True."""
    distance = (torch.arange(SIZE).view(1, -1, 1) - rows.unsqueeze(1)).abs() / LINE_WIDTH
    ink = torch.where(columns, ((1 - distance).clamp(min=1e-6).log() + 1).clamp(min=0), 0.0)
    return (images + ink.unsqueeze(1)).clamp(max=1)


def _affine(
    images: Images, angle: float = 0, right: int = 0, down: int = 0, size: float = 1, slant: float = 0
) -> Images:
    """About the centre, bilinear, black from outside; angles in degrees."""
    bilinear = v2.InterpolationMode.BILINEAR
    moved: Images = v2.functional.affine(images, angle, [right, down], size, [slant, 0], interpolation=bilinear)
    return moved


def _either_way(images: Images, generator: torch.Generator, **change: Any) -> Images:
    """Each image changed so, or by as much the other way."""
    forward = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    back = {key: -value for key, value in change.items()}
    return torch.where(forward, _affine(images, **change), _affine(images, **back))


IN_A_LINE: dict[str, Apply] = {
    # each pixel counts photons, which arrive at random
    "shot_noise": lambda images, photons, draws: torch.poisson(images * photons, draws) / photons,
    # every row a part of a pixel further than the one below
    "shear": lambda images, factor, draws: _either_way(images, draws, slant=math.degrees(math.atan(factor))),
    "rotate": lambda images, radians, draws: _either_way(images, draws, angle=math.degrees(radians)),
    # along a diagonal
    "translate": lambda images, pixels, draws: _either_way(
        _either_way(images, draws, right=pixels), draws, down=pixels
    ),
    "scale": lambda images, factor, _: _affine(images, size=factor),
    "brightness": lambda images, added, _: (images + added).clamp(max=1),
    # black and white exchanged at the left and the right
    "stripe": lambda images, columns, _: torch.where(columns > FROM_SIDE, 1 - images, images),
}
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CORRUPTIONS = {name: Corruption(IN_A_LINE.get(name) or globals()[name], **row) for name, row in _TABLE.items()}
