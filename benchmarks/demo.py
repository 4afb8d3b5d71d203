"""The claim: `make demo` takes at most 15 minutes on 2 CPU cores, set-up included, in less than 8 GiB of memory.

    python benchmarks/demo.py [--fresh]

Runs `make demo` (with --fresh after removing .venv), times each command that make prints, samples the memory of the
process tree (proportional set size, so that shared pages count once), and writes a dated table to benchmarks/results/.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import psutil
from parts.measuring import ROOT, describe_machine

MINUTES_LIMIT, GIB_LIMIT = 15, 8
SAMPLE_EVERY = 5.0  # seconds
# What make prints before a command, and what it says while it sets up.
COMMANDS = ("dalle-ds ", "deepspeed ", "set-up:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="remove .venv first, so that the set-up is timed too")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(ROOT / ".venv", ignore_errors=True)
    began = time.time()
    demo = subprocess.Popen(["make", "demo"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks: list[float] = [0.0]
    threading.Thread(target=watch_memory, args=(demo.pid, peaks), daemon=True).start()
    steps: list[tuple[str, float]] = []
    assert demo.stdout is not None
    for line in demo.stdout:
        print(line, end="", flush=True)
        if line.startswith(COMMANDS):
            steps.append((describe(line), time.time()))
    if demo.wait():
        raise SystemExit(f"make demo failed with exit code {demo.returncode}")
    ended = time.time()
    table = write_table(steps, began, ended, peaks[0])
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    path = ROOT / "benchmarks" / "results" / f"{date}-demo.md"
    path.write_text(table)
    print(f"\n{table}\n{path}")


def describe(line: str) -> str:
    """The command without its flags: "train_dvae.py", "make-scenes", or the words of the set-up."""
    words = line.split()
    if line.startswith("set-up:"):
        return line.strip()[:60]
    return next((Path(word).name for word in words if word.startswith("launch/")), " ".join(words[:2]))


def watch_memory(pid: int, peaks: list[float]) -> None:
    """Keeps the largest memory of the process tree of `pid`, in GiB, in peaks[0]."""
    root = psutil.Process(pid)
    while root.is_running():
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        peaks[0] = max(peaks[0], total / 2**30)
        time.sleep(SAMPLE_EVERY)


def write_table(steps: list[tuple[str, float]], began: float, ended: float, peak: float) -> str:
    times = [*[when for _, when in steps], ended]
    rows = [f"| {name} | {after - before:.0f} |" for (name, before), after in zip(steps, times[1:], strict=True)]
    evaluation = json.loads((ROOT / "demo" / "prior" / "evaluation.json").read_text())
    figures = [
        f"| {row['name']} | {row['value']:.1%} | {row['chance']:.2%} | {row['n']} |" for row in evaluation["figures"]
    ]
    return "\n".join(
        [
            f"# make demo, {datetime.datetime.now(tz=datetime.timezone.utc).date()}",
            "",
            f"Machine: {describe_machine()}.",
            "",
            f"{(ended - began) / 60:.1f} minutes (limit {MINUTES_LIMIT}), peak {peak:.2f} GiB (limit {GIB_LIMIT}).",
            "",
            "| step | seconds |",
            "|---|---|",
            *rows,
            "",
            "| figure | value | chance | cases |",
            "|---|---|---|---|",
            *figures,
            "",
        ]
    )


if __name__ == "__main__":
    main()
