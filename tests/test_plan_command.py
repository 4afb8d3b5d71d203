"""`dalle-ds plan`: instant, readable when piped, JSON on request, one line for a mistake."""

import json

import pytest
from test_cli import HEAVY, run_python
from test_planner import CONFIGS

from dalle_ds import cli
from dalle_ds.presets import PRESETS


def call(capsys, *arguments):
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call_json(capsys, *arguments):
    code, out, _ = call(capsys, "--json", *arguments)
    assert code == 0
    return json.loads(out)


def test_the_papers_run_says_what_fits_and_what_is_sent(capsys):
    code, out, _ = call(capsys, "--gpus", "1024", "--gpu", "v100-16gb", "--way", "hierarchical PowerSGD")
    assert code == 0
    for text in (
        "12b: 12,292,824,320 parameters on 1,024 GPUs (128 machines of 8), v100-16gb",
        "12,092,178,432 in matrices",
        "rank 896 saves 85.9% of the matrices'",
        "hierarchical PowerSGD: memory of a GPU",
        "PowerSGD's error buffers",
        "average between machines",
        "best: ",
        "images/s",
        "430,000 updates",
    ):
        assert text in out
    assert "\x1b" not in out


def test_tables_are_no_wider_than_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for gpus in ("1", "8", "16384"):
        _, out, _ = call(capsys, "--gpus", gpus)
        tables = [line for line in out.splitlines() if "  " in line.strip() or "──" in line]
        assert max(map(len, tables)) <= 80
        ways = out[out.index("way ") :].splitlines()[2:]
        assert ways[0].split()[:2] == ["ZeRO", "0"]
        assert all(len(line.split()) >= 6 for line in ways[: ways.index("")])  # no cell is broken


def test_json_has_every_way_with_its_bytes_and_seconds(capsys):
    values = call_json(capsys, "--preset", "2.8b", "--gpus", "64", "--gpu", "a100-40gb")
    assert values["parameters"]["matrices"] == 2_831_155_200
    assert values["compression_rate"] == pytest.approx(0.83333, abs=1e-5)
    assert len(values["ways"]) == 7
    for way in values["ways"]:
        memory, seconds = way["memory"], way["time"]
        assert memory["total"] == memory["state"] + memory["activations"] + memory["temporary"]
        parts = ("forward", "backward", "exposed", "compression", "optimizer")
        assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts))
    assert values["recommended"] in [way["name"] for way in values["ways"]]
    assert values["tokens_per_second"] == pytest.approx(1280 * values["samples_per_second"])
    assert values["batch"] == 1024


def test_a_deepspeed_json_is_shown_first_and_flags_change_it(capsys):
    path = next(path for path in CONFIGS if path.stem == "zero3_bf16")
    values = call_json(capsys, "--preset", "1.3b", "--gpus", "64", "--deepspeed_config", str(path))
    assert values["shown"] == values["ways"][0]["name"] == "zero3_bf16.json"
    assert (values["batch"], values["micro_steps"]) == (1024, 16)
    more = ("--preset", "1.3b", "--gpus", "64", "--deepspeed_config", str(path), "--micro_batch", "4")
    assert call_json(capsys, *more)["micro_steps"] == 4


def test_a_v100_is_told_that_it_has_no_bfloat16(capsys):
    path = next(path for path in CONFIGS if path.stem == "zero3_bf16")
    _, out, _ = call(capsys, "--gpus", "8", "--gpu", "v100-32gb", "--deepspeed_config", str(path))
    assert "note: v100-32gb has no bfloat16" in out


def test_fields_of_the_model_are_flags(capsys):
    arguments = ("--preset", "small", "--gpus", "1", "--model.n_layer", "2", "--model.n_head", "4")
    assert call_json(capsys, *arguments)["parameters"]["matrices"] == 2 * 12 * 256**2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned(capsys, preset):
    code, out, _ = call(capsys, "--preset", preset, "--gpus", "1")
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
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, shown):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("dalle-ds plan: error: ")
    assert all(text in err for text in shown)


def test_machines_of_the_json_and_of_the_flag_must_agree(capsys, tmp_path):
    path = tmp_path / "h.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "hierarchical_sharding": {"machine_size": 4}}')
    code, _, err = call(capsys, "--gpus", "16", "--gpus_per_machine", "8", "--deepspeed_config", str(path))
    assert code == 2
    assert "h.json shards over machines of 4" in err
    values = call_json(capsys, "--gpus", "16", "--deepspeed_config", str(path))
    assert values["ways"][0]["layout"]["machine_size"] == 4


def test_nothing_heavy_is_imported_for_an_answer():
    heavy = [name for name in HEAVY if name != "rich"]
    out = run_python(
        "from dalle_ds.cli import main\nassert main(['plan']) == 0\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])"
    )
    assert "HEAVY []" in out
