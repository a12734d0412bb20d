"""Every registered image model against timm's contract and the zoo's own promises.

Tier 0 looks at every name on the meta device, tier 1 runs every name under 40 M parameters (at odd
sizes, in `make test-all`, every name under 100 M), tier 2 takes the smallest name of each distinct
set of module types. A new family gets all of it by being
registered; what cannot hold for a model is an entry of `vitzoo.info(name).limits` with its reason.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn

import vitzoo
from tests.registry_names import TIER_0, TIER_1, TIER_2, TIER_3, UNDER_100_M, by_name
from vitzoo._skeleton import without_memory
from vitzoo.attention.choices import record_choices, replay_choices
from vitzoo.ops import _dispatch

SMALL = (64, 64)
ODD = (97, 131)


@functools.lru_cache(maxsize=2)
def _pristine(name: str, shallow: bool) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(few_blocks(name) if shallow else {})).eval()


def build(name: str, *, shallow: bool = False) -> nn.Module:
    """A model of its own for this test, in eval mode."""
    return copy.deepcopy(_pristine(name, shallow))


@functools.lru_cache(maxsize=1)
def skeleton(name: str) -> nn.Module:
    """The whole model on the meta device, in eval mode; tests of a name share it."""
    with without_memory():
        return timm.create_model(name).eval()


@functools.cache
def few_blocks(name: str) -> dict[str, Any]:
    """Arguments that leave few blocks, where depth can be given: most checks cost by the block."""
    arguments = inspect.signature(type(skeleton(name)).__init__).parameters
    if "depths" in arguments:
        return {"depths": (1, 1, 2, 1)}
    return {"depth": 2} if "depth" in arguments else {}


def images(name: str, size: tuple[int, int], batch: int = 2) -> Tensor:
    """Random images; a model of fixed size gets that size."""
    record = vitzoo.info(name)
    if record.fixed_input_size:
        size = record.input_size[1:]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def needs(name: str, check: str) -> None:
    """Skip what the model's own record says cannot hold."""
    reason = vitzoo.info(name).limits.get(check)
    if reason:
        pytest.skip(reason)


@functools.cache
def default_levels(name: str, **arguments: Any) -> tuple[int, ...]:
    """The stages (blocks of a net of one scale) that `features_only` returns unless told."""
    with without_memory():
        model = timm.create_model(name, features_only=True, **arguments)
    return tuple(model.feature_info.out_indices)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """One forward pass without gradients."""
    with torch.no_grad():
        return model(x)


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Largest difference, relative to max(1, largest value), at most `bound`."""
    scale = max(1.0, expected.abs().max().item())
    worst = (found - expected).abs().max().item() / scale
    assert worst <= bound, f"off by {worst:.2e} of the scale"


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Tier 0


@by_name(TIER_0)
def test_parameter_count_is_the_references(name: str) -> None:
    record = vitzoo.info(name)
    if record.params is None:
        needs(name, "parameter_count")
    assert sum(p.numel() for p in skeleton(name).parameters()) == record.params


@by_name(TIER_0)
def test_default_configuration_is_true(name: str) -> None:
    record, cfg = vitzoo.info(name), get_pretrained_cfg(name)
    assert cfg is not None
    assert tuple(cfg.input_size) == record.input_size
    assert cfg.fixed_input_size == record.fixed_input_size
    model, x = skeleton(name), torch.empty(1, *cfg.input_size, device="meta")
    weights = {key for key, _ in model.named_parameters()}
    classifiers = [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier
    if cfg.num_classes:
        assert {f"{c}.weight" for c in classifiers} <= weights
    assert f"{cfg.first_conv}.weight" in weights
    assert model.num_classes == cfg.num_classes
    features = model.forward_features(x)
    if features.dim() == 4:
        assert tuple(features.shape[-2:]) == tuple(cfg.pool_size)
        assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@by_name(TIER_0)
def test_feature_info_matches_the_record(name: str) -> None:
    record = vitzoo.info(name)
    with without_memory():
        model = timm.create_model(name, features_only=True)
    size = record.input_size[1:] if record.fixed_input_size else (96, 160)
    maps = model(torch.empty(2, 3, *size, device="meta"))
    assert tuple(model.feature_info.channels()) == record.channels
    assert tuple(model.feature_info.reduction()) == record.strides
    for x, channels, stride in zip(maps, record.channels, record.strides, strict=True):
        assert tuple(x.shape) == (2, channels, size[0] // stride, size[1] // stride)


@by_name(TIER_0)
def test_head_can_be_replaced_and_removed(name: str) -> None:
    few = few_blocks(name)
    x = images(name, SMALL).to("meta")
    with without_memory():
        model = timm.create_model(name, **few).eval()
        bare = timm.create_model(name, num_classes=0, global_pool="", **few).eval()
    features = model.forward_features(x)
    with torch.device("meta"):
        model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == bare(x).shape == features.shape


@by_name(TIER_0)
def test_unknown_arguments_raise(name: str) -> None:
    with without_memory(), pytest.raises(TypeError):
        timm.create_model(name, window_siez=3)


@by_name(TIER_0)
def test_parameter_groups_cover_the_model(name: str) -> None:
    model = skeleton(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    names = {key for key, p in model.named_parameters() if p.requires_grad}
    grouped = {key for members in groups.values() for key in members}
    assert names <= grouped
    assert len(groups) > len(model.feature_info)
    assert set(model.no_weight_decay()) <= {key for key, _ in model.named_parameters()}


# Tier 1


@by_name(UNDER_100_M, quick=TIER_1)
def test_forward_at_odd_sizes(name: str, no_warnings: None) -> None:
    needs(name, "any_size")
    model = build(name)
    for size in [(32, 32), ODD]:
        out = logits(model, images(name, size, batch=1))
        assert out.shape == (1, model.num_classes)
        assert out.isfinite().all()


@by_name(TIER_1)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(name).train()
    model(images(name, SMALL)).square().mean().backward()
    missing = [
        key
        for key, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not missing


@by_name(UNDER_100_M, quick=TIER_1)
def test_maps_have_their_strides_at_odd_sizes(name: str) -> None:
    record = vitzoo.info(name)
    x = images(name, ODD, batch=1)
    model = build(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=default_levels(name))
        assert_close(final, model.forward_features(x), 0.0)
    heights, widths = (record.map_sides(side) for side in x.shape[-2:])
    shapes = list(zip(record.channels, heights, widths, strict=True))
    assert [tuple(found.shape[1:]) for found in maps] == shapes


@by_name(TIER_1)
def test_saved_weights_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    x = images(name, SMALL)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_close(logits(again, x), logits(model, x), 0.0)


@by_name(TIER_1)
def test_bfloat16(name: str) -> None:
    model = build(name)
    x = images(name, SMALL)
    expected = logits(model, x)
    found = logits(model.bfloat16(), x.bfloat16())
    assert found.dtype == torch.bfloat16
    if vitzoo.info(name).choices:
        assert found.isfinite().all()
    else:
        assert_close(found.float(), expected, 0.1)


@by_name(TIER_1)
def test_images_do_not_see_their_batch(name: str) -> None:
    model = build(name)
    x = images(name, SMALL, batch=3)
    with record_choices() as made:
        together = logits(model, x)
    alone = []
    for i in range(len(x)):
        with replay_choices([choice[i : i + 1] for choice in made]):
            alone.append(logits(model, x[i : i + 1]))
    assert_close(torch.cat(alone), together, 1e-5)


# Tier 2: few blocks of each kind here, the whole model in `make test-all`. Of tracing, which costs
# seconds a model, only the smallest name of each family here (tier 3)


FULL = pytest.param(False, marks=pytest.mark.slow, id="full")
DEPTHS = pytest.mark.parametrize("shallow", [pytest.param(True, id="shallow"), FULL])


@by_name(TIER_2)
@DEPTHS
def test_autocast(name: str, shallow: bool) -> None:
    model = build(name, shallow=shallow)
    x = images(name, SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(x).float().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@by_name(TIER_2)
@DEPTHS
def test_channels_last(name: str, shallow: bool) -> None:
    model = build(name, shallow=shallow)
    x = images(name, ODD)
    with record_choices() as made:
        expected = logits(model, x)
    with replay_choices(made):
        found = logits(model, x.contiguous(memory_format=torch.channels_last))
    assert_close(found, expected, 1e-5)


@by_name(TIER_2)
@DEPTHS
def test_gradient_checkpointing(name: str, shallow: bool) -> None:
    model = build(name, shallow=shallow)
    x = images(name, SMALL)
    expected = logits(model, x)
    plain = model(x).square().mean()
    wanted = torch.autograd.grad(plain, [p for p in model.parameters() if p.requires_grad])
    model.set_grad_checkpointing()
    assert_close(logits(model, x), expected, 0.0)
    with torch.no_grad():
        assert_close(model.forward_intermediates(x)[0], model.forward_features(x), 0.0)
    found = torch.autograd.grad(
        model(x).square().mean(), [p for p in model.parameters() if p.requires_grad]
    )
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 1e-5)


@functools.lru_cache(maxsize=2)
def expected_maps(name: str, shallow: bool) -> list[Tensor]:
    """The maps of two images from the model itself."""
    levels = default_levels(name, **(few_blocks(name) if shallow else {}))
    with torch.no_grad():
        return _pristine(name, shallow).forward_intermediates(
            images(name, SMALL), indices=levels, intermediates_only=True
        )


@by_name(TIER_2)
@DEPTHS
@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "fx", "getter"])
def test_feature_wrappers_agree(name: str, shallow: bool, wrapper: str) -> None:
    needs(name, f"features_{wrapper}")
    arguments = few_blocks(name) if shallow else {}
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, feature_cls=wrapper, **arguments).eval()
    with torch.no_grad():
        maps = extractor(images(name, SMALL))
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    for found, map_ in zip(maps, expected_maps(name, shallow), strict=True):
        assert_close(found, map_, 1e-5)


@by_name(TIER_2)
@DEPTHS
def test_chosen_features(name: str, shallow: bool) -> None:
    arguments = few_blocks(name) if shallow else {}
    model = timm.create_model(name, features_only=True, out_indices=(-1,), **arguments).eval()
    x = images(name, SMALL)
    (last,) = model(x)
    assert last.shape[1] == vitzoo.info(name).channels[-1]


@by_name(TIER_2)
def test_an_empty_batch(name: str) -> None:
    needs(name, "empty_batch")
    model = build(name, shallow=True)
    x = images(name, (224, 224), batch=0)
    assert logits(model, x).shape == (0, 1000)
    model(x).sum().backward()


def hear(layers: dict[str, nn.Module], heard: set[str]) -> None:
    """Hook every layer, as captures of activations and offloading do."""
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: heard.add(key))


def replace(layers: dict[str, nn.Module], heard: set[str]) -> None:
    """Give every layer another class, as adapters and quantisation do."""
    for key, layer in layers.items():

        def forward(self: nn.Module, *x: Tensor, key: str, before: type[nn.Module]) -> Tensor:
            heard.add(key)
            return before.forward(self, *x)

        before = type(layer)
        called = functools.partialmethod(forward, key=key, before=before)
        layer.__class__ = type(before.__name__, (before,), {"forward": called})


@by_name(TIER_2)
@DEPTHS
@pytest.mark.parametrize(
    ("touch", "with_gradients"), [(hear, False), (replace, False), (replace, True)]
)
def test_no_layer_is_passed_over_that_somebody_touched(
    name: str, shallow: bool, touch: Any, with_gradients: bool
) -> None:
    model, x = build(name, shallow=shallow), images(name, SMALL)
    kinds = nn.Linear | nn.Conv2d
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, kinds)}
    heard: set[str] = set()
    with torch.set_grad_enabled(with_gradients):
        expected = model(x)
        touch(layers, heard)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert set(layers) - heard == set()


@by_name(TIER_2)
@DEPTHS
def test_fx_trace_is_exact(name: str, shallow: bool) -> None:
    needs(name, "fx")
    model = build(name, shallow=shallow)
    x = images(name, SMALL)
    _, nodes = get_graph_node_names(model)
    traced = create_feature_extractor(model, {nodes[-1]: "out"})
    with torch.no_grad():
        assert_close(traced(x)["out"], logits(model, x), 0.0)
    traced.train()(x)["out"].square().mean().backward()
    assert all(p.grad is not None for p in traced.parameters() if p.requires_grad)


@by_name(TIER_2, quick=TIER_3)
@DEPTHS
def test_compiles_once_as_one_graph(
    name: str, shallow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name, "compile")
    torch._dynamo.reset()
    # As in a process whose first call is a compiled one.
    monkeypatch.setattr(_dispatch, "_environment", None)
    monkeypatch.setattr(_dispatch, "_reported", set())
    model = build(name, shallow=shallow)
    x = images(name, SMALL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = logits(compiled, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(logits(compiled, x), first)
        # Nor does a call of the model itself make it another one.
        assert_close(first, logits(model, x), 1e-5)
        assert torch.equal(logits(compiled, x), first)


@by_name(TIER_2, quick=TIER_3)
@DEPTHS
def test_exports_with_dynamic_batch(name: str, shallow: bool) -> None:
    needs(name, "export")
    model = build(name, shallow=shallow)
    x = images(name, SMALL)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = images(name, SMALL, batch=3)
    assert_close(logits(program.module(), more), logits(model, more), 1e-5)


@by_name(TIER_2)
@DEPTHS
def test_other_image_channels_and_classes(name: str, shallow: bool) -> None:
    arguments = few_blocks(name) if shallow else {}
    model = timm.create_model(name, in_chans=1, num_classes=3, **arguments).eval()
    x = images(name, SMALL)[:, :1]
    assert logits(model, x).shape == (2, 3)
