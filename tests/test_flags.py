"""Flags from dataclasses: one a field, and only what is given changes."""

import argparse
import dataclasses
from dataclasses import dataclass

import pytest

from dalle_ds.config import (
    DVAETraining,
    InputError,
    LoopConfig,
    PriorConfig,
    PriorTraining,
    SamplingConfig,
    SceneConfig,
    described,
)
from dalle_ds.flags import add_flags, apply_flags, from_dict

CONFIGS = [DVAETraining(), PriorTraining(), SamplingConfig(), SceneConfig()]
PRIOR = PriorTraining(model=PriorConfig(n_layer=5), loop=LoopConfig(steps=7))


@dataclass(frozen=True, kw_only=True)
class Switch:
    on: bool = described(False, "100% on")


def parse(config, *arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return apply_flags(config, parser.parse_args(arguments))


def paths(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from paths(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_every_field_has_a_flag_that_takes_its_own_value(config):
    arguments = [f"--{path}={value}" for path, value in paths(config)]
    assert parse(config, *arguments) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_help_shows_every_flag_and_its_default(config):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    text = " ".join(parser.format_help().split())
    for path, value in paths(config):
        assert f"--{path} " in text
        assert f"(default: {value}" in text


def test_a_percent_sign_in_a_description_is_shown():
    parser = argparse.ArgumentParser()
    add_flags(parser, Switch())
    assert "100% on" in parser.format_help()


def test_flags_that_are_not_given_leave_the_preset_alone():
    assert parse(PRIOR) == PRIOR
    changed = parse(PRIOR, "--model.n_head", "3", "--data.train", "shards")
    assert (changed.model.n_head, changed.data.train) == (3, "shards")
    assert (changed.model.n_layer, changed.loop.steps) == (5, 7)


def test_a_flag_set_to_the_dataclass_default_still_overrides_the_preset():
    default = PriorConfig().n_layer
    assert parse(PRIOR, "--model.n_layer", str(default)).model.n_layer == default


def test_a_flag_with_a_bad_value_is_refused_by_the_dataclass():
    with pytest.raises(InputError, match="n_layer 0"):
        parse(PRIOR, "--model.n_layer", "0")


@pytest.mark.parametrize("arguments", [["--model.n_layer", "many"], ["--model.depth", "3"], ["--model.n_layer"]])
def test_what_argparse_cannot_read_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(PRIOR, *arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("Yes", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)]
)
def test_words_for_true_and_false(text, value):
    assert parse(Switch(), "--on", text).on is value


def test_another_word_for_a_bool_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Switch(), "--on", "perhaps")
    assert stop.value.code == 2
    assert "'perhaps' is neither true nor false" in capsys.readouterr().err


@pytest.mark.parametrize("config", [*CONFIGS, PRIOR], ids=lambda c: type(c).__name__)
def test_a_config_survives_the_way_through_a_dict(config):
    assert from_dict(type(config), dataclasses.asdict(config), "config.json") == config


def test_from_dict_fills_missing_keys_with_defaults():
    assert from_dict(PriorTraining, {"model": {"n_layer": 5}}, "x").model == PriorConfig(n_layer=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "config.json: unknown key 'modle'; known keys are .*model"),
        ({"model": {"depth": 3}}, "config.json: model: unknown key 'depth'; known keys are .*n_layer"),
        ({"model": {"n_layer": 0}}, "n_layer 0"),
        ({"model": 3}, "config.json: model"),
    ],
)
def test_from_dict_names_place_and_key(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(PriorTraining, values, "config.json")
