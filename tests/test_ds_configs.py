"""Every ready DeepSpeed JSON: accepted by our loader, listed in the README, and free of what lives in config.py."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dalle_ds import config as config_module
from dalle_ds.training.deepspeed_config import SECTIONS, TOP_LEVEL, batch_sizes, load_deepspeed_config

FOLDER = Path(__file__).parents[1] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))


def list_keys(value: Any) -> set[str]:
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(list_keys, value.values()))
    if isinstance(value, list):
        return set().union(*map(list_keys, value))
    return set()


def list_fields() -> set[str]:
    """The name of every field of every dataclass in config.py, but of those that only hold other dataclasses."""
    types = [value for value in vars(config_module).values() if dataclasses.is_dataclass(value)]
    return {
        field.name
        for config_type in types
        for field in dataclasses.fields(config_type)
        if not dataclasses.is_dataclass(field.type)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_loader_accepts_the_file(path):
    assert load_deepspeed_config(path) == json.loads(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_batch_divides_over_one_process_and_over_eight(path):
    config = load_deepspeed_config(path)
    for world_size in (1, 8):
        micro, accumulation = batch_sizes(config, world_size, str(path))
        assert config.get("train_batch_size") in (None, micro * accumulation * world_size)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_optimizer_needs_a_compiler(path):
    assert load_deepspeed_config(path)["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_of_the_file_is_a_field_of_ours(path):
    assert list_keys(json.loads(path.read_text())) & list_fields() == set()


def test_no_field_of_ours_is_a_key_that_deepspeed_reads():
    known = TOP_LEVEL.union(*SECTIONS.values()) | {"lr", "betas", "eps", "weight_decay"}
    assert known & list_fields() == set()


def test_the_readme_lists_every_file_and_no_other():
    readme = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.json)`", readme)) == {path.name for path in FILES}
