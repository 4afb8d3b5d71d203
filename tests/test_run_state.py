"""Checkpoints of runs with our own sections: 16-bit storage, gradient scales, machines, compression, the average."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import run_distributed
from test_construction import (
    COMPACT,
    EXACT,
    FP16,
    FULL_RANK,
    HALF,
    MACHINES,
    PAPERS_16_BIT,
    SCALED,
    ds_config,
    make_engine,
    train,
)

from dalle_ds.config import LoopConfig

N = 3
KAHAN = {
    "optimizer": {"type": "CompactAdamW", "params": {"lr": 3e-3, "rounding": "kahan"}},
    "mixed_precision": {"master_weights": False},
}
SAVED = {
    "machines": ds_config(3, **MACHINES),
    "machines-compressed": ds_config(3, **MACHINES, **SCALED, **FULL_RANK),
    "paper": ds_config(3, **PAPERS_16_BIT),
    "stage3": ds_config(3, mixed_precision={}),
    "stage3-16-bit": ds_config(3, **SCALED, **FP16, **COMPACT),
    "stage3-kahan": ds_config(3, **SCALED, **FP16, **KAHAN),
    "stage1-compressed": ds_config(1, **SCALED, **FULL_RANK),
    "stage0-scaled": ds_config(0, **SCALED),
}


class Place:
    """Stands for a reader or a schedule."""

    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def make_state(config, seed, at=0):
    from dalle_ds.training.averaging import ParameterAverage
    from dalle_ds.training.run_state import RunState

    engine = make_engine(config, seed)
    return RunState(engine, ParameterAverage(engine, 0.9), Place(at), Place(2 * at))


def train_on(state, steps):
    losses = []
    for step in steps:
        losses += [loss for loss, *_ in train(state.engine, [step])]
        state.average.update()
    return losses


def bits(tensor):
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def snapshot(state):
    from dalle_ds.training import engine_state

    path = state.engine.extras.path
    pieces = [*engine_state.take_pieces(state.engine), *([] if path is None else path.pieces())]
    return (
        {piece.key: bits(piece.tensor) for piece in [*pieces, *state.average.pieces()]},
        (
            state.average.state_dict(),
            engine_state.take_scalars(state.engine),
            engine_state.take_counters(state.engine),
            copy.deepcopy(state.engine.extras.scaling.state_dict()),
            state.reader.at,
            state.learning_rate.at,
        ),
    )


def differences(first, second):
    (tensors, rest), (others, other_rest) = first, second
    unequal = [key for key in tensors.keys() | others.keys() if not torch.equal(tensors[key], others[key])]
    return unequal + [i for i, pair in enumerate(zip(rest, other_rest, strict=True)) if pair[0] != pair[1]]


def stop_and_go_on(folder):
    """Of each case what differs after loading, and after N steps more than an unbroken run; and the losses of those."""
    from dalle_ds.storage.folders import complete_checkpoints
    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group():
        for name, config in SAVED.items():
            state = make_state(config, 0, at=7)
            train_on(state, range(N))
            path = state.save(Path(folder) / name, N, LoopConfig())
            # Afterwards: saving makes every machine's errors their mean (compression/powersgd.py).
            saved = snapshot(state)
            losses = train_on(state, range(N, 2 * N))
            other = make_state(config, 0)  # the seed of stochastic rounding is part of the config
            assert complete_checkpoints(Path(folder) / name) == [path]
            assert other.restore(path) == N
            came_back = differences(saved, snapshot(other))
            continued = train_on(other, range(N, 2 * N))
            shards = sorted(file.name for file in (path / "shards").iterdir())
            went_on = differences(snapshot(state), snapshot(other))
            results[name] = (came_back, went_on, losses, continued, shards)
            for each in (state, other):
                each.engine.destroy()
    return results


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return folder, run_distributed(stop_and_go_on, 4, folder, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_n_and_n_steps_are_2n_bit_for_bit(stopped, name):
    for results in stopped[1]:
        came_back, went_on, losses, continued, shards = results[name]
        assert came_back == []
        assert continued == losses
        assert went_on == []
        # Machines hold copies: the first one writes. So does the first rank where all hold everything.
        n_writers = {"machines": 2, "machines-compressed": 2, "paper": 2, "stage0-scaled": 1}.get(name, 4)
        assert len(shards) == n_writers


# What wrote, number of ranks that go on, how, and the tolerance of their losses.
ELASTIC = [
    ("machines", 2, ds_config(3, 2, **MACHINES), EXACT),
    ("machines", 2, ds_config(3, 2, hierarchical_sharding={"machine_size": 1}), EXACT),
    ("machines", 1, ds_config(0, 1), EXACT),
    ("stage3", 2, ds_config(2, 2, **SCALED), EXACT),
    ("stage0-scaled", 2, ds_config(3, 2, **MACHINES, **SCALED), EXACT),
    ("machines-compressed", 2, ds_config(3, 2, **MACHINES, **SCALED, **FULL_RANK), EXACT),
    ("machines-compressed", 1, ds_config(3, 1, **SCALED), EXACT),
    # Weights without a float32 copy find one, and lose it.
    ("stage3-kahan", 2, ds_config(3, 2, **SCALED, **FP16, **KAHAN), HALF),
    ("stage3-kahan", 1, ds_config(3, 1, **SCALED, **FP16, **{**KAHAN, "mixed_precision": {}}), HALF),
]


def go_on(folder, cases):
    from dalle_ds.storage.folders import complete_checkpoints
    from dalle_ds.training.distributed import process_group

    results = []
    with process_group():
        for name, config in cases:
            state = make_state(config, 1)
            state.restore(complete_checkpoints(Path(folder) / name)[-1])
            results.append((train_on(state, range(N, 2 * N)), state.reader.at, state.learning_rate.at))
            state.engine.destroy()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_other_machines_stages_and_storage_go_on_with_the_same_losses(stopped, world_size):
    folder, [results, *_] = stopped
    cases = [case for case in ELASTIC if case[1] == world_size]
    by_rank = run_distributed(go_on, world_size, folder, [(name, config) for name, _, config, _ in cases], timeout=300)
    for (name, _, config, tolerance), (losses, *places) in zip(cases, by_rank[0], strict=True):
        assert losses == pytest.approx(results[name][2], abs=tolerance), (name, config)
        assert places == [7, 14]
