"""Maps of any backbone: the layer groups and output norms that every head is given."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters

from tests.registry_names import TIER_0
from vitzoo._skeleton import without_memory
from vitzoo.heads.detection import build_detector
from vitzoo.heads.pyramid import Maps, groups_under
from vitzoo.heads.segmentation import build_segmenter

# Models whose patterns are alternatives, a list, or one of each, beside the zoo's.
TIMMS = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"]


@pytest.mark.parametrize("name", [*TIER_0, *TIMMS])
def test_layer_groups_are_the_same_within_another_model(name: str) -> None:
    with without_memory():
        model = timm.create_model(name)
    outer = torch.nn.Module()
    outer.part = model
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        alone = group_parameters(model, matcher, reverse=True)
        within = group_parameters(outer, groups_under("part.", matcher), reverse=True)
        assert within == {f"part.{key}": group for key, group in alone.items()}


def test_what_alternatives_name_stays_in_the_first_group_of_a_head() -> None:
    with without_memory():
        for name in ("vz_lookupvit_small", "vz_sparsifiner_deit_tiny"):
            for model in (
                build_segmenter(name, head="fpn", num_classes=2),
                build_detector(name, head="retinanet", num_classes=2),
            ):
                groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
                stem = {group for key, group in groups.items() if "patch_embed" in key}
                assert stem == {0}


def test_segmenters_norm_every_map_where_the_authors_do() -> None:
    def normed(name: str, **kwargs: object) -> tuple[int, ...] | None:
        with without_memory():
            maps = Maps(name, strides=(4, 8, 16, 32), **kwargs)
        return getattr(maps.model, "norm_indices", None)

    assert normed("vz_litv2_small") == (1, 2, 3)
    assert normed("vz_litv2_small", norm_all=True) == (0, 1, 2, 3)
    assert normed("vz_litv2_small", norm_all=True, norm_indices=(2, 3)) == (2, 3)
    assert normed("vz_halonet26t", norm_all=True) is None
