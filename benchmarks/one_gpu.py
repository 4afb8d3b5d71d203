"""The claim: the whole 12b preset trains on one GPU of 141 GB, with 16-bit moments and no float32 copy of its matrices.

    python benchmarks/one_gpu.py [--preset 12b] [--n_layer 64] [--micro_batch 1] [--steps 6]

Real updates through `ds_configs/one_gpu_fp16.json`, on random tokens: fp16 matrices, a gradient scale a resblock,
activation checkpointing, stochastic rounding. Prints what the planner expects of the same run beside what was measured:
bytes held, peak memory, tokens a second, model FLOP utilisation. Writes a dated table where there is a GPU.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from parts.measuring import ROOT, describe_machine, matrix_peak, results_path
from torch import Tensor

from dalle_ds.config import PriorConfig
from dalle_ds.models.gradient_scaling import resblock_index
from dalle_ds.models.prior import Prior
from dalle_ds.planner import memory_of, training_flops
from dalle_ds.planner.deepspeed_json import way_of
from dalle_ds.planner.ways import Layout
from dalle_ds.presets import PRESETS
from dalle_ds.training.construction import build_engine
from dalle_ds.training.distributed import process_group
from dalle_ds.training.engine import Engine, backward, gradient_norm

MB, GB = 1e6, 1e9
CONFIG = ROOT / "ds_configs" / "one_gpu_fp16.json"
QUICK = {"n_layer": 2, "n_head": 2, "head_dim": 16, "grid_size": 4, "text_len": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="12b", choices=PRESETS)
    parser.add_argument("--n_layer", type=int, help="layers, where the preset has too many for this machine")
    parser.add_argument("--micro_batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches an update")
    parser.add_argument("--steps", type=int, default=6, help="updates, of which the first is not timed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written: a smoke test")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.quick):
        print("torch finds no GPU here, and this benchmark measures one: nothing done (--quick runs tiny sizes)")
        return
    config = PRESETS[arguments.preset].prior.model
    if arguments.n_layer:
        config = dataclasses.replace(config, n_layer=arguments.n_layer)
    if arguments.quick:
        config = dataclasses.replace(config, text_vocab_size=64, image_vocab_size=64, **QUICK)
    with process_group():
        text = measure(config, arguments)
    print(text)
    if not arguments.quick:
        path = results_path(f"one-gpu-{arguments.preset}")
        path.write_text(text)
        print(path)


def measure(config: PriorConfig, arguments: argparse.Namespace) -> str:
    settings = read_settings(CONFIG, arguments.micro_batch, arguments.accumulation)
    engine = build_engine(
        lambda precision: Prior(
            config,
            checkpoint_activations=True,
            matrix_dtype=precision.matrix_dtype,
            compute_dtype=precision.compute_dtype,
        ),
        settings,
        seed=0,
        resblock_of=resblock_index,
    )
    device = engine.device
    seconds = []
    for step in range(arguments.steps):
        began = time.perf_counter()
        losses = [
            train(engine, make_batch(config, arguments.micro_batch, device)) for _ in range(arguments.accumulation)
        ]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        print(f"step {step + 1}: loss {losses[-1]:.4f}, gradient norm {gradient_norm(engine):.3f}", flush=True)
    n_samples = arguments.micro_batch * arguments.accumulation
    step_seconds = statistics.median(seconds[1:] or seconds)
    flops = n_samples * training_flops(config).model
    peak = matrix_peak(torch.float16, device.type) if device.type == "cuda" else float("nan")
    expected = memory_of(config, way_of(settings), Layout(n_gpus=1, machine_size=1, micro_batch=arguments.micro_batch))
    most = torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else float("nan")
    rows = [
        ("parameters", f"{sum(p.ds_numel for p in engine.module.parameters()):,}"),
        ("weights, gradient buffers and moments, held", f"{held_bytes(engine) / MB:.3f} MB"),
        ("the same, by `dalle-ds plan`", f"{expected.state / MB:.3f} MB"),
        ("most memory allocated", f"{most:.4f} GB"),
        ("the same, by `dalle-ds plan`", f"{expected.total / GB:.4f} GB"),
        ("updates skipped", str(engine.skipped_steps)),
        (
            "an update",
            f"{step_seconds:.2f} s of {n_samples} samples, {n_samples * config.seq_len / step_seconds:,.0f} tokens/s",
        ),
        (
            "model FLOP utilisation, nothing recomputed counted",
            f"{flops / step_seconds / peak:.1%} of the measured peak",
        ),
    ]
    title = f"{arguments.preset}, {config.n_layer} layers of width {config.dim}, micro-batch {arguments.micro_batch}"
    table = "\n".join(
        ["| one GPU, ds_configs/one_gpu_fp16.json | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    )
    engine.destroy()
    return f"{title}\n\n{table}\n\n{describe_machine()}; median of {max(1, arguments.steps - 1)} updates.\n"


def read_settings(path: Path, micro_batch: int, accumulation: int) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text())
    del settings["train_batch_size"]
    return settings | {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}


def make_batch(config: PriorConfig, B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    text = torch.randint(config.text_vocab_size, (B, config.text_len - 1), device=device)
    lengths = torch.full((B,), config.text_len // 4, device=device)
    return text, lengths, torch.randint(config.image_vocab_size, (B, config.image_len), device=device)


def train(engine: Engine, batch: tuple[Tensor, ...]) -> float:
    loss = engine(*batch)["loss"]
    backward(engine, loss)
    engine.step()
    return float(loss.detach())


def held_bytes(engine: Engine) -> int:
    """Bytes of the weights as stored and updated, of the gradient buffers, and of the optimizer's state."""
    optimizer = engine.optimizer
    flats = [*optimizer.fp16_partitioned_groups_flat, *optimizer.fp32_partitioned_groups_flat]
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*flats, *states] if isinstance(tensor, Tensor)}
    return sum(tensors.values()) + int(engine.extras.path.compressor.nbytes)


if __name__ == "__main__":
    main()
