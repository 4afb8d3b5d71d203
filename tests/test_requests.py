"""Requests to a running job: all ranks agree on the step, signals are not fatal, a file is taken once."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from helpers import run_distributed
from test_training import STEPS, Tiny, ds_config, logged, rate, run_training

from dalle_ds.cli import main

STOPS = (signal.SIGTERM, signal.SIGUSR1)


def ask_between_steps(folder):
    """What both ranks agree on at five steps: a signal to rank 1 before the third, a file before the fourth."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import HALVE_FILE, Requests

    seen = []
    with process_group() as ranks:
        before = [signal.getsignal(number) for number in STOPS]
        with Requests(Path(folder)) as requests:
            for step in range(5):
                if (step, ranks.rank) == (2, 1):
                    os.kill(os.getpid(), signal.SIGUSR1)
                if (step, ranks.rank) == (3, 0):
                    (Path(folder) / HALVE_FILE).touch()
                requests.post()
                asked = requests.agreed()
                seen.append((asked.stop, asked.halve))
        restored = [signal.getsignal(number) for number in STOPS] == before
    return seen, restored, requests.n_signals


@pytest.mark.parametrize("world_size", [2])
def test_ranks_agree_on_the_step_and_the_file_is_taken_once(tmp_path, world_size):
    by_rank = run_distributed(ask_between_steps, world_size, tmp_path)
    agreed = [(False, False), (False, False), (True, False), (True, True), (True, False)]
    assert by_rank == [(agreed, True, 0), (agreed, True, 1)]
    assert list(tmp_path.iterdir()) == []


def fail_with_a_request_under_way(folder):
    """Rank 0 fails between post and agreed, rank 1 after it: what was under way must not hold either of them."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import Requests

    with contextlib.suppress(KeyError), process_group() as ranks, Requests(Path(folder)) as requests:
        requests.post()
        if ranks.rank == 1:
            assert not requests.agreed().stop
        raise KeyError("ours")


def test_a_rank_that_fails_with_a_request_under_way_ends(tmp_path):
    run_distributed(fail_with_a_request_under_way, 2, tmp_path)


def signal_one_rank(folder):
    """The lines of three signals, and what becomes of handlers: alone, so that no other rank is needed."""
    from dalle_ds.config import Preempted
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import Requests

    read, write = os.pipe()
    error = os.dup(2)
    os.dup2(write, 2)
    try:
        with contextlib.suppress(Preempted), process_group(), Requests(Path(folder)) as requests:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            requests.post()
            assert requests.agreed().stop
            raise Preempted("saved")
    finally:
        os.dup2(error, 2)
        os.close(write)
    for number in STOPS:  # nothing may come between the save and the exit code
        os.kill(os.getpid(), number)
    handlers = [signal.getsignal(number) for number in STOPS]
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    return os.read(read, 10_000).decode().splitlines(), handlers


def test_each_signal_is_answered_with_a_line_and_none_is_fatal(tmp_path):
    [(lines, handlers)] = run_distributed(signal_one_rank, 1, tmp_path)
    assert [line for line in lines if line.startswith("SIG")] == [
        "SIGUSR1: the run saves and stops after the next step",
        "SIGTERM: the run saves and stops after the next step, as asked before (2 signals)",
        "SIGUSR1: the run saves and stops after the next step, as asked before (3 signals)",
    ]
    assert handlers == [signal.SIG_IGN, signal.SIG_IGN]


def train_until_asked(folder, ask_at, evaluate_every):
    """The order in which a loop acts when rank 1 is asked to stop as step `ask_at` ends, and how it ends.

    Rank 0 is asked to halve the learning rate as the first step ends.
    """
    from dalle_ds.config import Preempted
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import HALVE_FILE, Requests
    from dalle_ds.training.schedules import ScheduledRate

    run, done, learning_rate = Path(folder), [], ScheduledRate(rate)

    def ask(index):
        """Called when a step's line is written, after the ranks have agreed on what was asked before the step."""
        if (rank, index + 1) == (1, ask_at):
            os.kill(os.getpid(), signal.SIGTERM)
        if (rank, index + 1) == (0, 1):
            (run / HALVE_FILE).touch()
        return {}

    def save(step):
        done.append(("save", step, learning_rate.state_dict()["n_halved"]))

    with process_group() as ranks:
        rank = ranks.rank
        engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size), 0)
        actions = [(evaluate_every, lambda step: done.append(("evaluate", step))), (0, save)]
        arguments = {"learning_rate": learning_rate, "scalars": ask, "actions": actions, "save": save}
        with Requests(run) as requests:
            try:
                run_training(engine, run, requests=requests, **arguments)
            except Preempted as stop:
                done.append(str(stop))
        engine.destroy()
    return done


@pytest.mark.slow
def test_a_loop_that_is_asked_to_stop_saves_after_the_next_step_and_evaluates_nothing(tmp_path):
    for done in run_distributed(train_until_asked, 2, tmp_path, 2, 3):
        assert done == [("save", 3, 1), "saved step 3; go on with --resume auto"]
    # Asked for in step 1, agreed on in step 2, at work from step 3.
    rates = logged(tmp_path, "learning_rate")
    assert rates == pytest.approx([rates[0] * factor for factor in (1, 2, 3 / 2)])


@pytest.mark.slow
def test_a_loop_that_is_asked_to_stop_in_its_last_steps_saves_first_and_then_does_what_comes_once(tmp_path):
    for done in run_distributed(train_until_asked, 2, tmp_path, STEPS - 1, 0):
        assert done == [("save", STEPS, 1), ("evaluate", STEPS), f"saved step {STEPS}; go on with --resume auto"]


# --- dalle-ds halve-learning-rate -------------------------------------------------------------------------------------


def test_a_run_is_asked_once_until_it_has_taken_the_request(tmp_path, capsys):
    assert main(["halve-learning-rate", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("{}")
    assert main(["halve-learning-rate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: the learning rate is halved after the next step\n"
    assert main(["halve-learning-rate", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "has not been taken" in error
    assert error.count("\n") == 1
