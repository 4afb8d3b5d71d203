"""Where a run is: all that a checkpoint holds, and that a resumed run takes up."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dalle_ds.config import LoopConfig
from dalle_ds.storage.pieces import PieceReader
from dalle_ds.training.averaging import ParameterAverage
from dalle_ds.training.checkpoint import load_checkpoint, load_rank_state, save_checkpoint
from dalle_ds.training.engine import Engine
from dalle_ds.training.generators import generator_states, restore_generators


class Stateful(Protocol):
    """What has a state that is the same on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunState:
    """The engine with its scales and error buffers, the average, the place in the data, the schedule, generators."""

    engine: Engine
    average: ParameterAverage
    reader: Stateful
    learning_rate: Stateful
    documents: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON files that each checkpoint is to hold, by name: what the run was asked to be"""

    def save(self, out: Path, step: int, loop: LoopConfig) -> Path:
        """Writes checkpoint `step` of the run folder `out`; every rank must call."""
        path = self.engine.extras.path
        state = {
            "reader": self.reader.state_dict(),
            "schedule": self.learning_rate.state_dict(),
            "gradient_scaling": self.engine.extras.scaling.state_dict(),
            "compression": {} if path is None else path.state_dict(),
            "average": self.average.state_dict(),
        }
        return save_checkpoint(
            self.engine,
            out,
            step,
            state,
            loop.keep,
            keep_every=loop.keep_every,
            pieces=[*self.average.pieces(), *([] if path is None else path.pieces())],
            rank_state=generator_states(),
            documents=self.documents,
        )

    def restore(self, checkpoint: Path) -> int:
        """Takes up a checkpoint, of any number of ranks; returns the step that it was written after."""
        step, state = load_checkpoint(self.engine, checkpoint, self._load)
        self.reader.load_state_dict(state["reader"])
        self.learning_rate.load_state_dict(state["schedule"])
        self.engine.extras.scaling.load_state_dict(state["gradient_scaling"])
        restore_generators(load_rank_state(checkpoint))
        return step

    def _load(self, state: dict[str, Any], pieces: PieceReader) -> None:
        self.average.load(state["average"], pieces)
        if self.engine.extras.path is not None:
            self.engine.extras.path.load(state["compression"], pieces)
