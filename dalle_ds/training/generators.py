"""The random generators of a process: torch's own, which models draw from where no seed is handed to them."""

import torch
from torch import Tensor


def generator_states() -> dict[str, Tensor]:
    """Where the generators of this process stand: of the CPU, and of the device that it uses."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor] | None) -> None:
    """Sets the generators as they stood; those of another number of processes (None) are left as they are."""
    if not states:
        return
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
