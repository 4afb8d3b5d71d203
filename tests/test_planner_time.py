"""The planner's rule of collectives, and its model of time, against sums made by hand."""

import math
from dataclasses import replace

import pytest
import torch
from test_planner import SMALL, TWELVE
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_ds.planner import memory_of, training_flops
from dalle_ds.planner.collectives import AVERAGE, CODED_AVERAGE, GATHER, SCATTER, bytes_sent, latency
from dalle_ds.planner.hardware import GPUS
from dalle_ds.planner.parameters import count_parameters
from dalle_ds.planner.step_time import LAUNCH, PANEL, PANEL_KERNELS, Speeds, step_time_of
from dalle_ds.planner.traffic import Exchange, exchanges_of
from dalle_ds.planner.ways import ALL, MACHINE, REPLICAS, WAYS, Layout
from dalle_kernels.compression.orthogonalize import householder
from dalle_kernels.compression.panel_kernels import WIDTH

FOUR_MACHINES = Layout(n_gpus=32, machine_size=8, matrix_rank=896)
ONE_MACHINE = Layout(n_gpus=8, machine_size=8)
H100 = GPUS["h100-80gb"]
US = 1e-6


def links(inside, between):
    return pytest.approx({"inside": inside, "between": between})


# --- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "scope", "layout", "inside", "between"),
    [
        # A ring of 8 passes 7/8 of 800 bytes on, all of it inside.
        (GATHER, MACHINE, FOUR_MACHINES, 700, 0),
        (SCATTER, ALL, ONE_MACHINE, 700, 0),
        (AVERAGE, ALL, ONE_MACHINE, 1400, 0),
        # Of 32 GPUs each passes 31/32 on, an eighth of it to the next machine.
        (GATHER, ALL, FOUR_MACHINES, 775 * 7 / 8, 775 / 8),
        (AVERAGE, ALL, FOUR_MACHINES, 2 * 775 * 7 / 8, 2 * 775 / 8),
        # Replicas of a shard are on different machines.
        (AVERAGE, REPLICAS, FOUR_MACHINES, 0, 2 * 600),
        (CODED_AVERAGE, REPLICAS, FOUR_MACHINES, 0, 2 * 600),
        # 25 bytes to each of 31 GPUs, of which 7 are near; then a ring.
        (CODED_AVERAGE, ALL, FOUR_MACHINES, 7 * 25 + 775 * 7 / 8, 24 * 25 + 775 / 8),
        (AVERAGE, REPLICAS, ONE_MACHINE, 0, 0),
    ],
)
def test_what_a_gpu_sends_goes_around_rings(collective, scope, layout, inside, between):
    assert vars(bytes_sent(collective, scope, 800, layout)) == links(inside, between)


@pytest.mark.parametrize(
    ("collective", "scope", "layout", "inside", "between"),
    [
        (GATHER, MACHINE, FOUR_MACHINES, 7 * 3.4, 0),
        (SCATTER, ALL, FOUR_MACHINES, 28 * 3.4, 3 * 14),
        # A tree: 7 hops inside and 2 between, up and down; the ring would take 274 us.
        (AVERAGE, ALL, FOUR_MACHINES, 2 * 7 * 4.0, 2 * 2 * 14),
        (AVERAGE, REPLICAS, FOUR_MACHINES, 0, 2 * 2 * 14),
        # A ring: 14 hops of 3.4 us are less than 14 of 4.
        (AVERAGE, ALL, ONE_MACHINE, 2 * 7 * 3.4, 0),
        # One hop with 3 messages, then PAT: 2 hops, and a time for each of 4 peers.
        (CODED_AVERAGE, REPLICAS, FOUR_MACHINES, 0, (14 + 3 * 2.8) + (2 * 14 / 3.5 + 4 * 2.8)),
        (CODED_AVERAGE, ALL, ONE_MACHINE, (3.4 + 7 * 2.8) + 7 * 3.4, 0),
        (AVERAGE, REPLICAS, ONE_MACHINE, 0, 0),
        (CODED_AVERAGE, REPLICAS, ONE_MACHINE, 0, 0),
    ],
)
def test_latencies_are_nccls(collective, scope, layout, inside, between):
    assert vars(latency(collective, scope, layout)) == links(inside * US, between * US)


# --- a step -----------------------------------------------------------------------------------------------------------

# So that a forward pass takes 1 s, and what is sent as many seconds as it has bytes, in either kind of links.
SLOW = replace(H100, machine_bandwidth=1.0, network_bandwidth=1.0, memory_bandwidth=math.inf)


def plain(what, when, n_bytes, times=1):
    """An exchange that sends so many bytes inside a machine of 8."""
    scaled = n_bytes * 8 / 7
    return Exchange(what=what, when=when, times=times, collective=GATHER, scope=MACHINE, n_bytes=scaled, n_calls=0)


def step(exchanges, n_micro_steps, way="ZeRO 3", **changes):
    flops = training_flops(SMALL)
    hardware = replace(SLOW, flops=flops.forward(), **changes)
    speeds = Speeds(hardware=hardware, efficiency=1.0, link_efficiency=1.0)
    layout = replace(ONE_MACHINE, recompute=False)
    memory = memory_of(SMALL, WAYS[way], layout)
    return step_time_of(SMALL, WAYS[way], layout, memory, exchanges, speeds, n_micro_steps)


BACKWARD = training_flops(SMALL).backward(False) / training_flops(SMALL).forward()


def test_communication_hides_behind_its_own_pass_and_the_rest_is_added():
    time = step([plain("a", "forward", 1.5, 3)], 3)
    assert (time.forward, time.exposed) == pytest.approx((3.0, 3 * 0.5))
    assert step([plain("a", "forward", 0.9, 3)], 3).exposed == 0
    # What belongs to every backward pass, with what goes with the last one.
    both = [plain("a", "backward", BACKWARD + 0.25, 3), plain("b", "last backward", 0.5)]
    assert step(both, 3).exposed == pytest.approx(2 * 0.25 + 0.75)
    assert step([plain("b", "last backward", BACKWARD + 0.5)], 3).exposed == pytest.approx(0.5)
    assert step([plain("c", "end", 0.125)], 3).exposed == pytest.approx(0.125)


def test_all_of_it_is_added_where_nothing_overlaps():
    exchanges = [plain("a", "forward", 0.5, 2), plain("b", "backward", 0.25, 2), plain("c", "end", 0.125)]
    time = step(exchanges, 2, way="ZeRO 0")
    assert time.exposed == pytest.approx(2 * 0.5 + 2 * 0.25 + 0.125)
    assert time.exposed == time.inside
    assert time.between == 0
    assert time.one_after_the_other == pytest.approx(time.total)
    assert step(exchanges, 2).one_after_the_other == pytest.approx(time.total)


def test_links_of_a_machine_and_the_network_work_at_once():
    between = Exchange(
        what="b", when="end", times=1, collective=AVERAGE, scope=REPLICAS, n_bytes=4, n_calls=0
    )  # 2 * 3/4 * 4 bytes
    speeds = Speeds(hardware=SLOW, efficiency=1.0, link_efficiency=0.5)
    assert vars(speeds.seconds([plain("a", "end", 1), between], FOUR_MACHINES)) == links(2, 12)
    layout, way = FOUR_MACHINES, WAYS["hierarchical"]
    time = step_time_of(SMALL, way, layout, memory_of(SMALL, way, layout), [plain("a", "end", 1), between], speeds, 1)
    assert time.exposed == pytest.approx(12)


def test_what_waits_for_first_bytes_is_counted_apart():
    gather = Exchange(what="a", when="end", times=1, collective=GATHER, scope=MACHINE, n_bytes=8, n_calls=1000)
    time = step([gather], 1)
    assert time.waits == pytest.approx(1000 * 7 * 3.4 * US)
    assert time.exposed == pytest.approx(7 + time.waits)


@pytest.mark.parametrize(
    ("name", "bytes_an_entry"),
    [
        # A gradient of 2 bytes, and a sum of 4 that is read and written; in 1-6-9 of 2.
        ("ZeRO 3", 2 + 2 * 4),
        ("ZeRO 3 16-bit state", 2 + 2 * 2),
    ],
)
def test_gradients_are_added_up_in_one_pass_over_the_memory(name, bytes_an_entry):
    layout, speed = replace(ONE_MACHINE, recompute=False), 1e9
    speeds = Speeds(hardware=replace(SLOW, memory_bandwidth=speed), efficiency=1.0, link_efficiency=1.0)
    way, counts = WAYS[name], count_parameters(TWELVE)
    time = step_time_of(TWELVE, way, layout, memory_of(TWELVE, way, layout), [], speeds, 5)
    rest = bytes_an_entry if name == "ZeRO 3" else 4 + 2 * 4
    entries = counts.matrices * bytes_an_entry + counts.rest * rest
    assert time.accumulation == pytest.approx(5 * entries / 8 / speed)


def test_the_optimizer_reads_and_writes_all_state_once():
    layout = ONE_MACHINE
    for name in ("ZeRO 1", "ZeRO 3 16-bit state"):
        memory = memory_of(TWELVE, WAYS[name], layout)
        speeds = Speeds(hardware=replace(H100, memory_bandwidth=1e9), efficiency=0.4, link_efficiency=0.8)
        time = step_time_of(TWELVE, WAYS[name], layout, memory, [], speeds, 1)
        assert time.optimizer == pytest.approx(2 * memory.state / 1e9)


class Kernels(TorchDispatchMode):
    """Counts operators that compute, each of which a GPU starts as a kernel."""

    VIEWS = ("view", "slice", "select", "transpose", "unsqueeze", "expand", "alias", "detach", "diagonal", "empty")

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.n += not any(view in name for view in self.VIEWS) and name not in ("t", "as_strided", "permute", "split")
        return func(*args, **(kwargs or {}))


def test_orthogonalising_starts_as_many_kernels_a_panel_as_the_plan_says():
    columns = 112  # of the paper's 12b on 8 GPUs
    with Kernels() as kernels:
        # On a GPU a panel's reflections are one kernel.
        householder(torch.randn(1, 496, columns), WIDTH, torch.zeros_like)
    assert PANEL == WIDTH
    assert kernels.n == PANEL_KERNELS * columns // WIDTH


def test_powersgd_takes_its_products_passes_and_kernels():
    layout, way = FOUR_MACHINES, WAYS["hierarchical PowerSGD"]
    memory = memory_of(TWELVE, way, layout)
    speeds = Speeds(hardware=H100, efficiency=0.4, link_efficiency=0.8)
    d, m, r = 3968, 8, 112
    entries = 12 * d**2 // m
    # Three products with P and Q; reflections of 4 matrices of d / m rows and 2 of 4 d / m.
    flops = 6 * entries * r + 4 * r**2 * (4 * d // m + 2 * 4 * d // m)
    layer = flops / (0.4 * 67e12) + 42 * entries / 3350e9 + 2 * 14 * 14 * 5e-6
    time = step_time_of(TWELVE, way, layout, memory, exchanges_of(TWELVE, way, layout, 1), speeds, 1)
    assert time.compression == pytest.approx(64 * layer)
    assert 64 * 2 * PANEL_KERNELS * r // PANEL * LAUNCH == pytest.approx(0.125, rel=1e-2)
    without = WAYS["hierarchical"]
    assert step_time_of(TWELVE, without, layout, memory, [], speeds, 1).compression == 0
