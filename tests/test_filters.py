"""The filters of Appendix C, one by one, and the two indexes of duplicates."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dalle_ds.config import FilterConfig, InputError
from dalle_ds.data import filters
from dalle_ds.data.boilerplate import DATES, boilerplate_share
from dalle_ds.data.duplicates import HASH_BITS, ExactIndex, Fingerprint, NearIndex, fingerprint
from dalle_ds.data.filters import FILTERS, Candidate, Tally, judge_samples
from dalle_ds.data.languages import LANGUAGE_IDENTIFIERS

CAPTION = "a soft pattern of many colours"
OFF = FilterConfig(
    min_words=0,
    min_characters=0,
    max_characters=0,
    languages="",
    boilerplate_share=1.0,
    max_aspect_ratio=0,
    min_side=0,
    exact_duplicates=False,
    near_duplicate_bits=-1,
)


def picture(seed, width=96, height=80):
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(content=None, caption=CAPTION, seed=0):
    content = encoded(picture(seed)) if content is None else content
    return {"key": str(seed), "image": content, "caption": caption, "truth": None, "origin": "made"}


def verdicts(samples, config=None, n_worker=1):
    return [candidate.dropped_by for candidate in judge_samples(samples, config or FilterConfig(), n_worker)]


@pytest.mark.parametrize(
    ("caption", "dropped_by"),
    [
        (CAPTION, ""),
        ("a red circle", ""),
        ("cat", "too_short"),
        ("a b c", "too_short"),
        ("!!! ??? ... ,,, a cat", "too_short"),  # signs are no words
        ("a large cat " * 167, "too_long"),
        ("ein roter Kreis auf einer blauen Wand", "language"),
        ("две собаки играют в снегу", "language"),
        ("photographed on March 5th, 2014", "boilerplate"),
        ("castle on the hill, photographed on 5 March 2014 after a long walk through the woods", ""),
    ],
)
def test_captions_are_dropped_for_what_they_are(caption, dropped_by):
    assert verdicts([sample(caption=caption)]) == [dropped_by]


def test_the_bounds_of_caption_length_are_inclusive():
    bounds = FilterConfig(min_words=2, min_characters=7, max_characters=9, languages="", boilerplate_share=1)
    captions = ["abc def", "abc de", "abcd efgh", "abcd efghi", "abcdefg"]
    judged = verdicts([sample(caption=caption, seed=i) for i, caption in enumerate(captions)], bounds)
    assert judged == ["", "too_short", "", "too_long", "too_short"]


@pytest.mark.parametrize("date", DATES)
@pytest.mark.parametrize("said", ["photographed on {}", "Photo taken {}", "{}", "uploaded: {} at 12:34 pm"])
def test_every_form_of_date_is_boilerplate(date, said):
    assert boilerplate_share(said.format(date)) == 1


@pytest.mark.parametrize(
    "caption",
    [
        "Photographed on Saturday, 5 March 2014",
        "photographed 5.3.14",
        "this picture was uploaded on 5-Mar-2014",
        "taken on the 5th of March, 2014",
        "IMG_1234.JPG",
        "DSC01234",
        "image 3 of 12",
        "© 2014 all rights reserved",
        "royalty-free stock photo",
        "no description available",
        "click to enlarge the picture",
        "  photographed \n on\t2014 ",
    ],
)
def test_what_says_nothing_of_the_picture_is_boilerplate(caption):
    assert boilerplate_share(caption) == 1


@pytest.mark.parametrize(
    "caption", ["a photo of two dogs playing in May", "picture of a cat", "seen from the hill", "a red circle", ""]
)
def test_what_describes_the_picture_is_not_boilerplate(caption):
    assert boilerplate_share(caption) == 0


def test_boilerplate_inside_a_description_counts_by_its_share():
    assert 0 < boilerplate_share("the 2014 world cup final in rio") < 0.3
    assert verdicts([sample(caption="a cat photographed on 2014-03-05")]) == ["boilerplate"]
    assert verdicts([sample(caption="a cat photographed on 2014-03-05")], FilterConfig(boilerplate_share=0.95)) == [""]


@pytest.mark.parametrize("text", ["photo ", "2014-", "x-", "a.b", " ", "(c)", "may 1", "image\t \t"])
def test_no_caption_however_long_holds_the_patterns_up(text):
    """The patterns once took seconds for long white space; a time is not asserted, a hang would show."""
    boilerplate_share("photo" + text * 1_000_000)


def test_any_identifier_can_take_the_place_of_the_usual_one(monkeypatch):
    monkeypatch.setitem(LANGUAGE_IDENTIFIERS, "vowels", lambda: lambda text: ("xx" if "a" in text else "en", 0.7))
    by_vowels = FilterConfig(language_identifier="vowels", languages="xx, yy")
    assert verdicts([sample(caption="only one of those"), sample(caption="a cat and a hat", seed=1)], by_vowels) == [
        "language",
        "",
    ]
    strict = FilterConfig(language_identifier="vowels", languages="xx", language_confidence=0.8)
    assert verdicts([sample(caption="a cat and a hat")], strict) == ["language"]
    with pytest.raises(InputError, match=r"'none' must be one of fasttext"):
        list(judge_samples([], FilterConfig(language_identifier="none")))


@pytest.mark.parametrize(
    ("size", "dropped_by"),
    [
        ((200, 100), ""),  # both bounds are inside, as in the paper's [1/2, 2]
        ((100, 200), ""),
        ((201, 100), "aspect_ratio"),
        ((100, 201), "aspect_ratio"),
        ((64, 64), ""),
        ((64, 63), "too_small"),
    ],
)
def test_the_shape_of_a_picture_decides(size, dropped_by):
    assert verdicts([sample(encoded(picture(0, *size)))]) == [dropped_by]


def test_pictures_that_do_not_decode_are_dropped():
    whole = encoded(picture(0), "JPEG")
    cut, nothing, words = whole[: len(whole) // 2], b"", b"no picture at all"
    assert verdicts([sample(whole), sample(cut), sample(nothing), sample(words)]) == ["", *["undecodable"] * 3]


def test_a_picture_of_too_many_pixels_is_never_decoded(monkeypatch):
    monkeypatch.setattr(filters, "decode", lambda content: pytest.fail("decoded"))
    assert verdicts([sample()], FilterConfig(max_pixels=96 * 80 - 1)) == ["decompression_bomb"]


def test_the_same_pixels_in_another_file_are_an_exact_duplicate():
    first = encoded(picture(0))
    same = encoded(picture(0), compress_level=1)
    assert first != same
    samples = [sample(first), sample(same, "another caption of it"), sample(seed=1), sample(first)]
    assert verdicts(samples) == ["", "exact_duplicate", "", "exact_duplicate"]
    assert verdicts(samples, OFF) == [""] * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encoded(image, "JPEG", quality=30),
        lambda image: encoded(image.resize((70, 64), Image.Resampling.LANCZOS)),
        lambda image: encoded(image.resize((200, 160)), "WEBP", quality=50),
        lambda image: encoded(image.point(lambda value: min(255, value + 6))),
    ],
    ids=["jpeg", "smaller", "larger-webp", "brighter"],
)
def test_a_changed_copy_is_a_near_duplicate_of_the_first(change):
    samples = [sample(seed=seed) for seed in range(8)]
    *judged, copy = judge_samples([*samples, sample(change(picture(5)))], FilterConfig())
    assert [candidate.dropped_by for candidate in judged] == [""] * 8
    assert (copy.dropped_by, copy.twin) == ("near_duplicate", 5)


def test_another_colour_is_no_near_duplicate():
    """A perceptual hash knows no colour: a red circle and a blue one of its brightness have one hash."""
    circles = []
    for colour in ((255, 0, 0), (0, 130, 0)):  # both of brightness 76
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((20, 20, 70, 70), fill=colour)
        circles.append(image)
    assert fingerprint(circles[0]).hash == fingerprint(circles[1]).hash
    assert verdicts([sample(encoded(circle)) for circle in circles]) == ["", ""]


@pytest.mark.parametrize("max_bits", [0, 3, 4, 15])
def test_the_index_finds_what_comparing_with_all_finds(max_bits):
    rng = np.random.default_rng(0)
    colours = np.zeros(192, np.uint8)
    hashes = [int(value) for value in rng.integers(0, 2**63, 300)]
    index = NearIndex(max_bits)
    for value in hashes:
        index.add(Fingerprint(b"", value, colours))
    for number in range(300):
        flips = rng.choice(HASH_BITS, size=rng.integers(0, 2 * max_bits + 2), replace=False)
        asked = hashes[number] ^ sum(1 << int(bit) for bit in flips)
        apart, nearest = min(((one ^ asked).bit_count(), place) for place, one in enumerate(hashes))
        found = index.find(Fingerprint(b"", asked, colours))
        assert found == ((nearest, apart) if apart <= max_bits else None)


def test_the_index_grows_beyond_its_first_tables():
    index, exact = NearIndex(4), ExactIndex()
    rng = np.random.default_rng(1)
    ones = [
        Fingerprint(value.to_bytes(8, "big"), value, rng.integers(0, 256, 192).astype(np.uint8))
        for value in map(int, rng.integers(0, 2**63, 3_000))
    ]
    for one in ones:
        assert index.find(one) is None
        assert not exact.find(one)
        index.add(one)
        exact.add(one)
    assert len(index) == 3_000
    assert [index.find(one) for one in ones] == [(number, 0) for number in range(3_000)]
    assert all(map(exact.find, ones))


def test_verdicts_and_their_order_do_not_depend_on_the_threads():
    samples = [sample(seed=seed % 9, caption="cat" if seed % 5 == 4 else CAPTION) for seed in range(40)]
    alone = verdicts(samples)
    assert set(alone) == {"", "too_short", "exact_duplicate"}
    assert verdicts(samples, n_worker=4) == alone


def test_few_samples_are_read_ahead_and_no_picture_is_held():
    n_read = 0

    def read():
        nonlocal n_read
        for seed in range(50):
            n_read += 1
            yield sample(seed=seed)

    judged = judge_samples(read(), FilterConfig(), n_worker=2)
    candidate = next(judged)
    assert n_read <= 5
    assert "image" not in vars(candidate)
    judged.close()


def test_every_filter_has_a_counter_and_the_first_that_objects_counts():
    tally = Tally()
    for candidate in judge_samples([sample(), sample(b"", "cat"), sample()], FilterConfig()):
        tally.add(candidate)
    assert list(tally.dropped) == list(FILTERS)
    assert {name: n for name, n in tally.dropped.items() if n} == {"too_short": 1, "exact_duplicate": 1}
    assert (tally.n_seen, tally.n_kept) == (3, 1)


def test_nothing_is_dropped_with_all_filters_off():
    samples = [sample(caption=caption) for caption in ("x", "photographed on 2014", "две", "y" * 9_000)]
    assert verdicts([*samples, sample(encoded(picture(0, 9, 1)))], OFF) == [""] * 5


def test_a_candidate_is_judged_by_a_stage_of_ones_own():
    odd = {"odd": lambda candidate: "odd" if int(candidate.sample["key"]) % 2 else ""}
    assert [Candidate(sample(seed=seed)).judge(odd).dropped_by for seed in range(3)] == ["", "odd", ""]


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_words", -1), ("max_aspect_ratio", 0.5), ("near_duplicate_bits", 16), ("language_confidence", 1.1)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        FilterConfig(**{field: value})


def test_a_fingerprint_is_of_pixels_and_size():
    flat = [Image.new("RGB", size) for size in ((64, 100), (100, 64), (64, 700))]
    assert len({fingerprint(image).digest for image in flat}) == 3
    tall = picture(3, 64, 700)
    assert fingerprint(tall).digest == fingerprint(tall.copy()).digest
