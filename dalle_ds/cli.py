"""`dalle-ds <command>`: finds the command, runs it, and turns a user's mistake into one line and exit code 2."""

import argparse
import errno
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from dalle_ds import __version__
from dalle_ds.commands import COMMANDS
from dalle_ds.config import FULL_DISK, InputError, Preempted

BAD_INPUT = 2
PREEMPTED = 85  # what launch/slurm turns into a requeue
BROKEN_PIPE = 128 + 13  # as a shell says of a program that SIGPIPE has ended
LATER_RANKS_WAIT = 10.0  # seconds
# What an operating system says when the user must act: a full disk, a quota, no permission.
USER_ERRNOS = {*FULL_DISK, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line as any other mistake is said, in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `dalle-ds` with `arguments` (default: sys.argv) and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:])
    return _run("dalle-ds", lambda: _overview().parse_args(arguments))


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parses the flags of the command `name` and runs it; returns 0, 2 on bad input, 85 when asked to stop."""
    module = importlib.import_module(f"dalle_ds.commands.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"dalle-ds {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return _run(parser.prog, lambda: module.run(parser.parse_args(arguments)))


def _run(program: str, action: Callable[[], object]) -> int:
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has read enough of it. Nothing is to be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in USER_ERRNOS:
            raise
        if os.environ.get("DALLE_DS_TRACEBACK"):
            raise
        # Every rank finds the same mistake. The launcher ends the others once one has failed, so one line is printed.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(LATER_RANKS_WAIT)
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        said = f"{error}: free some space and try again" if full else str(error)
        print(f"{program}: error: {said}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {stop}", flush=True)
        return PREEMPTED
    return 0


def launch(name: str) -> None:
    """What a launch script calls: the command with the script's own arguments."""
    sys.exit(run_command(name, sys.argv[1:]))


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:{width}}{summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="dalle-ds",
        description="Train a DALL-E from your own image-text pairs, at any scale, on DeepSpeed.",
        epilog=f"commands:\n{lines}\n\n`dalle-ds COMMAND --help` shows the flags of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dalle-ds {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
