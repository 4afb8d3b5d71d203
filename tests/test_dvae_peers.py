"""The benchmark against dalle_pytorch: our side of it, for a second."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_quick_comparison_writes_a_table_and_a_picture(tmp_path):
    subprocess.run(
        [sys.executable, "benchmarks/dvae_peers.py", "--quick", "--results", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    table, picture = sorted(tmp_path.iterdir())
    assert (table.suffix, picture.suffix) == (".md", ".png")
    assert "| dalle-ds, `tiny` |" in table.read_text()
