"""Stage 1: train the discrete VAE that turns pictures into tokens.

    deepspeed launch/train_dvae.py --deepspeed_config ds_configs/cpu_dvae.json --preset tiny \\
        --data.train data/scenes/train --data.validation data/scenes/validation --out runs/dvae

The same script runs as one process with plain `python`. `--resume auto` goes on with the run in --out. A run of the
paper's schedules in a thousandth of its steps: --preset 1.3b --stretch 0.001. Precision, ZeRO stage (0, 1, 2) and batch
are in the DeepSpeed JSON.
"""

import argparse
from typing import TYPE_CHECKING, Any

from dalle_ds.flags import add_flags, add_training_arguments, apply_flags
from dalle_ds.presets import PRESETS, find_preset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from dalle_ds.config import DVAETraining
    from dalle_ds.data.sources import Source
    from dalle_ds.training.construction import Precision
    from dalle_ds.training.distributed import Ranks
    from dalle_ds.training.session import Stage

N_SHOWN, N_CODEBOOK = 16, 512
WARM_START = "warm_start"
WARM_START_FINAL_LR = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    add_flags(parser, PRESETS["tiny"].dvae)


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from functools import partial
    from pathlib import Path

    from dalle_ds.config import require, stretched
    from dalle_ds.data.upload import fetch_newest, open_upload
    from dalle_ds.models.weights import check_settings
    from dalle_ds.training.deepspeed_config import load_deepspeed_config, zero_stage
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.run import fetched, open_run
    from dalle_ds.training.sections import SHARDED_WEIGHTS
    from dalle_ds.training.session import train_stage

    config = stretched(apply_flags(find_preset(args.preset).dvae, args))
    require(bool(config.data.train), "--data.train is missing: name a folder of pictures or shards")
    init_from = None
    if config.init_from:
        init_from = partial(check_settings, config.init_from, "dvae", config.model)
        config = replace(config, schedule=replace(config.schedule, warm_start_steps=0))
    whole = zero_stage(load_deepspeed_config(args.deepspeed_config)) < SHARDED_WEIGHTS
    require(
        whole or not config.schedule.warm_start_steps,
        f"{args.deepspeed_config}: a warm start needs whole weights: use ZeRO stage 0, 1 or 2, "
        "or --schedule.warm_start_steps 0",
    )
    out, read = Path(args.out), config.data.read
    # What is copied when all is done, is waited for when no other process waits.
    with open_upload(config.loop.upload, read) as upload, process_group(config.loop.timeout_minutes) as ranks:
        resume = fetched(args.resume, out, lambda url, run: fetch_newest(url, run, read))
        go_on: dict[str, Any] = {"resume": resume, "allowed": args.allow_change}
        go_on["deepspeed_config"] = args.deepspeed_config
        begins = open_run(out, resume) is None
        if config.schedule.warm_start_steps and begins:
            train_stage(make_warm_start(config, ranks, out), ranks, out=out / WARM_START, **go_on)
        stage = make_stage(config, ranks, out, after_warm_start=begins)
        train_stage(replace(stage, upload=upload, init_from=init_from), ranks, out=out, **go_on)


def make_warm_start(config: "DVAETraining", ranks: "Ranks", out: "Path") -> "Stage":
    """The same dVAE without relaxation, as a stage of its own, with a checkpoint of its own."""
    from dataclasses import replace

    from dalle_ds.training.schedules import ScheduledRate, warmup_cosine

    steps = config.schedule.warm_start_steps
    loop = replace(config.loop, steps=steps, evaluate_every=0, sample_every=0)
    stage = make_stage(replace(config, loop=loop, averaging=0.0), ranks, out, warm=True)
    return replace(
        stage,
        kind="dvae-warm-start",
        learning_rate=ScheduledRate(
            lambda step: warmup_cosine(step, config.schedule.lr_warmup_steps, WARM_START_FINAL_LR, steps)
        ),
        scalars=lambda step: {},
        lr_multiplier=lambda name: 1.0,
        sample=None,
    )


def make_stage(
    config: "DVAETraining", ranks: "Ranks", out: "Path", *, warm: bool = False, after_warm_start: bool = False
) -> "Stage":
    """The dVAE with its data, loss and schedules, for the training session.

    `warm` leaves the relaxation out; `after_warm_start` begins at the weights of a warm start, where there was one.
    """
    import functools

    import torch

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader, training_reader
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.sources import open_source
    from dalle_ds.models.codebook import make_codebook
    from dalle_ds.models.dvae import CHANNELS, DVAE
    from dalle_ds.models.weights import load_dvae
    from dalle_ds.training.metrics import mean_over_ranks
    from dalle_ds.training.schedules import ScheduledRate, cosine, warmup_cosine
    from dalle_ds.training.session import Stage

    schedule, data, size = config.schedule, config.data, config.model.image_size
    values_per_cell = CHANNELS * (size // config.model.grid_size) ** 2
    places: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
    train_source = open_source(data.train, data.read)
    validation_source = open_source(data.validation, data.read) if data.validation else None

    def scalars(step: int) -> dict[str, float]:
        return {
            "temperature": cosine(
                step, schedule.temperature_start, schedule.temperature_end, schedule.temperature_steps
            ),
            "kl_weight": cosine(step, schedule.kl_weight_start, schedule.kl_weight, schedule.kl_steps),
        }

    def losses(engine: Any, images: "Tensor", step: int, seeds: list[int]) -> dict[str, "Tensor"]:
        generators = [torch.Generator(ranks.device).manual_seed(seed) for seed in seeds]
        relaxation = {"temperature": None} if warm else {**scalars(step), "generator": generators}
        outputs: dict[str, Tensor] = engine(images.to(ranks.device), **relaxation)
        return {**outputs, "kl_per_cell": outputs["kl"] * values_per_cell}  # nats; at most ln vocab_size

    def build_model(precision: "Precision") -> "nn.Module":
        model = DVAE(config.model, checkpoint_activations=config.checkpoint_activations)
        if after_warm_start and schedule.warm_start_steps:
            model.load_state_dict(load_dvae(out / WARM_START, kind="dvae-warm-start").state_dict())
            make_codebook(model, first_images(train_source, size, N_CODEBOOK), config.loop.seed)
        return model

    def make_step(engine: Any) -> Any:
        def step(batch: dict[str, Any], index: int, micro_step: int) -> dict[str, "Tensor"]:
            images = images_of(batch)
            place = ranks.rank * engine.gradient_accumulation_steps() + micro_step
            outputs = losses(engine, images, index, noise_seeds(config.loop.seed, index, place, len(images)))
            return {name: value for name, value in outputs.items() if name != "codes"}

        return step

    def validate(engine: Any, batches: "Iterator[dict[str, Any]]", n_batches: int, step: int) -> dict[str, float]:
        figures, counts = [], torch.zeros(config.model.vocab_size, device=ranks.device)
        for i in range(n_batches):
            images = images_of(next(batches))
            place = ranks.rank * n_batches + i
            outputs = losses(engine, images, step, noise_seeds(config.loop.seed, 0, place, len(images)))
            counts += torch.bincount(outputs.pop("codes").flatten(), minlength=len(counts))
            figures.append(outputs)
        return {**mean_over_ranks(figures), **codebook_use(counts)}

    def sample(model: "nn.Module", path: "Path | None") -> None:
        from dalle_ds.reporting.grid import pairs_grid

        images = first_images(validation_source or train_source, size, N_SHOWN).to(ranks.device)
        decoded = model.decode(model.encode(images))  # type: ignore[operator]
        if path is None:
            return
        pictures = [stack.permute(0, 2, 3, 1).cpu().numpy() for stack in (images, decoded)]
        pairs_grid(list(pictures[0]), list(pictures[1]), scale=max(1, 128 // size)).save(path)

    return Stage(
        kind="dvae",
        config=config,
        build_model=build_model,
        open_reader=training_reader(
            train_source,
            picture_decode(size, augment=True, flip=config.flip),
            data,
            seed=config.loop.seed,
            log=SkipLog(out / "skipped.jsonl"),
            **places,
        ),
        open_validation=functools.partial(Reader, validation_source, picture_decode(size, augment=False), **places)
        if validation_source
        else None,
        step=make_step,
        validate=validate,
        sample=sample,
        learning_rate=ScheduledRate(
            lambda step: (
                schedule.lr_start_multiplier
                * warmup_cosine(
                    step,
                    schedule.lr_warmup_steps,
                    schedule.lr_final_multiplier / schedule.lr_start_multiplier,
                    schedule.lr_steps,
                )
            )
        ),
        scalars=scalars,
        lr_multiplier=lambda name: schedule.encoder_lr_multiplier if name.startswith("encoder.") else 1.0,
        facts={},
        averaging=config.averaging,
    )


def images_of(batch: dict[str, Any]) -> "Tensor":
    """The pictures of a batch, uint8 [B, 3, S, S], channels last in memory."""
    import torch

    return torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)


def first_images(source: "Source", size: int, n: int) -> "Tensor":
    """The first n pictures, the same on every rank."""
    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader

    return images_of(next(Reader(source, picture_decode(size, augment=False), n)))


def noise_seeds(seed: int, step: int, micro_batch: int, n: int) -> list[int]:
    """Seeds of the relaxation's noise, one for each of the n pictures of the micro-batch of that number in the step.

    They depend on where in the run and in the whole batch a picture is, so that a resumed run draws the same noise, and
    so does one that cuts its batch into other micro-batches or ranks. (Which pictures a rank reads depends on how many
    ranks there are.)
    """
    return [abs(hash((seed, step, micro_batch * n + i))) for i in range(n)]


def codebook_use(counts: "Tensor") -> dict[str, float]:
    """Fraction of tokens used and perplexity of their distribution, from counts [vocab_size] summed over all ranks."""
    import torch.distributed as dist

    from dalle_ds.evaluation.reconstruction import codebook_figures

    dist.all_reduce(counts)
    figures = codebook_figures(counts)
    return {"codebook_use": figures["codebook use"], "codebook_perplexity": figures["codebook perplexity"]}
