"""The claim: on a CPU, sparse attention beats dense attention, masked and causal, and keeps no more memory.

    python benchmarks/attention_cpu.py [--threads 2] [--rounds 15] [--clock wall] [--quick]

256 text states and a 32 x 32 grid, 8 heads of 64, batch 1, forward and backward, float32 and bfloat16. Dense attention
is torch's own: with the same boolean mask, and causal without a mask. All three run in turn, round by round; ratios are
medians over rounds. Memory is what autograd keeps for the backward, with the tables that ours shares between layers. No
speed is shown unless output and gradients equal the reference in float64. --clock cpu counts the seconds of all
threads of this process, for a machine that others use too (with --threads 1). --quick tries a small stream.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from parts.measuring import describe_machine, interleave, median_ratio, results_path
from torch import Tensor

from dalle_kernels.attention import Mask, allowed, attention, cpu
from dalle_kernels.attention.reference import attention_reference

B, H, D = 1, 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# The least times faster than dense attention with the same mask, float32, forward and backward.
TARGETS = {"row": 2.5, "column": 2.5, "conv": 2.2}
# Relative errors (2-norm) above which no speed is shown: roundings of sums, and of 16-bit inputs and results.
GATES = {"float32": 1e-6, "bfloat16": 6e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--quick", action="store_true", help="a small stream and three rounds, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text_len, grid, rounds = (64, 16, 3) if arguments.quick else (256, 32, arguments.rounds)
    lines = [
        f"# Sparse attention on a CPU, {text_len} text and {grid} x {grid} image states",
        "",
        f"Machine: {describe_machine()}.",
        "",
        f"Batch {B}, {H} heads of {D}; {rounds} rounds, medians, {arguments.clock} time; milliseconds and MB.",
        "",
        "| mask, dtype | pass | ours | dense, same mask | dense, causal | over masked | over causal |",
        "|---|---|---|---|---|---|---|",
    ]
    memory = ["", "| mask, dtype | ours keeps | dense, same mask | dense, causal |", "|---|---|---|---|"]
    missed: list[str] = []
    for dtype in DTYPES:
        for kind in TARGETS:
            mask = Mask(kind=kind, text_len=text_len, grid_height=grid, grid_width=grid)
            check_gate(mask, dtype)
            rows, kept, misses = measure(mask, dtype, rounds, CLOCKS[arguments.clock])
            lines += rows
            memory += kept
            missed += misses
    targets = ", ".join(f"{kind} {target}" for kind, target in TARGETS.items())
    lines += [*memory, "", f"Targets, float32, forward and backward over masked: {targets}; over causal 1.", ""]
    lines += [f"Missed: {'; '.join(missed) or 'none'}.", ""]
    table = "\n".join(lines)
    print(table)
    if not arguments.quick:
        results_path("attention-cpu").write_text(table)


def draw(mask: Mask, dtype: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, as projections make them: [B, H, N, D], in memory as [B, N, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (B, mask.seq_len, H, D)
    return [torch.randn(shape, generator=generator).to(DTYPES[dtype]).transpose(1, 2) for _ in range(4)]


def check_gate(mask: Mask, dtype: str) -> None:
    """Ends the program unless output and gradients equal the reference."""
    *inputs, do = draw(mask, dtype)
    results = []
    for function, precision in ((attention, DTYPES[dtype]), (attention_reference, torch.float64)):
        leaves = [x.to(precision).requires_grad_() for x in inputs]
        out = function(*leaves, mask)
        results.append([out, *torch.autograd.grad(out, leaves, do.to(precision))])
    errors = ((a.detach().double() - b.detach()).norm() / b.detach().norm() for a, b in zip(*results, strict=True))
    worst = max(float(error) for error in errors)
    if not worst < GATES[dtype]:
        raise SystemExit(f"red gate: {mask.kind}, {dtype} is off by {worst:.1e}; no speed is shown")


def measure(mask: Mask, dtype: str, rounds: int, clock: Callable[[], float]) -> tuple[list[str], list[str], list[str]]:
    """The rows of both tables for one mask, and what it missed."""
    *inputs, do = draw(mask, dtype)
    q, k, v = (x.requires_grad_() for x in inputs)
    seen = allowed(mask)
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attention(q, k, v, mask),
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen),
        "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    both = {name: differentiated(forward, [q, k, v], do) for name, forward in forwards.items()}
    rows, misses = [], []
    for label, runs in (("forward", {name: inferred(run) for name, run in forwards.items()}), ("both", both)):
        seconds = interleave(runs, rounds, clock)
        times = " | ".join(f"{1e3 * statistics.median(seconds[name]):.1f}" for name in runs)
        ratios = [median_ratio(seconds[name], seconds["ours"]) for name in ("masked", "causal")]
        rows.append(f"| {mask.kind}, {dtype} | {label} | {times} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
    if dtype == "float32" and ratios[0] < TARGETS[mask.kind]:
        misses.append(f"{mask.kind}, {dtype}, over masked")
    if ratios[1] < 1:
        misses.append(f"{mask.kind}, {dtype}, over causal")
    kept = {name: bytes_kept(forward) for name, forward in forwards.items()}
    kept["ours"] += table_bytes(mask, DTYPES[dtype])
    if kept["ours"] > kept["masked"]:
        misses.append(f"{mask.kind}, {dtype}, memory")
    memory = f"| {mask.kind}, {dtype} | {' | '.join(f'{kept[name] / 1e6:.1f}' for name in forwards)} |"
    return rows, [memory], misses


def inferred(forward: Callable[[], Tensor]) -> Callable[[], object]:
    return torch.no_grad()(forward)


def differentiated(forward: Callable[[], Tensor], leaves: list[Tensor], do: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), leaves, do)


def bytes_kept(forward: Callable[[], Tensor]) -> int:
    """Bytes of all memory that autograd keeps for the backward, each block of memory once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(kept.values())


def table_bytes(mask: Mask, dtype: torch.dtype) -> int:
    """Bytes of the mask of the windows, which all layers share."""
    if not cpu.is_local(mask):
        return 0
    _, bias = cpu._window_rule(mask, torch.promote_types(dtype, torch.float32))
    return 0 if bias is None else bias.untyped_storage().nbytes()


if __name__ == "__main__":
    main()
