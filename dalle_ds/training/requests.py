"""What somebody asks of a running job: to save and stop (SIGTERM, SIGUSR1), or to halve its learning rate (a file).

One rank that was asked is enough. All agree on the step by a small all-reduce on the CPU, which runs beside the step:
`post` launches it as a step begins, `agreed` reads it as that step ends. So a request that came before a step began is
known to all when it ends, and nothing is under way between steps, while the run evaluates and saves, or after it.

A request to halve the learning rate that was taken after a step keeps its file, with the step in its name: a run that
dies before its next checkpoint and goes on from the last one halves it again after the same step.
"""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dalle_ds.config import InputError, Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
HALVE_FILE = "halve-learning-rate"
STANDARD_ERROR = 2  # file descriptor


@dataclass(frozen=True)
class Asked:
    """What is asked of the run, the same on all ranks."""

    stop: bool
    halve: bool


class Requests:
    """Takes requests while it is entered; every rank calls `post` and `agreed` once a step, in turn.

    Signals are counted, never fatal, and the first rank answers each with a line. At the end the handlers of before
    come back; only after Preempted, when nothing but the exit code is left to come, signals are ignored. When it is not
    entered it sees no signals and asks no other rank.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.n_signals = 0
        self._group: Any = None
        self._work: Any = None
        self._flags = torch.zeros(2, dtype=torch.int64)
        self._step = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Requests":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._count)
            # System calls that were under way, in libraries that do not expect to be interrupted, go on.
            signal.siginterrupt(number, False)
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if isinstance(error, Preempted) else handler or signal.SIG_DFL)
        # After an error something may be under way, which ends when the other ranks come to it, or end.
        if error is None and self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._work = None

    def post(self, step: int) -> None:
        """Tells the other ranks, as `step` begins, what was asked of this one so far; `agreed` is to follow."""
        assert self._work is None, "post without agreed"
        self._step = step
        halve = dist.get_rank() == 0 and (self._file().exists() or self._file(step).exists())
        self._flags = torch.tensor([self.n_signals > 0, halve], dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> Asked:
        """What any rank knew at its `post`; the request to halve the learning rate is thereby taken."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        stop, halve = self._flags.bool().tolist()
        # A new one, where an earlier one is taken again, waits for the next step.
        if halve and dist.get_rank() == 0 and not self._file(self._step).exists():
            with contextlib.suppress(FileNotFoundError):  # it was withdrawn meanwhile
                self._file().rename(self._file(self._step))
        return Asked(stop, halve)

    def wants_stop(self) -> bool:
        """Whether any rank was asked to stop by now; every rank must ask, between `agreed` and `post`."""
        stop = torch.tensor([self.n_signals > 0], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self._group)
        return bool(stop)

    def _file(self, taken_after: int | None = None) -> Path:
        """The request to halve the learning rate, or what it becomes when it is taken after a step."""
        return self.run / (HALVE_FILE if taken_after is None else f"{HALVE_FILE}-after-{taken_after:08d}")

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.n_signals += 1
        if dist.get_rank() == 0:
            name, times = signal.Signals(number).name, f", as asked before ({self.n_signals} signals)"
            said = f"{name}: the run saves and stops after the next step{times if self.n_signals > 1 else ''}\n"
            # A signal may come in the middle of a print, which cannot be entered twice.
            os.write(STANDARD_ERROR, said.encode())


def ask_to_halve(run: Path) -> None:
    """Leaves the request to halve the learning rate in the run folder.

    Raises InputError when there is no run, or an earlier request has not been taken yet.
    """
    if not (run / "config.json").exists():
        raise InputError(f"{run} holds no run: give the folder that train-dvae or train-prior writes")
    file = run / HALVE_FILE
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        raise InputError(
            f"{file}: an earlier request has not been taken; the run takes it at its next step, or when it is resumed; "
            "remove the file to withdraw it"
        ) from None
