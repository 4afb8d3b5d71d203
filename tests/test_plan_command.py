"""`dalle-ds plan`: instant, readable when piped, JSON on request, one line for a mistake."""

import json
import re
from pathlib import Path

import pytest
from test_cli import HEAVY, run_python
from test_planner_json import CONFIGS, FOLDER

from dalle_ds import cli
from dalle_ds.presets import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text()


def call(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call_json(capsys, *arguments):
    code, out, err = call(capsys, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_papers_run_says_what_fits_what_is_sent_and_how_to_start_it(capsys):
    code, out, _ = call(capsys, "--gpus", 1024, "--gpu", "v100-16gb", "--network_bandwidth", 1.5)
    assert code == 0
    for text in (
        "12b: 12,292,824,320 parameters on 1,024 GPUs (128 machines of 8), v100-16gb",
        "12,092,178,432 in matrices",
        "with PowerSGD of rank 896: 526,963,840 bytes; of the entries of matrices 14.1%",
        "hierarchical PowerSGD: memory of a GPU",
        "PowerSGD's Q0",
        "average P and Q",
        "best: hierarchical PowerSGD: the fastest that fits",
        "start: deepspeed launch/train_prior.py --preset 12b "
        "--deepspeed_config ds_configs/hierarchical_fp16_rank896.json --checkpoint_activations true\n",
        "recompute: fits only with --checkpoint_activations true",
        "at most: if no communication overlaps",
        "images/s",
        "430,000 updates",
    ):
        assert text in out
    assert "\x1b" not in out


def test_the_readme_shows_what_the_command_prints(capsys):
    """The block is that of the first command in its section, but for what lies between table and choice."""
    [line] = re.findall(r"^dalle-ds plan (.*1024.*)$", README, flags=re.MULTILINE)
    [block] = re.findall(r"^```text\n(way .*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    _, out, _ = call(capsys, *line.split())
    table, best = block.split("\n\n")
    assert f"{table}\n" in out
    assert best.strip() in out


def test_the_readmes_figures_of_12b_on_one_gpu_are_the_plans(capsys):
    [line] = re.findall(r"`dalle-ds plan (--gpus 1 .*?)`", README)
    values = call_json(capsys, *line.split())
    way = next(way for way in values["ways"] if way["name"] == values["recommended"])
    usable = values["hardware"]["memory"] * (1 - values["config"]["reserve"])
    assert f"{way['memory']['total'] / 1e9:.1f} GB of {usable / 1e9:.1f}" in README


@pytest.mark.parametrize("gpu", ["v100-16gb", "h200-141gb"])
@pytest.mark.parametrize("gpus", [1, 8, 64, 1024, 16_384])
@pytest.mark.parametrize("micro_batch", [1, 64])
def test_no_line_but_the_command_is_wider_than_a_terminal(capsys, monkeypatch, gpus, gpu, micro_batch):
    monkeypatch.setenv("COLUMNS", "40")  # which is not asked
    _, out, _ = call(capsys, "--gpus", gpus, "--gpu", gpu, "--micro_batch", micro_batch)
    lines = [line for line in out.splitlines() if not line.startswith("start: ")]
    assert max(map(len, lines)) <= 80
    ways = out[out.index("way ") :].splitlines()[2:]
    assert all(len(line.split()) >= 7 for line in ways[: ways.index("")])  # no cell is broken


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_house_is_planned_in_tables_as_wide(capsys, path):
    code, out, _ = call(capsys, "--gpus", 64, "--deepspeed_config", path)
    assert code == 0
    assert out[out.index("way ") :].splitlines()[2].startswith("the JSON  ")
    assert f"note: the JSON is {path}" in " ".join(out.split())
    rows = [line for line in out.splitlines() if "  " in line.strip() or "──" in line]
    assert max(map(len, rows)) <= 80


def test_a_step_that_waits_for_first_bytes_says_so(capsys):
    _, out, _ = call(capsys, "--gpus", 16_384, "--way", "ZeRO 3")
    assert "latency-bound: in 24." in out
    _, out, _ = call(capsys, "--gpus", 16_384, "--way", "hierarchical")
    assert "latency-bound" not in out


def test_the_command_to_start_has_the_models_flags(capsys):
    _, out, _ = call(capsys, "--preset", "small", "--gpus", 64, "--model.n_layer", 3, "--model.n_head", 4)
    assert "start: deepspeed launch/train_prior.py --preset small --model.n_head 4 --model.n_layer 3 --deep" in out


def test_what_no_file_starts_is_started_by_a_changed_copy(capsys):
    _, out, _ = call(capsys, "--preset", "small", "--gpus", 64, "--batch", 6400)
    [start] = re.findall(r"^start: .*(?:\n  .*)*", out, flags=re.MULTILINE)
    command, copy, *changes = start.splitlines()
    assert command.endswith("--deepspeed_config copy.json")
    assert re.fullmatch(r"  copy\.json: a copy of ds_configs/\w+\.json; in it", copy)
    assert "  - set train_batch_size to 6400" in changes


def test_json_has_every_way_with_its_bytes_and_seconds(capsys):
    values = call_json(capsys, "--preset", "2.8b", "--gpus", 64, "--gpu", "a100-40gb")
    assert values["parameters"]["matrices"] == 2_831_155_200
    assert values["compression_rate"] == pytest.approx(0.83333, abs=1e-5)
    assert len(values["ways"]) == 9
    for way in values["ways"]:
        memory, seconds = way["memory"], way["time"]
        assert memory["total"] == memory["state"] + memory["activations"] + memory["temporary"]
        parts = ("forward", "backward", "exposed", "accumulation", "compression", "optimizer")
        assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts))
        assert (FOLDER / way["start"]["file"]).exists()
    assert values["recommended"] in [way["name"] for way in values["ways"]]
    assert values["tokens_per_second"] == pytest.approx(1280 * values["samples_per_second"])
    assert values["batch"] == 1024


def test_fields_of_the_model_are_flags_but_for_those_that_change_nothing(capsys):
    arguments = ("--preset", "small", "--gpus", 1, "--model.n_layer", 2, "--model.n_head", 4)
    assert call_json(capsys, *arguments)["parameters"]["matrices"] == 2 * 12 * 256**2
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "--model.sandwich_norm" in out
    assert "--memory_bandwidth" in out
    assert not any(name in out for name in ("dropout", "pb_relax", "text_loss_weight"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned(capsys, preset):
    code, out, _ = call(capsys, "--preset", preset, "--gpus", 1)
    assert code == 0
    assert f"{preset}: " in out
    assert "on 1 GPU, h100-80gb" in out


def test_table_1_is_printed(capsys):
    code, out, _ = call(capsys, "--table1")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert [row[1:] for row in rows] == [
        ["1920", "512", "64", "0.83333", "83%"],
        ["2688", "640", "80", "0.85119", "85%"],
        ["3968", "896", "112", "0.85887", "86%"],
    ]
    assert len(call_json(capsys, "--table1")) == 3


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--preset", "huge"], ["--preset 'huge'", "presets are tiny"]),
        (["--gpu", "tpu"], ["gpu 'tpu'", "h100-80gb"]),
        (["--gpus", "12"], ["gpus 12", "gpus_per_machine 8", "whole machines"]),
        (["--way", "ZeRO 9"], ["--way 'ZeRO 9'", "ZeRO 0"]),
        (["--deepspeed_config", "no.json"], ["no.json: no such DeepSpeed config", "ds_configs/"]),
        (["--model.n_head", "0"], ["n_head 0 must be at least 1"]),
        (["--gpus", "16", "--matrix_rank", "100"], ["matrix_rank 100", "8 GPUs a machine"]),
        (["--gpus", "16", "--matrix_rank", "99999992"], ["matrix_rank 99999992", "width 3968"]),
        (["--memory_gb", "inf"], ["memory_gb inf"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, shown):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("dalle-ds plan: error: ")
    assert all(text in err for text in shown)


def test_nothing_heavy_is_imported_for_an_answer():
    out = run_python(
        "from dalle_ds.cli import main\nassert main(['plan']) == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert "HEAVY []" in out
