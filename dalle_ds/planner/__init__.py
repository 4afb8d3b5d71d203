"""What a run of the prior takes, on paper: parameters, memory, bytes sent, and time of a step (`dalle-ds plan`).

Closed forms alone, so that it answers at once for any size; tests hold them against the real model and counters.
"""

from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.memory import memory_of, state_bytes
from dalle_ds.planner.parameters import count_parameters
from dalle_ds.planner.plan import make_plan
from dalle_ds.planner.plan_config import PlanConfig
from dalle_ds.planner.traffic import bytes_between_machines, compression_rate

__all__ = [
    "PlanConfig",
    "bytes_between_machines",
    "compression_rate",
    "count_parameters",
    "make_plan",
    "memory_of",
    "state_bytes",
    "training_flops",
]
