"""Training under DeepSpeed in real processes: equal to a plain loop, the same on any number of ranks, resumable."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import run_distributed
from torch import nn

N_IN, GLOBAL_BATCH, STEPS, PEAK, SEED = 6, 8, 6, 1e-2, 3
# float32 sums over ranks and shards in another order, through a few AdamW steps.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 2e-5


class Tiny(nn.Module):
    """Matrices, vectors and a gain, as the real models have; sizes that two ranks do not divide evenly."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(N_IN, 7), nn.LayerNorm(7), nn.Linear(7, 1)

    def forward(self, x, y):
        return {"loss": (self.last(torch.tanh(self.norm(self.first(x)))) - y).square().mean()}


def is_first_layer(name):
    return name.startswith("first.")


def rate(step):
    return (step + 1) / STEPS


def global_batch(step, micro_step=0):
    x = torch.randn(GLOBAL_BATCH, N_IN, generator=torch.Generator().manual_seed(100 * step + micro_step))
    return x, x.sum(1, keepdim=True).sin()


def ds_config(world_size, stage=0, accumulation=1):
    optimizer = {"type": "AdamW", "params": {"lr": PEAK, "weight_decay": 0.1, "torch_adam": True}}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
        "gradient_accumulation_steps": accumulation,
        "optimizer": optimizer,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def plain_loop(accumulation=1, multiplier=1.0):
    """The oracle: torch alone, on the whole batch. Returns the loss of each step and the weights after the last."""
    torch.manual_seed(SEED)
    model = Tiny()
    groups = [
        {
            "params": [parameter],
            "weight_decay": 0.1 if parameter.dim() > 1 and parameter.shape[0] > 1 else 0.0,
            "peak": PEAK * (multiplier if is_first_layer(name) else 1.0),
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK)
    losses = []
    for step in range(STEPS):
        loss = sum(model(*global_batch(step, micro))["loss"] for micro in range(accumulation)) / accumulation
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def run_training(engine, run, *, average=None, start=0, steps=STEPS, actions=(), poisoned=None, log_every=1, **changed):
    """Trains as a command does; `poisoned` is a (rank, step) whose loss is not a number, `changed` are arguments."""
    from dalle_ds.training.averaging import ParameterAverage
    from dalle_ds.training.histograms import GradientHistograms
    from dalle_ds.training.loop import train
    from dalle_ds.training.metrics import MetricsLog
    from dalle_ds.training.requests import Requests
    from dalle_ds.training.schedules import ScheduledRate
    from dalle_ds.training.watch import Watch

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def step(batch, index, micro_step):
        x, y = (t[rank::world_size].clone() for t in global_batch(index, micro_step))
        if poisoned == (rank, index + 1):
            y[0] = math.nan
        return engine(x, y)

    arguments = {
        "start": start,
        "steps": steps,
        "learning_rate": ScheduledRate(rate),
        "scalars": lambda step: {"half_step": step / 2},
        "actions": list(actions),
        "save": lambda step: None,
        "log_every": log_every,
        "metrics": MetricsLog(Path(run) / "metrics.jsonl", start) if rank == 0 else None,
        "progress": None,
        "requests": Requests(Path(run)),
        "watch": Watch(timeout_minutes=30),
        "histograms": GradientHistograms(0, 0, engine.device, None),
    }
    train(
        engine, step, iter(lambda: {}, None), average or ParameterAverage(engine, decay=0.0), **{**arguments, **changed}
    )


def weights_of(engine):
    from dalle_ds.training.whole_weights import whole_weights

    return dict(whole_weights(engine))


def rates(multiplier):
    return lambda name: multiplier if is_first_layer(name) else 1.0


def train_each_stage(folder, cases):
    """Each (stage, accumulation, multiplier of the first layer's learning rate) in turn.

    Returns of each the number of parameters, the loss of the whole model on one batch, and the weights on rank 0.
    """
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.engine import n_parameters, whole_model

    results = []
    with process_group() as ranks:
        for i, (stage, accumulation, multiplier) in enumerate(cases):
            run = Path(folder) / str(i)
            run.mkdir(exist_ok=True)
            engine = build_engine(
                lambda precision: Tiny(), ds_config(ranks.world_size, stage, accumulation), SEED, rates(multiplier)
            )
            run_training(engine, run)
            with whole_model(engine) as model:
                assert not model.training
                evaluated = model(*global_batch(99))["loss"].item()
            assert engine.module.training
            results.append((n_parameters(engine), evaluated, weights_of(engine)))
            engine.destroy()
    return results


CASES = [(0, 1, 1.0), (2, 1, 1.0), (3, 1, 1.0), (0, 2, 1.0), (3, 2, 1.0), (0, 1, 3.0), (3, 1, 3.0)]


def logged(folder, name="loss"):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_equals_a_plain_loop_on_any_number_of_ranks(tmp_path, world_size):
    by_rank = run_distributed(train_each_stage, world_size, tmp_path, CASES)
    for i, (stage, accumulation, multiplier) in enumerate(CASES):
        case = f"stage {stage}, accumulation {accumulation}, multiplier {multiplier}"
        losses, weights = plain_loop(accumulation, multiplier)
        run = tmp_path / str(i)
        if accumulation == 1:
            assert logged(run) == pytest.approx(losses, abs=LOSS_TOLERANCE), case
        assert logged(run, "half_step") == [step / 2 for step in range(STEPS)]
        assert logged(run, "learning_rate") == pytest.approx([PEAK * multiplier * rate(step) for step in range(STEPS)])
        n_parameters, _, gathered = by_rank[0][i]
        assert n_parameters == sum(t.numel() for t in weights.values())
        assert gathered.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(gathered[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE, msg=f"{case}: {name}")
        model = Tiny()
        model.load_state_dict(weights)
        for rank_results in by_rank:  # every rank holds the whole model while it is in whole_model
            expected = model(*global_batch(99))["loss"].item()
            assert rank_results[i][1] == pytest.approx(expected, abs=LOSS_TOLERANCE), case
        assert all(results[i][2].keys() == weights.keys() for results in by_rank[1:])


def stop_and_resume(folder, stage):
    from dalle_ds.storage.folders import complete_checkpoints
    from dalle_ds.training.checkpoint import load_checkpoint, save_checkpoint
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group

    run = Path(folder)
    with process_group() as ranks:
        engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size, stage), SEED)
        save = (1, lambda step: save_checkpoint(engine, run, step, {"reader": step}, 2))
        run_training(engine, run, steps=3, actions=[save])
        kept = [path.name for path in complete_checkpoints(run)]
        engine.destroy()
        # Another seed: what equals the first run afterwards came from the checkpoint.
        other = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size, stage), SEED + 1)
        start, state = load_checkpoint(other, complete_checkpoints(run)[-1])
        run_training(other, run, start=start)
        weights = weights_of(other)
        other.destroy()
    return kept, start, state, weights


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_ends_where_an_unbroken_one_does_and_old_checkpoints_go(tmp_path, stage):
    by_rank = run_distributed(stop_and_resume, 2, tmp_path, stage)
    losses, weights = plain_loop()
    for kept, start, state, _ in by_rank:
        assert kept == ["step-00000002", "step-00000003"]
        assert start == 3
        assert state == {"reader": 3}
    assert logged(tmp_path) == pytest.approx(losses, abs=LOSS_TOLERANCE)
    for name, tensor in weights.items():
        torch.testing.assert_close(by_rank[0][3][name], tensor, rtol=0, atol=WEIGHT_TOLERANCE)


def train_into_a_nan(folder, poisoned):
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.loop import Diverged

    with process_group() as ranks:
        engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size), SEED)
        saved = []
        try:
            run_training(engine, folder, poisoned=poisoned, log_every=4, actions=[(4, saved.append)])
        except Diverged as error:
            return str(error), saved
        finally:
            engine.destroy()
    return "no error", saved


@pytest.mark.slow
@pytest.mark.parametrize("poisoned", [(1, 2), (0, 3)], ids=["rank1-step2", "rank0-step3"])
def test_a_loss_that_is_no_number_stops_every_rank_naming_the_first_and_nothing_is_saved(tmp_path, poisoned):
    results = run_distributed(train_into_a_nan, 2, tmp_path, poisoned)
    rank, step = poisoned
    for message, saved in results:
        assert f"first on rank {rank} at step {step}:" in message
        assert saved == []
    assert not (tmp_path / "metrics.jsonl").read_text()
