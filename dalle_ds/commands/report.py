"""Write one self-contained HTML page of a run folder: pictures, figures, curves, settings, versions.

    dalle-ds report runs/prior --dvae runs/dvae

The run may still be training; what it has not made yet is named on the page, with the command that makes it.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder that train-dvae or train-prior wrote")
    parser.add_argument("--dvae", metavar="RUN_DVAE", type=Path, help="the dVAE's run folder, shown in its own section")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page to write (default: RUN/report.html)")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.reporting.page import write_report
    from dalle_ds.reporting.run_folder import read_run_folder

    shown = read_run_folder(args.run)
    dvae = read_run_folder(args.dvae, kind="dvae") if args.dvae else None
    out = args.out or args.run / "report.html"
    write_report(shown, dvae, out)
    print(f"report: {out}", flush=True)
