"""Say on paper what a run of the prior takes: memory, bytes sent and time, for every way to shard it.

    dalle-ds plan --preset 12b --gpus 1024 --gpu v100-16gb
    dalle-ds plan --preset 2.8b --gpus 64 --gpu a100-40gb --deepspeed_config ds_configs/zero3_bf16.json

With a DeepSpeed JSON the run that it describes is shown first, beside the other ways. GB are 10^9 bytes. The model of
time is stated in dalle_ds/planner/step_time.py and collectives.py; nothing here was measured.
"""

import argparse
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.config import PriorConfig, require
from dalle_ds.flags import add_flags, apply_flags
from dalle_ds.presets import find_preset

if TYPE_CHECKING:
    from dalle_ds.planner import PlanConfig
    from dalle_ds.planner.ways import Way

# Fields of the model that change nothing here.
WITHOUT_EFFECT = ("dropout", "pb_relax", "text_loss_weight")
# What a JSON says of sizes, and a flag may say instead.
BATCH_KEYS = {"micro_batch": "train_micro_batch_size_per_gpu", "batch": "train_batch_size"}
# In the names of the files of stage 1.
OTHER_STAGE = "dvae"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dalle_ds.planner.plan_config import PlanConfig

    parser.add_argument("--preset", default="12b", help="named sizes that --model.* flags change (default: 12b)")
    parser.add_argument("--deepspeed_config", metavar="FILE", type=Path, help="a DeepSpeed JSON, shown first")
    parser.add_argument("--way", default="", help="the way to show in detail, by its name in the first table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--table1", action="store_true", help="the paper's Table 1, and nothing else")
    add_flags(parser, PlanConfig())
    add_flags(parser, _sizes(), "model.")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.planner import PlanConfig, make_plan
    from dalle_ds.planner.page import as_dict, show, show_table_1
    from dalle_ds.planner.table_1 import table_1

    if args.table1:
        rows = table_1()
        print(json.dumps(rows, indent=2)) if args.json else show_table_1(rows)
        return
    model = apply_flags(find_preset(args.preset).prior.model, args, "model.")
    if args.deepspeed_config is None:
        plan = make_plan(model, apply_flags(PlanConfig(), args), way=args.way)
    else:
        config, way, notes = read_json(args.deepspeed_config, args)
        plan = make_plan(model, config, way, args.way)
        plan = dataclasses.replace(plan, notes=[*notes, *plan.notes])
    if args.json:
        print(json.dumps(as_dict(args.preset, plan), indent=2))
    else:
        show(args.preset, plan, _start_command(args), str(args.deepspeed_config))


def read_json(path: Path, args: argparse.Namespace) -> "tuple[PlanConfig, Way, list[str]]":
    """(the config with the sizes that training would take of the JSON and the flags, its way, notes on it).

    Raises InputError for what training refuses.
    """
    from dalle_ds.planner import PlanConfig
    from dalle_ds.planner.deepspeed_json import machine_size_of, remarks_on, way_of

    # DeepSpeed says on import which accelerator it found, which is no part of the answer.
    with contextlib.redirect_stdout(io.StringIO()):
        from dalle_ds.training.deepspeed_config import batch_sizes, load_deepspeed_config

        settings = load_deepspeed_config(path)
    given = vars(args)
    flags = {field.name: given[field.name] for field in dataclasses.fields(PlanConfig) if field.name in given}
    machine_size = machine_size_of(settings)
    if machine_size:
        size = flags.setdefault("gpus_per_machine", machine_size)
        require(
            size == machine_size,
            f"--gpus_per_machine {size}: {path} shards over machines of {machine_size}; give one of them",
        )
    gpus = PlanConfig(**flags).gpus
    require(
        not machine_size or gpus % machine_size == 0,
        f"{path}: hierarchical_sharding.machine_size {machine_size} does not divide {gpus} GPUs",
    )
    replaced = {key: flags[name] for name, key in BATCH_KEYS.items() if name in flags}
    if replaced and "train_batch_size" in settings | replaced:
        settings.pop("gradient_accumulation_steps", None)  # it follows from the two
    micro_batch, n_micro_steps = batch_sizes(settings | replaced, gpus, str(path))
    notes = [f"the JSON is {path}", *remarks_on(settings)]
    if OTHER_STAGE in path.stem:
        notes.append("by its name it is for stage 1; here the prior, of stage 2, is planned with it")
    sizes = {"micro_batch": micro_batch, "batch": micro_batch * n_micro_steps * gpus}
    return PlanConfig(**{**flags, **sizes}), way_of(settings), notes


def _sizes() -> Any:
    """The fields of the model that a plan depends on, as a dataclass for flags."""
    fields: list[Any] = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
        for field in dataclasses.fields(PriorConfig)
        if field.name not in WITHOUT_EFFECT
    ]
    return dataclasses.make_dataclass("Sizes", fields)()


def _start_command(args: argparse.Namespace) -> str:
    """What starts the training of the model that is planned, on one machine; launch/README.md has several."""
    given = [f"--{name} {value}" for name, value in sorted(vars(args).items()) if name.startswith("model.")]
    return " ".join(["deepspeed launch/train_prior.py", "--preset", args.preset, *given])
