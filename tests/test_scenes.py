"""Scenes, their pictures and their captions."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from dalle_ds.config import SceneConfig
from dalle_ds.data.scene_captions import (
    COLOUR_WORDS,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    make_sample,
    make_scene,
)
from dalle_ds.data.scenes import BACKGROUNDS, COLOURS, JITTER, PLACES, SHAPES, STEPS, held_out_combinations, render

CONFIG = SceneConfig(seed=3)
N = 400


def make_truths(split, n=N, config=CONFIG):
    return [make_scene(config, split, index)[1] for index in range(n)]


def test_a_sample_depends_on_seed_split_and_index_alone():
    again = make_sample(dataclasses.replace(CONFIG, n_train=7, samples_per_shard=3), "train", 5)
    assert make_sample(CONFIG, "train", 5) == again
    others = [(CONFIG, "train", 6), (CONFIG, "validation", 5), (dataclasses.replace(CONFIG, seed=4), "train", 5)]
    assert all(make_sample(*other)["png"] != again["png"] for other in others)


@pytest.mark.parametrize(("image_size", "image_format"), [(32, "png"), (64, "jpg"), (200, "png")])
def test_a_sample_holds_a_picture_its_caption_and_its_truth(image_size, image_format):
    sample = make_sample(SceneConfig(image_size=image_size, image_format=image_format), "train", 0)
    assert list(sample) == [image_format, "txt", "json"]
    image = Image.open(io.BytesIO(sample[image_format]))
    assert image.size == (image_size, image_size)
    assert image.mode == "RGB"
    assert json.loads(sample["json"])["caption"] == sample["txt"].decode()


def test_objects_lie_in_their_place_and_inside_the_picture_without_touching():
    for truth in make_truths("train"):
        for item in truth["objects"]:
            row, column = PLACES[item["place"]]
            offsets = np.abs(np.array(item["centre"]) - (STEPS[column], STEPS[row]))
            assert offsets.max() <= JITTER + 1e-4  # centres are rounded to four places
            assert 0 < min(item["centre"]) - item["radius"] < max(item["centre"]) + item["radius"] < 1
        if len(truth["objects"]) == 2:
            first, second = truth["objects"]
            distance = np.hypot(*np.subtract(first["centre"], second["centre"]))
            assert distance > first["radius"] + second["radius"] + 0.05


def test_the_first_of_two_objects_stands_in_the_relation_to_the_second():
    seen = set()
    for truth in make_truths("train"):
        if truth["relation"]:
            x, y = np.subtract(truth["objects"][0]["centre"], truth["objects"][1]["centre"])
            along = {"above": -y, "below": y, "left of": -x, "right of": x}[truth["relation"]]
            assert along > 0.4
            assert along > min(abs(x), abs(y)) + 0.05
            seen.add(truth["relation"])
    assert seen == set(RELATION_WORDS)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_held_out_combination_is_shown_in_training_or_validation(split):
    held_out = held_out_combinations(CONFIG.seed)
    for truth in make_truths(split):
        assert truth["held_out"] is None
        for item in truth["objects"]:
            assert (item["colour"], item["shape"]) not in held_out.pairs
            assert (item["colour"], item["shape"], item["place"]) not in held_out.triples


def test_every_held_out_picture_shows_a_held_out_combination_that_its_caption_names():
    held_out = held_out_combinations(CONFIG.seed)
    truths = make_truths("held_out")
    for truth in truths:
        pairs = [(item["colour"], item["shape"]) in held_out.pairs for item in truth["objects"]]
        if truth["held_out"] == "pair":
            assert any(pairs)
        else:
            first = truth["objects"][0]
            assert not any(pairs)
            assert (first["colour"], first["shape"], first["place"]) in held_out.triples
            assert truth["stated"][0]["place"]
    assert [truth["held_out"] for truth in truths] == ["pair", "triple"] * (N // 2)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_lists_leave_every_colour_shape_and_place_common_in_training(seed):
    held_out = held_out_combinations(seed)
    assert len(held_out.pairs) == len({c for c, _ in held_out.pairs}) == len({s for _, s in held_out.pairs}) == 6
    assert len(held_out.triples) == 38
    assert not {(colour, shape) for colour, shape, _ in held_out.triples} & held_out.pairs
    lost = [sum(place == p for *_, p in held_out.triples) for place in PLACES]
    assert max(lost) - min(lost) <= 1


def test_captions_name_what_the_truth_says_they_state():
    def named(words, caption):
        return any(f" {word} " in f" {caption.replace(',', '')} " for word in words)

    for split in ("train", "held_out"):
        for truth in make_truths(split):
            caption = truth["caption"]
            assert caption == caption.lower()
            assert len(caption.split()) <= 17
            for item, stated in zip(truth["objects"], truth["stated"], strict=True):
                assert named(SHAPE_WORDS[item["shape"]], caption)
                assert named(COLOUR_WORDS[item["colour"]], caption)
                assert not stated["size"] or named(SIZE_WORDS[item["size"]], caption)
                assert not stated["place"] or named(PLACE_WORDS[item["place"]], caption)
            assert truth["relation"] is None or named(RELATION_WORDS[truth["relation"]], caption)
            assert truth["background"]["stated"] == ("background" in caption)
            assert len(truth["objects"]) == 2 or truth["stated"][0]["place"]
            first = [caption.find(f"{colour} ") for colour in COLOUR_WORDS[truth["objects"][0]["colour"]]]
            second = [caption.rfind(f"{colour} ") for colour in COLOUR_WORDS[truth["objects"][-1]["colour"]]]
            assert max(first) <= max(second)  # the first object is named first


def test_the_fraction_of_two_objects_is_the_one_asked_for():
    for fraction in (0.0, 1.0):
        config = SceneConfig(two_object_fraction=fraction)
        assert {len(t["objects"]) for t in make_truths("train", 20, config)} == {1 + int(fraction)}
    half = np.mean([len(t["objects"]) == 2 for t in make_truths("held_out")])
    assert abs(half - 0.5) < 0.08  # three standard deviations of 400 coin throws


def test_colours_are_far_from_each_other_and_from_every_background():
    names = list(COLOURS)
    between = [np.linalg.norm(np.subtract(COLOURS[a], COLOURS[b])) for a in names for b in names if a < b]
    beside = [np.linalg.norm(np.subtract(COLOURS[a], tone)) for a in names for tone in BACKGROUNDS.values()]
    assert min(between) > 80
    assert min(beside) > 140


def test_a_picture_is_the_same_scene_at_any_resolution():
    for index in range(20):
        scene, _ = make_scene(CONFIG, "train", index)
        small = np.asarray(render(scene, 64), np.float32)
        large = np.asarray(render(scene, 192).reduce(3), np.float32)
        assert np.abs(small - large).mean() < 1.5  # of 255: anti-aliasing at 4 against 12 points a pixel


def test_shapes_cover_the_area_of_their_outline():
    for index in range(60):
        scene, truth = make_scene(SceneConfig(two_object_fraction=0), "train", index)
        item = scene.objects[0]
        # Fine enough that the pixels of the outline, which are left out, are few.
        picture = np.asarray(render(scene, 256), np.float32)
        covered = np.linalg.norm(picture - item.rgb, axis=-1) < 60
        corners = np.array(SHAPES[item.shape])
        if len(corners):
            x, y = corners.T
            area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
        else:
            area = np.pi
        assert covered.mean() == pytest.approx(area * item.radius**2, rel=0.08), truth
