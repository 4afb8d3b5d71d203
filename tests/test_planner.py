"""The planner's closed forms against the real model, the masks, the optimizer, and the bytes that compressors count."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import InputError, PriorConfig
from dalle_ds.models import attention as attention_module
from dalle_ds.models.prior import Prior
from dalle_ds.models.prior import layer_kinds as model_layer_kinds
from dalle_ds.planner import PlanConfig, compression_rate, count_parameters, make_plan, state_bytes, training_flops
from dalle_ds.planner.arithmetic import attention_cells, image_cells, layer_kinds
from dalle_ds.planner.deepspeed_json import read_deepspeed_json
from dalle_ds.planner.hardware import GPUS
from dalle_ds.planner.memory import Layout, activation_bytes, memory_of
from dalle_ds.planner.parameters import matrix_shapes, outer_shapes, shard_shape, sharded_counts, vector_shapes
from dalle_ds.planner.plan import default_matrix_rank, table_1
from dalle_ds.planner.traffic import WIRE_BYTES, bytes_between_machines, n_factor_entries
from dalle_ds.planner.ways import ONE_GPU, WAYS, Way
from dalle_ds.presets import PRESETS, find_preset
from dalle_ds.training.distributed import process_group
from dalle_kernels.attention import Mask
from dalle_kernels.attention.masks import allowed
from dalle_kernels.compression import COMPRESSORS
from dalle_kernels.compression import n_factor_entries as n_entries_sent
from dalle_kernels.compression.wire import WIRES

CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
SMALL = PriorConfig(
    text_vocab_size=60, text_len=12, image_vocab_size=44, grid_size=5, n_layer=3, n_head=2, head_dim=5, conv_kernel=3
)
TWELVE = find_preset("12b").prior.model


def plan(preset="12b", **settings):
    return make_plan(find_preset(preset).prior.model, PlanConfig(**settings))


def option_of(made, name):
    return next(option for option in made.options if option.name == name)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [*(preset.prior.model for preset in PRESETS.values()), dataclasses.replace(SMALL, sandwich_norm=True)],
    ids=[*PRESETS, "sandwich"],
)
def test_names_shapes_and_counts_are_those_of_the_real_model(config):
    with torch.device("meta"):
        real = {name: tuple(parameter.shape) for name, parameter in Prior(config).named_parameters()}
    matrices = {
        f"layers.{i}.{name}": shape
        for i in range(config.n_layer)
        for block in matrix_shapes(config).values()
        for name, shape in block.items()
    }
    vectors = {f"layers.{i}.{n}": shape for i in range(config.n_layer) for n, shape in vector_shapes(config).items()}
    ours = matrices | vectors | outer_shapes(config)
    assert ours == real
    counts = count_parameters(config)
    assert counts.matrices == sum(map(math.prod, matrices.values()))
    assert counts.total == sum(map(math.prod, real.values()))
    assert counts.tables == sum(math.prod(shape) for shape in ours.values() if len(shape) == 2) - counts.matrices
    assert sharded_counts(config, 1) == (counts.matrices, counts.rest)


@pytest.mark.parametrize("config", [TWELVE, SMALL, dataclasses.replace(SMALL, conv_wrap=False, grid_size=7)])
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_attention_is_counted_by_the_cells_of_its_mask(config, kind):
    mask = Mask(
        kind=kind,
        text_len=config.text_len,
        grid_height=config.grid_size,
        grid_width=config.grid_size,
        conv_kernel=config.conv_kernel,
        wrap=config.conv_wrap,
    )
    assert attention_cells(config, kind) == allowed(mask).sum()


def test_the_masks_of_the_paper_have_their_golden_counts():
    assert [image_cells(TWELVE, kind) for kind in ("row", "column", "conv")] == [33_264, 16_896, 61_344]


@pytest.mark.parametrize("n_layer", [1, 2, 3, 7, 64])
def test_layers_have_the_masks_of_the_model(n_layer):
    assert layer_kinds(n_layer) == model_layer_kinds(n_layer)


def draw_batch(config, n):
    return {
        "text_tokens": torch.randint(config.text_vocab_size, (n, config.text_len - 1)),
        "text_lengths": torch.full((n,), config.text_len - 1),
        "image_tokens": torch.randint(config.image_vocab_size, (n, config.image_len)),
    }


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_torch_counts(monkeypatch, recompute):
    """All but attention, which torch's counter does not know: it is replaced by nothing here."""
    monkeypatch.setattr(attention_module, "attention", lambda q, k, v, mask: q + k + v)
    n, flops = 2, training_flops(SMALL)
    cells = sum(4 * SMALL.dim * attention_cells(SMALL, kind) for kind in layer_kinds(SMALL.n_layer))
    prior = Prior(SMALL, checkpoint_activations=recompute)
    # Recomputation may stop once it has all that is needed; here it goes on to the end, as in the closed form.
    with set_checkpoint_early_stop(False), FlopCounterMode(display=False) as forward:
        loss = prior(**draw_batch(SMALL, n))["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == n * (flops.forward() - cells)
    assert backward.get_total_flops() == n * (flops.backward(recompute) - (3 if recompute else 2) * cells)
    assert flops.model == 3 * (flops.layers_forward + flops.heads_forward)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_the_real_model_saves(recompute, dtype):
    torch.manual_seed(0)
    n, saved = 2, {}
    prior = Prior(SMALL, checkpoint_activations=recompute, matrix_dtype=dtype)
    own = {parameter.data_ptr() for parameter in prior.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(n, SMALL.seq_len, SMALL.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = prior.run_layers(x)
    kept, _ = activation_bytes(SMALL, n, recompute, dtype.itemsize)
    assert kept == sum(storage.nbytes() for storage in saved.values())
    assert out.shape == x.shape


# --- memory -----------------------------------------------------------------------------------------------------------


def total_state(name, config=TWELVE, n_gpus=64, machine_size=8):
    return sum(state_bytes(config, WAYS[name], n_gpus, machine_size).values())


@pytest.mark.parametrize(
    ("name", "bytes_a_parameter"),
    [("ZeRO 0", 16), ("ZeRO 1", 6 + 12 / 64), ("ZeRO 2", 2 + 16 / 64), ("ZeRO 3", 18 / 64)],
)
def test_stock_ways_take_the_bytes_a_parameter_of_the_config_table(name, bytes_a_parameter):
    """ds_configs/README.md; 64 divides all parameters of this model."""
    assert total_state(name) == bytes_a_parameter * count_parameters(TWELVE).total


def test_the_papers_state_is_eight_bytes_a_parameter_of_the_matrices_and_sixteen_of_the_rest():
    counts = count_parameters(TWELVE)
    expected = 8 * counts.matrices + 16 * counts.rest
    assert total_state("ZeRO 3 16-bit state") == expected / 64
    # Gradients are added up in the error buffers, so compression takes no more (Appendix E.2).
    assert total_state("hierarchical") == total_state("hierarchical PowerSGD") == expected / 8
    apart = dataclasses.replace(WAYS["hierarchical PowerSGD"], errors_hold_gradients=False)
    assert sum(state_bytes(TWELVE, apart, 64, 8).values()) == (expected + 2 * counts.matrices) / 8


def test_the_12b_model_trains_on_one_141_gb_gpu():
    made = plan(gpus=1, gpu="h200-141gb")
    option = option_of(made, "16-bit state")
    assert option is made.recommended
    assert sum(state_bytes(TWELVE, ONE_GPU["16-bit state"], 1, 1).values()) == pytest.approx(99.9e9, rel=1e-3)
    for recompute, total in (("true", 101.8e9), ("false", 114.8e9)):
        option = option_of(plan(gpus=1, gpu="h200-141gb", recompute=recompute), "16-bit state")
        assert option.memory.total == pytest.approx(total, rel=2e-3)
        assert option.fits
    assert not option_of(made, "ZeRO 0").fits
    # Not even at the 141 * 10^9 bytes that the card is sold with would it take them all.
    assert option.memory.total < 141e9


def test_the_papers_run_fits_its_gpus():
    """12 billion parameters on 128 machines of 8 V100 of 16 GB (Section 2.5), with recomputation as in Appendix E."""
    option = option_of(plan(gpus=1024, gpu="v100-16gb"), "hierarchical PowerSGD")
    assert option.fits
    assert option.layout.recompute


@pytest.mark.parametrize("name", WAYS)
def test_more_gpus_never_take_more_memory_each(name):
    totals = [
        memory_of(TWELVE, WAYS[name], Layout(n_gpus=n, machine_size=8, matrix_rank=896)).total
        for n in (8, 16, 64, 1024, 16_384)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 0


@pytest.mark.parametrize("name", WAYS)
def test_a_larger_micro_batch_and_no_recomputation_take_more(name):
    layouts = [
        Layout(n_gpus=64, machine_size=8, matrix_rank=896, micro_batch=n, recompute=recompute)
        for n, recompute in ((1, True), (1, False), (2, False), (4, False))
    ]
    totals = [memory_of(TWELVE, WAYS[name], layout).total for layout in layouts]
    assert totals == sorted(set(totals))


@pytest.mark.parametrize(
    ("name", "n_copies"), [("ZeRO 0", 8), ("ZeRO 1", 1 / 8), ("ZeRO 3", 1 / 8), ("hierarchical", 1)]
)
def test_the_iterate_average_is_as_sharded_as_the_weights_that_it_averages(name, n_copies):
    memory = memory_of(TWELVE, WAYS[name], Layout(n_gpus=64, machine_size=8))
    assert memory.host_average == 4 * count_parameters(TWELVE).total * n_copies


# --- bytes sent -------------------------------------------------------------------------------------------------------


def test_factors_are_counted_as_the_compressor_counts_them():
    for rows, columns, rank in itertools.product((1, 5, 496, 3968), (3, 496, 15_872), (1, 4, 112, 999)):
        assert n_factor_entries(rows, columns, rank) == n_entries_sent(rows, columns, rank)


def test_formats_on_the_wire_are_those_of_the_compressors():
    assert set(WIRE_BYTES) == set(WIRES)


def test_table_1_comes_out():
    """Ranks a GPU and rates of the paper's Table 1 (the exact rates are 1 - 5 r / (8 d))."""
    rows = table_1()
    assert [row["shard_rank"] for row in rows] == [64, 80, 112]
    assert [round(row["compression_rate"], 5) for row in rows] == [0.83333, 0.85119, 0.85887]
    for row, parameters in zip(rows, (2.8e9, 5.6e9, 12e9), strict=True):
        assert row["compression_rate"] == pytest.approx(1 - 5 * row["matrix_rank"] / (8 * row["dim"]), abs=1e-12)
        assert round(row["compression_rate"], 2) == row["paper_rate"]
        assert row["parameters"] == pytest.approx(parameters, rel=0.012)


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
            for wire, kind in itertools.product(WIRES, COMPRESSORS):
                options = {"matrix_rank": matrix_rank, "n_shards": size} if kind == "powersgd" else {}
                compressor = COMPRESSORS[kind](wire=wire, **options)
                for _ in range(2):
                    compressor.reduce_(draw_shards(SMALL, size), groups[ranks.rank % size])
                counted[n_machines, size, wire, kind] = compressor.traffic
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


def test_gathering_and_scattering_inside_a_machine_are_the_same_for_both_hierarchical_ways():
    made = plan(gpus=64)
    plain, compressed = (option_of(made, name) for name in ("hierarchical", "hierarchical PowerSGD"))
    assert plain.inside_bytes == compressed.inside_bytes
    counts = count_parameters(TWELVE)
    # Twice the weights and once the gradients, of which a GPU has an eighth already; 16 micro-steps.
    assert plain.inside_bytes == 16 * 3 * 7 / 8 * (2 * counts.matrices + 4 * counts.rest)
    assert plain.between_bytes == 2 * 7 / 8 * plain.payload.total


def test_only_what_crosses_between_machines_depends_on_their_number():
    one, two = (plan(gpus=gpus, batch=1024) for gpus in (8, 16))
    assert all(option.between_bytes == 0 for option in one.options)
    assert all(option.between_bytes > 0 for option in two.options)
    assert not any(option.way.is_hierarchical for option in one.options)


# --- time and the choice ----------------------------------------------------------------------------------------------


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
        assert option.fits == (option.memory.total <= made.config.usable_memory)
    assert 0 < made.mfu <= made.config.efficiency
    assert made.recommended is None or made.recommended.fits


def test_the_choice_is_the_simplest_of_the_fastest_that_fit():
    made = plan(gpus=1024, gpu="v100-16gb", network_bandwidth=1.5)
    assert made.recommended.name == "hierarchical PowerSGD"
    assert made.reason.startswith("hierarchical PowerSGD: the fastest that fits")
    assert plan("small", gpus=8).recommended.name == "ZeRO 0"


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
    assert compressed.payload.total < 0.2 * plain.payload.total


def test_recomputation_costs_a_third_more_of_the_layers():
    flops = training_flops(TWELVE)
    layers = flops.layers_forward
    assert flops.forward() + flops.backward(True) - flops.forward() - flops.backward(False) == layers
    assert 3 * layers < flops.model < 3.2 * layers


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
        ({"network_bandwidth": -1.0}, "network_bandwidth -1.0 must not be negative; 0 for the usual one"),
        ({"matrix_rank": 100}, "matrix_rank 100 is no multiple of 8 GPUs a machine"),
        ({"batch": 1000}, "batch 1000 is no multiple of 16 GPUs x micro_batch 1: give e.g. 992"),
    ],
)
def test_bad_settings_are_answered_with_what_would_do(settings, message):
    with pytest.raises(InputError, match=message):
        plan(**{"gpus": 16, **settings})


# --- DeepSpeed JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_house_is_planned(path):
    settings = read_deepspeed_json(path)
    n_gpus = settings.machine_size or 8
    config = PlanConfig(gpus=n_gpus, gpus_per_machine=n_gpus, micro_batch=settings.micro_batch, batch=settings.batch)
    made = make_plan(PRESETS["small"].prior.model, config, settings)
    assert made.shown.name == made.options[0].name == path.name


def read(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    return read_deepspeed_json(path)


ALL_OF_IT = """{
  "//": "a comment", "train_micro_batch_size_per_gpu": 2, "train_batch_size": 1024, "fp16": {"enabled": true},
  "optimizer": {"type": "CompactAdamW", "params": {"lr": 1e-3}}, "mixed_precision": {"master_weights": false},
  "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}, "hierarchical_sharding": {"machine_size": 4},
  "gradient_compression": {"type": "powersgd", "matrix_rank": 64, "wire": "float16", "errors": "full"}
}"""


def test_a_json_of_the_papers_kind_is_the_way_of_the_same_name(tmp_path):
    settings = read(tmp_path, ALL_OF_IT)
    assert settings.way == dataclasses.replace(WAYS["hierarchical PowerSGD"], error_bytes=4)
    assert (settings.machine_size, settings.matrix_rank, settings.wire) == (4, 64, "float16")
    assert (settings.micro_batch, settings.batch, settings.bucket_elements) == (2, 1024, 1000)


@pytest.mark.parametrize(
    ("changes", "name"),
    [('"stage": 1', "ZeRO 1"), ('"stage": 2', "ZeRO 2"), ('"stage": 3', "ZeRO 3"), ('"stage": 0', "ZeRO 0")],
)
def test_a_stock_json_is_the_stock_way(tmp_path, changes, name):
    text = '{"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {%s}}'
    assert read(tmp_path, text % changes).way == WAYS[name]


def test_a_section_that_is_off_is_as_none(tmp_path):
    off = ALL_OF_IT.replace('"type": "powersgd"', '"enabled": false, "type": "powersgd"')
    assert read(tmp_path, off).way == WAYS["hierarchical"]
    assert read(tmp_path, off).wire == "full"
    assert read(tmp_path, '{"fp16": {"enabled": false}}').way == Way(
        state=read(tmp_path, "{}").way.state, compute_bytes=4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not JSON: .* at line 1"),
        ("[]", "config.json: the top level must be an object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage 4 must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 3}', "section 'zero_optimization' must be an object"),
        ('{"train_batch_size": "many"}', "train_batch_size 'many' must be a whole number"),
        ('{"hierarchical_sharding": {"machine_size": 8}}', "hierarchical_sharding shards parameters: set .* to 3"),
        ('{"gradient_compression": {"type": "powersgd"}}', "beside hierarchical_sharding alone: add that"),
        ('{"data_types": {"grad_accum_dtype": "fp8"}}', "grad_accum_dtype 'fp8' is unknown"),
    ],
)
def test_a_bad_json_is_answered_with_file_and_key(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)
