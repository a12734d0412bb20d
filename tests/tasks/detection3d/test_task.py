"""Detection in LiDAR sweeps through the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden_cases import load_case
from vitzoo._skeleton import without_memory
from vitzoo.errors import InputError
from vitzoo.tasks import task_class
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection3d.synthetic import draw_frame

pytest.importorskip("omegaconf")
pytest.importorskip("accelerate")

from vitzoo.engine.recipe import find_recipe, load_recipe, merge
from vitzoo.engine.train import train

TINY = {
    "task": "detection3d",
    "model": {
        "point_range": [-25.6, -25.6, -1, 25.6, 25.6, 5],
        "pillar_size": [1.6, 1.6],
        "pillar_dims": [4, 8],
        "args": {"depth": 1, "num_heads": 2, "group_size": 16, "window_size": 5},
        "neck": {"dims": [8], "depths": [0], "strides": [1], "out_dim": 8},
        "head": {"dim": 8, "velocity": False},
        "decode": {"nms_before": 50, "max_candidates": 200},
    },
    "data": {"train_first": 2, "val_first": 1, "batch_size": 2, "workers": 0},
    "augment": {"paste": {"car": 2}, "paste_frames": 2},
    "schedule": {"epochs": 1},
}


def build(*overrides: str) -> object:
    recipe = merge(TINY, overrides)
    return task_class("detection3d")(recipe.options)


def test_a_run_and_its_predictions(tmp_path: Path) -> None:
    recipe = merge(TINY, [f"run.folder={tmp_path}", "run.name=tiny"])
    summary = train(recipe)
    assert set(summary.metrics) >= {"AP", "CDS", "AP3D", "AP/car"}
    task = build("model.decode.score_threshold=0.0")
    task.model = task.build_model().eval()
    points = draw_frame(0).points
    far = torch.tensor([[100.0, 0, 0, 0], [float("nan"), 0, 0, 0]])
    np.save(tmp_path / "sweep.npy", torch.cat([points, far]).numpy())
    from_file, from_memory = task.predict([str(tmp_path / "sweep.npy"), points.numpy()])
    assert len(from_file.found)
    assert torch.equal(from_file.found.boxes, from_memory.found.boxes)
    written = json.loads(json.dumps(from_file.to_dict()))
    assert written["dropped"] == from_memory.to_dict()["dropped"] + 2
    assert set(written["boxes"][0]) == {"label", "index", "score", "centre", "size", "yaw"}
    summary = from_file.summary(min_score=0.0)
    assert summary.endswith(f"({len(from_file.points)} points, {from_file.dropped} dropped)")
    assert "car" in summary
    picture = from_file.draw(side=200, min_score=0.0)
    assert picture.size == (200, 200)
    assert len(picture.getcolors(maxcolors=1 << 16)) > 3
    none = replace(from_file, points=points[:0], found=from_file.found[:0])
    assert none.summary().startswith("nothing with a score of 0.3 or more (0 points")
    # The vehicle is drawn in the middle.
    assert none.draw(side=200).getpixel((100, 100)) != none.draw(side=200).getpixel((150, 150))
    with pytest.raises(InputError, match=r"points must be \(N, 4\)"):
        task.predict([points.numpy()[:, :3]])
    with pytest.raises(UnreadableSample, match="no such file"):
        task.predict(["missing.bin"])


def test_wrong_recipes_give_a_sentence() -> None:
    for overrides, message in (
        (["model.name=vz_davit_tiny"], "takes no points; those that do: vz_flatformer"),
        (["model.pillar_size=[0.0,1.0]"], "model.pillar_size"),
        (["data.classes=[car,truck]"], "synthetic has no 'truck'"),
        (["data.name=npz"], "data.classes is not set"),
    ):
        with pytest.raises(InputError, match=message):
            build(*overrides)
    for overrides, message in (
        (["model.args.halo=3"], "cannot build the detector"),
        (["model.decode.score=0.1"], "model.decode has no 'score'"),
        (["model.decode.nms_thresholds=[0.1]"], "nms_thresholds has 1 values for 3 classes"),
        (["model.checkpoint=none.pth"], "no weights file"),
    ):
        with pytest.raises(InputError, match=message):
            build(*overrides).build_model()
    for overrides, message in (
        (["data.name=kitti"], "data.root is not set"),
        (["augment.paste={truck: 3}"], "augment.paste: class 'truck'"),
    ):
        with pytest.raises(InputError, match=message):
            build(*overrides).build_data()


@pytest.mark.parametrize(
    "name",
    [
        "flatformer-waymo-1sweep",
        "flatformer-waymo-2sweeps",
        "flatformer-waymo-3sweeps",
        "flatformer-av2",
        "flatformer-kitti",
        "flatformer-synthetic",
    ],
)
def test_recipes_build(name: str) -> None:
    recipe = load_recipe(str(find_recipe(name)))
    task = task_class(recipe.task)(recipe.options)
    with without_memory():
        model = task.build_model()
    parameters = sum(p.numel() for p in model.parameters())
    if "waymo" in name:
        assert parameters == 2_268_110
        assert task.labels == ("car", "pedestrian", "cyclist")
        assert recipe.options.data.sweeps == int(name.rpartition("-")[2][0])
    assert len(task.labels) == model.num_classes


def test_an_authors_checkpoint_starts_a_recipe(tmp_path: Path) -> None:
    case = load_case("flatformer", "detector_small_b1")
    file = case.save(tmp_path)
    overrides = [f"model.checkpoint={file}", "model.point_range=[-15.36,-15.36,-2,15.36,15.36,4]"]
    recipe = load_recipe("flatformer-waymo-1sweep", overrides)
    task = task_class(recipe.task)(recipe.options)
    model = task.build_model().eval()
    points = torch.from_numpy(case.outputs["points"])
    with torch.inference_mode():
        found = model([points])[0]
    case.check("scores0", found.scores)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pth")
    recipe.options.model.checkpoint = str(tmp_path / "ours.pth")
    again = task.build_model()
    assert torch.equal(again.neck.stages[0][0].conv.weight, model.neck.stages[0][0].conv.weight)
