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
                requests.post(step + 1)
                asked = requests.agreed()
                seen.append((asked.stop, asked.halve))
        restored = [signal.getsignal(number) for number in STOPS] == before
    return seen, restored, requests.n_signals


@pytest.mark.parametrize("world_size", [2])
def test_ranks_agree_on_the_step_and_the_file_is_taken_once(tmp_path, world_size):
    by_rank = run_distributed(ask_between_steps, world_size, tmp_path)
    agreed = [(False, False), (False, False), (True, False), (True, True), (True, False)]
    assert by_rank == [(agreed, True, 0), (agreed, True, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["halve-learning-rate-after-00000004"]


def halve_and_go_back(folder):
    """After which steps the rate is halved: asked before the second, then gone back to the first, then asked anew."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import HALVE_FILE, Requests

    halved, run = [], Path(folder)
    with process_group(), Requests(run) as requests:
        for step in (1, 2, 3, 1, 2, 3, 3, 4):
            if (step, len(halved)) in ((2, 0), (2, 1)):
                (run / HALVE_FILE).touch()
            requests.post(step)
            if requests.agreed().halve:
                halved.append(step)
    return halved


def test_a_halving_that_was_taken_comes_again_after_the_same_step_and_not_later(tmp_path):
    """Bug: it was lost where a run died before its next checkpoint. One asked for while that comes again comes too."""
    [halved] = run_distributed(halve_and_go_back, 1, tmp_path)
    assert halved == [2, 2, 3, 3]
    after = [f"halve-learning-rate-after-0000000{step}" for step in (2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == after


def fail_with_a_request_under_way(folder):
    """Rank 0 fails between post and agreed, rank 1 after it: what was under way must not hold either of them."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import Requests

    with contextlib.suppress(KeyError), process_group() as ranks, Requests(Path(folder)) as requests:
        requests.post(1)
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
            assert requests.wants_stop()
            requests.post(1)
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


def train_until_asked_meanwhile(folder, asks, save_every):
    """What a loop of three actions does when rank 1 is asked to stop while one of them, of a step, is under way."""
    from dalle_ds.config import Preempted
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.requests import Requests

    done = []

    def action(name):
        def act(step):
            done.append((name, step))
            if (rank, name, step) == (1, *asks):
                os.kill(os.getpid(), signal.SIGTERM)

        return act

    with process_group() as ranks:
        rank = ranks.rank
        engine = build_engine(lambda precision: Tiny(), ds_config(ranks.world_size), 0)
        save = action("save")
        actions = [(save_every, save), (2, action("evaluate")), (2, action("sample"))]
        with Requests(Path(folder)) as requests:
            try:
                run_training(engine, folder, requests=requests, actions=actions, save=save)
            except Preempted as stop:
                done.append(str(stop))
        engine.destroy()
    return done


MEANWHILE = {
    # The action and step in which the signal comes, and steps between saves; what is done, from that step on.
    (("save", 2), 2): ["save"],
    (("evaluate", 2), 2): ["save", "evaluate"],
    (("evaluate", 2), 3): ["evaluate", "save"],
    (("sample", 2), 3): ["evaluate", "sample", "save"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("asks", "save_every"), MEANWHILE, ids=str)
def test_a_signal_that_comes_while_a_run_evaluates_is_seen_before_another_step(tmp_path, asks, save_every):
    expected = [(name, 2) for name in MEANWHILE[asks, save_every]]
    for done in run_distributed(train_until_asked_meanwhile, 2, tmp_path, asks, save_every):
        assert done == [*expected, "saved step 2; go on with --resume auto"]


@pytest.mark.slow
def test_a_signal_in_the_last_actions_changes_nothing(tmp_path):
    for done in run_distributed(train_until_asked_meanwhile, 2, tmp_path, ("save", STEPS), 0):
        assert done[-3:] == [("save", STEPS), ("evaluate", STEPS), ("sample", STEPS)]


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
