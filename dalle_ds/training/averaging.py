"""The running average of the parameters, which evaluation, sampling and export use (Appendices A.2 and B.2)."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from dalle_ds.training.engine import Engine, fill_model, gather_weights, master_tensors, set_masters

# The n-th update uses min(decay, (1 + n) / (WARMUP + n)).
WARMUP = 10
STATE = "average"  # entry of the file's metadata


class ParameterAverage:
    """An exponential moving average, in float32, of what the optimizer updates: each rank keeps that of its own share.

    An update follows every `every`-th optimizer step. It costs no communication, and 4 bytes a parameter (a share's
    parameter, under ZeRO). In 16-bit training the optimizer's float32 weights are averaged. Decay 0 keeps nothing: the
    average is then the weights themselves.

    The paper says only `decay`. Here the n-th update (from 0) uses min(decay, (1 + n) / (10 + n)), which is about the
    mean of the last n / 9 updates, so that the initial weights are soon forgotten; 0.999 is reached at update 8,990.
    """

    def __init__(self, engine: Engine, decay: float, every: int = 1) -> None:
        assert 0 <= decay < 1
        assert every >= 1
        self.engine, self.decay, self.every = engine, decay, every
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew at the present weights."""
        self.n_steps = self.n_updates = 0
        masters = master_tensors(self.engine) if self.decay else []
        self.tensors = [master.detach().to(torch.float32, copy=True) for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in; to be called after each optimizer step that changed them."""
        self.n_steps += 1
        if not self.decay or self.n_steps % self.every:
            return
        decay = min(self.decay, (1 + self.n_updates) / (WARMUP + self.n_updates))
        self.n_updates += 1
        torch._foreach_lerp_(self.tensors, [master.float() for master in master_tensors(self.engine)], 1 - decay)

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

    def save(self, path: Path) -> None:
        """Writes the whole average as safetensors, with the state in its metadata; every rank must call."""
        from safetensors.torch import save_file

        if not self.decay:
            return
        with self._lent():
            weights = gather_weights(self.engine)
        if torch.distributed.get_rank() == 0:
            state = {"n_steps": self.n_steps, "n_updates": self.n_updates}
            save_file(weights, path, metadata={STATE: json.dumps(state)})

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; begins anew where nothing was written, as in a run without an average."""
        from safetensors import safe_open

        if not self.decay:
            return
        self.restart()
        if not path.exists():
            return
        with safe_open(path, "pt") as file, self._lent():
            set_masters(self.engine, file.get_tensor)
            self.restart()
            state = json.loads(file.metadata()[STATE])
        self.n_steps, self.n_updates = state["n_steps"], state["n_updates"]

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """Inside, the average stands where the optimizer has its weights."""
        masters = master_tensors(self.engine)
        with torch.no_grad():
            kept = [master.clone() for master in masters]
            torch._foreach_copy_(masters, self.tensors)
        yield
        with torch.no_grad():
            torch._foreach_copy_(masters, kept)
