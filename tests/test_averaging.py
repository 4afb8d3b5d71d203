"""The running average: its arithmetic; the same on any rank, ZeRO stage and precision; in and out of its pieces."""

import itertools
import threading
import types
from pathlib import Path

import pytest
import torch
from helpers import run_distributed
from torch import nn

from dalle_ds.storage.pieces import PieceReader, write_pieces
from dalle_ds.training import averaging
from dalle_ds.training.averaging import ParameterAverage

N_IN, GLOBAL_BATCH, STEPS, DECAY = 6, 8, 5, 0.8
# The weights of two ways to train differ by so much after these steps (see test_training.py).
WEIGHT_TOLERANCE = 2e-5
# A lerp in float32 against the same sum in float64, of numbers around 1.
LERP_TOLERANCE = 1e-6


class Tiny(nn.Module):
    """Sizes that two ranks do not divide evenly."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(N_IN, 7), nn.Linear(7, 1)

    def forward(self, x, y):
        return (self.last(torch.tanh(self.first(x.to(self.first.weight.dtype)))).float() - y).square().mean()


# --- arithmetic -------------------------------------------------------------------------------------------------------


def plain_engine(model):
    """What the average needs of an engine, without DeepSpeed: ZeRO off, float32."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return types.SimpleNamespace(
        module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0, device=torch.device("cpu")
    )


@torch.no_grad()
def move(model, step):
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i)))


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_weighted_sum_of_all_past_weights_that_the_decays_give(every):
    model = Tiny()
    average = ParameterAverage(plain_engine(model), DECAY, every)
    expected = [parameter.detach().double() for parameter in model.parameters()]
    n = 0
    for step in range(1, 61):
        move(model, step)
        average.update()
        if step % every == 0:
            decay = min(DECAY, (1 + n) / (10 + n))
            expected = [decay * e + (1 - decay) * p for e, p in zip(expected, model.parameters(), strict=True)]
            n += 1
    assert (average.n_steps, average.n_updates) == (60, n)
    for tensor, e in zip(average.tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), e, rtol=0, atol=LERP_TOLERANCE)


def test_the_initial_weights_are_soon_forgotten_and_the_papers_decay_is_reached():
    """With 0.999 from the start 90% of the average would be initial weights after 100 steps."""
    model = Tiny()
    average = ParameterAverage(plain_engine(model), 0.999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        average.restart()
        for tensor in average.tensors:
            tensor.fill_(1.0)
    for _ in range(100):
        average.update()
    assert all(float(tensor.max()) < 1e-9 for tensor in average.tensors)
    average.n_updates = 8_990
    for tensor in average.tensors:
        tensor.fill_(1.0)
    average.update()
    assert all(tensor.allclose(torch.tensor(0.999), atol=1e-7, rtol=0) for tensor in average.tensors)


def test_in_use_the_model_is_the_average_and_afterwards_bit_for_bit_what_it_was():
    model = Tiny()
    average = ParameterAverage(plain_engine(model), DECAY)
    move(model, 1)
    average.update()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    kept = [tensor.clone() for tensor in average.tensors]
    with average.in_use():
        assert all(p.equal(t) for p, t in zip(model.parameters(), kept, strict=True))
        assert not any(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(t.equal(k) for t, k in zip(average.tensors, kept, strict=True))


def reader_of(average, path):
    """The pieces of an average on one rank, as a checkpoint has them."""
    write_pieces(path, average.pieces(), {})
    return PieceReader([path])


def test_decay_0_keeps_nothing_and_is_the_weights_themselves(tmp_path):
    model = Tiny()
    average = ParameterAverage(plain_engine(model), 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    average.update()
    assert average.tensors == []
    with average.in_use():
        assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert list(average.pieces()) == []
    with reader_of(average, tmp_path / "pieces") as pieces:
        average.load(average.state_dict(), pieces)
    assert average.tensors == []


# --- beside training --------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Holds the thread that averages back until it is opened."""
    opened, mix = threading.Event(), averaging._mix

    def held(*arguments):
        assert opened.wait(timeout=60)
        mix(*arguments)

    monkeypatch.setattr(averaging, "_mix", held)
    yield opened
    opened.set()


def test_weights_that_change_while_the_thread_is_at_work_do_not_reach_the_average(gate):
    model = Tiny()
    average = ParameterAverage(plain_engine(model), DECAY)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    move(model, 1)
    average.update()  # comes back though the thread cannot go on
    for e, parameter in zip(expected, model.parameters(), strict=True):
        e.lerp_(parameter.detach(), 1 - 1 / 10)
    average.wait_for_copy()
    move(model, 2)
    gate.set()
    assert all(tensor.equal(e) for tensor, e in zip(average.tensors, expected, strict=True)), "bit for bit"


@pytest.mark.parametrize("piece", [3, 2**24])
def test_it_is_bit_for_bit_what_averaging_at_once_gives(monkeypatch, piece):
    monkeypatch.setattr(averaging, "PIECE", piece)
    model = Tiny().half()  # the optimizer's weights have 16 bits where there are no finer ones
    average = ParameterAverage(plain_engine(model), 0.99, every=2)
    expected = [parameter.detach().float() for parameter in model.parameters()]
    for step in range(1, 101):
        move(model, step)
        average.update()
        if step % 2 == 0:
            n = step // 2 - 1
            for e, parameter in zip(expected, model.parameters(), strict=True):
                e.lerp_(parameter.detach().float(), 1 - min(0.99, (1 + n) / (10 + n)))
    assert {tensor.dtype for tensor in average.tensors} == {torch.float32}
    for tensor, e in zip(average.tensors, expected, strict=True):
        # A vector unit rounds a * b + c once, and may leave the last few elements to instructions that round twice.
        torch.testing.assert_close(tensor, e, rtol=0, atol=LERP_TOLERANCE if piece == 3 else 0)


def test_the_device_copies_before_the_optimizer_goes_on_and_the_thread_waits_for_the_copy():
    """In the order that a stream beside the default one needs; on a CPU the same calls are made."""
    calls = []

    def call(name):
        return lambda *arguments: calls.append(name)

    event = types.SimpleNamespace(record=call("record"), synchronize=call("synchronize"))
    default = types.SimpleNamespace(wait_event=call("optimizer waits"))
    model = Tiny()
    average = ParameterAverage(plain_engine(model), DECAY, every=2)
    average._stream = types.SimpleNamespace(wait_stream=call("copy waits"))
    average._backend = types.SimpleNamespace(
        current_stream=lambda: default, stream=torch.cpu.stream, Event=lambda: event, Stream=torch.cpu.Stream
    )
    average.update()
    average.wait_for_copy()
    assert calls == [], "nothing is copied every other step"
    average.update()
    assert average.tensors
    assert calls == ["copy waits", "record", "synchronize"]
    average.wait_for_copy()
    average.wait_for_copy()
    assert calls[3:] == ["optimizer waits"]


def test_what_fails_in_the_thread_is_raised_where_the_average_is_next_needed(monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(averaging, "_mix", broken)
    model = Tiny()
    average = ParameterAverage(plain_engine(model), DECAY)
    average.update()
    with pytest.raises(MemoryError, match="no room"):
        average.update()


def test_an_average_of_16_bit_weights_comes_back_exactly(tmp_path):
    model = Tiny().bfloat16()
    average = ParameterAverage(plain_engine(model), DECAY)
    for step in range(3):
        move(model, step)
        average.update()
    before, kept = [p.detach().clone() for p in model.parameters()], [t.clone() for t in average.tensors]
    state = average.state_dict()
    with reader_of(average, tmp_path / "pieces") as pieces:
        average.restart()
        average.load(state, pieces)
    assert {tensor.dtype for tensor in average.tensors} == {torch.float32}, "not rounded to the weights' bits"
    assert all(tensor.equal(k) for tensor, k in zip(average.tensors, kept, strict=True))
    assert (average.n_steps, average.n_updates) == (3, 3)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_run_that_kept_no_average_begins_one_at_its_present_weights(tmp_path):
    model = Tiny()
    none, average = (ParameterAverage(plain_engine(model), decay) for decay in (0.0, DECAY))
    average.update()
    move(model, 1)
    with reader_of(none, tmp_path / "pieces") as pieces:
        average.load(none.state_dict(), pieces)
    assert (average.n_steps, average.n_updates) == (0, 0)
    assert all(tensor.equal(p) for tensor, p in zip(average.tensors, model.parameters(), strict=True))


# --- under DeepSpeed --------------------------------------------------------------------------------------------------


def ds_config(world_size, stage, precision):
    """fp16 starts at a loss scale that overflows, so that the first steps are skipped."""
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
        if stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":
        config["fp16"] |= {"loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1}
    return config


def global_batch(step):
    x = torch.randn(GLOBAL_BATCH, N_IN, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True).sin()


def weights_in_use(engine):
    from dalle_ds.training.engine import whole_model

    with whole_model(engine) as model:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_with_average(folder, cases):
    """Of each (stage, precision) what it must hold, checked on every rank; returns rank 0's averages and losses."""
    from dalle_ds.training.distributed import process_group

    results = []
    with process_group() as ranks:
        for stage, precision in cases:
            results.append(train_one(Path(folder) / f"{stage}-{precision}", ranks, stage, precision))
        # Where each case finds the average of another one.
        for (stage, precision), (other_stage, other) in itertools.pairwise(cases):
            check_it_goes_on_elsewhere(Path(folder) / f"{stage}-{precision}", ranks, other_stage, other)
    return results


def save(engine, average, run):
    """The whole average by name, as a checkpoint has it; every rank reads all of it."""
    from dalle_ds.storage.folders import open_pieces
    from dalle_ds.training.checkpoint import save_checkpoint

    checkpoint = save_checkpoint(engine, run, STEPS, average.state_dict(), 1, pieces=average.pieces())
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    with open_pieces(checkpoint) as pieces:
        return checkpoint, {
            name: pieces.read(name, "average", 0, shape.numel()).view(shape).clone() for name, shape in shapes.items()
        }


def load(engine, average, checkpoint):
    from dalle_ds.training.checkpoint import load_checkpoint

    load_checkpoint(engine, checkpoint, average.load)


def check_it_goes_on_elsewhere(run, ranks, stage, precision):
    """What one stage has saved, another takes up bit for bit, with its number of updates."""
    from dalle_ds.storage.folders import complete_checkpoints, open_pieces
    from dalle_ds.training.construction import build_engine

    engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size, stage, precision), 4)
    average = ParameterAverage(engine, DECAY)
    [checkpoint] = complete_checkpoints(run)
    load(engine, average, checkpoint)
    _, again = save(engine, average, run.with_name(f"{run.name}-in-{stage}-{precision}"))
    with open_pieces(checkpoint) as pieces:
        for name, tensor in again.items():
            assert tensor.flatten().equal(pieces.read(name, "average", 0, tensor.numel())), name
    assert average.n_updates == STEPS
    engine.destroy()


def train_one(run, ranks, stage, precision):
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.engine import backward
    from dalle_ds.training.whole_weights import whole_weights

    engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size, stage, precision), 3)
    average = ParameterAverage(engine, DECAY)
    expected = {name: tensor.double() for name, tensor in whole_weights(engine)}
    losses, applied = [], []
    for step in range(STEPS):
        while True:  # a skipped step comes again, at a lower loss scale
            x, y = (t[ranks.rank :: ranks.world_size] for t in global_batch(step))
            loss = engine(x, y)
            backward(engine, loss)
            engine.step()
            applied.append(engine.was_step_applied())
            if applied[-1]:
                break
        average.update()
        losses.append(float(loss.detach()))
        masters = dict(whole_weights(engine))
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * e + (1 - decay) * masters[name] for name, e in expected.items()}
    before = weights_in_use(engine)
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert master.to(before[name].dtype).equal(before[name]), "the model computes with a copy of the masters"
        assert master.equal(before[name].float()) == (precision == "fp32"), "which are finer in 16-bit training"
    checkpoint, saved = save(engine, average, run)
    for name, e in expected.items():
        torch.testing.assert_close(saved[name].double(), e, rtol=0, atol=LERP_TOLERANCE)
    with average.in_use():
        for name, used in weights_in_use(engine).items():
            assert used.equal(saved[name].to(used.dtype)), name
    assert all(used.equal(before[name]) for name, used in weights_in_use(engine).items())
    average.restart()
    load(engine, average, checkpoint)
    _, again = save(engine, average, run.with_name(f"{run.name}-again"))
    assert all(tensor.equal(saved[name]) for name, tensor in again.items()), "bit for bit"
    assert (average.n_steps, average.n_updates) == (STEPS, STEPS)
    assert all(used.equal(before[name]) for name, used in weights_in_use(engine).items())
    engine.destroy()
    return losses, applied, saved


CASES = {
    1: [(0, "fp32"), (0, "fp16"), (0, "bf16"), (1, "bf16"), (2, "fp16")],
    2: [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "fp16", "bf16")],
}
# Weights and gradients cut to 11 and to 8 significant bits, through five steps of Adam of 1e-2 each.
LOSS_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_any_stage_and_precision_averages_its_float32_weights_saves_and_restores_them(tmp_path, world_size):
    by_rank = run_distributed(train_with_average, world_size, tmp_path, CASES[world_size])
    results = dict(zip(CASES[world_size], by_rank[0], strict=True))
    losses, _, averages = results[0, "fp32"]
    assert losses[-1] < losses[0]
    for (stage, precision), (other_losses, applied, saved) in results.items():
        case = f"stage {stage}, {precision}"
        assert other_losses == pytest.approx(losses, abs=LOSS_TOLERANCE[precision]), case
        assert (False in applied) == (precision == "fp16"), case
        if precision == "fp32":
            for name, tensor in averages.items():
                torch.testing.assert_close(saved[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE, msg=case)
