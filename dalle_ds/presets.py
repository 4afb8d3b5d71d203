"""Named settings: what `--preset` chooses, and what flags then change.

`tiny` is for a laptop CPU and 64 x 64 pictures: it finishes in minutes. The others, named by the parameters of the
prior, are the sizes of the paper (Table 1, Appendices A.2 and B.2) on 256 x 256 pictures.
"""

from dataclasses import dataclass, replace

from dalle_ds.config import (
    DataConfig,
    DVAEConfig,
    DVAEScheduleConfig,
    DVAETraining,
    InputError,
    LoopConfig,
    PriorConfig,
    PriorScheduleConfig,
    PriorTraining,
    TokenizerConfig,
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of both stages that belong together."""

    dvae: DVAETraining
    prior: PriorTraining


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises InputError that lists the names."""
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} does not exist; presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def _paper_prior(n_layer: int, n_head: int) -> Preset:
    """A transformer of the paper's kind; the DeepSpeed JSON holds its batch size and peak learning rate."""
    loop = LoopConfig(steps=430_000, log_every=50, evaluate_every=5_000, sample_every=5_000, save_every=1_000)
    dvae_loop = replace(loop, steps=3_000_000)
    return Preset(
        dvae=DVAETraining(loop=dvae_loop),
        prior=PriorTraining(model=PriorConfig(n_layer=n_layer, n_head=n_head), loop=loop),
    )


def _tiny() -> Preset:
    data = DataConfig(shuffle_buffer=4_000)
    return Preset(
        dvae=DVAETraining(
            flip=False,
            averaging=0.0,
            model=DVAEConfig(
                image_size=64, n_hid=16, n_blk_per_group=1, n_init=64, vocab_size=512, post_gain=0.25, min_scale=0.3
            ),
            schedule=DVAEScheduleConfig(
                kl_weight=0.2,
                kl_steps=0,
                temperature_start=0.25,
                temperature_steps=140,
                lr_warmup_steps=20,
                lr_steps=200,
                lr_start_multiplier=0.2,
                lr_final_multiplier=0.004,
                encoder_lr_multiplier=0.1,
                warm_start_steps=1_800,
            ),
            data=data,
            loop=LoopConfig(steps=200),
        ),
        prior=PriorTraining(
            caption_dropout=0.1,
            # Tenfold data would make up for words that come in pieces; minutes of training do not.
            tokenizer=TokenizerConfig(dropout=0.0),
            model=PriorConfig(
                text_vocab_size=1024, text_len=20, image_vocab_size=512, grid_size=8, n_layer=4, n_head=4, head_dim=32
            ),
            # A cosine that ends near 0 averages by itself.
            averaging=0.0,
            schedule=PriorScheduleConfig(
                lr_rule="cosine", lr_warmup_steps=50, lr_steps=1_900, lr_final_multiplier=0.02
            ),
            data=data,
            loop=LoopConfig(steps=1_900),
        ),
    )


# Depth and heads of 64 of the three sizes in Table 1 (64 layers each), and of smaller ones of the same kind.
PRESETS = {
    "tiny": _tiny(),
    "small": _paper_prior(n_layer=24, n_head=8),
    "1.3b": _paper_prior(n_layer=24, n_head=32),
    "2.8b": _paper_prior(n_layer=64, n_head=30),
    "5.6b": _paper_prior(n_layer=64, n_head=42),
    "12b": _paper_prior(n_layer=64, n_head=62),
}
