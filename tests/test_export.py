"""Exported models: the same weights there and back, a card that says what they are, and one line for what is wrong."""

import json
import shutil

import pytest
from conftest import refusal, run_here, run_in_ranks
from helpers import read_weights
from safetensors.torch import load_file, save_file

from dalle_ds.commands.export import validation_of
from dalle_ds.models.weights import find_weights, fingerprint
from dalle_ds.storage.files import measure

STAGES = ("dvae", "prior")


@pytest.fixture(scope="module")
def exported(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for stage in STAGES:
        run_here("export", chain / stage, "--out", folder / stage)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_goes_out_and_comes_back_bit_for_bit(chain, exported, tmp_path, stage):
    run_here("import-model", exported / stage, "--out", tmp_path / stage)
    file = exported / stage / "model.safetensors"
    averaged = json.loads((exported / stage / "config.json").read_text())["averaged"]
    written, before, after = (
        load_file(file),
        read_weights(chain / stage, averaged=averaged),
        read_weights(tmp_path / stage),
    )
    assert written.keys() == before.keys() == after.keys()
    assert all(tensor.equal(before[name]) and tensor.equal(after[name]) for name, tensor in written.items())
    record = measure(file)["sha256"]
    assert fingerprint(chain / stage, stage) == fingerprint(tmp_path / stage, stage) == record
    _, description = find_weights(chain / stage, stage)
    _, imported = find_weights(tmp_path / stage, stage)
    assert imported["config"]["model"] == description["config"]["model"]
    assert imported["n_parameters"] == description["n_parameters"]
    run_here("export", tmp_path / stage, "--out", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_imported_models_draw_the_same_pictures(chain, exported, tmp_path):
    for stage in STAGES:
        dvae = ["--dvae", tmp_path / "dvae"] if stage == "prior" else []
        run_here("import-model", exported / stage, "--out", tmp_path / stage, *dvae)
    for name, prior in (("before", chain / "prior"), ("after", tmp_path / "prior")):
        run_here("sample", "--prior", prior, "--out", tmp_path / name, "--n", 1, "a red circle")
    assert (tmp_path / "before/grid.png").read_bytes() == (tmp_path / "after/grid.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_card_says_what_the_model_is_and_leaves_the_licence_to_its_owner(chain, exported, stage):
    card, settings = ((exported / stage / name).read_text() for name in ("README.md", "config.json"))
    settings = json.loads(settings)
    description = json.loads((chain / stage / "config.json").read_text())
    for words in (
        f"{description['n_parameters']:,}",
        description["config"]["data"]["train"],
        f"| steps | {settings['step']} |",
        settings["sha256"],
        "## Licence",
        "Not stated yet",
        f"torch {description['versions']['torch']}",
    ):
        assert words in card
    assert (exported / stage / "tokenizer.model").exists() == (stage == "prior")
    assert sorted(settings) == sorted(
        ["kind", "version", "n_parameters", "step", "averaged", "sha256", "config"]
        + (["dvae_sha256", "tokenizer_sha256"] if stage == "prior" else [])
    )


@pytest.mark.slow
def test_the_average_goes_out_and_the_last_weights_on_request(chain, tmp_path):
    run, validation = tmp_path / "run", ["--data.validation", chain / "tokens/validation"]
    run_in_ranks(1, chain.train_prior(run, "--averaging", 0.9, "--averaging_every", 1, *validation))
    averaged, last = (read_weights(run, averaged=averaged) for averaged in (True, False))
    assert not all(tensor.equal(last[name]) for name, tensor in averaged.items())
    for flags, expected in (([], averaged), (["--last_weights"], last)):
        out = tmp_path / f"out{len(flags)}"
        run_here("export", run, "--out", out, *flags)
        assert all(tensor.equal(expected[name]) for name, tensor in load_file(out / "model.safetensors").items())
        assert json.loads((out / "config.json").read_text())["averaged"] == (not flags)
        card = (out / "README.md").read_text()
        assert ("None were recorded." in card) == bool(flags), "figures are the average's"
        assert ("| image_loss |" in card) == (not flags)
        assert "| time |" not in card


def test_the_figures_of_the_card_are_those_of_the_step_that_is_exported(tmp_path):
    lines = [
        {"step": step, "kind": kind, "time": 1.0, "loss": step / 10}
        for step in (3, 6)
        for kind in ("train", "validation")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9, "kind": "validation", "lo')
    assert validation_of(tmp_path, 3) == {"loss": 0.3}
    assert validation_of(tmp_path, 6) == {"loss": 0.6}
    assert validation_of(tmp_path, 9) == validation_of(tmp_path / "nowhere", 3) == {}


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(chain, exported, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "is no run folder" in refusal(capsys, "export", tmp_path, *out)
    assert "is not empty" in refusal(capsys, "export", chain / "prior", "--out", exported)
    assert "is not what `dalle-ds export` writes" in refusal(capsys, "import-model", tmp_path, *out)
    assert "already holds a run" in refusal(capsys, "import-model", exported / "dvae", "--out", chain / "dvae")
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    settings = json.loads((exported / "dvae/config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(settings))
    assert "no such file" in refusal(capsys, "import-model", spoilt, *out)
    weights = load_file(exported / "dvae/model.safetensors")
    weights.popitem()
    save_file(weights, spoilt / "model.safetensors")
    assert "its SHA-256 differs" in refusal(capsys, "import-model", spoilt, *out)
    settings["sha256"] = measure(spoilt / "model.safetensors")["sha256"]
    (spoilt / "config.json").write_text(json.dumps(settings))
    assert "does not fit its config.json" in refusal(capsys, "import-model", spoilt, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_exported(chain, tmp_path, capsys):
    """Bug: it was, with the checksum of what was damaged."""
    run = shutil.copytree(chain / "prior", tmp_path / "run")
    [shard] = run.glob("checkpoints/*/shards/*")
    content = shard.read_bytes()
    for damaged, said in ((content[:-5] + b"spoil", "has another checksum"), (content[:200], "has 200 bytes")):
        shard.write_bytes(damaged)
        assert said in refusal(capsys, "export", run, "--out", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
