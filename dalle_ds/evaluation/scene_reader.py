"""Reads the objects out of a picture of a scene: classical image processing, nothing learned.

The background is the median colour; what differs from it falls into connected components; a component's colour is that
of its core, and its shape the template that its coverage matches best, after moving and scaling it to a fixed frame.
Made for pictures that a lossy autoencoder has blurred, shifted in colour and roughened.
"""

import functools
import math
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dalle_ds.data.scenes import COLOURS, MAX_ANGLE, PLACES, SHAPES, SIZES, STEPS, shape_mask

Array = npt.NDArray[Any]

MIN_SIDE = 32  # pixels
MIN_DIFFERENCE = 60.0  # from the background, in RGB; the palette lies at least 140 away from every background
MIN_AREA = 0.012  # of the picture: about half of the smallest shape
CORE = 0.8  # share of a component's greatest depth from which pixels count as its core
LUMINANCE_WEIGHT = 0.5  # against that of the two colour differences

FRAME = 32  # side of the fixed frame in pixels
FRAME_AREA = 0.28  # of the frame, covered by the component after scaling: the farthest corner stays inside
ANGLES = (-MAX_ANGLE, -MAX_ANGLE / 2, 0.0, MAX_ANGLE / 2, MAX_ANGLE)
BLURS = (0.0, 1.2, 2.2)  # sigmas in frame pixels


class ReadObject(TypedDict):
    """What was read of one object: `centre` and `radius` in unit coordinates, `match` the IoU with its template."""

    shape: str
    colour: str
    place: str
    size: str
    centre: tuple[float, float]
    radius: float
    match: float


def read_scene(image: npt.NDArray[np.uint8]) -> list[ReadObject]:
    """The objects of a picture, uint8 [H, W, 3], square and at least 32 pixels wide, the largest first.

    Anything that stands out and covers more than 1.2% of the picture counts as an object, however poor its shape.
    """
    side = image.shape[0]
    if image.ndim != 3 or image.shape != (side, side, 3) or side < MIN_SIDE:
        raise ValueError(f"image has shape {image.shape}: it must be [H, H, 3] with H at least {MIN_SIDE}")
    pixels = image.astype(np.float32)  # [H, W, 3]
    background = np.median(pixels.reshape(-1, 3), axis=0)
    stands_out = np.linalg.norm(pixels - background, axis=-1) > MIN_DIFFERENCE
    labels, n = ndimage.label(stands_out)
    areas = ndimage.sum_labels(stands_out, labels, range(1, n + 1))
    order = [i + 1 for i in np.argsort(-areas, kind="stable") if areas[i] > MIN_AREA * side**2]
    return [_read_object(pixels, background, labels, label) for label in order]


def _read_object(pixels: Array, background: Array, labels: Array, label: int) -> ReadObject:
    side = len(pixels)
    component = labels == label
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    colour = np.median(pixels[depth >= CORE * depth.max()], axis=0)
    # Soft coverage: how far each pixel lies on the way from the background to the object's colour.
    step = colour - background
    coverage = np.clip((pixels - background) @ step / (step @ step), 0, 1)  # [H, W]
    margin = max(1, side // MIN_SIDE)
    near = ndimage.binary_dilation(component, iterations=margin) & ((labels == 0) | component)
    coverage = np.where(near, coverage, 0)
    area = float(coverage.sum())
    rows, columns = np.indices(coverage.shape)
    x, y = float((coverage * columns).sum() / area), float((coverage * rows).sum() / area)  # pixel centres at integers
    shape, match = _match_shape(_to_frame(coverage, x, y, area))
    radius = math.sqrt(area / _unit_moments(shape)[0]) / side
    shift = _unit_moments(shape)[1]
    centre = ((x + 0.5) / side, (y + 0.5) / side - shift * radius)
    return ReadObject(
        shape=shape,
        colour=nearest_colour(colour),
        place=nearest_place(centre),
        size=min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius))),
        centre=centre,
        radius=radius,
        match=match,
    )


def nearest_colour(rgb: Array) -> str:
    """The name in the palette, by two colour differences and, with less weight, luminance."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32)
    return names[int(np.argmin(np.linalg.norm(_opponent(palette) - _opponent(rgb), axis=-1)))]


def _opponent(rgb: Array) -> Array:
    red, green, blue = np.moveaxis(np.asarray(rgb, np.float32), -1, 0)
    luminance = 0.3 * red + 0.6 * green + 0.1 * blue
    return np.stack((LUMINANCE_WEIGHT * luminance, red - green, (red + green) / 2 - blue), axis=-1)


def nearest_place(centre: tuple[float, float]) -> str:
    """The name of the place whose cell of the 3 x 3 grid holds `centre` (x, y)."""
    x, y = centre
    return min(PLACES, key=lambda name: abs(STEPS[PLACES[name][0]] - y) + abs(STEPS[PLACES[name][1]] - x))


def _to_frame(coverage: Array, x: float, y: float, area: float) -> Array:
    """The coverage around its centroid (x, y), scaled so that it covers a fixed share of the frame: [FRAME, FRAME]."""
    scale = math.sqrt(area / (FRAME_AREA * FRAME**2))  # picture pixels per frame pixel
    middle = (FRAME - 1) / 2
    if scale > 1.5:  # average before a shrinking resample, else it would alias
        coverage = ndimage.gaussian_filter(coverage, 0.4 * scale)
    return np.asarray(
        ndimage.affine_transform(
            coverage, (scale, scale), (y - scale * middle, x - scale * middle), output_shape=(FRAME, FRAME), order=1
        )
    )


def _match_shape(frame: Array) -> tuple[str, float]:
    """The shape whose template has the greatest soft intersection over union with the frame, and that value."""
    templates = _templates()  # [N, FRAME * FRAME]
    flat = frame.reshape(1, -1)
    overlap = np.minimum(templates, flat).sum(-1)
    union = templates.sum(-1) + flat.sum() - overlap
    best = int(np.argmax(overlap / union))
    return list(SHAPES)[best // (len(ANGLES) * len(BLURS))], float(overlap[best] / union[best])


@functools.cache
def _templates() -> Array:
    """Every shape at every angle and blur, in the frame: [N, FRAME * FRAME]."""
    templates = []
    for shape in SHAPES:
        for angle in ANGLES:
            mask = _mask(shape, angle)
            y, x = ndimage.center_of_mass(mask)
            frame = _to_frame(mask, x, y, mask.sum())
            templates += [ndimage.gaussian_filter(frame, blur) for blur in BLURS]
    return np.stack(templates).reshape(len(templates), -1).astype(np.float32)


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Area of the shape of radius 1, and how far below its centre its centroid lies."""
    mask = _mask(shape, 0.0)
    radius = MASK_RADIUS * MASK_SIDE
    y, _ = ndimage.center_of_mass(mask)
    return float(mask.sum()) / radius**2, (float(y) + 0.5 - MASK_SIDE / 2) / radius


MASK_SIDE, MASK_RADIUS = 256, 0.35


def _mask(shape: str, angle: float) -> Array:
    image, left, top = shape_mask(shape, (0.5, 0.5), MASK_RADIUS, angle, MASK_SIDE)
    whole = np.zeros((MASK_SIDE, MASK_SIDE), np.float32)
    box = np.asarray(image, np.float32) / 255  # [h, w]
    whole[top : top + box.shape[0], left : left + box.shape[1]] = box
    return whole
