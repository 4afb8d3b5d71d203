"""The catalogue of GPUs against the makers' data sheets."""

import pytest

from dalle_ds.planner.hardware import GPUS

# What NVIDIA prints: 16-bit TFLOP/s (of H100 and H200 with sparsity, which doubles them), float32 TFLOP/s, GB/s of
# memory, GB/s of NVLink in both directions; adapters of the maker's machine of 8 and their Gbit/s; and what a process
# finds of the memory, in GiB (`torch.cuda.get_device_properties`).
SHEETS = {
    "v100-16gb": (125, 15.7, 900, 300, (4, 100), 15.78),
    "v100-32gb": (125, 15.7, 900, 300, (4, 100), 31.75),
    "a100-40gb": (312, 19.5, 1555, 600, (8, 200), 39.4),
    "a100-80gb": (312, 19.5, 2039, 600, (8, 200), 79.2),
    "h100-80gb": (1979 / 2, 67, 3350, 900, (8, 400), 79.1),
    "h200-141gb": (1979 / 2, 67, 4800, 900, (8, 400), 139),
}


def test_the_catalogue_has_every_sheet():
    assert set(GPUS) == set(SHEETS)
    assert [name for name, gpu in GPUS.items() if not gpu.has_bfloat16] == ["v100-16gb", "v100-32gb"]


@pytest.mark.parametrize("name", SHEETS)
def test_a_gpu_is_what_its_data_sheet_says(name):
    gpu, (tflops, tflops_32, memory, nvlink, (n_adapters, gigabits), gibibytes) = GPUS[name], SHEETS[name]
    assert gpu.flops == pytest.approx(tflops * 1e12, rel=1e-3)
    assert gpu.flops_32 == tflops_32 * 1e12
    assert gpu.memory_bandwidth == memory * 1e9
    assert gpu.machine_bandwidth == nvlink / 2 * 1e9
    assert gpu.network_bandwidth == n_adapters * gigabits / 8 / 8 * 1e9
    assert gpu.memory == pytest.approx(gibibytes * 2**30, rel=5e-3)
