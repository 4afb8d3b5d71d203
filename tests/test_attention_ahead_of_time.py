"""The Triton kernels compiled for GPUs that are not here: no spills, shared memory that fits, tensor cores in use."""

import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from dalle_kernels.attention.masks import MASKS, Mask

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dalle_kernels.attention import kernels  # noqa: E402
from dalle_kernels.attention.configs import PASSES, TABLE  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TYPES = {"p_lse": "*fp32", "p_delta": "*fp32", "p_table": "*u8", "p_count": "*i32", "p_index": "*i32", "n_head": "i32"}
# Per block, in bytes: NVIDIA's tables of compute capabilities. And what a matrix product of the tensor cores is called.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
FULL_SIZE = {"text_len": 256, "grid_height": 32, "grid_width": 32}
RAGGED = {"text_len": 19, "grid_height": 10, "grid_width": 12}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_pass(name, mask, head_dim, dtype, capability):
    """The cubin of a pass as `forward` and `backward` would launch it, and its plan."""
    plan = kernels.plan(name, mask, head_dim, dtype, capability)
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(plan.kernel.arg_names):
        is_absent = argument in ("p_table", "p_count", "p_index") and plan.constants["WINDOW"] != kernels.TABLE.value
        if argument in plan.constants or is_absent:
            signature[argument] = "constexpr"
            constants[i,] = plan.constants.get(argument)
            continue
        signature[argument] = TYPES.get(argument) or (POINTERS[dtype] if argument.startswith("p_") else "i32")
        if argument != "n_head":  # else loads are not vectorised, and the kernel is another than the one that runs
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=plan.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": plan.tile.n_warps, "num_stages": plan.tile.n_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), plan


def dump(option, cubin, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def assert_fit(name, mask, head_dim, dtype, capability, folder):
    compiled, plan = compile_pass(name, mask, head_dim, dtype, capability)
    usage = dump("-res-usage", compiled.asm["cubin"], folder)
    code = dump("-sass", compiled.asm["cubin"], folder)
    assert re.search(r"STACK:(\d+)", usage)[1] == "0"
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    return code, plan


def assert_tensor_cores(code, capability):
    assert re.search(rf"\b{TENSOR_CORE[capability]}\b", code)
    if capability == 90:  # the slower products of the generation before
        assert not re.search(r"\bHMMA\b", code)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("key", TABLE, ids=lambda key: f"{key.capability}-{key.kind}-{key.dtype}")
def test_every_entry_of_the_table_compiles_without_spills_onto_tensor_cores(key, name, tmp_path):
    mask = Mask(kind=key.kind, **{**FULL_SIZE, "text_len": key.text_len})
    code, plan = assert_fit(name, mask, key.head_dim, getattr(torch, key.dtype), key.capability, tmp_path)
    assert plan.tile == TABLE[key][name]
    assert_tensor_cores(code, key.capability)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("capability", "kind", "head_dim"),
    [(80, "row", 64), (80, "column", 64), (80, "conv", 64), (90, "dense", 64), (80, "conv", 128), (90, "conv", 128)],
)
def test_default_tiles_compile_without_spills_onto_tensor_cores(capability, kind, head_dim, name, tmp_path):
    code, _ = assert_fit(name, Mask(kind=kind, **FULL_SIZE), head_dim, torch.bfloat16, capability, tmp_path)
    assert_tensor_cores(code, capability)


@pytest.mark.parametrize("name", PASSES)
def test_a_mask_without_a_structural_rule_compiles_without_spills(name, tmp_path):
    with mock.patch.dict(MASKS, strided=lambda query, key, mask: (query - key) % 3 == 0):
        mask = Mask(kind="strided", **FULL_SIZE)
        code, plan = assert_fit(name, mask, 64, torch.float16, 90, tmp_path)
    assert plan.constants["WINDOW"] == kernels.TABLE.value
    assert_tensor_cores(code, 90)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 32), (torch.bfloat16, 16)], ids=["float32", "narrow"])
def test_ragged_streams_compile_without_spills(dtype, head_dim, name, tmp_path):
    assert_fit(name, Mask(kind="conv", **RAGGED), head_dim, dtype, 80, tmp_path)
