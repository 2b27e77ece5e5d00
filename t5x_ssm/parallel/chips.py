"""Peak arithmetic of accelerators, by the name that JAX gives a device."""

# Dense bfloat16 operations a second and device: Google Cloud's TPU system architecture pages and NVIDIA's data sheets.
_BF16_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 floating-point operations a second of one device; None where it is not known, as of CPUs."""
    return _BF16_PEAKS.get(device_kind)
