"""The prior of stage 2: one autoregressive stream of text states, then image states (section 2.2, Figure 10).

States 0 .. text_len - 1 are start-of-text, the caption's tokens, and learned pads; states text_len .. seq_len - 1 are
start-of-image and all image tokens but the last. State k predicts token k of its kind. An image state carries the row
and column vectors of the token that it predicts; a pad state carries no position vector.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_ds.config import PriorConfig
from dalle_ds.models.attention import LayerCache, SelfAttention
from dalle_ds.models.gradient_scaling import begin_branch, end_branch
from dalle_ds.models.layers import INIT_GAIN, MLP, Head, LayerNorm, widen
from dalle_kernels.attention import Mask


def layer_kinds(n_layer: int) -> list[str]:
    """The mask of each layer: row, column, row, row repeating, and convolutional last (Appendix B.1)."""
    kinds = ["column" if i % 4 == 1 else "row" for i in range(n_layer)]
    kinds[-1] = "conv"
    return kinds


class TextStates(nn.Module):
    """Caption tokens -> the text_len states that precede the picture."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        dim, text_len = config.dim, config.text_len
        self.tokens = _table(config.text_vocab_size, dim)
        self.start = _table(1, dim)
        self.position = _table(text_len, dim, n_tables=text_len)
        self.pad = _table(text_len, dim)

    def forward(self, text_tokens: Tensor, text_lengths: Tensor) -> Tensor:
        """text_tokens [B, text_len - 1] (any value past the length), text_lengths [B] -> float32 [B, text_len, dim]."""
        B, n = text_tokens.shape
        start = self.start.expand(B, 1, -1)
        states = torch.cat([start, F.embedding(text_tokens, self.tokens)], dim=1) + self.position
        is_pad = torch.arange(n + 1, device=text_tokens.device) > text_lengths[:, None]
        return widen(torch.where(is_pad[..., None], self.pad, states))


class ImageStates(nn.Module):
    """Image tokens -> the states that predict them."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        dim, self.grid_size = config.dim, config.grid_size
        self.tokens = _table(config.image_vocab_size, dim)
        self.start = _table(1, dim)
        self.row = _table(config.grid_size, dim, n_tables=config.grid_size)
        self.column = _table(config.grid_size, dim, n_tables=config.grid_size)

    def forward(self, image_tokens: Tensor, first: int = 0) -> Tensor:
        """States first ... first + n: start-of-image when first is 0, then the given tokens [B, n].

        Token p makes state p + 1; `image_tokens` are the tokens first - 1 and on (first > 0) or 0 and on (first = 0).
        """
        states = F.embedding(image_tokens, self.tokens)
        if first == 0:
            states = torch.cat([self.start.expand(image_tokens.shape[0], 1, -1), states], dim=1)
        p = torch.arange(first, first + states.shape[1], device=states.device)
        return widen(states + self.row[p // self.grid_size] + self.column[p % self.grid_size])


class Layer(nn.Module):
    """An attention resblock and an MLP resblock on a float32 residual stream (float64 in a model of float64).

    The two branches compute in `compute_dtype`, or in the dtype of their matrices. `attention_scale` and `mlp_scale`
    are the resblocks' gradient scales, or none.
    """

    def __init__(
        self, config: PriorConfig, kind: str, matrix_dtype: torch.dtype, compute_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.attention_scale: Tensor | None = None
        self.mlp_scale: Tensor | None = None
        mask = Mask(
            kind=kind,
            text_len=config.text_len,
            grid_height=config.grid_size,
            grid_width=config.grid_size,
            conv_kernel=config.conv_kernel,
            wrap=config.conv_wrap,
        )
        # Child et al. 2019: the last matrix of each of the 2 * n_layer resblocks.
        output_gain = INIT_GAIN / math.sqrt(2 * config.n_layer)
        self.attention_norm = LayerNorm(config.dim, relaxed=config.pb_relax)
        self.attention = SelfAttention(config.n_head, config.head_dim, mask, output_gain, matrix_dtype)
        self.attention_end = _branch_end(config)
        self.mlp_norm = LayerNorm(config.dim, relaxed=config.pb_relax)
        self.mlp = MLP(config.dim, output_gain, matrix_dtype)
        self.mlp_end = _branch_end(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        dtype = self.compute_dtype or self.mlp.up.weight.dtype
        branch = self.attention_norm(begin_branch(x, self.attention_scale)).to(dtype)
        branch = self.attention_end(self.attention(branch, cache))
        x = x + end_branch(widen(branch), self.attention_scale)
        branch = self.mlp_norm(begin_branch(x, self.mlp_scale)).to(dtype)
        branch = self.mlp_end(self.mlp(branch))
        return x + end_branch(widen(branch), self.mlp_scale)


class Prior(nn.Module):
    """The transformer; `forward` is the training loss, `states` and the heads serve sampling.

    The matrices of the resblocks are stored in `matrix_dtype` and all else in float32 (section 2.4). The resblocks'
    branches compute in `compute_dtype`, by default that of their matrices; the stream, norms and logits in float32.
    """

    def __init__(
        self,
        config: PriorConfig,
        *,
        checkpoint_activations: bool = False,
        matrix_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.checkpoint_activations = config, checkpoint_activations
        self.text_states = TextStates(config)
        self.image_states = ImageStates(config)
        self.layers = nn.ModuleList(
            Layer(config, kind, matrix_dtype, compute_dtype) for kind in layer_kinds(config.n_layer)
        )
        self.text_head = Head(config.dim, config.text_vocab_size, relaxed=config.pb_relax)
        self.image_head = Head(config.dim, config.image_vocab_size, relaxed=config.pb_relax)

    def forward(
        self, text_tokens: Tensor, text_lengths: Tensor, image_tokens: Tensor, n_text_tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weighted next-token loss (section 2.2), each kind averaged over its own tokens, in nats a token.

        text_tokens [B, text_len - 1] int64, text_lengths [B] int64, image_tokens [B, image_len] int64. The text loss is
        divided by `n_text_tokens`, for which a rank gives the mean over all ranks; without it, by this batch's number.
        """
        text_len = self.config.text_len
        x = torch.cat(
            [self.text_states(text_tokens, text_lengths), self.image_states(image_tokens[:, :-1])], dim=1
        )  # [B, seq_len, dim]
        x = self.run_layers(x)
        # Each kind's logits where that kind is predicted, and nowhere else. Pads are inputs, never targets.
        is_token = torch.arange(text_tokens.shape[1], device=x.device) < text_lengths[:, None]
        n = is_token.sum() if n_text_tokens is None else n_text_tokens
        # A batch may hold empty captions alone; the mean over no tokens would be nan.
        text_loss = self.text_head(x[:, : text_len - 1][is_token], text_tokens[is_token]) / torch.where(n > 0, n, 1)
        image_loss = self.image_head(x[:, text_len:].flatten(0, 1), image_tokens.flatten()) / image_tokens.numel()
        weight = self.config.text_loss_weight
        return {
            "loss": weight * text_loss + (1 - weight) * image_loss,
            "text_loss": text_loss,
            "image_loss": image_loss,
        }

    def set_gradient_scales(self, scales: Tensor | None) -> None:
        """Scales the gradients inside resblock k by scales[k] from now on, or no longer when `scales` is none.

        `scales` [2 * n_layer], float32, on the device of the model; attention of layer i is resblock 2 i, its MLP
        2 i + 1. Views are kept: the scales may be changed in place after a backward pass.
        """
        n_block = 2 * len(self.layers)
        assert scales is None or scales.shape == (n_block,), f"{n_block} resblocks"
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            layer.attention_scale, layer.mlp_scale = (None, None) if scales is None else scales[2 * i : 2 * i + 2]

    def run_layers(self, x: Tensor, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """States [B, n, dim] through all layers; with caches, those that follow what the caches hold."""
        checkpointed = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            if checkpointed:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x, None if caches is None else caches[i])
        return x


def _branch_end(config: PriorConfig) -> nn.Module:
    """What a resblock's branch passes before it joins the stream: nothing in the paper's model."""
    end: list[nn.Module] = []
    if config.sandwich_norm:
        end.append(LayerNorm(config.dim, relaxed=config.pb_relax))
    if config.dropout:
        end.append(nn.Dropout(config.dropout))
    return nn.Sequential(*end)


def _table(n: int, dim: int, n_tables: int = 1) -> nn.Parameter:
    """A table [n, dim] of vectors N(0, 0.125 / sqrt(dim * n_tables)) (Child et al. 2019, section 5.2)."""
    return nn.Parameter(torch.randn(n, dim) * (INIT_GAIN / math.sqrt(dim * n_tables)))
