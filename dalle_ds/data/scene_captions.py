"""Captions of scenes: a grammar with synonyms, and the sample made of a picture, its caption and its truth.

One object: shape, colour and place are always named, the size and the background sometimes. Two objects: both shapes
and colours and the relation, and at most one extra of sizes, place of the first, background.
"""

import io
import json
from typing import Any

import numpy as np

from dalle_ds.config import SceneConfig
from dalle_ds.data.scenes import SPLITS, Background, Scene, SceneObject, draw_scene, held_out_combinations, render

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "cross": ("cross", "plus"),
}
COLOUR_WORDS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "turquoise": ("turquoise", "cyan"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "black": ("black",),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "top left": ("in the top left", "in the upper left corner"),
    "top": ("at the top", "at the upper edge"),
    "top right": ("in the top right", "in the upper right corner"),
    "left": ("on the left", "at the left edge"),
    "centre": ("in the centre", "in the middle"),
    "right": ("on the right", "at the right edge"),
    "bottom left": ("in the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "at the lower edge"),
    "bottom right": ("in the bottom right", "in the lower right corner"),
}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
ONE_OBJECT = (
    "{object} {place}",
    "{object} {place}",
    "a picture of {object} {place}",
    "{place} there is {object}",
    "{place} is {object}",
)
TWO_OBJECTS = ("{first} {relation} {second}", "{first} is {relation} {second}", "there is {first} {relation} {second}")
TWO_OBJECTS_PLACED = ("{first} {place}, {relation} {second}", "{place} is {first}, {relation} {second}")

SIZE_FRACTION = 0.35
BACKGROUND_FRACTION = 0.2
# What the caption of two objects says beside shapes, colours and relation.
EXTRAS, EXTRA_FRACTIONS = ("nothing", "place", "size", "background"), (0.45, 0.25, 0.15, 0.15)
PNG_LEVEL = 1  # speed over size
JPG_QUALITY = 95


def make_sample(config: SceneConfig, split: str, index: int) -> dict[str, bytes]:
    """Sample number `index` of a split as its files: picture (png or jpg), txt and json.

    Depends on the seed, the split and the index alone.
    """
    scene, truth = make_scene(config, split, index)
    file = io.BytesIO()
    image = render(scene, config.image_size)
    if config.image_format == "png":
        image.save(file, "PNG", compress_level=PNG_LEVEL)
    else:
        image.save(file, "JPEG", quality=JPG_QUALITY, subsampling=0)
    return {
        config.image_format: file.getvalue(),
        "txt": truth["caption"].encode(),
        "json": json.dumps(truth).encode(),
    }


def make_scene(config: SceneConfig, split: str, index: int) -> tuple[Scene, dict[str, Any]]:
    """The scene and its truth: caption, background, objects, relation, what the caption states, and held-out kind.

    In `held_out`, even indices show a held-out pair and odd ones a held-out triple; no other split shows any.
    """
    rng = np.random.default_rng([config.seed, SPLITS[split], index])
    kind = ("pair", "triple")[index % 2] if split == "held_out" else None
    n_object = 2 if rng.random() < config.two_object_fraction else 1
    scene = draw_scene(rng, n_object, held_out_combinations(config.seed), kind)
    caption, stated, background_stated = write_caption(scene, rng, place_needed=kind == "triple")
    truth = {
        "caption": caption,
        "background": {
            "tone": scene.background.tone,
            "texture": scene.background.texture,
            "stated": background_stated,
        },
        "objects": [_object_truth(item) for item in scene.objects],
        "relation": scene.relation,
        "stated": stated,
        "held_out": kind,
    }
    return scene, truth


def _object_truth(item: SceneObject) -> dict[str, Any]:
    return {
        "shape": item.shape,
        "colour": item.colour,
        "size": item.size,
        "place": item.place,
        "centre": list(item.centre),
        "radius": item.radius,
        "angle": item.angle,
        "rgb": list(item.rgb),
    }


def write_caption(
    scene: Scene, rng: np.random.Generator, place_needed: bool = False
) -> tuple[str, list[dict[str, bool]], bool]:
    """A caption, what it states of each object ({"place", "size"}), and whether it names the background."""
    if len(scene.objects) == 1:
        place, sized, backed = True, rng.random() < SIZE_FRACTION, rng.random() < BACKGROUND_FRACTION
        words = {
            "object": _name_object(scene.objects[0], sized, rng),
            "place": _pick(rng, PLACE_WORDS[scene.objects[0].place]),
        }
        template = _pick(rng, ONE_OBJECT)
    else:
        extra = "place" if place_needed else EXTRAS[rng.choice(len(EXTRAS), p=EXTRA_FRACTIONS)]
        place, sized, backed = extra == "place", extra == "size", extra == "background"
        words = {
            "first": _name_object(scene.objects[0], sized, rng),
            "second": _name_object(scene.objects[1], sized, rng),
            "relation": _pick(rng, RELATION_WORDS[scene.relation or ""]),
            "place": _pick(rng, PLACE_WORDS[scene.objects[0].place]),
        }
        template = _pick(rng, TWO_OBJECTS_PLACED if place else TWO_OBJECTS)
    caption = template.format(**words)
    if backed:
        caption += f" on {_name_background(scene.background)}"
    stated = [{"place": place and i == 0, "size": bool(sized)} for i in range(len(scene.objects))]
    return caption, stated, bool(backed)


def _name_object(item: SceneObject, sized: bool, rng: np.random.Generator) -> str:
    words = [_pick(rng, COLOUR_WORDS[item.colour]), _pick(rng, SHAPE_WORDS[item.shape])]
    if sized:
        words.insert(0, _pick(rng, SIZE_WORDS[item.size]))
    return _with_article(" ".join(words))


def _name_background(background: Background) -> str:
    texture = {"plain": "", "gradient": "shaded "}.get(background.texture, f"{background.texture} ")
    return _with_article(f"{texture}{background.tone} background")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]
