"""Whether codes follow the pictures: the question to ask before a data set is encoded.

A wrong pixel normalisation, or weights that were never trained, give every picture the same tokens, and nothing fails
until the prior has learned them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import InputError

# Of 255: pictures whose cells differ less, in mean colour, may rightly have the same tokens (dark or blank ones do).
CONTRAST = 64.0
REMEDY = (
    "check that pixels are uint8 from 0 to 255 and mapped once (map_pixels), that this dVAE is trained (its "
    "reconstructions show it), and, when it was imported, that the encoder's and the decoder's file belong together"
)


class CodeCheck:
    """Looks at encoded batches until one shows that different pictures have different codes.

    conclusive: such a batch has been seen. Until then the pictures were too much alike to tell.
    """

    def __init__(self) -> None:
        self.conclusive = False
        self._first: tuple[Tensor, Tensor] | None = None

    def see(self, images: Tensor, codes: Tensor) -> None:
        """Checks uint8 images [B, 3, S, S] and their codes [B, g, g]; does nothing once conclusive.

        Raises InputError when the pictures differ clearly and their codes do not, or when the pixels are not bytes.
        """
        if self.conclusive:
            return
        if images.dtype != torch.uint8:
            raise InputError(f"pixels to encode are {images.dtype} and must be torch.uint8, 0 to 255; {REMEDY}")
        colours = F.adaptive_avg_pool2d(images.float(), codes.shape[-1]).cpu()  # mean of each cell [B, 3, g, g]
        codes = codes.cpu()
        self._first = self._first or (colours[:1], codes[:1])
        if len(codes) == 1:  # a batch of one is compared with the first picture
            colours, codes = (torch.cat(pair) for pair in zip(self._first, (colours, codes), strict=True))
        self._compare(colours, codes)

    def _compare(self, colours: Tensor, codes: Tensor) -> None:
        between_cells = _spread(colours.transpose(0, 1).flatten(1))
        between_pictures = _spread(colours.transpose(0, 1).flatten(2).transpose(1, 2))
        if between_cells >= CONTRAST and bool((codes == codes.flatten()[0]).all()):
            raise InputError(
                f"every cell of {len(codes)} pictures got token {int(codes.flatten()[0])}, "
                f"though the pictures differ: {REMEDY}"
            )
        if between_pictures >= CONTRAST and bool((codes == codes[0]).all()):
            raise InputError(
                f"each of {len(codes)} pictures got the same {codes[0].numel()} tokens, though they differ: {REMEDY}"
            )
        self.conclusive = between_pictures >= CONTRAST


def _spread(values: Tensor) -> float:
    """The largest difference along the last dimension."""
    return float((values.amax(-1) - values.amin(-1)).max())
