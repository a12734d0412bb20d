"""Detection in images through the engine, on generated scenes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omegaconf")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")
pytest.importorskip("skimage")

from tests.recipes import recipes_of
from vitzoo._skeleton import without_memory
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.predict import predict
from vitzoo.engine.recipe import load_recipe, merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks import task_class
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection.augment import crop, mirror
from vitzoo.tasks.detection.coco import CocoImages
from vitzoo.tasks.detection.metrics import coco_metrics, coco_results
from vitzoo.tasks.scenes import build_scenes
from vitzoo.tasks.scenes.build import CATEGORY_IDS

TINY = {
    "task": "detection",
    "model": {
        "name": "vz_davit_tiny",
        "args": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 64], "num_heads": [1, 1, 2, 4]},
        "channels": 16,
        "anchor_sizes": [16, 32, 64, 96, 128],
        "head_args": {"box_score_thresh": 0.0, "box_detections_per_img": 10},
    },
    "data": {
        "train_annotations": "annotations/instances_train.json",
        "val_annotations": "annotations/instances_val.json",
        "train_images": "images/train",
        "val_images": "images/val",
        "min_size": [64, 96],
        "max_size": 128,
        "workers": 0,
    },
    "schedule": {"epochs": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    build_scenes(folder, "scenes-digits", counts={"train": 4, "val": 3})
    return folder


def opened(root: Path, **kwargs: Any) -> CocoImages:
    file = root / "annotations" / "instances_val.json"
    return CocoImages(file, root / "images" / "val", **{"masks": True, **kwargs})


def test_a_run_its_figures_and_its_predictions(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge(TINY, [f"data.root={root}", f"run.folder={tmp_path}", "run.name=tiny"])
    summary = train(recipe)
    shown = capsys.readouterr().out
    assert "mask_AP50" in shown
    assert "box_AR1" not in shown
    assert {"box_AP", "box_AP50", "mask_AP", "mask_AP50"} <= set(summary.metrics)
    run = str(tmp_path / "tiny")
    assert evaluate(run) == evaluate(run) == summary.metrics
    path = root / "images" / "val" / "000000.png"
    from_file, from_memory = predict(run, [str(path), np.asarray(Image.open(path))])
    assert torch.equal(from_file.boxes, from_memory.boxes)
    given = from_file.to_dict()
    assert json.loads(json.dumps(given)) == given
    assert len(given["objects"]) > 0
    for one in given["objects"]:
        assert one["category_id"] in CATEGORY_IDS
        assert sum(one["segmentation"]["counts"]) == 192 * 256
    counts = [int(part.split()[0]) for part in from_file.summary(min_score=0.0).split(", ")]
    assert sum(counts) == len(given["objects"])
    assert from_file.summary(min_score=2.0) == "nothing with a score of 2 or more"
    drawn = from_file.draw(side=256, min_score=0.0)
    assert drawn.size == (256, 192)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(Image.open(path))).max() > 20
    with pytest.raises(UnreadableSample, match="no such file"):
        predict(run, ["missing.png"])


def test_figures_are_torchmetrics(root: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.detection")
    torch.manual_seed(0)
    data = opened(root)
    theirs = torchmetrics.MeanAveragePrecision(iou_type=["bbox", "segm"])
    results: list[dict[str, Any]] = []
    for sample in (data[i] for i in range(len(data))):
        count = len(sample["boxes"])
        wrong = torch.randint(1, 6, (2,))
        boxes = (sample["boxes"] + 4 * torch.randn(count, 4)).sort(1).values
        boxes = torch.cat([sample["boxes"] + 3 * torch.rand(count, 4), boxes[:2]])
        labels = torch.cat([sample["labels"], wrong])[: len(boxes)]
        masks = torch.cat([sample["masks"].roll(3, -1), sample["masks"][:2]])[:, None].float()
        found = {"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes)), "masks": masks}
        results += coco_results(found, sample["image_id"], data.category_ids)
        areas = torch.tensor([float(mask.sum()) for mask in sample["masks"]])
        truth = {key: sample[key] for key in ("boxes", "labels")}
        theirs.update(
            [{**found, "masks": masks[:, 0] >= 0.5}],
            [{**truth, "masks": sample["masks"].bool(), "area": areas}],
        )
    ours = coco_metrics(data.truth([one["id"] for one in data.images]), results, masks=True)
    expected = theirs.compute()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for key, figure in (("map", "AP"), ("map_50", "AP50"), ("map_75", "AP75")):
            want = float(expected[f"{kind}_{key}"])
            assert 0 < want < 1
            assert abs(ours[f"{name}_{figure}"] / 100 - want) < 1e-6


def test_flipped_masks_stay_in_their_boxes(root: Path) -> None:
    data = opened(root)
    sample = data[0]
    before = {key: value.clone() for key, value in sample.items() if key != "image_id"}
    mirror(sample)
    assert torch.equal(sample["image"].flip(-1), before["image"])
    for box, mask in zip(sample["boxes"].int().tolist(), sample["masks"], strict=True):
        x0, y0, x1, y1 = box
        assert mask.sum() == mask[y0:y1, x0:x1].sum()
    mirror(sample)
    assert all(torch.equal(sample[key], value) for key, value in before.items())


def test_a_window_keeps_what_it_shows(root: Path) -> None:
    data = opened(root)
    seen = set()
    for seed in range(8):
        sample = data[seed % len(data)]
        whole = {key: value.clone() for key, value in sample.items() if key != "image_id"}
        torch.manual_seed(seed)
        crop(sample)
        height, width = sample["image"].shape[-2:]
        seen.add((height, width))
        # DETR's 384 of 600 to 600 of 400, here of the 192 and 256 that scenes have.
        assert 0.64 * 192 - 1 <= height <= 192
        assert 0.64 * 192 - 1 <= width <= 256
        assert sample["masks"].shape == (len(sample["boxes"]), height, width)
        assert len(sample["labels"]) == len(sample["boxes"]) <= len(whole["boxes"])
        for box, mask in zip(sample["boxes"].int().tolist(), sample["masks"], strict=True):
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert mask.sum() == mask[y0:y1, x0:x1].sum()
        # Where a few of its pixels are found, all of them are.
        windows = whole["image"].unfold(1, height, 1).unfold(2, width, 1)
        few = windows[..., ::16, ::16] == sample["image"][:, None, None, ::16, ::16]
        places = few.flatten(3).all(3).all(0).nonzero()
        assert any(torch.equal(windows[:, y, x], sample["image"]) for y, x in places)
    assert len(seen) > 4


def _broken(root: Path, folder: Path, change: Any) -> CocoImages:
    shutil.copytree(root, folder)
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return opened(folder)


def _set(**values: Any) -> Any:
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(bbox=[5, 5, 0, 9]), "has no area"),
        (_set(bbox=[250, 5, 20, 9]), "outside the image of 256 x 192"),
        (_set(category_id=8), "category id 8 is none of the file's: 3, 7, 18, 44, 90"),
        (_set(bbox=["a", 5, 4, 9]), "is not four numbers"),
        (_set(bbox=[float("nan"), 5, 4, 9]), "is not four numbers"),
        (_set(segmentation={"size": [10, 20], "counts": [200]}), "mask is 20 x 10, the image 256"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png: no such file"),
    ],
)
def test_bad_data_says_what_and_where(
    root: Path, tmp_path: Path, change: Any, message: str
) -> None:
    data = _broken(root, tmp_path / "broken", change)
    with pytest.raises(UnreadableSample, match=message) as caught:
        data[0]
    assert "000000.png" in str(caught.value) or "gone.png" in str(caught.value)
    data[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].pop("file_name"), r"images\[0\] has no 'file_name'"),
        (lambda c: c["annotations"][1].pop("image_id"), r"annotations\[1\] has no 'image_id'"),
        (lambda c: c["categories"][0].pop("name"), r"categories\[0\] has no 'name'"),
        (lambda c: c["categories"][0].update(id=7), "id 7 twice among its categories"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c.pop("annotations"), "has no list 'annotations'"),
    ],
)
def test_a_file_that_is_not_cocos_form(
    root: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _broken(root, tmp_path / "broken", change)


def test_annotations_of_unlisted_images_are_counted(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _broken(root, tmp_path / "broken", _set(image_id=999))
    assert "1 annotations are of images that it does not list" in caplog.text


def test_training_stops_or_goes_on_and_uses_images_without_objects(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(root, folder)
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    next(a for a in content["annotations"] if a["image_id"] == 1)["bbox"] = [0, 0, 0, 0]
    file.write_text(json.dumps(content))
    data = CocoImages(file, folder / "images" / "train", masks=True)
    assert len(data) == 4
    assert data[1]["boxes"].shape == (0, 4)
    assert data[1]["masks"].shape == (0, 192, 256)
    values = [f"data.root={folder}", f"run.folder={tmp_path}"]
    with pytest.raises(InputError, match=r"has no area \(data.on_error=skip passes over it\)"):
        train(merge(TINY, [*values, "run.name=stops"]))
    summary = train(merge(TINY, [*values, "run.name=skips", "data.on_error=skip"]))
    assert "box_AP" in summary.metrics


def test_wrong_recipes_give_a_sentence(root: Path) -> None:
    def task(*overrides: str) -> Any:
        return task_class("detection")(merge(TINY, [f"data.root={root}", *overrides]).options)

    for overrides, message in (
        (["model.head=yolo"], "there are retinanet, fcos"),
        (["model.name=vz_davit_tin"], "did you mean vz_davit_tiny"),
        (["data.min_size=[]"], "data.min_size is empty"),
    ):
        with pytest.raises(InputError, match=message):
            task(*overrides)
    with pytest.raises(InputError, match="no annotations"):
        task("data.val_annotations=none.json").build_data()
    other = task()
    other.labels = ("cat", "dog")
    with pytest.raises(InputError, match="has 5 categories, the model 2, not 'coin'"):
        other.build_data(train=False)
    other.options.model.args = {"halo": 3}
    with pytest.raises(InputError, match="cannot build the detector"):
        other.build_model()


def test_recipes_load() -> None:
    for parameter in recipes_of("detection"):
        assert load_recipe(parameter.values[0]).task == "detection"


@pytest.mark.parametrize("name", recipes_of("detection"))
def test_recipes_build(name: str) -> None:
    recipe = load_recipe(name)
    task = task_class(recipe.task)(recipe.options)
    task.labels = tuple("abcde")
    with without_memory():
        model = task.build_model(pretrained=False)
    assert model.num_classes == 5
