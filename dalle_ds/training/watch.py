"""A watch over a run on several ranks: when it stands still, one line names the ranks that did not arrive.

A collective that waits for a rank which never comes says, after its time, only that it waited. So a thread on each rank
looks whether its rank moves: a new step, or another collective begun in any group. When nothing moved for the timeout,
the ranks compare over the store how far each came, the ones behind are named, and all processes end.

The store may lie in the process of rank 0, which may be the one that stands still. Whoever asks it may then wait for
ever, whatever timeouts are set: so it is asked in a thread of its own, for which nobody waits long.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

HUNG = 1  # exit code
LONGEST_POLL = 1.0  # seconds
# Polls that a rank leaves to the others to tell where they stand, and seconds beyond that for the store to answer.
PATIENCE, STORE_SECONDS = 5, 10
# Those that number the collectives of a group; of others only steps are seen.
NUMBERED = ("gloo", "nccl")


@dataclass(frozen=True)
class Standing:
    """How far a rank came, and what its main thread does."""

    step: int
    n_collectives: int
    host: str
    place: str

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.n_collectives


class Watch:
    """Watches while it is entered, where there are several ranks; every rank must enter and leave."""

    def __init__(self, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self.step = 0
        self._poll = min(LONGEST_POLL, self.timeout / 10)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int) -> None:
        """Notes that this rank begins `step`."""
        self.step = step

    def __enter__(self) -> "Watch":
        if dist.get_world_size() > 1:
            # A connection of its own: the main thread may be waiting on the other one.
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # The thread may be at its last words, or stuck in the store: it ends with the process.
        if self._thread is not None:
            self._thread.join(timeout=self._poll)

    def _watch(self) -> None:
        last, since = (-1, -1), time.monotonic()
        while not self._over.wait(self._poll):
            progress = (self.step, _n_collectives())
            if progress != last:
                last, since = progress, time.monotonic()
            elif time.monotonic() - since >= self.timeout:
                self._end()

    def _end(self) -> None:
        """Says who is behind, on one rank, and ends this process."""
        own = Standing(self.step, _n_collectives(), socket.gethostname(), _place())
        standings, heard = {dist.get_rank(): own}, threading.Event()
        asking = threading.Thread(target=self._compare, args=(own, standings, heard), daemon=True)
        asking.start()
        asking.join(timeout=PATIENCE * self._poll + STORE_SECONDS)
        speaker, said = verdict(dict(standings), dist.get_world_size(), self.timeout / 60, heard=heard.is_set())
        if dist.get_rank() == speaker:
            print(f"dalle-ds: error: {said}", file=sys.stderr, flush=True)
        # The others come to the same end within a poll; one that is cut off earlier would cover the line with its own.
        time.sleep(PATIENCE * self._poll)
        os._exit(HUNG)

    def _compare(self, own: Standing, standings: dict[int, Standing], heard: threading.Event) -> None:
        """Tells the others where this rank stands, and fills in where they do; sets `heard` when the store answers."""
        ranks = range(dist.get_world_size())
        key = "standing/{}".format
        with contextlib.suppress(dist.DistError):
            self._store.set(key(dist.get_rank()), json.dumps(asdict(own)))
            deadline = time.monotonic() + PATIENCE * self._poll
            while not self._store.check([key(r) for r in ranks]) and time.monotonic() < deadline:
                time.sleep(self._poll)
            there = [r for r in ranks if self._store.check([key(r)])]
            heard.set()
            for r in there:
                standings[r] = Standing(**json.loads(self._store.get(key(r))))


def verdict(
    standings: Mapping[int, Standing], world_size: int, minutes: float, *, heard: bool = True
) -> tuple[int, str]:
    """The rank that is to speak, and what it says: which ranks of `world_size` did not arrive, and where they stand.

    A rank without a standing did not answer: its process is stopped or gone. Otherwise those are behind that came less
    far than the farthest. Where the store was not `heard`, each rank knows of itself alone, and speaks.
    """
    silent = [rank for rank in range(world_size) if rank not in standings]
    farthest = max(standing.progress for standing in standings.values())
    behind = [rank for rank in sorted(standings) if standings[rank].progress < farthest]
    arrived = [rank for rank in sorted(standings) if rank not in behind]
    waiting = standings[arrived[0]]
    if not heard:
        who = "rank 0, which holds the store, does not answer"
    elif silent:
        who = f"{_ranks(silent)} did not arrive and does not answer"
    elif behind:
        stands = standings[behind[0]]
        who = f"{_ranks(behind)} did not arrive: on {stands.host}, in step {stands.step}, at {stands.place}"
    else:
        who = "no rank is behind another, so look at the network between them"
    waits = f"rank {arrived[0]} on {waiting.host} waits in step {waiting.step} at {waiting.place}"
    return arrived[0], (
        f"nothing moved for {minutes:g} minutes: {who}; {waits}; "
        "the run ends (--loop.timeout_minutes), go on with --resume auto"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _n_collectives() -> int:
    """Collectives that this rank has begun, in all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups if dist.get_backend(group) in NUMBERED)


def _place() -> str:
    """What the main thread does: the innermost line of ours, and the innermost one at all."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    ours = [frame for frame in stack if "dalle_ds" in Path(frame.filename).parts]
    frames = {frame.filename: frame for frame in (*ours[-1:], stack[-1])}
    return " -> ".join(f"{'/'.join(Path(name).parts[-2:])}:{f.lineno} ({f.name})" for name, f in frames.items())
