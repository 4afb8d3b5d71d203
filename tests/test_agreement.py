"""One for all: what fails on one rank fails on all, in a word that all understand."""

import errno
from pathlib import Path

import pytest
from helpers import run_distributed

from dalle_ds.config import InputError
from dalle_ds.training.agreement import from_first, gather, own_share, together

ERRORS = {
    "mistake": InputError("no such file; give another"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "ours": KeyError("ours"),
}


def fail_on(rank, name, function):
    """What every rank says when one of them fails."""
    from dalle_ds.training.distributed import process_group

    with process_group() as ranks:

        def act():
            if ranks.rank == rank:
                raise ERRORS[name]
            return ranks.rank

        try:
            return {"together": together, "from_first": from_first}[function](act, Path("run/step-5.partial"))
        except Exception as error:
            return type(error).__name__, str(error)


@pytest.mark.parametrize("function", ["together", "from_first"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_is_one_of_all(name, function):
    rank = 0 if function == "from_first" else 1
    results = run_distributed(fail_on, 2, rank, name, function)
    if name == "full" and function == "together":
        assert {kind for kind, _ in results} == {"InputError"}
        assert all("run/step-5: the disk is full; free some space" in said for _, said in results)
        return
    own, other = results[rank], results[1 - rank]
    assert own == (type(ERRORS[name]).__name__, str(ERRORS[name]))
    if name == "mistake":
        assert other == own
    else:
        assert other[0] == "RuntimeError"
        assert f"rank {rank} failed: {own[0]}" in other[1]


@pytest.mark.parametrize("function", ["together", "from_first"])
def test_what_succeeds_is_known_to_all(function):
    expected = [0, 1] if function == "together" else 0
    assert run_distributed(fail_on, 2, None, "ours", function) == [expected] * 2


def test_a_process_by_itself_needs_no_group():
    assert gather(3) == [3]
    assert own_share(["b", "a"]) == ["a", "b"]
    assert from_first(lambda: 7, Path("run")) == 7
