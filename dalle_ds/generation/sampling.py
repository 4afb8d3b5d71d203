"""Draws image tokens from the prior, one state at a time, with a key-value cache."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_ds.config import SamplingConfig
from dalle_ds.generation.cache import KeyValueCache
from dalle_ds.models.prior import Prior


@torch.no_grad()
def sample_tokens(
    prior: Prior,
    text_tokens: Tensor,
    text_lengths: Tensor,
    config: SamplingConfig,
    *,
    sample_seeds: Sequence[int],
    on_token: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draws one picture a caption: text_tokens [B, text_len - 1], text_lengths [B] -> codes [B, g, g].

    sample_seeds [B]: each picture draws from its own generator, so it does not depend on its neighbours in the batch.
    `on_token()` is called after each of the image_len positions.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds]
    guided = config.guidance != 1
    if guided:  # the same pictures once more, under empty captions
        text_tokens = torch.cat([text_tokens, text_tokens])
        text_lengths = torch.cat([text_lengths, torch.zeros_like(text_lengths)])
    caches = [KeyValueCache(prior.config.seq_len) for _ in prior.layers]
    # All but the last text state only fill the caches: no image state precedes start-of-image.
    prior.run_layers(prior.text_states(text_tokens, text_lengths), caches)
    codes = torch.empty(len(text_tokens), 0, dtype=torch.long, device=text_tokens.device)
    for p in range(prior.config.image_len):
        states = prior.run_layers(prior.image_states(codes[:, -1:] if p else codes, first=p), caches)  # [B, 1, dim]
        noise = torch.stack([torch.rand((), generator=generator) for generator in generators])
        logits = prior.image_head(states[:, -1])
        drawn = draw(guide(logits, config.guidance) if guided else logits, noise.to(states.device), config)
        codes = torch.cat([codes, (torch.cat([drawn, drawn]) if guided else drawn)[:, None]], dim=1)
        on_token()
    return codes[: len(generators)].view(len(generators), prior.config.grid_size, -1)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): logits [2B, K], first with and then without captions -> [B, K]."""
    captioned, plain = logits.log_softmax(dim=-1).chunk(2)
    return torch.lerp(plain, captioned, guidance)


def draw(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """One token a row of float32 logits [B, K], by inverting the cumulative distribution at `uniform` [B] in [0, 1)."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    ordered, tokens = filter_logits(logits / config.temperature, config).sort(dim=-1, descending=True)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    # The first token whose cumulative probability exceeds the uniform number; rounding may leave the sum below 1.
    index = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return tokens.gather(-1, index.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Sets to -inf what top_k and top_p exclude; the likeliest token always stays."""
    if 0 < config.top_k < logits.shape[-1]:
        threshold = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if config.top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays while the probability before it is still below top_p.
        excluded = probability.cumsum(dim=-1) - probability >= config.top_p
        logits = logits.masked_fill(excluded.scatter(-1, tokens, excluded), -math.inf)
    return logits
