"""Which patches of ink are one digit, and in which order the digits of a picture are read."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from image_data.errors import EmptyImageError
from image_data.photo import INK, SPECK, Grey

MOST = 300  # patches that are looked at, the largest: each is compared with each
FAINT = 0.12  # of a digit's ink: a patch that stands alone with less of it is dirt


@dataclass(frozen=True)
class Digit:
    """Where a digit lies in a picture, and its ink, cut out: 0 to 1, [height, width]."""

    left: int
    top: int
    ink: Grey
    line: int = 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height in pixels."""
        return self.left, self.top, self.ink.shape[1], self.ink.shape[0]


def digits_in(ink: Grey) -> list[Digit]:
    """The digits of a picture's ink [H, W] in reading order: lines from top to bottom, each from left to right.

    An EmptyImageError if there is no ink.
    """
    dark = (ink > INK).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(dark)
    if not width:
        raise EmptyImageError("nothing is drawn on the image")
    ink, dark = ink[y : y + height, x : x + width], dark[y : y + height, x : x + width]
    if cv2.connectedComponents(dark)[0] == 2:  # one patch of ink, as most drawings are
        return [Digit(x, y, ink)]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(dark)
    amounts = np.bincount(labels.ravel(), ink.ravel(), count)
    amounts[0] = 0
    least = SPECK * middle(amounts, amounts)
    parts = [part for part in np.argsort(-amounts)[:MOST] if amounts[part] > least]
    boxes = stats[parts, :4].astype(np.float64)
    boxes[:, 2:] += boxes[:, :2]
    groups = joined(boxes, amounts[parts])
    inks = np.array([amounts[parts][group].sum() for group in groups])
    groups = [group for group, found in zip(groups, inks, strict=True) if found > FAINT * middle(inks, inks)]
    digits = []
    for group in groups:
        own = np.zeros(count, dtype=bool)
        own[[parts[place] for place in group]] = True
        own &= amounts >= SPECK * amounts[own].sum()
        own[0] = True  # and so do the faint edges around a digit
        left, top, right, bottom = extent(boxes[[place for place in group if own[parts[place]]]]).astype(int)
        there = slice(top, bottom), slice(left, right)
        digits.append(Digit(x + left, y + top, np.where(own[labels[there]], ink[there], 0)))
    return in_order(digits)


def middle(values: NDArray[Any], weights: NDArray[Any], share: float = 0.5) -> float:
    """The median of ``values``, each as often as it weighs; or another quantile than the half."""
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), share * weights.sum())])


def extent(boxes: NDArray[Any]) -> NDArray[Any]:
    """The box around ``boxes`` [N, 4]: left, top, right, bottom."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def joined(boxes: NDArray[Any], amounts: NDArray[Any]) -> list[list[int]]:
    """Which of ``boxes`` [N, 4] belong together: a stroke that broke, the bar of a 5."""
    groups = [[place] for place in range(len(boxes))]
    around, weights = boxes.copy(), amounts.copy()
    while len(groups) > 1:
        sizes = around[:, 2:] - around[:, :2]
        height = middle(sizes[:, 1], weights, 0.75)
        low, high = (np.minimum, np.maximum)
        sides = [(around[:, axis], around[:, axis + 2]) for axis in (0, 1)]
        apart, below = (high.outer(start, start) - low.outer(end, end) for start, end in sides)
        wide, tall = (high.outer(end, end) - low.outer(start, start) for start, end in sides)
        narrow, short = (low.outer(sizes[:, axis], sizes[:, axis]) for axis in (0, 1))
        over = (-apart > 0.3 * narrow) & (below < 0.12 * height) & (tall < 2.2 * height)
        beside = (apart < 0.04 * height) & (below < 0) & (tall < 1.6 * height)
        piece = (short < 0.6 * height) & (apart < 0.15 * height) & (below < 0.35 * height) & (tall < 1.6 * height)
        near = (over | beside | piece) & (wide < 1.5 * high(tall, height))
        np.fill_diagonal(near, False)
        if not near.any():
            break
        distance = np.where(near, high(apart, 0) + high(below, 0), np.inf)
        one, other = sorted(np.unravel_index(distance.argmin(), distance.shape))
        groups[one] += groups.pop(other)
        around[one] = extent(around[[one, other]])
        weights[one] += weights[other]
        around, weights = np.delete(around, other, 0), np.delete(weights, other)
    return groups


def in_order(digits: list[Digit]) -> list[Digit]:
    """In reading order, each with the number of its line: its neighbours to the left and right are beside it."""
    lines: list[list[Digit]] = []
    for digit in sorted(digits, key=lambda digit: digit.left):
        beside = [shared(line[-1], digit) for line in lines]
        best = int(np.argmax(beside)) if beside else 0
        if beside and beside[best] > 0.3:
            lines[best].append(digit)
        else:
            lines.append([digit])
    steps = [(b.left - a.left, middle_of(b) - middle_of(a)) for line in lines for a, b in pairwise(line)]
    slope = float(np.median([down / max(across, 1) for across, down in steps])) if steps else 0.0
    lines.sort(key=lambda line: middle_of(line[0]) - slope * line[0].left)
    return [replace(digit, line=number) for number, line in enumerate(lines) for digit in line]


def middle_of(digit: Digit) -> float:
    return digit.top + len(digit.ink) / 2


def shared(one: Digit, other: Digit) -> float:
    """How much of the lower of two digits stands at the same height as the other, as a share."""
    (_, a, _, high), (_, b, _, low) = one.box, other.box
    return (min(a + high, b + low) - max(a, b)) / min(high, low)
