"""`dalle-ds`: quick help without heavy imports, one line and exit code 2 for a user's mistake."""

import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest

import dalle_ds
from dalle_ds import cli
from dalle_ds.commands import COMMANDS
from dalle_ds.config import InputError, Preempted

ROOT = Path(dalle_ds.__file__).parent.parent
HEAVY = ("torch", "deepspeed", "numpy", "scipy", "PIL", "sentencepiece", "boto3", "matplotlib", "jinja2", "rich")


def run_python(code):
    """The words that `code` prints in a fresh interpreter that finds the packages uninstalled."""
    setup = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def test_help_lists_every_command_and_imports_nothing_heavy():
    out = run_python(
        "from dalle_ds.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    for name, summary in COMMANDS.items():
        assert f"{name} " in out
        assert summary in out
    assert "HEAVY []" in out


def test_help_of_every_command_imports_no_torch():
    """In one interpreter, one command after the other: none may import what the others would then find."""
    out = run_python(
        "from dalle_ds.cli import main\nfrom dalle_ds.commands import COMMANDS\n"
        "for name in COMMANDS:\n"
        "    try:\n        main([name, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0, name\n"
        f"    print('HEAVY', name, [heavy for heavy in {HEAVY!r} if heavy in sys.modules])"
    )
    for name in COMMANDS:
        assert f"usage: dalle-ds {name}" in out
        assert f"HEAVY {name} []" in out


def test_every_command_is_a_module_and_every_module_a_command():
    modules = {path.stem.replace("_", "-") for path in (ROOT / "dalle_ds/commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)


@pytest.fixture
def command(monkeypatch):
    """A command `fake` whose run raises what the test puts into `module.error`."""
    module = types.ModuleType("dalle_ds.commands.fake", "A command of the tests.")
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    module.error = None

    def run(args):
        if module.error is not None:
            raise module.error

    module.run = run
    monkeypatch.setitem(sys.modules, "dalle_ds.commands.fake", module)
    monkeypatch.setitem(COMMANDS, "fake", "a command of the tests")
    monkeypatch.delenv("DALLE_DS_TRACEBACK", raising=False)
    return module


def test_a_command_that_ends_well_gives_0(command):
    assert cli.main(["fake", "--number", "3"]) == 0


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            InputError("shards-{0..9}.tar: no such files; give a folder"),
            "shards-{0..9}.tar: no such files; give a folder",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/0.tar"),
            "No space left on device: '/data/0.tar': free some space and try again",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "Permission denied: '/data'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(command, capsys, error, shown):
    command.error = error
    assert cli.main(["fake"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dalle-ds fake: error: ")
    assert captured.err.endswith(f"{shown}\n")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("rank", "shown"), [("0", "dalle-ds fake: saved step 3\n"), ("1", "")])
def test_a_run_that_was_asked_to_stop_is_one_line_of_the_first_rank_and_exit_code_85(
    command, capsys, monkeypatch, rank, shown
):
    monkeypatch.setenv("RANK", rank)
    command.error = Preempted("saved step 3")
    assert cli.main(["fake"]) == 85
    assert capsys.readouterr() == (shown, "")


@pytest.mark.parametrize("error", [KeyError("ours"), ValueError("ours"), OSError(errno.EIO, "a broken disk")])
def test_our_own_mistakes_keep_their_traceback(command, error):
    command.error = error
    with pytest.raises(type(error)):
        cli.main(["fake"])


def test_a_traceback_can_be_asked_for(command, monkeypatch):
    monkeypatch.setenv("DALLE_DS_TRACEBACK", "1")
    command.error = InputError("x")
    with pytest.raises(InputError):
        cli.main(["fake"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "dalle-ds: error: the following arguments are required: COMMAND; see dalle-ds --help"),
        (["--paint"], "dalle-ds: error: the following arguments are required: COMMAND; see dalle-ds --help"),
        (
            ["fake", "--number", "many"],
            "dalle-ds fake: error: argument --number: invalid int value: 'many'; see dalle-ds fake --help",
        ),
        (["fake", "--paint"], "dalle-ds fake: error: unrecognized arguments: --paint; see dalle-ds fake --help"),
        (
            ["fake", "--number"],
            "dalle-ds fake: error: argument --number: expected one argument; see dalle-ds fake --help",
        ),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(command, capsys, arguments, said):
    """Bug: it was preceded by the usage of all flags, up to 57 lines."""
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", f"{said}\n")


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert cli.main(["paint"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'paint'" in message
    for name in COMMANDS:
        assert name in message


def test_version_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert dalle_ds.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(("number", "said"), [("3", "x"), ("many", "argument --number: invalid int value: 'many'")])
def test_a_launch_script_passes_its_own_arguments_and_exits_with_the_code(command, monkeypatch, capsys, number, said):
    command.error = InputError("x")
    monkeypatch.setattr(sys, "argv", ["launch/fake.py", "--number", number])
    with pytest.raises(SystemExit) as stop:
        cli.launch("fake")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dalle-ds fake: error: {said}")
    assert error.count("\n") == 1


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-m", "dalle_ds.cli", "plan", "--gpus", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 141)
