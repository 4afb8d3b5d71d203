"""What may differ where a run goes on: what it costs and tells; what it learns only where that is allowed by name."""

import pytest

from dalle_ds.config import InputError
from dalle_ds.storage.files import write_json
from dalle_ds.storage.folders import begin, publish
from dalle_ds.training.changes import check_changes

CONFIG = {
    "model": {"dim": 8, "dropout": 0.0},
    "tokenizer": {"dropout": 0.1},
    "schedule": {"lr_warmup_steps": 5},
    "loop": {"steps": 3, "seed": 0, "keep": 2},
    "data": {"train": "a", "validation": "", "n_worker": 1, "read": {"n_ahead": 1}},
    "averaging": 0.9,
    "checkpoint_activations": False,
}
DESCRIPTION = {"kind": "prior", "config": CONFIG, "dvae": "runs/a", "dvae_sha256": "aa", "tokenizer_sha256": "bb"}
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "gradient_clipping": 4.0,
    "zero_optimization": {"stage": 3},
    "fp16": {"enabled": True},
}
WORLD_SIZE = 2


@pytest.fixture
def checkpoint(tmp_path):
    folder = begin(tmp_path / "run", 5)
    facts = {"n_parameters": 7, "world_size": WORLD_SIZE, "versions": {"torch": "2"}}
    documents = {"config.json": {**DESCRIPTION, **facts}, "ds_config.json": DS_CONFIG}
    records = {name: write_json(folder / name, content) for name, content in documents.items()}
    return publish(folder, {"step": 5, "world_size": WORLD_SIZE, "files": records})


def changed(content, key, value):
    """The nested dict with one key changed, or taken out where the value is None."""
    name, _, rest = key.partition(".")
    if rest:
        return {**content, name: changed(content.get(name, {}), rest, value)}
    return {key: old for key, old in {**content, name: value}.items() if old is not None}


def go_on(checkpoint, *, config=(), ds_config=(), facts=(), world_size=WORLD_SIZE, allowed=()):
    new_config, new_ds_config = CONFIG, DS_CONFIG
    for key, value in config:
        new_config = changed(new_config, key, value)
    for key, value in ds_config:
        new_ds_config = changed(new_ds_config, key, value)
    description = {**DESCRIPTION, "config": new_config, **dict(facts)}
    check_changes(checkpoint, description, new_ds_config, world_size, allowed)


FREE = [
    ("loop.steps", 9),
    ("loop.keep", 1),
    ("loop.upload", "s3://there"),
    ("data.validation", "b"),
    ("data.n_worker", 4),
    ("data.read.n_ahead", 2),
    ("checkpoint_activations", True),
    ("histogram_every", 5),
    ("init_from", "runs/b"),
]
FREE_IN_THE_JSON = [
    [("zero_optimization.stage", 1)],
    [("zero_optimization.offload_optimizer", {"device": "cpu"})],
    [("hierarchical_sharding.machine_size", 2)],
    [("steps_per_print", 10)],
    [("train_micro_batch_size_per_gpu", 2), ("gradient_accumulation_steps", 4)],
    [("train_micro_batch_size_per_gpu", None), ("train_batch_size", 16)],
]


def test_what_changes_what_a_run_costs_and_tells_is_free(checkpoint, capsys):
    go_on(checkpoint)
    for change in FREE:
        go_on(checkpoint, config=[change])
    for changes in FREE_IN_THE_JSON:
        go_on(checkpoint, ds_config=changes)
    go_on(checkpoint, facts=[("dvae", "runs/elsewhere"), ("version", "9")])
    go_on(checkpoint, world_size=4, ds_config=[("gradient_accumulation_steps", 1)])
    assert capsys.readouterr().out == ""


BOUND = [
    ("model.dim", 9, "model.dim was 8 and is 9"),
    ("tokenizer.dropout", 0.2, "tokenizer.dropout was 0.1 and is 0.2"),
    ("schedule.lr_warmup_steps", 6, "schedule.lr_warmup_steps was 5 and is 6"),
    ("data.train", "b", "data.train was a and is b"),
    ("averaging", 0.5, "averaging was 0.9 and is 0.5"),
    ("averaging", None, "averaging was 0.9 and is not set"),
    ("caption_dropout", 0.1, "caption_dropout was not set and is 0.1"),
]
BOUND_IN_THE_JSON = [
    ("optimizer.params.lr", 0.5, "optimizer.params.lr was 0.1 and is 0.5"),
    ("optimizer.params.betas", [0.9, 0.9], "optimizer.params.betas was [0.9, 0.95] and is [0.9, 0.9]"),
    ("optimizer.type", "Adam", "optimizer.type was AdamW and is Adam"),
    ("gradient_clipping", None, "gradient_clipping was 4.0 and is not set"),
    ("gradient_compression", {"type": "none"}, "gradient_compression.type was not set and is none"),
    ("resblock_gradient_scaling.patience", 9, "resblock_gradient_scaling.patience was not set and is 9"),
    ("mixed_precision", {}, "mixed_precision was not set and is {}"),
    ("fp16.enabled", False, "fp16.enabled was True and is False"),
    ("bf16", {"enabled": True}, "bf16.enabled was not set and is True"),
    ("data_types.grad_accum_dtype", "fp32", "data_types.grad_accum_dtype was not set and is fp32"),
    ("train_micro_batch_size_per_gpu", 8, "train_batch_size was 16 and is 32"),
]
CASES = [(["config"], *case) for case in BOUND] + [(["ds_config"], *case) for case in BOUND_IN_THE_JSON]


@pytest.mark.parametrize(("where", "key", "value", "said"), CASES)
def test_what_changes_what_is_learnt_is_refused_and_allowed_by_name(checkpoint, capsys, where, key, value, said):
    change = {where[0]: [(key, value)]}
    name = said.partition(" ")[0]
    with pytest.raises(InputError, match="another --out") as error:
        go_on(checkpoint, **change)
    message = str(error.value)
    assert message.startswith(f"{checkpoint.parent.parent} holds another run: {said}; ")
    assert message.endswith(f": --allow_change {name}")
    for allowed in (name, name.partition(".")[0]):
        go_on(checkpoint, **change, allowed=[allowed])
        said_now = capsys.readouterr().out
        assert said_now == f"{checkpoint.parent.parent} goes on with changes that were allowed: {said}\n"


@pytest.mark.parametrize(("key", "said"), [("loop.seed", "0 and is 7"), ("data.n_lanes", "not set and is 7")])
def test_another_order_of_the_data_is_never_allowed(checkpoint, key, said):
    """Bug: the flag that was offered led to a refusal when all was loaded."""
    for allowed in ([], [key], ["loop", "data"]):
        with pytest.raises(InputError, match=f"{key} was {said}; use its settings, or another --out$"):
            go_on(checkpoint, config=[(key, 7)], allowed=allowed)


def test_all_keys_are_listed_together_with_the_flag_that_allows_them(checkpoint):
    changes = {"config": [("averaging", 0.5)], "ds_config": [("optimizer.params.lr", 0.5), ("gradient_clipping", 1.0)]}
    with pytest.raises(InputError) as error:
        go_on(checkpoint, **changes, facts=[("dvae_sha256", "cc")])
    message = str(error.value)
    assert "dvae_sha256 was aa and is cc (tokens of another dVAE)" in message
    assert message.endswith("--allow_change averaging dvae_sha256 gradient_clipping optimizer.params.lr")
    assert "\n" not in message
    with pytest.raises(InputError, match=r"--allow_change averaging gradient_clipping$"):
        go_on(checkpoint, **changes, allowed=["optimizer"])


def test_more_ranks_make_a_larger_batch_unless_each_takes_less(checkpoint):
    with pytest.raises(InputError, match="train_batch_size was 16 and is 32"):
        go_on(checkpoint, world_size=4)


def test_a_run_of_another_kind_and_settings_that_do_not_exist_are_refused(checkpoint):
    with pytest.raises(InputError, match="holds a prior run, not a dvae run; choose another --out"):
        go_on(checkpoint, facts=[("kind", "dvae")], allowed=["kind"])
    with pytest.raises(InputError, match=r"--allow_change optimizer.params.rl: there is no such setting"):
        go_on(checkpoint, allowed=["optimizer.params.rl"])


def test_allowed_again_after_it_is_done_it_says_nothing(checkpoint, capsys):
    """The same command may come again, from a requeue."""
    go_on(checkpoint, allowed=["optimizer.params.lr"])
    assert capsys.readouterr().out == ""
