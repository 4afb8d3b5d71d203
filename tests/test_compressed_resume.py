"""Hierarchical runs with PowerSGD that stop and go on: on other machines the error buffers are taken up whole."""

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed
from test_construction import ds_config, make_engine, train

from dalle_ds.config import LoopConfig

N = 3
# Nothing is rounded but by float32 itself.
IN_FULL = {"gradient_compression": {"type": "powersgd", "matrix_rank": 4, "wire": "full", "errors": "full"}}
IN_16_BITS = {"gradient_compression": {"type": "powersgd", "matrix_rank": 4}}
# Sums over machines in another order, before P is made orthonormal and Adam divides by roots of squares.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


class Place:
    """Stands for a reader or a schedule."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def make_state(world_size, machine_size, sections, seed=0):
    from dalle_ds.training.averaging import ParameterAverage
    from dalle_ds.training.run_state import RunState

    config = ds_config(3, world_size, **sections, hierarchical_sharding={"machine_size": machine_size})
    engine = make_engine(config, seed)
    return RunState(engine, ParameterAverage(engine, decay=0.0), Place(), Place())


def whole_errors(engine):
    """Mean error buffers over machines, of whole parameters; they become that mean on each machine, as in a save."""
    path = engine.extras.path
    pieces = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, [(piece.name, piece.begin, piece.tensor.float()) for piece in path.pieces()])
    errors = {name: torch.zeros(p.ds_numel) for name, p in engine.module.named_parameters()}
    held = {name for of_rank in pieces for name, _, _ in of_rank}
    for of_rank in pieces:
        for name, begin, tensor in of_rank:
            errors[name][begin : begin + len(tensor)] = tensor[: len(errors[name]) - begin]
    shapes = {name: p.ds_shape for name, p in engine.module.named_parameters()}
    return {name: errors[name].view(shapes[name]) for name in held}


def follow(engine):
    """Losses of N more steps, and the gradients that each update was given on this rank."""
    path, gradients = engine.extras.path, []
    take = path.take

    def keep(*args, **settings):
        taken = take(*args, **settings)
        gradients[-1] |= {name: gradient.detach().clone() for name, gradient in taken.items()}
        return taken

    path.take = keep
    log = train(engine, range(N, 2 * N), before=lambda step: gradients.append({}))
    return [loss for loss, _, _ in log], gradients


def save(folder, world_size, machine_size, sections):
    from dalle_ds.training.distributed import process_group

    with process_group():
        state = make_state(world_size, machine_size, sections)
        train(state.engine, range(N))
        path = state.save(folder, N, LoopConfig())
        result = path, whole_errors(state.engine), *follow(state.engine)
        state.engine.destroy()
    return result


def resume(path, shapes, sections):
    """Of each (number of ranks, size of a machine): the errors that were taken up, losses and gradients."""
    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group():
        for world_size, machine_size in shapes:
            state = make_state(world_size, machine_size, sections, seed=1)
            assert state.restore(path) == N
            results[world_size, machine_size] = whole_errors(state.engine), *follow(state.engine)
            state.engine.destroy()
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of two machines with two ranks each, by rank."""
    return run_distributed(save, 4, tmp_path_factory.mktemp("saved"), 4, 2, IN_FULL)


@pytest.mark.slow
def test_on_one_of_two_machines_later_gradients_are_the_same(saved):
    """The shards are the same, and of the errors their mean is all that matters."""
    path, errors, losses, _ = saved[0]
    for rank, by_shape in enumerate(run_distributed(resume, 2, path, [(2, 2)], IN_FULL)):
        resumed_errors, resumed_losses, resumed = by_shape[2, 2]
        assert all(errors[name].equal(resumed_errors[name]) for name in errors)
        assert max(float(error.abs().max()) for error in errors.values()) > 1e-3  # else there is nothing to take up
        assert resumed_losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
        gradients = saved[rank][3]
        assert len(gradients) == len(resumed) == N
        for before, after in zip(gradients, resumed, strict=True):
            assert before.keys() == after.keys()
            scale = sum(float(gradient.square().sum()) for gradient in before.values()) ** 0.5
            for name, gradient in before.items():
                assert float((gradient - after[name]).norm()) <= GRADIENT_TOLERANCE * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("sections", [IN_FULL, IN_16_BITS], ids=["full", "16-bit"])
def test_machines_of_another_size_take_up_the_same_errors(saved, sections):
    """Other shards have other factors, so that later updates differ; what was left of earlier ones is all there."""
    path, errors, losses, _ = saved[0]
    tolerance = 0.0 if sections is IN_FULL else 2.0**-10  # half a step of 9 bits of significand
    for by_shape in run_distributed(resume, 4, path, [(4, 1), (4, 4)], sections):
        for resumed_errors, resumed_losses, _ in by_shape.values():
            for name, error in errors.items():
                assert float((error - resumed_errors[name]).norm()) <= tolerance * float(error.norm())
            # That of the same weights, before any update.
            assert resumed_losses[0] == pytest.approx(losses[0], abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_a_run_that_compressed_nothing_goes_on_with_compression_at_no_error(tmp_path):
    [(path, _, losses, _), _] = run_distributed(save, 2, tmp_path, 2, 1, {})
    for by_shape in run_distributed(resume, 2, path, [(2, 1)], IN_FULL):
        errors, resumed_losses, _ = by_shape[2, 1]
        assert len(errors) == 12  # six matrices a layer
        assert not any(error.any() for error in errors.values())
        assert resumed_losses[0] == pytest.approx(losses[0], abs=LOSS_TOLERANCE)
