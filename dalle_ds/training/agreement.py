"""One for all: what the ranks do together succeeds on every rank, or fails on every rank."""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from dalle_ds.config import FULL_DISK, InputError
from dalle_ds.storage.files import PARTIAL

# Free bytes under which a failed write is put down to a full disk: what is left is less than a file's next block.
FULL_BELOW = 2**20
BEAT = 5.0  # seconds between the first rank's signs of life while the others wait for what it does

Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is the first rank, or a process without others."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value: Result) -> list[Result]:
    """The value of every rank, in their order; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_share(names: Iterable[str]) -> list[str]:
    """Every world_size-th name: what this rank looks after."""
    if not dist.is_initialized():
        return sorted(names)
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def together(action: Callable[[], Result], folder: Path) -> list[Result]:
    """What `action` returns on every rank; when it fails on any rank, an error on all of them.

    InputError for a full disk, if it writes to `folder`, and for the user's mistakes.
    """
    result, error = _attempt(action)
    outcomes = gather((_describe(error, folder), result))
    failures = {rank: failure for rank, (failure, _) in enumerate(outcomes) if failure is not None}
    if not failures:
        return [value for _, value in outcomes]  # type: ignore[misc]
    if any(failure.is_full for failure in failures.values()):
        raise InputError(
            f"{folder.with_name(folder.name.removesuffix(PARTIAL))}: the disk is full; free some space and go on with "
            "--resume auto; --loop.keep may be lower"
        ) from error
    _raise(error, *min(failures.items()), folder)


def from_first(action: Callable[[], Result], folder: Path) -> Result:
    """What `action` returns on the first rank, on all of them; when it fails, an error on all of them.

    It may take longer than a collective may: the first rank says every few seconds that it is still at it.
    """
    if not dist.is_initialized():
        return action()
    error: Exception | None = None
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(_attempt, action) if is_first() else None
        answer: list[Any] = [None]
        while answer == [None]:
            if future is not None and wait([future], timeout=BEAT).done:
                result, error = future.result()
                answer = [(_describe(error, folder), result)]
            dist.broadcast_object_list(answer)
    failure, value = answer[0]
    if failure is None:
        return value  # type: ignore[no-any-return]
    _raise(error, 0, failure, folder)


@dataclass(frozen=True)
class _Failure:
    said: str
    is_full: bool
    is_input: bool


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: Exception | None, folder: Path) -> _Failure | None:
    if error is None:
        return None
    said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return _Failure(said, _is_full(error, folder), isinstance(error, InputError))


def _raise(own: Exception | None, rank: int, failure: _Failure, folder: Path) -> NoReturn:
    """This rank's own error, or word of that of another one."""
    if own is not None:
        raise own
    if failure.is_input:
        raise InputError(failure.said)
    raise RuntimeError(f"{folder}: rank {rank} failed: {failure.said}")


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether an error comes from a full disk; safetensors has one of its own for it."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    if isinstance(error, InputError):
        return False
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free < FULL_BELOW
