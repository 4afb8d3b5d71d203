"""GPUs as their makers' data sheets have them, and the networks they usually sit in.

Peaks are dense, without sparsity: 16-bit matrix products with 32-bit sums, and float32. NVIDIA's data sheets of V100
SXM2, A100 SXM4, H100 SXM5 and H200 SXM5. Memory is what a process finds on the card, in 10^9 bytes; the name has what
it is sold as. NVLink is one direction of a GPU (half of the sheets' sum of both). The network is that of the maker's
own machines of 8 (DGX-1: 4 adapters of 100 Gbit/s; DGX A100: 8 of 200; DGX H100 and H200: 8 of 400), a GPU's part.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and its links; operations and bytes a second."""

    memory: float  # bytes
    flops: float  # 16-bit products
    flops_32: float
    memory_bandwidth: float
    machine_bandwidth: float
    network_bandwidth: float
    has_bfloat16: bool = True


V100 = Hardware(
    memory=16.9e9,
    flops=125e12,
    flops_32=15.7e12,
    memory_bandwidth=900e9,
    machine_bandwidth=150e9,
    network_bandwidth=6.25e9,
    has_bfloat16=False,
)
A100 = Hardware(
    memory=42.4e9,
    flops=312e12,
    flops_32=19.5e12,
    memory_bandwidth=1555e9,
    machine_bandwidth=300e9,
    network_bandwidth=25e9,
)
H100 = Hardware(
    memory=85.0e9,
    flops=989e12,
    flops_32=67e12,
    memory_bandwidth=3350e9,
    machine_bandwidth=450e9,
    network_bandwidth=50e9,
)

GPUS = {
    "v100-16gb": V100,
    "v100-32gb": replace(V100, memory=34.1e9),
    "a100-40gb": A100,
    "a100-80gb": replace(A100, memory=85.0e9, memory_bandwidth=2039e9),
    "h100-80gb": H100,
    "h200-141gb": replace(H100, memory=149.2e9, memory_bandwidth=4800e9),
}
