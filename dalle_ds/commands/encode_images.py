"""Turn captioned pictures into token shards with a trained dVAE: image tokens and captions, for train-prior.

    dalle-ds encode-images --dvae runs/dvae --data data/scenes/train --out data/tokens/train

The data is a folder of pictures with captions beside them, a folder of .tar shards, or a shard pattern. Captions are
kept as text, so that BPE dropout varies from epoch to epoch.
"""

import argparse

from dalle_ds.config import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dvae", required=True, help="run folder of `dalle-ds train-dvae` or `import-dvae`")
    parser.add_argument("--data", required=True, help="captioned pictures: a folder, or shards (train-{000..009}.tar)")
    parser.add_argument("--out", required=True, help="folder of token shards to write")
    parser.add_argument("--batch_size", type=int, default=100, help="pictures encoded at once (default: 100)")
    parser.add_argument("--samples_per_shard", type=int, default=5_000, help="samples in a shard (default: 5000)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that --out already holds")


def run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    import torch
    from rich.progress import Progress

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.sources import open_source
    from dalle_ds.data.token_shards import MANIFEST, TokenManifest, encode_codes, write_manifest
    from dalle_ds.data.writer import ShardWriter
    from dalle_ds.models.code_check import CodeCheck
    from dalle_ds.models.weights import fingerprint, load_dvae

    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dvae = load_dvae(args.dvae).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = open_source(args.data)
    log = SkipLog(out / "skipped.jsonl")
    decode = picture_decode(dvae.config.image_size, augment=False)
    reader = Reader(source, decode, args.batch_size, epochs=1, drop_last=False, log=log)
    check, counts = CodeCheck(), torch.zeros(dvae.config.vocab_size, dtype=torch.int64)
    with ShardWriter(out, args.samples_per_shard, overwrite=args.overwrite) as writer, Progress() as progress, reader:
        # Shards without a manifest are no token shards: not until all are written.
        (out / MANIFEST).unlink(missing_ok=True)
        task = progress.add_task("encoding pictures", total=None)
        for batch in reader:
            images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device)
            codes = dvae.encode(images).cpu()
            check.see(images, codes)
            if writer.n_sample == 0 and not check.conclusive:
                print(f"warning: {args.data} begins with pictures much alike: codes are checked later", flush=True)
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
            for i, caption in enumerate(batch["caption"]):
                sample = {"npy": encode_codes(codes[i].numpy()), "txt": caption.encode()}
                if batch["truth"][i] is not None:
                    sample["json"] = json.dumps(batch["truth"][i]).encode()
                writer.write(sample)
            progress.update(task, advance=len(codes), description=f"encoded {writer.n_sample:,} pictures")
    manifest = TokenManifest(
        n_samples=writer.n_sample,
        grid_size=dvae.config.grid_size,
        vocab_size=dvae.config.vocab_size,
        dvae=str(args.dvae),
        dvae_sha256=fingerprint(args.dvae, "dvae"),
    )
    write_manifest(out, manifest)
    if log.n_skipped:
        print(f"warning: {log.summary()}", flush=True)
    used = f"{int((counts > 0).sum()):,} of {len(counts):,} tokens used"
    print(
        f"{out}: {writer.n_sample:,} samples of {manifest.grid_size} x {manifest.grid_size} tokens, {used}", flush=True
    )
