"""From captions to pictures: tokenizer, prior and dVAE decoder together."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

from dalle_ds.config import InputError, SamplingConfig
from dalle_ds.generation.sampling import sample_tokens
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.models.weights import find_weights, fingerprint, load_dvae, load_prior
from dalle_ds.tokenizer import Tokenizer

# Between the seeds of two pictures' generators.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Painter:
    """A trained prior with the tokenizer and dVAE that belong to it."""

    tokenizer: Tokenizer
    prior: Prior
    dvae: DVAE
    device: torch.device

    @classmethod
    def load(cls, prior_run: str | Path, dvae_run: str | Path | None = None, *, averaged: bool = True) -> "Painter":
        """Loads a prior run; its dVAE is `dvae_run`, or the one that made its token shards.

        The prior has its averaged parameters, where training has kept some, or the last ones when not `averaged`.
        Raises InputError when the dVAE is missing or is not the one whose tokens the prior learned.
        """
        description = find_weights(prior_run, "prior")[1]
        dvae_run = dvae_run or description["dvae"]
        if fingerprint(dvae_run, "dvae") != description["dvae_sha256"]:
            raise InputError(
                f"{dvae_run} is not the dVAE whose tokens {prior_run} was trained on: its weights differ; "
                f"give that one with --dvae, or encode the pictures and train the prior again"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer.load(Path(prior_run) / "tokenizer.model")
        prior = load_prior(prior_run, averaged=averaged).to(device)
        return cls(tokenizer, prior, load_dvae(dvae_run).to(device), device)

    def paint(self, captions: Sequence[str], config: SamplingConfig) -> list[npt.NDArray[np.uint8]]:
        """One picture, uint8 [S, S, 3], for each caption; picture i draws from generator seed + i."""
        pictures: list[npt.NDArray[Any]] = []
        model = self.prior.config
        with Progress() as progress:
            task = progress.add_task("drawing pictures", total=len(captions) * model.image_len)
            for begin in range(0, len(captions), config.batch_size):
                part = captions[begin : begin + config.batch_size]
                tokens, lengths = self.tokenizer.encode_batch(part, model.text_len)
                codes = sample_tokens(
                    self.prior,
                    torch.from_numpy(tokens).to(self.device),
                    torch.from_numpy(lengths).to(self.device),
                    config,
                    sample_seeds=[config.seed * SEED_STRIDE + begin + i for i in range(len(part))],
                    on_token=functools.partial(progress.advance, task, len(part)),
                )
                pictures += list(self.dvae.decode(codes).permute(0, 2, 3, 1).cpu().numpy())
        return pictures

    def rebuild(self, pictures: Sequence[npt.NDArray[np.uint8]], batch_size: int = 100) -> list[npt.NDArray[np.uint8]]:
        """The pictures, uint8 [S, S, 3], through the dVAE and back: the best that the prior could draw."""
        rebuilt: list[npt.NDArray[Any]] = []
        for begin in range(0, len(pictures), batch_size):
            part = np.stack(pictures[begin : begin + batch_size])
            images = torch.from_numpy(part).permute(0, 3, 1, 2).to(self.device)
            rebuilt += list(self.dvae.decode(self.dvae.encode(images)).permute(0, 2, 3, 1).cpu().numpy())
        return rebuilt
