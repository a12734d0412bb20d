"""What the operating system says of the processor."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def processor_facts() -> dict[str, str]:
    """The first processor's entries in Linux' /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@lru_cache(maxsize=1)
def is_amd() -> bool:
    """Whether AMD made the processor; MKL treats those differently."""
    # Windows names the vendor in the second place.
    vendor = processor_facts().get("vendor_id") or platform.processor()
    return "AuthenticAMD" in vendor
