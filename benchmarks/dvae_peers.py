"""The claim to test: in equal seconds of CPU our dVAE beats dalle_pytorch.DiscreteVAE (PyPI) on every column.

    python benchmarks/dvae_peers.py [--seconds 60] [--environment .bench] [--quick]

Columns: PSNR, SSIM, codebook use and perplexity of the likeliest codes' reconstructions of pictures that training never
saw; pictures a CPU second in training, and through encoder and decoder. Three data sets of 64 x 64 pictures, 8 x 8
tokens of 512. The peer gets an environment of its own, made once, that borrows torch from ours; it enters as its
train_vae.py trains it and, since that is too wide for minutes, also at its class's default width and at half of that.
The best of its rows counts, column by column, so no single width of the peer need reach them all. --quick tries our
side alone, for a moment, without an environment.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from parts.measuring import describe_machine
from parts.peers_pictures import DATA_SETS, write_pictures

from dalle_ds.reporting.grid import make_grid

ROOT = Path(__file__).parent.parent
# What importing its DiscreteVAE asks for beyond our own environment; setuptools lost pkg_resources with version 81.
PEER = (
    "dalle-pytorch==1.6.6",
    "axial-positional-embedding==0.3.12",
    "rotary-embedding-torch==0.9.1",
    "omegaconf==2.4.0",
    "setuptools<81",
)
PICTURES = ("scikit-learn<2", "scikit-image<0.27")
N_TRAIN, N_VALIDATION, SEED = 8_000, 512, 0
QUICK = {"n_train": 64, "n_validation": 16, "seconds": 0.5}

NAMES = {
    "ours": "dalle-ds, `tiny`",
    "peer_script": "dalle_pytorch, train_vae.py (hidden 256, 2 resblocks)",
    "peer_class": "dalle_pytorch, class defaults (hidden 64, 0 resblocks)",
    "peer_narrow": "dalle_pytorch, half of that (hidden 32, 0 resblocks)",
}
# Figure of the worker -> heading, format.
COLUMNS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "codebook_use": ("codebook used", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "train_images_per_second": ("training images/s", "{:.1f}"),
    "coded_images_per_second": ("encode + decode images/s", "{:.1f}"),
}

Figures = dict[str, dict[str, float]]  # contender -> figure -> value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training, a contender and data set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--environment", type=Path, default=ROOT / ".bench", help="the peer's own; made if missing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a smoke run of our side on a few scenes")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    path = arguments.results / f"{today}-dvae-peers.md"
    with tempfile.TemporaryDirectory() as folder:
        results = compare(arguments, Path(folder))
        write_picture(results, Path(folder), path.with_suffix(".png"))
    path.write_text(describe(results, arguments, path))
    print(f"\n{path.read_text()}\n{path}")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """Figures of every data set; pictures and the worker's files are left in `folder`."""
    if arguments.quick:
        python, names, contenders, seconds = Path(sys.executable), ("scenes",), ["ours"], QUICK["seconds"]
        write_pictures(folder, names, int(QUICK["n_train"]), int(QUICK["n_validation"]), SEED)
    else:
        python, names, contenders, seconds = arguments.environment / "bin" / "python", tuple(DATA_SETS), [*NAMES], None
        make_environment(arguments.environment)
        code = f"import parts.peers_pictures as p; p.write_pictures(p.Path({str(folder)!r}), {names!r}, "
        run_in(python, "-c", f"{code}{N_TRAIN}, {N_VALIDATION}, {SEED})")
    results = {}
    for name in names:
        out = folder / f"{name}-figures"
        run_in(
            python,
            *("-m", "parts.peers_worker"),
            *("--pictures", str(folder / f"{name}.npz"), "--out", str(out)),
            *("--seconds", str(seconds or arguments.seconds), "--threads", str(arguments.threads)),
            *("--contenders", *contenders),
        )
        results[name] = json.loads(out.with_suffix(".json").read_text())
    return results


def make_environment(folder: Path) -> None:
    """A virtual environment with the peer and the packages that hold pictures; torch and the rest are ours."""
    if (folder / "complete").exists():
        return
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", *PEER], check=True)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Behind its own packages on the path, so that its own win.
    (Path(where.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *PICTURES], check=True)
    (folder / "complete").touch()


def run_in(python: Path, *command: str) -> None:
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels", ROOT / "benchmarks"))
    subprocess.run([str(python), *command], env={**os.environ, "PYTHONPATH": paths}, check=True)


def best_peer(figures: Figures, column: str) -> float:
    return max(row[column] for name, row in figures.items() if name != "ours")


def write_picture(results: dict[str, Figures], folder: Path, path: Path) -> None:
    """Originals, ours, and the peer's row of higher PSNR, for each data set."""
    images, captions = [], []
    for name, figures in results.items():
        peers = sorted((row["psnr"], peer) for peer, row in figures.items() if peer != "ours")
        rows = {"original": f"{name}: original", "ours": "dalle-ds"}
        rows |= {peer: "dalle_pytorch" for _, peer in peers[-1:]}
        with np.load(folder / f"{name}-figures.npz") as arrays:
            for row, caption in rows.items():
                images += list(arrays[row])
                captions += [caption] + [""] * (len(arrays[row]) - 1)
                columns = len(arrays[row])
    make_grid(images, captions, columns=columns, scale=2).save(path)


def describe(results: dict[str, Figures], arguments: argparse.Namespace, path: Path) -> str:
    seconds = QUICK["seconds"] if arguments.quick else arguments.seconds
    lines = [
        f"# dVAE against dalle_pytorch.DiscreteVAE, {path.name[:10]}",
        "",
        f"Machine: {describe_machine()}.",
        "",
        f"{seconds:g} CPU seconds of training for each row, {arguments.threads} thread(s), in turns in one process; "
        "pictures 64 x 64, 8 x 8 tokens of 512; quality on pictures that training never saw.",
        "",
        "How to read it: one seed, so small differences mean little. Recipes are compared, not architectures alone: "
        "ours is the `tiny` preset, made for minutes of CPU; the peer has the rates and temperatures of its "
        "train_vae.py, made for longer runs, and only its width was varied. Photographs are crops of twelve pictures "
        "for training and of four others for validation. The peer's import of taming-transformers is met by two empty "
        "classes.",
    ]
    for name, figures in results.items():
        lines += ["", f"## {name}", "", *table(figures)]
    return "\n".join([*lines, "", f"![originals and reconstructions]({path.with_suffix('.png').name})", ""])


def table(figures: Figures) -> list[str]:
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = [f"| | {' | '.join(headings)} | pictures trained on |", "|---" * (len(headings) + 2) + "|"]
    for name, row in figures.items():
        cells = [form.format(row[column]) for column, (_, form) in COLUMNS.items()]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} | {row['n_images']:,} |")
    if len(figures) > 1:
        lines.append(f"| ours against the best peer | {' | '.join(verdicts(figures))} | |")
    return lines


def verdicts(figures: Figures) -> list[str]:
    """For each column, whether ours wins, and by what: decibels and SSIM as differences, the rest as ratios."""
    cells = []
    for column in COLUMNS:
        ours, peer = figures["ours"][column], best_peer(figures, column)
        margin = f"{ours - peer:+.3f}" if column in ("psnr", "ssim") else f"{ours / peer:.2f}x"
        cells.append(f"{'**won**' if ours > peer else '**lost**'} {margin}")
    return cells


if __name__ == "__main__":
    main()
