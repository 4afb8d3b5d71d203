"""Scenes: made pictures of one or two coloured shapes on a muted background, whose truth is known.

What a scene is, which combinations are kept out of training, how one is drawn at random, and how it becomes a picture.
All geometry is in unit coordinates, x to the right and y down, so that a scene can be drawn at any resolution.
"""

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Name = TypeVar("Name")

# Eight saturated colours, far from each other and from every background.
COLOURS = {
    "red": (214, 32, 38),
    "orange": (246, 138, 20),
    "yellow": (246, 226, 30),
    "green": (38, 150, 52),
    "turquoise": (30, 200, 205),
    "blue": (36, 70, 210),
    "purple": (150, 40, 175),
    "black": (24, 24, 28),
}
BACKGROUNDS = {"white": (240, 240, 238), "grey": (196, 196, 198), "beige": (226, 212, 186), "lavender": (208, 200, 228)}
TEXTURES = ("plain", "gradient", "striped", "checked", "dotted")
PLAIN_FRACTION = 0.6
SIZES = {"small": 0.15, "large": 0.2}  # radius
STEPS = (0.24, 0.5, 0.76)  # centres of the rows and columns of places
PLACES = {
    "top left": (0, 0),
    "top": (0, 1),
    "top right": (0, 2),
    "left": (1, 0),
    "centre": (1, 1),
    "right": (1, 2),
    "bottom left": (2, 0),
    "bottom": (2, 1),
    "bottom right": (2, 2),
}  # row, column
RELATIONS = ("above", "below", "left of", "right of")
SPLITS = {"train": 0, "validation": 1, "held_out": 2}

JITTER = 0.03  # of a centre, in x and in y: a ninth of the way to the next place
MAX_ANGLE = 6.0  # degrees
COLOUR_JITTER = 6  # of 255
TEXTURE_CONTRAST = 9  # of 255, each way from the tone
SUPERSAMPLING = 4
HELD_OUT_TRIPLES = 38  # a tenth of the 42 * 9 triples whose pair is not held out


@dataclass(frozen=True, kw_only=True)
class Background:
    tone: str
    texture: str


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    place: str
    centre: tuple[float, float]  # x, y
    radius: float
    angle: float  # degrees
    rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects; with two, `relation` says where the first is, seen from the second."""

    background: Background
    objects: tuple[SceneObject, ...]
    relation: str | None


@dataclass(frozen=True)
class HeldOut:
    """The combinations that training and validation never show."""

    pairs: frozenset[tuple[str, str]]  # colour, shape
    triples: frozenset[tuple[str, str, str]]  # colour, shape, place; their pairs are not held out

    def kind(self, objects: tuple[SceneObject, ...]) -> str | None:
        """ "pair" if an object shows a held-out pair, else "triple" if one shows a held-out triple, else None."""
        if any((o.colour, o.shape) in self.pairs for o in objects):
            return "pair"
        if any((o.colour, o.shape, o.place) in self.triples for o in objects):
            return "triple"
        return None


@functools.cache
def held_out_combinations(seed: int) -> HeldOut:
    """The held-out list of `seed`: six pairs, each of another shape and another colour, and 38 triples of other pairs.

    No remaining pair loses more than one of its nine places, and the places lose about equally many.
    """
    rng = np.random.default_rng([seed, len(SPLITS)])
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    pairs = frozenset(zip(colours, SHAPES, strict=False))
    rest = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in pairs]
    chosen = [rest[i] for i in rng.permutation(len(rest))[:HELD_OUT_TRIPLES]]
    places = [list(PLACES)[i] for i in rng.permutation(len(PLACES))]
    triples = frozenset((*pair, places[i % len(places)]) for i, pair in enumerate(chosen))
    return HeldOut(pairs, triples)


def draw_scene(rng: np.random.Generator, n_object: int, held_out: HeldOut, kind: str | None) -> Scene:
    """A random scene of `n_object` (1 or 2) objects whose held-out kind is `kind`.

    With None no object shows a held-out combination. With "pair" or "triple" at least one object shows such a one,
    and for "triple" it is the first: the caption can state the place of that one.
    """
    while True:  # rejection: the other properties keep their distribution
        places, relation = _draw_places(rng, n_object)
        objects = tuple(_draw_object(rng, place) for place in places)
        if n_object == 2 and (objects[0].colour, objects[0].shape) == (objects[1].colour, objects[1].shape):
            continue
        if held_out.kind(objects) == kind and (kind != "triple" or held_out.kind(objects[:1]) == kind):
            break
    plain = rng.random() < PLAIN_FRACTION
    texture = TEXTURES[0] if plain else TEXTURES[rng.integers(1, len(TEXTURES))]
    background = Background(tone=_choose(rng, BACKGROUNDS), texture=texture)
    return Scene(background=background, objects=objects, relation=relation)


def _draw_places(rng: np.random.Generator, n_object: int) -> tuple[list[str], str | None]:
    """Places, and the relation of two: a row or column lies between them, and across it they are at most one apart."""
    if n_object == 1:
        return [_choose(rng, PLACES)], None
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    return list(_choose(rng, _related_places()[relation])), relation


@functools.cache
def _related_places() -> dict[str, tuple[tuple[str, str], ...]]:
    related: dict[str, tuple[tuple[str, str], ...]] = {}
    for relation, step in zip(RELATIONS, ((-2, 0), (2, 0), (0, -2), (0, 2)), strict=True):
        related[relation] = tuple(
            (first, second)
            for first, (row, column) in PLACES.items()
            for second, (other_row, other_column) in PLACES.items()
            if all(
                move == wanted if wanted else abs(move) <= 1
                for move, wanted in zip((row - other_row, column - other_column), step, strict=True)
            )
        )
    return related


def _draw_object(rng: np.random.Generator, place: str) -> SceneObject:
    row, column = PLACES[place]
    shape, colour, size = _choose(rng, SHAPES), _choose(rng, COLOURS), _choose(rng, SIZES)
    jitter_x, jitter_y, turn = rng.uniform(-1, 1, 3)
    shift = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    red, green, blue = (min(max(value + int(s), 0), 255) for value, s in zip(COLOURS[colour], shift, strict=True))
    return SceneObject(
        shape=shape,
        colour=colour,
        size=size,
        place=place,
        centre=(round(STEPS[column] + JITTER * jitter_x, 4), round(STEPS[row] + JITTER * jitter_y, 4)),
        radius=SIZES[size],
        angle=round(MAX_ANGLE * turn, 2),
        rgb=(red, green, blue),
    )


def _choose(rng: np.random.Generator, names: Collection[Name]) -> Name:
    return list(names)[rng.integers(len(names))]


def render(scene: Scene, image_size: int) -> Image.Image:
    """The picture of a scene, RGB, `image_size` pixels square, anti-aliased."""
    image = _background(scene.background, image_size).copy()
    for item in scene.objects:
        mask, left, top = shape_mask(item.shape, item.centre, item.radius, item.angle, image_size)
        image.paste(item.rgb, (left, top), mask)
    return image


def shape_mask(
    shape: str, centre: tuple[float, float], radius: float, angle: float, image_size: int
) -> tuple[Image.Image, int, int]:
    """Coverage (0 to 255) of a shape in the box of pixels around it, and the left and top pixel of that box."""
    reach = math.ceil(radius * image_size * MAX_REACH) + 1
    x, y = centre
    left, top = int(x * image_size) - reach, int(y * image_size) - reach
    side = 2 * reach + 1
    fine = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(fine)
    scale = radius * image_size * SUPERSAMPLING
    # Pillow's coordinates are pixel centres, half a fine pixel from the corner.
    x0 = (x * image_size - left) * SUPERSAMPLING - 0.5
    y0 = (y * image_size - top) * SUPERSAMPLING - 0.5
    corners = SHAPES[shape]
    if not corners:
        pen.ellipse((x0 - scale, y0 - scale, x0 + scale, y0 + scale), fill=255)
    else:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        pen.polygon(
            [(x0 + scale * (u * cos - v * sin), y0 + scale * (u * sin + v * cos)) for u, v in corners], fill=255
        )
    return fine.reduce(SUPERSAMPLING), left, top


@functools.lru_cache(maxsize=64)
def _background(background: Background, image_size: int) -> Image.Image:
    """The picture without objects. Textures have the period of a quarter of the side and a low contrast."""
    centres = (np.arange(image_size * SUPERSAMPLING) + 0.5) / (image_size * SUPERSAMPLING)
    x, y = np.meshgrid(centres, centres)
    wave = TEXTURE_WAVES[background.texture](x, y)  # [H, W] in [-1, 1]
    pixels = np.array(BACKGROUNDS[background.tone]) + TEXTURE_CONTRAST * wave[..., None]  # [H, W, 3]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).reduce(SUPERSAMPLING)


def _star_corners(outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    corners = []
    for i in range(10):
        radius, angle = (outer, inner)[i % 2], math.pi * i / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return tuple(corners)


def _cross_corners(arm: float, half_width: float) -> tuple[tuple[float, float], ...]:
    a, w = arm, half_width
    return ((-w, -a), (w, -a), (w, -w), (a, -w), (a, w), (w, w), (w, a), (-w, a), (-w, w), (-a, w), (-a, -w), (-w, -w))


# Corners of each shape of radius 1 around (0, 0); none for the circle.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)),
    "triangle": ((0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)),
    "diamond": ((0.0, -1.05), (0.8, 0.0), (0.0, 1.05), (-0.8, 0.0)),
    "star": _star_corners(1.1, 0.48),
    "cross": _cross_corners(0.97, 0.34),
}
MAX_REACH = 1.25  # a shape's farthest corner, in radii

TEXTURE_WAVES: dict[str, Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "gradient": lambda x, y: 2 * y - 1,
    "striped": lambda x, y: np.where(np.floor(8 * x) % 2 == 0, 1.0, -1.0),
    "checked": lambda x, y: np.where((np.floor(4 * x) + np.floor(4 * y)) % 2 == 0, 1.0, -1.0),
    "dotted": lambda x, y: np.where(np.hypot((4 * x) % 1 - 0.25, (4 * y) % 1 - 0.25) < 0.2, -1.0, 0.5),
}
