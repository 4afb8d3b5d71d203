"""The DeepSpeed JSON: what DeepSpeed would accept in silence is refused, naming file, key and remedy."""

import json
from pathlib import Path

import pytest

from dalle_ds.config import InputError
from dalle_ds.training.deepspeed_config import batch_sizes, load_deepspeed_config, zero_stage

GOOD = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 4.0,
}
SHIPPED = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))


@pytest.fixture
def load(tmp_path):
    def write_and_load(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_deepspeed_config(path)

    return write_and_load


def test_a_good_config_comes_back_as_written(load):
    assert load(GOOD) == GOOD


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_every_shipped_config_passes_the_check(path):
    assert load_deepspeed_config(path)["optimizer"]["params"]["lr"] > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gradient_cliping": 1.0}, ["unknown key 'gradient_cliping'", "gradient_clipping"]),
        ({"zero_optimization": {"stage": 3, "stagee": 1}}, ["section 'zero_optimization'", "'stagee'"]),
        ({"fp16": {"enabled": True, "loss_scale_windw": 1}}, ["section 'fp16'", "'loss_scale_windw'"]),
        ({"bf16": {"enable": True}}, ["section 'bf16'", "'enable'", "enabled"]),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, ["section 'optimizer'", "'parms'", "params"]),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, ["section 'data_types'", "'grad_acum_dtype'"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "--schedule"]),
        ({"zero_optimization": 3}, ["section 'zero_optimization' must be an object"]),
        ({"optimizer": {"type": "AdamW", "params": {}}}, ["optimizer.params.lr"]),
        ({"optimizer": None}, ["optimizer"]),
        ({"checkpoint": {"load_universal": True}}, ["'checkpoint'", "a format of their own", "leave it out"]),
        ({"optimizer": {"type": "AdamW", "params": 3}}, ["optimizer"]),
    ],
)
def test_a_bad_key_is_named_with_its_section_in_one_line(load, change, named):
    with pytest.raises(InputError) as error:
        load({**GOOD, **change})
    message = str(error.value)
    assert "ds.json" in message
    assert "\n" not in message
    for text in named:
        assert text in message


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_what_lies_on_nvme_could_not_be_saved_and_is_refused_before_anything_is_trained(load, name):
    zero = GOOD["zero_optimization"]
    for section in ({"device": "cpu"}, {"device": "none"}, None):
        load({**GOOD, "zero_optimization": {**zero, name: section}})
    with pytest.raises(InputError, match=rf"ds\.json: zero_optimization\.{name} on NVMe cannot be saved: use cpu"):
        load({**GOOD, "zero_optimization": {**zero, name: {"device": "nvme", "nvme_path": "/local"}}})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_float32_gradients_in_16_bit_training_need_zero(load, precision):
    mixed = {**GOOD, precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert load(mixed) == mixed
    for stage in ({}, {"zero_optimization": {"stage": 0}}):
        rest = {key: value for key, value in mixed.items() if key != "zero_optimization"}
        with pytest.raises(InputError, match=r"grad_accum_dtype needs ZeRO .* set zero_optimization.stage to 1"):
            load({**rest, **stage})
        assert load({**rest, **stage, precision: {"enabled": False}})


@pytest.mark.parametrize("missing", ["optimizer", "train_micro_batch_size_per_gpu"])
def test_what_is_missing_is_named(load, missing):
    with pytest.raises(InputError, match=missing):
        load({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1,\n "b" 2}', ["not JSON", "line 2"]),
        ("", ["not JSON"]),
        ("[1, 2]", ["the top level must be an object"]),
        ("\ufeff{}", ["ds.json"]),
    ],
)
def test_what_is_no_json_object_is_refused_with_the_place(load, text, named):
    with pytest.raises(InputError) as error:
        load(text)
    for part in ["ds.json", *named]:
        assert part in str(error.value)


def test_a_missing_file_names_where_ready_ones_are():
    with pytest.raises(InputError, match=r"nowhere\.json: no such DeepSpeed config; ds_configs/"):
        load_deepspeed_config("nowhere.json")


def test_comments_are_allowed_at_any_depth_and_taken_out(load):
    commented = {key: {"// why": "said", **value} if isinstance(value, dict) else value for key, value in GOOD.items()}
    commented["optimizer"]["params"] = {"// lr": "peak", **GOOD["optimizer"]["params"]}
    assert load({"// 2 processes": "on a laptop", **commented}) == GOOD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": "x"}}, ["zero_optimization.stage 'x'"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, ["reduce_bucket_size 'big'", "integer"]),
        ({"fp16": {"enabled": "perhaps"}}, ["fp16.enabled 'perhaps'", "boolean"]),
        ({"train_micro_batch_size_per_gpu": "4"}, ["train_micro_batch_size_per_gpu '4'", "whole number"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps 0", "whole number"]),
        ({"gradient_clipping": "no"}, ["gradient_clipping 'no'", "number"]),
        ({"optimizer": {"type": "Adamm", "params": {"lr": 1e-3}}}, ["optimizer.type 'Adamm'", "AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}}, ["optimizer.params.lr '1e-3'", "number"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "beta": 1}}}, ["optimizer.params", "'beta'", "betas"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_in_one_line(load, change, named):
    with pytest.raises(InputError) as error:
        load({**GOOD, **change})
    message = str(error.value)
    assert "\n" not in message
    for text in ["ds.json", *named]:
        assert text in message


@pytest.mark.parametrize(
    ("keys", "world_size", "expected"),
    [
        ({"micro": 4}, 2, (4, 1)),
        ({"micro": 4, "accumulation": 3}, 2, (4, 3)),
        ({"total": 16}, 2, (8, 1)),
        ({"total": 16, "accumulation": 2}, 2, (4, 2)),
        ({"total": 16, "micro": 2}, 2, (2, 4)),
        ({"total": 16, "micro": 2, "accumulation": 4}, 2, (2, 4)),
    ],
)
def test_batch_sizes_are_worked_out_as_deepspeed_does(keys, world_size, expected):
    assert batch_sizes(in_full(keys), world_size, "ds.json") == expected


@pytest.mark.parametrize(
    ("keys", "world_size"),
    [({"total": 15}, 2), ({"total": 16, "micro": 3}, 2), ({"total": 1}, 2), ({"micro": 0}, 1), ({"total": 0}, 1)],
)
def test_batch_sizes_that_do_not_divide_are_refused(keys, world_size):
    with pytest.raises(InputError, match=rf"^ds\.json.* {world_size} processes"):
        batch_sizes(in_full(keys), world_size, "ds.json")


def in_full(keys):
    names = {
        "micro": "train_micro_batch_size_per_gpu",
        "accumulation": "gradient_accumulation_steps",
        "total": "train_batch_size",
    }
    return {names[key]: value for key, value in keys.items()}


def test_zero_stage_is_0_where_nothing_is_said():
    assert zero_stage({}) == 0
    assert zero_stage(GOOD) == 3
