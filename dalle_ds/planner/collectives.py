"""What a GPU sends in a collective, over which links, and how long the first byte takes.

One rule for all: NCCL's. Gathers and scatters of S bytes in all go around a ring of k GPUs, on which each passes
S (k - 1) / k on; an all-reduce does that twice. Of m GPUs of a machine one passes to the next machine, and there are as
many rings as GPUs of a machine, so that of what each sends a part of 1 / m crosses the network. An all-to-all sends
each GPU its part directly; 1-6-9, which no library reduces, is averaged by an all-to-all and a gather.

Latencies are those by which NCCL chooses its algorithms (src/graph/tuning.cc of NCCL 2.30, protocol Simple): a ring's
hops one after the other, or for an all-reduce a tree's, whichever is less; a gather or scatter with one GPU a machine
goes by PAT. An all-to-all is not in there: one hop, and PAT's time a peer for each message, is our assumption.
"""

import math
from dataclasses import dataclass

from dalle_ds.planner.ways import ALL, MACHINE, REPLICAS, Layout

GATHER, SCATTER, AVERAGE, CODED_AVERAGE = "gather", "scatter", "average", "coded average"
# Seconds, of tuning.cc: a hop of a ring or tree over NVLink, a hop over the network, a hop of PAT and its time a peer.
RING_HOP, TREE_HOP, NETWORK_HOP = 3.4e-6, 4.0e-6, 14e-6
PAT_HOP, PAT_PEER = NETWORK_HOP / 3.5, 2.8e-6


@dataclass(frozen=True, kw_only=True)
class Links:
    """Of the links inside a machine and of those between machines: bytes that a GPU sends, or seconds."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: "Links") -> "Links":
        return Links(inside=self.inside + other.inside, between=self.between + other.between)

    def __mul__(self, factor: float) -> "Links":
        return Links(inside=self.inside * factor, between=self.between * factor)


def bytes_sent(collective: str, scope: str, n_bytes: float, layout: Layout) -> Links:
    """What one GPU sends for an array of `n_bytes` in all: what a gather makes, or a scatter or an average takes."""
    m, n = _machine(scope, layout)
    around = _split(n_bytes * (n * m - 1) / (n * m), 1 / m, n)
    if collective == CODED_AVERAGE:
        return _split(n_bytes * (n * m - 1) / (n * m), (n * m - m) / max(1, n * m - 1), n) + around
    return around * (2 if collective == AVERAGE else 1)


def latency(collective: str, scope: str, layout: Layout) -> Links:
    """Seconds that one call takes beside those of its bytes."""
    m, n = _machine(scope, layout)
    ring = Links(inside=n * (m - 1) * RING_HOP, between=(n - 1) * NETWORK_HOP)
    if collective == AVERAGE:
        tree = Links(inside=(m - 1) * TREE_HOP, between=math.log2(n) * NETWORK_HOP)
        return min(ring, tree, key=lambda way: way.inside + way.between) * 2
    if m == 1 and n > 1:
        ring = Links(between=math.log2(n) * PAT_HOP + n * PAT_PEER)
    if collective == CODED_AVERAGE and n * m > 1:
        peers = (n * m - 1) * PAT_PEER
        return ring + (Links(inside=RING_HOP + peers) if n == 1 else Links(between=NETWORK_HOP + peers))
    return ring


def _machine(scope: str, layout: Layout) -> tuple[int, int]:
    """(GPUs of a machine, machines) that take part."""
    return {
        MACHINE: (layout.machine_size, 1),
        ALL: (layout.machine_size, layout.n_machines),
        REPLICAS: (1, layout.n_machines),
    }[scope]


def _split(n_bytes: float, crossing: float, n_machines: int) -> Links:
    """Bytes of which a part crosses between machines, if there are several."""
    crossing = crossing if n_machines > 1 else 0.0
    return Links(inside=n_bytes * (1 - crossing), between=n_bytes * crossing)
