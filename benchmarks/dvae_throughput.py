"""The claim: a training step of the dVAE is no slower than that of the authors' released modules in a plain loop.

    python benchmarks/dvae_throughput.py [--sizes full small] [--batch 1] [--dtype fp32] [--device cpu]

A step is forward and backward with the paper's loss; the optimizer would be the same for both. Before a speed is shown,
loss and gradients of both must agree in float32 on the same noise; a red gate ends it. On a GPU, also prints the
fraction of the machine's matrix peak (measured by a large product in the same precision); writes a dated table.

The release knows float32 and float16, the latter on GPUs alone: with --dtype bf16 ours is timed against its float16.
The full size needs 3 GB of memory on a CPU.
"""

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable

import dall_e
import torch
from parts.measuring import DTYPES, describe_machine, interleave, matrix_peak, median_ratio, results_path
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import DVAEConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import gumbel_noise

SIZES = {
    "full": DVAEConfig(),
    "small": DVAEConfig(image_size=64, n_hid=64, n_blk_per_group=1, vocab_size=512),
}
TEMPERATURE, KL_WEIGHT = 0.5, 6.6
# Sums of float32 in another order, through the layers and back; relative.
GATE_ERROR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["full", "small"], choices=SIZES)
    parser.add_argument("--batch", type=int, help="pictures a step (default: 1 on a CPU, 8 on a GPU)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the small size, one round, nothing written: a smoke test")
    arguments = parser.parse_args()
    on_gpu = torch.device(arguments.device).type == "cuda"
    if not on_gpu and arguments.dtype != "fp32":
        parser.error("on a CPU the release computes in float32 alone: use --dtype fp32")
    torch.set_num_threads(arguments.threads)
    sizes = ["small"] if arguments.quick else arguments.sizes
    rounds = 1 if arguments.quick else arguments.rounds
    check_gate(SIZES["small"], arguments.device)
    print("gate: loss and gradients equal those of the released modules", flush=True)
    peak = matrix_peak(DTYPES[arguments.dtype], arguments.device) if on_gpu else None
    columns = (
        "| size | batch | ours, pictures/s | released, pictures/s | ours / released | TFLOP/s | of the matrix peak |"
    )
    rows = [columns, "|---|---|---|---|---|---|---|"]
    for size in sizes:
        rows.append(measure(size, arguments.batch or (8 if on_gpu else 1), arguments, rounds, peak))
        print(rows[-1], flush=True)
    title = f"dVAE, forward and backward, {arguments.dtype}, {torch.device(arguments.device).type}"
    text = "\n".join([title, "", *rows, "", f"{describe_machine()}; medians of {rounds} interleaved rounds.", ""])
    print(text)
    if not arguments.quick:
        path = results_path(f"dvae-throughput-{arguments.dtype}-{torch.device(arguments.device).type}")
        path.write_text(text)
        print(path)


def measure(size: str, B: int, arguments: argparse.Namespace, rounds: int, peak: float | None) -> str:
    """A row of the table."""
    config, device, dtype = SIZES[size], arguments.device, DTYPES[arguments.dtype]
    dvae, released = build(config, device, half=dtype != torch.float32)
    images = draw_images(B, config, device)
    steps = {"ours": train_ours(dvae, images, dtype), "released": train_released(released, images)}
    seconds = interleave(steps, rounds)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "released"))
    rate = flops_per_step(config, B) / ours
    share = "" if peak is None else f"{rate / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"
    ratio = median_ratio(seconds["released"], seconds["ours"])
    return f"| {size} | {B} | {B / ours:.3g} | {B / theirs:.3g} | {ratio:.3f} | {rate / 1e12:.3g} | {share} |"


def build(config: DVAEConfig, device: str, *, half: bool) -> tuple[DVAE, nn.ModuleList]:
    """Our model, and the released encoder and decoder on the same weights."""
    torch.manual_seed(0)
    dvae = DVAE(config).to(device)
    sizes = {"n_hid": config.n_hid, "n_blk_per_group": config.n_blk_per_group, "vocab_size": config.vocab_size}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=config.n_init, **sizes)
    encoder.load_state_dict(dvae.encoder.state_dict(), assign=True)
    decoder.load_state_dict(dvae.decoder.state_dict(), assign=True)
    released = nn.ModuleList([encoder, decoder])
    if not half:
        for module in released.modules():
            if hasattr(module, "use_float16"):
                module.use_float16 = False  # on a GPU it would otherwise go on in float16
    return dvae, released


def draw_images(B: int, config: DVAEConfig, device: str) -> Tensor:
    """Pictures as training has them: uint8 [B, 3, S, S], channels last in memory."""
    shape = (B, config.image_size, config.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images.to(device).permute(0, 3, 1, 2)


def train_ours(dvae: DVAE, images: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        dvae.zero_grad(set_to_none=True)
        in_16_bit = dtype != torch.float32
        context = torch.autocast(images.device.type, dtype) if in_16_bit else contextlib.nullcontext()
        with context:
            loss = dvae(images, TEMPERATURE, KL_WEIGHT)["loss"]
        loss.backward()
        dvae.zero_grad(set_to_none=True)

    return step


def train_released(released: nn.ModuleList, images: Tensor) -> Callable[[], None]:
    # A plain loop has its pictures in rows, as PyTorch's own ways of loading give them.
    images = images.contiguous()

    def step() -> None:
        loss = plain_loss(released, images, lambda logits: -torch.log(-torch.log(torch.rand_like(logits))))
        loss.backward()
        released.zero_grad(set_to_none=True)

    return step


def plain_loss(released: nn.ModuleList, images: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """The paper's loss around the released modules, as the formulas stand (sections 1 and 2.1, Appendix A.3)."""
    encoder, decoder = released
    x = dall_e.map_pixels(images.float() / 255)
    logits = encoder(x)
    relaxed = torch.softmax((logits + noise(logits)) / TEMPERATURE, dim=1)
    mu, log_b = decoder(relaxed).float().chunk(2, dim=1)
    b = torch.exp(log_b)
    log_density = -(torch.logit(x) - mu).abs() / b - torch.log(2 * b * x * (1 - x))
    log_q = torch.log_softmax(logits, dim=1)
    kl = (torch.exp(log_q) * (log_q + math.log(logits.shape[1]))).sum()
    return (-log_density.sum() + KL_WEIGHT * kl) / images.numel()


def check_gate(config: DVAEConfig, device: str) -> None:
    """Ends the program unless loss and gradients of both agree in float32 on the same noise."""
    dvae, released = build(config, device, half=False)
    images = draw_images(2, config, device)

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(1)

    # Noise is drawn in the order of memory: the layout of our logits.
    layout = torch.contiguous_format if images.device.type == "cpu" else torch.channels_last
    ours = dvae(images, TEMPERATURE, KL_WEIGHT, generator())["loss"]
    theirs = plain_loss(
        released, images.contiguous(), lambda logits: gumbel_noise(logits.to(memory_format=layout), generator())
    )
    # All gradients as one vector: a ReLU whose input is a rounding away from 0 may open in one model alone.
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss, model in ((ours, dvae), (theirs, released))
    ]
    pairs = ((ours.detach(), theirs.detach()), flat)
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if not worst < GATE_ERROR:
        raise SystemExit(f"red gate: our step differs from the release's by {worst:.1e}; no speed is shown")


def flops_per_step(config: DVAEConfig, B: int) -> float:
    """Multiplications and additions of the convolutions, forward and backward, counted on tensors without data."""
    with torch.device("meta"):
        dvae, images = DVAE(config), torch.empty(B, 3, config.image_size, config.image_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        dvae(images, TEMPERATURE, KL_WEIGHT)["loss"].backward()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
