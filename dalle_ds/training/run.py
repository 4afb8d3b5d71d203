"""A run folder: what it was asked to be, whether it may go on, and where its parts lie.

config.json (kind, resolved configuration), ds_config.json (as used), metrics.jsonl, checkpoints/, samples/.
"""

import json
from pathlib import Path
from typing import Any

from dalle_ds import __version__
from dalle_ds.config import InputError
from dalle_ds.training.checkpoint import complete_checkpoints

# What must not change when a run goes on: another model cannot take the weights, other tokens mean other things.
FIXED_SECTIONS = ("model", "tokenizer")
FIXED_FACTS = {"dvae_sha256": "tokens of another dVAE", "tokenizer_sha256": "another tokenizer"}


def open_run(out: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin.

    resume: "auto" takes the newest complete checkpoint of the run folder if there is one, "none" begins anew.
    Raises InputError when "none" would write over a run.
    """
    if resume not in ("auto", "none"):
        raise InputError(f"--resume {resume!r} is neither auto nor none")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    checkpoints = complete_checkpoints(out)
    if resume == "none" and (out / "config.json").exists():
        raise InputError(f"{out} already holds a run: pass --resume auto to go on with it, or choose another --out")
    if checkpoints and "imported" in json.loads((out / "config.json").read_text()):
        raise InputError(f"{out} holds imported weights and no optimizer: pass --init_from {out} and another --out")
    return checkpoints[-1] if checkpoints else None


def check_same_model(out: Path, kind: str, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises InputError, listing the keys, when the run in `out` has another kind or another model than `config`.

    `facts` are the further entries of config.json; of those, the tokenizer and the dVAE must be the same.
    """
    before = json.loads((out / "config.json").read_text())
    if before["kind"] != kind:
        raise InputError(f"{out} holds a {before['kind']} run, not a {kind} run; choose another --out")
    differing = [
        f"{section}.{key} was {before['config'][section].get(key)} and is {value}"
        for section in FIXED_SECTIONS
        for key, value in config.get(section, {}).items()
        if before["config"][section].get(key) != value
    ]
    if differing:
        raise InputError(f"{out} holds another model: {'; '.join(differing)}; use its settings, or another --out")
    for name, what in FIXED_FACTS.items():
        if name in facts and before.get(name) != facts[name]:
            raise InputError(f"{out} was trained with {what}: go on with the one it had, or choose another --out")


def write_run(out: Path, kind: str, config: dict[str, Any], deepspeed_config: dict[str, Any], **facts: Any) -> None:
    """Writes config.json and ds_config.json; `facts` are further top-level entries such as n_parameters."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples").mkdir(exist_ok=True)
    description = {"kind": kind, "version": __version__, "config": config, **facts}
    (out / "ds_config.json").write_text(json.dumps(deepspeed_config, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(description, indent=2) + "\n")
