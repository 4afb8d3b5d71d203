"""Second tries: what counts as worth one, and how long to wait (exponential backoff with full jitter, by tenacity)."""

import threading

from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt, stop_when_event_set
from tenacity.wait import wait_random_exponential

from dalle_ds.config import ReadConfig
from dalle_ds.data.store import Transient


def retrying(config: ReadConfig, stopped: threading.Event | None = None) -> Retrying:
    """Calls a function again while it raises Transient, `n_attempt` times in all; the last error comes through.

    `stopped` ends the waiting at once, and the tries.
    """
    stopped = threading.Event() if stopped is None else stopped
    return Retrying(
        retry=retry_if_exception_type(Transient),
        wait=wait_random_exponential(multiplier=config.backoff_seconds, max=config.max_backoff_seconds),
        stop=stop_after_attempt(config.n_attempt) | stop_when_event_set(stopped),
        sleep=sleep_using_event(stopped),
        reraise=True,
    )
