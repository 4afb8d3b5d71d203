"""Pictures seen before: the same pixels, or nearly so by a perceptual hash, with memory that is stated.

The paper does not say whether its training set was cleaned of duplicates. Both indexes keep what they were given in the
order it came, so the first of several alike stays.
"""

import hashlib
from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_BITS = 64
DIGEST_BYTES = 16  # two of 250 million pictures share 128 bits of a SHA-256 with a chance below 1e-21
THUMBNAIL = 64  # pixels; the hash looks at 32 x 32 of them
ROWS = 256
GRID = 8  # cells of the colour grid, a side
# Largest difference of a cell's mean colour. With it, 1.2% of 3,000 made scenes (flat colours, the hardest case) have a
# near duplicate, rather than 5.5% with a 4 x 4 grid, and as many of their altered copies are found (80 to 93%).
COLOUR_TOLERANCE = 16


@dataclass(frozen=True)
class Fingerprint:
    """What tells a picture from others: `digest` of its pixels, perceptual `hash`, mean `colours` uint8 [8 * 8 * 3]."""

    digest: bytes
    hash: int
    colours: npt.NDArray[np.uint8]


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    import imagehash

    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    for top in range(0, image.height, ROWS):  # the whole at once would double the memory of a large picture
        digest.update(image.crop((0, top, image.width, min(image.height, top + ROWS))).tobytes())
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    bits = np.packbits(imagehash.phash(small).hash.flatten())
    colours = np.asarray(small.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.uint8).flatten()
    return Fingerprint(digest.digest()[:DIGEST_BYTES], int.from_bytes(bits.tobytes(), "big"), colours)


class ExactIndex:
    """Pixels seen so far: about 100 bytes a picture."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def find(self, one: Fingerprint) -> bool:
        """Whether these very pixels were added before."""
        return one.digest in self._seen

    def add(self, one: Fingerprint) -> None:
        self._seen.add(one.digest)


class NearIndex:
    """Perceptual hashes seen so far, searched for those within `max_bits`.

    Some 220 + 5 * (max_bits + 1) bytes a picture: 250 MB for a million.

    The 64 bits are cut into max_bits + 1 bands. Two hashes that differ in at most max_bits agree in one band at least,
    so only pictures that share a band are compared: no near duplicate is missed. A hash knows no colour; a candidate
    counts only if the mean colours of an 8 x 8 grid agree too.
    """

    def __init__(self, max_bits: int) -> None:
        assert 0 <= max_bits < HASH_BITS
        self.max_bits = max_bits
        edges = [HASH_BITS * i // (max_bits + 1) for i in range(max_bits + 2)]
        # Shift and mask of each band.
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._buckets: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._hashes: npt.NDArray[np.uint64] = np.zeros(1024, np.uint64)
        self._colours: npt.NDArray[np.uint8] = np.zeros((1024, GRID * GRID * 3), np.uint8)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def find(self, one: Fingerprint) -> tuple[int, int] | None:
        """The number (from 0, in the order added) of the nearest picture seen, and the bits that differ; None if far.

        Of several equally near it is the first.
        """
        found: tuple[int, int] | None = None
        for (shift, mask), buckets in zip(self._bands, self._buckets, strict=True):
            bucket = buckets.get(one.hash >> shift & mask)
            if bucket is None:
                continue
            numbers = np.frombuffer(bucket, np.uint32)
            bits = np.bitwise_count(self._hashes[numbers] ^ np.uint64(one.hash))
            near = np.flatnonzero(bits <= self.max_bits)
            if not len(near):
                continue
            apart = np.abs(self._colours[numbers[near]].astype(np.int16) - one.colours).max(axis=1)
            for place in near[apart <= COLOUR_TOLERANCE]:
                candidate = int(bits[place]), int(numbers[place])
                found = candidate if found is None else min(found, candidate)
        return None if found is None else (found[1], found[0])

    def add(self, one: Fingerprint) -> None:
        if self._n == len(self._hashes):
            # In place: a copy would need twice the memory for a while.
            size = self._n + self._n // 8
            self._hashes.resize(size, refcheck=False)
            self._colours.resize((size, GRID * GRID * 3), refcheck=False)
        self._hashes[self._n], self._colours[self._n] = one.hash, one.colours
        for (shift, mask), buckets in zip(self._bands, self._buckets, strict=True):
            buckets.setdefault(one.hash >> shift & mask, array("I")).append(self._n)
        self._n += 1
