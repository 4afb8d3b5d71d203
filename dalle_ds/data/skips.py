"""What is left out of the data, and why: the error a stage raises, and the log that counts and names it."""

import json
import warnings
from collections import Counter
from pathlib import Path


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason that the log shows."""


def printable(text: str) -> str:
    """`text` as it may be shown on a terminal and written as UTF-8, whatever a stranger named a file."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class SkipLog:
    """Counts what was left out and names each once, in `path` (JSON lines, made at the first one) when there is one.

    Reading the same data for another epoch neither counts nor names a sample again.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.reasons: Counter[str] = Counter()
        self.first = ""
        # Hashes, not the texts: a large data set may hold millions of bad samples.
        self._seen: set[int] = set()

    @property
    def n_skipped(self) -> int:
        """Samples and broken shards left out so far."""
        return self.reasons.total()

    def add(self, key: str, origin: str, reason: str) -> None:
        """Counts and names one sample (`origin`: its file or shard), or one broken shard when `key` is empty."""
        seen = hash((key, origin, reason))
        if seen in self._seen:
            return
        self._seen.add(seen)
        self.reasons[reason] += 1
        self.first = self.first or printable(f"{key or 'shard'} of {origin}: {reason}")
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Names of files need not be UTF-8.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps({"key": key, "origin": origin, "reason": reason}, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """One line: how many, the commonest reason, the first one; empty when nothing was left out."""
        if not self.n_skipped:
            return ""
        reason, count = self.reasons.most_common(1)[0]
        where = f"; all are in {self.path}" if self.path is not None else ""
        return f"left out {self.n_skipped} ({count} of them: {reason}); the first is {self.first}{where}"

    def warn(self) -> None:
        """Warns with the summary line, if anything was left out."""
        if self.n_skipped:
            warnings.warn(self.summary(), stacklevel=2)
