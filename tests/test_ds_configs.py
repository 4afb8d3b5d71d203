"""Every ready DeepSpeed JSON: accepted by our loader, listed in the README, and free of what lives in config.py."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run_distributed

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
    optimizer = load_deepspeed_config(path)["optimizer"]
    assert optimizer["type"] == "CompactAdamW" or optimizer["params"]["torch_adam"] is True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_of_the_file_is_a_field_of_ours(path):
    assert list_keys(json.loads(path.read_text())) & list_fields() == set()


def test_no_field_of_ours_is_a_key_that_deepspeed_reads():
    known = TOP_LEVEL.union(*SECTIONS.values()) | {"lr", "betas", "eps", "weight_decay"}
    assert known & list_fields() == set()


def test_the_readme_lists_every_file_and_no_other():
    readme = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.json)`", readme)) == {path.name for path in FILES}


def train_with_each(configs: dict[str, Any]) -> dict[str, Any]:
    """Trains a toy prior for a few steps with each config, machines made of two processes; losses and applied steps."""
    from test_construction import make_engine, train

    from dalle_ds.training.distributed import process_group

    results = {}
    with process_group():
        for name, config in configs.items():
            engine = make_engine(config)
            log = train(engine, [0] * 4)
            results[name] = [loss for loss, _, _ in log], engine.skipped_steps
            engine.destroy()
    return results


@pytest.mark.slow
def test_a_toy_prior_learns_with_every_file_of_stage_2_on_four_processes():
    configs = {path.stem: load_deepspeed_config(path) for path in FILES if "dvae" not in path.stem}
    for config in configs.values():
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = 2
        config["zero_optimization"] |= {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000}
        if "hierarchical_sharding" in config:
            config["hierarchical_sharding"] = {"machine_size": 2}
    for results in run_distributed(train_with_each, 4, configs, timeout=300):
        for name, (losses, skipped) in results.items():
            assert losses[-1] < losses[0], name
            assert skipped == 0, name
