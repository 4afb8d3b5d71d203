"""A run folder: what it was asked to be, whether it may go on, and where its parts lie.

config.json (kind, resolved configuration), ds_config.json (as used), metrics.jsonl, checkpoints/, samples/.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dalle_ds import __version__
from dalle_ds.config import InputError
from dalle_ds.training.checkpoint import check_format, own_share
from dalle_ds.training.folders import complete_checkpoints, find_faults, read_marker, replace_text

# What must not change when a run goes on: another model cannot take the weights, other tokens mean other things, and
# which sample and which noise belong to a step follows from the seed.
FIXED = ("model.", "tokenizer.", "loop.seed")
FIXED_FACTS = {"dvae_sha256": "tokens of another dVAE", "tokenizer_sha256": "another tokenizer"}
# What may change without a word: it does not change what is learnt.
FREE = ("loop.", "data.validation", "data.read.", "checkpoint_activations")


def open_run(out: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin. Where there is a process group, every rank must call.

    resume: "auto" takes the newest complete checkpoint of the run folder, if there is one, whose files all have the
    size and checksum with which they were written; those that have not are named in a warning, and left as they are.
    "none" begins anew. Raises InputError when "none" would write over a run, and when no checkpoint is whole.
    """
    if resume not in ("auto", "none"):
        raise InputError(f"--resume {resume!r} is neither auto nor none nor s3://bucket/prefix")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if resume == "none" and (out / "config.json").exists():
        raise InputError(f"{out} already holds a run: pass --resume auto to go on with it, or choose another --out")
    checkpoints = complete_checkpoints(out)
    if checkpoints and "imported" in json.loads((out / "config.json").read_text()):
        raise InputError(f"{out} holds imported weights and no optimizer: pass --init_from {out} and another --out")
    for checkpoint in reversed(checkpoints):
        if read_marker(checkpoint):
            check_format(checkpoint)
        faults = _find_faults(checkpoint)
        if not faults:
            return checkpoint
        _warn(f"{checkpoint} is left out, for it is damaged: {faults[0]}")
    if checkpoints:
        raise InputError(
            f"{out}: all {len(checkpoints)} checkpoints are damaged: bring back a copy of one, or choose another --out"
        )
    return None


def fetched(resume: str, out: Path, fetch: Callable[[str, Path], None]) -> str:
    """What --resume means to `open_run`: for s3://bucket/prefix, "auto" after the first rank has fetched what is there.

    `fetch(url, run folder)` brings the newest checkpoint, where the folder has none that is newer.
    """
    if not resume.startswith("s3://"):
        return resume
    if not dist.is_initialized() or dist.get_rank() == 0:
        fetch(resume, out)
    if dist.is_initialized():
        dist.barrier()
    return "auto"


def _find_faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks: each reads its share of the files."""
    if not dist.is_initialized():
        return find_faults(checkpoint)
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, find_faults(checkpoint, own_share(read_marker(checkpoint).get("files", ()))))
    return [fault for own in found for fault in own]


def check_same_model(out: Path, kind: str, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises InputError, listing the keys, when the run in `out` has another kind, model, tokenizer or seed.

    `facts` are the further entries of config.json; of those, the tokenizer and the dVAE must be the same. Of all other
    settings that changed and that change what is learnt, a warning is printed.
    """
    description = json.loads((out / "config.json").read_text())
    if description["kind"] != kind:
        raise InputError(f"{out} holds a {description['kind']} run, not a {kind} run; choose another --out")
    before, now = _flatten(description["config"]), _flatten(json.loads(json.dumps(config)))
    changed = {
        key: f"{key} was {before.get(key)} and is {value}" for key, value in now.items() if before.get(key) != value
    }
    fixed = [text for key, text in changed.items() if key.startswith(FIXED)]
    if fixed:
        raise InputError(f"{out} holds another run: {'; '.join(fixed)}; use its settings, or another --out")
    for name, what in FIXED_FACTS.items():
        if name in facts and description.get(name) != facts[name]:
            raise InputError(f"{out} was trained with {what}: go on with the one it had, or choose another --out")
    others = [text for key, text in changed.items() if key in before and not key.startswith(FREE)]
    if others:
        _warn(f"{out} goes on with other settings than it had: {'; '.join(others)}")


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 8}} as {"model.dim": 8}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _warn(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"warning: {text}", flush=True)


def write_run(out: Path, kind: str, config: dict[str, Any], deepspeed_config: dict[str, Any], **facts: Any) -> None:
    """Writes config.json and ds_config.json; `facts` are further top-level entries such as n_parameters."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples").mkdir(exist_ok=True)
    description = {"kind": kind, "version": __version__, "config": config, **facts}
    replace_text(out / "ds_config.json", json.dumps(deepspeed_config, indent=2) + "\n")
    replace_text(out / "config.json", json.dumps(description, indent=2) + "\n")
