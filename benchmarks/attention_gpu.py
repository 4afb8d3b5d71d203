"""The claim: on a GPU, sparse attention beats the best dense causal kernel that torch has, and FlexAttention.

    python benchmarks/attention_gpu.py [--grid 32] [--quick]

At 256 text states and a grid of 32, forward and backward each: row and column at least 1.7 times as fast as the faster
of flash and cuDNN attention (dense, causal), conv 1.4 times, and all ahead of FlexAttention with the same mask. Times
are medians of CUDA events; each round times every contender once. No speed is printed unless values and gradients
equal the reference. Writes a dated table to benchmarks/results/.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from parts.measuring import describe_machine, results_path
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle_kernels.attention import Mask, attention
from dalle_kernels.attention.masks import allowed
from dalle_kernels.attention.reference import attention_reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative L2 error: four units in the last place, as in tests/test_attention_kernels.py.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = ("row", "column", "conv")
TARGETS = {"row": 1.7, "column": 1.7, "conv": 1.4}
DENSE = {"flash, dense causal": SDPBackend.FLASH_ATTENTION, "cuDNN, dense causal": SDPBackend.CUDNN_ATTENTION}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Times = dict[str, tuple[float, float]]  # contender -> milliseconds forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=62)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--text_len", type=int, default=256)
    parser.add_argument("--grid", type=int, default=32, help="side of the grid of image states")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="3 rounds of a small batch, and no file: a smoke run")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU here, and this benchmark measures one: nothing done")
        return
    if arguments.quick:
        arguments.batch, arguments.heads, arguments.rounds = 1, 4, 3
    torch.set_num_threads(1)
    dtype = DTYPES[arguments.dtype]
    masks = [
        Mask(kind=kind, text_len=arguments.text_len, grid_height=arguments.grid, grid_width=arguments.grid)
        for kind in KINDS
    ]
    contenders = dense_contenders()
    for mask in masks:
        check(mask, dtype, arguments.head_dim)
        contenders |= sparse_contenders(mask)
    shape = (arguments.batch, arguments.heads, masks[0].seq_len, arguments.head_dim)
    table = write_table(measure(contenders, shape, dtype, arguments.rounds), arguments)
    print(table)
    if not arguments.quick:
        path = results_path(f"attention-gpu-{arguments.grid}")
        path.write_text(table)
        print(path)


def dense_contenders() -> dict[str, Function]:
    """Attention to all earlier states by each kernel of torch."""

    def run(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {name: lambda q, k, v, backend=backend: run(backend, q, k, v) for name, backend in DENSE.items()}


def sparse_contenders(mask: Mask) -> dict[str, Function]:
    """The mask by our operator and by FlexAttention."""
    n = mask.seq_len
    blocks = create_block_mask(lambda b, h, query, key: mask.sees(query, key), None, None, n, n, device="cuda")
    # One compiled object a mask, and the whole graph: a fall back to eager would be timed as FlexAttention.
    flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return {
        f"ours, {mask.kind}": lambda q, k, v: attention(q, k, v, mask),
        f"FlexAttention, {mask.kind}": lambda q, k, v: flex(q, k, v, block_mask=blocks),
    }


def check(mask: Mask, dtype: torch.dtype, head_dim: int) -> None:
    """Ends the benchmark when our values or gradients are not those of the reference."""
    shape = (1, 2, mask.seq_len, head_dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = attention(*inputs, mask)
    actual = [out, *torch.autograd.grad(out, inputs, grad)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = attention_reference(doubles[0], doubles[1], doubles[2], mask)
    truth = [out, *torch.autograd.grad(out, doubles, grad.double())]
    for name, a, b in zip(("o", "dq", "dk", "dv"), actual, truth, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{mask.kind}: {name} is off by {error:.1e} (limit {TOLERANCE[dtype]:.1e}): no speeds")


def measure(contenders: dict[str, Function], shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> Times:
    # Memory as the model has it: [B, N, H, D].
    B, H, N, D = shape
    q, k, v = (torch.randn(B, N, H, D, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(B, N, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    forward: dict[str, list[float]] = {name: [] for name in contenders}
    backward: dict[str, list[float]] = {name: [] for name in contenders}
    warm_up = 3
    for i in range(warm_up + rounds):
        for name, function in contenders.items():
            out, milliseconds = timed(lambda function=function: function(q, k, v))
            _, milliseconds_back = timed(lambda out=out: torch.autograd.grad(out, (q, k, v), grad))
            del out
            if i >= warm_up:
                forward[name].append(milliseconds)
                backward[name].append(milliseconds_back)
    return {name: (statistics.median(forward[name]), statistics.median(backward[name])) for name in contenders}


def timed(function):  # type: ignore[no-untyped-def]
    """What the function returns, and its milliseconds on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The queue is kept busy until the launch is through, so that its time on the CPU does not count.
    torch.cuda._sleep(LAUNCH_CYCLES)
    start.record()
    result = function()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def write_table(times: Times, arguments: argparse.Namespace) -> str:
    best = [min(times[name][way] for name in DENSE) for way in (0, 1)]
    rows = []
    for name, (forward, backward) in times.items():
        kind = name.removeprefix("ours, ")
        target = f"{TARGETS[kind]:.1f}" if kind in TARGETS else ""
        ratios = best[0] / forward, best[1] / backward
        rows.append(f"| {name} | {forward:.3f} | {ratios[0]:.2f} | {backward:.3f} | {ratios[1]:.2f} | {target} |")
    mask = Mask(kind="row", text_len=arguments.text_len, grid_height=arguments.grid, grid_width=arguments.grid)
    pairs = {kind: int(allowed(Mask(**{**vars(mask), "kind": kind})).sum()) for kind in (*KINDS, "dense")}
    limits = ", ".join(f"{kind} {pairs['dense'] / pairs[kind]:.2f}" for kind in KINDS)
    return "\n".join(
        [
            f"# Attention on a GPU, grid {arguments.grid}",
            "",
            f"{describe_machine()}. Batch {arguments.batch}, {arguments.heads} heads of {arguments.head_dim}, "
            f"{arguments.text_len} text and {arguments.grid} x {arguments.grid} image states, {arguments.dtype}.",
            "",
            f"Medians of {arguments.rounds} rounds in milliseconds; ratios to the fastest dense causal kernel. By the "
            f"pairs computed alone they could reach: {limits}.",
            "",
            "| kernel | forward | ratio | backward | ratio | target |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


LAUNCH_CYCLES = 1_000_000  # some half a millisecond of a GPU's clock

if __name__ == "__main__":
    main()
