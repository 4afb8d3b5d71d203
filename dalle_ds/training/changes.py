"""What differs between a run as its checkpoint has it and as it is asked to go on: refused, unless allowed by name.

Settings are compared key by key: ours (config.json), the DeepSpeed JSON's (ds_config.json), and what the data are made
with. Free are those that change what a run costs and tells, and not what it learns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError, require
from dalle_ds.storage.files import read_json
from dalle_ds.storage.folders import read_marker
from dalle_ds.training.agreement import is_first
from dalle_ds.training.deepspeed_config import BATCH_KEYS, batch_sizes

CONFIG, DS_CONFIG = "config.json", "ds_config.json"
ALLOW_FLAG = "--allow_change"
# Entries of config.json beside the settings: what they stand for where they differ.
FACTS = {"dvae_sha256": "tokens of another dVAE", "tokenizer_sha256": "another tokenizer"}
# Each stands for itself and for all below it.
FREE = (
    # how long, how often, and what is told
    "loop",
    "histogram_every",
    "data.validation",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "comms_logger",
    "flops_profiler",
    "timers",
    # how the work is divided: numbers of ranks, sharding, memory for time
    "data.read",
    "data.n_worker",
    "checkpoint_activations",
    "activation_checkpointing",
    "zero_optimization",
    "hierarchical_sharding",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    # what counts at the beginning alone
    "init_from",
)
# The order of the data follows from these, and the place in it means nothing under another one: never allowed.
FIXED = ("loop.seed", "data.n_lanes", "data.block_len", "data.shuffle_buffer")

_MISSING = object()


def check_changes(
    checkpoint: Path, description: dict[str, Any], ds_config: dict[str, Any], world_size: int, allowed: Sequence[str]
) -> None:
    """Raises InputError, listing every key with both values, when the run would go on with other settings.

    `description` is the content of config.json, as far as it is known. Keys in `allowed` may differ, and all below
    them, but for those that are fixed; they are printed. A run of another kind never goes on.
    """
    out = checkpoint.parent.parent
    before, now = read_json(checkpoint / CONFIG), json.loads(json.dumps(description))
    if before.get("kind") != now["kind"]:
        raise InputError(f"{out} holds a {before.get('kind')} run, not a {now['kind']} run; choose another --out")
    old = settings(before, read_json(checkpoint / DS_CONFIG), read_marker(checkpoint)["world_size"])
    new = settings(now, ds_config, world_size)
    for name in allowed:
        known = any(_is_under(key, name) for key in old | new)
        require(known, f"{ALLOW_FLAG} {name}: there is no such setting; it takes keys such as optimizer.params.lr")
    bound = [key for key in sorted(old | new) if _is_any(key, FIXED) or not _is_any(key, FREE)]
    changed = {key: _tell(key, old, new) for key in bound if old.get(key, _MISSING) != new.get(key, _MISSING)}
    refused = {key: said for key, said in changed.items() if key in FIXED or not _is_any(key, allowed)}
    if refused:
        ways = "use its settings, or another --out"
        if not refused.keys() & set(FIXED):
            ways += f", or accept the change: {ALLOW_FLAG} {' '.join(refused)}"
        raise InputError(f"{out} holds another run: {'; '.join(refused.values())}; {ways}")
    if changed and is_first():
        print(f"{out} goes on with changes that were allowed: {'; '.join(changed.values())}", flush=True)


def settings(description: dict[str, Any], ds_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """All settings by key, {"model.dim": 8}: of batch sizes, the whole batch of a step on so many ranks alone."""
    micro_batch_size, accumulation = batch_sizes(ds_config, world_size, DS_CONFIG)
    return {
        **_flatten({name: description[name] for name in FACTS if name in description}),
        **_flatten(description["config"]),
        **_flatten({name: value for name, value in ds_config.items() if name not in BATCH_KEYS}),
        "train_batch_size": micro_batch_size * accumulation * world_size,
    }


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        # An empty section says something too.
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _is_any(key: str, names: Sequence[str]) -> bool:
    return any(_is_under(key, name) for name in names)


def _is_under(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _tell(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    was, now = (f"{found[key]}" if key in found else "not set" for found in (old, new))
    return f"{key} was {was} and is {now}" + (f" ({FACTS[key]})" if key in FACTS else "")
