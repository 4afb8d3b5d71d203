"""Command-line flags made from dataclasses: one flag a field, `--model.n_layer 24`, with default and help.

A flag that is not given leaves the preset's value alone, so the order is: dataclass, preset, flag.
"""

import argparse
import dataclasses
import typing
from typing import Any, TypeVar

from dalle_ds.config import InputError

Config = TypeVar("Config")

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "1"), ("false", "no", "0")


def add_flags(parser: argparse.ArgumentParser, config: Any, prefix: str = "") -> None:
    """Adds a flag for every field of the dataclass instance `config`; nested ones get `--outer.inner`."""
    types = typing.get_type_hints(type(config))
    group = parser.add_argument_group(prefix.rstrip(".") or None)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            add_flags(parser, value, f"{prefix}{field.name}.")
            continue
        text = field.metadata.get("help", "")
        group.add_argument(
            f"--{prefix}{field.name}",
            type=_parse_bool if types[field.name] is bool else types[field.name],
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=f"{text} (default: {value})".replace("%", "%%"),
        )


def apply_flags(config: Config, args: argparse.Namespace, prefix: str = "") -> Config:
    """The dataclass instance `config` with every field replaced whose flag was given."""
    given = vars(args)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = apply_flags(value, args, f"{prefix}{field.name}.")
        elif f"{prefix}{field.name}" in given:
            changes[field.name] = given[f"{prefix}{field.name}"]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def from_dict(config_type: type[Config], values: dict[str, Any], where: str) -> Config:
    """Builds the dataclass from nested dicts as `dataclasses.asdict` makes them.

    Raises InputError that names `where` and the key when a key is unknown.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: {values!r} must be an object of settings")
    types = typing.get_type_hints(config_type)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(types))}")
    nested = {
        name: from_dict(types[name], value, f"{where}: {name}") if dataclasses.is_dataclass(types[name]) else value
        for name, value in values.items()
    }
    return config_type(**nested)


def _parse_bool(text: str) -> bool:
    if text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both training commands share, beside the flags of their configs."""
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON; ds_configs/ holds ready ones")
    parser.add_argument("--out", required=True, help="run folder to write, or to go on with")
    parser.add_argument(
        "--resume",
        default="none",
        help="auto: go on from the newest checkpoint in --out; s3://bucket/prefix: from the newest one that "
        "--loop.upload left there, unless --out has a newer one (default: none)",
    )
    parser.add_argument(
        "--allow_change",
        nargs="+",
        default=[],
        metavar="KEY",
        help="settings in which a resumed run may differ from its checkpoint: optimizer.params.lr, data.train, ...",
    )
    parser.add_argument("--preset", default="tiny", help="named sizes and schedules that the flags below change")
    # The deepspeed launcher adds this; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
