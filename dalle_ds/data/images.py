"""Picture bytes to square uint8 arrays: decoding that refuses what is broken, and the crops of the paper.

Crops follow Listings 1 and 2 (Appendix A.2 and B.2) at any size: a square of the picture, resized by areas with aligned
corners, and a crop of that. Where those presume a picture at least as large as the crop, a smaller one is enlarged; a
picture that already has the size is left as it is. Of a resized picture only the crop is ever computed.
"""

import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle_ds.data.area import Pixels, Window, area_resize, area_span
from dalle_ds.data.skips import BadSample

MAX_PIXELS = 100_000_000
# Named, since Pillow would otherwise try every format it knows; some of those run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow's decoders raise on damaged bytes.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)
# Listing 1 scales the shorter side to between 9/8 and 12/8 of the crop; Listing 2 to between 1 and 9/8.
TRAIN_SCALES, ENCODE_SCALES = (9 / 8, 12 / 8), (1.0, 9 / 8)


class BadImage(BadSample):
    """Picture bytes that cannot be used; the message is the reason."""


def decode(content: bytes) -> Image.Image:
    """The picture in `content` as RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled to 8.

    Raises BadImage when it does not decode, is truncated, or has more than 100 million pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BadImage("does not decode: no picture format that is known") from None
    except DECODE_ERRORS as error:
        raise BadImage(f"does not decode: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image)
        if image.mode == "F" or int(values.min()) < 0 or int(values.max()) > 0xFFFF:
            raise BadImage(f"pixels of mode {image.mode} have no known range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        over_white = Image.new("RGB", rgba.size, (255, 255, 255))
        over_white.paste(rgba, mask=rgba)  # the same pixels as alpha_composite's, in half of the memory
        return over_white
    return image.convert("RGB")


class Crop(NamedTuple):
    """Where a crop lies: the square of `side` pixels from (left, top), resized to `scaled`, then cut from (x, y) on."""

    left: int
    top: int
    side: int
    scaled: int
    x: int
    y: int


def draw_train_crop(width: int, height: int, size: int, rng: np.random.Generator) -> Crop:
    """Listing 1: any square of the shorter side, resized to 9/8 .. 12/8 of `size` (never enlarged beyond need)."""
    side = min(width, height)
    left, top = (int(rng.integers(length - side + 1)) for length in (width, height))
    return _draw_scale(left, top, side, size, TRAIN_SCALES, rng)


def draw_encode_crop(width: int, height: int, size: int, rng: np.random.Generator) -> Crop:
    """Listing 2: a square of the shorter side in the middle quarter, resized to 1 .. 9/8 of `size`."""
    side = min(width, height)
    spare = (width - side, height - side)
    left, top = (int(rng.integers(3 * s // 8, max(3 * s // 8 + 1, 5 * s // 8))) for s in spare)
    return _draw_scale(left, top, side, size, ENCODE_SCALES, rng)


def _draw_scale(
    left: int, top: int, side: int, size: int, scales: tuple[float, float], rng: np.random.Generator
) -> Crop:
    low, high = (max(size, min(side, round(scale * size))) for scale in scales)
    scaled = int(rng.integers(low, high + 1))
    x, y = (int(rng.integers(scaled - size + 1)) for _ in range(2))
    return Crop(left, top, side, scaled, x, y)


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """The largest square around the centre, resized to uint8 [size, size, 3]; smaller pictures are enlarged."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return cut(image, Crop(left, top, side, size, 0, 0), size, align_corners=False)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, *, flip: bool = False) -> Pixels:
    """Listing 1: a random crop as `draw_train_crop` says, uint8 [size, size, 3].

    `flip` mirrors half of the pictures; leave it off where captions say left and right.
    """
    if image.size == (size, size):
        pixels = _to_array(image)
    else:
        pixels = cut(image, draw_train_crop(*image.size, size, rng), size, align_corners=True)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip and rng.random() < 1 / 2 else pixels


def central_random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """Listing 2: a random crop as `draw_encode_crop` says, uint8 [size, size, 3]; never mirrored."""
    if image.size == (size, size):
        return _to_array(image)
    return cut(image, draw_encode_crop(*image.size, size, rng), size, align_corners=True)


def picture_decode(size: int, *, augment: bool, flip: bool = False, listing: int = 1) -> Any:
    """A `decode` for pipeline.Reader: {"image": uint8 [size, size, 3], "caption", "key", "truth"}.

    With `augment` a random crop of Listing 1 or 2, else the centre crop.
    """
    assert listing in (1, 2)

    def decode_sample(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = decode(sample["image"])
        if not augment:
            pixels = centre_crop(image, size)
        elif listing == 1:
            pixels = random_crop(image, size, rng, flip=flip)
        else:
            pixels = central_random_crop(image, size, rng)
        return {"image": pixels, "caption": sample["caption"], "key": sample["key"], "truth": sample["truth"]}

    return decode_sample


def cut(image: Image.Image, crop: Crop, size: int, *, align_corners: bool) -> Pixels:
    """The pixels of `crop`, uint8 [size, size, 3]: means of areas when it shrinks, bicubic when it enlarges."""
    left, top, side, scaled, x, y = crop
    if scaled > side:
        whole = image.resize((scaled, scaled), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return _to_array(whole.crop((x, y, x + size, y + size)))
    spans = [area_span(side, scaled, first, size, align_corners=align_corners) for first in (x, y)]
    (x_begin, x_end), (y_begin, y_end) = spans
    held = image.crop((left + x_begin, top + y_begin, left + x_end, top + y_end))
    if scaled == side:
        return _to_array(held)
    pixels = np.frombuffer(held.tobytes("raw", "RGBX"), np.uint8).reshape(held.height, held.width, 4)
    window = Window(x, y, size)
    resized = area_resize(pixels, (side, side), (x_begin, y_begin), scaled, window, align_corners=align_corners)
    return np.ascontiguousarray(resized[:, :, :3])


def _to_array(image: Image.Image) -> Pixels:
    return np.array(image, dtype=np.uint8)  # [H, W, 3], a copy that may be written
