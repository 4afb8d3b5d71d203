"""Panels of Householder reflections in one Triton kernel against those of torch: in the interpreter, or on a GPU."""

import functools

import pytest
import torch

from dalle_kernels.compression.orthogonalize import householder, norm_floor, reflect_panel

pytest.importorskip("triton")
from triton_without_gpu import assert_no_spills, interpreting

from dalle_kernels.compression import panel_kernels
from dalle_kernels.compression.panel_kernels import MOST_ROWS, WIDTH

FLOOR = norm_floor(torch.float32)
SHAPES = [(3, 9, 1), (1, 1, 1), (2, 8, 8), (2, 40, WIDTH), (3, 100, WIDTH + 1), (2, 70, 3 * WIDTH - 1)]
CASES = ("gaussian", "zeros", "ones", "tiny", "of rank 2", "ill-conditioned")


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield call


def make(case, shape):
    generator = torch.Generator().manual_seed(0)
    n, _, columns = shape
    matrices = torch.randn(shape, generator=generator)
    if case == "of rank 2":
        return matrices[..., :2] @ torch.randn(n, min(2, columns), columns, generator=generator)
    if case == "ill-conditioned":
        return matrices * torch.logspace(0, -30, columns)
    return {"gaussian": matrices, "zeros": 0 * matrices, "ones": torch.ones(shape), "tiny": 1e-30 * matrices}[case]


def columns_of(case, shape, device="cpu"):
    """The columns that the kernel makes, and what it leaves of the panels that it is given."""
    matrices = make(case, shape).to(device)
    reflect = functools.partial(panel_kernels.reflect_panel_on_gpu, floor=FLOOR)
    given = matrices[:, :, :WIDTH].clone()
    reflect(given)
    return householder(matrices, WIDTH, reflect).cpu(), given.cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_are_those_of_torchs_operations(interpreter, shape):
    q, given = interpreter(columns_of, "gaussian", shape)
    torch.testing.assert_close(q, householder(make("gaussian", shape)), rtol=0, atol=3e-6)
    assert given.equal(make("gaussian", shape)[:, :, :WIDTH]), "a panel is left as it was"


@pytest.mark.parametrize("case", CASES)
def test_whatever_comes_in_columns_come_out_orthonormal(interpreter, case):
    q, _ = interpreter(columns_of, case, (2, 50, 20))
    assert float((q.mT @ q - torch.eye(20)).abs().max()) < 3e-6


def test_a_panel_of_a_part_of_a_matrix_is_that_of_a_copy(interpreter):
    assert interpreter(count_other_vectors) == 0


def count_other_vectors():
    whole = make("gaussian", (3, 40, 24))
    part = whole[:, 8:, 16:]
    ours = panel_kernels.reflect_panel_on_gpu(part, FLOOR)
    return int((ours - reflect_panel(part.clone())).abs().gt(3e-6).sum())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [16, 240, 496, 1984, MOST_ROWS])
def test_panels_stay_in_registers(rows, capability, tmp_path):
    panel = torch.zeros(2, rows, WIDTH)
    arguments, constants, options = panel_kernels.launch_arguments(panel, panel.clone(), FLOOR)
    assert_no_spills(panel_kernels.reflect_panel_kernel, arguments, constants, options, capability, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (6, 496, 112), (2, MOST_ROWS, 112)], ids=str)
def test_on_a_gpu_columns_are_those_of_torchs_operations(shape):
    q, _ = columns_of("gaussian", shape, device="cuda")
    torch.testing.assert_close(q, householder(make("gaussian", shape)), rtol=0, atol=1e-5)
