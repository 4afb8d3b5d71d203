"""Images: what decodes, what is refused with a reason, and where the crops lie."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from dalle_ds.data import images
from dalle_ds.data.area import Window, area_resize
from dalle_ds.data.images import (
    BadImage,
    Crop,
    central_random_crop,
    centre_crop,
    cut,
    decode,
    draw_encode_crop,
    draw_train_crop,
    picture_decode,
    random_crop,
)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 20, 30)),
        (Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), (128, 128, 128)),
    ],
    ids=["grey", "bilevel", "grey-clear", "clear", "opaque", "palette", "grey16"],
)
def test_every_mode_becomes_rgb_over_white(image: Image.Image, expected: tuple[int, int, int]) -> None:
    decoded = decode(encode(image))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 1)) == expected


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9])
    assert decode(encode(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_jpegs_become_rgb() -> None:
    content = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode(content).getpixel((8, 8))  # type: ignore[misc]
    assert red > 200
    assert max(green, blue) < 60


def test_pictures_are_turned_as_their_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    assert decode(encode(noise(10, 20), "JPEG", exif=exif)).size == (10, 20)


def test_truncated_pictures_are_refused_with_a_reason() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encode(noise(64, 64), kind)
        with pytest.raises(BadImage, match="does not decode"):
            decode(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_bytes_that_are_no_picture_are_refused(content: bytes) -> None:
    with pytest.raises(BadImage, match="does not decode"):
        decode(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow says of damaged TIFF tags
def test_damaged_bytes_never_raise_anything_but_a_bad_image() -> None:
    generator = rng()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(encode(noise(24, 24), kind), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            places = generator.integers(len(damaged), size=5)
            damaged[places] = generator.integers(256, size=5)
            with contextlib.suppress(BadImage):
                assert decode(damaged.tobytes()).mode == "RGB"


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(noise(20, 20))
    monkeypatch.setattr(images, "MAX_PIXELS", 399)
    with pytest.raises(BadImage, match="20 x 20 pixels"):
        decode(content)
    monkeypatch.setattr(images, "MAX_PIXELS", 400)
    assert decode(content).size == (20, 20)


@pytest.mark.parametrize(
    "crop", [centre_crop, lambda i, s: random_crop(i, s, rng()), lambda i, s: central_random_crop(i, s, rng())]
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 64), (200, 90), (90, 200), (10, 20), (1, 300)])
def test_every_crop_of_every_picture_has_the_size(crop, height: int, width: int) -> None:  # type: ignore[no-untyped-def]
    pixels = crop(noise(height, width), 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


def test_a_picture_of_the_size_passes_untouched_through_every_crop() -> None:
    image = noise(64, 64)
    for pixels in (centre_crop(image, 64), random_crop(image, 64, rng()), central_random_crop(image, 64, rng())):
        np.testing.assert_array_equal(pixels, np.asarray(image))


def test_the_centre_crop_is_the_centre_and_averages_areas() -> None:
    pixels = centre_crop(coordinates(64, 128), 32)
    # Columns 32..95 in pairs: the mean of 32 and 33 first.
    np.testing.assert_allclose(pixels[0, :, 0], np.arange(32, 96, 2) + 0.5, atol=0.5)
    np.testing.assert_allclose(pixels[:, 0, 1], np.arange(0, 64, 2) + 0.5, atol=0.5)


def test_random_crops_lie_anywhere_and_are_never_flipped_unless_asked() -> None:
    lefts = []
    for seed in range(50):
        pixels = random_crop(coordinates(64, 200), 32, np.random.default_rng(seed)).astype(int)
        assert pixels[0, -1, 0] > pixels[0, 0, 0]
        lefts.append(pixels[0, 0, 0])
    assert min(lefts) < 30
    assert max(lefts) > 110


def test_about_half_the_pictures_are_flipped_when_asked() -> None:
    for width in (64, 100):
        image = coordinates(64, width)
        n_flipped = 0
        for seed in range(200):
            pixels = random_crop(image, 64, np.random.default_rng(seed), flip=True).astype(int)
            n_flipped += pixels[0, -1, 0] < pixels[0, 0, 0]
        assert 70 <= n_flipped <= 130  # four standard deviations of 200 coin flips


def drawn(draw, width: int, height: int, size: int, n: int = 2_000) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    """Columns left, top, side, scaled, x, y of n crops."""
    generator = rng()
    return np.array([draw(width, height, size, generator) for _ in range(n)])


def assert_fills(values: np.ndarray, low: int, high: int) -> None:  # type: ignore[type-arg]
    """Every whole number from low to high, both included, is drawn about equally often."""
    counts = np.bincount(values - low, minlength=high - low + 1)
    assert values.min() == low
    assert len(counts) == high - low + 1  # high was drawn, and nothing above
    expected = len(values) / len(counts)
    # Six standard deviations of the count of one value: 1e-9 of a fair draw lies beyond.
    assert np.abs(counts - expected).max() < 6 * expected**0.5


def test_listing_1_draws_every_place_and_every_size_with_both_ends() -> None:
    left, top, side, scaled, x, y = drawn(draw_train_crop, 440, 400, 256).T
    assert set(side) == {400}
    assert_fills(left, 0, 40)
    assert set(top) == {0}
    assert_fills(scaled, 288, 384)
    for place in (x, y):
        assert place.min() == 0
        assert (place <= scaled - 256).all()
        assert (place == scaled - 256).any()
    assert not np.array_equal(x, y)


@pytest.mark.parametrize(("side", "low", "high"), [(256, 256, 256), (270, 270, 270), (288, 288, 288), (320, 288, 320)])
def test_listing_1_never_enlarges_a_picture_of_at_least_the_size(side: int, low: int, high: int) -> None:
    assert_fills(drawn(draw_train_crop, side, side + 1, 256)[:, 3], low, high)


def test_listing_2_keeps_the_square_in_the_middle_quarter_with_both_ends() -> None:
    left, top, side, scaled, x, y = drawn(draw_encode_crop, 400, 501, 256).T
    assert set(side) == {400}
    assert set(left) == {0}
    assert_fills(top, 3 * 101 // 8, 5 * 101 // 8 - 1)
    assert_fills(scaled, 256, 288)
    for place in (x, y):
        assert place.min() == 0
        assert (place <= scaled - 256).all()
        assert (place == scaled - 256).any()


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4, 7])
def test_listing_2_takes_its_first_place_where_the_quarter_is_empty(spare: int) -> None:
    tops = drawn(draw_encode_crop, 270, 270 + spare, 256, 500)[:, 1]
    assert_fills(tops, 3 * spare // 8, max(3 * spare // 8, 5 * spare // 8 - 1))
    assert_fills(drawn(draw_encode_crop, 270, 270 + spare, 256)[:, 3], 256, 270)


def test_listing_2_never_flips() -> None:
    for seed in range(100):
        pixels = central_random_crop(coordinates(100, 120), 64, np.random.default_rng(seed)).astype(int)
        assert pixels[0, -1, 0] > pixels[0, 0, 0]
        assert pixels[-1, 0, 1] > pixels[0, 0, 1]


def slow_area(pixels: np.ndarray, n_out: int, *, align_corners: bool) -> np.ndarray:  # type: ignore[type-arg]
    """TensorFlow 1's rule, pixel by pixel in its float32: sums of the overlaps, indices held at the edge."""
    n = len(pixels)
    step = np.float32((n - 1) / (n_out - 1) if align_corners and n_out > 1 else n / n_out)

    def overlaps(i: int) -> list[tuple[int, np.float32]]:
        begin, end = np.float32(i) * step, np.float32(i + 1) * step
        cells = range(int(np.floor(begin)), int(np.ceil(end)))
        return [(min(cell, n - 1), np.float32(min(end, cell + 1) - max(begin, cell))) for cell in cells]

    out = np.zeros((n_out, n_out, 3), np.float32)
    for row in range(n_out):
        for column in range(n_out):
            for y, height in overlaps(row):
                for x, width in overlaps(column):
                    out[row, column] += pixels[y, x].astype(np.float32) * width * height
    return np.rint(np.clip(out / (step * step), 0, 255)).astype(np.uint8)


def resize_whole(pixels: np.ndarray, n_out: int, *, align_corners: bool) -> np.ndarray:  # type: ignore[type-arg]
    four = np.concatenate([pixels, pixels[:, :, :1]], axis=2)
    size = (len(pixels), len(pixels))
    return area_resize(four, size, (0, 0), n_out, Window(0, 0, n_out), align_corners=align_corners)[:, :, :3]


@pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "plain"])
@pytest.mark.parametrize(("side", "n_out"), [(40, 39), (40, 27), (40, 20), (61, 16), (40, 1), (40, 40)])
def test_areas_are_averaged_as_tensorflow_1_averages_them(side: int, n_out: int, align_corners: bool) -> None:
    pixels = np.asarray(noise(side, side))
    ours = resize_whole(pixels, n_out, align_corners=align_corners)
    difference = np.abs(ours.astype(int) - slow_area(pixels, n_out, align_corners=align_corners))
    # Sums in another order round another way where a mean lies at one half: one grey level, in few places (0.4% where
    # the weights are multiples of 1/27 or 1/39).
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-2


@pytest.mark.parametrize("scaled", [40, 39, 33])
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (1, 1)], ids=["first", "side", "last"])
def test_a_crop_is_a_part_of_the_whole_resized_square(scaled: int, corner: tuple[int, int]) -> None:
    image, size = noise(50, 60), 32
    x, y = (scaled - size if last else 0 for last in corner)
    square = np.asarray(image.crop((7, 10, 47, 50)))
    whole = resize_whole(square, scaled, align_corners=True)
    pixels = cut(image, Crop(7, 10, 40, scaled, x, y), size, align_corners=True)
    np.testing.assert_array_equal(pixels, whole[y : y + size, x : x + size])


def test_the_corners_of_a_resized_square_are_aligned() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[-1, -1] = 200
    pixels = cut(Image.fromarray(image), Crop(0, 0, 100, 64, 32, 32), 32, align_corners=True)
    assert pixels[-1, -1].tolist() == [200, 200, 200]  # the last pixel stands for itself, repeated beyond the edge


def test_pillow_averages_whole_pixels_only_and_lies_far_from_the_areas() -> None:
    """Why there is a resize of our own: on noise, BOX is tens of grey levels off."""
    image = noise(100, 100)
    ours = cut(image, Crop(0, 0, 100, 64, 0, 0), 64, align_corners=True)
    box = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
    assert np.abs(ours.astype(int) - box).mean() > 10


def test_the_same_generator_gives_the_same_crop() -> None:
    image = noise(100, 140)
    np.testing.assert_array_equal(random_crop(image, 64, rng(), flip=True), random_crop(image, 64, rng(), flip=True))


def test_picture_decode_makes_the_fields_of_a_batch() -> None:
    sample = {"image": encode(noise(80, 70)), "caption": "c", "key": "k", "truth": None, "origin": "o"}
    for options in ({"augment": False}, {"augment": True}, {"augment": True, "listing": 2}):
        fields = picture_decode(64, **options)(sample, rng())
        assert fields["image"].shape == (64, 64, 3)
        assert (fields["caption"], fields["key"], fields["truth"]) == ("c", "k", None)
