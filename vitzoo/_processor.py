"""What the operating system says of the processor, and what torch's BLAS makes of it."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def processor_facts() -> dict[str, str]:
    """The first processor's entries in Linux' /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


# A compiler cannot follow how this is found out.
@torch.compiler.assume_constant_result
def mkl_on_amd() -> bool:
    """Whether torch's BLAS is MKL on an AMD processor, which it treats differently."""
    # Windows names the vendor in the second place.
    vendor = processor_facts().get("vendor_id") or platform.processor()
    return torch.backends.mkl.is_available() and "AuthenticAMD" in vendor
