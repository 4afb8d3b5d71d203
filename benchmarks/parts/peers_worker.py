"""One data set of dvae_peers.py: trains every contender for equal CPU seconds, then measures all of them.

    python peers_worker.py --pictures scenes.npz --out scenes --seconds 60 --contenders ours peer_script peer_class

Contenders take turns of a few seconds in one process, so that whatever else the machine does meets all alike. All see
the same bytes in the same order. Writes <out>.json with the figures and <out>.npz with pictures to look at.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dalle_ds.commands.train_dvae import N_CODEBOOK, WARM_START_FINAL_LR
from dalle_ds.models.codebook import make_codebook
from dalle_ds.models.dvae import DVAE
from dalle_ds.presets import find_preset
from dalle_ds.training.schedules import cosine, warmup_cosine

VOCAB_SIZE, GRID_SIZE, SIZE = 512, 8, 64
TURN = 5.0  # CPU seconds
MEASURE_BATCH, MEASURE_ROUNDS = 64, 9
N_SHOWN = 8
BYTE = 255.0


class Contender(Protocol):
    """A tokenizer of pictures that learns: uint8 pictures [B, 3, S, S] in, codes [B, g, g], uint8 pictures out."""

    batch_size: int

    def train_step(self, images: Tensor, progress: float) -> None:
        """One optimizer step; `progress` is the fraction of the CPU seconds that is spent."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


class Ours:
    """dalle_ds with the `tiny` preset as it is: its steps are stretched over the CPU seconds, and nothing is tuned.

    Squares without relaxation, a codebook by k-means, then the relaxed evidence lower bound.
    """

    def __init__(self, train: Tensor) -> None:
        deepspeed = json.loads((Path(__file__).parents[2] / "ds_configs" / "cpu_dvae.json").read_text())
        self.batch_size: int = deepspeed["train_micro_batch_size_per_gpu"]
        self.clipping: float = deepspeed["gradient_clipping"]
        self.peak: float = deepspeed["optimizer"]["params"]["lr"]
        self.weight_decay: float = deepspeed["optimizer"]["params"]["weight_decay"]
        preset = find_preset("tiny").dvae
        self.schedule, self.steps = preset.schedule, preset.schedule.warm_start_steps + preset.loop.steps
        self.model = DVAE(preset.model)
        self.codebook_pictures = train[:N_CODEBOOK]
        self.is_relaxed = False
        self.optimizer = self._make_optimizer(1.0)

    def _make_optimizer(self, encoder_lr: float) -> torch.optim.Optimizer:
        parts = ((self.model.decoder, 1.0), (self.model.encoder, encoder_lr))
        groups = [{"params": list(part.parameters()), "multiplier": multiplier} for part, multiplier in parts]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)

    def train_step(self, images: Tensor, progress: float) -> None:
        schedule, step = self.schedule, int(progress * self.steps)  # of the preset, not the number of calls
        if step < schedule.warm_start_steps:
            rate = warmup_cosine(step, schedule.lr_warmup_steps, WARM_START_FINAL_LR, schedule.warm_start_steps)
            loss = self.model(images, None)["loss"]
        else:
            if not self.is_relaxed:
                make_codebook(self.model, self.codebook_pictures)
                self.is_relaxed, self.optimizer = True, self._make_optimizer(schedule.encoder_lr_multiplier)
            step -= schedule.warm_start_steps
            final = schedule.lr_final_multiplier / schedule.lr_start_multiplier
            rate = schedule.lr_start_multiplier * warmup_cosine(
                step, schedule.lr_warmup_steps, final, schedule.lr_steps
            )
            temperature = cosine(step, schedule.temperature_start, schedule.temperature_end, schedule.temperature_steps)
            kl_weight = cosine(step, schedule.kl_weight_start, schedule.kl_weight, schedule.kl_steps)
            loss = self.model(images, temperature, kl_weight)["loss"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * rate * group["multiplier"]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()

    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


class Peer:
    """dalle_pytorch.DiscreteVAE, trained as its train_vae.py does (Adam, rate and temperature falling every 100)."""

    batch_size = 8
    EVERY, LR, LR_DECAY, TEMPERATURE, MIN_TEMPERATURE, ANNEAL_RATE = 100, 1e-3, 0.98, 1.0, 0.5, 1e-6

    def __init__(self, hidden_dim: int, num_resnet_blocks: int) -> None:
        stand_in_for_taming()
        from dalle_pytorch.dalle_pytorch import DiscreteVAE

        self.model = DiscreteVAE(
            image_size=SIZE,
            num_tokens=VOCAB_SIZE,
            codebook_dim=512,
            num_layers=3,
            num_resnet_blocks=num_resnet_blocks,
            hidden_dim=hidden_dim,
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.LR)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=self.LR_DECAY)
        self.temperature, self.step = self.TEMPERATURE, 0

    def train_step(self, images: Tensor, progress: float) -> None:
        loss, _ = self.model(as_unit(images), return_loss=True, return_recons=True, temp=self.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.step % self.EVERY == 0:
            # It multiplies what the last time has multiplied; the script has it so.
            self.temperature = max(self.temperature * math.exp(-self.ANNEAL_RATE * self.step), self.MIN_TEMPERATURE)
            self.schedule.step()
        self.step += 1

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        codes: Tensor = self.model.get_codebook_indices(as_unit(images))
        return codes.unflatten(1, (GRID_SIZE, GRID_SIZE))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        # Its decoder answers in normalised values (mean and deviation 0.5), which its own code leaves as they are.
        unit = (self.model.decode(codes.flatten(1)) * 0.5 + 0.5).clamp(0, 1)
        return (unit * BYTE).round().to(torch.uint8)


def as_unit(images: Tensor) -> Tensor:
    """Bytes to [0, 1], one plane a colour, as torchvision's ToTensor gives them."""
    return images.float().div(BYTE).contiguous()


def stand_in_for_taming() -> None:
    """Empty classes for the two of taming-transformers that dalle_pytorch imports, and that its dVAE never uses.

    The real ones want pytorch-lightning and torchvision. Nothing inside dalle_pytorch is changed.
    """
    names = ("taming", "taming.models", "taming.models.vqgan")
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules["taming.models.vqgan"]).update(VQModel=object, GumbelVQ=object)
    sys.modules.update(modules)


def batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The pictures in an order that is the same for every batch size, a fresh one each time round."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.empty(0, dtype=torch.int64)
    while True:
        while len(held) < batch_size:
            held = torch.cat([held, torch.randperm(len(images), generator=generator)])
        yield images[held[:batch_size]]
        held = held[batch_size:]


@dataclasses.dataclass
class Run:
    """A contender in training, and the CPU seconds and pictures that it has had."""

    contender: Contender
    batches: Iterator[Tensor]
    seconds: float = 0.0
    n_images: int = 0


def train(runs: dict[str, Run], seconds: float, report: Callable[[float], None]) -> None:
    """Trains all, by turns, until each has had its `seconds` of CPU."""
    while any(run.seconds < seconds for run in runs.values()):
        for run in runs.values():
            turn_ends = min(run.seconds + TURN, seconds)
            while run.seconds < turn_ends:
                images = next(run.batches)
                began = time.process_time()
                run.contender.train_step(images, run.seconds / seconds)
                spent = time.process_time() - began
                run.seconds += spent
                run.n_images += len(images)
                report(spent)


def measure(contender: Contender, images: Tensor) -> tuple[dict[str, float], Tensor]:
    """Figures of the reconstructions from the likeliest codes of uint8 images [N, 3, S, S], and the reconstructions."""
    codes = torch.cat([contender.encode(chunk) for chunk in images.split(MEASURE_BATCH)])
    decoded = torch.cat([contender.decode(chunk) for chunk in codes.split(MEASURE_BATCH)])
    unit, rebuilt = images.float() / BYTE, decoded.float() / BYTE
    probability = torch.bincount(codes.flatten(), minlength=VOCAB_SIZE) / codes.numel()
    entropy = -torch.special.xlogy(probability, probability).sum()
    figures = {
        "psnr": float(peak_signal_noise_ratio(rebuilt, unit, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(rebuilt, unit, data_range=1.0)),
        "codebook_use": float((probability > 0).float().mean()),
        "perplexity": float(entropy.exp()),
    }
    return figures, decoded


def measure_speed(runs: dict[str, Run], images: Tensor) -> dict[str, float]:
    """Median pictures a CPU second through encoder and decoder, contenders in turns."""
    images = images[:MEASURE_BATCH]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(1 + MEASURE_ROUNDS):
        for name, run in runs.items():
            began = time.process_time()
            run.contender.decode(run.contender.encode(images))
            seconds[name] += [time.process_time() - began] if i else []  # the first round warms up
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


CONTENDERS: dict[str, Callable[[Tensor], Contender]] = {
    "ours": Ours,
    "peer_script": lambda train: Peer(hidden_dim=256, num_resnet_blocks=2),
    "peer_class": lambda train: Peer(hidden_dim=64, num_resnet_blocks=0),
    "peer_narrow": lambda train: Peer(hidden_dim=32, num_resnet_blocks=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="an .npz that peers_pictures.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where to write: the name without .json or .npz")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training for each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with np.load(arguments.pictures) as arrays:
        images = {name: torch.from_numpy(arrays[name]).permute(0, 3, 1, 2) for name in arrays}
    runs = {}
    for name in arguments.contenders:
        torch.manual_seed(arguments.seed)
        contender = CONTENDERS[name](images["train"])
        runs[name] = Run(contender, batches(images["train"], contender.batch_size, arguments.seed))
    with Progress() as progress:
        task = progress.add_task(arguments.pictures.stem, total=len(runs) * arguments.seconds)
        train(runs, arguments.seconds, lambda spent: progress.advance(task, spent))
    speeds = measure_speed(runs, images["validation"])
    figures, shown = {}, {"original": images["validation"][:N_SHOWN]}
    for name, run in runs.items():
        quality, decoded = measure(run.contender, images["validation"])
        rates = {"train_images_per_second": run.n_images / run.seconds, "coded_images_per_second": speeds[name]}
        figures[name] = {**quality, **rates, "n_images": run.n_images}
        shown[name] = decoded[:N_SHOWN]
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    np.savez(arguments.out.with_suffix(".npz"), **{k: v.permute(0, 2, 3, 1).numpy() for k, v in shown.items()})


if __name__ == "__main__":
    main()
