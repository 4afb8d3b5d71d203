"""What happens to a run, and when: drawn from a seed, timed by what the run folder shows."""

import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from parts.small_disk import SmallDisk
from parts.soak_folder import RunFolder
from parts.soak_ranks import Ranks

from dalle_ds.cli import BAD_INPUT, PREEMPTED

POLL = 0.005  # seconds
MOST_STEPS = 2  # after fewer of which an attempt meets its blow, or saves
# The moment lies this much beyond the usual length of a phase at most, so that its end is met too.
STRETCH = 1.2
JUST_AFTER = 0.05  # seconds
N_TIMED = 12  # saves of the undisturbed run


@dataclass(frozen=True, kw_only=True)
class Blow:
    """Falls in `phase`, after so many steps or saves, and a `fraction` of the phase's usual length later."""

    kind: str
    phase: str
    after: int
    fraction: float
    rank: int
    signal: signal.Signals
    room: float
    """of a full disk: what it has left, as a fraction of a checkpoint"""

    def wait(self, ranks: Ranks, run: RunFolder, usual: dict[str, float]) -> bool:
        """Returns when its moment has come: True; or when a rank has ended before: False."""
        has_come, began = PHASES[self.phase], time.monotonic()
        under_way, moment = False, None
        while moment is None or time.monotonic() < moment:
            if ranks.has_ended():
                return False
            if not under_way and run.is_under_way():
                under_way = True
                usual["start-up"] += (time.monotonic() - began - usual["start-up"]) / 2
            if moment is None and has_come(run, run.start + self.after):
                moment = time.monotonic() + self.fraction * STRETCH * usual[self.phase]
            time.sleep(POLL)
        return True

    def check(self, codes: list[int], said: str) -> list[str]:
        """What is wrong with the way the attempt ended."""
        if self.kind == "full disk" and not (BAD_INPUT in codes and ("full" in said or "No space left" in said)):
            return [f"a full disk ended it with {codes}, and was not named"]
        # A signal that comes before the run takes it ends the rank, as it ends any program.
        if self.kind == "stop" and -self.signal not in codes and set(codes) != {PREEMPTED}:
            return [f"asked to stop, it ended with {codes}"]
        if self.kind == "stop" and set(codes) == {PREEMPTED} and "Traceback" in said:
            return ["asked to stop, it ended with a traceback"]
        return []


def draw(rng: np.random.Generator, kinds: Sequence[str], world_size: int) -> Iterator[Blow]:
    """Blows without end; each kind as often as any other."""
    while True:
        for kind in rng.permutation(kinds).tolist():
            numbers = {"stop": (signal.SIGTERM, signal.SIGUSR1)}.get(kind, (signal.SIGKILL,))
            yield Blow(
                kind=kind,
                phase=str(rng.choice(KINDS[kind])),
                after=int(rng.integers(MOST_STEPS)),
                fraction=float(rng.random()),
                rank=int(rng.integers(world_size)),
                signal=numbers[rng.integers(len(numbers))],
                room=float(rng.random()),
            )


def strike(blow: Blow, ranks: Ranks, disk: SmallDisk, checkpoint_size: int) -> None:
    """Lets it fall; with a full disk that lasts until a rank has ended."""
    if blow.kind != "full disk":
        ranks.send(blow.rank, blow.signal)
        return
    while not ranks.has_ended():
        disk.fill(int(blow.room * checkpoint_size))
        time.sleep(POLL)


def observe(ranks: Ranks, run: RunFolder) -> dict[str, float]:
    """How long the phases of a run take, in seconds: of its first saves."""
    began = time.monotonic()
    start_up, step = 0.0, 0
    begun: list[float] = []
    saves: list[float] = []
    while len(saves) < N_TIMED and not ranks.has_ended():
        now = time.monotonic()
        if not start_up and run.is_under_way():
            start_up = now - began
        if len(begun) == len(saves) and run.saving():
            begun.append(now)
            step = run.saving()
        elif len(begun) > len(saves) and run.saving() != step:
            saves.append(now - begun[-1])
        time.sleep(POLL)
    cycles = [after - before for before, after in itertools.pairwise(begun)]
    return {
        "start-up": start_up,
        "training": statistics.median(cycles) if cycles else start_up,
        "save": statistics.median(saves) if saves else start_up,
        "after a save": JUST_AFTER,
    }


# Whether a phase has come, given the run and a step.
PHASES: dict[str, Callable[[RunFolder, int], bool]] = {
    "start-up": lambda run, step: True,
    "training": lambda run, step: run.is_under_way() and run.last_step() >= step,
    "save": lambda run, step: run.saving() > step,
    "after a save": lambda run, step: run.newest() > step,
}

# What may happen, and in which phases.
KINDS = {
    "kill": ("start-up", "training", "after a save"),
    "stop": ("start-up", "training", "save", "after a save"),
    "kill in a save": ("save",),
    "full disk": ("start-up", "training", "save"),
}
