"""A plan as a person reads it: the answer first, in tables of at most 80 columns; and as a program does."""

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dalle_ds.config import PriorConfig
from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.memory import activation_bytes
from dalle_ds.planner.memory import as_dict as memory_dict
from dalle_ds.planner.parameters import count_parameters
from dalle_ds.planner.plan import GIVEN, MUCH_WAITING, Option, Plan
from dalle_ds.planner.traffic import compression_rate

# Kind of memory -> what a row says of it.
MEMORY_ROWS = {
    "weights": "weights",
    "master_weights": "float32 copies of weights",
    "gradients": "gradients, added up over micro-steps",
    "moments": "Adam's moments",
    "starts": "PowerSGD's Q0",
    "buckets": "buffers for gradients to be reduced together",
    "activations": "activations kept for the backward pass",
    "temporary": "what comes and goes, at its peak",
}
TEMPORARY = {
    "working_layer": "a layer at work",
    "gathered_weights": "gathered weights",
    "scattered": "gradients on their way",
    "heads": "at the heads",
    "factors": "P and Q",
    "update": "in the update",
}
# Bytes below which a row would say nothing.
SHOWN = 5_000_000
WIDTH = 80
# What a changed copy of a file of ds_configs/ is called.
COPY = "copy.json"
TIME_ROWS = {
    "forward": "forward pass, heads with their gradients",
    "backward": "backward pass",
    "exposed": "communication that does not hide behind them",
    "accumulation": "adding gradients up",
    "compression": "PowerSGD beside what it sends",
    "optimizer": "optimizer",
}
GB = 1e9


def as_dict(preset: str, plan: Plan) -> dict[str, Any]:
    """All figures of a plan, for programs: bytes, seconds, operations."""
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


def _option_dict(option: Option) -> dict[str, Any]:
    time, sent = option.time, option.sent
    return {
        **dataclasses.asdict(option),
        "memory": memory_dict(option.memory),
        "inside_bytes": sent.inside,
        "between_bytes": sent.between,
        "time": {
            **dataclasses.asdict(time),
            "total": time.total,
            "one_after_the_other": time.one_after_the_other,
        },
    }


def show(preset: str, plan: Plan, command: str, given: str) -> None:
    """Prints what a person wants to know; `command` starts a run, but for its JSON, and `given` is the path of one."""
    config, hardware, counts = plan.config, plan.config.hardware, count_parameters(plan.model)
    n_machines = config.gpus // config.machine_size
    machines = f" ({_count(n_machines, 'machine')} of {config.machine_size})" if config.gpus > 1 else ""
    _say(f"{preset}: {counts.total:,} parameters on {_count(config.gpus, 'GPU')}{machines}, {config.gpu}")
    _say(
        f"  {counts.matrices:,} in matrices of resblocks, {counts.vectors:,} gains and biases, {counts.tables:,} in "
        "embeddings, unembeddings, positions"
    )
    _say(
        f"  a GPU: {hardware.memory / GB:.1f} GB of memory, {config.usable_memory / GB:.1f} usable, at "
        f"{hardware.memory_bandwidth / GB:,.4g} GB/s; {hardware.flops / 1e12:,.0f} TFLOP/s; "
        f"{hardware.machine_bandwidth / GB:,.4g} GB/s in a machine, {hardware.network_bandwidth / GB:,.4g} between"
    )
    _say(f"  a step: {plan.batch:,} samples, on each GPU {plan.n_micro_steps:,} x {config.micro_batch}")
    print()
    _show_ways(plan)
    for note in plan.notes:
        _say(f"note: {note}")
    _show_payloads(plan)
    _say(f"best: {plan.reason}" if plan.recommended else plan.reason)
    if plan.recommended is not None:
        _show_start(plan.recommended, command, given)
    print()
    _show_details(plan)


def _show_ways(plan: Plan) -> None:
    titles = ("way", "memory", "fits", "inside", "between", "step", "at most")
    rows = []
    for option in plan.options:
        sent, time = option.sent, option.time
        fits = "no" if not option.fits else "recompute" if option.layout.recompute else "yes"
        sizes = (option.memory.total / GB, sent.inside / GB, sent.between / GB)
        memory, inside, between = map(_figure, sizes)
        times = _figure(time.total), _figure(time.one_after_the_other)
        rows.append((option.name, memory, fits, inside, between, *times))
    print_table("of a GPU: memory, and bytes sent in a step, in GB; the step in s", titles, rows)
    _say(
        "recompute: fits only with --checkpoint_activations true; inside, between: sent inside machines, and "
        "between them; at most: if no communication overlaps"
    )
    print()


def _show_start(option: Option, command: str, given: str) -> None:
    """The command that starts the option's run, and what its file needs before."""
    recompute = " --checkpoint_activations true" if option.layout.recompute else ""
    start = option.start
    file = given if start is None else COPY if start.changes else f"ds_configs/{start.file}"
    print(f"start: {command} --deepspeed_config {file}{recompute}")
    if file == COPY and start is not None:
        print(f"  {COPY}: a copy of ds_configs/{start.file}; in it")
        print(textwrap.indent("\n".join(start.changes), "  - "))


def _show_details(plan: Plan) -> None:
    """Memory by kind, what is sent, and the step of the way that is shown."""
    option, config = plan.shown, plan.config
    _show_memory(option, plan.model, config.micro_batch)
    if option.exchanges:
        rows = []
        for one in option.exchanges:
            sent = one.sent(option.layout) * (one.times / GB)
            rows.append((one.what, f"{one.times:,}", _figure(sent.inside), _figure(sent.between)))
        print_table(f"{option.name}: GB that a GPU sends in a step", ("what", "times", "inside", "between"), rows)
    time = option.time
    seconds = dataclasses.asdict(time)
    parts = [(text, f"{seconds[kind]:.3f}") for kind, text in TIME_ROWS.items() if seconds[kind]]
    print_table(f"{option.name}: seconds of a step", ("what", "s"), [*parts, ("in all", f"{time.total:.3f}")])
    if time.waits > MUCH_WAITING * time.total:
        _say(
            f"latency-bound: in {time.waits:.2f} s of these GPUs wait for the first bytes of collectives, "
            "which a faster network does not change"
        )
    rate = plan.samples_per_second
    _say(
        f"{rate:,.1f} images/s, {rate * plan.model.seq_len:,.0f} tokens/s, MFU {plan.mfu:.1%} at products that reach "
        f"{config.efficiency:.0%} of the peak"
    )
    print(f"as many samples as the paper's 430,000 updates of 1,024: {plan.paper_run_days:,.1f} days")


def _show_memory(option: Option, model: PriorConfig, micro_batch: int) -> None:
    kinds = memory_dict(option.memory)
    rows = [(text, f"{kinds[kind] / GB:.2f}") for kind, text in MEMORY_ROWS.items() if kinds[kind] >= SHOWN]
    rows.append(("in all", f"{option.memory.total / GB:.2f}"))
    print_table(f"{option.name}: memory of a GPU", ("what", "GB"), rows)
    compute = option.way.compute_bytes
    kept, again = (activation_bytes(model, micro_batch, yes, compute)[0] for yes in (False, True))
    print(f"activations: {kept / GB:.2f} GB, or recomputed {again / GB:.2f}")
    sizes = [f"{text} {kinds[kind] / GB:.2f}" for kind, text in TEMPORARY.items() if kinds[kind] >= SHOWN]
    if sizes:
        _say(f"comes and goes, not all at once: {', '.join(sizes)}")
    if option.memory.host >= SHOWN:
        host = f"{option.memory.host / GB:.2f} GB of the iterate average and copies for it"
        _say(f"in the memory of a machine: {host}{', gradients and optimizer' * option.way.offloads}")
    print()


def _show_payloads(plan: Plan) -> None:
    """What a GPU hands to averages between machines in a step: what compressors count."""
    payloads = {one.name: one.payload for one in plan.options if one.payload is not None and one.name != GIVEN}
    if "hierarchical" not in payloads:
        return
    print(f"handed to averages between machines: {payloads['hierarchical'].total:,} bytes")
    if "hierarchical PowerSGD" in payloads:
        kept = 1 - compression_rate(plan.model, plan.config.machine_size, plan.matrix_rank)
        print(
            f"  with PowerSGD of rank {plan.matrix_rank}: {payloads['hierarchical PowerSGD'].total:,} bytes; of the "
            f"entries of matrices {kept:.1%}"
        )


def show_table_1(rows: Iterable[Mapping[str, Any]]) -> None:
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
    print_table("Table 1: matrices of resblocks, at 8 GPUs a machine", titles, cells)


def print_table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Text to the left in the first column, to the right in all others; as wide as its cells."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    print(title)
    print(_line(titles, widths))
    print("─" * (sum(widths) + 2 * (len(widths) - 1)))
    for row in rows:
        print(_line(row, widths))
    print()


def _say(sentence: str) -> None:
    print(textwrap.fill(sentence, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _figure(value: float) -> str:
    """Three digits or more."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
