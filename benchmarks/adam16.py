"""The claim: AdamW with 16-bit moments keeps 4 bytes a parameter for both, and on a GPU is as fast as torch's fused.

    python benchmarks/adam16.py [--millions N] [--device cuda] [--threads 1] [--quick]

Step times of `dalle_ds.training.optimizer.CompactAdamW`, with float32 weights and with 16-bit weights and no master
copy (gradients in float32 all the same, as in training), against torch's AdamW (foreach and fused, float32) on as many
parameters; medians over rounds that time every contender once, and bytes a parameter summed over storages. No speed is
printed unless the weights move as torch's do. Writes a dated table to benchmarks/results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from parts.measuring import describe_machine, interleave, median_ratio, results_path
from torch import Tensor, nn

from dalle_ds.training.optimizer import CompactAdamW

SETTINGS = {"lr": 4.5e-4, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2}
FOREACH, FUSED = "torch AdamW, foreach", "torch AdamW, fused"
TARGET = 1.0  # of the time of torch's fused AdamW, on a GPU
GRADIENT_SCALE = 1e-3
CHECK_STEPS, CHECK_SIZE = 10, 2**16
# Of the distance moved: rounding of moments of 9 and 10 bits, and of float16 weights.
CHECK_TOLERANCE = 0.05
CONTENDERS: dict[str, tuple[torch.dtype, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    FOREACH: (torch.float32, lambda p: torch.optim.AdamW(p, **SETTINGS, foreach=True)),
    FUSED: (torch.float32, lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)),
    "float32 moments": (torch.float32, lambda p: CompactAdamW(p, **SETTINGS, moment_bits=32)),
    "16-bit moments": (torch.float32, lambda p: CompactAdamW(p, **SETTINGS)),
    "16-bit moments, float16 nearest": (torch.float16, lambda p: CompactAdamW(p, **SETTINGS, rounding="nearest")),
    "16-bit moments, float16 stochastic": (torch.float16, lambda p: CompactAdamW(p, **SETTINGS)),
    "16-bit moments, float16 kahan": (torch.float16, lambda p: CompactAdamW(p, **SETTINGS, rounding="kahan")),
    "16-bit moments, bfloat16 stochastic": (torch.bfloat16, lambda p: CompactAdamW(p, **SETTINGS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, help="parameters, in millions of 2**20 (256 on a GPU, else 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="2 rounds of few parameters, and no file: a smoke run")
    arguments = parser.parse_args()
    # A GPU updates 16 in the time that it takes to start a kernel.
    arguments.millions = arguments.millions or (256 if arguments.device == "cuda" else 16)
    if arguments.quick:
        arguments.millions, arguments.rounds = 0.125, 2
    torch.set_num_threads(arguments.threads)
    check(arguments.device)
    optimizers = {name: build(name, int(arguments.millions * 2**20), arguments.device) for name in CONTENDERS}
    # On one thread of a CPU its own time, in which what else the machine does counts for less.
    clock = time.process_time if (arguments.device, arguments.threads) == ("cpu", 1) else time.perf_counter
    seconds = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, arguments.rounds, clock)
    table = write_table(optimizers, seconds, arguments)
    print(table)
    if not arguments.quick:
        path = results_path(f"adam16-{arguments.device}")
        path.write_text(table)
        print(path)


def build(name: str, n: int, device: str) -> torch.optim.Optimizer:
    """The contender over one tensor of n parameters, as ZeRO hands it, with a gradient."""
    dtype, make = CONTENDERS[name]
    generator = torch.Generator(device).manual_seed(0)
    parameter = nn.Parameter(torch.randn(n, generator=generator, device=device).to(dtype))
    parameter.grad_dtype = torch.float32  # as the engine hands gradients to 16-bit weights too
    parameter.grad = draw_gradient(n, generator, device)
    return make([parameter])


def draw_gradient(n: int, generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(n, generator=generator, device=device) * GRADIENT_SCALE


def check(device: str) -> None:
    """Ends the benchmark when a contender moves weights elsewhere than torch's float32 AdamW does."""
    moved = {}
    for name, (dtype, make) in CONTENDERS.items():
        generator = torch.Generator(device).manual_seed(1)
        # Small weights, so that float16 and bfloat16 have room for steps of the learning rate.
        begin = torch.randn(CHECK_SIZE, generator=generator, device=device).mul(2**-8).bfloat16().to(dtype)
        parameter = nn.Parameter(begin.clone())
        parameter.grad_dtype = torch.float32
        optimizer = make([parameter])
        for _ in range(CHECK_STEPS):
            parameter.grad = draw_gradient(CHECK_SIZE, generator, device)
            optimizer.step()
        moved[name] = parameter.detach().float() - begin.float()
    truth = moved[FOREACH]
    for name, distance in moved.items():
        error = ((distance - truth).norm() / truth.norm()).item()
        if not error <= CHECK_TOLERANCE:
            raise SystemExit(f"{name}: weights are off by {error:.1%} of the way: no speeds")


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Bytes a parameter of the weights, and of all that the optimizer keeps beside them."""
    [parameter] = optimizer.param_groups[0]["params"]
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim() > 0]
    sizes = [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in ([parameter], kept)]
    return sizes[0] / parameter.numel(), sizes[1] / parameter.numel()


def write_table(
    optimizers: dict[str, torch.optim.Optimizer], seconds: dict[str, list[float]], arguments: argparse.Namespace
) -> str:
    n = arguments.millions * 2**20
    rows = []
    for name, optimizer in optimizers.items():
        weights, state = state_bytes(optimizer)
        median = statistics.median(seconds[name])
        ratios = [median_ratio(seconds[name], seconds[other]) for other in (FOREACH, FUSED)]
        numbers = f"{median * 1e3:.2f} | {median / n * 1e9:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
        rows.append(f"| {name} | {weights:.0f} | {state:.0f} | {numbers} |")
    return "\n".join(
        [
            f"# AdamW with 16-bit moments, {arguments.device}",
            "",
            f"{describe_machine()}. {arguments.millions:g} x 2^20 parameters in one tensor; threads: "
            f"{arguments.threads}.",
            "",
            f"Medians of {arguments.rounds} rounds; ratios of time, so that less is better. Target on a GPU: at most "
            f"{TARGET:.1f} of fused.",
            "",
            "| optimizer | bytes a weight | state bytes a parameter | ms | ns a parameter | of foreach | of fused |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
