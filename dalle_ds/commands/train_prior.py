"""Stage 2: train the transformer over text and image tokens.

    deepspeed launch/train_prior.py --deepspeed_config ds_configs/cpu_zero3.json --preset tiny \\
        --tokenizer runs/tokenizer.model --data.train data/tokens/train --data.validation data/tokens/validation \\
        --out runs/prior

The data are token shards (`dalle-ds encode-images`); vocabulary and grid sizes are taken from them and from the
tokenizer. With `--from_pixels true --dvae runs/dvae` they are captioned pictures instead, which the frozen dVAE encodes
as training goes: slower, and every epoch sees other crops. The same script runs as one process with plain `python`.
`--resume auto` goes on with the run in --out. `--init_from` begins a new run at the weights of another one, trained or
imported.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError, require
from dalle_ds.flags import add_flags, add_training_arguments, apply_flags
from dalle_ds.presets import PRESETS, find_preset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from dalle_ds.config import PriorConfig, PriorTraining
    from dalle_ds.data.pipeline import Decode
    from dalle_ds.data.sources import Source
    from dalle_ds.data.token_shards import TokenManifest
    from dalle_ds.tokenizer import Tokenizer
    from dalle_ds.training.distributed import Ranks
    from dalle_ds.training.session import Stage

N_SHOWN = 12
# Pictures that are encoded before training from pixels begins, to see that their tokens differ.
N_CHECKED = 32
TOKENIZER_FILE = "tokenizer.model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument("--tokenizer", required=True, help="model file of `dalle-ds train-tokenizer`")
    parser.add_argument(
        "--dvae", help="run folder of the dVAE, to show pictures (default: the one that made the tokens)"
    )
    parser.add_argument("--init_from", default="", help="run folder of a prior whose weights a new run begins with")
    add_flags(parser, PRESETS["tiny"].prior)


def run(args: argparse.Namespace) -> None:
    import dataclasses
    from functools import partial
    from pathlib import Path

    from dalle_ds.data.upload import fetch_newest, open_upload
    from dalle_ds.tokenizer import Tokenizer
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.run import fetched
    from dalle_ds.training.session import train_stage

    config = apply_flags(find_preset(args.preset).prior, args)
    require(bool(config.data.train), "--data.train is missing: name a folder of token shards")
    require(bool(args.dvae) or not config.from_pixels, "--from_pixels needs the dVAE that encodes: give --dvae")
    tokenizer = Tokenizer.load(args.tokenizer)
    manifest = find_manifest(config, args.dvae)
    model = dataclasses.replace(
        config.model,
        text_vocab_size=tokenizer.vocab_size,
        image_vocab_size=manifest.vocab_size,
        grid_size=manifest.grid_size,
    )
    init_from = partial(start_from, args.init_from, model, tokenizer, manifest) if args.init_from else None
    out, read = Path(args.out), config.data.read
    # What is copied when all is done, is waited for when no other process waits.
    with open_upload(config.loop.upload, read) as upload, process_group(config.loop.timeout_minutes) as ranks:
        stage = make_stage(dataclasses.replace(config, model=model), tokenizer, ranks, out, args.dvae or manifest.dvae)
        train_stage(
            dataclasses.replace(stage, upload=upload, init_from=init_from),
            ranks,
            out=out,
            resume=fetched(args.resume, out, lambda url, run: fetch_newest(url, run, read)),
            deepspeed_config=args.deepspeed_config,
            allowed=args.allow_change,
        )


def start_from(path: str, model: "PriorConfig", tokenizer: "Tokenizer", manifest: "TokenManifest") -> "Path":
    """The checkpoint whose weights to begin with. Raises InputError when it is of other tokens, or of another model."""
    from dalle_ds.models.weights import check_settings, find_weights

    _, description = find_weights(path, "prior")
    for name, value, what in (
        ("tokenizer_sha256", tokenizer.sha256, "another --tokenizer"),
        ("dvae_sha256", manifest.dvae_sha256, "tokens of another dVAE"),
    ):
        require(description.get(name) == value, f"--init_from {path} was trained with {what}: use those it had")
    return check_settings(path, "prior", model)


def find_manifest(config: "PriorTraining", dvae: str) -> "TokenManifest":
    """What the image tokens are: of the token shards, or of the dVAE that encodes the pictures."""
    from dalle_ds.data.token_shards import TokenManifest, read_manifest
    from dalle_ds.models.weights import fingerprint, load_dvae

    if not config.from_pixels:
        manifest = read_manifest(config.data.train)
        if dvae:
            check_dvae(dvae, manifest, config.data.train)
        return manifest
    sizes = load_dvae(dvae).config
    return TokenManifest(
        n_samples=0,
        grid_size=sizes.grid_size,
        vocab_size=sizes.vocab_size,
        dvae=dvae,
        dvae_sha256=fingerprint(dvae, "dvae"),
    )


@dataclass(frozen=True)
class ImageTokens:
    """Where image tokens come from: token shards, or pictures through the frozen dVAE."""

    manifest: "TokenManifest"
    train: "Source"
    validation: "Source | None"
    train_decode: "Decode"
    decode: "Decode"
    """without augmentation, for validation and samples"""
    codes: "Callable[[dict[str, Any]], Tensor]"
    """batch -> tokens [B, image_len]"""


def read_tokens(config: "PriorTraining") -> ImageTokens:
    """Image tokens as token shards hold them. Raises InputError when validation has those of another dVAE."""
    import torch

    from dalle_ds.data.token_shards import open_token_source, token_decode

    data = config.data
    train, manifest = open_token_source(data.train, data.read)
    validation = None
    if data.validation:
        validation, other = open_token_source(data.validation, data.read)
        if other.dvae_sha256 != manifest.dvae_sha256:
            raise InputError(
                f"{data.validation}: its tokens are of another dVAE than those of {data.train}; encode both with one"
            )
    decode = token_decode(manifest)
    return ImageTokens(
        manifest, train, validation, decode, decode, lambda batch: torch.from_numpy(batch["codes"]).flatten(1)
    )


def encode_pictures(config: "PriorTraining", dvae_path: str, ranks: "Ranks") -> ImageTokens:
    """Image tokens of pictures, made as they are needed. Raises InputError when they do not follow the pictures."""
    import torch

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader
    from dalle_ds.data.sources import open_source
    from dalle_ds.models.code_check import CodeCheck
    from dalle_ds.models.weights import load_dvae

    data = config.data
    dvae = load_dvae(dvae_path).requires_grad_(False)
    dvae = dvae.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size, check = dvae.config.image_size, CodeCheck()

    def codes(batch: dict[str, Any]) -> "Tensor":
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(ranks.device)
        tokens: Tensor = dvae.encode(images)
        check.see(images, tokens)
        return tokens.flatten(1)

    train = open_source(data.train, data.read)
    decode = picture_decode(size, augment=False)
    with Reader(train, decode, N_CHECKED, epochs=1, drop_last=False) as reader:
        codes(next(reader))  # the same pictures on every rank, so that all refuse together
    return ImageTokens(
        find_manifest(config, dvae_path),
        train,
        open_source(data.validation, data.read) if data.validation else None,
        picture_decode(size, augment=config.augment, listing=2),
        decode,
        codes,
    )


def make_stage(config: "PriorTraining", tokenizer: "Tokenizer", ranks: "Ranks", out: "Path", dvae: str) -> "Stage":
    """The prior with its data, loss and schedules, for the training session."""
    import functools

    import numpy as np
    import torch
    import torch.distributed as dist

    from dalle_ds.data.pipeline import Reader, training_reader
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.models.gradient_scaling import resblock_index
    from dalle_ds.models.prior import Prior
    from dalle_ds.training.metrics import mean_over_ranks
    from dalle_ds.training.schedules import prior_learning_rate
    from dalle_ds.training.session import Stage

    data = config.data
    places: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
    image_tokens = encode_pictures(config, dvae, ranks) if config.from_pixels else read_tokens(config)
    manifest = image_tokens.manifest

    def to_tensors(batch: dict[str, Any], dropout: float, seed: int) -> tuple["Tensor", "Tensor", "Tensor"]:
        tokens, lengths = tokenizer.encode_batch(
            batch["caption"], config.model.text_len, dropout=dropout, rng=np.random.default_rng(seed)
        )
        arrays = (torch.from_numpy(tokens), torch.from_numpy(lengths), image_tokens.codes(batch))
        return tuple(array.to(ranks.device) for array in arrays)  # type: ignore[return-value]

    def make_step(engine: Any) -> Any:
        def step(batch: dict[str, Any], index: int, micro_step: int) -> dict[str, "Tensor"]:
            seed = abs(hash((config.loop.seed, index, micro_step, ranks.rank)))
            tokens, lengths, codes = to_tensors(batch, config.tokenizer.dropout, seed)
            dropped = np.random.default_rng([seed, 1]).random(len(lengths)) < config.caption_dropout
            lengths = lengths.masked_fill(torch.from_numpy(dropped).to(ranks.device), 0)
            # Dropout draws from torch's own generator.
            torch.manual_seed(seed)
            n_text_tokens = lengths.sum().float()
            dist.all_reduce(n_text_tokens)
            return engine(tokens, lengths, codes, n_text_tokens / ranks.world_size)  # type: ignore[no-any-return]

        return step

    def validate(engine: Any, batches: "Iterator[dict[str, Any]]", n_batches: int, step: int) -> dict[str, float]:
        return mean_over_ranks([engine(*to_tensors(next(batches), 0.0, 0)) for _ in range(n_batches)])

    def sample(model: "nn.Module", path: "Path | None") -> None:
        import json

        from dalle_ds.config import SamplingConfig
        from dalle_ds.generation.sampling import sample_tokens
        from dalle_ds.models.weights import load_dvae
        from dalle_ds.reporting.grid import make_grid

        batch = next(Reader(image_tokens.validation or image_tokens.train, image_tokens.decode, N_SHOWN))
        tokens, lengths, _ = to_tensors(batch, 0.0, 0)
        codes = sample_tokens(model, tokens, lengths, SamplingConfig(), sample_seeds=range(N_SHOWN))  # type: ignore[arg-type]
        if path is None:
            return
        pictures = list(load_dvae(dvae).decode(codes.cpu()).permute(0, 2, 3, 1).numpy())
        make_grid(pictures, batch["caption"], scale=max(1, 128 // pictures[0].shape[0])).save(path)
        path.with_suffix(".json").write_text(json.dumps({"captions": batch["caption"]}))

    return Stage(
        kind="prior",
        config=config,
        build_model=lambda precision: Prior(
            config.model,
            checkpoint_activations=config.checkpoint_activations,
            matrix_dtype=precision.matrix_dtype,
            compute_dtype=precision.compute_dtype,
        ),
        resblock_of=resblock_index,
        histogram_every=config.histogram_every,
        open_reader=training_reader(
            image_tokens.train,
            image_tokens.train_decode,
            data,
            seed=config.loop.seed,
            log=SkipLog(out / "skipped.jsonl"),
            **places,
        ),
        open_validation=functools.partial(Reader, image_tokens.validation, image_tokens.decode, **places)
        if image_tokens.validation
        else None,
        step=make_step,
        validate=validate,
        sample=sample if _holds_dvae(dvae, manifest) else None,
        learning_rate=prior_learning_rate(config.schedule),
        scalars=lambda step: {},
        lr_multiplier=lambda name: 1.0,
        facts={"dvae": dvae, "dvae_sha256": manifest.dvae_sha256, "tokenizer_sha256": tokenizer.sha256},
        averaging=config.averaging,
        averaging_every=config.averaging_every,
        write_files=lambda run: tokenizer.save(run / TOKENIZER_FILE),
    )


def check_dvae(path: str, manifest: "TokenManifest", data: str) -> None:
    """Raises InputError unless the run folder `path` holds the dVAE that made the tokens of `data`."""
    from dalle_ds.models.weights import fingerprint

    if fingerprint(path, "dvae") != manifest.dvae_sha256:
        raise InputError(
            f"--dvae {path} is not the dVAE that made the tokens of {data}: its weights differ; "
            f"give {manifest.dvae}, or encode the pictures again"
        )


def _holds_dvae(path: str, manifest: "TokenManifest") -> bool:
    """Whether pictures can be shown; training itself needs no dVAE, and may run where it is not, or is a newer one."""
    from dalle_ds.models.weights import fingerprint

    try:
        return fingerprint(path, "dvae") == manifest.dvae_sha256
    except InputError:
        return False
