"""What the benchmarks share: the line that names the machine, interleaved medians, and where a dated table goes."""

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Side of the product that shows the matrix peak.
PEAK_SIZES, PEAK_ROUNDS = {"cuda": 8192, "cpu": 2048}, 10


def describe_machine() -> str:
    """One line: processor or GPU, threads, versions, commit."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton"))
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{processor}; Python {platform.python_version()}, {versions}; commit {commit()}"


def commit() -> str:
    """The short hash, marked where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def results_path(name: str, suffix: str = "md") -> Path:
    """benchmarks/results/<today>-<name>.<suffix>"""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return ROOT / "benchmarks" / "results" / f"{today}-{name}.{suffix}"


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round: one warm-up, then all runs in turn, so that a noisy minute hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            _finish()
            began = clock()
            run()
            _finish()
            if i:
                seconds[name].append(clock() - began)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times longer `slow` took."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large square product on this machine."""
    n = PEAK_SIZES[torch.device(device).type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = interleave({"product": lambda: a @ b}, PEAK_ROUNDS)["product"]
    return float(2 * n**3 / statistics.median(seconds))


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
