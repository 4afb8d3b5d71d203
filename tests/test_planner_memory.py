"""The planner's memory, kind by kind, against sums made by hand; tests/test_planner_engine.py has real engines."""

from dataclasses import replace

import pytest
from test_planner import TWELVE, option_of, plan

from dalle_ds.models.cross_entropy import CHUNK_ELEMENTS
from dalle_ds.planner import count_parameters, memory_of, state_bytes
from dalle_ds.planner.memory import (
    LOGIT_CHUNK,
    SUB_GROUP,
    bucket_bytes,
    factor_bytes,
    gathered_bytes,
    head_bytes,
    host_bytes,
    live_elements,
    scattered_bytes,
    update_bytes,
)
from dalle_ds.planner.parameters import sharded_counts
from dalle_ds.planner.ways import WAYS, ZERO_1_BF16, Buckets, Layout, layer_buckets

LAYOUT = Layout(n_gpus=64, machine_size=8, matrix_rank=896)
ALONE = Layout(n_gpus=1, machine_size=1)
COUNTS = count_parameters(TWELVE)
D = TWELVE.dim
MATRIX, LAYER = 4 * D**2, 12 * D**2
TABLE = TWELVE.text_vocab_size * D


def total_state(name, layout=LAYOUT):
    return sum(state_bytes(TWELVE, WAYS[name], layout).values())


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_matrices", "of_the_rest"),
    [
        ("ZeRO 0", 16, 16),
        ("ZeRO 1", 6 + 12 / 64, 6 + 12 / 64),
        ("ZeRO 2", 2 + 16 / 64, 2 + 16 / 64),
        ("ZeRO 3", 18 / 64, 18 / 64),
        ("ZeRO 3 bf16", 18 / 64, 16 / 64),
        ("ZeRO 3 fp16", 14 / 64, 16 / 64),
        ("ZeRO 3 16-bit state", 8 / 64, 16 / 64),
        # Gradients are added up in the error buffers, so compression takes no more (Appendix E.2).
        ("hierarchical", 8 / 8, 16 / 8),
        ("hierarchical PowerSGD", 8 / 8, 16 / 8),
    ],
)
def test_each_way_takes_the_bytes_a_parameter_of_the_config_table(name, of_matrices, of_the_rest):
    """ds_configs/README.md; 64 divides all parameters of this model."""
    assert total_state(name) == of_matrices * COUNTS.matrices + of_the_rest * COUNTS.rest


def test_the_12b_model_trains_on_one_141_gb_gpu():
    made = plan(gpus=1, gpu="h200-141gb")
    option = option_of(made, "ZeRO 3 16-bit state")
    assert option is made.recommended
    assert total_state("ZeRO 3 16-bit state", ALONE) == pytest.approx(99.9e9, rel=1e-3)
    for recompute, total in (("true", 102.1e9), ("false", 115.0e9)):
        option = option_of(plan(gpus=1, gpu="h200-141gb", recompute=recompute), "ZeRO 3 16-bit state")
        assert option.memory.total == pytest.approx(total, rel=2e-3)
        assert option.fits
    assert not option_of(made, "ZeRO 0").fits
    # Not even at the 141 * 10^9 bytes that the card is sold with would it take them all.
    assert option.memory.total < 141e9


def test_powersgd_keeps_q0_and_for_an_update_p_and_q():
    """At 8 GPUs a shard has 112 of rank 896; Q0 and Q have the longer side of it, P the shorter one."""
    way = WAYS["hierarchical PowerSGD"]
    q = 64 * 112 * (4 * D + 2 * D)
    p = 64 * 112 * (4 * D // 8 + 2 * 4 * D // 8)
    # In 1-6-9: what is kept has 2 bytes; on its way Q is there as what is sent and as what is received.
    assert factor_bytes(TWELVE, way, LAYOUT) == (2 * q, 2 * p + 4 * q)
    assert factor_bytes(TWELVE, replace(way, wire="full"), LAYOUT) == (4 * q, 4 * (p + q))
    assert factor_bytes(TWELVE, replace(way, matrix_rank=448), LAYOUT)[0] == q
    assert factor_bytes(TWELVE, WAYS["hierarchical"], LAYOUT) == (0, 0)


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("ZeRO 0", 0),
        # Two buffers, of which one is filled while the other is sent; ZeRO 1 sends what was added up in float32.
        ("ZeRO 1", 2 * 4 * 500e6),
        ("ZeRO 2", 2 * 2 * 500e6),
        ("ZeRO 3", 2 * 500e6),
        ("ZeRO 3 fp16", 0),
        ("hierarchical", 0),
    ],
)
def test_buffers_of_gradients_have_deepspeeds_size_unless_a_file_says_otherwise(name, n_bytes):
    assert bucket_bytes(TWELVE, WAYS[name]) == n_bytes


def test_with_two_dtypes_deepspeed_has_a_buffer_for_each():
    """stage3.py of DeepSpeed 0.19.8, _setup_for_real_optimizer."""
    assert bucket_bytes(TWELVE, replace(WAYS["hierarchical"], buckets=Buckets())) == (2 + 4) * 500e6
    assert bucket_bytes(TWELVE, replace(WAYS["ZeRO 2"], overlaps=False)) == 2 * 500e6


# --- what comes and goes ----------------------------------------------------------------------------------------------


def test_weights_are_gathered_ahead_as_far_as_the_sizes_say():
    ahead = Buckets(live=500_000_000, prefetch=50_000_000, reuse=0)
    way = replace(WAYS["ZeRO 3"], buckets=ahead)
    assert live_elements(TWELVE, way, LAYOUT) == 500_000_000 + MATRIX
    # And what has arrived, while it is put in order: here a matrix, which is more than a bucket.
    assert gathered_bytes(TWELVE, way, LAYOUT) == 2 * (500_000_000 + 2 * MATRIX)
    # The turn from the forward to the backward pass keeps half of the distance.
    kept = replace(way, buckets=replace(ahead, live=0, reuse=2_000_000_000))
    assert live_elements(TWELVE, kept, LAYOUT) == 10**9 + MATRIX
    alone = replace(way, buckets=replace(ahead, prefetch=0))
    assert live_elements(TWELVE, alone, LAYOUT) == MATRIX
    hierarchical = WAYS["hierarchical"]
    assert gathered_bytes(TWELVE, hierarchical, LAYOUT) == 2 * (LAYER + 2 * MATRIX) + (4 - 2) * TABLE
    # A small model is there as a whole.
    assert live_elements(TWELVE, replace(way, buckets=Buckets(live=10**11)), LAYOUT) == COUNTS.total


@pytest.mark.parametrize("name", ["ZeRO 0", "ZeRO 2", "ZeRO 3 16-bit state"])
def test_one_process_gathers_nothing(name):
    assert gathered_bytes(TWELVE, WAYS[name], ALONE) == 0
    assert gathered_bytes(TWELVE, WAYS["ZeRO 2"], LAYOUT) == 0


def test_gradients_wait_for_each_other_and_are_copied_to_be_sent():
    way = WAYS["ZeRO 3 16-bit state"]
    # Those of a bucket, the next one, and a copy of the bucket.
    assert scattered_bytes(TWELVE, way, LAYOUT) == 2 * 3 * MATRIX
    # In a buffer (counted with the buckets) they do not wait elsewhere.
    assert scattered_bytes(TWELVE, replace(way, buckets=Buckets()), LAYOUT) == 2 * (500_000_000 + MATRIX)
    # One process sends nothing.
    assert scattered_bytes(TWELVE, way, ALONE) == 2 * 2 * MATRIX
    # Between machines two resblocks of a shard are on their way in float32: all matrices of a layer.
    assert scattered_bytes(TWELVE, WAYS["hierarchical"], LAYOUT) == 2 * 3 * MATRIX + 4 * LAYER // 8
    # What is kept whole needs not wait, and is copied: sums in float32 to 16 bits too.
    assert scattered_bytes(TWELVE, WAYS["ZeRO 0"], LAYOUT) == 2 * 500_000_000
    for zero_1 in (WAYS["ZeRO 1"], ZERO_1_BF16):
        assert scattered_bytes(TWELVE, zero_1, LAYOUT) == (4 + 2) * 500_000_000 + 2 * MATRIX
    assert scattered_bytes(TWELVE, WAYS["ZeRO 2"], LAYOUT) == 2 * (500_000_000 + MATRIX)
    assert scattered_bytes(TWELVE, WAYS["ZeRO 0"], ALONE) == 0


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        ("ZeRO 0", COUNTS.total),
        ("ZeRO 1", COUNTS.total / 64),
        ("ZeRO 3", COUNTS.total / 64),
        # By resblock: an MLP has 8 d^2, less than all tables.
        ("hierarchical", COUNTS.tables / 8),
    ],
)
def test_an_update_has_float32_of_what_it_updates_at_once(name, at_once):
    assert update_bytes(TWELVE, WAYS[name], LAYOUT) == int(8 * at_once)


def test_zero_3_updates_no_more_than_a_sub_group_at_once():
    """`sub_group_size` of DeepSpeed 0.19.8."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().sub_group_size == SUB_GROUP
    assert update_bytes(TWELVE, WAYS["ZeRO 3"], replace(LAYOUT, n_gpus=8)) == 8 * SUB_GROUP


def test_the_heads_have_a_chunk_of_logits_and_the_unembeddings_gradients():
    assert LOGIT_CHUNK == CHUNK_ELEMENTS
    text, image = TWELVE.text_vocab_size, TWELVE.image_vocab_size
    normed = 2 * D * TWELVE.seq_len
    assert head_bytes(TWELVE, 1) == 4 * (2 * 1024 * image + normed + D * (text + image) + D * text)
    assert head_bytes(TWELVE, 16) == 4 * (2 * 2**25 + 16 * normed + D * (text + image) + D * text)


def test_the_peak_is_where_most_is_there_at_once():
    memory = memory_of(TWELVE, WAYS["hierarchical PowerSGD"], LAYOUT)
    kept = memory.state + memory.buckets
    at_layer = memory.working_layer + memory.gathered_weights + memory.scattered
    peaks = {
        "heads": memory.activations + memory.heads + memory.gathered_weights,
        "last layer": memory.activations + at_layer,
        "first layer": memory.factors + at_layer,
        "update": memory.factors + memory.update,
    }
    assert memory.total == kept + max(peaks.values())
    for field, peak in (("heads", "heads"), ("scattered", "last layer"), ("update", "update")):
        more = replace(memory, **{field: getattr(memory, field) + 10**11})
        assert more.total == kept + peaks[peak] + 10**11


# --- on the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_more_gpus_never_take_more_memory_each(name):
    totals = [
        memory_of(TWELVE, WAYS[name], Layout(n_gpus=n, machine_size=8, matrix_rank=896)).total
        for n in (16, 64, 1024, 16_384)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 0


@pytest.mark.parametrize("name", WAYS)
def test_a_larger_micro_batch_and_no_recomputation_take_more(name):
    layouts = [
        Layout(n_gpus=64, machine_size=8, matrix_rank=896, micro_batch=n, recompute=recompute)
        for n, recompute in ((4, True), (4, False), (8, False), (16, False))
    ]
    totals = [memory_of(TWELVE, WAYS[name], layout).total for layout in layouts]
    # Without ZeRO the update of all parameters at once takes more than activations.
    assert totals == sorted(totals if name == "ZeRO 0" else set(totals))


@pytest.mark.parametrize(
    ("name", "n_copies", "bytes_of_matrices"),
    [("ZeRO 0", 8, 4 + 4), ("ZeRO 1", 1 / 8, 4 + 4), ("ZeRO 3 16-bit state", 1 / 8, 4 + 2), ("hierarchical", 1, 4 + 2)],
)
def test_the_iterate_average_has_float32_and_a_copy_of_what_is_updated(name, n_copies, bytes_of_matrices):
    expected = n_copies * (bytes_of_matrices * COUNTS.matrices + 8 * COUNTS.rest)
    assert host_bytes(TWELVE, WAYS[name], LAYOUT) == expected


def test_offloading_leaves_the_weights_on_the_gpu():
    """The rest is on the host, with gradients in float32 once more: 20 bytes a parameter."""
    way = WAYS["ZeRO 3"]
    on_gpu, offloaded = (memory_of(TWELVE, one, LAYOUT) for one in (way, replace(way, offloads=True)))
    assert offloaded.state == offloaded.weights == on_gpu.weights == 2 * COUNTS.total // 64
    assert offloaded.host - on_gpu.host == 8 * 20 * sum(sharded_counts(TWELVE, 64))
    assert offloaded.update == 0


def test_buckets_of_a_layer_go_by_its_width():
    assert layer_buckets(64) == Buckets(reduce=16_384, prefetch=16_384, live=49_152, reuse=98_304, contiguous=False)
    assert WAYS["hierarchical"].buckets_for(64) == layer_buckets(64)
    assert WAYS["ZeRO 3"].buckets_for(64) == Buckets()
