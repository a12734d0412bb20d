"""A folder that `vitzoo weights convert` or timm wrote serves as the backbone under every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.engine.narrow import NARROW
from vitzoo._skeleton import without_memory
from vitzoo.engine.optim import build_optimizer
from vitzoo.engine.recipe import OptimOptions, merge
from vitzoo.errors import InputError
from vitzoo.heads.segmentation import build_segmenter
from vitzoo.tasks import task_class

ARGUMENTS: dict[str, Any] = NARROW["model"]["args"]
TASKS = {"detection": "fcos", "segmentation": "fpn"}


def task_on(folder: Path, name: str, *values: str) -> Any:
    recipe = {"task": name, "model": {"name": f"local-dir:{folder}", "head": TASKS[name]}}
    task = task_class(name)(merge(recipe, values).options)
    task.labels = ("a", "b")
    return task


def inner(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the backbone in a detector or segmenter, under their own names."""
    maps = model.backbone if hasattr(model.backbone, "body") else model.backbone.maps
    return maps.model.state_dict()


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = timm.create_model("vz_davit_tiny", num_classes=3, **ARGUMENTS)
    timm.models.save_for_hf(model, tmp_path, model_args=ARGUMENTS, safe_serialization=True)
    return tmp_path, model.state_dict()


@pytest.mark.parametrize("name", TASKS)
def test_a_folder_gives_architecture_and_weights(name: str, shared: Any) -> None:
    folder, weights = shared
    found = inner(task_on(folder, name, "model.pretrained=true").build_model())
    taken = [key for key in found if key in weights]
    assert len(taken) > 20
    assert [key for key in taken if not torch.equal(found[key], weights[key])] == []
    fresh = inner(task_on(folder, name, "model.pretrained=true").build_model(pretrained=False))
    assert any(not torch.equal(fresh[key], weights[key]) for key in taken)
    assert {key: fresh[key].shape for key in taken} == {key: weights[key].shape for key in taken}


@pytest.mark.parametrize("name", TASKS)
def test_a_file_goes_before_the_folders_weights(name: str, shared: Any, tmp_path: Path) -> None:
    folder, weights = shared
    file = tmp_path / "other.pth"
    torch.save({key: value + 1 for key, value in weights.items()}, file)
    found = inner(task_on(folder, name, f"model.checkpoint={file}").build_model())
    key = next(key for key in found if key.endswith("qkv.weight"))
    torch.testing.assert_close(found[key], weights[key] + 1)


@pytest.mark.parametrize("name", TASKS)
def test_weights_that_are_not_taken_are_spoken_of(name: str, shared: Any, caplog: Any) -> None:
    task_on(shared[0], name).build_model()
    assert "with --pretrained its weights, too" in caplog.text


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable config"):
        task_on(tmp_path, name)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("model", "value", "message"),
    [
        ("caformer_s18", "model.frozen_stages=1", "MetaFormer has no groups of layers"),
        ("selecsls42", "model.grad_checkpointing=true", "cannot recompute its activations"),
    ],
)
def test_what_a_model_of_timms_lacks_is_said(
    name: str, model: str, value: str, message: str
) -> None:
    recipe = {"task": name, "model": {"name": model, "head": TASKS[name]}}
    task = task_class(name)(merge(recipe, [value]).options)
    task.labels = ("a", "b")
    with without_memory(), pytest.raises(InputError, match=message):
        task.build_model()


def test_layer_decay_without_layer_groups_is_refused() -> None:
    with without_memory():
        model = build_segmenter("caformer_s18", head="fpn", num_classes=2)
    with pytest.raises(InputError, match="MetaFormer has no groups of layers"):
        build_optimizer(model, OptimOptions(layer_decay=0.9), images=1)
