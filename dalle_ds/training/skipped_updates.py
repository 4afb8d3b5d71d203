"""A watch over skipped updates: one now and then is how scales find their place, many in a row lead nowhere."""

from collections.abc import Sequence

from torch import Tensor

from dalle_ds.training.agreement import is_first
from dalle_ds.training.engine import Engine

MANY = 100  # skipped updates in a row, after each of which a line says so
MOST_NAMED = 8  # resblocks or matrices in a line


class SkippedUpdates:
    """Counts the updates that the engine skipped in a row."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.n_in_a_row = 0
        self._events_before: Tensor | None = None

    def see(self, step: int) -> None:
        """To be called after each step; prints a warning, on the first rank, after so many skipped ones."""
        if self.engine.was_step_applied():
            self.n_in_a_row = 0
            return
        self.n_in_a_row += 1
        events = self.engine.extras.scaling.n_events
        if self.n_in_a_row == 1 and events is not None:
            self._events_before = events.clone()
        if self.n_in_a_row % MANY == 0 and is_first():
            said = f"the last {self.n_in_a_row} updates were skipped, up to step {step}"
            print(f"warning: {said}: their gradients were not finite{self._where(events)}", flush=True)

    def _where(self, events: Tensor | None) -> str:
        """In what they were not finite, and what to do."""
        path, before = self.engine.extras.path, self._events_before
        blocks = [] if events is None or before is None else (events > before).nonzero().flatten().tolist()
        matrices = [] if path is None or blocks else path.spoiled()
        if matrices:
            return (
                f" in the sums and averages of {_name(matrices)}; lower the learning rate, look at the data, or keep "
                "them in full (gradient_compression.errors and wire, data_types.grad_accum_dtype)"
            )
        if events is None:
            return "; lower the learning rate, and look at the data"
        where = f"in resblocks {_name(blocks)}" if blocks else "outside all resblocks"
        return f", {where}; lower the learning rate or resblock_gradient_scaling.lowest_scale, or look at the data"


def _name(things: Sequence[object]) -> str:
    more = f" and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
    return f"{', '.join(map(str, things[:MOST_NAMED]))}{more}"
