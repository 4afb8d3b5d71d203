"""The real DeepSpeed engine with our sections, on real processes: if its seam moved, the first test would see it."""

import copy
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed

from dalle_ds.config import InputError, PriorConfig

N_RANKS, STEPS, BATCH = 4, 4, 8
CLIPPING = 0.3  # below all norms of the reference: else clipping would not be tested
TINY = PriorConfig(text_vocab_size=32, text_len=8, image_vocab_size=32, grid_size=4, n_layer=2, n_head=2, head_dim=16)
N_RESBLOCKS = 2 * TINY.n_layer
FP16 = {"fp16": {"enabled": True, "loss_scale": 1}}
BF16 = {"bf16": {"enabled": True}}
SCALED = {"resblock_gradient_scaling": {}}
MACHINES = {"hierarchical_sharding": {"machine_size": 2}}
# Of full rank, so that nothing is left out; in full, so that nothing is rounded.
FULL_RANK = {"gradient_compression": {"type": "powersgd", "matrix_rank": 256, "wire": "full", "errors": "full"}}
COMPACT = {"optimizer": {"type": "CompactAdamW", "params": {"lr": 3e-3}}, "mixed_precision": {"master_weights": False}}


def ds_config(stage, world_size=N_RANKS, accumulation=1, **sections):
    adamw = {"lr": 3e-3, "betas": [0.9, 0.96], "weight_decay": 4.5e-2, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": BATCH // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 20_000,
            "stage3_prefetch_bucket_size": 20_000,
            "stage3_param_persistence_threshold": 0,
        },
        **copy.deepcopy(sections),
    }


# What must train as float32 on one process does, name -> (config, tolerance of the losses).
EXACT, HALF = 2e-6, 3e-5
CASES = {
    **{f"stage{stage}-scaled": (ds_config(stage, **SCALED), EXACT) for stage in range(4)},
    **{f"stage{stage}-scaled-fp16": (ds_config(stage, **SCALED, **FP16), HALF) for stage in range(4)},
    **{f"stage{stage}-scaled-accumulated": (ds_config(stage, accumulation=2, **SCALED), EXACT) for stage in range(4)},
    "stage3-mixed": (ds_config(3, mixed_precision={}), EXACT),
    "stage3-mixed-bf16": (ds_config(3, mixed_precision={}, **BF16), 8 * HALF),
    "stage3-mixed-fp16-global": (ds_config(3, mixed_precision={}, fp16={"enabled": True}), HALF),
    "stage3-mixed-fp16-growing": (
        ds_config(3, mixed_precision={}, fp16={"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1}),
        HALF,
    ),
    "stage3-16-bit-everything": (ds_config(3, **SCALED, **FP16, **COMPACT), HALF),
    "machines": (ds_config(3, **MACHINES), EXACT),
    "machines-scaled-fp16": (ds_config(3, **MACHINES, **SCALED, **FP16), HALF),
    "machines-full-rank": (ds_config(3, **MACHINES, **FULL_RANK), EXACT),
    "machines-full-rank-scaled-accumulated": (ds_config(3, accumulation=2, **MACHINES, **SCALED, **FULL_RANK), EXACT),
    "machines-of-four-full-rank": (ds_config(3, hierarchical_sharding={"machine_size": 4}, **FULL_RANK), EXACT),
    "machines-of-one-full-rank": (ds_config(3, hierarchical_sharding={"machine_size": 1}, **FULL_RANK), EXACT),
    "stage0-full-rank": (ds_config(0, **FULL_RANK), EXACT),
    "stage0-full-rank-accumulated": (ds_config(0, accumulation=2, **FULL_RANK), EXACT),
    "stage1-full-rank-scaled": (ds_config(1, **SCALED, **FULL_RANK), EXACT),
    "stage1-full-rank-accumulated": (ds_config(1, accumulation=2, **FULL_RANK), EXACT),
}
PAPERS_16_BIT = {
    "gradient_compression": {"type": "powersgd", "matrix_rank": 8},
    **MACHINES,
    **SCALED,
    **FP16,
    **COMPACT,
}
# The paper's arrangement: not comparable with float32, for it leaves most of a gradient to later updates.
PAPERS = {
    "papers": ds_config(3, **PAPERS_16_BIT),
    "papers-accumulated": ds_config(3, accumulation=2, **PAPERS_16_BIT),
}


def make_engine(config, seed=0, **settings):
    from dalle_ds.models.gradient_scaling import resblock_index
    from dalle_ds.models.prior import Prior
    from dalle_ds.training.construction import build_engine

    def build(precision):
        dtypes = {"matrix_dtype": precision.matrix_dtype, "compute_dtype": precision.compute_dtype}
        return Prior(TINY, **dtypes, **settings)

    return build_engine(build, config, seed, resblock_of=resblock_index)


def batch_of(step, part, n_parts):
    """The part's share of the batch of a step, with captions of one length: means over parts make that of the whole."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(TINY.text_vocab_size, (BATCH, TINY.text_len - 1), generator=generator)
    codes = torch.randint(TINY.image_vocab_size, (BATCH, TINY.image_len), generator=generator)
    share = slice(part * BATCH // n_parts, (part + 1) * BATCH // n_parts)
    return text[share], torch.full((BATCH,), 5)[share], codes[share]


def train(engine, steps, before=lambda step: None):
    """For each step: mean loss, gradient norm, whether it was applied."""
    from dalle_ds.training.engine import backward, gradient_norm

    log = []
    accumulation, world_size = engine.gradient_accumulation_steps(), dist.get_world_size()
    for step in steps:
        before(step)
        loss = torch.zeros(())
        for micro_step in range(accumulation):
            part = dist.get_rank() * accumulation + micro_step
            output = engine(*batch_of(step, part, world_size * accumulation))["loss"]
            backward(engine, output)
            engine.step()
            loss += output.detach() / accumulation / world_size
        dist.all_reduce(loss)
        log.append((float(loss), gradient_norm(engine), engine.was_step_applied()))
    return log


def masters(engine):
    from dalle_ds.training.engine_state import holdings

    return [holding.tensor.detach().clone() for holding in holdings(engine)]


def run_cases(cases):
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.whole_weights import whole_weights

    results = {}
    with process_group():
        for name, config in cases.items():
            engine = make_engine(config)
            log = train(engine, range(STEPS))
            path = engine.extras.path
            results[name] = {
                "log": log,
                "weights": dict(whole_weights(engine)),
                "dtypes": sorted({str(tensor.dtype) for tensor in masters(engine)}),
                "traffic": None if path is None else path.compressor.traffic,
                "masters": masters(engine),
                "skipped": engine.skipped_steps,
                "scales": None if engine.extras.scaling.values is None else engine.extras.scaling.values.tolist(),
                "deepspeeds_buffer": getattr(engine.optimizer, "grad_partitions_flat_buffer", torch.empty(0)).numel(),
            }
            engine.destroy()
    return results


@pytest.fixture(scope="module")
def reference():
    [results] = run_distributed(run_cases, 1, {"float32": ds_config(1, world_size=1)})
    return results["float32"]


@pytest.fixture(scope="module")
def results():
    return run_distributed(
        run_cases, N_RANKS, {name: config for name, (config, _) in CASES.items()} | PAPERS, timeout=400
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_are_those_of_float32_on_one_process(results, reference, name):
    tolerance = CASES[name][1]
    for rank in results:
        assert rank[name]["skipped"] == 0
        for (loss, norm, _), (expected, expected_norm, _) in zip(rank[name]["log"], reference["log"], strict=True):
            assert norm > CLIPPING
            assert math.isclose(loss, expected, abs_tol=tolerance)
            assert math.isclose(norm, expected_norm, rel_tol=20 * tolerance)
    weights = results[0][name]["weights"]
    if tolerance == EXACT:
        for parameter, value in weights.items():
            torch.testing.assert_close(value, reference["weights"][parameter], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["machines", "machines-scaled-fp16", "machines-full-rank", *PAPERS])
def test_machines_hold_the_same_weights_bit_for_bit(results, name):
    for first, second in ((0, 2), (1, 3)):
        pairs = zip(results[first][name]["masters"], results[second][name]["masters"], strict=True)
        assert all(a.equal(b) for a, b in pairs)


@pytest.mark.slow
def test_scales_begin_at_two_to_the_13_for_each_process(results):
    for name in ("stage0-scaled", "stage2-scaled", "stage3-scaled", "machines-scaled-fp16"):
        grown = 2 ** (STEPS / 1000)  # since then
        assert results[0][name]["scales"] == pytest.approx([N_RANKS * 2.0**13 * grown] * N_RESBLOCKS, rel=1e-6)


@pytest.mark.slow
def test_at_stage_3_gradients_add_up_in_the_compressors_buffers_and_nowhere_else(results):
    for rank in results:
        assert rank["stage3-16-bit-everything"]["deepspeeds_buffer"] == 0
        assert all(rank[name]["deepspeeds_buffer"] == 0 for name in PAPERS)


def run_checkpointed():
    from dalle_ds.training.distributed import process_group

    logs = {}
    with process_group():
        for name, config in PAPERS.items():
            for again in (False, True):
                engine = make_engine(config, checkpoint_activations=again)
                logs[name, again] = train(engine, range(3)), masters(engine)
                engine.destroy()
    return logs


@pytest.mark.slow
def test_activations_that_are_recomputed_change_nothing():
    for logs in run_distributed(run_checkpointed, N_RANKS, timeout=200):
        for name in PAPERS:
            (kept, weights), (recomputed, others) = logs[name, False], logs[name, True]
            assert kept == recomputed
            assert all(a.equal(b) for a, b in zip(weights, others, strict=True))


GLOBAL_SCALES = {"dynamic": {"initial_scale_power": 40, "hysteresis": 1}, "static": {"loss_scale": 64}}


def run_global_scales():
    from dalle_ds.training.distributed import process_group

    scales = {}
    with process_group():
        for name, section in GLOBAL_SCALES.items():
            engine = make_engine(ds_config(3, world_size=1, mixed_precision={}, fp16={"enabled": True, **section}))
            # The first gradients of resblocks are zero, as the unembedding is.
            applied = [was_applied for _, _, was_applied in train(engine, range(3))]
            scales[name] = engine.optimizer.loss_scale, applied, engine.skipped_steps
            engine.destroy()
    return scales


@pytest.mark.slow
def test_a_global_loss_scale_is_what_the_json_says_and_moves():
    """DeepSpeed takes it for float32, and its scale for 1, where its first parameter is a float32 embedding."""
    [scales] = run_distributed(run_global_scales, 1)
    assert scales["static"] == (64, [True] * 3, 0)
    assert scales["dynamic"] == (2.0**38, [True, False, False], 2)


@pytest.mark.slow
def test_matrices_alone_are_stored_in_16_bits(results):
    assert results[0]["stage3-16-bit-everything"]["dtypes"] == ["torch.float16", "torch.float32"]
    assert results[0]["stage3-scaled-fp16"]["dtypes"] == ["torch.float32"]


def plant_infinities(engine, places):
    """Makes the gradient inside a resblock infinite on a rank: (step, resblock) -> rank. Returns what sets the step."""
    now = {"step": -1}

    def plant(resblock):
        def hook(module, inputs, output):
            if places.get((now["step"], resblock)) == dist.get_rank() and output.requires_grad:
                output.register_hook(lambda gradient: gradient * math.inf)

        return hook

    for i, layer in enumerate(engine.module.layers):
        layer.attention.project.register_forward_hook(plant(2 * i))
        layer.mlp.up.register_forward_hook(plant(2 * i + 1))
    return lambda step: now.update(step=step)


# step -> resblocks in which something is not finite, on some rank.
EVENTS = {1: {2}, 2: {2}, 3: {0, 3}, 5: {2}}
EVENT_CONFIGS = {
    **{f"stage{stage}": ds_config(stage, **SCALED, **FP16) for stage in range(4)},
    "accumulated": ds_config(3, accumulation=2, **SCALED, **FP16),
    "machines": ds_config(3, **MACHINES, **SCALED, **FP16),
    "powersgd": ds_config(3, **PAPERS_16_BIT),
    **{f"stage{stage}-powersgd": ds_config(stage, **SCALED, **FP16, **FULL_RANK) for stage in (0, 1)},
}


def run_events():
    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group():
        for name, config in EVENT_CONFIGS.items():
            config["resblock_gradient_scaling"] = {"patience": 2, "per_rank": True}
            engine = make_engine(config)
            places = {(step, block): (step + block) % N_RANKS for step, blocks in EVENTS.items() for block in blocks}
            set_step = plant_infinities(engine, places)
            history = []
            for step in range(7):
                before, scales = masters(engine), engine.extras.scaling.values.clone()
                moments = moments_of(engine)
                assert moments or step == 0, "there are none before the first update"
                log = train(engine, [step], before=set_step)
                same = all(a.equal(b) for a, b in zip(before, masters(engine), strict=True))
                same_moments = all(a.equal(b) for a, b in zip(moments, moments_of(engine), strict=step > 0))
                history.append(
                    {
                        "applied": log[0][2],
                        "same": same and same_moments,
                        "ratio": (engine.extras.scaling.values / scales).tolist(),
                        "finite": all(tensor.isfinite().all() for tensor in masters(engine)),
                    }
                )
            events = engine.extras.scaling.n_events.tolist()
            results[name] = history, engine.skipped_steps, events
            engine.destroy()
    return results


def moments_of(engine):
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    values = [torch.as_tensor(value) for state in optimizer.state.values() for value in state.values()]
    return [value.view(torch.int16).clone() if value.dtype == torch.uint16 else value.clone() for value in values]


@pytest.fixture(scope="module")
def events():
    return run_distributed(run_events, N_RANKS, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVENT_CONFIGS)
def test_an_infinity_in_one_resblock_on_one_rank_skips_the_update_and_moves_its_scale_alone(events, name):
    """The scale rules as a table: with patience 2 a second event in a row does not divide, one four steps on does."""
    grown, divided, kept = 2 ** (1 / 1000), 2**-0.5, 1.0
    expected = [[grown] * N_RESBLOCKS for _ in range(7)]
    expected[1][2], expected[2][2], expected[5][2] = divided, kept, divided
    expected[3][0] = expected[3][3] = divided
    for rank in events:
        history, skipped, n_events = rank[name]
        for step, seen in enumerate(history):
            assert seen["applied"] == (step not in EVENTS)
            assert seen["same"] == (step in EVENTS), "a skipped update leaves parameters and moments as they were"
            assert seen["finite"]
            assert seen["ratio"] == pytest.approx(expected[step], rel=1e-5)
        assert skipped == len(EVENTS)
        assert n_events == [1, 0, 3, 1]


def run_bytes():
    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group():
        for machine_size, matrix_rank in itertools.product((1, 2), (2, 8)):
            sections = {
                "hierarchical_sharding": {"machine_size": machine_size},
                "gradient_compression": {"type": "powersgd", "matrix_rank": matrix_rank},
            }
            engine = make_engine(ds_config(3, **sections))
            train(engine, range(2))
            results[machine_size, matrix_rank] = engine.extras.path.compressor.traffic
            engine.destroy()
    return results


@pytest.mark.slow
def test_bytes_between_machines_are_the_papers_closed_form():
    """Table 2: P and Q have r (m + 2) / (2 d m) of the gradient's entries, in 1-6-9 two bytes each."""
    for traffic_of in run_distributed(run_bytes, N_RANKS, timeout=200):
        for (m, r), traffic in traffic_of.items():
            d = TINY.dim
            entries = TINY.n_layer * 12 * d * d / m * r * (m + 2) / (2 * d * m)
            assert traffic.matrix_bytes == 2 * 2 * entries  # two updates
            assert traffic.n_calls == 2 * (2 * N_RESBLOCKS + 1)


def run_wire():
    """Dtypes and entries of what the reduce-scatters inside machines carry; resblocks that are sent, by micro-step.

    And by micro-step those that are when the first layer's backward pass begins.
    """
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.engine import backward

    scatter, carried, sent, early = dist.reduce_scatter_tensor, {}, [], []

    def counted(output, input, **settings):
        carried[str(input.dtype)] = carried.get(str(input.dtype), 0) + input.numel()
        return scatter(output, input, **settings)

    with process_group():
        config = ds_config(3, accumulation=2, **PAPERS_16_BIT)
        config["zero_optimization"]["reduce_bucket_size"] = 2 * TINY.dim**2  # of the size of an attention's matrices
        engine = make_engine(config)
        dist.reduce_scatter_tensor = counted
        first, update = engine.module.layers[0], engine.extras.path.compressor._update
        first.register_full_backward_pre_hook(lambda *_: early.append(sorted(update.sent)))
        for micro_step in range(2):
            backward(engine, engine(*batch_of(0, dist.get_rank() * 2 + micro_step, 2 * N_RANKS))["loss"])
            sent.append(sorted(update.sent))
            engine.step()
        dist.reduce_scatter_tensor = scatter
        n_matrix = sum(p.ds_numel for p in engine.module.parameters() if p.dtype == torch.float16)
        n_rest = sum(2 * math.ceil(p.ds_numel / 2) for p in engine.module.parameters() if p.dtype == torch.float32)
        engine.destroy()
    return carried, sent, early, n_matrix, n_rest


@pytest.mark.slow
def test_gradients_travel_in_their_own_dtypes_and_leave_while_the_last_backward_pass_goes_on():
    blocks = [f"layers.{i}.{name}" for i in range(TINY.n_layer) for name in ("attention", "mlp")]
    for carried, sent, early, n_matrix, n_rest in run_distributed(run_wire, N_RANKS, timeout=200):
        assert carried == {"torch.float16": 2 * n_matrix, "torch.float32": 2 * n_rest}  # two micro-steps
        assert sent == [[], blocks]
        # DeepSpeed hands gradients over a bucket at a time: at most the last one of layer 1 is still here.
        assert early[0] == []
        assert early[1] == ["layers.1.mlp"]


STEADY = {"resblock_gradient_scaling": {"growth": 1.0}}  # powers of two throughout: nothing is rounded
HISTOGRAM_CONFIGS = {
    "unscaled": ds_config(3, mixed_precision={}),
    "scaled": ds_config(3, **STEADY),
    "divisor": ds_config(3, resblock_gradient_scaling={"growth": 1.0, "divisor": 8.0}),
    "accumulated": ds_config(3, accumulation=2, **STEADY),
    "machines": ds_config(3, **STEADY, **MACHINES),
    **{f"stage{stage}": ds_config(stage, **STEADY) for stage in range(3)},
    "stage1-compressed": ds_config(1, **STEADY, **FULL_RANK),
    "fp16-global": ds_config(3, mixed_precision={}, fp16={"enabled": True, "initial_scale_power": 12}),
}


def run_histograms():
    """Of the third step: the line of histograms.jsonl by config."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.histograms import GradientHistograms

    lines = {}
    with process_group():
        for name, config in HISTOGRAM_CONFIGS.items():
            engine, log = make_engine(config), mock.Mock()
            histograms = GradientHistograms.of(engine, 1, log)
            train(engine, range(2))
            histograms.begin(3, engine.extras.unscaling)
            train(engine, [2])
            histograms.end(3)
            lines[name] = log.write.call_args.args[2]
            engine.destroy()
    return lines


def mean_exponent(row):
    return sum(e * n for e, n in enumerate(row["counts"], row["first"])) / sum(row["counts"])


def n_entries(row):
    return sum(row["counts"]) + row["zeros"] + row["nonfinite"]


@pytest.mark.slow
def test_histograms_are_of_gradients_without_any_scale_however_they_travel():
    lines = run_distributed(run_histograms, N_RANKS, timeout=200)[0]
    truth = lines["unscaled"]
    assert len(truth["resblocks"]) == N_RESBLOCKS
    assert lines["scaled"] == lines["divisor"] == truth
    for name, line in lines.items():
        for kind, row in line["kinds"].items():
            if name not in ("accumulated", "machines", "stage1-compressed"):
                assert n_entries(row) == n_entries(truth["kinds"][kind]), name
            difference = mean_exponent(row) - mean_exponent(truth["kinds"][kind])
            if name not in ("accumulated", "machines", "stage1-compressed"):
                # The biases of keys have no gradient but for rounding.
                assert abs(difference) < 0.1 or (name, kind) == ("fp16-global", "biases"), name
            elif "matrices" in kind:
                # The mean over fewer samples is larger: of 1 in 4, twice as large. A micro-step of two has half of it.
                assert 0 < difference + (name == "accumulated") < 1.5, name


@pytest.mark.parametrize(
    ("sections", "stage", "words"),
    [
        (MACHINES, 1, "set zero_optimization.stage to 3"),
        (FULL_RANK, 2, "cannot serve ZeRO 2"),
        (FULL_RANK, 3, "add hierarchical_sharding"),
        ({**SCALED, "fp16": {"enabled": True}}, 3, "fp16.loss_scale 0 must be 1"),
        ({"mixed_precision": {}, **FP16}, 1, "needs resblock_gradient_scaling"),
        ({"mixed_precision": {"master_weights": False}, **FP16}, 3, "needs optimizer.type CompactAdamW"),
        ({"mixed_precision": {"master_weight": False}}, 3, "unknown key 'master_weight'"),
        ({"hierarchical_sharding": {}}, 3, "machine_size is missing"),
        ({"hierarchical_sharding": {"machine_size": 2.5}}, 3, "machine_size 2.5 must be a whole number"),
        ({"resblock_gradient_scaling": {"growth": 0.5}}, 3, "growth 0.5 must be at least 1"),
        ({**MACHINES, "gradient_compression": {"type": "topk"}}, 3, "known are none, powersgd"),
        ({**MACHINES, "gradient_compression": {"type": "powersgd", "rank": 4}}, 3, "unknown key 'rank'"),
        ({**MACHINES, "gradient_compression": {"type": "powersgd"}}, 3, "matrix_rank"),
        ({**SCALED, "communication_data_type": "fp32"}, 3, "communication_data_type has no place here"),
        ({"resblock_gradient_scaling": {"divisor": 8.0}}, 2, "divisor is for stage 3"),
        ({**MACHINES, "gradient_compression": {"type": "powersgd", "matrix_rank": 8.0}}, 3, "must be a whole number"),
        (
            {**MACHINES, "gradient_compression": {"type": "powersgd", "matrix_rank": 5}},
            3,
            "in shards of 2: matrix_rank 5",
        ),
        ({**FULL_RANK, "zero_optimization": {"stage": 1, "overlap_comm": True}}, 1, "overlap_comm copies gradients"),
        ({**SCALED, "zero_optimization": {"stage": 2, "compute_grad_norm": False}}, 2, "compute_grad_norm False does"),
        ({**SCALED, "zero_optimization": {"stage": 3, "reduce_scatter": False}}, 3, "reduce_scatter False does not go"),
        ({**SCALED, "zero_optimization": {"stage": 3, "cpu_offload": True}}, 3, "cpu_offload True does not go"),
        ({**SCALED, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, 3, "partition_size 8 does not"),
        ({**MACHINES, **FULL_RANK, "data_types": {"grad_accum_dtype": "fp32"}}, 3, "adds gradients up in its errors"),
    ],
)
def test_sections_that_do_not_go_together_are_refused_with_a_remedy(sections, stage, words):
    from dalle_ds.training.sections import take_sections

    with pytest.raises(InputError, match=words):
        take_sections(ds_config(stage, **sections), "c.json")


def test_a_section_that_is_not_enabled_is_as_none():
    from dalle_ds.training.sections import take_sections

    off = {"resblock_gradient_scaling": {"enabled": False}, "gradient_compression": {"enabled": False}}
    sections, rest = take_sections(ds_config(2, **off), "c.json")
    assert not sections.is_any
    assert not set(off) & set(rest)
