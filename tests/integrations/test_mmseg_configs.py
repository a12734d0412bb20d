"""The configurations for mmsegmentation hold what the authors' segmenters were trained with."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: make test-mmseg")

from mmengine.config import Config

from vitzoo._skeleton import without_memory
from vitzoo.integrations.mmseg import VitzooBackbone

CONFIGS = sorted(Path("configs/mmseg").glob("*.py"))
# The sheets' drop path, learning rate and images of a process; the authors' size of crops.
SETTINGS = {
    "biformer-base-fpn": (0.3, 2e-4, 4, 512),
    "biformer-base-upernet": (0.4, 6e-5, 2, 512),
    "biformer-small-fpn": (0.15, 2e-4, 4, 512),
    "biformer-small-upernet": (0.3, 6e-5, 2, 512),
    "davit-base-upernet": (0.3, 6e-5, 2, 512),
    "davit-small-upernet": (0.3, 6e-5, 2, 512),
    "davit-tiny-upernet": (0.3, 6e-5, 2, 512),
    "dinat-base-upernet": (0.5, 6e-5, 2, 512),
    "dinat-large-upernet": (0.3, 6e-5, 2, 640),
    "dinat-mini-upernet": (0.2, 6e-5, 2, 512),
    "dinat-small-upernet": (0.5, 6e-5, 2, 512),
    "dinat-tiny-upernet": (0.3, 6e-5, 2, 512),
    "dinat_s-base-upernet": (0.3, 6e-5, 2, 512),
    "dinat_s-large-upernet": (0.3, 6e-5, 2, 640),
    "dinat_s-small-upernet": (0.3, 6e-5, 2, 512),
    "dinat_s-tiny-upernet": (0.3, 6e-5, 2, 512),
    "litv2-base-fpn": (0.3, 1e-4, 2, 512),
    "litv2-medium-fpn": (0.2, 1e-4, 2, 512),
    "litv2-small-fpn": (0.2, 1e-4, 2, 512),
    "nat-base-upernet": (0.5, 6e-5, 2, 512),
    "nat-mini-upernet": (0.2, 6e-5, 2, 512),
    "nat-small-upernet": (0.5, 6e-5, 2, 512),
    "nat-tiny-upernet": (0.3, 6e-5, 2, 512),
}
# Stage by stage; the third repeats.
MIDDLE_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
DILATIONS = {
    "dinat": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
    "dinat-large": ((1, 20, 1), (1, 5, 1, 10), MIDDLE_640, (1, 2, 1, 2, 1)),
    "dinat_s": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "dinat_s-large": ((1, 20), (1, 10), MIDDLE_640, (1, 2)),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_hold_the_authors_settings(path: Path) -> None:
    name = path.stem.rpartition("-ade20k")[0].rpartition("-")[0]
    family = name.partition("-")[0]
    drop_path, rate, images, crop = SETTINGS[name]
    config = Config.fromfile(path)
    assert config.model.backbone.drop_path_rate == drop_path
    assert config.optim_wrapper.optimizer.lr == rate
    assert config.train_dataloader.batch_size == images
    assert config.model.test_cfg.mode == "whole"
    assert config.train_cfg.max_iters == (80000 if name.endswith("fpn") else 160000)
    sizes = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    used = sizes["RandomCrop"].crop_size
    assert tuple(config.model.data_preprocessor.size) == tuple(used)
    assert sizes["RandomResize"].scale == (4 * used[0], used[0])
    # A figure heads the setting that it was reached in, and no other.
    assert ("Published:" in path.read_text()) == (tuple(used) == (crop, crop))

    backbone = {**config.model.backbone, "pretrained": None}
    with without_memory():
        model = VitzooBackbone(**{k: v for k, v in backbone.items() if k != "type"}).maps.model
    assert model.norm_indices == (0, 1, 2, 3)
    if family == "biformer":
        assert config.sync_bn == "torch"
        regions = [m.n_win for m in model.modules() if hasattr(m, "n_win")]
        assert regions
        assert set(regions) == {8}
    if family == "litv2":
        windows = [
            {m.window_size for m in stage.modules() if hasattr(m, "window_size")}
            for stage in model.stages
        ]
        assert windows == [set(), set(), {2}, {1}]
    if family in ("nat", "dinat", "dinat_s"):
        table = DILATIONS.get(name.rpartition("-")[0], DILATIONS.get(family, ((1,),) * 4))
        for stage, pattern in zip(model.stages, table, strict=True):
            found = [
                m.dilation
                for m in stage.modules()
                if hasattr(m, "kernel_size") and hasattr(m, "rpb")
            ]
            assert found == [pattern[i % len(pattern)] for i in range(len(found))]
            assert len(found) >= len(pattern)
