"""200 kills of a training run, each followed by --resume auto: it must end as if nothing had happened, bit for bit.

    python benchmarks/soak.py [--kills 200] [--seed 1]

The run: `dalle-ds train-prior` on 4 processes, two machines of two, as ds_configs/cpu_hierarchical.json has them: fp16
without master weights, a gradient scale a resblock, 16-bit moments, PowerSGD with 1-6-9 errors; averaged parameters,
dropout everywhere. What happens to it, and when, is drawn from the seed: SIGKILL of a rank at any moment; SIGTERM or
SIGUSR1 to a rank; SIGKILL of a rank while a checkpoint is written; a disk that is full from some moment on. After each,
every complete checkpoint is checked, the newest is compared with that of a run which nothing happened to, and the run
goes on. Writes benchmarks/results/<date>-soak.md; exit code 1 if anything was lost or differed. About a quarter of an
hour on 2 cores. A full disk needs the right to mount one; without it that kind is left out.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from parts.measuring import results_path
from parts.small_disk import SmallDisk
from parts.soak_blows import KINDS, Blow, draw, observe, strike
from parts.soak_folder import RunFolder, differences
from parts.soak_ranks import Ranks
from parts.soak_report import Arm, Outcome, Result, report
from parts.soak_run import WORLD_SIZE, Inputs, make_inputs

# With save_every above 1 a stop saves where an undisturbed run does not, and with every save the machines' error
# buffers become their mean: the same in exact arithmetic, other bits.
ARMS = (Arm(save_every=1, kinds=tuple(KINDS)), Arm(save_every=3, kinds=("kill", "kill in a save", "full disk")))
# Steps of a run for each kill that it is to take: about what an attempt gets done.
STEPS_A_KILL, FEWEST_STEPS = 1, 6
DISK_SIZE, KEEP = 8 * 2**20, 2
END_PATIENCE = 600.0  # seconds that an attempt may take which is left alone
LAUNCHER_PATIENCE = 1.0  # seconds after which a launcher kills the ranks that outlive another
FULL_IN_A_SAVE = "the disk is full"  # what a save says; what else is written says only what the system says
MOST_FAILURES = 3  # attempts that end by themselves, before the soak gives up


class Soak:
    """One arm: a run that nothing happens to, and runs that `n_kills` things happen to, compared with it."""

    def __init__(self, arm: Arm, n_kills: int, seed: int, folder: Path, inputs: Inputs) -> None:
        self.arm, self.n_kills, self.inputs, self.folder = arm, n_kills, inputs, folder
        self.seed = seed
        self.steps = max(FEWEST_STEPS, STEPS_A_KILL * n_kills)
        self.whole = RunFolder(folder / "whole")
        self.outcomes: list[Outcome] = []
        self.ends: list[list[str]] = []
        self.failures: list[str] = []
        self.usual: dict[str, float] = {}

    def command(self, out: Path, keep: int) -> list[str]:
        return self.inputs.command(out, steps=self.steps, save_every=self.arm.save_every, keep=keep)

    def run_whole(self) -> None:
        """The undisturbed run; it keeps all its checkpoints, and tells how long things take here."""
        log = self.folder / "whole.log"
        with Ranks(self.command(self.whole.path, self.steps), WORLD_SIZE, log) as ranks:
            self.usual = observe(ranks, self.whole)
            codes = ranks.end(END_PATIENCE, LAUNCHER_PATIENCE)
        if codes != [0] * WORLD_SIZE:
            raise RuntimeError(f"the undisturbed run ended with {codes}:\n{_tail(log)}")
        print(
            f"undisturbed, a checkpoint every {self.arm.save_every}: {self.steps} steps; seconds {self.usual}",
            flush=True,
        )

    def run_broken(self, seconds: float) -> None:
        """Run after run until all the blows have fallen, or time is up; the last run goes to its end undisturbed."""
        deadline = time.monotonic() + seconds
        rng = np.random.default_rng([self.seed, self.arm.save_every])
        self.checkpoint_size = sum(record["size"] for record in self.whole.records(self.steps).values())

        def is_over() -> bool:
            return len(self.outcomes) >= self.n_kills or time.monotonic() >= deadline

        blows: Iterator[Blow] = iter(())
        while not self.ends or not is_over():
            with SmallDisk(self.folder / f"broken-{len(self.ends)}", DISK_SIZE) as disk:
                run = RunFolder(disk.folder / "run")
                if not self.ends:
                    kinds = [kind for kind in self.arm.kinds if disk.can_fill or kind != "full disk"]
                    blows = draw(rng, kinds, WORLD_SIZE)
                while not self.attempt(run, disk, None if is_over() else next(blows)):
                    pass
                self.ends.append(self.compare_ends(run))

    def attempt(self, run: RunFolder, disk: SmallDisk, blow: Blow | None) -> bool:
        """Goes on with the run until the blow falls, if one does; whether the run has come to its end."""
        log = self.folder / f"attempt-{len(self.outcomes):03d}.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        run.begin()
        with Ranks(self.command(run.path, KEEP), WORLD_SIZE, log) as ranks:
            falls = blow is not None and blow.wait(ranks, run, self.usual)
            known, saving = run.newest(), run.saving()
            if blow is not None and falls:
                strike(blow, ranks, disk, self.checkpoint_size)
            codes = ranks.end(END_PATIENCE, LAUNCHER_PATIENCE)
        disk.clear()
        if codes == [0] * WORLD_SIZE:
            return True  # perhaps the blow came too late
        if blow is None or not falls:
            self.failures.append(f"a resumed run ended by itself with {codes}")
            print(f"{self.failures[-1]}:\n{_tail(log)}", flush=True)
            if len(self.failures) >= MOST_FAILURES:
                raise RuntimeError(f"{self.failures[-1]}, as others before")
            return False
        outcome = self.judge(run, blow, known, codes, log.read_text() if log.exists() else "", bool(saving))
        self.outcomes.append(outcome)
        print(
            f"{len(self.outcomes):4d}  {blow.kind:15} {blow.phase:13} rank {blow.rank}  codes {codes}  "
            f"step {outcome.reached}, newest checkpoint {outcome.newest}, {time.monotonic() - began:.1f} s"
            + "".join(f"\n      {problem}" for problem in outcome.problems),
            flush=True,
        )
        return False

    def judge(self, run: RunFolder, blow: Blow, known: int, codes: list[int], said: str, in_save: bool) -> Outcome:
        """What was lost: `known` is the step of the newest checkpoint that was complete before the blow."""
        newest, reached = run.newest(), run.last_step()
        if blow.kind == "full disk":
            in_save = FULL_IN_A_SAVE in said
        # A step is told of when the saves of all steps before it are done.
        due = max(known, (reached - 1) // self.arm.save_every * self.arm.save_every, run.start)
        problems = run.faults()
        if newest < due:
            problems.append(f"LOST: the newest checkpoint is of step {newest}, and {due} was complete")
        if newest and run.records(newest) != self.whole.records(newest):
            names = differences(run.checkpoint(newest), self.whole.checkpoint(newest), run.records(newest))
            problems.append(f"checkpoint {newest} differs from the undisturbed run's: {', '.join(names[:8])}")
        return Outcome(
            kind=blow.kind,
            phase=blow.phase,
            codes=codes,
            began=run.start,
            newest=newest,
            reached=reached,
            in_save=in_save,
            problems=problems + blow.check(codes, said),
        )

    def compare_ends(self, run: RunFolder) -> list[str]:
        """What differs between the end of a run and that of the undisturbed one."""
        found = [] if run.newest() == self.whole.newest() == self.steps else ["not all steps were done"]
        names = run.records(self.steps)
        found += differences(run.checkpoint(self.steps), self.whole.checkpoint(self.steps), names)
        found += [] if names == self.whole.records(self.steps) else ["checksums"]
        return found + ([] if run.lines() == self.whole.lines() else ["metrics.jsonl"])

    def result(self) -> Result:
        return Result(arm=self.arm, steps=self.steps, outcomes=self.outcomes, ends=self.ends, failures=self.failures)


def _tail(log: Path) -> str:
    return log.read_text()[-3000:] if log.exists() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how often something happens, over all arms")
    parser.add_argument("--seed", type=int, default=1, help="of what happens, and when (default: 1)")
    parser.add_argument("--quick", action="store_true", help="each kind once, to see that all works")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that kills go on, at most")
    parser.add_argument("--out", type=Path, default=results_path("soak"), help="the table to write")
    args = parser.parse_args(arguments)
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder: name the file to write")
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder) / "inputs", args.seed)
        soaks = []
        half = args.kills // 2
        plan = [(ARMS[0], len(KINDS))] if args.quick else zip(ARMS, (args.kills - half, half), strict=True)
        for arm, n_kills in plan:
            soak = Soak(arm, n_kills, args.seed, Path(folder) / f"every-{arm.save_every}", inputs)
            soak.folder.mkdir()
            soak.run_whole()
            soak.run_broken(60 * args.minutes / len(ARMS))
            soaks.append(soak)
    results = [soak.result() for soak in soaks]
    text = report(results, args.seed, time.time() - began)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(f"\n{text}\n{args.out}")
    return int(not all(result.is_clean for result in results))


if __name__ == "__main__":
    # Ended from outside, it takes its disk away too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
