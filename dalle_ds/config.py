"""Every setting that is ours, as frozen dataclasses that check themselves.

What DeepSpeed owns (batch sizes, precision, ZeRO, the optimizer and its peak learning rate) lives in
ds_configs/*.json and never here. Numbers of the paper are the defaults; section numbers refer to
"Zero-Shot Text-to-Image Generation" (arXiv 2102.12092).
"""

import dataclasses
import errno
import math
from dataclasses import dataclass
from typing import Any

# What an operating system says of a full disk, or of a quota that is used up.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


class InputError(ValueError):
    """A mistake in what the user gave: one line that names what, where, and what to do."""


class Preempted(Exception):
    """Somebody asked the run to stop, and it has saved: one line that says so."""


def described(default: Any, text: str) -> Any:
    """A dataclass field with a default and the sentence that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"help": text})


def nested(config_type: type) -> Any:
    """A dataclass field that holds another config, at its defaults."""
    return dataclasses.field(default_factory=config_type)


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """The discrete VAE (section 2.1, Appendix A.1): widths n_hid * 1, 2, 4, 8 over three poolings."""

    image_size: int = described(256, "side of the square pictures, in pixels")
    n_hid: int = described(256, "width of the first group; the later ones double it")
    n_blk_per_group: int = described(2, "resblocks in each of the four groups")
    n_init: int = described(128, "width of the codebook: the decoder's first 1x1 convolution")
    vocab_size: int = described(8192, "number of image tokens")
    post_gain: float = described(
        0.0, "constant on each resblock's output; 0 for the paper's 1 / (number of resblocks)^2"
    )
    pool: str = described("max", "max or average: how the encoder halves the picture (the paper found max better)")
    min_scale: float = described(0.0, "floor on the scale b of the logit-Laplace density; 0 for none, as in the paper")

    def __post_init__(self) -> None:
        require(
            self.image_size % 8 == 0 and self.image_size > 0,
            f"image_size {self.image_size} is not a multiple of 8: three poolings halve it; use e.g. 64 or 256",
        )
        require(self.n_hid % 4 == 0 and self.n_hid > 0, f"n_hid {self.n_hid} must be a positive multiple of 4")
        require(self.n_blk_per_group > 0, f"n_blk_per_group {self.n_blk_per_group} must be at least 1")
        require(self.n_init > 0, f"n_init {self.n_init} must be at least 1")
        require(
            2 <= self.vocab_size <= 65536,
            f"vocab_size {self.vocab_size} must lie in [2, 65536]: codes are stored as 16-bit integers",
        )
        require(self.pool in ("max", "average"), f"pool {self.pool!r} must be max or average")
        for name in ("post_gain", "min_scale"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")

    @property
    def grid_size(self) -> int:
        """Side of the token grid: three poolings divide the image side by 8."""
        return self.image_size // 8


# The fields of DVAEScheduleConfig that are numbers of steps.
DVAE_STEPS = ("kl_steps", "temperature_steps", "lr_warmup_steps", "lr_steps", "warm_start_steps")


@dataclass(frozen=True, kw_only=True)
class DVAEScheduleConfig:
    """Cosine schedules of stage 1 (Appendix A.2), as step counts; the peak learning rate is in the DeepSpeed JSON."""

    kl_weight_start: float = described(0.0, "weight of the KL term at step 0")
    kl_weight: float = described(6.6, "weight of the KL term after kl_steps")
    kl_steps: int = described(5_000, "steps over which the KL weight changes")
    temperature_start: float = described(1.0, "Gumbel-softmax temperature at step 0")
    temperature_end: float = described(1 / 16, "Gumbel-softmax temperature after temperature_steps")
    temperature_steps: int = described(150_000, "steps over which the temperature falls")
    lr_warmup_steps: int = described(0, "steps of linear warm-up (the paper has none)")
    lr_final_multiplier: float = described(1 / 80, "learning rate at the end, as a multiple of its peak")
    lr_steps: int = described(1_200_000, "steps over which the learning rate falls")
    lr_start_multiplier: float = described(1.0, "learning rate after its warm-up, as a multiple of the JSON's peak")
    encoder_lr_multiplier: float = described(1.0, "the encoder's learning rate, as a multiple of the decoder's")
    warm_start_steps: int = described(
        0, "steps without relaxation before the codebook is made by k-means; the paper has none, short runs need some"
    )

    def __post_init__(self) -> None:
        for name in ("kl_weight_start", "kl_weight"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
        for name in ("temperature_start", "temperature_end"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be positive")
        require(
            0 <= self.lr_final_multiplier <= 1, f"lr_final_multiplier {self.lr_final_multiplier} must lie in [0, 1]"
        )
        for name in ("lr_start_multiplier", "encoder_lr_multiplier"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be positive")
        for name in DVAE_STEPS:
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Byte-pair encoding of captions (section 2.2): 16,384 pieces, lower-cased, 10% BPE dropout in training."""

    vocab_size: int = described(16_384, "number of pieces; fewer are made when the captions do not yield that many")
    dropout: float = described(0.1, "probability of dropping a merge while encoding for training")

    def __post_init__(self) -> None:
        require(self.vocab_size >= 32, f"tokenizer vocab_size {self.vocab_size} must be at least 32")
        require(0 <= self.dropout < 1, f"dropout {self.dropout} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The sparse transformer over text and image tokens (sections 2.2 and 2.3, Appendix B.1)."""

    text_vocab_size: int = described(16_384, "number of text pieces; taken from the tokenizer when training")
    text_len: int = described(256, "text states: start-of-text, the caption's first tokens, learned pads")
    image_vocab_size: int = described(8192, "number of image tokens; taken from the token shards when training")
    grid_size: int = described(32, "side of the image token grid; taken from the token shards when training")
    n_layer: int = described(64, "transformer layers, each an attention and an MLP resblock")
    n_head: int = described(62, "attention heads")
    head_dim: int = described(64, "width of a head")
    conv_kernel: int = described(11, "side of the convolutional mask of the last layer")
    conv_wrap: bool = described(
        True, "the convolutional mask's closing offsets, as the paper's figure has them; false for the plain window"
    )
    dropout: float = described(
        0.0, "dropout at the end of each resblock, as in Sparse Transformers; the paper has none"
    )
    sandwich_norm: bool = described(False, "a second layer norm at the end of each resblock (CogView; not the paper's)")
    pb_relax: bool = described(False, "layer norms that cannot overflow: CogView's precision-bottleneck relaxation")
    text_loss_weight: float = described(1 / 8, "weight of the text loss; the image loss has the rest")

    def __post_init__(self) -> None:
        for name in ("text_vocab_size", "image_vocab_size", "grid_size", "n_layer", "n_head", "head_dim"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be at least 1")
        require(self.text_len >= 2, f"text_len {self.text_len} must be at least 2: start-of-text and one token")
        require(
            self.conv_kernel > 0 and self.conv_kernel % 2 == 1,
            f"conv_kernel {self.conv_kernel} must be odd and positive",
        )
        require(0 <= self.dropout < 1, f"dropout {self.dropout} must lie in [0, 1)")
        require(0 <= self.text_loss_weight <= 1, f"text_loss_weight {self.text_loss_weight} must lie in [0, 1]")

    @property
    def dim(self) -> int:
        return self.n_head * self.head_dim

    @property
    def image_len(self) -> int:
        return self.grid_size**2

    @property
    def seq_len(self) -> int:
        return self.text_len + self.image_len


# What follows the warm-up of stage 2.
LR_RULES = ("plateau", "cosine")


@dataclass(frozen=True, kw_only=True)
class PriorScheduleConfig:
    """Learning rate of stage 2 as a multiple of its peak (Appendix B.2): linear warm-up, then one of two rules.

    "plateau" is the paper's: halved when the training loss no longer falls. When that is, is ours, for the paper halved
    by hand; training/schedules.py says the rule. "cosine" falls to the final multiplier, for runs of a set length.
    """

    lr_rule: str = described("plateau", "plateau or cosine: what the learning rate follows after its warm-up")
    lr_warmup_steps: int = described(5_000, "steps of linear warm-up")
    lr_halvings: int = described(5, "plateau: how often the learning rate is halved, at most")
    plateau_window: int = described(5_000, "plateau: steps over which the training loss is averaged (ours)")
    plateau_improvement: float = described(
        0.002, "plateau: fraction by which that mean must fall below the best one (ours)"
    )
    plateau_patience: int = described(2, "plateau: windows in a row that do not before the rate is halved (ours)")
    lr_steps: int = described(430_000, "cosine: step at which the learning rate reaches its final multiplier")
    lr_final_multiplier: float = described(1 / 32, "cosine: learning rate at the end, as a multiple of its peak")

    def __post_init__(self) -> None:
        require(self.lr_rule in LR_RULES, f"lr_rule {self.lr_rule!r} must be one of {', '.join(LR_RULES)}")
        for name in ("plateau_window", "plateau_patience"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")
        require(0 <= self.plateau_improvement < 1, f"plateau_improvement {self.plateau_improvement} must lie in [0, 1)")
        require(self.lr_halvings >= 0, f"lr_halvings {self.lr_halvings} must not be negative")
        require(self.lr_warmup_steps >= 0, f"lr_warmup_steps {self.lr_warmup_steps} must not be negative")
        require(self.lr_steps >= 0, f"lr_steps {self.lr_steps} must not be negative")
        require(
            0 <= self.lr_final_multiplier <= 1, f"lr_final_multiplier {self.lr_final_multiplier} must lie in [0, 1]"
        )


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How shards are read: the size of requests, patience with a faulty network, and the cache on the local disk."""

    request_bytes: int = described(64 * 2**20, "bytes of one ranged request")
    part_bytes: int = described(2**20, "bytes that are checked, read ahead and cached as one")
    n_ahead: int = described(16, "parts that are read ahead, for each open shard")
    n_attempt: int = described(8, "tries without a new byte before a shard counts as unreadable")
    backoff_seconds: float = described(0.5, "longest wait before the second try; it doubles, and is drawn at random")
    max_backoff_seconds: float = described(30.0, "the longest such wait")
    failed_shards: int = described(0, "shards that may be given up before the run ends with their names")
    stall_seconds: float = described(30.0, "a connection without a byte for so long is given up")
    cache: str = described("", "folder on a local disk that keeps what was read; empty for none")
    cache_bytes: int = described(100 * 2**30, "bytes that the cache may hold; what was not used for longest goes first")

    def __post_init__(self) -> None:
        for name in ("request_bytes", "part_bytes", "n_ahead", "n_attempt", "cache_bytes"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")
        for name in ("failed_shards", "backoff_seconds", "max_backoff_seconds"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
        require(self.stall_seconds > 0, f"stall_seconds {self.stall_seconds} must be above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are read, and how they are shuffled."""

    train: str = described(
        "", "training data: a folder, shards as a brace pattern (train-{000..009}.tar), or a .json of sets and weights"
    )
    validation: str = described("", "validation data, in the same forms; empty for none")
    shuffle_buffer: int = described(
        8_192, "samples shuffled together, over all ranks; each holds its part of twice as many. 1 keeps their order"
    )
    n_lanes: int = described(
        64, "places of the data that a batch draws on; with a multiple of the ranks each sample is read by one alone"
    )
    block_len: int = described(256, "neighbours in a shard that stay together when blocks are permuted, at most")
    n_worker: int = described(1, "threads that decode samples, on each rank")
    read: ReadConfig = nested(ReadConfig)

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer", "n_lanes", "block_len", "n_worker"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run trains, and how often it reports, evaluates, samples and saves."""

    steps: int = described(1_000, "optimizer steps in all")
    seed: int = described(0, "seed of initialisation, shuffling and noise")
    log_every: int = described(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = described(0, "steps between evaluations on the validation data; 0 for at the end only")
    sample_every: int = described(0, "steps between picture grids; 0 for at the end only")
    save_every: int = described(0, "steps between checkpoints; 0 for at the end only")
    keep: int = described(2, "checkpoints kept, the newest ones")
    keep_every: int = described(0, "checkpoints whose step is a multiple of this are kept for ever; 0 for none")
    upload: str = described("", "s3://bucket/prefix that finished checkpoints are copied to, in the background")
    validation_batches: int = described(8, "batches per evaluation and rank")
    timeout_minutes: float = described(
        30.0, "minutes that ranks wait for one that does not come; the run then ends, and names it"
    )

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps {self.steps} must be at least 1")
        require(self.seed >= 0, f"seed {self.seed} must not be negative")
        require(self.log_every >= 1, f"log_every {self.log_every} must be at least 1")
        require(self.keep >= 1, f"keep {self.keep} must be at least 1")
        require(self.validation_batches >= 1, f"validation_batches {self.validation_batches} must be at least 1")
        require(0 < self.timeout_minutes < math.inf, f"timeout_minutes {self.timeout_minutes} must be a number above 0")
        for name in ("evaluate_every", "sample_every", "save_every", "keep_every"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
        require(
            not self.upload or self.upload.startswith("s3://"), f"upload {self.upload!r} must be s3://bucket/prefix"
        )


@dataclass(frozen=True, kw_only=True)
class DVAETraining:
    """All of a stage-1 run but what the DeepSpeed JSON holds."""

    init_from: str = described("", "run folder of a dVAE, trained or imported, whose weights to start from")
    flip: bool = described(True, "mirror half of the training pictures, as Listing 1 does; stage 2 never does")
    stretch: float = described(1.0, "multiplies every number of steps: 0.001 runs the same schedules in a thousandth")
    averaging: float = described(
        0.999, "decay of the averaged parameters, which encode, evaluate and export use (Appendix A.2); 0 for none"
    )
    checkpoint_activations: bool = described(
        False, "keep only what enters each resblock and compute the rest again: less memory, a third more time"
    )
    model: DVAEConfig = nested(DVAEConfig)
    schedule: DVAEScheduleConfig = nested(DVAEScheduleConfig)
    data: DataConfig = nested(DataConfig)
    loop: LoopConfig = nested(LoopConfig)

    def __post_init__(self) -> None:
        require(0 < self.stretch < math.inf, f"stretch {self.stretch} must be a number above 0; 1 leaves all as it is")
        require(0 <= self.averaging < 1, f"averaging {self.averaging} must lie in [0, 1); 0 keeps no average")


def stretched(config: DVAETraining) -> DVAETraining:
    """The config with `stretch` at work: every number of steps of the schedules, and of the whole run, times it.

    Rounded to whole steps, at least 1 where there were any; `stretch` itself stays, to tell what was done. How often a
    run reports and saves is left alone, and so is the decay of the average, which has a warm-up of its own.
    """

    def stretch(steps: int) -> int:
        return max(1, round(steps * config.stretch)) if steps else 0

    schedule = {name: stretch(getattr(config.schedule, name)) for name in DVAE_STEPS}
    return dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, **schedule),
        loop=dataclasses.replace(config.loop, steps=stretch(config.loop.steps)),
    )


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """All of a stage-2 run but what the DeepSpeed JSON holds."""

    caption_dropout: float = described(
        0.0, "fraction of training captions left empty, so that sampling can use guidance (the paper has none)"
    )
    from_pixels: bool = described(
        False, "the data are captioned pictures, encoded by the frozen --dvae as training goes; not token shards"
    )
    augment: bool = described(
        True, "with from_pixels: a new random crop in each epoch, as in Listing 2; false for the centre crop"
    )
    checkpoint_activations: bool = described(
        False, "keep only what enters each layer and compute the rest again: less memory, a third more time"
    )
    averaging: float = described(
        0.99, "decay of the averaged parameters, which sample and evaluate use (Appendix B.2); 0 for none"
    )
    averaging_every: int = described(25, "updates between those that the average takes in (Appendix B.2)")
    histogram_every: int = described(
        0, "steps between lines of histograms.jsonl: exponents of the gradients by kind of parameter; 0 for none"
    )
    model: PriorConfig = nested(PriorConfig)
    tokenizer: TokenizerConfig = nested(TokenizerConfig)
    schedule: PriorScheduleConfig = nested(PriorScheduleConfig)
    data: DataConfig = nested(DataConfig)
    loop: LoopConfig = nested(LoopConfig)

    def __post_init__(self) -> None:
        require(0 <= self.caption_dropout < 1, f"caption_dropout {self.caption_dropout} must lie in [0, 1)")
        require(0 <= self.averaging < 1, f"averaging {self.averaging} must lie in [0, 1); 0 keeps no average")
        require(self.averaging_every >= 1, f"averaging_every {self.averaging_every} must be at least 1")
        require(self.histogram_every >= 0, f"histogram_every {self.histogram_every} must not be negative")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How image tokens are drawn from the prior."""

    temperature: float = described(1.0, "divides the logits; 0 always takes the likeliest token")
    top_k: int = described(0, "keep only the k likeliest tokens; 0 for all")
    top_p: float = described(1.0, "keep the smallest set of tokens with this probability; 1 for all")
    guidance: float = described(
        1.0,
        "exaggerates what the caption changes (classifier-free guidance); above 1 needs caption_dropout in training",
    )
    seed: int = described(0, "seed; a picture depends on its caption, its index and this number alone")
    batch_size: int = described(64, "pictures drawn at once")

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature {self.temperature} must not be negative")
        require(self.top_k >= 0, f"top_k {self.top_k} must not be negative")
        require(self.guidance >= 0, f"guidance {self.guidance} must not be negative")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must lie in (0, 1]")
        require(self.batch_size >= 1, f"batch_size {self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What `dalle-ds filter` drops (Appendix C): language and aspect ratio are the paper's, other numbers ours."""

    min_words: int = described(3, "fewest words of a caption; 0 for any (the paper says only: too short)")
    min_characters: int = described(8, "fewest characters of a caption; 0 for any (ours)")
    max_characters: int = described(2_000, "most characters of a caption; 0 for any (ours)")
    languages: str = described(
        "en", "languages that captions may have, joined by commas; empty for any (paper: English)"
    )
    language_confidence: float = described(
        0.0, "least confidence of the identifier; 0 takes its likeliest language (ours)"
    )
    language_identifier: str = described("fasttext", "which identifier; see LANGUAGE_IDENTIFIERS in data/languages.py")
    boilerplate_share: float = described(
        0.5, "drops captions of which boilerplate is more than this share; 1 for none (the paper says: primarily)"
    )
    max_aspect_ratio: float = described(2.0, "longest over shortest side at most; 0 for any (paper: within 1/2 and 2)")
    min_side: int = described(64, "least pixels of the shorter side; 0 for any (ours; 256 for the full-size dVAE)")
    max_pixels: int = described(
        100_000_000, "most pixels of a picture, read from its header before it is decoded (ours)"
    )
    exact_duplicates: bool = described(True, "drop pictures whose decoded pixels an earlier one has (ours)")
    near_duplicate_bits: int = described(
        4, "bits of 64 that perceptual hashes of near duplicates may differ in; -1 keeps near duplicates (ours)"
    )

    def __post_init__(self) -> None:
        for name in ("min_words", "min_characters", "max_characters", "min_side"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative; 0 is off")
        for name in ("language_confidence", "boilerplate_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} {getattr(self, name)} must lie in [0, 1]")
        require(
            self.max_aspect_ratio == 0 or self.max_aspect_ratio >= 1,
            f"max_aspect_ratio {self.max_aspect_ratio} must be at least 1, or 0 for any",
        )
        require(self.max_pixels >= 1, f"max_pixels {self.max_pixels} must be at least 1")
        require(
            -1 <= self.near_duplicate_bits <= 15,
            f"near_duplicate_bits {self.near_duplicate_bits} must lie in [-1, 15]; -1 is off",
        )


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """The made data set of captioned pictures."""

    image_size: int = described(64, "side of the square pictures, in pixels")
    n_train: int = described(20_000, "training pictures")
    n_validation: int = described(1_000, "validation pictures, of combinations that training has seen")
    n_held_out: int = described(1_000, "test pictures, of combinations kept out of training")
    samples_per_shard: int = described(1_000, "pictures in a tar shard")
    image_format: str = described("png", "png or jpg")
    two_object_fraction: float = described(0.5, "fraction of pictures with a second object and a relation")
    seed: int = described(0, "seed; the same seed makes the same bytes")

    def __post_init__(self) -> None:
        require(self.image_size >= 32, f"image_size {self.image_size} must be at least 32 for shapes to be told apart")
        require(self.image_format in ("png", "jpg"), f"image_format {self.image_format!r} must be png or jpg")
        require(self.samples_per_shard >= 1, f"samples_per_shard {self.samples_per_shard} must be at least 1")
        require(
            0 <= self.two_object_fraction <= 1, f"two_object_fraction {self.two_object_fraction} must lie in [0, 1]"
        )
        for name in ("n_train", "n_validation", "n_held_out"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
