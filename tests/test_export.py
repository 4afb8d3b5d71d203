"""Exported models: the same bytes there and back, a card that says what they are, and one line for what is wrong."""

import json
import shutil

import pytest
from conftest import run_here
from safetensors.torch import load_file, save_file

from dalle_ds.cli import main
from dalle_ds.commands.export import sha256
from dalle_ds.models.weights import find_weights, fingerprint

STAGES = ("dvae", "prior")


@pytest.fixture(scope="module")
def exported(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for stage in STAGES:
        run_here("export", chain / stage, "--out", folder / stage)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_goes_out_and_comes_back_byte_for_byte(chain, exported, tmp_path, stage):
    run_here("import-model", exported / stage, "--out", tmp_path / stage)
    before, description = find_weights(chain / stage, stage)
    after, imported = find_weights(tmp_path / stage, stage)
    assert before.read_bytes() == after.read_bytes() == (exported / stage / "model.safetensors").read_bytes()
    assert fingerprint(chain / stage, stage) == fingerprint(tmp_path / stage, stage)
    assert imported["config"]["model"] == description["config"]["model"]
    assert imported["n_parameters"] == description["n_parameters"]
    run_here("export", tmp_path / stage, "--out", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == before.read_bytes()


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
    run = shutil.copytree(chain / "prior", tmp_path / "run")
    last, _ = find_weights(run, "prior", averaged=False)
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last.with_name("averaged.safetensors"))
    for flags, file in (([], "averaged.safetensors"), (["--last_weights"], "model.safetensors")):
        run_here("export", run, "--out", tmp_path / file, *flags)
        assert (tmp_path / file / "model.safetensors").read_bytes() == last.with_name(file).read_bytes()
        assert json.loads((tmp_path / file / "config.json").read_text())["averaged"] == (not flags)


def refused(capsys, *command):
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(chain, exported, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "is no run folder" in refused(capsys, "export", tmp_path, *out)
    assert "is not empty" in refused(capsys, "export", chain / "prior", "--out", exported)
    assert "is not what `dalle-ds export` writes" in refused(capsys, "import-model", tmp_path, *out)
    assert "already holds a run" in refused(capsys, "import-model", exported / "dvae", "--out", chain / "dvae")
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    settings = json.loads((exported / "dvae/config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(settings))
    assert "no such file" in refused(capsys, "import-model", spoilt, *out)
    weights = load_file(exported / "dvae/model.safetensors")
    weights.popitem()
    save_file(weights, spoilt / "model.safetensors")
    assert "its SHA-256 differs" in refused(capsys, "import-model", spoilt, *out)
    settings["sha256"] = sha256(spoilt / "model.safetensors")
    (spoilt / "config.json").write_text(json.dumps(settings))
    assert "does not fit its config.json" in refused(capsys, "import-model", spoilt, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt"]
