"""Fine-tuning from an authors' file with other classes and another size keeps what it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.narrow import NARROW, narrow
from tests.golden_cases import load_case, pretrained
from tests.zoo.test_convert import CASES
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.recipe import merge
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks import task_class
from vitzoo.tasks.images import ArraySource, some_classes

# Golden case with the authors' names -> side to fine-tune at, which is not the trained one.
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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(*key, id=key[1], marks=() if key[0] == "nat" else pytest.mark.slow)
        for key in FILES
    ],
)
def test_training_keeps_every_transferable_tensor(family: str, name: str, tmp_path: Path) -> None:
    model, _ = CASES[family, name]
    file = load_case(family, name).save(tmp_path)
    values = [f"run.folder={tmp_path}", f"model.name={model}", f"model.checkpoint={file}"]
    summary = train(merge(RECIPE, [*values, f"data.size={FILES[family, name]}"]))
    left = load_file(summary.folder.weights)
    whole = pretrained(model, file)
    taken = whole.state_dict()
    head = whole.pretrained_cfg["classifier"]
    assert len(left[f"{head}.weight"]) == 3
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    kept = [k for k in taken if not k.startswith(f"{head}.") and not k.endswith(statistics)]
    assert set(kept) <= set(left)
    assert [k for k in kept if not torch.equal(left[k], taken[k])] == []


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

    def start_of(classes: str) -> dict[str, torch.Tensor]:
        task = task_class("classification")(
            narrow(tmp_path, start, f"data.classes={classes}").options
        )
        task.labels = task.build_data().labels
        return task.build_model().state_dict()

    for classes, lent in (("[0,1]", True), ("[1,0]", False), ("[2,3]", False)):
        found = start_of(classes)
        assert torch.equal(found["head.fc.weight"], left["head.fc.weight"]) == lent
        assert all(torch.equal(v, left[k]) for k, v in found.items() if not k.startswith("head.fc"))
    architecture = [f"model.args.{key}={value}" for key, value in NARROW["model"]["args"].items()]
    with pytest.raises(InputError, match="other classes"):
        evaluate(
            "vz_davit_tiny",
            [*architecture, start, "data.name=sklearn/digits", "data.classes=[2,3]"],
        )
