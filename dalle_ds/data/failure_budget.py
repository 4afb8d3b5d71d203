"""How many shards may be lost before a run ends: with their names, never with a silent end of data."""

import threading

from dalle_ds.config import InputError

N_NAMED = 20


class FailureBudget:
    """Counts shards that could not be read, or not to their end; one more than `n_shards` ends the run."""

    def __init__(self, n_shards: int = 0) -> None:
        self.n_shards = n_shards
        self.failures: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, url: str, reason: str) -> None:
        """Counts a shard once, however often it fails. Raises InputError, with the list, past the budget."""
        with self._lock:
            self.failures.setdefault(url, reason)
            if len(self.failures) <= self.n_shards:
                return
            named = [f"{name} ({why.removeprefix(f'{name}: ')})" for name, why in self.failures.items()]
        more = f"; and {len(named) - N_NAMED} more" if len(named) > N_NAMED else ""
        raise InputError(
            f"{len(named)} shards could not be read, {self.n_shards} are allowed: {'; '.join(named[:N_NAMED])}{more}"
        )
