"""A DeepSpeed JSON as a way to lay out a run: what training makes of it, and no other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dalle_ds.planner.deepspeed_json import machine_size_of, remarks_on, way_of
from dalle_ds.planner.hardware import GPUS
from dalle_ds.planner.start import READY, ReadyFile
from dalle_ds.planner.ways import ALL, WAYS, WHOLE, Buckets, StateFormat, layer_buckets, ways_for
from dalle_ds.presets import PRESETS
from dalle_ds.training.deepspeed_config import load_deepspeed_config
from dalle_kernels.compression import PowerSGDOptions

FOLDER = Path(__file__).parents[1] / "ds_configs"
CONFIGS = sorted(FOLDER.glob("*.json"))
FP16, BF16 = {"fp16": {"enabled": True, "loss_scale": 1}}, {"bf16": {"enabled": True}}
IN_FULL = {"data_types": {"grad_accum_dtype": "fp32"}}
MIXED, NO_COPY = {"mixed_precision": {}}, {"mixed_precision": {"master_weights": False}}
MACHINES = {"hierarchical_sharding": {"machine_size": 2}}


def config(stage, *sections, optimizer="AdamW", zero=None, **params):
    made = {"optimizer": {"type": optimizer, "params": {"lr": 1e-3, **params}}}
    made["zero_optimization"] = {"stage": stage, **(zero or {})}
    for section in sections:
        made |= section
    return made


def powersgd(**options):
    return {"gradient_compression": {"type": "powersgd", "matrix_rank": 8, **options}}


def averages(**options):
    return {"gradient_compression": {"type": "none", **options}}


# --- the files of the house -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (_, changes) in READY.items() if not changes])
def test_the_files_that_start_a_way_are_that_way(name):
    """Every size in them is that of the way, and that which `start_of` takes it to have."""
    files, _ = READY[name]
    for file in files:
        settings = load_deepspeed_config(FOLDER / file.name)
        buckets = layer_buckets(file.dim) if file.dim else WAYS[name].buckets
        # On one GPU there is nothing to overlap.
        overlaps = file.name != "one_gpu_fp16.json"
        assert way_of(settings) == replace(WAYS[name], buckets=buckets, matrix_rank=file.matrix_rank, overlaps=overlaps)
        assert file == ReadyFile(
            name=file.name,
            dim=file.dim,
            batch=settings["train_batch_size"],
            micro_batch=settings["train_micro_batch_size_per_gpu"],
            machine_size=machine_size_of(settings),
            matrix_rank=file.matrix_rank,
        )


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_the_changes_that_make_a_stock_way_of_a_file_do(stage, has_bfloat16):
    """Those that `READY` names, made one by one."""
    file, changes = READY[f"ZeRO {stage}"]
    settings = load_deepspeed_config(FOLDER / file[0].name)
    for change in changes:
        what, _, value = change.partition(" to ")
        if what.startswith("leave out "):
            del settings[what.removeprefix("leave out ")]
        else:
            settings[what.removeprefix("set ")] = json.loads(value)
    if not has_bfloat16:
        settings["fp16"] = settings.pop("bf16")
    gpu = replace(GPUS["h100-80gb"], has_bfloat16=has_bfloat16)
    expected = ways_for(16, 8, gpu)[f"ZeRO {stage}"]
    assert way_of(settings) == replace(expected, dtype=expected.dtype_on(gpu))


@pytest.mark.parametrize(("preset", "rank"), [("2.8b", 512), ("5.6b", 640), ("12b", 896)])
def test_the_files_of_the_papers_sizes_have_the_buckets_of_their_layer(preset, rank):
    way = way_of(load_deepspeed_config(FOLDER / f"hierarchical_fp16_rank{rank}.json"))
    assert way.buckets == layer_buckets(PRESETS[preset].prior.model.dim)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_of_every_file_all_is_counted_but_time_on_the_host(path):
    assert len(remarks_on(load_deepspeed_config(path))) == ("offload" in path.stem)


def test_the_offloading_file_offloads():
    way = way_of(load_deepspeed_config(FOLDER / "zero3_offload_bf16.json"))
    buckets = Buckets(reduce=200_000_000)
    assert way == replace(WAYS["ZeRO 3"], dtype="bf16", offloads=True, buckets=buckets)


# --- bytes a parameter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_a_stock_json_is_the_stock_way(stage):
    """With fp16; DeepSpeed refuses to add up in float32 without ZeRO."""
    zero = {"overlap_comm": True} if stage else {}
    made = way_of(config(stage, FP16, IN_FULL if stage else {}, zero=zero))
    assert made == replace(WAYS[f"ZeRO {stage}"], dtype="fp16")


@pytest.mark.parametrize(
    ("settings", "matrices", "rest"),
    [
        # weight, float32 copy, gradient, moments
        (config(0), (4, 0, 4, 8), (4, 0, 4, 8)),
        (config(1), (4, 4, 4, 8), (4, 4, 4, 8)),
        # tests/test_state_bytes.py: DeepSpeed copies float32 weights too.
        (config(3), (4, 4, 4, 8), (4, 4, 4, 8)),
        (config(3, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), (4, 4, 4, 8), (4, 4, 4, 8)),
        (config(3, FP16), (2, 4, 2, 8), (2, 4, 2, 8)),
        # Its BF16_Optimizer leaves gradients of 16 bits where they are, and adds up beside them.
        (config(1, BF16, IN_FULL), (2, 4, 6, 8), (2, 4, 6, 8)),
        (config(1, FP16, IN_FULL), (2, 4, 4, 8), (2, 4, 4, 8)),
        (config(3, optimizer="CompactAdamW"), (4, 4, 4, 4), (4, 4, 4, 8)),
        # Ours.
        (config(3, {"mixed_precision": {}}), (4, 0, 4, 8), (4, 0, 4, 8)),
        (config(3, BF16, {"mixed_precision": {}}), (2, 4, 2, 8), (4, 0, 4, 8)),
        (config(3, BF16, {"mixed_precision": {"enabled": False}}), (2, 4, 2, 8), (2, 4, 2, 8)),
        (config(3, FP16, {"resblock_gradient_scaling": {}}, IN_FULL), (2, 4, 4, 8), (4, 0, 4, 8)),
        (config(3, FP16, NO_COPY, optimizer="CompactAdamW"), (2, 0, 2, 4), (4, 0, 4, 8)),
        (config(3, FP16, NO_COPY, optimizer="CompactAdamW", moment_bits=32), (2, 0, 2, 8), (4, 0, 4, 8)),
        (config(3, FP16, NO_COPY, optimizer="CompactAdamW", rounding="kahan"), (2, 0, 2, 6), (4, 0, 4, 8)),
        # With a copy there is nothing to make up for.
        (
            config(3, FP16, {"mixed_precision": {}}, optimizer="CompactAdamW", rounding="kahan"),
            (2, 4, 2, 4),
            (4, 0, 4, 8),
        ),
        (config(3, BF16, MACHINES, powersgd()), (2, 4, 2, 8), (4, 0, 4, 8)),
        (config(3, BF16, MACHINES, powersgd(errors="full")), (2, 4, 4, 8), (4, 0, 4, 8)),
        (config(3, BF16, IN_FULL, MACHINES, powersgd()), (2, 4, 2, 8), (4, 0, 4, 8)),
        # Below stage 3 our sections store weights in float32, and a compressor's buffers come on top of gradients.
        (config(1, BF16, {"mixed_precision": {}}), (4, 4, 4, 8), (4, 4, 4, 8)),
        (config(0, powersgd()), (4, 0, 4 + 2, 8), (4, 0, 4 + 4, 8)),
        (config(1, powersgd(errors="full")), (4, 4, 4 + 4, 8), (4, 4, 4 + 4, 8)),
        (config(0, averages()), (4, 0, 4 + 4, 8), (4, 0, 4 + 4, 8)),
    ],
)
def test_a_parameter_takes_the_bytes_that_training_gives_it(settings, matrices, rest):
    fields = ("weight", "master", "gradient", "moments")
    state = way_of(settings).state
    assert state.matrices == StateFormat(**dict(zip(fields, matrices, strict=True)))
    assert state.rest == StateFormat(**dict(zip(fields, rest, strict=True)))


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "dtype", "is_scaled"),
    [
        (config(3), "fp32", False),
        (config(3, FP16), "fp16", False),
        (config(3, {"fp16": {"enabled": False}}, BF16), "bf16", False),
        (config(3, FP16, {"resblock_gradient_scaling": {}}), "fp16", True),
        (config(0, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), "bf16", False),
    ],
)
def test_branches_compute_in_what_the_json_enables(settings, dtype, is_scaled):
    way = way_of(settings)
    assert (way.dtype, way.is_scaled) == (dtype, is_scaled)
    assert way.compute_bytes == (4 if dtype == "fp32" else 2)


@pytest.mark.parametrize(
    ("settings", "compressor", "wire", "rank"),
    [
        (config(3, BF16), "", "full", 0),
        # What is not compressed travels in full, unless it is told otherwise.
        (config(3, BF16, MACHINES), "none", "full", 0),
        (
            config(3, BF16, MACHINES, {"gradient_compression": {"type": "none", "wire": "float16"}}),
            "none",
            "float16",
            0,
        ),
        (config(3, BF16, MACHINES, powersgd()), "powersgd", "1-6-9", 8),
        (config(3, BF16, MACHINES, powersgd(enabled=False)), "none", "full", 0),
        (config(1, powersgd(wire="bfloat16")), "powersgd", "bfloat16", 8),
    ],
)
def test_a_compressor_has_the_wire_that_its_section_says(settings, compressor, wire, rank):
    way = way_of(settings)
    assert (way.compressor, way.wire, way.matrix_rank) == (compressor, wire, rank)


def test_defaults_are_those_of_deepspeed_and_of_the_compressors():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig()
    assert Buckets() == Buckets(
        reduce=theirs.reduce_bucket_size,
        prefetch=theirs.prefetch_bucket_size,
        live=theirs.max_live_parameters,
        reuse=theirs.max_reuse_distance,
        contiguous=theirs.contiguous_gradients,
    )
    assert [DeepSpeedZeroConfig(stage=stage).overlap_comm for stage in range(4)] == [False, False, False, True]
    assert [way_of(config(stage)).overlaps for stage in range(4)] == [False, False, False, True]
    ours = PowerSGDOptions(matrix_rank=8)
    assert (ours.wire, ours.errors) == (way_of(config(1, powersgd())).wire, "1-6-9")


def test_sizes_are_read_by_either_name_and_as_deepspeed_takes_them():
    """As floats too: 5e8 is how DeepSpeed's own documents write them."""
    zero = {
        "reduce_bucket_size": 5e7,
        "prefetch_bucket_size": 10,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 20,
        "contiguous_gradients": False,
    }
    buckets = way_of(config(3, zero=zero)).buckets
    assert buckets == Buckets(reduce=50_000_000, prefetch=10, live=10**9, reuse=20, contiguous=False)
    assert type(buckets.reduce) is int


def test_sharding_goes_by_stage_and_machine():
    ways = [way_of(config(stage)) for stage in range(4)]
    assert [(one.weights, one.gradients, one.optimizer) for one in ways] == [
        (WHOLE, WHOLE, WHOLE),
        (WHOLE, WHOLE, ALL),
        (WHOLE, ALL, ALL),
        (ALL, ALL, ALL),
    ]
    assert way_of(config(3, BF16, MACHINES)).is_hierarchical
    assert [machine_size_of(config(3, *sections)) for sections in ((MACHINES,), ())] == [2, 0]


def test_the_optimizer_goes_by_resblock_with_our_sections_or_with_our_optimizer():
    cases = (config(3), config(3, optimizer="CompactAdamW"), config(3, {"mixed_precision": {}}))
    assert [way_of(one).by_resblock for one in cases] == [False, True, True]


def test_what_the_plan_does_not_count_is_said():
    settings = config(3, optimizer="Lion", amsgrad=True, zero={"zero_hpz_partition_size": 2, "offload_param": {}})
    assert remarks_on(settings) == [
        "zero_optimization.offload_param is not counted",
        "zero_optimization.zero_hpz_partition_size is not counted",
        "optimizer Lion is counted as Adam",
        "the third moment of amsgrad is not counted",
    ]
    assert remarks_on(config(3, optimizer="Adam")) == remarks_on(config(2)) == []
    [of_gradients] = remarks_on(config(2, MIXED))
    assert "whole gradients" in of_gradients
    [of_time] = remarks_on(config(3, zero={"offload_optimizer": {"device": "cpu"}}))
    assert "on the host is not counted" in of_time
