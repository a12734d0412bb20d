"""COCO-style files as tools and people write them: read, refused with a sentence, judged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")

from vitzoo.engine.recipe import merge
from vitzoo.errors import InputError
from vitzoo.tasks import task_class
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection.augment import crop
from vitzoo.tasks.detection.coco import CocoImages
from vitzoo.tasks.detection.masks import mask_of
from vitzoo.tasks.detection.metrics import coco_metrics, coco_results
from vitzoo.tasks.detection.result import Objects
from vitzoo.tasks.scenes.build import run_lengths

WIDTH, HEIGHT = 60, 40


def content() -> dict[str, Any]:
    """Three images: two squares, one square beside a crowd, nothing."""
    boxes = [(1, [5, 5, 20, 10], 0), (1, [30, 8, 12, 25], 0), (2, [8, 8, 30, 20], 0)]
    boxes.append((2, [40, 2, 15, 30], 1))
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": 7,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
                "segmentation": runs(box) if crowd else corners(box),
            }
            for number, (image, box, crowd) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 7, "name": "square"}, {"id": 90, "name": "other"}],
    }


def corners(box: list[int]) -> list[list[int]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def runs(box: list[int]) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    x, y, width, height = box
    mask[y : y + height, x : x + width] = True
    return {"size": [HEIGHT, WIDTH], "counts": run_lengths(mask)}


def opened(folder: Path, given: Any) -> CocoImages:
    for i in (1, 2, 3):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
    file = folder / "instances.json"
    file.write_text(json.dumps(given))
    return CocoImages(file, folder, masks=True)


def figures_of_the_truth(data: CocoImages) -> dict[str, float]:
    """COCO's figures of predictions that are the objects themselves."""
    results: list[dict[str, Any]] = []
    for sample in (data[i] for i in range(len(data))):
        found = {key: sample[key] for key in ("boxes", "labels")}
        found["scores"] = torch.linspace(0.9, 0.5, len(sample["boxes"]))
        found["masks"] = sample["masks"][:, None].float()
        results += coco_results(found, sample["image_id"], data.category_ids)
    return coco_metrics(data.truth([one["id"] for one in data.images]), results, masks=True)


def _numbered(ids: Any) -> Any:
    def change(given: dict[str, Any]) -> None:
        for one, number in zip(given["annotations"], ids, strict=True):
            one["id"] = number

    return change


def _without(part: str, *names: str) -> Any:
    def change(given: dict[str, Any]) -> None:
        for one in given[part]:
            for name in names:
                del one[name]

    return change


def _named(given: dict[str, Any]) -> None:
    for one in given["images"]:
        one["id"] = f"frame {one['id']}"
    for one in given["annotations"]:
        one["image_id"] = f"frame {one['image_id']}"


@pytest.mark.parametrize(
    "change",
    [
        lambda given: None,
        _numbered(range(4)),
        _numbered([1, 2, 1, 2]),
        _without("annotations", "id"),
        _without("annotations", "area"),
        _without("images", "width", "height"),
        _named,
    ],
    ids=["plain", "from-0", "anew-per-image", "no-id", "no-area", "no-size", "names"],
)
def test_every_object_found_is_a_hundred_percent(tmp_path: Path, change: Any) -> None:
    given = content()
    change(given)
    figures = figures_of_the_truth(opened(tmp_path, given))
    for name in ("box_AP", "box_AP75", "mask_AP", "mask_AP75"):
        assert figures[name] == pytest.approx(100)


def test_nothing_found_defines_the_same_figures(tmp_path: Path) -> None:
    data = opened(tmp_path, content())
    truth = data.truth([1, 2, 3])
    figures = coco_metrics(truth, [], masks=True)
    assert figures.keys() == figures_of_the_truth(data).keys()
    assert set(figures.values()) == {0.0}
    crowds = copy.deepcopy(truth)
    for one in crowds["annotations"]:
        one["iscrowd"] = 1
    assert coco_metrics(crowds, [], masks=True) == {}


def test_predictions_from_json_have_the_same_figures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = opened(tmp_path, content())
    truth = data.truth([1, 2, 3])
    direct: list[dict[str, Any]] = []
    reread: list[dict[str, Any]] = []
    for sample in (data[i] for i in range(3)):
        count = len(sample["boxes"])
        boxes = sample["boxes"] + 2.5 * torch.rand(count, 4)
        scores, masks = torch.rand(count), sample["masks"].roll(2, -1)
        found = {"boxes": boxes, "labels": sample["labels"], "scores": scores}
        found["masks"] = masks[:, None].float()
        direct += coco_results(found, sample["image_id"], data.category_ids)
        result = Objects(
            source=f"{sample['image_id']}.png",
            boxes=boxes,
            scores=scores,
            indices=sample["labels"] - 1,
            masks=masks.bool(),
            labels=data.labels,
            category_ids=tuple(data.category_ids),
            image=Image.new("RGB", (WIDTH, HEIGHT)),
        )
        written = json.loads(json.dumps(result.to_dict()))
        reread += [{**one, "image_id": sample["image_id"]} for one in written["objects"]]
    assert {one["category_id"] for one in reread} == {7}
    figures = coco_metrics(truth, direct, masks=True)
    assert 0 < figures["box_AP"] < 100
    assert 0 < figures["mask_AP"] < 100
    assert coco_metrics(truth, reread, masks=True) == figures


# COCO's twelve figures under torchmetrics' names.
TWELVE = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AR1": "mar_1",
    "AR10": "mar_10",
    "AR100": "mar_100",
    "ARs": "mar_small",
    "ARm": "mar_medium",
    "ARl": "mar_large",
}


def test_all_twelve_figures_are_torchmetrics_with_crowds_and_sizes(tmp_path: Path) -> None:
    detection = pytest.importorskip("torchmetrics.detection")
    torch.manual_seed(0)
    given = content()
    for one, area in zip(given["annotations"], (300, 5000, 20000, 400), strict=True):
        one["area"] = area
    data = opened(tmp_path, given)
    theirs = detection.MeanAveragePrecision(iou_type=["bbox", "segm"])
    results: list[dict[str, Any]] = []
    truth = data.truth([1, 2, 3])
    for i in range(3):
        sample = data[i]
        known = [one for one in truth["annotations"] if one["image_id"] == sample["image_id"]]
        boxes = torch.tensor([one["bbox"] for one in known], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [mask_of(one, (WIDTH, HEIGHT), "here") for one in known]
        drawn = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, HEIGHT, WIDTH)))
        # Near misses, an object found twice, and a stranger.
        stranger = torch.tensor([[2.0, 25, 22, 39]])
        found = {"boxes": torch.cat([boxes + 2 * torch.rand(len(boxes), 4), boxes[:1], stranger])}
        found["labels"] = torch.ones(len(found["boxes"]), dtype=torch.long)
        found["scores"] = torch.rand(len(found["boxes"]))
        shapes = torch.cat([drawn.roll(1, -1), drawn[:1], torch.zeros(1, HEIGHT, WIDTH)])
        shapes[-1, 25:39, 2:22] = 1
        results += coco_results(
            {**found, "masks": shapes[:, None].float()}, sample["image_id"], data.category_ids
        )
        target = {"boxes": boxes, "labels": torch.ones(len(known), dtype=torch.long)}
        target["masks"] = drawn.bool()
        target["iscrowd"] = torch.tensor([one["iscrowd"] for one in known], dtype=torch.long)
        target["area"] = torch.tensor([float(one["area"]) for one in known])
        theirs.update([{**found, "masks": shapes.bool()}], [target])
    ours, expected = coco_metrics(truth, results, masks=True), theirs.compute()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for figure, key in TWELVE.items():
            want = float(expected[f"{kind}_{key}"])
            assert abs(ours[f"{name}_{figure}"] / 100 - want) < 1e-6
        assert 0 < ours[f"{name}_AP"] < 100


def test_crowds_are_neither_learned_nor_judged(tmp_path: Path) -> None:
    data = opened(tmp_path, content())
    assert [len(data[i]["boxes"]) for i in range(3)] == [2, 1, 0]
    truth = data.truth([1, 2, 3])
    inside = {"image_id": 2, "category_id": 7, "bbox": [41, 3, 9, 20], "score": 0.99}
    right = [
        {"image_id": one["image_id"], "category_id": 7, "bbox": one["bbox"], "score": 0.5}
        for one in truth["annotations"]
        if not one["iscrowd"]
    ]
    assert coco_metrics(truth, [inside, *right], masks=False)["box_AP"] == pytest.approx(100)


def _first(**values: Any) -> Any:
    return lambda given: given["annotations"][0].update(values)


def _crowd(**values: Any) -> Any:
    return lambda given: given["annotations"][-1].update(values)


NOT_RUNS = {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}
CUT_OFF = {"size": [HEIGHT, WIDTH], "counts": "0"}
NO_SIZE = {"size": None, "counts": [HEIGHT * WIDTH]}
SHORT = {"size": [HEIGHT, WIDTH], "counts": [5, 6]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # In float32 these have no area left, which would stop a run within torchvision.
        (_first(bbox=[50, 5, 1e-7, 9]), "has no area"),
        (_first(segmentation=[[5, 5, 30, 30]]), "polygon 0 of its mask has 4 numbers"),
        (_first(segmentation=[[5, 5, 9, 5, 9, 9], [5, 5]]), "polygon 1 of its mask has 2 numbers"),
        (_first(segmentation=[[5, 5, 9, 5, 9, 9, 3]]), "polygon 0 of its mask has 7 numbers"),
        (_first(segmentation=[[]]), "polygon 0 of its mask has 0 numbers"),
        (_first(segmentation=[[5, 5, float("nan"), 5, 9, 9]]), "does not hold numbers only"),
        (_first(segmentation=[[5, 5, "9", 5, 9, 9]]), "does not hold numbers only"),
        (_first(segmentation=[[0, 0, 1e9, 0, 9, 9]]), "far outside the image of 60 x 40"),
        (_first(segmentation=[5, 5, 9, 5, 9, 9]), "neither run lengths nor a list of polygons"),
        (_first(segmentation=[]), "it has no mask"),
        (_first(segmentation=NOT_RUNS), "not a list of whole numbers from 0 up"),
        (_first(segmentation=CUT_OFF), "hold 0 pixels, the image 2400"),
        (_first(segmentation=NO_SIZE), r"has size None, not \[height, width\]"),
        (_first(segmentation=SHORT), "hold 11 pixels, the image 2400"),
        (_first(category_id=[7]), r"category id \[7\] is none of the file's: 7, 90"),
        (lambda given: given["images"][0].update(width=61), "is 60 x 40, but 61 x 40 in inst"),
    ],
)
def test_odd_objects_say_what_and_where(tmp_path: Path, change: Any, message: str) -> None:
    given = content()
    change(given)
    data = opened(tmp_path, given)
    with pytest.raises(UnreadableSample, match=message) as caught:
        data[0]
    assert "1.png" in str(caught.value)
    assert len(data[1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_crowd(bbox=None), "is not .x, y, width, height."),
        (_crowd(segmentation=None), "it has no mask"),
        (_crowd(category_id=8), "category id 8 is none"),
    ],
)
def test_a_crowd_that_nothing_can_judge(tmp_path: Path, change: Any, message: str) -> None:
    given = content()
    change(given)
    with pytest.raises(UnreadableSample, match=message):
        opened(tmp_path, given)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_first(image_id=[1]), r"annotations\[0\] has image_id \[1\], not a whole number or a"),
        (
            lambda given: given["categories"][1].update(id="90"),
            r"categories\[1\] has id '90', not a whole number",
        ),
    ],
)
def test_ids_that_nothing_can_be_found_by(tmp_path: Path, change: Any, message: str) -> None:
    given = content()
    change(given)
    with pytest.raises(InputError, match=message):
        opened(tmp_path, given)


def test_compressed_run_lengths_whole_and_cut_off() -> None:
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng.random((31, 23)) < share).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        given = {"size": [31, 23], "counts": text}
        assert (mask_of({"segmentation": given}, (23, 31), "here") == mask).all()
        for end in (len(text) - 1, len(text) // 2):
            cut = {"segmentation": {**given, "counts": text[:end]}}
            with pytest.raises(UnreadableSample, match="here"):
                mask_of(cut, (23, 31), "here")


def test_a_window_leaves_no_sliver_of_a_box() -> None:
    torch.manual_seed(0)
    left = 0
    for _ in range(40):
        image = torch.zeros(3, 40, 900)
        edges = torch.arange(0, 900, 0.37)
        boxes = torch.stack([edges, edges * 0, edges + 0.371, edges * 0 + 40], dim=1)
        sample = {"image": image, "boxes": boxes.clamp(max=900.0)}
        sample["labels"] = torch.ones(len(boxes), dtype=torch.long)
        crop(sample)
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        assert sides.min() >= 0.005
        left += len(sides)
    assert left > 0


def test_halves_may_differ_in_what_else_they_say_of_categories(tmp_path: Path) -> None:
    given = content()
    opened(tmp_path, given)
    other = copy.deepcopy(given)
    other["categories"] = [{**one, "supercategory": "shape"} for one in given["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    values = [f"data.root={tmp_path}", "data.train_images=.", "data.val_images=."]
    values += ["data.train_annotations=other.json", "data.val_annotations=instances.json"]
    recipe = merge({"task": "detection", "model": {"name": "resnet10t"}}, values)
    assert task_class("detection")(recipe.options).build_data().labels == ("square", "other")
    other["categories"][1]["id"] = 91
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="the same names under other ids"):
        task_class("detection")(recipe.options).build_data()


def test_colours_are_distorted_and_objects_stay(tmp_path: Path) -> None:
    plain = opened(tmp_path, content())
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for record in plain.images:
        Image.fromarray(noise).save(tmp_path / record["file_name"])
    distorted = CocoImages(plain.path, tmp_path, masks=True, photometric=True)
    torch.manual_seed(0)
    drawn = [distorted[0] for _ in range(4)]
    assert any(not torch.equal(one["image"], plain[0]["image"]) for one in drawn)
    for one in drawn:
        assert 0 <= one["image"].min() <= one["image"].max() <= 1
        assert all(torch.equal(one[key], plain[0][key]) for key in ("boxes", "labels", "masks"))
