"""Turn captioned pictures into token shards with a trained dVAE: image tokens and captions, for train-prior.

    dalle-ds encode-images --dvae runs/dvae --data data/scenes/train --out data/tokens/train
    torchrun --nproc_per_node 8 launch/encode_images.py --dvae ... --data 's3://pairs/{000000..041455}.tar' --out ...

The data is a folder of pictures with captions beside them, a folder of .tar shards, or a shard pattern. One shard in
makes one shard out, and processes take shards in turn. A run that was stopped goes on when the same command is given
again, on any number of processes, and makes the same bytes. Captions are kept as text, so that BPE dropout varies from
epoch to epoch.

Pictures are cropped to the centre square, or with --augment once at random as Listing 2 of the paper does it. To draw
another crop in every epoch, train from pixels: `dalle-ds train-prior --from_pixels true`.
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError, ReadConfig, require
from dalle_ds.flags import add_flags, apply_flags

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dalle_ds.data.encoding import Encoding, Unit, UnitLog
    from dalle_ds.data.sources import Source
    from dalle_ds.models.dvae import DVAE
    from dalle_ds.training.distributed import Ranks

SEED_OF_ENCODING = 5  # keeps these draws apart from those of training
AHEAD_PER_WORKER = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dvae", required=True, help="run folder of `dalle-ds train-dvae` or `import-dvae`")
    parser.add_argument("--data", required=True, help="captioned pictures: a folder, or shards (train-{000..009}.tar)")
    parser.add_argument("--out", required=True, help="folder of token shards to write")
    parser.add_argument("--augment", action="store_true", help="a random crop as in Listing 2, not the centre crop")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops (default: 0)")
    parser.add_argument("--batch_size", type=int, default=100, help="pictures encoded at once (default: 100)")
    parser.add_argument("--n_worker", type=int, default=4, help="threads that decode pictures (default: 4)")
    parser.add_argument(
        "--samples_per_shard", type=int, default=5_000, help="pictures of a folder in one shard (default: 5000)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards that --out already holds")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add_flags(parser, ReadConfig(), "read.")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from dalle_ds.data.encoding import Encoding, divide
    from dalle_ds.data.sources import open_source
    from dalle_ds.data.writer import MAX_SAMPLES_PER_SHARD
    from dalle_ds.models.weights import fingerprint, load_dvae

    for name in ("batch_size", "n_worker"):
        require(getattr(args, name) >= 1, f"--{name} {getattr(args, name)} must be at least 1")
    require(args.seed >= 0, f"--seed {args.seed} must not be negative")
    require(
        1 <= args.samples_per_shard <= MAX_SAMPLES_PER_SHARD,
        f"--samples_per_shard {args.samples_per_shard} must lie in [1, {MAX_SAMPLES_PER_SHARD}]",
    )
    out = Path(args.out)
    require(not out.exists() or out.is_dir(), f"--out {out} is a file: name a folder")
    dvae = load_dvae(args.dvae)
    source = open_source(args.data, apply_flags(ReadConfig(), args, "read."))
    recipe = {
        "dvae_sha256": fingerprint(args.dvae, "dvae"),
        "augment": args.augment,
        "seed": args.seed if args.augment else 0,
    }
    encoding = Encoding(out, divide(source, args.samples_per_shard), recipe)
    ranks, left = start(encoding, overwrite=args.overwrite)
    dvae = dvae.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = Encoder(dvae, source, ranks.device, args)
    mine = left[ranks.rank :: ranks.world_size]
    encode_units(encoder, encoding, mine, shown=ranks.is_first)
    if mine or ranks.is_first:
        report(encoding, dvae, args.dvae, n_skipped_units=len(encoding.units) - len(left), is_first=ranks.is_first)


def encode_units(encoder: "Encoder", encoding: "Encoding", units: list["Unit"], *, shown: bool) -> None:
    """Encodes the units one after the other; a folder that was made for nothing is removed."""
    from rich.progress import Progress

    out, n_samples = encoding.folder, 0
    had_folder = out.exists()
    with Progress(disable=not shown) as progress:
        task = progress.add_task(describe(0), total=len(units))
        try:
            for unit in units:
                n_samples += encoder.encode(encoding, unit)
                progress.update(task, advance=1, description=describe(n_samples))
        except BaseException:
            if not had_folder and out.exists() and not any(out.iterdir()):
                out.rmdir()
            raise


def describe(n_samples: int) -> str:
    return f"encoded {n_samples:,} pictures" if n_samples else "encoding pictures"


def start(encoding: "Encoding", *, overwrite: bool) -> tuple["Ranks", list["Unit"]]:
    """Which rank this process is, and what all of them have left to do.

    Ranks meet here alone and then work by themselves, so that a slow one keeps no other in a collective.
    """
    import os

    import torch
    import torch.distributed as dist

    from dalle_ds.training.distributed import Ranks, process_group

    def prepare() -> list["Unit"]:
        if overwrite:
            encoding.clear()
        else:
            encoding.check()
        return encoding.begin()

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
            raise InputError("SLURM starts several tasks and none knows its RANK: use a script of launch/slurm")
        return Ranks(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu")), prepare()
    with process_group() as ranks:
        # One process looks, for a thousand of them would read every marker a thousand times.
        answer: list[Any] = [None]
        if ranks.is_first:
            try:
                answer = [prepare()]
            except (InputError, OSError) as error:
                answer = [InputError(str(error))]
        dist.broadcast_object_list(answer, device=ranks.device)
    if isinstance(answer[0], InputError):
        raise answer[0]
    return ranks, answer[0]


class Encoder:
    """Encodes the pictures of one unit after the other; its first batches are checked for codes that say nothing."""

    def __init__(self, dvae: "DVAE", source: "Source", device: "torch.device", args: argparse.Namespace) -> None:
        from dalle_ds.data.images import picture_decode
        from dalle_ds.models.code_check import CodeCheck

        self.dvae, self.source, self.device, self.args = dvae, source, device, args
        self.decode = picture_decode(dvae.config.image_size, augment=args.augment, listing=2)
        self.check: CodeCheck = CodeCheck()
        self.has_warned = False

    def encode(self, encoding: "Encoding", unit: "Unit") -> int:
        """Writes the token shard of the unit and returns how many samples it has."""
        from dalle_ds.data.encoding import UnitLog

        log, used = UnitLog(), set[int]()
        return encoding.write(unit, self._samples(unit, log, used), log, used).n_samples

    def _samples(self, unit: "Unit", log: "UnitLog", used: set[int]) -> Iterator[dict[str, bytes]]:
        import json

        import numpy as np

        from dalle_ds.data.token_shards import encode_codes

        for batch in self._batches(unit, log):
            codes = self._codes(np.stack([sample["image"] for sample in batch])).numpy()
            used.update(np.unique(codes).tolist())
            for sample, grid in zip(batch, codes, strict=True):
                members = {"npy": encode_codes(grid), "txt": sample["caption"].encode()}
                if sample["truth"] is not None:
                    members["json"] = json.dumps(sample["truth"]).encode()
                yield members

    def _batches(self, unit: "Unit", log: "UnitLog") -> Iterator[list[dict[str, Any]]]:
        """Decoded samples; never of two units, so that a shard does not depend on what was encoded before it."""
        import numpy as np

        from dalle_ds.data.pipeline import decode_ahead
        from dalle_ds.data.skips import BadSample

        def decode(numbered: tuple[int, dict[str, Any]]) -> tuple[dict[str, Any], str]:
            number, sample = numbered
            rng = np.random.default_rng([SEED_OF_ENCODING, self.args.seed, unit.index, number])
            try:
                return self.decode(sample, rng), ""
            except BadSample as error:
                return sample, str(error)

        n_ahead = AHEAD_PER_WORKER * self.args.n_worker + self.args.batch_size
        raw = enumerate(sample for part in unit.parts for sample in self.source.read(part, log))
        batch = []
        for sample, bad in decode_ahead(raw, decode, self.args.n_worker, n_ahead):
            if bad:
                log.add(sample["key"], sample["origin"], bad)
                continue
            batch.append(sample)
            if len(batch) == self.args.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _codes(self, pictures: "np.ndarray[Any, Any]") -> "Tensor":
        """Tokens of uint8 pictures [B, S, S, 3], on the CPU."""
        import torch

        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.device)
        codes = self.dvae.encode(images).cpu()
        self.check.see(images, codes)
        if not self.check.conclusive and not self.has_warned:
            print(f"warning: {self.args.data} begins with pictures much alike: codes are checked later", flush=True)
            self.has_warned = True
        return codes


def report(encoding: "Encoding", dvae: "DVAE", path: str, *, n_skipped_units: int, is_first: bool) -> None:
    """Writes the manifest if this process is the last one, and says what was made."""
    finished = encoding.finish(grid_size=dvae.config.grid_size, vocab_size=dvae.config.vocab_size, dvae=str(path))
    if finished is None:
        if is_first:
            print(f"{encoding.folder}: this process is done; the last one writes the manifest", flush=True)
        return
    manifest, n_used, log = finished
    if log.n_skipped:
        print(f"warning: {log.summary()}", flush=True)
    before = f"; {n_skipped_units:,} of {len(encoding.units):,} shards were there already" if n_skipped_units else ""
    print(
        f"{encoding.folder}: {manifest.n_samples:,} samples of {manifest.grid_size} x {manifest.grid_size} tokens, "
        f"{n_used:,} of {manifest.vocab_size:,} tokens used{before}",
        flush=True,
    )
