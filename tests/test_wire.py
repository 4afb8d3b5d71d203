"""When what is averaged is sent: nothing is waited for that could travel while the backward pass goes on."""

import torch
import torch.distributed as dist

from dalle_kernels.compression.factors import PowerSGDOptions
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression, NoCompressionOptions

RESBLOCKS = ("layers.2.mlp", "layers.1.mlp", "layers.0.mlp")


class Collectives:
    """Stands in for a group of two that hold the same: a log of what is started and waited for."""

    def __init__(self, monkeypatch):
        self.log = []
        self.n_started = 0
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor"):
            monkeypatch.setattr(dist, name, self.stand_in(name))

    def stand_in(self, name):
        def start(out, given=None, **settings):
            if name == "all_reduce":
                out.mul_(2)
            elif name == "all_to_all_single":
                out.view(2, -1).copy_(given.view(2, -1)[:1])
            else:
                out.view(2, -1).copy_(given.expand(2, -1))
            self.n_started += 1
            number = self.n_started
            self.log.append(f"start {name} {number}")
            return type("Work", (), {"wait": lambda work: self.log.append(f"wait {number}")})()

        return start

    def take(self):
        log, self.log = self.log, []
        return log


def steps(compressor, collectives):
    """What happens as gradients of each resblock come, as it is sent, and at the end."""
    gradients = {f"{block}.{name}": torch.randn(8, 8) for block in RESBLOCKS for name in ("up", "down")}
    compressor.declare({"tokens": torch.zeros(4), **gradients})
    for block in RESBLOCKS:
        for name in ("up", "down"):
            compressor.add({f"{block}.{name}": gradients[f"{block}.{name}"]})
        came = collectives.take()
        compressor.send(block, None)
        yield came, collectives.take()
    compressor.finish(None)
    yield collectives.take()


def test_powersgd_sends_p_while_that_of_the_resblock_before_is_answered_by_q(monkeypatch):
    collectives = Collectives(monkeypatch)
    first, second, third, end = steps(PowerSGD(PowerSGDOptions(matrix_rank=2)), collectives)
    scatter, gather = "start all_to_all_single", "start all_gather_into_tensor"
    assert first == ([], [f"{scatter} 1"])  # P of the last resblock
    assert second == (["wait 1", f"{gather} 2"], [f"{scatter} 3", "wait 2", f"{scatter} 4"])  # 4 is its Q
    assert third[0] == ["wait 3", f"{gather} 5", "wait 4", f"{gather} 6"]
    assert third[1] == [f"{scatter} 7", "wait 5", f"{scatter} 8"]
    # What is left: the second parts of the first resblock's P and of the Q before it, its Q, and all that is whole.
    assert [line for line in end if line.startswith("start")] == [
        f"{gather} 9",
        f"{scatter} 10",
        "start all_reduce 11",
        f"{gather} 12",
        f"{gather} 13",
    ]
    assert set(end) >= {"wait 6", "wait 12", "wait 13"}


def test_without_compression_a_resblock_travels_while_the_next_one_comes(monkeypatch):
    *blocks, end = steps(NoCompression(), Collectives(monkeypatch))
    reduce = "start all_reduce"
    # The resblock before is waited for when this one is on its way.
    assert blocks == [([], [f"{reduce} 1"]), ([], [f"{reduce} 2", "wait 1"]), ([], [f"{reduce} 3", "wait 2"])]
    assert end == [f"{reduce} 4", "wait 3", "wait 4"]


def test_without_compression_coded_averages_are_finished_as_the_next_gradients_come(monkeypatch):
    *blocks, end = steps(NoCompression(NoCompressionOptions(wire="1-6-9")), Collectives(monkeypatch))
    scatter, gather = "start all_to_all_single", "start all_gather_into_tensor"
    assert blocks == [
        ([], [f"{scatter} 1"]),
        (["wait 1", f"{gather} 2"], [f"{scatter} 3", "wait 2"]),
        (["wait 3", f"{gather} 4"], [f"{scatter} 5", "wait 4"]),
    ]
    assert end == ["start all_reduce 6", "wait 5", f"{gather} 7", "wait 7", "wait 6"]
