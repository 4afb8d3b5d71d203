"""Every ready DeepSpeed JSON: accepted by our loader, listed in the README, and free of what lives in config.py."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run_distributed

from dalle_ds import config as config_module
from dalle_ds.planner.deepspeed_json import machine_size_of, way_of
from dalle_ds.planner.memory import factor_bytes
from dalle_ds.planner.parameters import count_parameters
from dalle_ds.planner.traffic import exchanges_of
from dalle_ds.planner.ways import Layout
from dalle_ds.presets import find_preset
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


# The sizes that files are for; all others are for any, and cells are about large models.
SIZES = {"hierarchical_fp16_rank512": "2.8b", "hierarchical_fp16_rank640": "5.6b", "cpu_hierarchical": "tiny"}
N = 1024


def read_row(name: str) -> list[str]:
    """The cells of a file's row in the README."""
    [line] = re.findall(rf"^\| `{name}` \|.*$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


def value_of(cell: str) -> float:
    """The number that a cell begins with, for N processes and one micro-step."""
    match = re.match(r"[\d. +/N]+", cell)
    assert match
    return float(eval(match[0], {"N": N}))


def plan_inputs(path: Path) -> tuple[Any, Any, Layout]:
    """Of a file: a model of its size that has hardly anything but matrices, its way, and N GPUs."""
    model = find_preset(SIZES.get(path.stem, "12b")).prior.model
    model = dataclasses.replace(model, text_vocab_size=1, image_vocab_size=1)
    config = load_deepspeed_config(path)
    return model, way_of(config), Layout(n_gpus=N, machine_size=machine_size_of(config) or 8)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_parameter_takes_the_bytes_that_the_readme_says(path):
    model, way, layout = plan_inputs(path)
    of_state, cell = way.state.matrices, read_row(path.name)[3]
    weight = of_state.weight / layout.group_size(way.weights)
    others = of_state.gradient / layout.group_size(way.gradients) + (of_state.master + of_state.moments) / (
        layout.group_size(way.optimizer)
    )
    if way.offloads:
        # On the host, gradients in float32 once more.
        assert value_of(cell.split(", ")[1]) == pytest.approx(others + 4 / layout.group_size(way.optimizer))
        assert value_of(cell) == weight
        return
    starts = factor_bytes(model, way, layout)[0] / count_parameters(model).matrices
    assert value_of(cell) == pytest.approx(weight + others + starts, rel=1e-3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_parameter_sends_the_bytes_between_machines_that_the_readme_says(path):
    """Of all GPUs of a machine; 5% for gains and biases, and for the layers that stay from one pass to the other."""
    model, way, layout = plan_inputs(path)
    exchanges = [one for one in exchanges_of(model, way, layout, 1) if one.what != "average the rest"]
    sent = sum(one.sent(layout).between * layout.machine_size for one in exchanges)
    assert sent / count_parameters(model).matrices == pytest.approx(value_of(read_row(path.name)[4]), rel=0.05)


def hold_offloaded() -> list[dict[str, float]]:
    """Bytes a parameter of an engine that offloads, on a process of 2, by DeepSpeed's own buffers."""
    from test_construction import make_engine, train

    from dalle_ds.training.distributed import process_group

    config = load_deepspeed_config(FOLDER / "zero3_offload_bf16.json")
    del config["train_batch_size"]
    config["zero_optimization"] |= {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000}
    with process_group():
        engine = make_engine(config)
        train(engine, [0] * 2)
        zero = engine.optimizer
        masters = zero.fp32_partitioned_groups_flat
        states = [value for state in zero.optimizer.state.values() for value in state.values() if value.ndim]
        n = sum(master.numel() for master in masters)
        held = {
            "weights": sum(flat.nbytes for flat in zero.fp16_partitioned_groups_flat) / n,
            "float32 copies": sum(master.nbytes for master in masters) / n,
            "their gradients": sum(master.grad.nbytes for master in masters) / n,
            "gradients": zero.grad_partitions_flat_buffer.nbytes / n,
            "moments": sum(state.nbytes for state in states) / n,
        }
        is_on_host = zero.offload_optimizer and zero.device == "cpu"  # where those are made
        engine.destroy()
    return [held, {"is_on_host": is_on_host}]


@pytest.mark.slow
def test_offloading_keeps_twenty_bytes_beside_the_gpu_and_two_on_it():
    """DeepSpeed puts all but the weights on the device "cpu" (stage3.py, _create_fp32_partitions and what follows)."""
    for held, place in run_distributed(hold_offloaded, 2):
        assert held == {"weights": 2, "float32 copies": 4, "their gradients": 4, "gradients": 4, "moments": 8}
        assert place == {"is_on_host": True}


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
