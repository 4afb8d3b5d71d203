"""A whole training step of the prior: forward, backward and AdamW, with sparse attention against dense attention.

    python benchmarks/prior_step.py [--preset small] [--n_layer 4] [--batch 1] [--dtype fp32] [--device cpu]

Before it prints a speed it checks that loss and gradients of the sparse paths equal those of the dense reference in
float32; a red gate ends it. Prints tokens a second and, on a GPU, the fraction of the machine's matrix peak (measured
by a large product in the same dtype); writes a dated table.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from parts.measuring import DTYPES, describe_machine, interleave, matrix_peak, median_ratio, results_path
from torch import Tensor

from dalle_ds.config import PriorConfig
from dalle_ds.models import attention as attention_module
from dalle_ds.models.prior import Prior
from dalle_ds.presets import PRESETS
from dalle_kernels.attention import allowed

# Sums of float32 in another order, through the layers and back.
GATE_ERROR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=PRESETS, help="sizes (default: small)")
    parser.add_argument("--n_layer", type=int, help="layers, where the preset has too many for this machine")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written: a smoke test")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = PRESETS[arguments.preset].prior.model
    if arguments.n_layer:
        config = dataclasses.replace(config, n_layer=arguments.n_layer)
    if arguments.quick:
        arguments.rounds = 1
        config = dataclasses.replace(
            config, n_layer=3, n_head=2, head_dim=16, grid_size=8, text_len=20, text_vocab_size=64, image_vocab_size=64
        )
    check_gate(config, arguments.device)
    print("gate: loss and gradients equal the dense reference", flush=True)
    dtype = DTYPES[arguments.dtype]
    torch.manual_seed(0)
    prior = Prior(config, checkpoint_activations=arguments.checkpoint).to(arguments.device, dtype)
    batch = make_batch(config, arguments.batch, arguments.device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4, fused=True)
    sparse = functools.partial(train_step, prior, optimizer, batch)
    seconds = interleave({"sparse": sparse, "dense": with_dense(sparse)}, arguments.rounds)
    n_tokens = arguments.batch * config.seq_len
    step = statistics.median(seconds["sparse"])
    peak = matrix_peak(dtype, arguments.device)
    rows = [
        ("parameters", f"{sum(p.numel() for p in prior.parameters()):,}"),
        ("step, sparse attention", f"{1e3 * step:.1f} ms, {n_tokens / step:,.0f} tokens/s"),
        ("step, dense attention under the same boolean masks", f"{1e3 * statistics.median(seconds['dense']):.1f} ms"),
        ("dense / sparse", f"{median_ratio(seconds['dense'], seconds['sparse']):.2f}"),
        ("matrix peak of this machine, measured", f"{peak / 1e12:.2f} TFLOP/s"),
        ("model FLOP utilisation of the sparse step", f"{flops_per_step(config, arguments.batch) / step / peak:.1%}"),
    ]
    title = (
        f"{arguments.preset}, {config.n_layer} layers of width {config.dim}, batch {arguments.batch}, {arguments.dtype}"
    )
    table = "\n".join(["| prior, training step | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    text = f"{title}\n\n{table}\n\n{describe_machine()}; medians of {arguments.rounds} interleaved rounds.\n"
    print(text)
    if not arguments.quick:
        path = results_path(f"prior-step-{arguments.preset}-{arguments.dtype}-{torch.device(arguments.device).type}")
        path.write_text(text)
        print(path)


def make_batch(config: PriorConfig, B: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab_size, (B, config.text_len - 1), generator=generator)
    lengths = torch.full((B,), config.text_len // 4)
    image = torch.randint(config.image_vocab_size, (B, config.image_len), generator=generator)
    return text.to(device), lengths.to(device), image.to(device)


def train_step(prior: Prior, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
    optimizer.zero_grad(set_to_none=True)
    prior(*batch)["loss"].backward()
    optimizer.step()


@contextmanager
def dense_attention() -> Iterator[None]:
    """Within it the model's attention is the dense reference."""
    chosen = attention_module.attention
    attention_module.attention = functools.partial(chosen, implementation="dense")
    try:
        yield
    finally:
        attention_module.attention = chosen


def with_dense(run: Callable[[], None]) -> Callable[[], None]:
    def run_dense() -> None:
        with dense_attention():
            run()

    return run_dense


def check_gate(config: PriorConfig, device: str) -> None:
    """Ends the program unless loss and gradients of every path equal the dense reference's, in float32."""
    small = dataclasses.replace(config, n_layer=4, n_head=2, text_vocab_size=64, image_vocab_size=64)
    torch.manual_seed(0)
    prior = Prior(small).to(device)
    for head in (prior.text_head, prior.image_head):
        torch.nn.init.normal_(head.unembed.weight, std=0.1)
    batch = make_batch(small, 1, device)

    def outputs() -> list[Tensor]:
        loss = prior(*batch)["loss"]
        # All gradients as one vector: that of the keys' bias is 0, and what rounding leaves of it means nothing.
        return [loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(prior.parameters()))])]

    sparse = outputs()
    with dense_attention():
        dense = outputs()
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(sparse, dense, strict=True))
    if not worst < GATE_ERROR:
        raise SystemExit(
            f"red gate: the sparse step differs from the dense reference by {worst:.1e}; no speed is shown"
        )


def flops_per_step(config: PriorConfig, B: int) -> float:
    """Multiplications and additions of matrices that the model needs, forward and backward, nothing recomputed."""
    prior_layers = 12 * config.dim**2 * config.n_layer * config.seq_len
    heads = config.dim * (config.text_vocab_size * config.text_len // 4 + config.image_vocab_size * config.image_len)
    with torch.device("meta"):
        masks = [layer.attention.mask for layer in Prior(config).layers]
    pairs = {mask: int(allowed(mask).sum()) for mask in set(masks)}
    attention = sum(2 * pairs[mask] for mask in masks) * config.dim
    return 6.0 * B * (prior_layers + heads + attention)


if __name__ == "__main__":
    main()
