"""import-dvae and export-dvae as commands: run folders out of files, files out of run folders, all or nothing."""

import errno
import json
from pathlib import Path

import dall_e
import pytest
import torch
from conftest import run_here

from dalle_ds.cli import main
from dalle_ds.models.weights import find_weights, fingerprint, load_dvae
from dalle_ds.storage import pieces


def fail(capsys, *arguments):
    """The one line that a command gives up with."""
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """--encoder and --decoder of a released pair."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    sizes = {"n_hid": 64, "vocab_size": 512, "n_blk_per_group": 1}
    torch.save(dall_e.Encoder(**sizes), folder / "encoder.pkl")
    torch.save(dall_e.Decoder(n_init=8, **sizes), folder / "decoder.pkl")
    return ["--encoder", folder / "encoder.pkl", "--decoder", folder / "decoder.pkl"]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "released"
    run_here("import-dvae", *files, "--out", out, "--image_size", 32)
    return out


def test_an_import_is_a_run_folder_that_says_where_it_is_from(run, files):
    checkpoint, description = find_weights(run, "dvae")
    assert description["config"]["model"]["image_size"] == 32
    for part, path in zip(("encoder", "decoder"), files[1::2], strict=True):
        assert description["imported"][part]["file"] == str(path)
        assert len(description["imported"][part]["sha256"]) == 64
    released = torch.load(files[1], weights_only=False)
    assert description["n_parameters"] > sum(p.numel() for p in released.parameters())
    assert all(load_dvae(run).encoder.state_dict()[k].equal(v) for k, v in released.state_dict().items())
    assert checkpoint.name == "step-00000000"
    assert [path.name for path in run.parent.iterdir()] == ["released"]


def test_an_export_is_taken_by_the_released_classes_and_imported_it_is_the_same_run(run, files, tmp_path):
    paths = [tmp_path / "new/encoder.pt", tmp_path / "new/decoder.safetensors"]
    named = ["--encoder", paths[0], "--decoder", paths[1]]
    run_here("export-dvae", "--dvae", run, *named)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(
        [p.name for p in paths] + [f"{p.name}.json" for p in paths]
    )
    torch.load(files[1], weights_only=False).load_state_dict(torch.load(paths[0], weights_only=True))
    note = json.loads((tmp_path / "new/encoder.pt.json").read_text())
    assert (note["part"], note["model"]["vocab_size"], note["from"]) == ("encoder", 512, str(run))
    run_here("import-dvae", *named, "--out", tmp_path / "again")
    assert fingerprint(tmp_path / "again", "dvae") == fingerprint(run, "dvae")
    assert load_dvae(tmp_path / "again").config == load_dvae(run).config


def test_nothing_is_left_at_out_when_an_import_fails(files, run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "runs" / "new"
    assert "exchange the two" in fail(capsys, "import-dvae", "--encoder", files[3], "--decoder", files[1], "--out", out)
    assert "already holds a run" in fail(capsys, "import-dvae", *files, "--out", run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("words")
    assert "not empty" in fail(capsys, "import-dvae", *files, "--out", tmp_path / "full")
    assert "is a file" in fail(capsys, "import-dvae", *files, "--out", files[1])

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "sync", full)
        assert "free some space" in fail(capsys, "import-dvae", *files, "--out", out)
    assert list(out.parent.iterdir()) == []
    run_here("import-dvae", *files, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["new"]


def test_an_export_refuses_bad_names_and_files_that_exist_and_leaves_none_half_written(
    run, tmp_path, capsys, monkeypatch
):
    def export(encoder, decoder, *flags):
        return ["export-dvae", "--dvae", run, "--encoder", tmp_path / encoder, "--decoder", tmp_path / decoder, *flags]

    assert "use .pt, .pth, .safetensors" in fail(capsys, *export("e.pkl", "d.pt"))
    assert "name two files" in fail(capsys, *export("e.pt", "e.pt"))
    real = Path.write_bytes

    def full(self, data):
        if "d.pt" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "free some space" in fail(capsys, *export("e.pt", "d.pt"))
    assert list(tmp_path.iterdir()) == []
    run_here(*export("e.pt", "d.pt"))
    before = (tmp_path / "e.pt").read_bytes()
    (tmp_path / "e.pt").write_text("mine")
    assert "e.pt exists" in fail(capsys, *export("e.pt", "d.pt"))
    assert (tmp_path / "e.pt").read_text() == "mine"
    run_here(*export("e.pt", "d.pt", "--overwrite"))
    assert (tmp_path / "e.pt").read_bytes() == before


def test_a_run_of_ours_goes_out_by_force_and_comes_back_with_its_tokens(chain, tmp_path, capsys):
    """n_hid 8 is none of the release; what depends on the dVAE's fingerprint takes the import in its place."""
    named = ["--encoder", tmp_path / "e.safetensors", "--decoder", tmp_path / "d.pt"]
    said = fail(capsys, "export-dvae", "--dvae", chain / "dvae", *named)
    assert "n_hid 8 (the release builds none below 64)" in said
    assert "--force" in said
    assert list(tmp_path.iterdir()) == []
    run_here("export-dvae", "--dvae", chain / "dvae", *named, "--force")
    assert "warning: the released classes cannot compute this dVAE: n_hid 8" in capsys.readouterr().out
    run_here("import-dvae", *named, "--out", tmp_path / "dvae")
    assert fingerprint(tmp_path / "dvae", "dvae") == fingerprint(chain / "dvae", "dvae")
    run_here(
        "encode-images", "--dvae", tmp_path / "dvae", "--data", chain / "scenes/train", "--out", tmp_path / "tokens"
    )
    ours, theirs = (sorted(folder.glob("*.tar")) for folder in (tmp_path / "tokens", chain / "tokens/train"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    run_here("sample", "--prior", chain / "prior", "--dvae", tmp_path / "dvae", "--out", tmp_path / "s", "--n", 1, "a")
