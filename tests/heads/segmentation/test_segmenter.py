"""Segmenters over every family: sizes, losses, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vitzoo
from tests.registry_names import TIER_0, TIER_1, by_name, parameters
from vitzoo.engine.optim import build_optimizer
from vitzoo.engine.recipe import OptimOptions
from vitzoo.heads.segmentation import HEADS

FREE = [name for name in TIER_0 if not vitzoo.info(name).fixed_input_size]


def smallest_of_each_family() -> list[str]:
    found: dict[str, str] = {}
    for name in sorted(FREE, key=parameters):
        found.setdefault(vitzoo.info(name).family, name)
    return list(found.values())


# Narrow decoders: their width costs most of the time and decides nothing here.
WIDTHS: dict[str, dict[str, Any]] = {
    "upernet": {"decoder_channels": 32},
    "fpn": {"pyramid_channels": 32, "segmentation_channels": 32},
    "segformer": {"segmentation_channels": 32},
    "dpt": {"intermediate_channels": [32, 32, 64, 64], "fusion_channels": 32},
    "unet": {"decoder_channels": [64, 32, 32, 16, 16]},
}


def check(name: str, head: str, *, aux: bool = False) -> None:
    """A loss on images of odd sides, a gradient everywhere, logits of the image's size."""
    torch.manual_seed(0)
    model = vitzoo.build_segmenter(
        name, head=head, num_classes=3, aux=aux, head_args=WIDTHS[head]
    ).train()
    images, targets = torch.randn(2, 3, 61, 75), torch.randint(0, 3, (2, 61, 75))
    found = model(images)
    outputs = found.values() if isinstance(found, dict) else [found]
    assert isinstance(found, dict) == aux
    loss = sum(F.cross_entropy(logits, targets) for logits in outputs)
    loss.backward()  # type: ignore[union-attr]
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient: {missing}"
    with torch.inference_mode():
        logits = model.eval()(torch.randn(1, 3, 45, 97))
    assert logits.shape == (1, 3, 45, 97)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("head", ["upernet", "fpn"])
@by_name(smallest_of_each_family())
def test_smallest_of_each_family(name: str, head: str) -> None:
    check(name, head)


@pytest.mark.slow
@pytest.mark.parametrize("head", list(HEADS))
@by_name([name for name in TIER_1 if name in FREE])
def test_every_name_and_head(name: str, head: str) -> None:
    check(name, head, aux=True)


def tiny(head: str, **kwargs: Any) -> torch.nn.Module:
    return vitzoo.build_segmenter(
        "vz_davit_tiny",
        head=head,
        num_classes=4,
        depths=[1, 1, 1, 1],
        embed_dims=[16, 16, 32, 32],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        **kwargs,
    )


@pytest.mark.parametrize("head", list(HEADS))
def test_every_head_over_one_backbone_and_over_timms(head: str) -> None:
    for model in (tiny(head), vitzoo.build_segmenter("resnet18", head=head, num_classes=4)):
        with torch.inference_mode():
            assert model.eval()(torch.randn(2, 3, 33, 50)).shape == (2, 4, 33, 50)


def test_cropping_shows_the_image_where_it_is() -> None:
    model = tiny("fpn").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        whole = model(F.pad(image, (0, 0, 0, 0)))
        cut = model(image[..., :50, :70])
        padded = model(F.pad(image[..., :50, :70], (0, 26, 0, 14)))
    assert whole.shape[-2:] == (64, 96)
    torch.testing.assert_close(cut, padded[..., :50, :70])


def test_auxiliary_logits_in_training_only() -> None:
    model = tiny("upernet", aux=True)
    found = model.train()(torch.randn(2, 3, 40, 40))
    assert {key: value.shape for key, value in found.items()} == {
        "out": (2, 4, 40, 40),
        "aux": (2, 4, 40, 40),
    }
    assert isinstance(model.eval()(torch.randn(1, 3, 40, 40)), torch.Tensor)


def test_layer_groups_and_exemptions_follow_the_backbone() -> None:
    from timm.models import group_parameters

    model = tiny("upernet")
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert groups["backbone.body.model.stem.conv.weight"] == 0
    assert max(groups[n] for n in groups if n.startswith("backbone.body.model.stages")) == 4
    assert groups["decoder.classifier.0.weight"] == max(groups.values())
    resnet = vitzoo.build_segmenter("resnet10t", head="fpn", num_classes=2)
    assert resnet.no_weight_decay() == set()
    assert build_optimizer(resnet, OptimOptions(), images=1).param_groups
    nat = vitzoo.build_segmenter("vz_nat_mini", head="fpn", num_classes=2, depths=(1, 1, 1, 1))
    names = dict(nat.named_parameters())
    assert nat.no_weight_decay()
    assert all(name in names for name in nat.no_weight_decay())


def test_wrong_arguments_give_a_sentence() -> None:
    for kwargs, message in (
        ({"head": "psp"}, "unknown head 'psp'; known: upernet, fpn"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"head_args": {"width": 3}}, "do not fit upernet"),
    ):
        with pytest.raises(ValueError, match=message):
            vitzoo.build_segmenter("resnet18", **{"num_classes": 2, **kwargs})
