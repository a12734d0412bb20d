"""Compile the kernels for GPUs that this machine does not have; a program of its own.

    python -m tests.ops.triton_compile 80,90,100 float32,bfloat16 CALL...

Triton's driver is replaced by one that only names an architecture, so that arguments are
specialised as on a GPU. One JSON line per kernel says what the assembler reports.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops import _triton_backends
from vitzoo.ops._triton.launch import Launch
from vitzoo.ops.neighborhood import _why_not_triton

Maps = dict[str, tuple[int, ...]]


def _maps(H: int, W: int, d: int, d_v: int = 0, stride: int = 1, heads: int = 2) -> Maps:
    q = (1, -(-H // stride), -(-W // stride), heads, d)
    return {"q": q, "k": (1, H, W, heads, d), "v": (1, H, W, heads, d_v or d)}


def _window(side: int, d: int, *, bias: bool = False, fill: bool = False, shift: int = 0) -> Any:
    shapes = _maps(16, 16, d)
    shapes |= {"bias": (2, side**2, side**2)} if bias else {}
    shapes |= {"fill": (2, d)} if fill else {}
    return "window_attention", shapes, {"window_size": side, "shift": shift}


def _neighborhood(kernel: int, d: int, *, bias: bool = True, dilation: int = 1) -> Any:
    shapes = _maps(32, 32, d) | ({"bias": (2, 2 * kernel - 1, 2 * kernel - 1)} if bias else {})
    return (
        "neighborhood_attention",
        shapes,
        {"kernel_size": (kernel,) * 2, "dilation": (dilation,) * 2},
    )


def _halo(
    block: int, halo: int, d: int, d_v: int = 0, *, stride: int = 1, border: str = "zero"
) -> Any:
    table = (2 * (block + 2 * halo) - 1, d)
    shapes = _maps(16, 16, d, d_v, stride) | {"height": table, "width": table}
    return (
        "halo_attention",
        shapes,
        {"block_size": block, "halo_size": halo, "stride": stride, "border": border},
    )


def _routed(region: int, chosen: int, d: int) -> Any:
    regions = torch.arange(chosen).expand(1, 49, chosen)
    settings = {"regions": regions, "region_grid": (7, 7)}
    return "routed_attention", _maps(7 * region, 7 * region, d), settings


def _grouped(group: int, d: int) -> Any:
    settings = {"group_size": group, "frame_offsets": torch.tensor([0, 400])}
    return "grouped_attention", dict.fromkeys("qkv", (400, 8, d)), settings


# What the families' models call (see their files), and the widest heads that kernels take, 64.
CALLS: dict[str, Any] = {
    "window-hilo": _window(2, 32, fill=True),
    "window-davit": _window(7, 32, fill=True),
    "window-davit-384": _window(12, 32, fill=True),
    "window-bias": _window(7, 32, bias=True, shift=3),
    "window-bias-fill-64": _window(8, 64, bias=True, fill=True),
    "neighborhood-nat": _neighborhood(7, 32),
    "neighborhood-dinat": _neighborhood(7, 32, dilation=2),
    "neighborhood-dinat-384": _neighborhood(11, 32),
    "neighborhood-iso": _neighborhood(7, 64),
    "neighborhood-plain": _neighborhood(7, 32, bias=False),
    "halo-timm": _halo(8, 3, 16, 64),
    "halo-timm-stride": _halo(8, 3, 16, 32, stride=2),
    "halo-timm-2": _halo(8, 2, 16, 24),
    "halo-paper": _halo(8, 3, 16),
    "halo-paper-10": _halo(10, 3, 16),
    "halo-paper-12": _halo(12, 2, 16, 32),
    "halo-paper-14": _halo(14, 2, 16),
    "halo-paper-wide": _halo(8, 4, 16, 64),
    "halo-u": _halo(7, 3, 32, border="mask"),
    "halo-constant": _halo(8, 3, 32, border="constant"),
    "routed-1": _routed(8, 1, 32),
    "routed-2": _routed(4, 4, 32),
    "routed-3": _routed(2, 16, 32),
    "routed-512": _routed(16, 1, 32),
    "routed-64": _routed(4, 4, 64),
    "grouped": _grouped(144, 16),
    "grouped-69": _grouped(69, 16),
}


class Absent:
    """A driver that names an architecture; "device" n is compute capability n."""

    architecture = 80

    def get_current_device(self) -> int:
        """The device is its architecture, so that kernels are cached per architecture."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """Any stream."""
        return 0

    def get_current_target(self) -> Any:
        """Architecture and width of a warp."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def launches(name: str, dtype: torch.dtype) -> list[Launch]:
    """The launches of a call, forward and all gradients that the backend serves."""
    operator, shapes, settings = CALLS[name]
    leaves: dict[str, Tensor] = {
        key: torch.zeros(shape, dtype=dtype).requires_grad_() for key, shape in shapes.items()
    }
    given: dict[str, Any] = dict(leaves)
    if "height" in given:
        given["axial_bias"] = (given.pop("height"), given.pop("width"))
    if settings.get("border") == "constant":
        leaves["fill"] = torch.zeros(shapes["q"][3], shapes["q"][4], dtype=dtype).requires_grad_()
        given["fill"] = leaves["fill"]
    if "fill" in given:
        given["fill"] = (leaves["fill"], leaves["fill"])
    found: list[Launch] = []
    before, Launch.run = Launch.run, lambda self, device: found.append(self)  # type: ignore[method-assign]
    try:
        out = getattr(_triton_backends, operator)(**given, **settings)
        if operator != "neighborhood_attention" or not _why_not_triton(**given, **settings):
            torch.autograd.grad(out.sum(), list(leaves.values()))
    finally:
        Launch.run = before  # type: ignore[method-assign]
    return found


def compile_launch(
    launch: Launch, driver: Absent, architecture: int, *, disassemble: bool
) -> dict[str, Any]:
    """What the assembler says of a kernel; its matrix instructions only where disassembled."""
    driver.architecture = architecture
    plan = launch.plan
    arguments = (*launch.pointers, *plan.numbers)
    kernel = plan.function().warmup(*arguments, grid=plan.grid, **plan.constants, **plan.options)
    from triton import backends

    tools = Path(backends.__file__).parent / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])

        def told(flag: str) -> str:
            command = [tools / "cuobjdump", flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = told("-res-usage"), told("-sass") if disassemble else ""
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": kernel.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", code))),
    }


def rows(names: list[str], architectures: list[int], dtypes: list[str]) -> Iterator[dict]:
    """One row per kernel; what several calls share is compiled once."""
    import triton

    driver = Absent()
    triton.runtime.driver.set_active(driver)
    done: set[str] = set()
    for name in names:
        for dtype in dtypes:
            for launch in launches(name, getattr(torch, dtype)):
                plan = launch.plan
                key = repr((plan.module, plan.kernel, plan.constants, dtype))
                if key in done:
                    continue
                done.add(key)
                for architecture in architectures:
                    row = {"call": name, "dtype": dtype, "kernel": plan.kernel}
                    sides = ("BLOCK_M", "BLOCK_N", "BLOCK_D")
                    tile = {k: plan.constants[k] for k in sides if k in plan.constants}
                    row |= {
                        "architecture": architecture,
                        "warps": plan.options["num_warps"],
                    } | tile
                    # Exact products have no such instructions, and are slow to disassemble.
                    halves = dtype != "float32"
                    yield row | compile_launch(launch, driver, architecture, disassemble=halves)


if __name__ == "__main__":
    asked = [int(a) for a in sys.argv[1].split(",")]
    for found in rows(sys.argv[3:] or list(CALLS), asked, sys.argv[2].split(",")):
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
