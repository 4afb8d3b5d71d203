"""The scene reader against scenes whose truth is known, and the scores made from what it reads."""

import numpy as np
import pytest
from scipy import ndimage

from dalle_ds.config import SceneConfig
from dalle_ds.data.scene_captions import make_scene
from dalle_ds.data.scenes import render
from dalle_ds.evaluation.caption_accuracy import chance_level, describe, list_figures, score, summarize, wilson_interval
from dalle_ds.evaluation.scene_reader import nearest_place, read_scene

CONFIG = SceneConfig(seed=101)  # no other test nor the demo uses it


def degrade(picture, rng, blur, noise, drift):
    """Blur (sigma in pixels), a shift of each channel (up to `drift` of 255) and noise (sigma of 255)."""
    pixels = ndimage.gaussian_filter(np.asarray(picture, np.float32), (blur, blur, 0))
    pixels = pixels + rng.normal(0, noise, pixels.shape) + rng.uniform(-drift, drift, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def measure(image_size, n, blur=0.0, noise=0.0, drift=0.0):
    """Share of pictures of which every object's shape, colour and place is read right, and no other object is read."""
    rng = np.random.default_rng(0)
    right = 0
    for index in range(n):
        scene, truth = make_scene(CONFIG, "train", index)
        read = read_scene(degrade(render(scene, image_size), rng, blur, noise, drift))
        names = [sorted((o["place"], o["colour"], o["shape"]) for o in objects) for objects in (read, truth["objects"])]
        right += names[0] == names[1]
    return right / n


@pytest.mark.parametrize(("image_size", "n"), [(64, 500), (128, 500), (40, 200), (256, 40)])
def test_the_reader_reads_real_scenes_almost_always_right(image_size, n):
    assert measure(image_size, n) >= 0.98


@pytest.mark.parametrize(
    ("blur", "noise", "drift", "least"),
    [(1.0, 6.0, 0.0, 0.98), (1.5, 6.0, 15.0, 0.95), (0.0, 20.0, 0.0, 0.95)],
    ids=["blurred", "blurred-and-drifted", "noisy"],
)
def test_the_reader_withstands_what_an_autoencoder_does_to_pictures(blur, noise, drift, least):
    assert measure(64, 300, blur, noise, drift) >= least


def test_sizes_and_centres_are_read_too():
    for index in range(100):
        scene, truth = make_scene(SceneConfig(two_object_fraction=0), "train", index)
        (read,) = read_scene(np.asarray(render(scene, 64)))
        named = truth["objects"][0]
        assert read["size"] == named["size"]
        assert np.abs(np.subtract(read["centre"], named["centre"])).max() < 0.02
        assert read["radius"] == pytest.approx(named["radius"], rel=0.08)
        assert read["match"] > 0.8


def test_a_picture_without_objects_reads_as_none():
    rng = np.random.default_rng(0)
    assert read_scene(np.full((64, 64, 3), 200, np.uint8)) == []
    assert read_scene(rng.normal(200, 8, (64, 64, 3)).clip(0, 255).astype(np.uint8)) == []
    assert read_scene(rng.integers(0, 256, (64, 64, 3), np.uint8)) is not None  # noise reads as anything, but reads


@pytest.mark.parametrize("shape", [(64, 64), (64, 48, 3), (16, 16, 3), (64, 64, 4)])
def test_a_picture_of_another_form_is_refused(shape):
    with pytest.raises(ValueError, match="image has shape"):
        read_scene(np.zeros(shape, np.uint8))


def test_places_are_the_nine_cells():
    assert nearest_place((0.1, 0.1)) == "top left"
    assert nearest_place((0.5, 0.9)) == "bottom"
    assert nearest_place((0.66, 0.5)) == "right"


def make_object(words, centre):
    size, colour, shape = words.split()
    return {"size": size, "colour": colour, "shape": shape, "centre": centre, "place": nearest_place(centre)}


ONE = {
    "objects": [make_object("small red circle", (0.25, 0.25))],
    "stated": [{"place": True, "size": False}],
    "relation": None,
    "held_out": "triple",
}
TWO = {
    "objects": [make_object("small red star", (0.25, 0.25)), make_object("large blue star", (0.25, 0.75))],
    "stated": [{"place": False, "size": True}, {"place": False, "size": True}],
    "relation": "above",
    "held_out": "pair",
}


def test_a_picture_that_shows_its_caption_scores_right():
    assert score(ONE["objects"], ONE) == {
        "all": True, "count": True, "shape": True, "colour": True, "place": True, "size": None, "relation": None
    }  # fmt: skip
    assert score(TWO["objects"][::-1], TWO) == {
        "all": True, "count": True, "shape": True, "colour": True, "place": None, "size": True, "relation": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "centre", "wrong"),
    [
        ("small red square", (0.25, 0.25), {"shape"}),
        ("small blue circle", (0.25, 0.25), {"colour"}),
        ("small red circle", (0.5, 0.25), {"place"}),
        ("large red circle", (0.25, 0.25), set()),  # the caption does not state the size
    ],
)
def test_each_mistake_is_counted_under_its_own_name(words, centre, wrong):
    result = score([make_object(words, centre)], ONE)
    assert {name for name, value in result.items() if value is False} == (wrong | {"all"} if wrong else set())


def test_two_objects_are_matched_by_what_they_are_and_then_judged_by_where_they_stand():
    first, second = TWO["objects"]
    swapped = [{**first, "centre": second["centre"]}, {**second, "centre": first["centre"]}]
    result = score(swapped, TWO)
    assert result["relation"] is False
    assert result["all"] is False
    assert result["shape"] is result["colour"] is True
    beside = score([first, {**second, "centre": (0.75, 0.5)}], TWO)  # below, but more to the right
    assert beside["relation"] is False


def test_a_place_counts_for_two_objects_only_where_it_is_stated():
    elsewhere = [{**item, "centre": (0.75, y), "place": nearest_place((0.75, y))} for item, y in
                 zip(TWO["objects"], (0.25, 0.75), strict=True)]  # fmt: skip
    assert score(elsewhere, TWO)["all"] is True
    stated = {**TWO, "stated": [{"place": True, "size": False}, {"place": False, "size": False}]}
    assert score(elsewhere, stated)["place"] is score(elsewhere, stated)["all"] is False


def test_an_object_too_many_or_too_few_is_not_all_right():
    extra = make_object("small black cross", (0.75, 0.75))
    result = score([*ONE["objects"], extra], ONE)
    assert (result["all"], result["count"], result["shape"], result["place"]) == (False, False, True, True)
    for read in ([], TWO["objects"][:1]):
        result = score(read, TWO)
        assert result["place"] is None  # still not stated
        assert not any(result.values())


def test_summaries_give_shares_of_the_pictures_that_state_a_thing_and_by_group():
    truths = [ONE, ONE, TWO, TWO]
    scores = [score(ONE["objects"], ONE), score([], ONE), score(TWO["objects"], TWO), score(TWO["objects"], TWO)]
    summary = summarize(scores, truths)
    assert (summary["n"], summary["all"], summary["relation"], summary["n_relation"]) == (4, 0.75, 1.0, 2)
    assert summary["by_held_out"]["triple"]["all"] == summary["by_n_object"]["1"]["place"] == 0.5
    assert summary["by_held_out"]["pair"]["all"] == 1
    # Of the 12 ordered pairs of two, 4 pair a caption with one of the same words.
    assert summary["chance"]["all"] == pytest.approx(4 / 12)
    rows = {row["name"]: row for row in list_figures(summary)}
    assert rows["caption accuracy: all"]["value"] == 0.75
    assert rows["caption accuracy: all"]["chance"] == pytest.approx(4 / 12)
    assert rows["caption accuracy: all, held-out pair"]["n"] == 2


def test_the_chance_level_of_made_captions_is_low_and_the_same_for_read_pictures():
    scenes = [make_scene(CONFIG, "held_out", index) for index in range(300)]
    truths = [truth for _, truth in scenes]
    readings = [read_scene(np.asarray(render(scene, 64))) for scene, _ in scenes]
    scores = [score(read, truth) for read, truth in zip(readings, truths, strict=True)]
    summary = summarize(scores, truths)
    assert summary["all"] >= 0.98
    assert 0 < summary["chance"]["all"] < 0.02
    assert chance_level(truths, readings)["all"] == pytest.approx(summary["chance"]["all"], abs=0.002)


def test_empty_sets_have_no_figures():
    assert summarize([], [])["all"] is None
    assert list_figures(summarize([], [])) == []


def test_objects_are_described_in_words():
    assert describe(TWO["objects"]) == "red star, top left; blue star, bottom left"
    assert describe([]) == "nothing"


def test_the_interval_of_a_share_stays_inside_zero_and_one_and_holds_the_share():
    assert wilson_interval(1.0, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)  # 10 / (10 + 1.96^2)
    assert wilson_interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    low, high = wilson_interval(0.3, 1000)
    assert low < 0.3 < high
