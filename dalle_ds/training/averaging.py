"""The running average of the parameters, which evaluation, sampling and export use (Appendices A.2 and B.2)."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dalle_ds.storage.pieces import AVERAGE, Piece, PieceReader
from dalle_ds.training.engine import Engine
from dalle_ds.training.engine_state import holdings, join, split
from dalle_ds.training.whole_weights import fill_model

# The n-th update uses min(decay, (1 + n) / (WARMUP + n)).
WARMUP = 10
# Elements that are brought to float32 at once, on the CPU.
PIECE = 2**24


class ParameterAverage:
    """An exponential moving average, in float32 on the CPU, of what the optimizer updates: each rank's own share.

    An update follows every `every`-th optimizer step. It costs no communication; on the host it takes 4 bytes a
    parameter (a share's parameter, under ZeRO) and as many again as the optimizer's weights have, for a copy of them.
    In 16-bit training the optimizer's float32 weights are averaged where there are some. Decay 0 keeps nothing: the
    average is then the weights themselves.

    Training does not wait for an update. The weights go to the CPU on a stream of their own while the next forward pass
    runs, and a thread averages them; `wait_for_copy` keeps the optimizer off them until they are copied, and whoever
    needs the average waits for the thread. The result is bit for bit that of doing all this at once.

    The paper says only `decay` and `every`. Here the n-th update (from 0) uses min(decay, (1 + n) / (10 + n)), which is
    about the mean of the last n / 9 updates, so that the initial weights are soon forgotten; 0.99 is reached at update
    890, 0.999 at 8,990.
    """

    def __init__(self, engine: Engine, decay: float, every: int = 1) -> None:
        assert 0 <= decay < 1
        assert every >= 1
        self.engine, self.decay, self.every = engine, decay, every
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="average")
        self._pending: Future[None] | None = None
        self._copied: Any = None
        self._copies = [torch.empty(m.shape, dtype=m.dtype, pin_memory=m.is_cuda) for m in self._masters()]
        self._average: list[Tensor] = []
        if self._copies:
            self._backend = torch.get_device_module(self._masters()[0].device)
            self._stream = self._backend.Stream()
        self.restart()

    @property
    def tensors(self) -> list[Tensor]:
        """The average, one tensor for each of the optimizer's, with all updates in it."""
        self._finish()
        return self._average

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew at the present weights."""
        self._finish()
        self.n_steps = self.n_updates = 0
        self._average = [torch.empty(m.shape, dtype=torch.float32).copy_(m) for m in self._masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in; to be called after each optimizer step that changed them."""
        self.n_steps += 1
        if not self.decay or self.n_steps % self.every:
            return
        decay = min(self.decay, (1 + self.n_updates) / (WARMUP + self.n_updates))
        self.n_updates += 1
        self._finish()
        self._stream.wait_stream(self._backend.current_stream())
        with self._backend.stream(self._stream):
            for copy, master in zip(self._copies, self._masters(), strict=True):
                copy.copy_(master, non_blocking=True)
            self._copied = self._backend.Event()
            self._copied.record(self._stream)
        self._pending = self._thread.submit(_mix, self._average, self._copies, 1 - decay, self._copied)

    def wait_for_copy(self) -> None:
        """To be called before each optimizer step: what follows on the device waits until the weights are copied."""
        if self._copied is not None:
            self._backend.current_stream().wait_event(self._copied)
            self._copied = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model computes with the average; every rank must enter. It must not be trained meanwhile."""
        if not self.decay:
            yield
            return
        with self._lent():
            fill_model(self.engine)
            yield
        # Not after an error: the other ranks would not meet this one here.
        fill_model(self.engine)

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of the average, all updates in it; nothing at decay 0."""
        return split(self.engine, AVERAGE, self.tensors) if self.decay else iter(())

    def state_dict(self) -> dict[str, int]:
        """What else a resumed run needs, the same on all ranks."""
        return {"n_steps": self.n_steps, "n_updates": self.n_updates}

    def load(self, state: dict[str, int], pieces: PieceReader) -> None:
        """Goes on from `state_dict` and `pieces` of any number of ranks; from the present weights where none was kept.

        Asks no other rank.
        """
        self.restart()
        if self.decay and pieces.has(AVERAGE):
            join(self.engine, pieces, AVERAGE, self._average)
            self.n_steps, self.n_updates = state["n_steps"], state["n_updates"]

    def _masters(self) -> list[Tensor]:
        return [holding.tensor for holding in holdings(self.engine)] if self.decay else []

    def _finish(self) -> None:
        """Waits for the update that is under way, if one is."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """Inside, the average stands where the optimizer has its weights."""
        self._finish()
        masters = self._masters()
        with torch.no_grad():
            torch._foreach_copy_(self._copies, masters)
            torch._foreach_copy_(masters, self._average)
        yield
        with torch.no_grad():
            torch._foreach_copy_(masters, self._copies)


@torch.no_grad()
def _mix(averages: Sequence[Tensor], copies: Sequence[Tensor], weight: float, copied: Any) -> None:
    """Moves each average by `weight` of its way towards the copy, once the event `copied` has come."""
    copied.synchronize()
    for average, copy in zip(averages, copies, strict=True):
        for mean, piece in zip(*(torch.split(tensor.view(-1), PIECE) for tensor in (average, copy)), strict=True):
            mean.lerp_(piece.float(), weight)
