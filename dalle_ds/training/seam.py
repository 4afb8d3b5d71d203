"""Whether DeepSpeed is as we know it: what we override are private names, which move without notice.

`setup.py` pins the minor; within it a name may still go, or stay and no longer be called. Both would train on, wrongly.
"""

from collections.abc import Mapping


def check_overrides(ours: type) -> None:
    """Raises RuntimeError unless all methods of a class derived from DeepSpeed's override one that is there."""
    theirs = ours.__mro__[1]
    for name, value in vars(ours).items():
        check(not callable(value) or hasattr(theirs, name), f"has no {theirs.__name__}.{name}")


def check_received(counts: Mapping[str, int]) -> None:
    """Raises RuntimeError unless the gradients of all parameters have come, each as often."""
    most = max(counts.values(), default=0)
    missing = [name for name, n in counts.items() if n < max(1, most)]
    check(not missing, f"did not hand over the gradient of {', '.join(missing[:3])}")


def check(holds: bool, otherwise: str) -> None:
    """Raises RuntimeError, saying what DeepSpeed does otherwise, unless it holds."""
    if not holds:
        import deepspeed

        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} {otherwise}, as 0.19.8 does: install that one")
