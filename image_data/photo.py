"""The ink of a drawing, a scan or a photo: light, shadows, the table around the sheet and printed lines taken away.

ink = ink_of(grey)      # grey levels [H, W] -> float32 [H, W], 0 (paper) to 1 (the darkest ink)
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from image_data.errors import MIN_CONTRAST, EmptyImageError

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]

INK = 0.1  # of the darkest ink: from here on a pixel belongs to the digit
SPECK = 0.02  # of all ink: a patch apart from the rest with less of it is dirt
MIN_ABSORBED = 0.06  # of the paper's light, by the ink of a photo; less is an empty sheet
SURE = 5  # times the paper's grain: a photo's ink is darker
SMALL_SIDE = 320  # pixels, on which the light and the sheet are looked for
WINDOW = 0.2  # of the longer side: within it some of the paper is bare
EVEN = 0.3  # of all pixels have the same level in a drawing
STROKE = 0.15  # of the shorter side: half of a drawing's stroke is thinner
MARGIN = 0.05  # of a side: a line along the picture's edge is no wider
RULE = 0.012  # of the shorter side: printed lines are no thicker

LIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue


def most_contrast(rgb: NDArray[np.uint8]) -> Grey:
    """The grey levels [H, W] of a coloured picture, or of that mixture of its colours in which strokes stand out."""
    factor = min(1.0, SMALL_SIDE / max(rgb.shape[:2]))
    small = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    off = (small.astype(np.float32) - cv2.medianBlur(small, 2 * round(WINDOW * SMALL_SIDE / 2) + 1)).reshape(-1, 3)
    strongest = np.linalg.eigh(off.T @ off)[1][:, -1]
    mixed, grey = ((off @ weights) ** 2 for weights in (strongest, LIGHTNESS / np.linalg.norm(LIGHTNESS)))
    if float(grey.sum()) > 0.3 * float(mixed.sum()):
        return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    levels = rgb.astype(np.float32) @ strongest.astype(np.float32)
    return np.asarray(levels - min(0.0, float(levels.min())), dtype=np.float32)


def ink_of(grey: Grey) -> Grey:
    """How much ink every pixel carries, from 0 (paper) to 1 (the darkest), [H, W].

    An EmptyImageError if there is no more contrast than an empty sheet's.
    """
    edges = np.concatenate(edges_of(grey))
    common = int(np.bincount(edges.astype(np.uint8)).argmax())
    off = (grey != common).view(np.uint8)
    share = 1 - cv2.countNonZero(off) / grey.size
    thin = share > 0.7 or (
        share > 0.5 and float(cv2.distanceTransform(off, cv2.DIST_L2, 3).max()) < STROKE * min(off.shape)
    )
    if thin and float((edges == common).mean()) > 0.9:  # no room for a sheet on it
        bare = ink_of_drawing(grey, common, cv2.boundingRect(off))
        if bare is not None:
            return bare
    plain = common if share > EVEN else None  # the level of a paper without any grain
    rows, columns = within_margins(grey, plain)
    inner = np.ascontiguousarray(grey[rows, columns])
    sheet, found = sheet_of(inner), inner - paper_of(inner)
    drawn = sheet is None and is_drawn(inner, found, plain)
    drawn = drawn and contrast_of(np.abs(found), MIN_CONTRAST, found.size) >= MIN_CONTRAST
    if drawn:
        found = found if float(found.sum()) > 0 else -found
        least, grain = float(MIN_CONTRAST), spread(np.concatenate(edges_of(found)))
    else:
        found = absorbed(inner, sheet)
        grain = spread(found if sheet is None else found[sheet])
        least = max(MIN_ABSORBED, SURE * grain)
    contrast = contrast_of(found, least, found.size)
    if contrast < least and plain is not None and sheet is None and (edges != common).any():
        side = max(grey.shape) // 2  # a drawing cut off along its ink: it is looked at on more of its paper
        return ink_of(np.pad(grey, side, constant_values=plain))[side:-side, side:-side]
    if contrast < least:
        raise EmptyImageError("nothing is drawn on the image")
    noise = 4 * grain / contrast
    clear: Grey = np.clip((found / contrast - noise) / max(1 - noise, 0.1), 0, 1)
    ink = np.zeros_like(grey)
    ink[rows, columns] = without_lines(clear, 0.995) if drawn else strokes_of(without_lines(clear, 0.7), sheet)
    return ink


def ink_of_drawing(grey: Grey, paper: int, box: Sequence[int]) -> Grey | None:
    """What ``ink_of`` finds of a drawing in the ``box`` on bare ``paper``, in a fifth of the time; None: too faint."""
    left, top, width, height = box
    found = grey[top : top + height, left : left + width] - paper
    if not width or contrast_of(np.abs(found), MIN_CONTRAST, grey.size) < MIN_CONTRAST:
        return None
    found = found if float(found.sum()) > 0 else -found
    ink = np.zeros_like(grey)
    contrast = contrast_of(found, MIN_CONTRAST, grey.size)
    np.clip(found / contrast, 0, 1, out=ink[top : top + height, left : left + width])
    return without_lines(ink, 0.995)


def contrast_of(found: Grey, least: float, size: int) -> float:
    """The darkest ink, but for stray pixels among the ``size`` of a photo; if that is less than ``least``, a dot's on a
    large sheet."""
    most, ink = size // 1000, found[found >= least]
    return float(np.partition(ink, -1 - most)[-1 - most]) if len(ink) > most else float(found.max())


def spread(paper: Grey) -> float:
    """The standard deviation of what is mostly paper, by the median: ink hardly moves it."""
    return 1.4826 * float(np.median(np.abs(paper)))


def strokes_of(ink: Grey, sheet: Mask | None) -> Grey:
    """``ink`` without what is faint throughout, and without what comes in from the edge if that is not most of it."""
    dark = (ink > INK).astype(np.uint8)
    count, labels = cv2.connectedComponents(dark)
    darkest, flat = np.zeros(count), labels.ravel().astype(np.intp)
    amounts = np.bincount(flat, ink.ravel(), count)
    np.maximum.at(darkest, flat, ink.ravel())
    there = np.ones(ink.shape, np.uint8) if sheet is None else sheet.astype(np.uint8)
    inside = cv2.erode(np.pad(there, 1), np.ones((3, 3)))[1:-1, 1:-1]
    kept = darkest > 0.5
    apart = kept.copy()
    apart[np.unique(labels[inside == 0])] = False
    if amounts[1:][apart[1:]].sum() > 0.1 * amounts[1:].sum():
        kept = apart
    kept[0] = True
    return np.where(kept[labels], ink, 0)


def edges_of(grey: Grey) -> tuple[Grey, Grey, Grey, Grey]:
    """The outermost pixels: top, bottom, left, right."""
    return grey[0], grey[-1], grey[:, 0], grey[:, -1]


def within_margins(grey: Grey, plain: int | None) -> tuple[slice, slice]:
    """The rows and columns without the lines that run along the picture's edges: a frame, a strip of what is below."""
    found, paper = [], float(np.median(grey)) if plain is None else plain
    parts = (0.5,) if plain is None else (0.1, 0.5, 0.9)  # a stroke of a drawing is not as long as the edge
    for axis in (1, 0):
        if (np.abs(np.quantile(grey.take((0, -1), 1 - axis), parts, axis=axis) - paper) < MIN_CONTRAST).any(0).all():
            found.append(slice(0, grey.shape[1 - axis]))  # paper lies along both edges
            continue
        lines = np.quantile(grey, parts, axis=axis)  # of each row, then of each column
        most = round(MARGIN * lines.shape[1])
        ends = []
        for inwards in (lines, lines[:, ::-1]):
            levels = paper, np.median(inwards[:, most : 2 * most + 1])
            off = np.concatenate([inwards[:, : most + 1] - level for level in levels])
            alike = (np.abs(off) < MIN_CONTRAST).any(0) | (off.min(0) * off.max(0) < 0)
            first = int(alike.argmax())
            ends.append(first + 2 if first and alike[first:].all() else 0)
        found.append(slice(ends[0], lines.shape[1] - ends[1]))
    return found[0], found[1]


def paper_of(grey: Grey) -> Grey:
    """The grey level of a drawing's paper, [H, W]: what the edges have, the light between them falling off evenly."""
    top, bottom, left, right = (float(np.median(edge)) for edge in edges_of(grey))
    level = float(np.median(np.concatenate(edges_of(grey))))
    span = float(np.ptp(grey)) / 2  # edges that differ by more are not of one light: one lies under ink
    down, across = (step if abs(step) < span else 0.0 for step in (bottom - top, right - left))
    height, width = grey.shape
    y, x = (np.linspace(-0.5, 0.5, side, dtype=np.float32) for side in (height, width))
    paper: Grey = level + down * y[:, None] + across * x
    return paper


def is_drawn(grey: Grey, difference: Grey, plain: int | None) -> bool:
    """Whether a picture was drawn on an even paper: most of its edges are bare, and nothing wide comes in from them."""
    edges = np.abs(np.concatenate(edges_of(difference if plain is None else grey - plain)))
    bare, off = float((edges < 2).mean()), np.abs(difference)
    thickest = float(cv2.distanceTransform((off > 0.3 * off.max()).astype(np.uint8), cv2.DIST_L2, 3).max())
    return spread(edges) < 0.75 and bare > 0.6 and (bare > 0.8 or thickest < STROKE * min(grey.shape))


def absorbed(grey: Grey, sheet: Mask | None) -> Grey:
    """The share of the light that a photo's pixels take from the paper (or, of a dark board, what they give), [H, W].

    The paper is what is left when all that is darker and narrower than a window is filled (a grey closing): it follows
    light that falls off, and the edge of a shadow.
    """
    sheet = np.ones(grey.shape, dtype=bool) if sheet is None else sheet
    calm = cv2.GaussianBlur(grey, (0, 0), max(0.8, max(grey.shape) / 800))
    even = calm / evenly(calm, sheet)
    dark = strokes_are_dark(even, sheet)
    if not dark:
        even = 2 - even
    side = 2 * round(WINDOW * max(grey.shape) / 2) + 1
    window = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    highest = cv2.dilate(np.where(sheet, even, -9), window)
    paper = cv2.erode(np.where(sheet, highest, 9), window)
    found = 1 - even / np.maximum(paper, 0.05) if dark else paper - even
    return np.where(sheet, found, 0).astype(np.float32)


def evenly(grey: NDArray[Any], sheet: Mask) -> Grey:
    """The light as a parabola over the picture, [H, W]: what takes slopes away that are too wide for a window."""
    factor = SMALL_SIDE / max(grey.shape)
    small, there = (
        cv2.resize(one.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        for one in (grey, sheet)
    )

    def terms(shape: tuple[int, ...]) -> Any:
        y, x = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij")
        return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)

    known, level = terms(small.shape)[there > 0.99], small[there > 0.99]
    weights = np.ones_like(level)
    for _ in range(4):  # what lies off, as ink does, counts less and less
        fitted = np.linalg.lstsq(known * weights[:, None], level * weights, rcond=None)[0]
        off = np.abs(level - known @ fitted)
        weights = 1 / (1 + (off / (2 * np.median(off) + 0.5)) ** 2)
    middle = float(np.median(level))
    if float((off < 0.05 * middle).mean()) < 0.8:  # a shadow lies on it
        return np.full_like(grey, max(middle, 1.0))
    light: Grey = np.maximum(terms(grey.shape) @ fitted, 0.2 * middle + 1)
    return light


def strokes_are_dark(even: Grey, sheet: Mask) -> bool:
    """Whether the thin and strong of a picture is darker than what lies around it, and not lighter."""
    factor = SMALL_SIDE / max(even.shape)
    small = cv2.resize(np.where(sheet, even, 1), None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    there = cv2.resize(sheet.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) > 0.99
    levels = np.clip(128 * small, 0, 255).astype(np.uint8)
    wide = cv2.medianBlur(levels, 2 * round(WINDOW * SMALL_SIDE / 2) + 1)
    off = (levels.astype(np.float32) - wide)[there]
    off = off[np.abs(off) > 4 * 1.4826 * np.median(np.abs(off))]
    return float((off * np.abs(off)).sum()) <= 0


def sheet_of(grey: Grey) -> Mask | None:
    """Where the sheet is, [H, W], if one lies on something: four sides, and something else beyond at least three.

    None: the picture shows nothing but paper.
    """
    factor = min(1.0, SMALL_SIDE / max(grey.shape))
    small = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    levels = cv2.medianBlur(np.clip(small, 0, 255).astype(np.uint8), 5)
    best, found = 0.0, None
    for picture in (levels, 255 - levels):
        filled = cv2.morphologyEx(picture, cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
        low, high = np.quantile(filled, (0.02, 0.98))
        for level in np.linspace(low, high, 18)[1:-1]:
            above = (filled > level).astype(np.uint8)
            for contour in cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
                step = _step(contour, filled)
                if step > best:
                    best, found = step, contour
    if found is None:
        return None
    mask = cv2.fillConvexPoly(np.zeros(levels.shape, np.uint8), cv2.convexHull(found), 1)
    if float(np.ptp(np.quantile(levels[cv2.erode(mask, np.ones((9, 9))) > 0], (0.002, 0.998)))) < MIN_CONTRAST / 2:
        return None  # an empty one: it is a thick stroke
    mask = cv2.erode(np.pad(mask, 1), np.ones((7, 7), np.uint8))[1:-1, 1:-1]
    return cv2.resize(mask, grey.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0


def _step(contour: Any, levels: Any) -> float:
    """How much lighter the inside is along a sheet's edges, if the contour may be one's; otherwise 0."""
    height, width = levels.shape
    area, hull = cv2.contourArea(contour), cv2.convexHull(contour)
    if not 0.3 < area / (height * width) < 0.97 or len(hull) < 4 or area < 0.95 * cv2.contourArea(hull):
        return 0.0
    if area < 0.93 * cv2.contourArea(cv2.approxPolyN(hull, 4, ensure_convex=True)):
        return 0.0
    points = contour[:, 0].astype(np.float32)
    middle = points.mean(0)
    outwards = (points - middle) / np.linalg.norm(points - middle, axis=1, keepdims=True)
    inside, outside = (np.rint(points + way * outwards).astype(int) for way in (-5, 5))
    beyond = (outside < 0).any(1) | (outside >= (width, height)).any(1)
    if beyond.mean() > 0.3:
        return 0.0
    inside, outside = inside[~beyond], outside[~beyond]
    steps = levels[inside[:, 1], inside[:, 0]].astype(int) - levels[outside[:, 1], outside[:, 0]]
    return max(0.0, float(np.quantile(steps, 0.1)) - 10)


def without_lines(ink: Grey, share: float) -> Grey:
    """``ink`` without printed lines and frames, where strokes are left once they are gone.

    Of a printed line at least ``share`` of its way from edge to edge is seen.
    """
    framed = without_frames(ink)
    ruled = without_rules(framed, share)
    return next((found for found in (ruled, framed) if float(found.max()) > 0.5), ink)


def without_rules(ink: Grey, share: float) -> Grey:
    """Without straight lines from one edge to the other, where nothing thicker crosses them."""
    dark = (ink > INK).astype(np.uint8)
    height, width = ink.shape
    shorter = min(height, width)
    if shorter < 100 or (share > 0.9 and max(float(edge.max()) for edge in edges_of(ink)) <= INK):
        return ink
    found = cv2.HoughLinesP(
        255 * dark, 1, np.pi / 720, shorter // 4, minLineLength=0.4 * shorter, maxLineGap=0.04 * shorter
    )
    near = cv2.dilate(dark, np.ones((3, 3), np.uint8))
    drawn = [np.zeros_like(dark), np.zeros_like(dark)]  # lines across, lines down
    for x0, y0, x1, y1 in [] if found is None else found.reshape(-1, 4).tolist():
        down = abs(y1 - y0) > abs(x1 - x0)
        long, short = (y1 - y0, x1 - x0) if down else (x1 - x0, y1 - y0)
        if abs(short) > 0.25 * abs(long):
            continue
        t = np.arange(height if down else width)
        across = np.rint((x0 if down else y0) + (t - (y0 if down else x0)) * short / long).astype(int)
        inside = (across >= 0) & (across < (width if down else height))
        points = (t[inside], across[inside]) if down else (across[inside], t[inside])
        if inside.mean() > 0.3 and near[points].mean() > share:
            drawn[down][points] = 1
    size = max(3, round(RULE * shorter)) + 2
    for line, shape in zip(drawn, ((size, 1), (1, size)), strict=True):
        if line.any():
            crossing = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones(shape, np.uint8))
            ink = np.where(cv2.dilate(line, np.ones((size, size), np.uint8)) > 0, crossing, ink)
    return ink


def without_frames(ink: Grey) -> Grey:
    """``ink`` without what runs along the four sides of a rectangle around something large."""
    dark = (ink > INK).astype(np.uint8)
    if cv2.connectedComponents(dark)[0] < 3:  # a fraction of what their boxes take
        return ink
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(dark)
    for label in range(1, count):
        left, top, width, height, area = boxes[label]
        if min(width, height) < 0.15 * min(ink.shape) or area > 0.35 * width * height:
            continue
        right, bottom = left + width, top + height
        within = (boxes[1:, :2] > (left, top)).all(1) & (boxes[1:, :2] + boxes[1:, 2:4] < (right, bottom)).all(1)
        if not within.any() or boxes[1:][within][:, 3].max() < 0.1 * height:
            continue
        hull = cv2.convexHull(np.argwhere(labels == label)[:, ::-1].astype(np.int32))
        corners = cv2.approxPolyN(hull, 4, ensure_convex=True)
        filled = np.pad(cv2.fillConvexPoly(np.zeros_like(dark), hull, 1), 1)  # beyond the picture is outside too
        distance = cv2.distanceTransform(filled, cv2.DIST_L2, 3)[1:-1, 1:-1]
        along = distance[labels == label] < 0.06 * min(width, height)
        if along.mean() > 0.95 and cv2.contourArea(hull) > 0.9 * cv2.contourArea(corners):
            ink = np.where(labels == label, 0, ink)
    return ink
