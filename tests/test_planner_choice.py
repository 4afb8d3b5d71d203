"""Which way a plan takes, how it says to start it, and what it refuses."""

import math

import pytest
from test_planner import TWELVE, option_of, plan

from dalle_ds.config import InputError
from dalle_ds.planner import PlanConfig, make_plan, training_flops
from dalle_ds.planner.hardware import GPUS
from dalle_ds.planner.plan import GIVEN
from dalle_ds.planner.start import READY
from dalle_ds.planner.table_1 import default_matrix_rank, table_1
from dalle_ds.planner.ways import WAYS, layer_buckets


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8, 64, 1000, 1024, 16_384])
@pytest.mark.parametrize("gpu", GPUS)
def test_every_number_of_gpus_is_answered(n_gpus, gpu):
    made = plan("2.8b", gpus=n_gpus, gpu=gpu)
    assert made.options[0].name == "ZeRO 0"
    assert made.batch >= 1024
    assert made.batch % n_gpus == 0
    for option in made.options:
        time = option.time
        assert 0 < time.forward + time.backward <= time.total <= time.one_after_the_other
        assert 0 <= time.waits <= time.exposed
        assert option.fits == (option.memory.total <= made.config.usable_memory)
        assert option.start.file
    assert 0 < made.mfu <= made.config.efficiency
    assert made.recommended is None or made.recommended.fits


def test_the_papers_run_fits_its_gpus_and_powersgd_is_best_there():
    """12 billion parameters on 128 machines of 8 V100 of 16 GB (Section 2.5), with recomputation as in Appendix E."""
    made = plan(gpus=1024, gpu="v100-16gb", network_bandwidth=1.5)
    option = made.recommended
    assert option.name == "hierarchical PowerSGD"
    assert option.layout.recompute
    assert (option.start.file, option.start.changes) == ("hierarchical_fp16_rank896.json", ())
    assert made.reason.startswith("hierarchical PowerSGD: the fastest that fits; ")


def test_a_year_of_the_papers_run_is_what_its_updates_take():
    """Appendix B.2: 430,000 updates of 1,024 samples."""
    made = plan(gpus=1024, gpu="v100-16gb", network_bandwidth=1.5)
    assert made.paper_run_days == pytest.approx(430_000 * made.shown.time.total / 86_400)
    assert made.samples_per_second == pytest.approx(1024 / made.shown.time.total)
    flops = training_flops(TWELVE).model
    assert made.mfu == pytest.approx(flops / made.shown.time.total / 125e12)


def test_among_the_fastest_one_whose_file_is_ready_is_taken_before_a_simpler_one():
    made = plan(gpus=64, gpu="a100-80gb")
    fastest = min(option.time.total for option in made.options if option.fits)
    as_fast = [option for option in made.options if option.fits and option.time.total <= 1.05 * fastest]
    ready = [option for option in as_fast if not option.start.changes]
    assert ready
    assert as_fast[0] is not ready[0]
    assert made.recommended is ready[0]
    assert "fits, and is within 5% of the fastest" in made.reason


def test_what_is_given_is_taken_only_where_it_is_faster():
    config = PlanConfig(gpus=64, gpu="a100-80gb")
    given = make_plan(TWELVE, config, WAYS["ZeRO 3 fp16"])
    assert given.options[0].name == given.shown.name == GIVEN
    assert given.recommended.name != GIVEN
    alone = make_plan(
        TWELVE, PlanConfig(gpus=1024, gpu="v100-16gb", network_bandwidth=0.2), WAYS["hierarchical PowerSGD"]
    )
    assert alone.recommended.name == "hierarchical PowerSGD"


def test_stock_fp16_is_not_taken_above_a_billion_parameters():
    """It diverged (Section 2.4); with bfloat16 there is no such limit, and smaller models have none."""
    made = plan(gpus=64, gpu="v100-32gb")
    stock = [option_of(made, f"ZeRO {stage}") for stage in range(4)]
    assert any(option.fits for option in stock)
    assert all("diverges above 10^9" in option.obstacle for option in stock)
    # With another batch no file is ready, and the simplest would be a stock one.
    for one in (made, plan(gpus=64, gpu="v100-32gb", batch=2048)):
        assert one.recommended.way.is_scaled
    assert made.notes == [f"ZeRO 0, ZeRO 1, ZeRO 2, ZeRO 3: {stock[0].obstacle}"]
    for other in (plan("small", gpus=64, gpu="v100-32gb"), plan(gpus=64)):
        assert not any(option.obstacle for option in other.options)
    assert "ZeRO 3 bf16" not in [option.name for option in made.options]


@pytest.mark.parametrize(
    ("name", "settings", "file", "changes"),
    [
        ("ZeRO 3 bf16", {}, "zero3_bf16.json", ()),
        ("ZeRO 3 fp16", {"batch": 128}, "zero3_fp16.json", ("set train_batch_size to 128",)),
        ("hierarchical PowerSGD", {}, "hierarchical_fp16_rank896.json", ()),
        ("hierarchical", {}, "hierarchical_fp16_rank896.json", ("leave out gradient_compression",)),
        (
            "hierarchical PowerSGD",
            {"gpus_per_machine": 4, "matrix_rank": 600, "micro_batch": 2},
            "hierarchical_fp16_rank640.json",
            (
                "set train_micro_batch_size_per_gpu to 2",
                "set machine_size to 4",
                "set matrix_rank to 600",
                "set reduce_bucket_size to 62980096",
                "set stage3_prefetch_bucket_size to 62980096",
                "set stage3_max_live_parameters to 188940288",
                "set stage3_max_reuse_distance to 377880576",
            ),
        ),
        (
            "ZeRO 2",
            {"gpu": "v100-32gb"},
            "zero3_bf16.json",
            (
                'say "fp16": {"enabled": true} for bf16',
                "leave out mixed_precision",
                'set zero_optimization to {"stage": 2, "overlap_comm": true}',
            ),
        ),
        (
            "ZeRO 3 16-bit state",
            {},
            "one_gpu_fp16.json",
            ("set overlap_comm to true", "set train_batch_size to 1024"),
        ),
    ],
)
def test_each_way_names_the_file_that_starts_it_and_what_to_change_in_a_copy(name, settings, file, changes):
    start = option_of(plan(**{"gpus": 64, **settings}), name).start
    assert (start.file, start.changes) == (file, changes)


def test_every_way_has_a_file():
    assert set(READY) == set(WAYS)
    assert layer_buckets(TWELVE.dim).live == 12 * TWELVE.dim**2


def test_where_nothing_fits_the_least_is_named_and_what_to_try():
    made = plan(gpus=8, gpu="v100-16gb", micro_batch=2)
    assert made.recommended is None
    assert "nothing fits 16.1 GB: ZeRO 3 16-bit state takes the least" in made.reason
    assert made.reason.endswith("try GPUs with more memory or more GPUs or a smaller micro-batch")
    assert made.shown.name == "ZeRO 3 16-bit state"


def test_a_slower_network_never_makes_a_step_shorter():
    for name in WAYS:
        times = [
            option_of(plan(gpus=64, network_bandwidth=speed, recompute="true"), name).time.total
            for speed in (100, 25, 6, 1, 0.1)
        ]
        assert times == sorted(times)


def test_compression_pays_where_the_network_is_slow():
    slow = plan(gpus=64, network_bandwidth=0.2)
    plain, compressed = (option_of(slow, name) for name in ("hierarchical", "hierarchical PowerSGD"))
    assert compressed.time.exposed < plain.time.exposed
    assert compressed.payload.total < 0.1 * plain.payload.total


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_table_1_comes_out():
    """Ranks a GPU and rates of the paper's Table 1 (the exact rates are 1 - 5 r / (8 d))."""
    rows = table_1()
    assert [row["shard_rank"] for row in rows] == [64, 80, 112]
    assert [round(row["compression_rate"], 5) for row in rows] == [0.83333, 0.85119, 0.85887]
    for row, parameters in zip(rows, (2.8e9, 5.6e9, 12e9), strict=True):
        assert row["compression_rate"] == pytest.approx(1 - 5 * row["matrix_rank"] / (8 * row["dim"]), abs=1e-12)
        assert round(row["compression_rate"], 2) == row["paper_rate"]
        assert row["parameters"] == pytest.approx(parameters, rel=0.012)


def test_a_rank_is_the_papers_or_a_quarter_of_the_width():
    assert [default_matrix_rank(dim, 8) for dim in (1920, 2688, 3968, 2048, 30)] == [512, 640, 896, 512, 8]
    assert default_matrix_rank(3968, 6) == 900


def test_a_width_that_the_machine_does_not_divide_is_planned_without_powersgd():
    made = make_plan(TWELVE, PlanConfig(gpus=12, gpus_per_machine=6))
    assert "hierarchical" in [option.name for option in made.options]
    assert not any(option.way.is_compressed for option in made.options)
    assert made.notes == ["no PowerSGD: width 3968 is no multiple of 6 GPUs a machine; change one"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"gpus": 12}, "gpus 12 is no multiple of gpus_per_machine 8: give whole machines"),
        ({"gpu": "a100"}, "gpu 'a100' must be v100-16gb, .* or h200-141gb"),
        ({"wire": "fp8"}, "wire 'fp8' must be full, float16, bfloat16 or 1-6-9"),
        ({"recompute": "maybe"}, "recompute 'maybe' must be auto, true or false"),
        ({"efficiency": 1.5}, r"efficiency 1.5 must lie in \(0, 1\]"),
        ({"reserve": 1.0}, r"reserve 1.0 must lie in \[0, 1\)"),
        ({"network_bandwidth": -1.0}, "network_bandwidth -1.0 must be a number of at least 0; 0 for the usual one"),
        ({"memory_gb": math.inf}, "memory_gb inf must be a number of at least 0; 0 for the usual one"),
        ({"tflops": math.nan}, "tflops nan must be a number of at least 0"),
        ({"matrix_rank": 100}, "matrix_rank 100 is no multiple of 8 GPUs a machine"),
        ({"matrix_rank": 99_999_992}, "matrix_rank 99999992 is more than the model's width 3968: give less"),
        ({"batch": 1000}, "batch 1000 is no multiple of 16 GPUs x micro_batch 1: give e.g. 992"),
    ],
)
def test_bad_settings_are_answered_with_what_would_do(settings, message):
    with pytest.raises(InputError, match=message):
        plan(**{"gpus": 16, **settings})


def test_settings_of_the_hardware_take_the_place_of_the_catalogues():
    given = {
        "memory_gb": 1.0,
        "tflops": 2.0,
        "memory_bandwidth": 3.0,
        "machine_bandwidth": 4.0,
        "network_bandwidth": 5.0,
    }
    config = PlanConfig(**given, reserve=0.25)
    hardware = config.hardware
    assert (hardware.memory, hardware.flops, hardware.memory_bandwidth) == (1e9, 2e12, 3e9)
    assert (hardware.machine_bandwidth, hardware.network_bandwidth) == (4e9, 5e9)
    assert config.usable_memory == 0.75e9
    assert PlanConfig().hardware == GPUS["h100-80gb"]
