"""Householder reflections: against torch's QR, and where Gram-Schmidt fails."""

import pytest
import torch

from dalle_kernels.compression.orthogonalize import PANEL, householder, lapack, orthogonalize

# Of float32 sums over up to 200 rows, and of float64's.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
IMPLEMENTATIONS = {"own": householder, "lapack": lapack}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormality_error(q):
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


def with_singular_values(rows, values):
    left, right = (torch.linalg.qr(draw(n, len(values), dtype=torch.float64))[0] for n in (rows, len(values)))
    return (left * values @ right.T).float()[None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(3, 9, 1), (1, 1, 1), (2, 7, 7), (2, 40, PANEL), (3, 200, PANEL + 1), (4, 90, 3 * PANEL - 1)], ids=str
)
def test_columns_are_those_of_torchs_qr(shape, implementation, dtype):
    matrices = draw(*shape, dtype=dtype)
    q = IMPLEMENTATIONS[implementation](matrices)
    expected, r = torch.linalg.qr(matrices)
    # The last reflection of a square matrix may be the identity or not: one sign, which R takes up.
    q = q * torch.where((q * expected).sum(-2, keepdim=True) < 0, -1, 1)
    torch.testing.assert_close(q, expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(q @ r, matrices, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ill_conditioned_columns_come_out_orthonormal(implementation):
    """Where classical Gram-Schmidt is off by 1 and the modified form by 8e-3 (paper: it was unstable)."""
    matrices = with_singular_values(120, torch.logspace(0, -7, 24, dtype=torch.float64))
    assert orthonormality_error(IMPLEMENTATIONS[implementation](matrices)) < TOLERANCE[torch.float32]
    assert orthonormality_error(orthogonalize(matrices)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30])
def test_zeros_and_matrices_of_rank_1_come_out_orthonormal(fill, implementation):
    matrices = torch.full((2, 50, 20), fill)
    assert orthonormality_error(IMPLEMENTATIONS[implementation](matrices)) < TOLERANCE[torch.float32]
    assert orthonormality_error(orthogonalize(matrices)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("power", [-140, -100, -40, 0, 40, 127])
def test_a_power_of_two_changes_no_bit(power):
    """Not even where squares under- or overflow."""
    matrices = draw(2, 30, 8).clamp(-0.999, 0.999).half().float()  # 11 bits, so that subnormals hold most of them
    scaled = torch.ldexp(matrices, torch.tensor(power))
    if torch.ldexp(scaled, torch.tensor(-power)).equal(matrices):
        assert orthogonalize(scaled).equal(orthogonalize(matrices))
    assert orthonormality_error(orthogonalize(scaled)) < TOLERANCE[torch.float32]


def test_each_matrix_of_a_batch_has_its_own_factorisation():
    matrices = draw(5, 30, 6) * torch.logspace(-12, 12, 5)[:, None, None]
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert orthogonalize(matrices).equal(one_by_one)


def test_epsilon_is_added_to_the_diagonal_at_the_scale_of_the_largest_entry():
    matrices = torch.zeros(1, 6, 2)
    matrices[0, 5, 0] = 4096.0
    q = orthogonalize(matrices, epsilon=0.25)[0]
    # 4096 = 0.5 * 2**13: the columns are (0.25, 0, 0, 0, 0, 0.5) and (0, 0.25, 0, ...).
    expected = torch.tensor([0.25, 0, 0, 0, 0, 0.5]) / (0.25**2 + 0.5**2) ** 0.5
    torch.testing.assert_close(q[:, 0].abs(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(q[:, 1].abs(), torch.eye(6)[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(orthogonalize(torch.zeros(1, 6, 2))[0].abs(), torch.eye(6, 2), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_gpu_makes_the_columns_of_a_cpu():
    matrices = draw(6, 496, 112)
    torch.testing.assert_close(orthogonalize(matrices.cuda()).cpu(), orthogonalize(matrices), rtol=0, atol=1e-4)
