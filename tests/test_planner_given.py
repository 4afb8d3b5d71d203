"""`dalle-ds plan --deepspeed_config`: the run that training would make of a JSON, or the refusal."""

import json
import re

import pytest
from test_cli import run_python
from test_plan_command import call, call_json
from test_planner_json import FOLDER

from dalle_ds.presets import PRESETS

ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
MICRO = {"train_micro_batch_size_per_gpu": 2}


@pytest.fixture
def write(tmp_path):
    def write(**settings):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(ADAMW | settings))
        return path

    return write


@pytest.mark.parametrize(
    ("settings", "flags", "micro_batch", "micro_steps"),
    [
        # A JSON with a micro-batch alone does no accumulation.
        (MICRO, [], 2, 1),
        (MICRO | {"gradient_accumulation_steps": 4}, [], 2, 4),
        ({"train_batch_size": 64}, [], 8, 1),
        (MICRO | {"train_batch_size": 64}, [], 2, 4),
        (MICRO | {"train_batch_size": 64}, ["--micro_batch", 1], 1, 8),
        (MICRO | {"train_batch_size": 64, "gradient_accumulation_steps": 4}, ["--batch", 32], 2, 2),
        (MICRO | {"gradient_accumulation_steps": 4}, ["--micro_batch", 3], 3, 4),
        (MICRO, ["--batch", 32], 2, 2),
    ],
)
def test_a_step_has_the_samples_that_training_takes(capsys, write, settings, flags, micro_batch, micro_steps):
    values = call_json(capsys, "--preset", "small", "--deepspeed_config", write(**settings), *flags)
    assert values["config"]["micro_batch"] == micro_batch
    assert values["micro_steps"] == micro_steps
    assert values["batch"] == 8 * micro_batch * micro_steps


def test_a_deepspeed_json_is_shown_first(capsys):
    path = FOLDER / "zero3_bf16.json"
    values = call_json(capsys, "--preset", "1.3b", "--gpus", 64, "--deepspeed_config", path)
    assert values["shown"] == values["ways"][0]["name"] == "the JSON"
    assert values["ways"][0]["start"] is None
    assert (values["batch"], values["micro_steps"]) == (1024, 16)
    table = next(way for way in values["ways"] if way["name"] == "ZeRO 3 bf16")
    for key in ("memory", "time", "inside_bytes", "between_bytes"):
        assert values["ways"][0][key] == table[key]


def test_the_wire_of_a_json_is_its_own(capsys, write):
    path = write(
        **MICRO,
        bf16={"enabled": True},
        zero_optimization={"stage": 3},
        hierarchical_sharding={"machine_size": 4},
        gradient_compression={"type": "none", "wire": "1-6-9"},
    )
    given, *ways = call_json(capsys, "--gpus", 16, "--deepspeed_config", path)["ways"]
    table = next(way for way in ways if way["name"] == "hierarchical")
    assert given["layout"]["machine_size"] == 4
    assert given["payload"]["matrix_bytes"] == table["payload"]["matrix_bytes"] / 2


def test_the_papers_file_fits_the_gpus_of_the_paper(capsys):
    """The README says so: rank 896 on 1,024 V100 of 16 GB, and the sizes in the file see to it."""
    path = FOLDER / "hierarchical_fp16_rank896.json"
    arguments = ("--gpus", 1024, "--gpu", "v100-16gb", "--deepspeed_config", path)
    given = call_json(capsys, *arguments)["ways"][0]
    assert given["fits"]
    assert given["layout"]["recompute"]
    assert given["memory"]["total"] == pytest.approx(15.7e9, rel=0.01)


def test_with_deepspeeds_sizes_the_papers_file_would_not_fit(capsys, tmp_path):
    settings = json.loads((FOLDER / "hierarchical_fp16_rank896.json").read_text())
    settings["zero_optimization"] = {"stage": 3}
    path = tmp_path / "default.json"
    path.write_text(json.dumps(settings))
    given = call_json(capsys, "--gpus", 1024, "--gpu", "v100-16gb", "--deepspeed_config", path)["ways"][0]
    assert not given["fits"]
    assert given["memory"]["buckets"] == (2 + 4) * 500_000_000


def test_offloading_leaves_weights_on_the_gpu_and_says_what_is_not_counted(capsys):
    path = FOLDER / "zero3_offload_bf16.json"
    values = call_json(capsys, "--gpus", 8, "--deepspeed_config", path)
    memory = values["ways"][0]["memory"]
    assert memory["state"] == memory["weights"]
    assert memory["host"] > 20 * values["parameters"]["total"]
    assert any("on the host is not counted" in note for note in values["notes"])


def test_a_file_of_stage_1_is_said_to_be_one(capsys):
    for name, is_said in (("dvae_fp16", True), ("cpu_dvae", True), ("cpu_zero3", False)):
        notes = call_json(capsys, "--deepspeed_config", FOLDER / f"{name}.json")["notes"]
        assert any("by its name it is for stage 1" in note for note in notes) == is_said


def test_a_v100_is_told_that_it_has_no_bfloat16(capsys):
    _, out, _ = call(capsys, "--gpu", "v100-32gb", "--deepspeed_config", FOLDER / "zero3_bf16.json")
    assert "note: the JSON: v100-32gb has no bfloat16: use fp16" in out


def test_sizes_may_be_floats_as_deepspeed_writes_them(capsys, write):
    path = write(**MICRO, bf16={"enabled": True}, zero_optimization={"stage": 3, "reduce_bucket_size": 5e8})
    assert call_json(capsys, "--deepspeed_config", path)["ways"][0]["memory"]["buckets"] == 10**9


def test_compression_of_whole_gradients_is_planned(capsys, write):
    path = write(**MICRO, gradient_compression={"type": "powersgd", "matrix_rank": 100})
    given = call_json(capsys, "--preset", "small", "--deepspeed_config", path)["ways"][0]
    assert given["payload"]["n_calls"] == 2 * 2 * PRESETS["small"].prior.model.n_layer + 1


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_machines_that_gpus_do_not_fill_are_refused_as_training_refuses_them(capsys, gpus):
    path = FOLDER / "hierarchical_fp16_rank512.json"
    code, _, err = call(capsys, "--gpus", gpus, "--deepspeed_config", path, "--batch", gpus)
    assert code == 2
    assert f"hierarchical_sharding.machine_size 8 does not divide {gpus} GPUs" in err


def test_machines_of_the_json_and_of_the_flag_must_agree(capsys, write):
    path = write(**MICRO, zero_optimization={"stage": 3}, hierarchical_sharding={"machine_size": 4})
    code, _, err = call(capsys, "--gpus", 16, "--gpus_per_machine", 8, "--deepspeed_config", path)
    assert code == 2
    assert "config.json shards over machines of 4" in err
    # The flag's default does not count: 8 would not divide 12.
    values = call_json(capsys, "--gpus", 12, "--deepspeed_config", path)
    assert values["ways"][0]["layout"]["machine_size"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: .* at line 1"),
        ("[]", "the top level must be an object"),
        (json.dumps(ADAMW | MICRO | {"zero_optimization": {"stage": 4}}), "zero_optimization.stage 4"),
        (json.dumps(ADAMW | MICRO | {"zero_optimization": 3}), "section 'zero_optimization' must be an object"),
        (json.dumps(ADAMW | {"train_batch_size": "many"}), "train_batch_size 'many' must be a whole number"),
        (json.dumps(ADAMW | MICRO | {"train_batch_size": 100}), "train_batch_size 100 is not micro-batch x"),
        (json.dumps(ADAMW | MICRO | {"hierarchical_shardng": {}}), "unknown key 'hierarchical_shardng'"),
        (json.dumps(ADAMW | MICRO | {"mixed_precision": True}), "mixed_precision must be an object"),
        (json.dumps(MICRO | {"optimizer": {"type": "AdamW", "params": [1]}}), "optimizer.params"),
        (json.dumps(ADAMW | MICRO | {"gradient_compression": []}), "gradient_compression must be an object"),
        (
            json.dumps(ADAMW | MICRO | {"hierarchical_sharding": {"machine_size": 8}}),
            "hierarchical_sharding shards parameters: set .* to 3",
        ),
        (
            json.dumps(ADAMW | MICRO | {"zero_optimization": {"stage": 2}, "gradient_compression": {"type": "none"}}),
            "gradient_compression cannot serve ZeRO 2",
        ),
    ],
)
def test_what_training_refuses_is_refused_in_one_line(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, out, err = call(capsys, "--deepspeed_config", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(rf"config\.json.*{message}", err)


def test_a_given_json_that_is_best_is_started_with_itself(capsys, write):
    path = write(
        train_batch_size=1024,
        train_micro_batch_size_per_gpu=1,
        bf16={"enabled": True},
        zero_optimization={"stage": 3, "overlap_comm": True},
        hierarchical_sharding={"machine_size": 8},
        gradient_compression={"type": "powersgd", "matrix_rank": 8},
    )
    network = ("--gpus", 1024, "--network_bandwidth", 0.1)
    _, out, _ = call(capsys, *network, "--deepspeed_config", path)
    assert "best: the JSON: the fastest that fits" in out
    assert f"start: deepspeed launch/train_prior.py --preset 12b --deepspeed_config {path}" in out


def test_with_a_json_nothing_but_the_answer_is_printed():
    """DeepSpeed's own lines, of the accelerator that it found, are not."""
    path = FOLDER / "zero3_bf16.json"
    arguments = ["plan", "--json", "--deepspeed_config", str(path)]
    out = run_python(f"from dalle_ds.cli import main\nassert main({arguments!r}) == 0")
    assert json.loads(out)["shown"] == "the JSON"
