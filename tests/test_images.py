"""Images: what decodes, what is refused with a reason, and where the crops lie."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from dalle_ds.data import images
from dalle_ds.data.images import BadImage, central_random_crop, centre_crop, decode, picture_decode, random_crop


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


def test_the_scale_of_a_training_crop_lies_in_listing_1() -> None:
    # Pixels of a crop span 32 of `scaled` columns that stand for 200: steps of 200 / scaled.
    for seed in range(50):
        pixels = random_crop(coordinates(200, 200), 32, np.random.default_rng(seed)).astype(float)
        step = (pixels[0, -1, 0] - pixels[0, 0, 0]) / 31
        assert 200 / 48 - 0.1 <= step <= 200 / 36 + 0.1


def test_the_encoding_crop_stays_in_the_middle_quarter() -> None:
    for seed in range(50):
        pixels = central_random_crop(coordinates(40, 240), 32, np.random.default_rng(seed))
        assert 75 <= pixels[0, 0, 0] <= 125 + 40 - 32


def test_the_same_generator_gives_the_same_crop() -> None:
    image = noise(100, 140)
    np.testing.assert_array_equal(random_crop(image, 64, rng(), flip=True), random_crop(image, 64, rng(), flip=True))


def test_picture_decode_makes_the_fields_of_a_batch() -> None:
    sample = {"image": encode(noise(80, 70)), "caption": "c", "key": "k", "truth": None, "origin": "o"}
    for augment in (False, True):
        fields = picture_decode(64, augment=augment)(sample, rng())
        assert fields["image"].shape == (64, 64, 3)
        assert (fields["caption"], fields["key"], fields["truth"]) == ("c", "k", None)
