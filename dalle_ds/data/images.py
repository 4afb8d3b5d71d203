"""Picture bytes to square uint8 arrays: decoding that refuses what is broken, and the crops of the paper.

Crops follow Listings 1 and 2 (Appendix A.2 and B.2) at any size. Where those presume a picture at least as large as the
crop, a smaller one is enlarged; a picture that already has the size is left as it is.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle_ds.data.skips import BadSample

Pixels = npt.NDArray[np.uint8]

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
            return _to_rgb(ImageOps.exif_transpose(image))
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
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """The largest square around the centre, resized to uint8 [size, size, 3]; smaller pictures are enlarged."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _to_array(_resize(image, (left, top), side, size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, *, flip: bool = False) -> Pixels:
    """Listing 1: a random square, resized to 9/8 .. 12/8 of `size` (never enlarged beyond need), a random crop of that.

    `flip` mirrors half of the pictures; leave it off where captions say left and right. Returns uint8 [size, size, 3].
    """
    if image.size != (size, size):
        side = min(image.size)
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        image = _crop_at_scale(image, (left, top), size, TRAIN_SCALES, rng)
    pixels = _to_array(image)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip and rng.random() < 1 / 2 else pixels


def central_random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """Listing 2: a square whose place varies over the middle quarter, resized to 1 .. 9/8 of `size`, a random crop.

    Returns uint8 [size, size, 3].
    """
    if image.size == (size, size):
        return _to_array(image)
    spare = [length - min(image.size) for length in image.size]
    left, top = (int(rng.integers(3 * s // 8, max(3 * s // 8 + 1, 5 * s // 8))) for s in spare)
    return _to_array(_crop_at_scale(image, (left, top), size, ENCODE_SCALES, rng))


def picture_decode(size: int, *, augment: bool, flip: bool = False) -> Any:
    """A `decode` for pipeline.Reader: {"image": uint8 [size, size, 3], "caption", "key", "truth"}."""

    def decode_sample(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = decode(sample["image"])
        pixels = random_crop(image, size, rng, flip=flip) if augment else centre_crop(image, size)
        return {"image": pixels, "caption": sample["caption"], "key": sample["key"], "truth": sample["truth"]}

    return decode_sample


def _crop_at_scale(
    image: Image.Image, corner: tuple[int, int], size: int, scales: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    side = min(image.size)
    low, high = (max(size, min(side, round(scale * size))) for scale in scales)
    scaled = int(rng.integers(low, high + 1))
    x, y = (int(rng.integers(scaled - size + 1)) for _ in range(2))
    return _resize(image, corner, side, scaled).crop((x, y, x + size, y + size))


def _resize(image: Image.Image, corner: tuple[int, int], side: int, target: int) -> Image.Image:
    """The square with upper left `corner`, scaled to `target`: area average when shrinking, bicubic when enlarging."""
    box = (*corner, corner[0] + side, corner[1] + side)
    if side == target:
        return image if image.size == (side, side) else image.crop(box)
    filter_ = Image.Resampling.BOX if target < side else Image.Resampling.BICUBIC
    return image.resize((target, target), filter_, box=box)


def _to_array(image: Image.Image) -> Pixels:
    return np.array(image, dtype=np.uint8)  # [H, W, 3], a copy that may be written
