"""The planner's bytes against a real engine: what DeepSpeed, the optimizer and the compressor hold and send."""

import dataclasses

import pytest
from helpers import run_distributed
from test_planner import SMALL, draw_batch

from dalle_ds.models.gradient_scaling import resblock_index
from dalle_ds.models.prior import Prior
from dalle_ds.planner import bytes_between_machines, state_bytes
from dalle_ds.planner.parameters import sharded_counts
from dalle_ds.planner.ways import WAYS
from dalle_ds.training.distributed import process_group

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "CompactAdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "mixed_precision": {"master_weights": False},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
}
N_UPDATES = 2


def build_prior(precision):
    return Prior(SMALL, matrix_dtype=precision.matrix_dtype, compute_dtype=precision.compute_dtype)


def measure(configs):
    """For each config: the compressor's counters after two updates, and bytes of what is held, by kind."""
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.engine import backward

    measured = []
    with process_group():
        for config in configs:
            engine = build_engine(build_prior, config, 0, resblock_of=resblock_index)
            for _ in range(N_UPDATES):
                backward(engine, engine(**draw_batch(SMALL, 1))["loss"])
                engine.step()
            zero, compressor = engine.optimizer, engine.extras.path.compressor
            weights, masters = zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat
            pairs = zip(weights, masters, strict=True)
            states = zero.optimizer.state.values()
            held = {
                "weights": sum(weight.nbytes for weight in weights),
                "master_weights": sum(m.nbytes for w, m in pairs if w.data_ptr() != m.data_ptr()),
                "gradients": compressor.nbytes,
                "moments": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
            }
            measured.append((dataclasses.asdict(compressor.traffic), held))
            engine.destroy()
    return measured


@pytest.mark.slow
@pytest.mark.parametrize(("n_machines", "size"), [(2, 2), (4, 2)], ids=["4", "8"])
def test_a_real_engine_holds_and_sends_what_the_plan_says(n_machines, size):
    hierarchical = DS_CONFIG | {"hierarchical_sharding": {"machine_size": size}}
    rank = 2 * size
    compressed = hierarchical | {"gradient_compression": {"type": "powersgd", "matrix_rank": rank}}
    with_copies = compressed | {"mixed_precision": {"master_weights": True}}
    results = run_distributed(measure, n_machines * size, [hierarchical, compressed, with_copies])
    for (plain_sent, plain), (sent, held), (_, copied) in results:
        for name, matrix_rank, wire, counted, bytes_held in (
            ("hierarchical", 0, "full", plain_sent, plain),
            ("hierarchical PowerSGD", rank, "1-6-9", sent, held),
        ):
            payload = bytes_between_machines(SMALL, size, n_machines, matrix_rank, wire)
            assert counted == {key: N_UPDATES * value for key, value in dataclasses.asdict(payload).items()}
            state = state_bytes(SMALL, WAYS[name], n_machines * size, size)
            state["gradients"] += state.pop("error_buffers")
            assert bytes_held == state
        n_matrix_entries, _ = sharded_counts(SMALL, size)
        assert copied == {**held, "master_weights": 4 * n_matrix_entries}
