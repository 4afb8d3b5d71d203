"""The claim: a CPU training step of the prior is at least 3x faster than that of dalle_pytorch.DALLE (PyPI).

    python benchmarks/prior_peers.py [--threads 2] [--rounds 7] [--n_layer 4] [--clock wall] [--environment .bench]

The same width, layers, heads, sequence (256 text states, 32 x 32 image tokens), batch, vocabularies, optimizer (AdamW,
fused) and random tokens on both sides, float32; the peer with attn_types ("axial_row", "axial_col") and its defaults
for the rest, ours with the paper's masks. Steps run in turn; the ratio is the median over rounds. The peer lives in the
environment that dvae_peers.py makes, where both sides run in one process. --quick tries a small size.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from parts.measuring import ROOT, describe_machine, interleave, median_ratio, results_path
from torch import Tensor, nn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TARGET = 3.0
TEXT_VOCAB_SIZE, IMAGE_VOCAB_SIZE, HEAD_DIM = 16_384, 8192, 64
PEER = "dalle_pytorch.DALLE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=8, help="heads of 64; 8 makes a width of 512")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--caption_len", type=int, default=64, help="tokens of each caption; the rest is padding")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--environment", type=Path, default=ROOT / ".bench", help="the peer's own; made if missing")
    parser.add_argument("--quick", action="store_true", help="a small stream and one round, nothing written")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # where to write figures, in the environment
    arguments = parser.parse_args()
    if arguments.inside:
        arguments.inside.write_text(json.dumps(measure(arguments)))
    else:
        report(arguments, run_inside(arguments))


def run_inside(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """This program once more, in the peer's environment; returns seconds of each side in each round."""
    from tempfile import TemporaryDirectory

    from dvae_peers import make_environment, run_in

    make_environment(arguments.environment)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        python = arguments.environment / "bin" / "python"
        run_in(python, __file__, *sys.argv[1:], "--inside", str(path))
        return json.loads(path.read_text())  # type: ignore[no-any-return]


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    torch.set_num_threads(arguments.threads)
    text_len, grid, n_layer, rounds = 256, 32, arguments.n_layer, arguments.rounds
    if arguments.quick:
        text_len, grid, n_layer, rounds = 16, 8, 2, 1
    generator = torch.Generator().manual_seed(0)
    # The peer takes text_len tokens, of which 0 is its padding, and ours one fewer, with lengths.
    text = torch.randint(1, TEXT_VOCAB_SIZE, (arguments.batch, text_len), generator=generator)
    caption_len = min(arguments.caption_len, text_len - 1)
    text[:, caption_len:] = 0
    image = torch.randint(IMAGE_VOCAB_SIZE, (arguments.batch, grid**2), generator=generator)
    sizes = {"n_layer": n_layer, "n_head": arguments.n_head, "text_len": text_len, "grid_size": grid}
    steps = {"ours": build_ours(text, image, caption_len, **sizes), PEER: build_peer(text, image, **sizes)}
    return interleave(steps, rounds, CLOCKS[arguments.clock])


def build_ours(
    text: Tensor, image: Tensor, caption_len: int, *, n_layer: int, n_head: int, text_len: int, grid_size: int
) -> Callable[[], None]:
    from dalle_ds.config import PriorConfig
    from dalle_ds.models.prior import Prior

    config = PriorConfig(
        text_vocab_size=TEXT_VOCAB_SIZE,
        image_vocab_size=IMAGE_VOCAB_SIZE,
        n_layer=n_layer,
        n_head=n_head,
        head_dim=HEAD_DIM,
        text_len=text_len,
        grid_size=grid_size,
    )
    lengths = torch.full((len(text),), caption_len)
    prior = Prior(config)
    return trained(prior, lambda: prior(text[:, :-1], lengths, image)["loss"])


def build_peer(
    text: Tensor, image: Tensor, *, n_layer: int, n_head: int, text_len: int, grid_size: int
) -> Callable[[], None]:
    from parts.peers_worker import stand_in_for_taming

    stand_in_for_taming()
    from dalle_pytorch.dalle_pytorch import DALLE, DiscreteVAE

    # Only its sizes are read: training is given tokens. Three halvings make the grid.
    vae = DiscreteVAE(image_size=8 * grid_size, num_layers=3, num_tokens=IMAGE_VOCAB_SIZE, hidden_dim=8, codebook_dim=8)
    dalle = DALLE(
        dim=n_head * HEAD_DIM,
        vae=vae,
        num_text_tokens=TEXT_VOCAB_SIZE,
        text_seq_len=text_len,
        depth=n_layer,
        heads=n_head,
        dim_head=HEAD_DIM,
        attn_types=("axial_row", "axial_col"),
    )
    return trained(dalle, lambda: dalle(text, image, return_loss=True))


def trained(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    torch.set_num_threads(arguments.threads)
    ratio = median_ratio(seconds[PEER], seconds["ours"])
    table = "\n".join(
        [
            "# A CPU training step against dalle_pytorch.DALLE",
            "",
            f"Machine: {describe_machine()}.",
            "",
            f"Width {arguments.n_head * HEAD_DIM}, {arguments.n_layer} layers, {arguments.n_head} heads of {HEAD_DIM}, "
            f"256 text states (captions of {arguments.caption_len} tokens), 32 x 32 image tokens, "
            f"batch {arguments.batch}, float32; {len(seconds['ours'])} rounds, medians, {arguments.clock} time.",
            "",
            "| side | ms a step |",
            "|---|---|",
            *(f"| {name} | {1e3 * statistics.median(times):.0f} |" for name, times in seconds.items()),
            "",
            f"Ours is {ratio:.2f}x faster (target {TARGET:.0f}x: {'met' if ratio >= TARGET else 'missed'}).",
            "",
        ]
    )
    print(table)
    if not arguments.quick:
        results_path("prior-peers").write_text(table)


if __name__ == "__main__":
    main()
