"""Floating-point operations of a training step: products with matrices, attention by its masks, and the heads."""

from dataclasses import dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.parameters import count_parameters


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Operations for one sample. The heads make their gradients in the forward pass and are never recomputed."""

    layers_forward: int
    heads_forward: int

    @property
    def model(self) -> int:
        """Forward and backward, which costs twice the forward: what MFU counts."""
        return 3 * (self.layers_forward + self.heads_forward)

    def forward(self) -> int:
        return self.layers_forward + 3 * self.heads_forward

    def backward(self, recompute: bool) -> int:
        """With recomputation of activations the layers' forward pass once more: 4/3 of forward and backward."""
        return (3 if recompute else 2) * self.layers_forward


def training_flops(config: PriorConfig) -> TrainingFlops:
    """Operations of one sample at full caption length; a product of [a, b] and [b, c] is 2abc."""
    d = config.dim
    matrices = 2 * count_parameters(config).matrices * config.seq_len
    # Scores and weighted values: for each cell two products over the width of all heads.
    attention = sum(4 * d * attention_cells(config, kind) for kind in layer_kinds(config.n_layer))
    heads = (config.text_len - 1) * config.text_vocab_size + config.image_len * config.image_vocab_size
    return TrainingFlops(layers_forward=matrices + attention, heads_forward=2 * d * heads)


def attention_cells(config: PriorConfig, kind: str) -> int:
    """Pairs of states that attention is computed for: text causally, all text from each image state, and the mask."""
    text = config.text_len * (config.text_len + 1) // 2
    return text + config.image_len * config.text_len + image_cells(config, kind)


def image_cells(config: PriorConfig, kind: str) -> int:
    """Pairs of image states under a mask (Figure 11): each is a set of raster offsets that a state looks back by."""
    return sum(config.image_len - offset for offset in OFFSETS[kind](config) if offset < config.image_len)


def layer_kinds(n_layer: int) -> list[str]:
    """The mask of each layer: row, column, row, row repeating, and convolutional last (Appendix B.1)."""
    return ["column" if i % 4 == 1 else "row" for i in range(n_layer - 1)] + ["conv"]


def _conv_offsets(config: PriorConfig) -> list[int]:
    reach, width = config.conv_kernel // 2, config.grid_size
    span = (reach + 1) * width - 1 if config.conv_wrap else reach * width + reach
    return [offset for offset in range(span + 1) if min(offset % width, width - offset % width) <= reach]


# Kind of mask -> the offsets, in raster order, at which an image state sees others; 0 is itself.
OFFSETS = {
    "row": lambda config: range(config.grid_size + 1),
    "column": lambda config: range(0, config.image_len, config.grid_size),
    "conv": _conv_offsets,
}
