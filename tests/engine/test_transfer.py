"""Fine-tuning from an authors' file with other classes and another size keeps what it can."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.engine.narrow import NARROW, narrow
from tests.golden_cases import load_case, pretrained
from tests.zoo.test_convert import CASES
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.recipe import Recipe, merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks import task_class
from vitzoo.tasks.images import ArraySource, some_classes

# Golden case with the authors' names -> side to fine-tune at, which is not the trained one.
# LookupViT's weights are unpublished: it starts from a plain ViT's, in a test of its own.
FILES = {
    ("nat", "nat_mini_224"): 64,
    ("davit", "davit_tiny_224"): 64,
    ("litv2", "litv2_small_224"): 64,
    ("biformer", "biformer_tiny_224"): 64,
    ("halonet", "halonet26t_256"): 64,
    ("halonet", "uhalonet_micro_224"): 64,
    ("sparsifiner", "sparsifiner_deit_tiny_224"): 64,
}
RECIPE = {
    "task": "classification",
    "data": {
        "name": "torch/fashion_mnist",
        "classes": [5, 6, 7],
        "train_first": 4,
        "val_first": 2,
        "batch_size": 4,
        "workers": 0,
    },
    # No step changes a weight, so what the run leaves is what it took from the file.
    "optim": {"name": "sgd", "lr": 0.0, "weight_decay": 0.0},
    "schedule": {"epochs": 1, "warmup_epochs": 0, "min_lr": 0.0, "warmup_lr": 0.0},
    "run": {"name": "run", "device": "cpu", "precision": "no"},
}


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`data.root` with a few random images in Fashion-MNIST's own files."""
    # The archives are unpacked into the user's cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, count in (("train", 60), ("t10k", 30)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{split}-{kind}-idx{array.ndim}-ubyte.gz"
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(gzip.compress(head + array.tobytes()))
    return f"data.root={folder}"


def start_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a run begins with."""
    task = task_class("classification")(recipe.options)
    task.labels = task.build_data().labels
    return task.build_model().state_dict()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(*key, id=key[1], marks=() if key[0] == "nat" else pytest.mark.slow)
        for key in FILES
    ],
)
def test_training_keeps_every_transferable_tensor(
    family: str, name: str, tmp_path: Path, fashion: str
) -> None:
    model, _ = CASES[family, name]
    file = load_case(family, name).save(tmp_path)
    values = [f"run.folder={tmp_path}", f"model.name={model}", f"model.checkpoint={file}", fashion]
    recipe = merge(RECIPE, [*values, f"data.size={FILES[family, name]}"])
    whole = pretrained(model, file)
    taken = whole.state_dict()
    head = whole.pretrained_cfg["classifier"]
    kept = [k for k in taken if not k.startswith(f"{head}.")]
    start = start_of(recipe)
    assert [k for k in kept if not torch.equal(start[k], taken[k])] == []
    left = load_file(train(recipe).folder.weights)
    assert len(left[f"{head}.weight"]) == 3
    assert set(kept) <= set(left)
    # BatchNorm's statistics follow the images even where the weights stand still.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = [k for k in kept if not torch.equal(left[k], taken[k])]
    assert [k for k in moved if not k.endswith(statistics)] == []


def test_training_lookupvit_keeps_every_tensor_of_a_plain_vit(tmp_path: Path, fashion: str) -> None:
    torch.manual_seed(0)
    shape = {"embed_dim": 96, "depth": 2, "num_heads": 3}
    vit = timm.create_model("vit_small_patch16_224", **shape).state_dict()
    vit = {name: torch.randn_like(value) for name, value in vit.items()}
    torch.save(vit, tmp_path / "vit.pth")
    values = [f"model.args.{key}={value}" for key, value in shape.items()]
    values += [f"run.folder={tmp_path}", "model.name=vz_lookupvit_small", "data.size=64", fashion]
    recipe = merge(RECIPE, [*values, f"model.checkpoint={tmp_path / 'vit.pth'}"])
    left = load_file(train(recipe).folder.weights)
    assert len(left["head.fc.weight"]) == 3
    # There is no class token, and its position is the table's first.
    vit["pos_embed"] = vit["pos_embed"][:, 1:]
    kept = [k for k in vit if k != "cls_token" and not k.startswith("head.")]
    assert len(kept) == 4 + 2 * 12 + 1
    assert [k for k in kept if not torch.equal(left[k], vit[k])] == []
    q, k, v = vit["blocks.1.attn.qkv.weight"].chunk(3)
    assert torch.equal(left["blocks.1.gather.q.weight"], q)
    assert torch.equal(left["blocks.1.gather.kv.weight"], torch.cat([k, v]))
    assert torch.equal(left["blocks.1.infuse.v.weight"], v)


def test_some_classes_are_renumbered() -> None:
    source = ArraySource(torch.zeros(6, 4, 4).byte(), [2, 0, 1, 2, 1, 0], ("a", "b", "c"), "x")
    some = some_classes(source, [2, 0])
    assert some.labels == ("c", "a")
    assert [some.image(i)[1] for i in range(len(some))] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="0 to 2"):
        some_classes(source, [3])


def test_a_run_on_other_classes_lends_all_but_its_classifier(tmp_path: Path) -> None:
    file = train(narrow(tmp_path, "run.name=first", "data.classes=[0,1]")).folder.weights
    start = f"model.checkpoint={file}"
    left = load_file(file)

    for classes, lent in (("[0,1]", True), ("[1,0]", False), ("[2,3]", False)):
        found = start_of(narrow(tmp_path, start, f"data.classes={classes}"))
        assert torch.equal(found["head.fc.weight"], left["head.fc.weight"]) == lent
        assert all(torch.equal(v, left[k]) for k, v in found.items() if not k.startswith("head.fc"))
    architecture = [f"model.args.{key}={value}" for key, value in NARROW["model"]["args"].items()]
    with pytest.raises(InputError, match="other classes"):
        evaluate(
            "vz_davit_tiny",
            [*architecture, start, "data.name=sklearn/digits", "data.classes=[2,3]"],
        )
