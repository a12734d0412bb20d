"""What of a task becomes a graph: a network that takes one batch of images, and its input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._sympy.value_ranges import ValueRanges

from vitzoo._skeleton import without_memory
from vitzoo.errors import InputError
from vitzoo.tasks import Task

# Of a segmenter whose recipe names no size.
_SIDE = 512


@dataclass(frozen=True)
class Network:
    """A task's model in the form that is traced.

    Attributes:
        model: in eval mode on the CPU; a tensor in, a tensor or a tuple of tensors out.
        shape: (channels, height, width) of the input that it is traced with.
        preprocessing: what an image needs before it is that input, in JSON's types.
        outputs: names of what comes out.
        maps: of an export of features, a line for each output: name, module, channels, stride.
        batched: the input is (B, C, H, W); False for one image (C, H, W).
        first_label: number that the first of the task's labels has in the output.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    preprocessing: dict[str, Any]
    outputs: tuple[str, ...]
    maps: tuple[dict[str, Any], ...] = ()
    batched: bool = True
    first_label: int = 0


class Features(nn.Module):
    """A backbone as a graph of maps: what `features_only` returns, as a tuple.

    Args:
        model: any of timm's with `forward_intermediates`.
        indices: of the maps.
        norm: whether the model's last norm goes over them.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int], *, norm: bool = False) -> None:
        super().__init__()
        self.model, self.indices, self.norm = model, list(indices), norm

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> the maps, first to last."""
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=self.indices, norm=self.norm, intermediates_only=True
        )
        return tuple(maps)


class Maps(nn.Module):
    """The maps that a segmenter's decoder reads, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> the maps, finest first."""
        return tuple(self.model(x))


class OneImage(nn.Module):
    """A detector of torchvision on one image, its result as a tuple."""

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.keys = tuple(keys)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) from 0 to 1 -> boxes, scores, labels from 1 and, if any, masks."""
        (found,) = self.model([image])
        return tuple(found[key] for key in self.keys)


def network_of(task: Task, kind: str, *, features: bool = False) -> Network:
    """The network of a task with its model.

    Args:
        task: classification, segmentation or detection.
        kind: its name.
        features: the backbone's maps instead of the task's output.

    Raises:
        InputError: another task, features of a detector, or a model without maps.
    """
    given: Any = task
    if hasattr(given, "data_config"):
        config = given.data_config()
        shape = tuple(config["input_size"])
        if features:
            return _of_features(given, shape, config)
        return Network(given.model.eval(), shape, config, ("logits",))
    if kind == "segmentation":
        height, width = given.options.data.size or (_SIDE, _SIDE)
        prepared = asdict(given.preparation())
        if features:
            body = given.model.backbone
            maps = _lines(["backbone"] * len(body.strides), body.channels, body.strides)
            return _of_maps(Maps(body), (3, height, width), prepared, maps)
        return Network(given.model.eval(), (3, height, width), prepared, ("logits",))
    if kind == "detection" and not features:
        return _of_detector(given)
    what = f"features of a run of {kind}" if features else f"a run of {kind}"
    raise InputError(f"{what} cannot be exported: classification, segmentation and detection can")


def _of_features(task: Any, shape: tuple[int, int, int], config: dict[str, Any]) -> Network:
    """The maps of a classifier's backbone, chosen and normed as timm's `features_only` has them."""
    options = task.options.model
    try:
        # Nothing but timm's own wrapper knows which maps those are; this one has no weights.
        with without_memory():
            wrapper: Any = timm.create_model(
                options.name, features_only=True, in_chans=options.in_chans, **options.args
            )
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise InputError(f"{options.name} has no feature maps: {error}") from None
    if not hasattr(task.model, "forward_intermediates"):
        raise InputError(f"{options.name} has no feature maps: it lacks forward_intermediates")
    info = wrapper.feature_info
    model = Features(task.model, info.out_indices, norm=getattr(wrapper, "norm", False))
    lines = _lines(info.module_name(), info.channels(), info.reduction())
    return _of_maps(model, shape, config, lines)


def _of_maps(
    model: nn.Module,
    shape: tuple[int, int, int],
    config: dict[str, Any],
    maps: tuple[dict[str, Any], ...],
) -> Network:
    return Network(model.eval(), shape, config, tuple(line["name"] for line in maps), maps)


def _lines(
    modules: Sequence[str], channels: Sequence[int], strides: Sequence[int]
) -> tuple[dict[str, Any], ...]:
    rows = zip(modules, channels, strides, strict=True)
    return tuple(
        {"name": f"map_{i}", "module": module, "channels": count, "stride": stride}
        for i, (module, count, stride) in enumerate(rows)
    )


def _of_detector(task: Any) -> Network:
    keys = ("boxes", "scores", "labels", *(("masks",) if task.has_masks else ()))
    data, normalise = task.options.data, task.model.transform
    shape = (3, data.min_size[-1], min(data.max_size, data.min_size[-1] * 4 // 3))
    facts = {
        "input": "one image (3, height, width), red green blue, from 0 to 1",
        "inside_the_graph": {
            "mean": list(normalise.image_mean),
            "std": list(normalise.image_std),
            "min_size": data.min_size[-1],
            "max_size": data.max_size,
        },
    }
    return Network(
        OneImage(task.model, keys).eval(), shape, facts, keys, batched=False, first_label=1
    )


def trace(
    model: nn.Module,
    shape: Sequence[int],
    dynamic: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.export.ExportedProgram:
    """The graph of a model of batches in torch's own form.

    Args:
        model: in eval mode; with `dtype` float16 a copy is traced.
        shape: (channels, height, width) of the default input.
        dynamic: `batch`, `size` or both.
        dtype: of weights and input.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    channels, height, width = shape
    if "size" in dynamic:
        # Two sides, and no multiple of anything: equal ones would be taken for one symbol.
        height, width = height + 1, width + 33
    x = torch.randn(2 if "batch" in dynamic else 1, channels, height, width, dtype=dtype)
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC} if "batch" in dynamic else {}
    if "size" in dynamic:
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _sizes_unknown(bool(dynamic)):
        program = torch.export.export(model, (x,), dynamic_shapes=(free,))
    # A map whose side is one gets a branch of its own in torch, and with it the input a least side,
    # though both ways compute the same.
    for symbol, bounds in list(program.range_constraints.items()):
        program.range_constraints[symbol] = ValueRanges(1, bounds.upper)
    return program


@contextmanager
def _sizes_unknown(active: bool) -> Iterator[None]:
    """Trace without taking a side of one for a case of its own, nor caching unknown shapes."""
    from torch._dynamo import config
    from torch.fx.experimental import _config

    # Under symbols the cache of shapes takes longer than working them out again.
    cached = config.fake_tensor_cache_enabled and not active
    oblivious = _config.backed_size_oblivious or active
    with (
        config.patch(fake_tensor_cache_enabled=cached),
        _config.patch(backed_size_oblivious=oblivious),  # type: ignore[attr-defined]
    ):
        yield
