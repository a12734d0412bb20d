"""The segmentation task: masks, bad data, inference, metrics, a run from start to pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitzoo
from tests.recipes import recipes_of
from vitzoo._skeleton import without_memory
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.recipe import load_recipe, merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.scenes import VARIANTS, build_scenes
from vitzoo.tasks.segmentation.data import open_pairs
from vitzoo.tasks.segmentation.inference import probabilities, slide
from vitzoo.tasks.segmentation.metrics import Confusion
from vitzoo.tasks.segmentation.options import InferenceOptions, MaskDataOptions
from vitzoo.tasks.segmentation.result import palette_of
from vitzoo.tasks.segmentation.task import SegmentationTask

NARROW: dict[str, Any] = {
    "task": "segmentation",
    "model": {
        "name": "vz_davit_tiny",
        "head": "fpn",
        "args": {
            "depths": [1, 1, 1, 1],
            "embed_dims": [8, 16, 16, 24],
            "num_heads": [1, 2, 2, 3],
            "window_size": 4,
        },
        "head_args": {"pyramid_channels": 32, "segmentation_channels": 32},
    },
    "data": {"classes": ["sky", "square"], "size": [32, 48], "batch_size": 4, "workers": 0},
    "optim": {"lr": 3e-3},
    "schedule": {"epochs": 2},
    "run": {"name": "run", "device": "cpu", "precision": "no"},
}


def squares(root: Path, *, train_count: int = 8, val_count: int = 3) -> Path:
    """Bright squares on dark noise; the images differ in size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_count), ("val", val_count)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40 + i, 55 - i
            image = rng.integers(0, 80, (height, width, 3), np.uint8)
            mask = np.zeros((height, width), np.uint8)
            y, x = rng.integers(2, 15, 2)
            image[y : y + 20, x : x + 20] += 150
            mask[y : y + 20, x : x + 20] = 1
            mask[:2] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    return root


def task_of(root: Path, *values: str) -> SegmentationTask:
    return SegmentationTask(merge(NARROW, [f"data.root={root}", *values]).options)


def test_a_run_is_evaluated_twice_to_equal_numbers_and_draws(tmp_path: Path) -> None:
    root = squares(tmp_path / "data")
    values = [f"data.root={root}", f"run.folder={tmp_path}"]
    summary = train(merge(NARROW, values))
    first, second = (evaluate(str(tmp_path / "run")) for _ in range(2))
    assert first == second == summary.metrics
    assert {"mIoU", "pixel_accuracy", "IoU/sky", "IoU/square"} <= set(first)
    image = root / "images" / "val" / "1.png"
    (result,) = vitzoo.predict(tmp_path / "run", image)
    written = json.loads(json.dumps(result.to_dict()))
    assert written == result.to_dict()
    assert written["size"] == [41, 54]
    labels = np.repeat(*np.array(written["runs"]).T).reshape(41, 54)
    assert (labels == result.mask).all()
    assert sum(entry["pixels"] for entry in written["classes"]) == 41 * 54
    assert result.draw(side=100).size[0] == 100
    assert result.summary().count("%") == len(written["classes"])
    assert (np.asarray(result.mask_image()) == result.mask).all()
    (again,) = vitzoo.predict(tmp_path / "run", Image.open(image), ["inference.mode=slide"])
    assert again.mask.shape == (41, 54)


def spoil(root: Path, what: str) -> None:
    """Make sample 2 of the training half bad."""
    image, mask = root / "images/train/2.png", root / "masks/train/2.png"
    if what == "size":
        Image.fromarray(np.zeros((5, 7), np.uint8)).save(mask)
    elif what == "label":
        values = np.asarray(Image.open(mask)).copy()
        values[7, 9] = 4
        Image.fromarray(values).save(mask)
    elif what == "colour":
        Image.open(mask).convert("RGB").save(mask)
    elif what == "torn":
        mask.write_bytes(mask.read_bytes()[:40])
    else:
        (image if what == "image" else mask).unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", r"masks/train/2.png: the mask is 7 x 5 pixels, its image .*2.png is 53 x 42"),
        ("label", r"masks/train/2.png: label 4 at x=9, y=7, but labels are 0 to 1, and 255 is"),
        ("colour", r"masks/train/2.png: the mask is a colour picture: give data.palette"),
        ("torn", r"masks/train/2.png: not a readable mask"),
        ("mask", r"masks/train/2.png: no such file: the image has no mask"),
        ("image", r"images/train/2.png: no such file"),
    ],
)
def test_bad_data_says_what_and_where(
    tmp_path: Path, what: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = squares(tmp_path / "data")
    spoil(root, what)
    task = task_of(root)
    data = task.build_data()
    assert data.train is not None
    with pytest.raises(UnreadableSample, match=message):
        data.train[2]
    values = [f"data.root={root}", f"run.folder={tmp_path}", "schedule.epochs=1"]
    with pytest.raises(InputError, match=message):
        train(merge(NARROW, values))
    train(merge(NARROW, [*values, "data.on_error=skip", "run.name=other"]))
    assert "training takes the next one instead" in caplog.text


def test_colour_masks_are_read_through_the_palette(tmp_path: Path) -> None:
    root = squares(tmp_path)
    palette = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)
    for path in (root / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path)) == 1
        Image.fromarray(palette[values.astype(int)]).save(path)
    data = task_of(root, "data.palette=[[10,20,30],[200,100,0]]").build_data()
    assert data.val[0][1].unique().tolist() == [0, 1]
    with pytest.raises(UnreadableSample, match=r"colour \[10, 20, 30\] at x=0, y=0 is not in"):
        task_of(root, "data.palette=[[1,2,3],[200,100,0]]").build_data().val[0]


def test_ade20k_and_cityscapes_layouts(tmp_path: Path) -> None:
    ade = tmp_path / "ade"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (ade / kind / split).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(ade / "images" / split / "A_1.jpg")
        mask = np.array([[0, 1, 2, 2]] * 3, np.uint8)
        Image.fromarray(mask).save(ade / "annotations" / split / "A_1.png")
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.1\t9\t9\t1\twall",
        "2\t0.1\t9\t9\t0\tdoor, gate",
    ]
    (ade / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    pairs = open_pairs(MaskDataOptions(name="ade20k", root=str(ade)), train=True)
    assert pairs.labels == ("wall", "door")
    assert pairs.read(0)[1][0].tolist() == [255, 0, 1, 1]

    city = tmp_path / "city"
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        (city / kind / "val" / "ulm").mkdir(parents=True)
        picture = Image.fromarray(np.array([[0, 7, 26, 33]], np.uint8))
        picture.save(city / kind / "val" / "ulm" / f"ulm_0_{ending}.png")
    pairs = open_pairs(MaskDataOptions(name="cityscapes", root=str(city)), train=False)
    assert (len(pairs.labels), pairs.labels[0], pairs.labels[13]) == (19, "road", "car")
    assert pairs.read(0)[1].tolist() == [[255, 0, 13, 18]]

    for path in city.rglob("*.png"):
        Image.fromarray(np.array([[255, 34]], np.uint8)).save(path)
    with pytest.raises(UnreadableSample, match="label 34 at x=1, y=0, but labels are 0 to 33"):
        pairs.read(0)


def test_a_mask_may_hold_the_ignored_number_beside_a_zero_that_is_ignored(tmp_path: Path) -> None:
    root = squares(tmp_path)
    for path in (root / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path)).astype(int)
        Image.fromarray(np.where(values == 255, 255, values + 1).astype(np.uint8)).save(path)
    data = task_of(root, "data.zero_is_ignored=true").build_data()
    assert data.val[0][1].unique().tolist() == [0, 1, 255]
    with pytest.raises(InputError, match=r"data\.ignore_index=1 is a label of folder's 2 classes"):
        task_of(root, "data.zero_is_ignored=true", "data.ignore_index=1").build_data()


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    root = squares(tmp_path)
    Image.open(root / "images" / "val" / "0.png").save(root / "images" / "val" / "0.jpg")
    with pytest.raises(InputError, match=r"0\.jpg and .*0\.png: which of the two is meant"):
        task_of(root).build_data()


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ("[[1,2,3]]", "has 1 colours for 2 classes"),
        ("[[1,2,3],[4,5,6],[7,8,9]]", "has 3 colours for 2 classes"),
        ("[[1,2],[4,5]]", r"\[1, 2\] is not red, green, blue"),
        ("[[1,2,300],[4,5,6]]", r"\[1, 2, 300\] is not red, green, blue"),
        ("[[1,2,3],[1,2,3]]", "has a colour twice"),
    ],
)
def test_palettes_that_name_no_class(tmp_path: Path, palette: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(squares(tmp_path), f"data.palette={palette}").build_data()


def test_cityscapes_is_drawn_in_its_own_colours() -> None:
    task = SegmentationTask(merge(NARROW, ["data.name=cityscapes", "data.classes=[]"]).options)
    task.labels = tuple(str(i) for i in range(19))
    assert task._palette()[13].tolist() == [0, 0, 142]


def test_figures_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    confusion = Confusion(("a", "b", "c", "never"), ignore_index=255)
    found = torch.randint(0, 3, (6, 20, 30), generator=generator)
    target = torch.randint(0, 3, (6, 20, 30), generator=generator)
    target[:, :4] = 255
    for one, other in zip(found, target, strict=True):
        confusion.add(one, other)
    figures = confusion.compute(torch.device("cpu"))
    expected = multiclass_jaccard_index(found, target, 4, average=None, ignore_index=255)[:3]
    assert figures["mIoU"] == pytest.approx(100 * expected.mean().item(), abs=1e-4)
    assert "IoU/never" not in figures
    kept = target != 255
    accuracy = (found == target)[kept].double().mean().item()
    assert figures["pixel_accuracy"] == pytest.approx(100 * accuracy)
    empty = Confusion(("a",), ignore_index=255)
    assert empty.compute(torch.device("cpu")) == {}


def test_windows_cover_the_image_and_average() -> None:
    options = InferenceOptions(mode="slide", window=[32, 32], stride=[20, 20])
    images = torch.randn(1, 3, 50, 77)
    seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2:])
        return x * 2

    torch.testing.assert_close(slide(forward, images, options), images * 2)
    assert set(seen) == {(32, 32)}
    assert len(seen) == 2 * 4
    small = torch.randn(1, 3, 10, 40)
    torch.testing.assert_close(slide(forward, small, options), small * 2)


def test_scales_and_mirroring_average_probabilities() -> None:
    images = torch.randn(2, 3, 16, 24)
    plain = probabilities(lambda x: x, images, (16, 24), InferenceOptions())
    torch.testing.assert_close(plain, images.softmax(1))
    both = InferenceOptions(scales=[1.0, 1.5], flip=True)
    mixed = probabilities(lambda x: x, images, (20, 30), both)
    assert mixed.shape == (2, 3, 20, 30)
    torch.testing.assert_close(mixed.sum(1), torch.ones(2, 20, 30))
    mirrored = probabilities(lambda x: x, images.flip(-1), (20, 30), both)
    torch.testing.assert_close(mirrored.flip(-1), mixed)


def test_crops_pad_with_ignored_pixels(tmp_path: Path) -> None:
    task = task_of(squares(tmp_path), "data.size=[64,64]", "augment.scale=[0.5,0.6]")
    data = task.build_data()
    assert data.train is not None
    image, target = data.train[0]
    assert image.shape == (3, 64, 64)
    assert (target[-8:] == 255).all()
    assert (image[:, -8:] == 0).all()
    assert set(target.unique().tolist()) <= {0, 1, 255}


def test_only_ignored_pixels_give_a_loss_of_zero(tmp_path: Path) -> None:
    task = task_of(squares(tmp_path), "model.aux=true", "loss.dice=1.0")
    task.labels = ("sky", "square")
    task.model = task.build_model().train()
    nothing = torch.full((2, 32, 32), 255)
    loss = task.training_step((torch.randn(2, 3, 32, 32), nothing))["loss"]
    assert torch.isfinite(loss)
    loss.backward()


def test_wrong_recipes_give_a_sentence(tmp_path: Path) -> None:
    for values, message in (
        (["model.head=psp"], "model.head=psp: known are upernet, fpn"),
        (["model.head=upernet", "data.batch_size=1"], "give 2 or more"),
        (["inference.stride=[99,9]", "inference.window=[32,32]"], "leaves gaps"),
        (["inference.scales=[]"], "one or more positive"),
    ):
        with pytest.raises(InputError, match=message):
            task_of(tmp_path, *values)
    for values, message in (
        (["data.classes=[]"], "data.classes is not set"),
        (["data.images=pictures"], "pictures is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            task_of(tmp_path, *values).build_data()
    task = task_of(tmp_path, "model.args.halo=3")
    task.labels = ("a",)
    with pytest.raises(InputError, match="cannot build the segmenter"):
        task.build_model()


def test_scenes_are_those_of_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def made(variant: str) -> Path:
        if not (tmp_path / variant).is_dir():
            build_scenes(tmp_path / variant, variant, counts={"train": 1, "val": 1})
        return tmp_path / variant

    monkeypatch.setattr("vitzoo.tasks.scenes.scenes_folder", made)
    pairs = open_pairs(MaskDataOptions(name="scenes-digits"), train=False)
    assert pairs.labels == ("background", *VARIANTS["scenes-digits"])
    assert len(pairs) == 1


def test_palettes_have_distinct_colours() -> None:
    assert len({tuple(row) for row in palette_of(150).tolist()}) == 150


def test_recipes_load() -> None:
    for parameter in recipes_of("segmentation"):
        assert load_recipe(parameter.values[0]).task == "segmentation"


@pytest.mark.parametrize("name", recipes_of("segmentation"))
def test_recipes_build(name: str) -> None:
    recipe = load_recipe(name)
    task = SegmentationTask(recipe.options)
    task.labels = tuple("ab")
    with without_memory():
        model = task.build_model(pretrained=False)
    out = model.eval()(torch.empty(1, 3, 64, 96, device="meta"))
    assert out.shape == (1, 2, 64, 96)
