"""What a step hands to collectives, way by way, against sums made by hand; tests/test_planner_engine.py has engines."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed
from test_planner import SMALL, TWELVE, option_of, plan

from dalle_ds.planner import bytes_between_machines, compression_rate, count_parameters
from dalle_ds.planner.collectives import AVERAGE, CODED_AVERAGE, GATHER, SCATTER
from dalle_ds.planner.parameters import factor_entries, matrix_shapes, outer_shapes, shard_shape, vector_shapes
from dalle_ds.planner.traffic import WIRE_BYTES, exchanges_of, payload_of
from dalle_ds.planner.ways import ALL, MACHINE, REPLICAS, WAYS, Buckets, Layout
from dalle_ds.training.distributed import process_group
from dalle_kernels.compression import COMPRESSORS
from dalle_kernels.compression import n_factor_entries as n_entries_sent
from dalle_kernels.compression.wire import WIRES

LAYOUT = Layout(n_gpus=64, machine_size=8, matrix_rank=896)
COUNTS = count_parameters(TWELVE)
HALF, MIXED = 2 * COUNTS.total, 2 * COUNTS.matrices + 4 * COUNTS.rest
PLAIN, FACTORS = (bytes_between_machines(TWELVE, 8, 8, rank, wire) for rank, wire in ((0, "full"), (896, "1-6-9")))
# What is gathered again for the backward pass: all that is not there any more.
MATRIX = 4 * TWELVE.dim**2
STAYS, LAYER_STAYS = (10**9 + MATRIX) / COUNTS.total, 4 * MATRIX / COUNTS.total


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ZeRO 0", [("end", 1, AVERAGE, ALL, HALF)]),
        ("ZeRO 1", [("last backward", 1, AVERAGE, ALL, HALF), ("end", 1, GATHER, ALL, HALF)]),
        ("ZeRO 2", [("backward", 16, AVERAGE, ALL, HALF), ("end", 1, GATHER, ALL, HALF)]),
        (
            "ZeRO 3",
            [
                ("forward", 16, GATHER, ALL, HALF),
                ("backward", 16, GATHER, ALL, round((1 - STAYS) * HALF)),
                ("backward", 16, SCATTER, ALL, HALF),
            ],
        ),
        (
            "ZeRO 3 fp16",
            [
                ("forward", 16, GATHER, ALL, MIXED),
                ("backward", 16, GATHER, ALL, round((1 - STAYS) * MIXED)),
                ("backward", 16, SCATTER, ALL, MIXED),
            ],
        ),
        (
            "hierarchical",
            [
                ("forward", 16, GATHER, MACHINE, MIXED),
                ("backward", 16, GATHER, MACHINE, round((1 - LAYER_STAYS) * MIXED)),
                ("backward", 16, SCATTER, MACHINE, MIXED),
                ("last backward", 1, AVERAGE, REPLICAS, PLAIN.matrix_bytes),
                ("end", 1, AVERAGE, REPLICAS, PLAIN.whole_bytes),
            ],
        ),
        (
            "hierarchical PowerSGD",
            [
                ("forward", 16, GATHER, MACHINE, MIXED),
                ("backward", 16, GATHER, MACHINE, round((1 - LAYER_STAYS) * MIXED)),
                ("backward", 16, SCATTER, MACHINE, MIXED),
                ("last backward", 1, CODED_AVERAGE, REPLICAS, FACTORS.matrix_bytes),
                ("end", 1, AVERAGE, REPLICAS, FACTORS.whole_bytes),
            ],
        ),
    ],
)
def test_each_way_exchanges_weights_and_gradients_as_its_stage_does(name, expected):
    found = exchanges_of(TWELVE, WAYS[name], LAYOUT, 16)
    assert [(one.when, one.times, one.collective, one.scope, one.n_bytes) for one in found] == expected


def test_a_bucket_larger_than_the_model_sends_everything_at_the_end():
    """DeepSpeed hands gradients over a bucket at a time."""
    large = Buckets(prefetch=10**9, reduce=13 * 10**9, live=0, reuse=0)
    found = exchanges_of(TWELVE, replace(WAYS["hierarchical PowerSGD"], buckets=large), LAYOUT, 16)
    assert [one.when for one in found if one.scope == REPLICAS] == ["end", "end"]


def test_where_nothing_overlaps_zero_1_averages_at_the_end():
    found = exchanges_of(TWELVE, replace(WAYS["ZeRO 1"], overlaps=False), LAYOUT, 16)
    assert [one.when for one in found] == ["end", "end"]


@pytest.mark.parametrize(("name", "compressor", "wire"), [("ZeRO 0", "powersgd", "1-6-9"), ("ZeRO 1", "none", "full")])
def test_compression_of_whole_gradients_goes_over_all_gpus_before_the_update(name, compressor, wire):
    way = replace(WAYS[name], compressor=compressor, wire=wire, matrix_rank=100)
    payload = bytes_between_machines(TWELVE, 1, 64, 100 if compressor == "powersgd" else 0, wire)
    found = exchanges_of(TWELVE, way, LAYOUT, 16)[:2]
    assert payload == payload_of(TWELVE, way, LAYOUT)
    assert [one.n_bytes for one in found] == [payload.matrix_bytes, payload.whole_bytes]
    assert {(one.when, one.scope) for one in found} == {("end", ALL)}


def test_calls_are_as_many_as_buckets_and_dtypes():
    """More calls wait more often for their first bytes."""
    way = replace(WAYS["ZeRO 3"], buckets=Buckets(prefetch=10**9, reduce=2 * 10**9, live=0, reuse=0))
    found = exchanges_of(TWELVE, way, LAYOUT, 1)
    assert [one.n_calls for one in found] == [13, 13, 7]  # 12.3 billion parameters
    mixed = exchanges_of(TWELVE, replace(WAYS["ZeRO 3 fp16"], buckets=way.buckets), LAYOUT, 1)
    assert [one.n_calls for one in mixed] == [26, 26, 8]
    averages = exchanges_of(TWELVE, WAYS["hierarchical PowerSGD"], LAYOUT, 1)[-2:]
    assert [one.n_calls for one in averages] == [2 * 2 * 64, 1]  # P and Q of each resblock
    assert [one.n_calls for one in exchanges_of(TWELVE, WAYS["ZeRO 2"], LAYOUT, 1)] == [25, 2]


def test_one_gpu_sends_nothing_and_one_machine_nothing_to_others():
    assert exchanges_of(TWELVE, WAYS["ZeRO 3"], Layout(n_gpus=1, machine_size=1), 4) == []
    one, two = (plan(gpus=gpus, batch=1024) for gpus in (8, 16))
    assert all(option.sent.between == 0 for option in one.options)
    assert all(option.sent.between > 0 for option in two.options)
    assert not any(option.way.is_hierarchical for option in one.options)


def test_what_a_gpu_sends_is_the_sum_of_its_exchanges():
    option = option_of(plan(gpus=64), "hierarchical")
    # Of what is gathered or scattered inside a machine a GPU passes 7/8 on, 16 times; averages are sent twice.
    inside = 16 * 7 / 8 * (2 * MIXED + round((1 - LAYER_STAYS) * MIXED))
    assert option.sent.inside == pytest.approx(inside, rel=1e-12)
    assert option.sent.between == pytest.approx(2 * 7 / 8 * PLAIN.total, rel=1e-12)


def test_each_way_has_its_own_wire_and_the_flag_is_for_those_of_the_table():
    """What is not compressed travels in float32, unless it is told otherwise."""
    made = plan(gpus=64)
    assert option_of(made, "hierarchical").payload == PLAIN
    assert option_of(made, "hierarchical PowerSGD").payload == FACTORS
    halved = option_of(plan(gpus=64, wire="float16"), "hierarchical").payload
    assert halved.matrix_bytes == PLAIN.matrix_bytes / 2
    assert option_of(plan(gpus=64, wire="float16"), "ZeRO 3").payload is None


# --- what compressors count -------------------------------------------------------------------------------------------


def test_factors_are_counted_as_the_compressor_counts_them():
    for rows, columns, rank in itertools.product((1, 5, 496, 3968), (3, 496, 15_872), (1, 4, 112, 999)):
        p, q = factor_entries((rows, columns), rank)
        assert p + q == n_entries_sent(rows, columns, rank)
        assert p <= q


def test_formats_on_the_wire_are_those_of_the_compressors():
    assert set(WIRE_BYTES) == set(WIRES)


@pytest.mark.parametrize("machine_size", [1, 2, 4, 8, 16])
def test_the_rate_is_the_formula_of_table_2(machine_size):
    m, r, d = machine_size, 896, 3968
    assert compression_rate(TWELVE, m, r) == pytest.approx(1 - r * (m + 2) / (2 * d * m), abs=1e-12)


def draw_shards(config, machine_size):
    """Gradients of one rank's shards, as hierarchical ZeRO-3 has them: rows of matrices, flat parts of the rest."""
    shards = {
        f"layers.{i}.{name}": torch.randn(shard_shape(shape, machine_size))
        for i in range(config.n_layer)
        for block in matrix_shapes(config).values()
        for name, shape in block.items()
    }
    rest = {f"layers.{i}.{n}": shape for i in range(config.n_layer) for n, shape in vector_shapes(config).items()}
    rest |= outer_shapes(config)
    return shards | {name: torch.randn(-(-math.prod(shape) // machine_size)) for name, shape in rest.items()}


def count_traffic(topologies, matrix_rank):
    """For each (number of machines, GPUs a machine) and wire: what the compressors counted in two updates."""
    counted = {}
    with process_group() as ranks:
        for n_machines, size in topologies:
            groups = [dist.new_group(list(range(ordinal, n_machines * size, size))) for ordinal in range(size)]
            for wire, (name, kind) in itertools.product(WIRES, COMPRESSORS.items()):
                options = {"matrix_rank": matrix_rank, "n_shards": size} if name == "powersgd" else {}
                compressor = kind.make(kind.options(wire=wire, **options))
                for _ in range(2):
                    compressor.reduce_(draw_shards(SMALL, size), groups[ranks.rank % size])
                counted[n_machines, size, wire, name] = compressor.traffic
    return counted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_processes", "topologies"), [(4, [(2, 2), (4, 1)]), (6, [(3, 2)]), (8, [(4, 2)])], ids=["4", "6", "8"]
)
def test_bytes_between_machines_are_what_compressors_count_in_real_processes(n_processes, topologies):
    matrix_rank = 2
    for counted in run_distributed(count_traffic, n_processes, topologies, matrix_rank):
        assert counted
        for (n_machines, size, wire, kind), traffic in counted.items():
            rank = matrix_rank if kind == "powersgd" else 0
            payload = bytes_between_machines(SMALL, size, n_machines, rank, wire)
            assert traffic.matrix_bytes == 2 * payload.matrix_bytes, (n_machines, size, wire, kind)
            assert traffic.whole_bytes == 2 * payload.whole_bytes, (n_machines, size, wire, kind)
            assert traffic.n_calls == 2 * payload.n_calls
