"""Say what works on this machine, and what to do where something does not.

    dalle-ds doctor
    dalle-ds doctor --json
    dalle-ds doctor --s3 s3://bucket/prefix

Exit code 0 when all that is required works, 1 when not. Nothing goes over the network, unless --s3 asks for it.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError

WORKS, WITHOUT, BROKEN = "works", "works without", "broken"

GIB = 2**30
MIN_MEMORY_GIB = 8  # what the demo is held to
MIN_DISK_GIB = 8  # torch with its libraries, made data, checkpoints of the demo
MIN_TORCH = (2, 11)
DEEPSPEED_FROM, DEEPSPEED_BELOW = (0, 19, 8), (0, 20)
STEP_TIMEOUT_S = 180  # a first import of torch and deepspeed from a slow disk takes most of it
S3_TIMEOUT_S = 10
# Where botocore looks for credentials without asking the network.
LOCAL_CREDENTIALS = ("env", "shared-credentials-file", "config-file", "boto-config")

# One ZeRO-3 step of a small model in a process of its own: a crash there is a finding here. The compilation of
# DeepSpeed's shared-memory op (half a minute, for one collective of inference) is skipped.
ZERO_STEP = """
import json, logging, sys
import torch
import deepspeed
from deepspeed.utils import logger

logger.setLevel(logging.ERROR)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
backend = sys.argv[1]
deepspeed.init_distributed(dist_backend=backend)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
settings = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
inputs = torch.randn(8, 16, device=engine.device)
losses = []
for _ in range(2):
    loss = (engine(inputs) - 1).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
engine.destroy()
torch.distributed.destroy_process_group()
print("losses " + json.dumps(losses))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found; `remedy` says what to do and is empty where there is nothing to do."""

    name: str
    state: str
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--s3", metavar="URL", default="", help="also list one key under s3://bucket/prefix")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    bucket, prefix = split_s3(args.s3) if args.s3 else ("", "")
    checks = []
    with Console(stderr=True).status("looking around") as status:
        for name, check in CHECKS.items():
            status.update(f"checking {name}")
            checks.append(check(name))
        if bucket:
            status.update(f"asking {args.s3}")
            checks.append(check_s3_access("S3 access", bucket, prefix))
    broken = [check.name for check in checks if check.state == BROKEN]
    if args.json:
        print(json.dumps({"ok": not broken, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        show(checks)
        print(f"To repair: {', '.join(broken)}." if broken else "All that is required works.")
    if broken:
        raise SystemExit(1)


def show(checks: list[Check]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="dalle-ds doctor", title_justify="left", padding=(0, 1), show_lines=False)
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for check in checks:
        found = check.found + (f"\n-> {check.remedy}" if check.remedy else "")
        table.add_row(check.name, f"[{STYLES[check.state]}]{check.state}[/]", _plain(found))
    Console().print(table)


def check_python(name: str) -> Check:
    return Check(name=name, state=WORKS, found=f"{platform.python_version()} at {sys.executable}")


def check_system(name: str) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check(name=name, state=WORKS, found=f"{platform.system()} {platform.machine()}, {cores} CPU cores")


def check_memory(name: str) -> Check:
    total = memory_bytes() / GIB
    if total < MIN_MEMORY_GIB:
        remedy = f"the demo may need up to {MIN_MEMORY_GIB} GiB: close other programs, or give a smaller batch size"
        return Check(name=name, state=WITHOUT, found=f"{total:.1f} GiB", remedy=remedy)
    return Check(name=name, state=WORKS, found=f"{total:.1f} GiB")


def check_disk(name: str) -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < MIN_DISK_GIB:
        remedy = f"free some, or work elsewhere: installation, data and checkpoints of the demo take {MIN_DISK_GIB} GiB"
        return Check(name=name, state=WITHOUT, found=found, remedy=remedy)
    return Check(name=name, state=WORKS, found=found)


def check_torch(name: str) -> Check:
    torch, error = try_import("torch")
    if torch is None:
        return Check(name=name, state=BROKEN, found=error, remedy="install it first: `pip install torch`")
    found = f"{torch.__version__}, built for {torch_build(torch)}"
    if version_numbers(torch.__version__) < MIN_TORCH:
        remedy = f"torch {'.'.join(map(str, MIN_TORCH))} or newer is needed: `pip install --upgrade torch`"
        return Check(name=name, state=BROKEN, found=found, remedy=remedy)
    return Check(name=name, state=WORKS, found=found)


def check_gpu(name: str) -> Check:
    torch, error = try_import("torch")
    if torch is None:
        return Check(name=name, state=WITHOUT, found=error, remedy="install torch first")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        listed = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
        bf16 = "bf16 and fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 only"
        return Check(name=name, state=WORKS, found=f"{len(devices)}: {listed}; {bf16}")
    if torch.backends.mps.is_available():
        remedy = "untried with this program: set DS_ACCELERATOR=cpu to train on the CPU"
        return Check(name=name, state=WITHOUT, found="Apple GPU (MPS)", remedy=remedy)
    driver = next((tool for tool in ("nvidia-smi", "rocm-smi") if shutil.which(tool)), None)
    if driver is None:
        return Check(name=name, state=WITHOUT, found="none: training runs on the CPU, in fp32 or bf16")
    if torch_build(torch) == "CPU":
        remedy = "this torch was built for CPUs: install the build for your GPU (see pytorch.org, Get Started)"
    else:
        remedy = f"torch sees no GPU: see what `{driver}` says, and whether CUDA_VISIBLE_DEVICES hides it"
    return Check(name=name, state=WITHOUT, found=f"none in use, though {driver} is here", remedy=remedy)


def check_deepspeed(name: str) -> Check:
    wanted = f"`pip install 'deepspeed>={'.'.join(map(str, DEEPSPEED_FROM))},<{'.'.join(map(str, DEEPSPEED_BELOW))}'`"
    version = installed_version("deepspeed")
    if version is None:
        return Check(name=name, state=BROKEN, found="not installed", remedy=wanted)
    if not DEEPSPEED_FROM <= version_numbers(version) < DEEPSPEED_BELOW:
        remedy = f"this version is not known to compute the same: {wanted}"
        return Check(name=name, state=BROKEN, found=version, remedy=remedy)
    return Check(name=name, state=WORKS, found=version)


def check_launcher(name: str) -> Check:
    beside = Path(sys.executable).with_name("deepspeed")
    on_path = shutil.which("deepspeed")
    if on_path:
        return Check(name=name, state=WORKS, found=on_path)
    if beside.is_file():
        remedy = f"not on PATH: call {beside}, or activate the environment (`. {beside.parent / 'activate'}`)"
        return Check(name=name, state=WORKS, found=str(beside), remedy=remedy)
    remedy = "several processes need it: reinstall deepspeed; one process works with `python launch/...`"
    return Check(name=name, state=WITHOUT, found="no `deepspeed` program", remedy=remedy)


def check_zero_on_cpu(name: str) -> Check:
    return zero_step(name, accelerator="cpu", backend="gloo")


def check_zero_on_gpu(name: str) -> Check:
    torch, error = try_import("torch")
    if torch is None or not torch.cuda.is_available():
        return Check(name=name, state=WITHOUT, found=error or "no GPU to try it on")
    return zero_step(name, accelerator="cuda", backend="nccl")


def zero_step(name: str, accelerator: str, backend: str) -> Check:
    """Runs ZERO_STEP as the only rank, whatever launcher this process itself runs under."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **alone, "DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1"}
    if accelerator == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", ZERO_STEP, backend],
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        remedy = "look for a firewall on the loopback device, or an overloaded machine; then try again"
        return Check(name=name, state=BROKEN, found=f"no end after {STEP_TIMEOUT_S} s", remedy=remedy)
    seconds = time.monotonic() - start
    losses = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("losses ")]
    if done.returncode != 0 or not losses:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode} without a word"]
        remedy = "reinstall torch and deepspeed in a fresh environment; if it stays, report a bug with this line"
        return Check(name=name, state=BROKEN, found=said[-1][:300], remedy=remedy)
    first, second = losses[0]
    if not second < first:
        found = f"runs, but the loss went from {first:.4f} to {second:.4f}"
        return Check(name=name, state=BROKEN, found=found, remedy="a step must lower it here: please report a bug")
    return Check(name=name, state=WORKS, found=f"loss {first:.3f} -> {second:.3f} over {backend}, in {seconds:.0f} s")


def check_triton(name: str) -> Check:
    triton, error = try_import("triton")
    if triton is None:
        remedy = "kernels fall back to their torch reference; on Linux: `pip install triton`"
        return Check(name=name, state=WITHOUT, found=error, remedy=remedy)
    torch, _ = try_import("torch")
    if torch is None or not torch.cuda.is_available():
        found = f"{triton.__version__}, interpreter only (TRITON_INTERPRET=1): no GPU to compile for"
        return Check(name=name, state=WITHOUT, found=found)
    return Check(name=name, state=WORKS, found=f"{triton.__version__}, compiles for {torch.cuda.get_device_name(0)}")


def check_compiler(name: str) -> Check:
    found = {tool: shutil.which(tool) for tool in ("cc", "g++", "ninja", "nvcc")}
    listed = ", ".join(f"{tool} {'yes' if path else 'no'}" for tool, path in found.items())
    if found["cc"] is None:
        remedy = "only Triton on a GPU and DeepSpeed's compiled parts need one: `apt-get install build-essential`"
        return Check(name=name, state=WITHOUT, found=listed, remedy=remedy)
    return Check(name=name, state=WORKS, found=listed)


def check_s3(name: str) -> Check:
    """Whether boto3 is here and credentials lie on this machine; roles that only the network knows are not asked."""
    boto3, error = try_import("boto3")
    if boto3 is None:
        return Check(name=name, state=WITHOUT, found=error, remedy="only s3:// data needs it: `pip install boto3`")
    try:
        resolver = importlib.import_module("botocore.session").Session().get_component("credential_provider")
        local = (provider for provider in resolver.providers if provider.METHOD in LOCAL_CREDENTIALS)
        method = next((provider.METHOD for provider in local if provider.load() is not None), None)
    except importlib.import_module("botocore.exceptions").BotoCoreError as fault:
        return Check(name=name, state=WITHOUT, found=str(fault), remedy="mend the AWS settings (~/.aws, AWS_*)")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon's"
    found = f"boto3 {boto3.__version__}, endpoint {endpoint}, credentials {f'from {method}' if method else 'not found'}"
    if method is None:
        remedy = (
            "for s3:// data set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store that "
            "is not Amazon's); a machine's own role is not asked here: try `dalle-ds doctor --s3 s3://bucket/prefix`"
        )
        return Check(name=name, state=WITHOUT, found=found, remedy=remedy)
    return Check(name=name, state=WORKS, found=found)


def check_s3_access(name: str, bucket: str, prefix: str) -> Check:
    """Lists one key: the only check that uses the network."""
    boto3, error = try_import("boto3")
    if boto3 is None:
        return Check(name=name, state=BROKEN, found=error, remedy="`pip install boto3`")
    botocore_errors = importlib.import_module("botocore.exceptions")
    settings = importlib.import_module("botocore.config").Config(
        connect_timeout=S3_TIMEOUT_S, read_timeout=S3_TIMEOUT_S, retries={"total_max_attempts": 1}
    )
    try:
        client = boto3.client("s3", config=settings)
        listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents", [])
    except (botocore_errors.BotoCoreError, botocore_errors.ClientError, ValueError) as error:
        remedy = "check bucket, credentials and AWS_ENDPOINT_URL; the credentials must allow s3:ListBucket"
        return Check(name=name, state=BROKEN, found=" ".join(str(error).split()), remedy=remedy)
    if not listed:
        remedy = "the bucket answers, but nothing is there: check the prefix"
        return Check(name=name, state=BROKEN, found=f"no key under s3://{bucket}/{prefix}", remedy=remedy)
    return Check(name=name, state=WORKS, found=f"s3://{bucket}/{listed[0]['Key']} and perhaps more")


def check_packages(name: str) -> Check:
    """The smaller packages that every run needs."""
    faults, found = [], []
    for package in PACKAGES:
        module, error = try_import(package)
        if module is None:
            faults.append(error)
        else:
            found.append(f"{package} {installed_version(package)}")
    if faults:
        return Check(name=name, state=BROKEN, found="; ".join(faults), remedy="`pip install --upgrade dalle-ds`")
    return Check(name=name, state=WORKS, found=", ".join(found))


def check_codecs(name: str) -> Check:
    """Writes and reads a picture in each format that data may come in, and asks for the fonts of captions."""
    pillow, error = try_import("PIL.Image")
    if pillow is None:
        return Check(name=name, state=BROKEN, found=error, remedy="`pip install pillow`")
    features = importlib.import_module("PIL.features")
    has = {codec: features.check(feature) for codec, feature in CODECS.items()}
    for codec in [codec for codec, there in has.items() if there]:
        buffer = io.BytesIO()
        pillow.new("RGB", (8, 8), (200, 30, 30)).save(buffer, codec)
        has[codec] = pillow.open(buffer).convert("RGB").size == (8, 8)
    has["fonts"] = features.check("freetype2")
    found = f"{installed_version('pillow')}: " + ", ".join(
        f"{codec} {'yes' if ok else 'no'}" for codec, ok in has.items()
    )
    remedy = "install Pillow's own build: `pip install --force-reinstall pillow`"
    if all(has.values()):
        return Check(name=name, state=WORKS, found=found)
    needed = has["png"] and has["jpeg"] and has["fonts"]
    return Check(name=name, state=WITHOUT if needed else BROKEN, found=found, remedy=remedy)


def check_slurm(name: str) -> Check:
    found = [tool for tool in ("sbatch", "srun", "squeue") if shutil.which(tool)]
    if not found:
        return Check(name=name, state=WITHOUT, found="not here: only launch/slurm/ needs it")
    return Check(name=name, state=WORKS, found=", ".join(found))


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise InputError(f"--s3 {url!r} is no S3 address: write s3://bucket/prefix")
    return bucket, prefix


def try_import(name: str) -> tuple[Any, str]:
    """(the module, "") or (None, what went wrong): a library may be missing, or miss a library itself."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:
        installed = importlib.util.find_spec(name.partition(".")[0]) is not None
        return None, f"{name} does not import: {error}" if installed else f"{name} is not installed"


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; what is no number ends it."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def torch_build(torch: Any) -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def memory_bytes() -> int:
    """The machine's memory, or the limit of this control group where that is lower."""
    limit = Path("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


STYLES = {WORKS: "green", WITHOUT: "yellow", BROKEN: "bold red"}
CODECS = {"png": "zlib", "jpeg": "jpg", "webp": "webp"}
PACKAGES = ("numpy", "sentencepiece", "braceexpand", "safetensors", "scipy", "matplotlib", "jinja2")

# In the order of the table; a check takes its name and returns a Check.
CHECKS: dict[str, Callable[[str], Check]] = {
    "Python": check_python,
    "system": check_system,
    "memory": check_memory,
    "disk": check_disk,
    "torch": check_torch,
    "GPU": check_gpu,
    "DeepSpeed": check_deepspeed,
    "launcher": check_launcher,
    "ZeRO-3 on the CPU": check_zero_on_cpu,
    "ZeRO-3 on the GPU": check_zero_on_gpu,
    "Triton": check_triton,
    "compiler": check_compiler,
    "packages": check_packages,
    "picture codecs": check_codecs,
    "S3": check_s3,
    "SLURM": check_slurm,
}
