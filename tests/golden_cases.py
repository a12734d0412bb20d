"""Golden cases: what the authors' code computes for weights that follow from names and shapes.

A case is `tests/golden/<family>/<name>.json` (parameter names and shapes, input, notes) and `.npz`
(outputs). The weights are drawn from the names, so that no checkpoint has to be stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import vitzoo  # noqa: F401  (registers the zoo's names)

GOLDEN = Path(__file__).parent / "golden"
BOUND = 3e-5


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    bits = np.random.PCG64(int.from_bytes(key, "little"))
    return np.random.Generator(bits).standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 values of the parameter or buffer `name`."""
    values = _normal(name, shape, seed)
    kind = name.rpartition(".")[2]
    if kind == "running_var":
        return 1 + 0.1 * np.abs(values)
    if kind in ("running_mean", "bias") or (len(shape) < 2 and kind != "weight"):
        return 0.1 * values
    if len(shape) < 2:
        return 1 + 0.1 * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def draw_input(shape: tuple[int, ...] | list[int], seed: int = 0) -> Tensor:
    """Standard-normal input."""
    return torch.from_numpy(_normal("input", tuple(shape), seed))


@dataclass(frozen=True)
class GoldenCase:
    """One case: its description and the outputs that the reference gave."""

    name: str
    spec: dict
    outputs: dict[str, np.ndarray]

    def weights(self) -> dict[str, Tensor]:
        """The filled state dict under the reference's names."""
        filled = {}
        for name, shape in self.spec["state_dict"].items():
            if name in self.spec.get("constant_buffers", ()):
                continue
            values = draw_weight(name, tuple(shape), self.spec.get("seed", 0))
            for pattern, factor in self.spec.get("rescale", {}).items():
                if re.search(pattern, name):
                    values = values * np.float32(factor)
            filled[name] = torch.from_numpy(values)
        return filled

    def input(self) -> Tensor:
        """The input tensor."""
        return draw_input(self.spec["input"]["shape"], self.spec["input"].get("seed", 0))

    def save(self, folder: Path) -> Path:
        """Write the weights as an authors' file and return its path."""
        path = folder / f"{self.name}.pth"
        torch.save(self.weights(), path)
        return path

    def check(self, output: str, found: Tensor, bound: float = BOUND) -> None:
        """Assert that a tensor agrees with the reference's output of that name.

        The bound is relative to max(1, largest value); a map stored as a strided sample is compared
        at the sample and through mean, standard deviation, minimum and maximum of the whole.
        """
        found = found.detach().float()
        golden = torch.from_numpy(np.asarray(self.outputs[output]))
        described = self.spec["outputs"][output]
        # Some cases say the slice in words only; there `shape` is the sample's.
        in_words = re.search(r"\[[^\]]*::[^\]]*\]", described.get("what", ""))
        if "slice" not in described and in_words:
            sample = found[_parse_slice(in_words[0])]
            assert list(sample.shape) == list(described["shape"]), (output, tuple(sample.shape))
        else:
            assert list(found.shape) == list(described["shape"]), (output, tuple(found.shape))
            sample = found[_parse_slice(described["slice"])] if "slice" in described else found
        scale = max(1.0, golden.abs().max().item())
        worst = (sample - golden).abs().max().item() / scale
        assert worst <= bound, f"{self.name}: {output} is off by {worst:.2e} of its scale"
        if f"{output}.stats" in self.outputs:
            whole = found.double()
            stats = torch.stack([whole.mean(), whole.std(correction=0), whole.min(), whole.max()])
            expected = torch.from_numpy(np.asarray(self.outputs[f"{output}.stats"])).double()
            off = (stats - expected).abs().max().item() / max(1.0, expected.abs().max().item())
            assert off <= bound, f"{self.name}: statistics of {output} are off by {off:.2e}"


def _parse_slice(text: str) -> tuple[slice, ...]:
    parts = text.strip("[] ").split(",")
    return tuple(slice(*(int(n) if n else None for n in p.strip().split(":"))) for p in parts)


def load_case(family: str, name: str) -> GoldenCase:
    """Read a case from tests/golden."""
    spec = json.loads((GOLDEN / family / f"{name}.json").read_text())
    with np.load(GOLDEN / family / f"{name}.npz") as arrays:
        return GoldenCase(name, spec, dict(arrays))


def pretrained(name: str, file: Path, **kwargs: object) -> nn.Module:
    """A model in eval mode through timm's own path for pretrained files."""
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs
    ).eval()
