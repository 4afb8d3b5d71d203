"""PowerSGD over real processes: exact where it must be, conserving what it does not send, and torch's own as an oracle.

One start of four processes serves all tests: they form groups of 1, 2 and 4 machines, each runs every scenario below,
and the tests look at what the ranks returned.
"""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd

from dalle_kernels.compression import wire as wire_module
from dalle_kernels.compression.base import resblock_of
from dalle_kernels.compression.compressors import COMPRESSORS
from dalle_kernels.compression.factors import PowerSGDOptions, n_factor_entries
from dalle_kernels.compression.formats import ERROR_BUFFER
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression, NoCompressionOptions

N_RANKS, SIZES = 4, (1, 2, 4)
# Wide, tall and square matrices in two resblocks, some of one shape; and what is sent whole.
SHAPES = {
    "tokens": (11, 6),
    "layers.0.mlp.up": (24, 6),
    "layers.0.mlp.down": (6, 24),
    "layers.0.mlp.gain": (6,),
    "layers.1.attention.query": (6, 10),
    "layers.1.attention.key": (6, 10),
    "layers.1.attention.value": (10, 10),
}
MATRICES = [name for name, shape in SHAPES.items() if name.startswith("layers") and len(shape) == 2]
# Sums of float64 of numbers around 1, in another order.
EXACT = 1e-12
FULL = {"wire": "full", "errors": "full"}
# Half a step of 9 bits of significand.
CODED_ROUNDING = 2.0**-10
WIRE_BYTES = {"full": 4, "float16": 2, "bfloat16": 2, "1-6-9": 2}


def powersgd(matrix_rank, **options):
    return PowerSGD(PowerSGDOptions(matrix_rank=matrix_rank, **options))


def draw(seed, rank, shapes=SHAPES, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return {name: torch.randn(s, generator=generator, dtype=dtype) * scale for name, s in shapes.items()}


def mean(seed, n, **kwargs):
    parts = [draw(seed, rank, **kwargs) for rank in range(n)]
    return {name: sum(part[name] for part in parts) / n for name in parts[0]}


def copied(gradients):
    return {name: gradient.clone() for name, gradient in gradients.items()}


def summed_errors(compressor, group):
    return {name: error * group.size() for name, error in compressor.state_dict(group)["errors"].items()}


# --- scenarios: each runs on every rank of a group --------------------------------------------------------------------


def full_rank(rank, n, group):
    results = {}
    compressors = {
        "powersgd": powersgd(64, **FULL),
        "none": NoCompression(),
        "shards": powersgd(128, n_shards=2, **FULL),
    }
    for name, compressor in compressors.items():
        for seed in range(2):
            gradients = draw(seed, rank)
            reduction = compressor.reduce_(gradients, group)
            results[name, seed] = gradients, float(reduction.squared_norm), bool(reduction.nonfinite.any())
    return results


N_SAME, LOW_RANK = 12, 3


def low_rank_gradients(rank):
    """Matrices of one shape and one rank each, of norms from 1e-6 to 1e5, wide and tall."""
    gradients = {}
    for i, is_tall in itertools.product(range(N_SAME), (False, True)):
        left = torch.randn(10, LOW_RANK, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        right = draw(i, rank, {"": (LOW_RANK, 16)})[""]
        matrix = 10.0 ** (i - 6) * left @ right
        gradients[f"layers.0.{'tall' if is_tall else 'wide'}.{i}"] = matrix.T.contiguous() if is_tall else matrix
    return gradients


def low_rank(rank, n, group):
    results = {}
    for epsilon in (0.0, 1e-6):
        gradients = low_rank_gradients(rank)
        compressor = PowerSGD(
            PowerSGDOptions(matrix_rank=LOW_RANK, epsilon=epsilon, **FULL), block_of=lambda name, gradient: "one"
        )
        compressor.reduce_(gradients, group)
        results[epsilon] = gradients
    return results


def conservation(rank, n, group):
    """For each kind of start, by update: the outputs, and the errors summed over machines."""
    results = {}
    for start in ("fixed", "warm", "resampled"):
        compressor = powersgd(2, start=start, **FULL)
        history = []
        for seed in range(4):
            gradients = draw(seed, rank)
            norm = compressor.reduce_(gradients, group).squared_norm
            history.append((gradients, summed_errors(compressor, group), float(norm)))
        results[start] = history
    return results


class Bucket:
    """What torch's hook asks of a bucket of gradients."""

    def __init__(self, gradients):
        self.flat = torch.cat([gradient.flatten() for gradient in gradients])
        parts = self.flat.split([gradient.numel() for gradient in gradients])
        self.parts = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]

    def buffer(self):
        return self.flat

    def gradients(self):
        return self.parts

    def index(self):
        return 0

    def is_last(self):
        return True


# torch does not transpose, so none of these is taller than wide; and it takes Gram-Schmidt up to rank 2.
ORACLE_SHAPES = {f"layers.0.{i}": shape for i, shape in enumerate([(7, 12), (7, 12), (9, 9), (5, 30)])} | {
    "bias": (13,)
}
ORACLE_RANK = 3


def oracle(rank, n, group):
    """Our gradients and errors beside those of torch's hook, which is given our Q0 before each update."""
    compressor = PowerSGD(
        PowerSGDOptions(matrix_rank=ORACLE_RANK, epsilon=0.0, **FULL),
        block_of=lambda name, gradient: "one" if gradient.ndim == 2 else None,
    )
    state = torch_powersgd.PowerSGDState(group, ORACLE_RANK, start_powerSGD_iter=2, min_compression_rate=1)
    state.iter = 2
    history = []
    for seed in range(5):
        ours = draw(seed, rank, ORACLE_SHAPES)
        bucket = Bucket(list(ours.values()))
        compressor.reduce_(ours, group)
        starts = [start for batch in next(iter(compressor._batches.values())) for start in batch.start.load()]
        state.q_memory_dict[0] = torch.cat([start.flatten() for start in starts])
        state.p_memory_dict[0] = torch.empty(
            sum(ORACLE_RANK * s[0] for s in ORACLE_SHAPES.values() if len(s) == 2)
        ).double()
        torch_powersgd.powerSGD_hook(state, bucket).wait()
        history.append((ours, bucket.parts))
    errors = [error for batch in next(iter(compressor._batches.values())) for error in batch.errors.load()]
    return history, torch.cat([error.flatten() for error in errors]), state.error_dict[0]


def degenerate(rank, n, group):
    left, right = (torch.linalg.qr(draw(i, 0, {"": (20, 20)})[""])[0] for i in range(2))
    cases = {
        "layers.0.a.zero": torch.zeros(20, 20),
        "layers.0.a.ones": torch.ones(20, 20),
        "layers.0.a.ill_conditioned": (left * torch.logspace(0, -12, 20, dtype=torch.float64) @ right).float(),
        "layers.0.a.tiny": torch.full((20, 20), 1e-12),
        "bias": torch.zeros(3),
    }
    results = {}
    for label, options in {"coded": {}, "full": FULL}.items():
        compressor = powersgd(8, **options)
        for _ in range(3):
            gradients = copied(cases)
            reduction = compressor.reduce_(gradients, group)
        results[label] = gradients, float(reduction.squared_norm), summed_errors(compressor, group)
    return results


def spikes(rank, n, group):
    """For each start, in the formats of training: norms of updates of which the second is as large as errors may be."""
    norms = {}
    for start in ("fixed", "warm", "resampled"):
        compressor = powersgd(4, start=start)
        norms[start] = []
        for seed in range(6):
            gradients = draw(seed, rank, {"layers.0.a.wide": (60, 500), "layers.0.b.tall": (500, 60)})
            if seed == 1:
                gradients = {name: torch.full_like(gradient, 15_000.0) for name, gradient in gradients.items()}
            norms[start].append(float(compressor.reduce_(gradients, group).squared_norm.sqrt()))
    return norms


def wires(rank, n, group):
    """What comes out by wire, with the scales that suit it, of gradients of the size of training's."""
    results = {}
    for wire in WIRE_BYTES:
        gradients = draw(0, rank, dtype=torch.float32, scale=1e-3)
        powersgd(4, wire=wire, errors="full").reduce_(gradients, group)
        results[wire] = {name: gradients[name] for name in MATRICES}
    return results


BAD, GOOD, SPOILED = "layers.1.attention.query", "layers.1.attention.key", 1
FACTORS = ("factors", "p", "q")
FAULTS = {
    # What becomes not finite, by the options and by what rank 0 does to its gradient.
    "gradient": (FULL, float("nan")),
    "factors": (FULL | {"wire": "float16", "p_scale": 1.0, "q_scale": 1.0}, 1e9),
    "p": (FULL | {"wire": "float16", "p_scale": 1.0, "q_scale": 2.0**-24}, 1e9),
    "q": (FULL | {"wire": "float16", "p_scale": 2.0**-24, "q_scale": 1.0}, 1e9),
    "error": ({"errors": "1-6-9", "wire": "full"}, 1e5),
    "whole": (FULL, float("inf")),
}


def faults(rank, n, group):
    """For each fault, of three updates of which the second is at fault: output, summed errors and reduction."""
    results = {}
    for fault, (options, value) in FAULTS.items():
        compressor = powersgd(2, **options)
        history = []
        for seed in range(3):
            gradients = draw(seed, rank, dtype=torch.float32)
            if seed == SPOILED and rank == 0:
                gradients["tokens" if fault == "whole" else BAD][2, 3] = value
            reduction = compressor.reduce_(gradients, group)
            history.append((gradients, summed_errors(compressor, group), reduction))
        results[fault] = history
    return results


def resume(rank, n, group):
    """Goes on from a state in groups of other sizes, with gradients of the same mean."""
    before = powersgd(2, start="warm", **FULL)
    for seed in range(3):
        before.reduce_(draw(seed, rank), group)
    state = before.state_dict(group)
    gradients = draw(3, rank)
    before.reduce_(gradients, group)
    results = {n: gradients}
    for other in SIZES:
        if other < n:
            after = powersgd(2, start="warm", **FULL)
            after.declare(gradients)
            after.load_state_dict(state)
            parts = [draw(3, i) for i in range(rank % other, n, other)]
            gradients = {name: sum(part[name] for part in parts) / len(parts) for name in SHAPES}
            after.reduce_(gradients, subgroup(other))
            results[other] = gradients
    return results


def resume_on_as_many(rank, n, group):
    """Two updates after a state was saved, of the run that went on and of one that resumed; and two states in a row."""
    results = []
    before, after = powersgd(2), powersgd(2)
    for seed in range(3):
        before.reduce_(draw(seed, rank, dtype=torch.float32), group)
    states = [before.state_dict(group)["errors"] for _ in range(2)]
    after.declare(draw(0, rank, dtype=torch.float32))
    after.load_state_dict(before.state_dict(group))
    for compressor in (before, after):
        for seed in (3, 4):
            gradients = draw(seed, rank, dtype=torch.float32)
            compressor.reduce_(gradients, group)
        results.append(gradients)
    return *results, *states


def counted_bytes(rank, n, group):
    """For each wire: the bytes and number of collectives as torch sees them, and as the compressor counts them."""
    results = {}
    for wire, n_shards in itertools.product(wire_module.WIRES, (1, 2)):
        for kind, compressor in {
            "powersgd": powersgd(4, n_shards=n_shards, wire=wire),
            "none": NoCompression(NoCompressionOptions(wire=wire)),
        }.items():
            calls = []
            names = ("all_reduce", "all_to_all_single")
            kept = {name: getattr(dist, name) for name in names}
            for name in names:
                setattr(dist, name, functools.partial(counted, kept[name], calls))
            try:
                compressor.reduce_(draw(0, rank, dtype=torch.float32), group)
            finally:
                for name in names:
                    setattr(dist, name, kept[name])
            results[kind, wire, n_shards] = sum(calls), len(calls), compressor.traffic
    return results


def counted(collective, calls, tensor, *args, **kwargs):
    calls.append(tensor.nbytes)
    return collective(tensor, *args, **kwargs)


def sixteen_bits(rank, n, group):
    """Outputs of five updates with everything in 1-6-9 and with everything in full."""
    compressors = powersgd(4), powersgd(4, **FULL)
    history = []
    for seed in range(5):
        pair = [draw(seed, rank, dtype=torch.float32, scale=1e-6) for _ in compressors]
        for compressor, gradients in zip(compressors, pair, strict=True):
            compressor.reduce_(gradients, group)
        history.append(pair)
    return history


def in_parts(rank, n, group):
    """The same two updates in one call each, in parts, and with one half of each gradient in a micro-step before."""
    results = []
    for way in ("whole", "parts", "micro-steps"):
        compressor = powersgd(2, **FULL)
        for seed in range(2):
            gradients = draw(seed, rank)
            if way == "whole":
                compressor.reduce_(gradients, group)
            elif way == "parts":
                compressor.declare(gradients)
                for block in ("layers.1.attention", "layers.0.mlp"):
                    for name in compressor.blocks[block]:
                        compressor.add({name: gradients[name]})
                    compressor.send(block, group)
                compressor.add({name: gradients[name] for name in SHAPES if name not in MATRICES})
                compressor.finish(group)
                for names in (*compressor.blocks.values(), ("tokens", "layers.0.mlp.gain")):
                    gradients |= compressor.take(names)
            else:
                for name in MATRICES:
                    gradients[name] /= 2
                compressor.declare(gradients)
                compressor.add({name: gradients[name] for name in MATRICES})
                compressor.reduce_(gradients, group)
        results.append(gradients)
    return results


def half_gradients(rank, n, group):
    """Gradients in float16: averages and errors are float32; and averages that were written over the gradients."""
    compressor = powersgd(2, **FULL)
    gradients = draw(0, rank, dtype=torch.float16)
    compressor.declare(gradients)
    compressor.add(gradients)
    compressor.finish(group)
    averages = {}
    for names in compressor.blocks.values():
        averages |= compressor.take(names)
    errors = summed_errors(compressor, group)
    written = {}
    for name, other in {
        "powersgd": powersgd(2, **FULL),
        "none": NoCompression(NoCompressionOptions(buffers="1-6-9")),
    }.items():
        written[name] = draw(0, rank, dtype=torch.float16)
        other.reduce_(written[name], group)
    return averages, errors, written


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        full_rank,
        low_rank,
        conservation,
        oracle,
        degenerate,
        faults,
        spikes,
        wires,
        resume,
        resume_on_as_many,
        counted_bytes,
        sixteen_bits,
        in_parts,
        half_gradients,
    )
}
GROUPS = {}


def subgroup(size):
    return GROUPS[size]


def run_scenarios():
    """For each scenario and size of group, what this rank returned."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for size in SIZES:
        for first in range(0, N_RANKS, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                GROUPS[size] = group
    results = {
        (name, size): scenario(rank % size, size, GROUPS[size])
        for name, scenario in SCENARIOS.items()
        for size in SIZES
    }
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def every_rank():
    return run_distributed(run_scenarios, N_RANKS)


@pytest.fixture(params=SIZES, ids=lambda n: f"{n}machines")
def n(request):
    return request.param


@pytest.fixture
def ranks(every_rank, n):
    """Returns what the ranks of the first group of n machines returned from a scenario."""
    return lambda scenario: [results[scenario.__name__, n] for results in every_rank[:n]]


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["powersgd", "shards", "none"])
def test_at_full_rank_it_is_the_mean_as_without_compression(ranks, n, name):
    for results, seed in itertools.product(ranks(full_rank), range(2)):
        gradients, squared_norm, is_bad = results[name, seed]
        expected = mean(seed, n)
        assert largest_difference(gradients, expected) < EXACT
        assert squared_norm == pytest.approx(sum(float(g.square().sum()) for g in expected.values()), rel=EXACT)
        assert not is_bad


@pytest.mark.parametrize(("epsilon", "tolerance"), [(0.0, 1e-11), (1e-6, 5e-3)])
def test_gradients_of_exactly_the_rank_come_back_whatever_their_norms(ranks, n, epsilon, tolerance):
    """A whole batch of same-shaped matrices over one norm was a bug of the reference implementation at rank 1.

    The paper's epsilon turns the subspace by as much as it is larger than P's smallest singular value.
    """
    expected = [low_rank_gradients(rank) for rank in range(n)]
    for results in ranks(low_rank):
        for name, gradient in results[epsilon].items():
            target = sum(gradients[name] for gradients in expected) / n
            assert (gradient - target).norm() < tolerance * target.norm(), name


@pytest.mark.parametrize("start", ["fixed", "warm", "resampled"])
def test_the_average_is_output_plus_error_at_every_update(ranks, n, start):
    for results in ranks(conservation):
        before = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in MATRICES}
        for seed, (output, errors, squared_norm) in enumerate(results[start]):
            average = mean(seed, n)
            left = {name: average[name] + before[name] / n for name in MATRICES}
            assert largest_difference(left, {name: output[name] + errors[name] / n for name in MATRICES}) < EXACT
            assert max(float(error.norm()) for error in errors.values()) > 0.1  # else there is nothing to test
            # From the factors, without the product (Appendix E.2, step 9).
            assert squared_norm == pytest.approx(sum(float(g.square().sum()) for g in output.values()), rel=EXACT)
            before = errors


def test_fixed_warm_and_resampled_are_three_different_things(ranks):
    for results in ranks(conservation):
        last = {start: history[-1][0] for start, history in results.items()}
        assert all(largest_difference(last[a], last[b]) > 0.01 for a, b in itertools.combinations(last, 2))


def test_with_its_q_torchs_own_hook_makes_the_same_gradients_and_errors(ranks):
    for history, errors, torchs_errors in ranks(oracle):
        for ours, theirs in history:
            for gradient, other in zip(ours.values(), theirs, strict=True):
                torch.testing.assert_close(gradient, other, rtol=0, atol=EXACT)
        torch.testing.assert_close(errors, torchs_errors[: len(errors)], rtol=0, atol=EXACT)


@pytest.mark.parametrize("label", ["coded", "full"])
def test_zeros_ones_and_ill_conditioned_gradients_stay_finite(ranks, label):
    for results in ranks(degenerate):
        gradients, squared_norm, errors = results[label]
        assert squared_norm < float("inf")
        assert all(tensor.isfinite().all() for tensor in (*gradients.values(), *errors.values()))
        assert not gradients["layers.0.a.zero"].any()
        tolerance = {"coded": 4 * CODED_ROUNDING, "full": 1e-4}[label]  # float32, and the epsilon a few times over
        for name, value in {"ones": 1.0, "tiny": 1e-12}.items():
            torch.testing.assert_close(
                gradients[f"layers.0.a.{name}"] / value, torch.ones(20, 20), rtol=0, atol=tolerance
            )


def test_factors_travel_in_every_format_in_its_own_range(ranks):
    tolerances = {"full": 0.0, "float16": 5e-3, "bfloat16": 2e-2, "1-6-9": 5e-3}
    for results in ranks(wires):
        for wire, tolerance in tolerances.items():
            for name, expected in results["full"].items():
                assert (results[wire][name] - expected).norm() <= tolerance * expected.norm(), (wire, name)


def test_a_gradient_as_large_as_errors_may_be_spoils_no_update(ranks):
    """An error that is finite and does not travel would stay, and every update to come would be skipped."""
    for norms in ranks(spikes):
        for first, spike, *later in norms.values():
            assert first < 1e3
            assert 1e6 < spike < float("inf")
            assert max(later) < float("inf")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_on_one_machine_is_seen_by_all(ranks, fault):
    for results in ranks(faults):
        for seed, (output, errors, reduction) in enumerate(results[fault]):
            # A finite error that is too large for the wire stays, as the rules have it, and so does the fault.
            is_spoiled = seed == SPOILED or (seed > SPOILED and fault in FACTORS)
            assert bool(reduction.squared_norm.isinf()) == is_spoiled
            seen = [name for name, is_bad in zip(reduction.names, reduction.nonfinite, strict=True) if is_bad]
            assert seen == ([BAD] if is_spoiled and fault != "whole" else [])
            assert all(error.isfinite().all() for error in errors.values())
            # What was received as infinite is clamped, so that nothing else becomes infinite or NaN by it.
            assert fault not in FACTORS or all(output[name].isfinite().all() for name in MATRICES)


@pytest.mark.parametrize("fault", FAULTS)
def test_error_buffers_of_a_skipped_update_follow_the_papers_rules(ranks, n, fault):
    """Appendix E.2, step 12. A matrix whose factors are finite loses P Q^T although no parameter moves."""
    # float32 sums of a few numbers around 1, or 1-6-9 of numbers around 5 on each machine.
    tolerance = {"error": n * 5 * CODED_ROUNDING, "p": 1e-2, "q": 1e-2}.get(fault, 1e-5)
    for results in ranks(faults):
        (_, before, _), (output, after, _) = results[fault][:2]
        given = [draw(SPOILED, rank, dtype=torch.float32) for rank in range(n)]
        for name in (BAD, GOOD):
            healthy = given[1:] if name == BAD and fault != "whole" else given
            expected = before[name] + sum(gradients[name] for gradients in healthy)
            if name == GOOD or fault in ("gradient", "whole"):  # factors are finite
                expected = expected - n * output[name]
            elif fault in FACTORS:  # the error is, and so it stays whole
                given[0][BAD][2, 3] = FAULTS[fault][1]
                expected = expected + given[0][BAD]
            else:  # the first machine's is not: zero
                expected = expected - before[name] / n
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=tolerance)


def test_the_sum_of_errors_resumes_on_another_number_of_machines(ranks, n):
    for results in ranks(resume):
        for other, gradients in results.items():
            assert largest_difference(gradients, results[n]) < EXACT, other


def test_a_run_that_resumes_is_the_run_that_went_on_bit_for_bit(ranks):
    for went_on, resumed, *states in ranks(resume_on_as_many):
        assert all(went_on[name].equal(resumed[name]) for name in SHAPES)
        assert all(states[0][name].equal(states[1][name]) for name in MATRICES), "to save is no part of training"


@pytest.mark.parametrize("wire", WIRE_BYTES)
@pytest.mark.parametrize("n_shards", [1, 2])
def test_bytes_at_the_collectives_are_the_closed_form(ranks, n, wire, n_shards):
    blocks = [[name for name in MATRICES if name.startswith(prefix)] for prefix in ("layers.0", "layers.1")]
    n_whole = sum(torch.Size(shape).numel() for name, shape in SHAPES.items() if name not in MATRICES)

    def padded(entries):  # 1-6-9 travels in equal parts
        return entries + (-entries % n if wire == "1-6-9" else 0)

    ranks_of = {name: min(4 // n_shards, *SHAPES[name]) for name in MATRICES}
    factors = sum(
        padded(sum(ranks_of[name] * side(SHAPES[name]) for name in block)) for block in blocks for side in (min, max)
    )
    entries = sum(padded(sum(torch.Size(SHAPES[name]).numel() for name in block)) for block in blocks)
    for results in ranks(counted_bytes):
        n_bytes, n_calls, traffic = results["powersgd", wire, n_shards]
        # Four more bytes a matrix are its flag.
        assert (traffic.matrix_bytes, traffic.whole_bytes) == (
            WIRE_BYTES[wire] * factors,
            4 * (n_whole + len(MATRICES)),
        )
        assert (n_bytes, n_calls) == (traffic.matrix_bytes + traffic.whole_bytes, traffic.n_calls)
        assert n_calls == 2 * len(blocks) + 1
        n_bytes, n_calls, traffic = results["none", wire, n_shards]
        # One machine without compression has nothing to send.
        expected = (WIRE_BYTES[wire] * entries, 4 * n_whole, len(blocks) + 1) if n > 1 else (0, 0, 0)
        assert (traffic.matrix_bytes, traffic.whole_bytes, n_calls) == expected
        assert (n_bytes, n_calls) == (traffic.matrix_bytes + traffic.whole_bytes, traffic.n_calls)


def test_in_sixteen_bits_gradients_are_the_same_on_all_machines_and_near_those_in_full(ranks):
    every = ranks(sixteen_bits)
    for history in every:
        for (coded, full), (first, _) in zip(history, every[0], strict=True):
            assert all(coded[name].equal(first[name]) for name in SHAPES)
            for name in MATRICES:
                # Q0, P twice, Q and errors are each rounded, and a rounded Q0 or P turns the subspace a little.
                assert (coded[name] - full[name]).norm() < 12 * CODED_ROUNDING * full[name].norm()


def test_in_parts_and_over_micro_steps_an_update_is_the_same(ranks):
    for whole, parts, micro_steps in ranks(in_parts):
        assert largest_difference(parts, whole) < EXACT
        assert largest_difference(micro_steps, whole) < EXACT


def test_half_precision_gradients_are_averaged_in_32_bits(ranks, n):
    for averages, errors, written in ranks(half_gradients):
        for name in MATRICES:
            assert averages[name].dtype == errors[name].dtype == torch.float32
            expected = sum(draw(0, rank, dtype=torch.float16)[name].float() for rank in range(n)) / n
            torch.testing.assert_close(averages[name] + errors[name] / n, expected, rtol=0, atol=1e-6)
            assert written["powersgd"][name].equal(averages[name].half())
            assert written["none"][name].dtype == torch.float16
            torch.testing.assert_close(written["none"][name].float(), expected, rtol=0, atol=4 * CODED_ROUNDING)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "matrix_rank", "rate"),
    [(1920, 512, 0.833), (2688, 640, 0.851), (3968, 896, 0.859)],
    ids=["2.8b", "5.6b", "12b"],
)
def test_the_compression_rates_of_the_papers_three_sizes(monkeypatch, dim, matrix_rank, rate):
    """Table 1, by running on shards without data at 8 GPUs a machine, laid out as Table 2 has them."""
    n_shards, shard = 8, dim // 8
    shapes = {f"layers.0.attention.{name}": (dim, shard) for name in ("query", "key", "value", "project")}
    shapes |= {"layers.0.mlp.up": (dim, 4 * shard), "layers.0.mlp.down": (4 * shard, dim)}
    done = type("Done", (), {"wait": lambda self: None})()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group, async_op: done)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 128)
    n_bytes = {}
    for name, options in {
        "powersgd": {"matrix_rank": matrix_rank, "n_shards": n_shards, "errors": "full"},
        "none": {},
    }.items():
        kind = COMPRESSORS[name]
        compressor = kind.make(kind.options(wire="bfloat16", **options))
        compressor.reduce_({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, None)
        n_bytes[name] = compressor.traffic.matrix_bytes
    assert n_bytes["none"] == 2 * 12 * dim * dim // n_shards
    assert n_bytes["powersgd"] == sum(2 * n_factor_entries(*s, matrix_rank // n_shards) for s in shapes.values())
    compression_rate = 1 - n_bytes["powersgd"] / n_bytes["none"]
    assert compression_rate == pytest.approx(1 - 5 * matrix_rank / (8 * dim), abs=EXACT)
    assert round(compression_rate, 3) == rate


def test_matrices_of_the_priors_resblocks_are_compressed_and_nothing_else():
    from dalle_ds.models.prior import Prior
    from dalle_ds.presets import PRESETS

    config = PRESETS["tiny"].prior.model
    with torch.device("meta"):
        prior = Prior(config)
    blocks = {name: resblock_of(name, parameter) for name, parameter in prior.named_parameters()}
    compressed = [prior.get_parameter(name).numel() for name, block in blocks.items() if block]
    assert sum(compressed) == 12 * config.dim**2 * config.n_layer
    assert len(set(blocks.values()) - {None}) == 2 * config.n_layer


def test_saturation_is_no_way_to_hide_an_overflow_of_the_errors():
    """Moments saturate; an error buffer must show that it overflowed, to be zeroed."""
    assert ERROR_BUFFER.saturates
    assert not wire_module.CODED.saturates


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"matrix_rank": 10, "n_shards": 4}, "matrix_rank 10 must be a positive multiple of n_shards 4"),
        ({"matrix_rank": 0}, "matrix_rank 0"),
        ({"matrix_rank": 4, "start": "cold"}, "start 'cold' is unknown; known are fixed, warm, resampled"),
        ({"matrix_rank": 4, "wire": "morse"}, "wire 'morse' is unknown"),
        ({"matrix_rank": 4, "errors": "none"}, "errors 'none' is unknown"),
        ({"matrix_rank": 4, "p_scale": -1.0}, "p_scale -1.0 must be above 0, or 0 for what suits the wire"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        COMPRESSORS["powersgd"].options(**options)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="state without errors is not of a run with PowerSGD"):
        powersgd(2).load_state_dict({"n_updates": 3})
    compressor = powersgd(2)
    compressor.declare({"layers.0.mlp.up": torch.ones(24, 6)})
    for name, words in {
        "layers.1.mlp.up": r"layers.0.mlp.up has no error buffer in the state",
        "layers.0.mlp.up": r"layers.0.mlp.up of shape \(24, 6\) has an error buffer of \(5, 6\)",
    }.items():
        with pytest.raises(ValueError, match=words):
            compressor.load_state_dict({"n_updates": 3, "errors": {name: torch.zeros(5, 6)}})


def test_a_gradient_that_stays_away_is_noticed():
    """Else its error buffer would be left behind, and another one begun."""
    compressor = powersgd(2)
    compressor.declare({name: torch.ones(SHAPES[name]) for name in ("layers.0.mlp.up", "layers.0.mlp.down")})
    with pytest.raises(ValueError, match="every update must have the same"):
        compressor.declare({"layers.0.mlp.up": torch.ones(24, 6)})
