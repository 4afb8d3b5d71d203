"""Caption accuracy on made scenes: does the picture show what its caption states, as the reader sees it?

A score says of one picture, with None for what its caption leaves open:
- "count": as many objects were read as the caption names.
- "shape", "colour": every named object has its shape, its colour.
- "place": the object whose place is stated has it. "size": every stated size is right.
- "relation": the first object stands where the caption says, seen from the second.
- "all": count, shape, colour, and place and relation where stated. Size is reported and not part of it.
Only as many objects are judged as the caption names, the largest ones; that there is one too many fails "count", and so
"all". With two, they are assigned to the named ones in the order that gets most right.

The chance level is the probability that a picture counts as right for another caption of the same set.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MIN_OFFSET = 0.15  # of the side, between two objects that stand in a relation
MAX_CHANCE_PAIRS = 50_000  # all ordered pairs up to 224 captions; beyond that, a fixed random choice of them
# The sign and the axis (x 0, y 1) along which the first object lies from the second.
DIRECTIONS = {"above": (-1, 1), "below": (1, 1), "left of": (-1, 0), "right of": (1, 0)}
FIGURES = ("all", "count", "shape", "colour", "place", "relation", "size")
# How pictures are grouped in a summary.
GROUPS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "by_held_out": lambda truth: truth.get("held_out") or "none",
    "by_n_object": lambda truth: str(len(truth["objects"])),
}

Z_95 = 1.96  # normal quantile of a 95% interval
Score = dict[str, bool | None]


def score(read_objects: Sequence[Mapping[str, Any]], truth: Mapping[str, Any]) -> Score:
    """Scores what was read from a picture (largest object first) against the truth of its caption."""
    named = truth["objects"]
    count = len(read_objects) == len(named)
    orders = itertools.permutations(read_objects[: len(named)])
    judged = [_judge(order, truth) for order in orders if len(order) == len(named)]
    if not judged:
        judged = [{name: value and [False] for name, value in _judge(named, truth).items()}]
    best = max(judged, key=lambda parts: sum(sum(value) for value in parts.values() if value))
    parts: Score = {"count": count, **{name: _every(value) for name, value in best.items()}}
    needed = ("count", "shape", "colour", "place", "relation")
    return {"all": all(parts[name] is not False for name in needed), **parts}


def _judge(objects: Sequence[Mapping[str, Any]], truth: Mapping[str, Any]) -> dict[str, Any]:
    """Each part of a score, for objects in the order of the caption."""
    pairs = list(zip(objects, truth["objects"], truth["stated"], strict=True))
    parts: dict[str, Any] = {}
    for name in ("shape", "colour"):
        parts[name] = [read[name] == named[name] for read, named, _ in pairs]
    for name in ("place", "size"):
        parts[name] = [read[name] == named[name] for read, named, stated in pairs if stated[name]] or None
    relation = truth["relation"]
    parts["relation"] = None if relation is None else [stands(objects[0], objects[1], relation)]
    return parts


def stands(first: Mapping[str, Any], second: Mapping[str, Any], relation: str) -> bool:
    """Whether the first object is above, below, left of or right of the second: clearly, and more so than sideways."""
    sign, axis = DIRECTIONS[relation]
    offset = [a - b for a, b in zip(first["centre"], second["centre"], strict=True)]
    return bool(sign * offset[axis] >= max(MIN_OFFSET, abs(offset[1 - axis])))


def summarize(scores: Sequence[Score], truths: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a set: the share right of each part ("all", "shape", ...), of those pictures whose caption states it.

    Also "n" and "chance", and under "by_held_out" ("pair", "triple", "none") and "by_n_object" ("1", "2") the same
    figures of those pictures alone. "chance" has the figures of pictures drawn perfectly for other captions of the set.
    """
    others = chance_scores(truths, [truth["objects"] for truth in truths])
    summary: dict[str, Any] = {**_shares(scores), "chance": _shares([other for _, other in others])}
    for group, label in GROUPS.items():
        labels = [label(truth) for truth in truths]
        summary[group] = {
            wanted: {
                **_shares([s for s, given in zip(scores, labels, strict=True) if given == wanted]),
                "chance": _shares([other for i, other in others if labels[i] == wanted]),
            }
            for wanted in sorted(set(labels))
        }
    return summary


def chance_level(
    truths: Sequence[Mapping[str, Any]], readings: Sequence[Sequence[Mapping[str, Any]]], seed: int = 0
) -> dict[str, Any]:
    """The figures when the readings of a set are scored against the captions of other pictures of it.

    Given what was really read, this is the empirical chance level; given perfect pictures (`truth["objects"]`), as in
    `summarize`, it depends on the captions alone.
    """
    return _shares([other for _, other in chance_scores(truths, readings, seed)])


def chance_scores(
    truths: Sequence[Mapping[str, Any]], readings: Sequence[Sequence[Mapping[str, Any]]], seed: int = 0
) -> list[tuple[int, Score]]:
    """Index of a caption and its score for the reading of another picture, over pairs of two.

    All ordered pairs, so that the chance is exact, up to 224 captions; beyond that some 50,000 pairs, in which every
    caption and every reading occurs equally often.
    """
    return [(i, score(readings[j], truths[i])) for i, j in _other_pairs(len(truths), seed)]


def _other_pairs(n: int, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of different indices: cyclic shifts of a random order, each of which moves every index."""
    order = np.random.default_rng(seed).permutation(n)
    shifts = np.random.default_rng(seed).permutation(np.arange(1, n))[: max(1, MAX_CHANCE_PAIRS // max(1, n))]
    for shift in shifts:
        yield from zip(order, np.roll(order, shift), strict=True)


def _shares(scores: Sequence[Score]) -> dict[str, Any]:
    shares: dict[str, Any] = {"n": len(scores)}
    for name in FIGURES:
        values = [s[name] for s in scores if s[name] is not None]
        shares[name] = sum(map(bool, values)) / len(values) if values else None
        shares[f"n_{name}"] = len(values)
    return shares


def list_figures(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary as rows {"name", "value", "low", "high", "chance", "n"}: those of all pictures, then "all" of groups.

    `low` and `high` bound the 95% interval; rows without a single case are left out.
    """
    rows = [(f"caption accuracy: {name}", summary, name) for name in FIGURES]
    for wanted, figures in summary["by_held_out"].items():
        rows.append((f"caption accuracy: all, held-out {wanted}", figures, "all"))
    for wanted, figures in summary["by_n_object"].items():
        rows.append((f"caption accuracy: all, objects named: {wanted}", figures, "all"))
    return [
        {
            "name": title,
            "value": figures[name],
            **dict(zip(("low", "high"), wilson_interval(figures[name], figures[f"n_{name}"]), strict=True)),
            "chance": figures["chance"][name],
            "n": figures[f"n_{name}"],
        }
        for title, figures, name in rows
        if figures[name] is not None
    ]


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n cases (Wilson 1927), which is right near 0 and 1 too."""
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    reach = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def describe(objects: Sequence[Mapping[str, Any]]) -> str:
    """Objects in words: "red circle, top left; blue star, bottom", or "nothing"."""
    return "; ".join(f"{item['colour']} {item['shape']}, {item['place']}" for item in objects) or "nothing"


def _every(values: Sequence[bool] | None) -> bool | None:
    return None if values is None else all(values)
