"""mmsegmentation with the zoo's backbones; `make test-mmseg` installs what these need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: make test-mmseg")

import mmcv
import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from tests.golden_cases import load_case
from vitzoo._skeleton import without_memory
from vitzoo.errors import InputError
from vitzoo.integrations.mmseg import VitzooBackbone, install_stand_in
from vitzoo.integrations.mmseg.ops import point_sample, sigmoid_focal_loss

CONFIGS = sorted(Path("configs/mmseg").glob("*.py"))
LITV2 = "configs/mmseg/litv2-small-fpn-80k-ade20k.py"
SMALL: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "embed_dims": [8, 16, 16, 24],
    "num_heads": [1, 2, 2, 3],
    "window_size": 4,
}


@pytest.fixture(autouse=True)
def fresh_scope() -> None:
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)


def build(model: Any) -> Any:
    from mmseg.registry import MODELS

    built = MODELS.build(ConfigDict(model))
    return revert_sync_batchnorm(built)


def small_segmenter(config: str) -> Any:
    """A config's model with a narrow backbone and two classes."""
    model = Config.fromfile(f"configs/mmseg/{config}").model
    channels = SMALL["embed_dims"]
    model.backbone = {
        "type": "VitzooBackbone",
        "name": "vz_davit_tiny",
        "drop_path_rate": 0.1,
        "args": SMALL,
    }
    model.decode_head.update(num_classes=2, channels=16)
    if "neck" in model:
        model.neck.update(in_channels=channels, out_channels=16)
        model.decode_head.in_channels = [16] * 4
    else:
        model.decode_head.in_channels = channels
        model.auxiliary_head.update(in_channels=channels[2], channels=16, num_classes=2)
    model.data_preprocessor.size = (64, 64)
    return model


def samples(count: int, height: int, width: int) -> dict[str, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    found = []
    for _ in range(count):
        sample = SegDataSample(
            metainfo={"img_shape": (height, width), "ori_shape": (height, width)}
        )
        labels = torch.randint(0, 2, (1, height, width))
        sample.gt_sem_seg = PixelData(data=labels)
        found.append(sample)
    images = [torch.randint(0, 255, (3, height, width), dtype=torch.uint8) for _ in range(count)]
    return {"inputs": images, "data_samples": found}


def test_the_stand_in_is_explicit() -> None:
    assert mmcv.ops.vitzoo_stand_in
    assert install_stand_in()
    with pytest.raises(ModuleNotFoundError, match="deform_conv2d needs the full mmcv"):
        _ = mmcv.ops.deform_conv2d


def test_the_stand_in_never_replaces_compiled_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    real = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "mmcv.ops")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "mmcv._ext" else real(name)
    )
    assert not install_stand_in()
    assert "mmcv.ops" not in sys.modules


def test_operators_of_the_stand_in() -> None:
    maps = torch.arange(12.0).reshape(1, 1, 3, 4)
    middle = torch.tensor([[[0.125, 1 / 6], [0.875, 5 / 6]]])
    assert point_sample(maps, middle).flatten().tolist() == pytest.approx([0.0, 11.0], abs=1e-5)
    assert point_sample(maps, middle[:, None]).shape == (1, 1, 1, 2)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    p, right = logits.sigmoid(), torch.eye(4)[target][:, :3]
    expected = -(right * 0.25 * (1 - p) ** 2 * p.log() + (1 - right) * 0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, reduction="none"), expected)
    weight = torch.tensor([2.0, 1.0, 1.0])
    scale = torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0])[:, None]
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, target, weight=weight), (expected * scale).sum() / 5
    )


@pytest.mark.parametrize(
    "config", ["davit-tiny-upernet-160k-ade20k.py", "litv2-small-fpn-80k-ade20k.py"]
)
def test_losses_gradients_and_inference(config: str) -> None:
    model = build(small_segmenter(config)).train()
    data = model.data_preprocessor(samples(2, 64, 64), training=True)
    losses = model(**data, mode="loss")
    sum(value for key, value in losses.items() if "loss" in key).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # UPerNet's classifier of mmsegmentation has no parameter besides those that are used.
    assert not missing
    found = model.eval().test_step(samples(1, 45, 70))
    assert found[0].pred_sem_seg.data.shape == (1, 45, 70)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_build(path: Path) -> None:
    config = Config.fromfile(path)
    model = config.model
    assert config.train_dataloader.dataset.type == "ADE20KDataset"
    assert {"type": "PlainHistoryHook"} in config.custom_hooks
    model.backbone.pretrained = None
    with without_memory():
        backbone = build(model.backbone)
    expected = model.neck.in_channels if "neck" in model else model.decode_head.in_channels
    assert list(backbone.channels) == list(expected)


def runner_config(folder: Path, **values: Any) -> Config:
    """Two iterations on generated pictures, then validation."""
    data = folder / "data"
    if not data.exists():
        rng = np.random.default_rng(0)
        for kind in ("images", "masks"):
            (data / kind).mkdir(parents=True)
        for i in range(4):
            picture = rng.integers(0, 255, (70, 80, 3), np.uint8)
            Image.fromarray(picture).save(data / "images" / f"{i}.png")
            mask = (picture[..., 0] > 128).astype(np.uint8)
            Image.fromarray(mask).save(data / "masks" / f"{i}.png")
    config = Config.fromfile("configs/mmseg/davit-tiny-upernet-160k-ade20k.py")
    config.model = small_segmenter("davit-tiny-upernet-160k-ade20k.py")
    config.model.decode_head.norm_cfg = {"type": "BN"}
    config.model.auxiliary_head.norm_cfg = {"type": "BN"}
    resize, masks = {"type": "Resize", "scale": (64, 64)}, {"type": "LoadAnnotations"}
    for name, steps in (("train_dataloader", [masks, resize]), ("val_dataloader", [resize, masks])):
        loader = config[name]
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset = {
            "type": "BaseSegDataset",
            "data_root": str(data),
            "metainfo": {"classes": ["dark", "light"], "palette": [[0, 0, 0], [255, 255, 255]]},
            "data_prefix": {"img_path": "images", "seg_map_path": "masks"},
            "img_suffix": ".png",
            "seg_map_suffix": ".png",
            # Validation compares at the mask's own size, so only training resizes the mask.
            "pipeline": [{"type": "LoadImageFromFile"}, *steps, {"type": "PackSegInputs"}],
        }
    config.test_dataloader = config.val_dataloader
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint.interval = 1
    config.default_hooks.logger.interval = 1
    config.env_cfg.dist_cfg.backend = "gloo"
    config.randomness = {"seed": 0}
    config.work_dir = str(folder / "work")
    config.merge_from_dict(values)
    return config


def test_a_run_stops_and_goes_on(tmp_path: Path) -> None:
    Runner.from_cfg(runner_config(tmp_path)).train()
    file = tmp_path / "work" / "iter_2.pth"
    # The safe loader of torch, with nothing added to its list of functions.
    written = torch.load(file, weights_only=True)
    assert "vitzoo_history" in str(written["message_hub"]["log_scalars"])
    again = Runner.from_cfg(
        runner_config(
            tmp_path,
            **{
                "resume": True,
                "train_cfg.max_iters": 4,
                "load_from": str(file),
                "experiment_name": "again",
            },
        )
    )
    again.train()
    assert again.iter == 4
    history = again.message_hub.get_scalar("train/loss")
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 4
    for group in again.optim_wrapper.optimizer.state_dict()["state"].values():
        assert group["step"] == 4


@pytest.mark.parametrize(
    ("name", "family", "case_name", "args"),
    [
        ("vz_litv2_small", "litv2", "litv2_small_dense_224", {}),
        ("vz_davit_tiny", "davit", "davit_tiny_dense_224", {}),
        ("vz_nat_mini", "nat", "nat_mini_224", {}),
        ("vz_dinat_mini", "nat", "dinat_mini_224", {}),
    ],
)
def test_the_authors_segmenters_load_by_their_own_names(
    name: str, family: str, case_name: str, args: dict[str, Any]
) -> None:
    weights = load_case(family, case_name).weights()
    weights = {"backbone." + key: value for key, value in weights.items()}
    weights = {
        key: value
        for key, value in weights.items()
        if not key.startswith(("backbone.head.", "backbone.norm."))
    }
    model = torch.nn.Module()
    model.backbone = VitzooBackbone(name, args=args)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _load_checkpoint_to_model(model, {"state_dict": dict(weights)}, strict=False)
    after = model.state_dict()
    kept = [key for key in after if torch.equal(after[key], before[key])]
    # A classifier's file has none of the output norms; zeros and ones may be as they were.
    assert all("norm" in key or key.endswith(("bias", "running_mean")) for key in kept), kept
    assert len(kept) < len(after) / 3
    assert sum(value.numel() for value in weights.values()) >= sum(
        after[key].numel() for key in after if key not in kept
    )


def test_the_authors_litv2_segmenter_has_a_norm_on_every_stage() -> None:
    weights = load_case("litv2", "litv2_small_dense_224").weights()
    weights |= {"norm0.weight": torch.full((96,), 3.0), "norm0.bias": torch.full((96,), 2.0)}
    model, config = torch.nn.Module(), Config.fromfile(LITV2).model.backbone
    config.pretrained = None
    model.backbone = build(config)
    given = {f"backbone.{key}": value for key, value in weights.items()}
    found = model.load_state_dict(given, strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    norm = model.backbone.maps.model.get_submodule("norm0")
    assert (norm.weight == 3).all()
    assert (norm.bias == 2).all()


def test_pretrained_files_and_frozen_stages(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    classifier = timm.create_model("vz_davit_tiny", num_classes=3, **SMALL)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": classifier.state_dict()}, file)
    for given in (
        {"pretrained": str(file)},
        {"init_cfg": {"type": "Pretrained", "checkpoint": str(file)}},
    ):
        backbone = VitzooBackbone(
            "vz_davit_tiny", args=SMALL, frozen_stages=2, output_norm={"type": "BN"}, **given
        )
        backbone.init_weights()
        own = backbone.maps.model
        assert torch.equal(own.stem.conv.weight, classifier.stem.conv.weight)
        backbone.train()
        assert not own.stem.conv.weight.requires_grad
        assert not own.stages[1].blocks.training
        assert own.stages[2].blocks.training
        maps = backbone(torch.randn(2, 3, 64, 96))
        assert [found.shape[1:] for found in maps] == [
            (8, 16, 24),
            (16, 8, 12),
            (16, 4, 6),
            (24, 2, 3),
        ]
    with pytest.raises(ValueError, match="type Pretrained or None"):
        VitzooBackbone("vz_davit_tiny", args=SMALL, init_cfg={"type": "Kaiming"})


def test_a_file_of_another_depth_is_refused(tmp_path: Path) -> None:
    import timm

    file = tmp_path / "deeper.pth"
    deeper = timm.create_model("vz_davit_tiny", num_classes=3, **{**SMALL, "depths": [1, 1, 3, 1]})
    torch.save({"state_dict": deeper.state_dict()}, file)
    with pytest.raises(InputError, match=r"does not fit: .* unexpected"):
        VitzooBackbone("vz_davit_tiny", args=SMALL, pretrained=str(file)).init_weights()


@pytest.mark.parametrize("name", ["resnet18", "vz_halonet26t", "vz_sparsifiner_deit_tiny"])
def test_files_of_other_kinds_of_nets_load(name: str, tmp_path: Path) -> None:
    import timm

    file = tmp_path / "weights.pth"
    model = timm.create_model(name, num_classes=3)
    torch.save(model.state_dict(), file)
    backbone = VitzooBackbone(name, pretrained=str(file))
    backbone.init_weights()
    own, given = backbone.maps.model.state_dict(), model.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in own.items())


def test_nets_of_one_scale_and_of_timm() -> None:
    for name in ("resnet18", "vz_sparsifiner_deit_tiny"):
        backbone = VitzooBackbone(name, out_indices=(1, 2, 3)).eval()
        with torch.inference_mode():
            maps = backbone(torch.randn(1, 3, 64, 96))
        assert [found.shape[-2:] for found in maps] == [(8, 12), (4, 6), (2, 3)]


def test_versions() -> None:
    assert mmengine.__version__ == "0.10.7"
