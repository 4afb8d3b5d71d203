"""What a real hierarchical run hands to torch's collectives, against the closed form and the paper's three rates."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed

from dalle_ds.config import PriorConfig

N_UPDATES = 2
RANK_OF_SHARD = 2
# Of an entry in 1-6-9. It travels in parts that are equal for all machines, which here divide all sizes.
WIRE_BYTES = 2
COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
PAPER = {"2.8b": (512, 0.833), "5.6b": (640, 0.851), "12b": (896, 0.859)}  # Table 1: preset -> rank, rate
PAPER_MACHINE = 8


def config_of(machine_size):
    """A prior whose width grows with the machine, which divides it."""
    return PriorConfig(
        text_vocab_size=16, text_len=4, image_vocab_size=16, grid_size=2, n_layer=2, n_head=2, head_dim=8 * machine_size
    )


class Meter:
    """Bytes and calls at torch's collectives, by name of the collective and size of its group."""

    def __init__(self):
        self.counts = {}

    @contextlib.contextmanager
    def on(self):
        kept = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, collective in kept.items():
            setattr(dist, name, self.counted(name, collective))
        try:
            yield
        finally:
            for name, collective in kept.items():
                setattr(dist, name, collective)

    def counted(self, name, collective):
        # What is sent: the first argument where a collective works in place, and else the second.
        sent = 0 if name == "all_reduce" else 1

        def call(*args, **settings):
            group = settings.get("group")
            key = name, tuple(dist.get_process_group_ranks(group))
            n_bytes, n_calls = self.counts.get(key, (0, 0))
            self.counts[key] = n_bytes + args[sent].nbytes, n_calls + 1
            return collective(*args, **settings)

        return call


def count(machine_size, compression, stage=3):
    """Of this rank: bytes and calls between machines by collective, the compressor's count, entries of no matrix.

    Below stage 3 each process is a machine.
    """
    from dalle_ds.models.gradient_scaling import resblock_index
    from dalle_ds.models.prior import Prior
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.engine import backward

    config, meter = config_of(machine_size), Meter()
    with process_group():
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
            "gradient_compression": compression,
        }
        if stage == 3:
            settings["hierarchical_sharding"] = {"machine_size": machine_size}
        engine = build_engine(lambda precision: Prior(config), settings, 0, resblock_of=resblock_index)
        path = engine.extras.path
        text, codes = torch.zeros(1, config.text_len - 1).long(), torch.zeros(1, config.image_len).long()
        with meter.on():
            for _ in range(N_UPDATES):
                backward(engine, engine(text, torch.tensor([2]), codes)["loss"])
                engine.step()
        between = tuple(dist.get_process_group_ranks(path.between))
        counts = {name: of_name for (name, group), of_name in meter.counts.items() if group == between}
        in_block = {name for names in path.compressor.blocks.values() for name in names}
        n_whole = sum(torch.Size(share.shape).numel() for name, share in path.shares.items() if name not in in_block)
        result = counts, path.compressor.traffic, n_whole, len(in_block)
        engine.destroy()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("machine_size", [2, 4])
def test_bytes_at_the_collectives_of_two_machines_are_the_closed_form(machine_size):
    from dalle_ds.planner import bytes_between_machines, compression_rate

    config, n_machines = config_of(machine_size), 2
    m, d, r = machine_size, config.dim, RANK_OF_SHARD * machine_size
    entries = config.n_layer * 12 * d * d // m
    options = {"type": "powersgd", "matrix_rank": r}
    n_blocks = 2 * config.n_layer
    for counts, traffic, n_whole, n_matrices in run_distributed(count, n_machines * m, m, options, timeout=200):
        sent, n_calls = counts["all_to_all_single"]
        assert sent == WIRE_BYTES * N_UPDATES * entries * r * (m + 2) / (2 * d * m)  # Table 2
        assert n_calls == N_UPDATES * 2 * n_blocks
        # What is averaged here goes to all: together the bytes of a ring's all-reduce.
        assert counts["all_gather_into_tensor"] == (sent // n_machines, n_calls)
        # All else in one 32-bit average, with a flag a matrix.
        assert counts["all_reduce"] == (4 * N_UPDATES * (n_whole + n_matrices), N_UPDATES)
        assert (traffic.matrix_bytes, traffic.whole_bytes) == (sent, counts["all_reduce"][0])
        payload = bytes_between_machines(config, m, n_machines, r)
        assert (N_UPDATES * payload.matrix_bytes, N_UPDATES * payload.whole_bytes) == (sent, counts["all_reduce"][0])
        rate = 1 - sent / (WIRE_BYTES * N_UPDATES * entries)
        assert rate == pytest.approx(1 - r * (m + 2) / (2 * d * m), abs=1e-12)
        assert rate == pytest.approx(compression_rate(config, m, r), abs=1e-12)


@pytest.mark.slow
def test_without_compression_all_gradients_cross_once_and_as_they_are():
    config, m = config_of(2), 2
    entries = config.n_layer * 12 * config.dim**2 // m
    for counts, traffic, n_whole, n_matrices in run_distributed(count, 2 * m, m, {"type": "none"}):
        assert n_matrices == 6 * config.n_layer
        assert counts == {"all_reduce": (4 * N_UPDATES * (entries + n_whole), N_UPDATES * (2 * config.n_layer + 1))}
        assert traffic.matrix_bytes + traffic.whole_bytes == counts["all_reduce"][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_below_stage_3_gradients_travel_as_factors_and_in_no_other_way(stage):
    """DeepSpeed's own average of gradients has nothing to do; what it sends at stage 1 are the updated weights."""
    config, options = config_of(1), {"type": "powersgd", "matrix_rank": RANK_OF_SHARD, "wire": "full"}
    n_blocks = 2 * config.n_layer
    for counts, traffic, n_whole, n_matrices in run_distributed(count, 2, 1, options, stage, timeout=200):
        factors = 4 * config.n_layer * 12 * config.dim**2 * RANK_OF_SHARD * 3 / (2 * config.dim)
        flags = 4 * (n_matrices + 1)  # of what is not finite: of matrices with the rest, and of all that came
        sent, n_calls = counts["all_reduce"]
        assert sent == N_UPDATES * (factors + 4 * n_whole + flags)
        assert traffic.matrix_bytes == N_UPDATES * factors
        assert n_calls == N_UPDATES * (2 * n_blocks + 2)
        assert not counts.get("reduce_scatter_tensor")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_three_sizes_have_its_rates_at_eight_ranks_a_machine(name):
    """1 - 5 r / (8 d) (Tables 1 and 2), of the real model's parameters and the shards that they are cut into."""
    from dalle_ds.models.prior import Prior
    from dalle_ds.planner import compression_rate
    from dalle_ds.presets import PRESETS
    from dalle_kernels.compression import n_factor_entries
    from dalle_kernels.compression.base import resblock_of
    from dalle_kernels.compression.zero_hook import shard_shape

    (matrix_rank, printed), config = PAPER[name], PRESETS[name].prior.model
    with torch.device("meta"):
        prior = Prior(config)
    shards = {
        parameter_name: shard_shape(parameter_name, parameter.shape, PAPER_MACHINE)
        for parameter_name, parameter in prior.named_parameters()
        if resblock_of(parameter_name, parameter)
    }
    d = config.dim
    assert set(shards.values()) == {(d // PAPER_MACHINE, d), (4 * d // PAPER_MACHINE, d)}
    entries = sum(rows * columns for rows, columns in shards.values())
    assert entries == config.n_layer * 12 * d * d // PAPER_MACHINE
    factors = sum(n_factor_entries(*shape, matrix_rank // PAPER_MACHINE) for shape in shards.values())
    assert 1 - factors / entries == pytest.approx(1 - 5 * matrix_rank / (8 * d), abs=1e-12)
    assert round(1 - factors / entries, 3) == printed
    assert compression_rate(config, PAPER_MACHINE, matrix_rank) == pytest.approx(1 - factors / entries, abs=1e-12)
