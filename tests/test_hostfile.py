"""The deepspeed launcher over a hostfile, by pdsh and ssh, to two addresses of this machine.

Needs pdsh, ssh and sshd (Debian: apt install pdsh openssh-client openssh-server), and root, as sshd does.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_port
from programs import LIMIT, environment, read_lines, run_program
from test_launchers import SCRIPT, flags_of

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
MISSING = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None] + ["sshd"] * (SSHD is None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="sshd runs as root"),
]
# Not one address twice: they are the machines' names, as far as deepspeed knows.
HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def ssh(tmp_path):
    """A server for both addresses with keys of its own: (its port, what pdsh is to give ssh)."""
    port = free_port()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    settings = {
        "Port": port,
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "key.pub",
        "PidFile": tmp_path / "sshd.pid",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    lines = [f"{name} {value}" for name, value in settings.items()] + [f"ListenAddress {host}" for host in HOSTS]
    (tmp_path / "sshd_config").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)  # which a system that has started sshd has
    subprocess.run([SSHD, "-f", tmp_path / "sshd_config"], check=True)
    yield port, f"-F none -i {tmp_path}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    os.kill(int((tmp_path / "sshd.pid").read_text()), signal.SIGTERM)


def test_a_run_over_a_hostfile_is_the_run_on_one_machine(chain, ssh, tmp_path):
    port, arguments = ssh
    file = tmp_path / "hostfile"
    file.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # What the other machines are to have of this one's variables, as launch/README.md says.
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    launcher = [Path(sys.executable).parent / "deepspeed", "--quiet"]
    over = ["--hostfile", file, "--ssh_port", port, "--no_ssh_check", "--master_addr", HOSTS[0]]
    losses = {}
    for name, flags in {"hostfile": over, "one": ["--num_accelerators", 2]}.items():
        out = tmp_path / f"run-{name}"
        command = [*launcher, *flags, "--master_port", free_port(), SCRIPT, *flags_of(chain, out)]
        variables = {
            **environment(),
            "PDSH_SSH_ARGS_APPEND": arguments,
            "DS_ENV_FILE": str(tmp_path / ".deepspeed_env"),
        }
        run_program(command, variables, LIMIT)
        losses[name] = [line["loss"] for line in read_lines(out, "train")]
        assert len(losses[name]) == 3
    assert losses["hostfile"] == losses["one"]
