"""The classification task: data, fine-tuning, metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitzoo
from tests.engine.narrow import NARROW
from vitzoo.engine.recipe import load_recipe, merge, recipe_names
from vitzoo.errors import InputError
from vitzoo.tasks._models import ModelOptions, create_model, known_name
from vitzoo.tasks.classification import ClassificationTask
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.fashion_mnist import fashion_mnist_root
from vitzoo.tasks.images import digits
from vitzoo.tasks.pictures import image_of, open_image
from vitzoo.tasks.splits import find_split
from vitzoo.zoo.published import find_entry


def task_of(*values: str) -> ClassificationTask:
    return ClassificationTask(merge(NARROW, values).options)


def folder_of(root: Path, **classes: tuple[str, ...]) -> Path:
    """`folder_of(root, train=("a", "b"))`: one picture a class."""
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((33, 40, 3), np.uint8)).save(root / split / name / "0.png")
    return root


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("-finetune")])
def test_fine_tuning_starts_from_published_weights(name: str) -> None:
    model = load_recipe(name).options.model
    assert model.pretrained
    known_name(model.name)
    entry = find_entry(model.name)
    assert entry is not None
    assert entry.sources


def test_every_family_of_images_is_fine_tuned() -> None:
    names = [name for name in vitzoo.list_models() if vitzoo.info(name).modality == "image"]
    families = {vitzoo.info(name).family for name in names}
    tuned = {n.removesuffix("-finetune") for n in recipe_names() if n.endswith("-finetune")}
    assert families <= tuned


def test_digits_split_is_fixed_and_disjoint() -> None:
    train, held_out = digits(train=True), digits(train=False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert set(train.labels or ()) == set("0123456789")
    assert np.bincount(held_out.targets).min() >= 33
    assert digits(train=False).targets.tolist() == held_out.targets.tolist()


def test_folders_give_labels_and_the_held_out_half_follows_them(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=("ant", "bee", "cat"), val=("cat", "bee"))
    data = task_of("data.name=", f"data.root={root}").build_data()
    assert data.labels == ("ant", "bee", "cat")
    assert sorted(data.val[i][1] for i in range(2)) == [1, 2]
    image, _ = data.val[0]
    assert image.shape == (3, 32, 32)


def test_a_class_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=("ant", "bee"), val=("ant", "wasp"))
    with pytest.raises(InputError, match="'wasp'"):
        task_of("data.name=", f"data.root={root}").build_data()


def test_a_missing_half_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=("ant",))
    with pytest.raises(InputError, match="none for the split 'validation'"):
        task_of("data.name=", f"data.root={root}").build_data()
    assert find_split(root / "train", "validation") == root / "train"


def test_fashion_mnist_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        fashion_mnist_root(str(tmp_path), download=False)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UnreadableSample, match=r"torn\.png: .*truncated"):
        open_image(str(path), where=str(path))
    with pytest.raises(UnreadableSample, match="no such file"):
        open_image(str(tmp_path / "none.jpg"), where="none.jpg")


def test_fine_tuning_takes_another_class_count(tmp_path: Path) -> None:
    first = task_of()
    first.labels = tuple("0123456789")
    trained = first.build_model()
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    second = task_of(f"model.checkpoint={path}")
    second.labels = ("a", "b", "c")
    # timm gives a classifier of another size new weights when the configuration says its own.
    model = second.build_model()
    assert model.get_classifier().out_features == 3  # type: ignore[operator]
    assert torch.equal(model.stem.conv.weight, trained.stem.conv.weight)  # type: ignore[union-attr]


def test_frozen_batch_norm_rests() -> None:
    written = {"task": "classification", "model": {"name": "resnet18", "linear_probe": True}}
    task = ClassificationTask(merge(written).options)
    task.labels = ("a", "b")
    task.model = task.build_model()
    before = task.model.bn1.running_mean.clone()  # type: ignore[union-attr, operator]
    task.train_mode()
    task.training_step((torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])))["loss"].backward()
    assert torch.equal(task.model.bn1.running_mean, before)  # type: ignore[union-attr, arg-type]
    assert task.model.fc.weight.grad is not None  # type: ignore[union-attr]
    assert task.model.conv1.weight.grad is None  # type: ignore[union-attr]


def test_metrics_against_counting_by_hand() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    task = task_of()
    task.model = Fixed()
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 10
    batches = [(logits[:32], targets[:32]), (logits[32:], targets[32:])]
    metrics = task.evaluate(batches)
    order = logits.argsort(dim=1, descending=True)
    top1 = 100 * (order[:, 0] == targets).float().mean()
    top5 = 100 * (order[:, :5] == targets[:, None]).any(1).float().mean()
    assert metrics["top1"] == pytest.approx(top1.item(), rel=1e-5)
    assert metrics["top5"] == pytest.approx(top5.item(), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_one_channel_and_odd_batches() -> None:
    task = task_of("model.in_chans=1")
    data = task.build_data()
    task.labels = data.labels
    assert data.train is not None
    assert data.train[0][0].shape == (1, 32, 32)
    assert task.build_model()(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match="even number"):
        task_of("data.batch_size=15")


def test_published_accuracy_is_the_entry() -> None:
    task = ClassificationTask(
        merge({"task": "classification", "model": {"name": "vz_davit_tiny.msft_in1k"}}).options
    )
    assert task.published() == {"top1": 82.8, "top5": 96.2}
    assert timm.get_pretrained_cfg("vz_davit_tiny").num_classes == 1000


def test_images_in_memory_of_every_kind(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    chw = pixels.movedim(-1, 0)
    expected = pixels.numpy()
    for given in (pixels.numpy(), Image.fromarray(expected), pixels, chw, chw.float() / 255):
        assert np.array_equal(np.asarray(image_of(given)), expected)
    grey = image_of(chw[:1], mode="L")
    assert np.array_equal(np.asarray(grey), expected[..., 0])
    with pytest.raises(InputError, match="before it is normalised"):
        image_of(torch.randn(3, 5, 7))
    # Grey floats would be taken for whole numbers.
    for given in (expected / 255, (expected / 255)[..., 0]):
        found = np.asarray(image_of(given, mode="RGB"))
        assert np.array_equal(found[..., 0], expected[..., 0])
    with pytest.raises(InputError, match="before it is normalised"):
        image_of(expected.astype(float))
    with pytest.raises(InputError, match=r"int64 \(5, 7, 3\)"):
        image_of(np.zeros((5, 7, 3), dtype=np.int64))
    with pytest.raises(InputError, match="is a folder"):
        image_of(tmp_path)
    with pytest.raises(InputError, match="not <class 'int'>"):
        image_of(3)


def test_a_detectors_backbone_is_no_classifier() -> None:
    options = ModelOptions(name="vz_uhalonet_micro.opengvlab_coco_mask_rcnn")
    with pytest.raises(InputError, match="it has no classifier"):
        create_model(options, ["cat", "dog"], pretrained=False)
