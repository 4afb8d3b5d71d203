"""Real runs that are asked to stop: they save, end with 85, and go on to the weights of an undisturbed run."""

import json
import signal
import sys
import time

import pytest
from programs import LIMIT, ROOT, Ranks, assert_same_weights, read_lines

from dalle_ds.training.metrics import read_metrics

STEPS, BATCH = 100, 4


def last_step(out):
    """The last step that metrics.jsonl tells of; its last line may be half written."""
    return max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)


def small_batches(folder):
    """A DeepSpeed JSON whose steps are short."""
    config = json.loads((ROOT / "ds_configs/cpu_zero3.json").read_text())
    (folder / "small.json").write_text(json.dumps({**config, "train_micro_batch_size_per_gpu": BATCH}))
    return folder / "small.json"


class Run(Ranks):
    """Two ranks of launch/train_prior.py, without a launcher, so that each can be signalled by itself."""

    def __init__(self, chain, out, *flags):
        self.out = out
        command = [sys.executable, ROOT / "launch/train_prior.py"]
        command += chain.train_prior(out, "--loop.steps", STEPS, "--resume", "auto", *flags)[1:]
        command += ["--deepspeed_config", small_batches(chain.root)]
        super().__init__(command, 2)

    def wait_for_step(self, step):
        deadline = time.monotonic() + LIMIT
        while last_step(self.out) < step:
            assert time.monotonic() < deadline, f"no step {step} after {LIMIT} s"
            assert all(rank.poll() is None for rank in self.ranks), self.ended()
            time.sleep(0.02)


# Signals, and the rank that gets each: one is enough, a second one is not fatal, and all ranks get them under SLURM.
CASES = {
    "one-rank": [(signal.SIGUSR1, 1)],
    "two-signals": [(signal.SIGTERM, 0), (signal.SIGTERM, 0)],
    "all-ranks": [(signal.SIGUSR1, 0), (signal.SIGUSR1, 1), (signal.SIGTERM, 1)],
}


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_ends_with_85_and_goes_on_to_the_same_weights(chain, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Run(chain, whole) as run:
        run.wait_for_step(1)
        assert run.ended()[0] == [0, 0]
    saved = []
    for signals in CASES.values():
        with Run(chain, broken) as run:
            run.wait_for_step((saved[-1] if saved else 0) + 3)
            for number, rank in signals:
                run.ranks[rank].send_signal(number)
            codes, said = run.ended()
        assert codes == [85, 85], said
        saved.append(last_step(broken))
        assert said[0].count(f"dalle-ds train-prior: saved step {saved[-1]}; go on with --resume auto") == 1
        assert "Traceback" not in said[0] + said[1]
        assert (broken / f"checkpoints/step-{saved[-1]:08d}/complete.json").exists()
    assert saved[-1] < STEPS
    with Run(chain, broken) as run:
        assert run.ended()[0] == [0, 0]
    lines = read_lines(broken, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_lines(whole, "train")]
    assert_same_weights(whole, broken)
