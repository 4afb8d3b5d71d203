"""Say on paper what a run of the prior takes: memory, bytes sent and time, for every way to shard it.

    dalle-ds plan --preset 12b --gpus 1024 --gpu v100-16gb
    dalle-ds plan --preset 2.8b --gpus 64 --gpu a100-40gb --deepspeed_config ds_configs/zero3_bf16.json

With a DeepSpeed JSON the run that it describes is shown first, beside the other ways. GB are 10^9 bytes. The model of
time is stated in dalle_ds/planner/step_time.py; nothing here was measured.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.config import PriorConfig, require
from dalle_ds.flags import add_flags, apply_flags
from dalle_ds.presets import find_preset

if TYPE_CHECKING:
    from dalle_ds.planner.deepspeed_json import JsonSettings
    from dalle_ds.planner.plan import Option, Plan, PlanConfig

# Kind of memory -> what a row says of it.
MEMORY_ROWS = {
    "weights": "weights",
    "master_weights": "float32 copies of weights",
    "gradients": "gradients",
    "error_buffers": "PowerSGD's error buffers, which gradients are added up in",
    "moments": "Adam's moments",
    "starts": "PowerSGD's Q0",
    "activations": "activations kept for the backward pass",
    "temporary": "what comes and goes, at its peak",
}
# Bytes below which a row would say nothing.
SHOWN = 5_000_000
TIME_ROWS = {
    "forward": "forward pass, heads with their gradients",
    "backward": "backward pass",
    "exposed": "communication that does not hide behind them",
    "compression": "PowerSGD's products",
    "optimizer": "optimizer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dalle_ds.planner.plan import PlanConfig

    parser.add_argument("--preset", default="12b", help="named sizes that --model.* flags change (default: 12b)")
    parser.add_argument("--deepspeed_config", metavar="FILE", type=Path, help="a DeepSpeed JSON, shown first")
    parser.add_argument("--way", default="", help="the way to show in detail, by its name in the first table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--table1", action="store_true", help="the paper's Table 1, and nothing else")
    add_flags(parser, PlanConfig())
    add_flags(parser, PriorConfig(), "model.")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.planner.deepspeed_json import read_deepspeed_json
    from dalle_ds.planner.plan import PlanConfig, make_plan, table_1

    if args.table1:
        rows = table_1()
        print(json.dumps(rows, indent=2)) if args.json else show_table_1(rows)
        return
    model = apply_flags(find_preset(args.preset).prior.model, args, "model.")
    settings = read_deepspeed_json(args.deepspeed_config) if args.deepspeed_config else None
    config = apply_flags(PlanConfig(), args) if settings is None else _with_json(args, settings)
    plan = make_plan(model, config, settings, args.way)
    if args.json:
        print(json.dumps(as_dict(args.preset, plan), indent=2))
    else:
        show(args.preset, plan)


def _with_json(args: argparse.Namespace, settings: "JsonSettings") -> "PlanConfig":
    """The config with what the JSON says, unless a flag says otherwise."""
    from dalle_ds.planner.plan import PlanConfig

    given = vars(args)
    size = given.get("gpus_per_machine", settings.machine_size)
    require(
        settings.machine_size in (0, size),
        f"--gpus_per_machine {size}: {settings.name} shards over machines of {settings.machine_size}; give one of them",
    )
    found = {
        "micro_batch": settings.micro_batch,
        "batch": settings.batch,
        "gpus_per_machine": settings.machine_size,
        "matrix_rank": settings.matrix_rank,
        "wire": settings.wire,
    }
    # Together: a micro-batch that a flag gives may not go with the GPUs of the default.
    fields: dict[str, Any] = {name: value for name, value in found.items() if value}
    fields |= {field.name: given[field.name] for field in dataclasses.fields(PlanConfig) if field.name in given}
    return PlanConfig(**fields)


def as_dict(preset: str, plan: "Plan") -> dict[str, Any]:
    """All figures of a plan, for programs: bytes, seconds, operations."""
    from dalle_ds.planner import compression_rate, count_parameters, training_flops

    counts, flops = count_parameters(plan.model), training_flops(plan.model)
    return {
        "preset": preset,
        "model": dataclasses.asdict(plan.model),
        "config": dataclasses.asdict(plan.config),
        "hardware": dataclasses.asdict(plan.config.hardware),
        "parameters": {**dataclasses.asdict(counts), "total": counts.total},
        "flops_of_a_sample": {"model": flops.model, "recomputed": flops.layers_forward},
        "matrix_rank": plan.matrix_rank,
        "compression_rate": compression_rate(plan.model, plan.config.machine_size, plan.matrix_rank),
        "batch": plan.batch,
        "micro_steps": plan.n_micro_steps,
        "ways": [_option_dict(option) for option in plan.options],
        "recommended": plan.recommended.name if plan.recommended else None,
        "reason": plan.reason,
        "notes": plan.notes,
        "shown": plan.shown.name,
        "samples_per_second": plan.samples_per_second,
        "tokens_per_second": plan.samples_per_second * plan.model.seq_len,
        "mfu": plan.mfu,
        "paper_run_days": plan.paper_run_days,
    }


def _option_dict(option: "Option") -> dict[str, Any]:
    from dalle_ds.planner.memory import as_dict as memory_dict

    time = option.time
    return {
        **dataclasses.asdict(option),
        "memory": memory_dict(option.memory),
        "inside_bytes": option.inside_bytes,
        "between_bytes": option.between_bytes,
        "time": {
            **dataclasses.asdict(time),
            "total": time.total,
            "one_after_the_other": time.one_after_the_other,
        },
    }


def show(preset: str, plan: "Plan") -> None:
    """Prints what a person wants to know, the answer first."""
    from dalle_ds.planner import count_parameters

    config, hardware, counts = plan.config, plan.config.hardware, count_parameters(plan.model)
    n_machines = config.gpus // config.machine_size
    machines = f" ({_count(n_machines, 'machine')} of {config.machine_size})" if config.gpus > 1 else ""
    print(f"{preset}: {counts.total:,} parameters on {_count(config.gpus, 'GPU')}{machines}, {config.gpu}")
    print(
        f"  {counts.matrices:,} in matrices of resblocks, {counts.vectors:,} gains and biases, {counts.tables:,} in "
        "embeddings, unembeddings, positions"
    )
    print(
        f"  a GPU: {hardware.memory / 1e9:.1f} GB of memory, {config.usable_memory / 1e9:.1f} usable; "
        f"{hardware.flops / 1e12:,.0f} TFLOP/s; {hardware.machine_bandwidth / 1e9:,.4g} GB/s in a machine, "
        f"{hardware.network_bandwidth / 1e9:,.4g} between"
    )
    print(f"  a step: {plan.batch:,} samples, on each GPU {plan.n_micro_steps:,} x {config.micro_batch}\n")
    _show_ways(plan)
    for note in plan.notes:
        print(f"note: {note}")
    _show_payloads(plan)
    print(f"best: {plan.reason}\n" if plan.recommended else f"{plan.reason}\n")
    _show_details(plan)


def _show_ways(plan: "Plan") -> None:
    titles = ("way", "memory", "fits", "inside", "between", "step", "at most")
    rows = []
    for option in plan.options:
        memory, time = option.memory.total, option.time
        sent = f"{option.inside_bytes / 1e9:,.2f}", f"{option.between_bytes / 1e9:,.2f}"
        fits = "no" if not option.fits else "recompute" if option.layout.recompute else "yes"
        times = f"{time.total:.2f}", f"{time.one_after_the_other:.2f}"
        rows.append((option.name, f"{memory / 1e9:,.1f}", fits, *sent, *times))
    _print_table("ways to shard: a GPU's memory and bytes sent in a step in GB, the step in s", titles, rows)
    print("inside and between machines; recompute: fits if activations are; at most: if no communication hides")


def _show_details(plan: "Plan") -> None:
    """Memory by kind, what is sent, and the step of the way that is shown."""
    from dalle_ds.planner.memory import as_dict as memory_dict

    option, config = plan.shown, plan.config
    kinds = memory_dict(option.memory)
    rows = [(text, f"{kinds[kind] / 1e9:.2f}") for kind, text in MEMORY_ROWS.items() if kinds[kind] >= SHOWN]
    rows.append(("in all", f"{option.memory.total / 1e9:.2f}"))
    _print_table(f"{option.name}: memory of a GPU", ("what", "GB"), rows)
    _show_temporary(plan)
    print(f"iterate average, in the memory of a machine: {option.memory.host_average / 1e9:.1f} GB\n")
    if option.exchanges:
        sent = [
            (
                one.what,
                f"{one.times:,}",
                f"{one.times * one.inside / 1e9:,.2f}",
                f"{one.times * one.between / 1e9:,.2f}",
            )
            for one in option.exchanges
        ]
        titles = ("what", "times", "inside", "between")
        _print_table(f"{option.name}: GB that a GPU sends in a step", titles, sent)
    seconds = dataclasses.asdict(option.time)
    rows = [(text, f"{seconds[kind]:.3f}") for kind, text in TIME_ROWS.items() if seconds[kind]]
    rows.append(("in all", f"{option.time.total:.3f}"))
    _print_table(f"{option.name}: seconds of a step", ("what", "s"), rows)
    rate = plan.samples_per_second
    print(
        f"{rate:,.1f} images/s, {rate * plan.model.seq_len:,.0f} tokens/s, MFU {plan.mfu:.1%} at products that reach "
        f"{config.efficiency:.0%} of the peak"
    )
    print(f"as many samples as the paper's 430,000 updates of 1,024: {plan.paper_run_days:,.1f} days")


def _show_payloads(plan: "Plan") -> None:
    """What a GPU hands to collectives between machines under hierarchical sharding: what compressors count."""
    from dalle_ds.planner import compression_rate

    payloads = {option.way.is_compressed: option.payload for option in plan.options if option.payload is not None}
    plain, compressed = payloads.get(False), payloads.get(True)
    if plain is None:
        return
    said = f"handed to collectives between machines in a step: {plain.total:,} bytes"
    if compressed is not None:
        rate = compression_rate(plan.model, plan.config.machine_size, plan.matrix_rank)
        said += f"; {compressed.total:,} with PowerSGD, whose rank {plan.matrix_rank} saves {rate:.1%} of the matrices'"
    print(said)


def _show_temporary(plan: "Plan") -> None:
    """Activations with and without recomputation, and what comes and goes."""
    from dalle_ds.planner.memory import activation_bytes

    compute = plan.shown.way.compute_bytes
    kept, again = (activation_bytes(plan.model, plan.config.micro_batch, yes, compute) for yes in (False, True))
    print(f"activations: {kept[0] / 1e9:.2f} GB, or recomputed {again[0] / 1e9:.2f}")
    memory = plan.shown.memory
    sizes = {
        "a layer at work": memory.working_layer,
        "gathered weights": memory.gathered_weights,
        "buckets": memory.buckets,
        "P and Q": memory.factors,
        "or at the heads": memory.logits,
    }
    print(f"comes and goes: {', '.join(f'{text} {size / 1e9:.2f}' for text, size in sizes.items() if size)}")


def show_table_1(rows: Iterable[dict[str, Any]]) -> None:
    """Prints the paper's Table 1."""
    titles = ("parameters", "width", "rank", "rank a GPU", "compression rate", "paper")
    cells = [
        (
            f"{row['parameters']:,}",
            str(row["dim"]),
            str(row["matrix_rank"]),
            str(row["shard_rank"]),
            f"{row['compression_rate']:.5f}",
            f"{row['paper_rate']:.0%}",
        )
        for row in rows
    ]
    _print_table("Table 1: matrices of resblocks, at 8 GPUs a machine", titles, cells)


def _print_table(title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(title, style="bold", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(titles):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    print()


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
