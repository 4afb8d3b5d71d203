"""doctor: each check finds what is there, says what to do when it is not, and the exit code tells the two apart."""

import http.server
import json
import threading

import pytest

from dalle_ds import cli
from dalle_ds.commands import doctor
from dalle_ds.commands.doctor import BROKEN, WITHOUT, WORKS, Check

LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult><Name>pictures</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"""


@pytest.fixture
def no_aws(monkeypatch, tmp_path):
    """No credentials and no settings of whoever runs the tests."""
    for name in [name for name in doctor.os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("BOTO_CONFIG", str(tmp_path / "boto"))


def missing(name):
    """A try_import under which the package `name` is not installed."""
    real = doctor.try_import
    return lambda asked: (None, f"{name} is not installed") if asked.partition(".")[0] == name else real(asked)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("state", [WORKS, WITHOUT, BROKEN])
def test_exit_code_is_one_only_when_something_required_is_broken(monkeypatch, capsys, state, as_json):
    checks = {
        "first": lambda name: Check(name=name, state=WORKS, found="fine [really]"),
        "second": lambda name: Check(name=name, state=state, found="so and so", remedy="do this"),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    arguments = ["--json"] if as_json else []
    if state == BROKEN:
        with pytest.raises(SystemExit) as stop:
            cli.run_command("doctor", arguments)
        assert stop.value.code == 1
    else:
        assert cli.run_command("doctor", arguments) == 0
    out = capsys.readouterr().out
    if as_json:
        report = json.loads(out)
        assert report["ok"] == (state != BROKEN)
        assert report["checks"][1] == {"name": "second", "state": state, "found": "so and so", "remedy": "do this"}
    else:
        assert "fine [really]" in out
        assert "-> do this" in out
        assert ("To repair: second." in out) == (state == BROKEN)


def test_every_check_but_the_steps_answers_here_and_what_is_required_works(no_aws):
    checks = {name: check(name) for name, check in doctor.CHECKS.items() if not name.startswith("ZeRO-3")}
    assert all(check.name == name and check.found for name, check in checks.items())
    for name in ("Python", "torch", "DeepSpeed", "packages", "picture codecs"):
        assert checks[name].state == WORKS, checks[name]
    assert not any(check.state == BROKEN for check in checks.values())


@pytest.mark.slow
def test_a_real_zero_3_step_lowers_the_loss():
    check = doctor.check_zero_on_cpu("ZeRO-3 on the CPU")
    assert check.state == WORKS, check
    assert "gloo" in check.found


def test_a_step_that_fails_shows_its_last_line_and_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "ZERO_STEP", "import sys; sys.exit('first line\\nno such collective')")
    check = doctor.check_zero_on_cpu("step")
    assert (check.state, check.found) == (BROKEN, "no such collective")
    assert check.remedy


def test_a_step_that_hangs_is_ended_and_one_that_raises_the_loss_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "ZERO_STEP", "print('losses [1.0, 2.0]')")
    assert "went from 1.0000 to 2.0000" in doctor.check_zero_on_cpu("step").found
    monkeypatch.setattr(doctor, "ZERO_STEP", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "STEP_TIMEOUT_S", 0.5)
    assert "no end after" in doctor.check_zero_on_cpu("step").found


def test_the_step_runs_alone_whatever_launcher_doctor_runs_under(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    lines = "import os; assert os.environ['RANK'] + os.environ['WORLD_SIZE'] == '01'; print('losses [2.0, 1.0]')"
    monkeypatch.setattr(doctor, "ZERO_STEP", lines)
    assert doctor.check_zero_on_cpu("step").state == WORKS


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.19.8", WORKS),
        ("0.19.9", WORKS),
        ("0.19.7", BROKEN),
        ("0.20.0", BROKEN),
        ("0.20.0+cu12", BROKEN),
        (None, BROKEN),
    ],
)
def test_deepspeed_must_lie_in_the_supported_range(monkeypatch, version, state):
    monkeypatch.setattr(doctor, "installed_version", lambda _: version)
    check = doctor.check_deepspeed("DeepSpeed")
    assert check.state == state
    assert (">=0.19.8,<0.20" in check.remedy) == (state == BROKEN)


def test_version_numbers_end_at_what_is_no_number():
    assert doctor.version_numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor.version_numbers("2.13.0.dev2026") == (2, 13, 0)


def test_a_missing_package_is_broken_when_required_and_done_without_when_not(monkeypatch):
    monkeypatch.setattr(doctor, "try_import", missing("torch"))
    assert doctor.check_torch("torch").state == BROKEN
    assert doctor.check_gpu("GPU").state == WITHOUT
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "try_import", missing("sentencepiece"))
    assert doctor.check_packages("packages").state == BROKEN
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "try_import", missing("boto3"))
    assert doctor.check_s3("S3").state == WITHOUT
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "try_import", missing("triton"))
    assert doctor.check_triton("Triton").state == WITHOUT


def test_importing_what_is_not_there_and_what_is_broken_are_told_apart(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("raise OSError('libfoo.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.try_import("half_installed")[1] == (
        "half_installed does not import: libfoo.so: cannot open shared object file"
    )
    assert doctor.try_import("never_installed")[1] == "never_installed is not installed"


def test_little_memory_and_disk_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2 * doctor.GIB)
    check = doctor.check_memory("memory")
    assert (check.state, check.found) == (WITHOUT, "2.0 GiB")
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 10**9)
    assert doctor.check_disk("disk").state == WITHOUT


def test_credentials_are_found_where_they_lie_and_never_shown(no_aws, monkeypatch, tmp_path):
    assert "not found" in doctor.check_s3("S3").found
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    check = doctor.check_s3("S3")
    assert "from shared-credentials-file" in check.found
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    check = doctor.check_s3("S3")
    assert check.state == WORKS
    assert "from env" in check.found
    assert "http://127.0.0.1:9" in check.found
    assert "hush" not in repr(check)
    assert "AKIA" not in repr(check)


def test_a_broken_aws_config_is_a_finding_and_no_crash(no_aws, tmp_path):
    (tmp_path / "config").write_text("this is no config file [")
    assert "mend the AWS settings" in doctor.check_s3("S3").remedy


@pytest.fixture
def s3_server(no_aws, monkeypatch):
    """A store that answers each listing with `keys`."""
    answer = {"keys": ""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = LISTING.format(keys=answer["keys"]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    yield answer
    server.shutdown()
    server.server_close()


def test_s3_access_lists_one_key_or_says_that_there_is_none(s3_server):
    empty = doctor.check_s3_access("S3 access", "pictures", "train/")
    assert (empty.state, empty.found) == (BROKEN, "no key under s3://pictures/train/")
    s3_server["keys"] = "<Contents><Key>train/00000.tar</Key></Contents>"
    check = doctor.check_s3_access("S3 access", "pictures", "train/")
    assert check.state == WORKS
    assert "s3://pictures/train/00000.tar" in check.found


def test_an_unreachable_store_is_broken_in_one_line(no_aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    check = doctor.check_s3_access("S3 access", "pictures", "")
    assert check.state == BROKEN
    assert "127.0.0.1:9" in check.found
    assert "\n" not in check.found


@pytest.mark.parametrize("url", ["http://bucket/x", "s3://", "bucket/prefix"])
def test_an_address_that_is_not_s3_is_bad_input(capsys, url):
    assert cli.run_command("doctor", ["--s3", url]) == 2
    assert "write s3://bucket/prefix" in capsys.readouterr().err


def test_the_launcher_is_found_beside_python_when_it_is_not_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "bin" / "python"))
    assert doctor.check_launcher("launcher").state == WITHOUT
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").touch()
    check = doctor.check_launcher("launcher")
    assert check.state == WORKS
    assert "not on PATH" in check.remedy


def test_a_missing_codec_is_broken_for_png_and_done_without_for_webp(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda feature: feature != "webp")
    assert doctor.check_codecs("codecs").state == WITHOUT
    monkeypatch.setattr(features, "check", lambda feature: feature != "zlib")
    assert doctor.check_codecs("codecs").state == BROKEN
