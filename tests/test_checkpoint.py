"""Checkpoints through the real engine: N + N steps are 2N, and any run's state fits any other's shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_distributed
from torch import nn

N_IN, GLOBAL_BATCH, N = 6, 8, 3
# Sums over ranks and shards in another order, in float32, and on weights that were rounded to 11 and to 8 bits.
LOSS_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
SMALL_SCALE = 2.0**12
# Moments of 9 and 10 significant bits instead of 24 change an update of 1e-2 by a few thousandths of itself.
MOMENT_TOLERANCE = 2e-3


class Tiny(nn.Module):
    """Sizes that no number of ranks divides evenly; the last bias has fewer elements than there are ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(N_IN, 7), nn.LayerNorm(7), nn.Linear(7, 1)

    def forward(self, x, y):
        x = x.to(self.first.weight.dtype)
        return (self.last(torch.tanh(self.norm(self.first(x)))).float() - y).square().mean()


def ds_config(world_size, stage, precision, accumulation=1):
    """fp16 starts at a loss scale that overflows, so that the first steps are skipped."""
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 17, "hysteresis": 1}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision != "fp32" and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build(world_size, stage, precision, optimizer, seed, accumulation=1):
    """An engine with AdamW, or with CompactAdamW, which keeps the moments of matrices as codes of 16 bits."""
    from dalle_ds.training.construction import build_engine

    config = ds_config(world_size, stage, precision, accumulation)
    if optimizer == "CompactAdamW":
        params = {"lr": 1e-2, "betas": [0.9, 0.999], "weight_decay": 0.1}
        config["optimizer"] = {"type": "CompactAdamW", "params": params}
    # Matrices belong to resblocks: the others' moments have 32 bits.
    return build_engine(lambda precision: Tiny(), config, seed, resblock_of=lambda name: 0)


def train(engine, ranks, steps):
    """The mean loss over ranks of each step; data are a function of the step."""
    from dalle_ds.training.engine import backward

    losses = []
    for step in steps:
        total = torch.zeros(())
        for micro_step in range(accumulation := engine.gradient_accumulation_steps()):
            x = torch.randn(GLOBAL_BATCH, N_IN, generator=torch.Generator().manual_seed(step))
            part = slice(ranks.rank + micro_step * ranks.world_size, None, ranks.world_size * accumulation)
            loss = engine(x[part], x.sum(1, keepdim=True).sin()[part])
            backward(engine, loss)
            engine.step()
            total += loss.detach() / accumulation
        torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks.world_size)
    return losses


def bits(tensor):
    return tensor.detach().clone().view(torch.uint8).flatten()


def unpadded(parameter):
    """This rank's elements of a parameter; behind them, at the end of the last shard, lies whatever was in memory."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    n = parameter.partition_numel()
    return parameter.ds_tensor[
        : max(0, parameter.ds_numel - n * torch.distributed.get_rank(parameter.ds_process_group))
    ]


def snapshot(engine):
    """Every bit that this rank knows: its pieces, the model's own weights, steps, counters and loss scale."""
    from dalle_ds.training import engine_state

    model = [bits(unpadded(parameter)) for parameter in engine.module.parameters()]
    pieces = {piece.key: bits(piece.tensor) for piece in engine_state.take_pieces(engine)}
    return pieces, model, engine_state.take_scalars(engine), engine_state.take_counters(engine), engine.micro_steps


def same(first, second):
    pieces, model, *numbers = first
    others, other_model, *other_numbers = second
    return (
        pieces.keys() == others.keys()
        and all(torch.equal(tensor, others[key]) for key, tensor in pieces.items())
        and all(map(torch.equal, model, other_model))
        and numbers == other_numbers
    )


def stop_and_go_on(folder, cases):
    """Of each (stage, precision, optimizer): whether N + N steps are 2N, bit for bit; and the losses of the last N."""
    from dalle_ds.training.checkpoint import load_checkpoint, save_checkpoint
    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group() as ranks:
        for case in cases:
            engine = build(ranks.world_size, *case, 0)
            train(engine, ranks, range(N))
            saved = snapshot(engine)
            path = save_checkpoint(engine, folder_of(folder, case), N, {"reader": 7}, 2)
            unchanged = same(saved, snapshot(engine))
            losses = train(engine, ranks, range(N, 2 * N))
            other = build(ranks.world_size, *case, 1)
            state = load_checkpoint(other, path)
            came_back = same(saved, snapshot(other))
            went_on = train(other, ranks, range(N, 2 * N)) == losses and same(snapshot(engine), snapshot(other))
            results[case] = (unchanged, came_back, went_on, state, losses, saved[3])
            engine.destroy()
            other.destroy()
    return results


def folder_of(folder, case):
    return Path(folder) / "-".join(map(str, case))


def go_on(folder, cases, accumulation=1):
    """The losses of N more steps of each (checkpoint, shape to go on in)."""
    from dalle_ds.storage.folders import complete_checkpoints
    from dalle_ds.training.checkpoint import load_checkpoint
    from dalle_ds.training.distributed import process_group

    results = []
    with process_group() as ranks:
        for before, after in cases:
            engine = build(ranks.world_size, *after, 1, accumulation)
            load_checkpoint(engine, complete_checkpoints(folder_of(folder, before))[-1])
            # Smaller parts of the batch have larger gradients: the restored scale might be too large for them.
            for scaler in ("loss_scale_config", "loss_scaler"):
                if hasattr(getattr(engine.optimizer, scaler, None), "cur_scale") and after[1] == "fp16":
                    getattr(engine.optimizer, scaler).cur_scale = SMALL_SCALE
            results.append(train(engine, ranks, range(N, 2 * N)))
            assert engine.global_steps == 2 * N
            engine.destroy()
    return results


PRECISIONS, OPTIMIZERS = ("fp32", "fp16", "bf16"), ("AdamW", "CompactAdamW")
CASES = [(stage, precision, optimizer) for stage in range(4) for precision in PRECISIONS for optimizer in OPTIMIZERS]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Checkpoints of every case by two ranks, and what became of them."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, run_distributed(stop_and_go_on, 2, folder, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_n_and_n_steps_are_2n_bit_for_bit(stopped, case):
    for results in stopped[1]:
        unchanged, came_back, went_on, state, _, counters = results[case]
        assert unchanged, "saving is no part of training"
        assert came_back
        assert went_on
        assert state == (N, {"reader": 7})
        assert (counters["counters"]["skipped_steps"] > 0) == (case[1] == "fp16")


# (stage, precision, optimizer) that wrote, and that goes on.
ELASTIC = [
    *(((before, "fp32", "AdamW"), (after, "fp32", "AdamW")) for before in range(4) for after in range(4)),
    *(
        ((before, "bf16", "CompactAdamW"), (after, "bf16", "CompactAdamW"))
        for before, after in ((0, 3), (3, 1), (2, 3))
    ),
    *(((before, "fp16", "AdamW"), (after, "fp16", "AdamW")) for before, after in ((3, 2), (1, 0), (2, 3))),
    ((3, "fp32", "AdamW"), (2, "bf16", "AdamW")),
    ((1, "fp16", "AdamW"), (3, "fp32", "AdamW")),
    # Moments become codes of 16 bits, and floats again.
    ((2, "fp32", "AdamW"), (3, "fp32", "CompactAdamW")),
    ((3, "fp32", "CompactAdamW"), (0, "fp32", "AdamW")),
]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_any_number_of_ranks_and_any_stage_goes_on_with_the_same_losses(stopped, world_size):
    folder, [results, _] = stopped
    losses = run_distributed(go_on, world_size, folder, ELASTIC)[0]
    for (before, after), continued in zip(ELASTIC, losses, strict=True):
        precisions = {before[1], after[1]}
        tolerance = max(LOSS_TOLERANCE[precision] for precision in precisions)
        if before[2] != after[2]:
            tolerance = MOMENT_TOLERANCE
        assert continued == pytest.approx(results[before][4], abs=tolerance), (before, after)


@pytest.mark.slow
def test_accumulation_may_change(stopped):
    folder, [results, _] = stopped
    case = (3, "fp32", "AdamW")
    losses = run_distributed(go_on, 2, folder, [(case, case)], 2)[0]
    assert losses[0] == pytest.approx(results[case][4], abs=LOSS_TOLERANCE["fp32"])


def begin_with(folder, cases, decay):
    """Of each (checkpoint, shape to begin in) whether each rank's model and masters begin at its weights, rounded.

    The checkpoint's average is other weights where `decay` is not 0.
    """
    from dalle_ds.storage.folders import complete_checkpoints, open_pieces
    from dalle_ds.training.averaging import ParameterAverage
    from dalle_ds.training.checkpoint import load_weights, save_checkpoint
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.engine import whole_model
    from dalle_ds.training.whole_weights import whole_weights

    results = []
    with process_group() as ranks:
        first = build(ranks.world_size, 1, "fp32", "AdamW", 0)
        average = ParameterAverage(first, decay)
        train(first, ranks, range(1))
        checkpoint = save_checkpoint(first, folder, 1, {}, 1, pieces=average.pieces())
        expected = {}
        with open_pieces(checkpoint) as pieces:
            for name, parameter in first.module.named_parameters():
                kind = "average" if decay else "weight"
                expected[name] = pieces.read(name, kind, 0, parameter.numel()).view(parameter.shape).clone()
        assert [checkpoint] == complete_checkpoints(folder)
        first.destroy()
        for case in cases:
            engine = build(ranks.world_size, *case, 1)
            load_weights(engine, checkpoint)
            masters = all(master.equal(expected[name]) for name, master in whole_weights(engine))
            with whole_model(engine) as model:
                used = all(p.equal(expected[name].to(p.dtype)) for name, p in model.named_parameters())
            losses = train(engine, ranks, range(N))
            results.append((masters, used, losses, engine.global_steps))
            engine.destroy()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_new_run_begins_at_the_weights_of_another_or_their_average_in_any_shape(tmp_path, decay):
    cases = [(stage, precision, "AdamW") for stage in range(4) for precision in ("fp32", "bf16")]
    for results in run_distributed(begin_with, 2, tmp_path, cases, decay):
        for case, (masters, used, losses, steps) in zip(cases, results, strict=True):
            assert (masters, used, steps) == (True, True, N), case
            assert losses == pytest.approx(results[0][2], abs=LOSS_TOLERANCE[case[1]]), case


# --- what goes wrong --------------------------------------------------------------------------------------------------


def save_badly(folder, failures):
    """Of each (rank, function that fails, error, free bytes) what was raised and what was left, on every rank."""
    from dalle_ds.training import checkpoint
    from dalle_ds.training.distributed import process_group

    run, real_usage, results = Path(folder), shutil.disk_usage, []
    with process_group() as ranks:
        engine = build(ranks.world_size, 3, "fp32", "AdamW", 0)
        train(engine, ranks, range(1))
        checkpoint.save_checkpoint(engine, run, 1, {}, 1)
        for rank, function, error, free in failures:
            real = getattr(checkpoint, function)

            def fail(path, *arguments, real=real, error=error):
                real(path, *arguments)
                raise error

            if ranks.rank == rank:
                setattr(checkpoint, function, fail)
            if free is not None:
                shutil.disk_usage = lambda path, free=free: shutil._ntuple_diskusage(9, 9, free)
            try:
                checkpoint.save_checkpoint(engine, run, 2, {}, 1)
                results.append(None)
            except Exception as raised:
                results.append((type(raised).__name__, str(raised)))
            torch.distributed.barrier()
            results[-1] = (results[-1], sorted(path.name for path in (run / "checkpoints").iterdir()))
            setattr(checkpoint, function, real)
            shutil.disk_usage = real_usage
            torch.distributed.barrier()
        checkpoint.save_checkpoint(engine, run, 2, {}, 1)
        results.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
        engine.destroy()
    return results


FULL = OSError(28, "No space left on device")
FAILURES = [
    *((rank, "write_pieces", FULL, None) for rank in (0, 1)),
    (0, "write_json", FULL, None),
    (1, "write_pieces", RuntimeError("I/O error"), 0),  # as others than Python say it
    (1, "write_pieces", RuntimeError("ours"), None),
    (0, "write_json", OSError(5, "Input/output error"), None),
]


@pytest.mark.slow
def test_a_save_that_fails_on_any_rank_fails_on_all_and_leaves_the_older_one(tmp_path):
    by_rank = run_distributed(save_badly, 2, tmp_path, FAILURES)
    for failure, *outcomes in zip(FAILURES, *by_rank):  # noqa: B905 (one more comes after the failures)
        for rank, ((kind, message), left) in enumerate(outcomes):
            assert left == ["step-00000001"], failure
            if failure[2] is FULL or failure[3] == 0:
                assert kind == "InputError", failure
                assert "step-00000002: the disk is full; free some space and go on with --resume auto" in message
                assert "\n" not in message
            elif rank == failure[0]:
                assert (kind, message) == (type(failure[2]).__name__, str(failure[2]))
            else:
                assert kind == "RuntimeError", failure
                assert f"rank {failure[0]} failed: " in message
    assert [results[-1] for results in by_rank] == [["step-00000002"]] * 2


def refuse(folder, case):
    """What loading says of a checkpoint that lacks parts of a weight, and of one of an earlier version."""
    from dalle_ds.config import InputError
    from dalle_ds.storage.folders import MARKER
    from dalle_ds.training.checkpoint import load_checkpoint
    from dalle_ds.training.distributed import process_group

    said = []
    with process_group() as ranks:
        engine = build(ranks.world_size, *case, 1)
        for marker in ({"shards/shard-00001.safetensors": None}, None):
            torch.distributed.barrier()
            if ranks.is_first:
                content = json.loads((folder / MARKER).read_text())
                files = {name: record for name, record in content["files"].items() if name not in (marker or ())}
                (folder / MARKER).write_text(json.dumps({**content, "files": files} if marker else {"step": N}))
            torch.distributed.barrier()
            with pytest.raises(InputError) as error:
                load_checkpoint(engine, folder)
            said.append(str(error.value))
        engine.destroy()
    return said


@pytest.mark.slow
def test_what_is_missing_is_named_on_every_rank(stopped, tmp_path):
    case = (3, "fp32", "AdamW")
    folder = shutil.copytree(folder_of(stopped[0], case) / "checkpoints/step-00000003", tmp_path / "step-00000003")
    for missing, old in run_distributed(refuse, 2, folder, case):
        assert "lacks elements 21 to 42 of first.weight (weight)" in missing
        assert "was written by another version" in old


def generators(folder, save):
    """Random numbers that come after the saved state, or after what another number of ranks is given of it."""
    from dalle_ds.training.checkpoint import load_rank_state, save_checkpoint
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.generators import generator_states, restore_generators

    with process_group() as ranks:
        engine = build(ranks.world_size, 0, "fp32", "AdamW", 1)
        torch.manual_seed(ranks.rank)
        if save:
            save_checkpoint(engine, folder, 1, {}, 1, rank_state=generator_states())
        expected = torch.rand(3).tolist()
        torch.manual_seed(9)
        restore_generators(load_rank_state(folder / "checkpoints/step-00000001"))
        engine.destroy()
        return expected, torch.rand(3).tolist()


@pytest.mark.slow
def test_each_ranks_generators_go_on_where_there_are_as_many(tmp_path):
    first, second = run_distributed(generators, 2, tmp_path, True)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]
    [(expected, other)] = run_distributed(generators, 1, tmp_path, False)
    assert expected != other


def killed_while_saving(folder, rank, module, function, after):
    """Kills a rank before or after it calls `function` in its second save."""
    import importlib
    import os
    import signal

    from dalle_ds.training.checkpoint import save_checkpoint
    from dalle_ds.training.distributed import process_group

    with process_group() as ranks:
        engine = build(ranks.world_size, 3, "fp32", "AdamW", 0)
        train(engine, ranks, range(1))
        save_checkpoint(engine, folder, 1, {}, 1)
        train(engine, ranks, range(1, 2))
        place = importlib.import_module(f"dalle_ds.{module}")
        real = getattr(place, function)

        def fatal(*arguments, **keywords):
            if after:
                real(*arguments, **keywords)
            os.kill(os.getpid(), signal.SIGKILL)

        if ranks.rank == rank:
            setattr(place, function, fatal)
        save_checkpoint(engine, folder, 2, {}, 1)


def resume_after_kill(folder):
    from dalle_ds.training.checkpoint import load_checkpoint, save_checkpoint
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.run import open_run

    steps = []
    with process_group() as ranks:
        for run in sorted(Path(folder).iterdir()):
            engine = build(ranks.world_size, 3, "fp32", "AdamW", 1)
            start, _ = load_checkpoint(engine, open_run(run, "auto"))
            losses = train(engine, ranks, range(start, 3))
            save_checkpoint(engine, run, 3, {}, 1)
            left = sorted(path.name for path in (run / "checkpoints").iterdir())
            steps.append((run.name, start, losses[-1], left))
            engine.destroy()
    return steps


KILLS = {
    "0-begun": (0, "storage.folders", "begin", True, 1),
    "1-shard": (1, "training.checkpoint", "write_pieces", False, 1),
    "2-documents": (0, "training.checkpoint", "write_json", True, 1),
    "3-read-again": (1, "training.checkpoint", "_read_again", True, 1),
    "4-published": (0, "storage.folders", "publish", True, 2),
}


@pytest.mark.slow
def test_a_rank_killed_at_any_point_of_a_save_costs_no_checkpoint(tmp_path):
    for name, (rank, module, function, after, _) in KILLS.items():
        with pytest.raises(Exception, match=r"SIGKILL|signal 9|terminated"):
            run_distributed(killed_while_saving, 2, tmp_path / name, rank, module, function, after)
    results = run_distributed(resume_after_kill, 2, tmp_path)[0]
    assert [(name, start) for name, start, *_ in results] == [(name, kill[-1]) for name, kill in KILLS.items()]
    assert len({loss for _, _, loss, _ in results}) == 1, "bit for bit, wherever it was killed"
    assert all(left == ["step-00000003"] for *_, left in results)
