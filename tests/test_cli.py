"""The command line as a new user meets it: every wrong input is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitzoo
from tests.engine.narrow import NARROW, narrow
from vitzoo.cli import run
from vitzoo.engine.recipe import write_recipe
from vitzoo.engine.runfolder import RunFolder
from vitzoo.engine.train import train
from vitzoo.tasks.images import digits

ROOT = Path(__file__).parents[1]
SHORT = ("schedule.epochs=1", "schedule.warmup_epochs=0", "data.train_first=32", "ema.decay=null")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished narrow run."""
    folder = tmp_path_factory.mktemp("runs")
    train(narrow(folder, *SHORT))
    return folder / "run"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "narrow.yaml"
    path.write_text(write_recipe(NARROW))
    return str(path)


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_commands_that_compute_without_gradients_keep_memory(
    command: str, memory_kept: list[bool]
) -> None:
    assert run([command, "no-such-model", "here"]) == 2
    assert memory_kept == [True]
    assert run(["info", "vz_davit_tiny"]) == 0
    assert memory_kept == [True]


def image_folder(root: Path, classes: int, *, each: int = 2) -> Path:
    """A folder of noise: train and val, `classes` folders, `each` images in every one."""
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(each):
                noise = np.random.default_rng(i).integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    return root


def digit_files(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    held_out = digits(train=False)
    for i in range(count):
        held_out.image(i)[0].save(folder / f"{i}.png")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a refusal."""
    assert run(list(arguments)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vitzoo: ")
    return lines[0]


def test_names_that_do_not_exist(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    assert "did you mean" in refused(capsys, "train", "davit-digit")
    said = refused(capsys, "train", recipe, "model.name=vz_davit_tinny", f"run.folder={tmp_path}")
    assert "unknown model 'vz_davit_tinny'; did you mean vz_davit_tiny" in said
    assert "did you mean 'optim.lr'?" in refused(capsys, "train", recipe, "optim.lrr=1")
    assert "did you mean 'schedule.epochs'?" in refused(capsys, "train", recipe, "epochs=1")
    assert "'colour' in the arguments" in refused(capsys, "train", recipe, "colour=1")
    assert "optim.lr" in refused(capsys, "train", recipe, "optim.lr=fast")
    assert "unknown task 'detectoin'" in refused(capsys, "train", recipe, "task=detectoin")
    assert "no weights 'nobody_in1k'" in refused(capsys, "eval", "vz_davit_tiny.nobody_in1k")
    assert "did you mean" in refused(capsys, "info", "vz_davit_tinny")
    assert "No such command" in refused(capsys, "trian")
    said = refused(capsys, "train", recipe, "optim.name=adamww", f"run.folder={tmp_path}")
    assert "unknown optimiser" in said


def test_folders_that_hold_no_data(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    (empty / "val").mkdir()
    here = f"run.folder={tmp_path}"
    said = refused(capsys, "train", recipe, here, "data.name=", f"data.root={empty}")
    assert "no images in class folders" in said
    said = refused(capsys, "train", recipe, here, "data.name=", "data.root=/nowhere")
    assert "does not exist" in said
    assert "data.root is not set" in refused(capsys, "train", recipe, here, "data.name=")
    data = image_folder(tmp_path / "few", 2)
    said = refused(capsys, "train", recipe, here, "data.name=", f"data.root={data}")
    assert "4 training samples are fewer than one batch" in said


def test_class_counts_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    data = image_folder(tmp_path / "data", 3)
    said = refused(capsys, "eval", str(finished), "data.name=", f"data.root={data}")
    assert "3 classes" in said
    assert "10" in said
    said = refused(capsys, "eval", "vz_davit_tiny", f"data.root={data}")
    assert "3 classes" in said
    assert "1000" in said


def test_other_data_is_another_run(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    data = image_folder(tmp_path / "data", 2, each=8)
    given = (recipe, *SHORT[:2], "ema.decay=null", f"run.folder={tmp_path}", "data.name=")
    assert run(["train", *given, f"data.root={data}"]) == 0
    # The same data may lie elsewhere, as on another machine.
    moved = data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert run(["train", *given, f"data.root={moved}"]) == 0
    said = capsys.readouterr().out
    assert "nothing left to train" in said
    weights = said.partition("model.checkpoint=")[2].split()[0]
    assert Path(weights).is_file()
    noise = (moved / "train/class0/0.png").read_bytes()
    (moved / "train/class0/more.png").write_bytes(noise)
    said = refused(capsys, "train", *given, f"data.root={moved}")
    assert "16 and 16 samples" in said
    assert "now has 17 and 16: give run.name=NAME" in said
    (moved / "train/class1").rename(moved / "train/cat")
    (moved / "val/class1").rename(moved / "val/cat")
    said = refused(capsys, "train", *given, f"data.root={moved}")
    assert "without class1 and with cat: give run.name=NAME" in said


def test_a_split_folder_is_not_split_again(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    data = image_folder(tmp_path / "data", 2, each=8)
    given = (recipe, f"run.folder={tmp_path}", "data.name=", "data.val_fraction=0.25")
    said = refused(capsys, "train", *given, f"data.root={data}")
    assert f"data.root={data / 'train'}" in said
    assert (
        run(["train", *given, *SHORT[:2], f"data.root={data / 'train'}", "data.batch_size=4"]) == 0
    )


def test_a_class_without_images_is_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "val"
    for label in range(9):
        (data / str(label)).mkdir(parents=True)
        Image.new("L", (32, 32)).save(data / str(label) / "0.png")
    assert run(["eval", str(finished), "data.name=", f"data.root={data}"]) == 0
    assert "has no image of 9" in caplog.text


def test_options_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    photo = digit_files(tmp_path / "photos", 1) / "0.png"
    said = refused(capsys, "predict", str(finished), str(photo), "--top", "0")
    assert "see `vitzoo predict --help`" in said
    said = refused(capsys, "predict", str(finished), str(photo), "--draw", str(tmp_path / "a.psd"))
    assert "cannot be drawn" in said
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitzoo ")


def test_a_recipe_for_another_task(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = (finished / "recipe.yaml").read_bytes()
    said = refused(capsys, "eval", str(finished), "task=detection3d")
    assert "classification" in said or "unknown recipe key" in said
    assert (finished / "recipe.yaml").read_bytes() == before


def test_unreadable_images_are_named(
    capsys: pytest.CaptureFixture[str], recipe: str, finished: Path, tmp_path: Path
) -> None:
    data = image_folder(tmp_path / "data", 2, each=8)
    for bad in (data / "train/class0/3.png", data / "val/class1/2.png"):
        bad.write_bytes(bad.read_bytes()[:300])
    arguments = ["train", recipe, "data.name=", f"data.root={data}", f"run.folder={tmp_path}"]
    arguments += ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.batch_size=8"]
    said = refused(capsys, *arguments)
    assert "class0/3.png" in said
    assert "truncated" in said
    assert run([*arguments, "data.on_error=skip", "run.name=skipping"]) == 0
    lines = RunFolder(tmp_path / "skipping").read_metrics()
    assert lines[-1]["unreadable"] == 1
    files = digit_files(tmp_path / "digits")
    (files / "text.png").write_text("no image")
    capsys.readouterr()
    said = refused(capsys, "predict", str(finished), str(files))
    assert "text.png: not an image" in said
    assert run(["predict", str(finished), str(files), "data.on_error=skip"]) == 0
    written = json.loads((finished / "predictions.json").read_text())
    assert len(written["predictions"]) == 4


def test_weights_that_cannot_be_trusted(
    capsys: pytest.CaptureFixture[str], recipe: str, finished: Path, tmp_path: Path
) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/harmed",)

    harmful = tmp_path / "harmful.pth"
    torch.save({"state_dict": Harmful()}, harmful)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Harmful()))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((finished / "weights.safetensors").read_bytes()[:5000])
    here = f"run.folder={tmp_path}"
    for path in (harmful, plain, torn):
        said = refused(capsys, "train", recipe, here, f"model.checkpoint={path}")
        assert path.name in said
    assert not (tmp_path / "harmed").exists()
    files = digit_files(tmp_path / "digits", 1)
    assert "damaged" in refused(capsys, "predict", str(torn), str(files))


def test_train_evaluate_and_predict(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    files = digit_files(tmp_path / "digits")
    figures = tmp_path / "figures.json"
    assert run(["eval", str(finished), "--json", str(figures)]) == 0
    logged = RunFolder(finished).read_metrics()[-1]["metrics"]
    assert json.loads(figures.read_text())["measured"] == logged
    picture = tmp_path / "drawn.png"
    arguments = [str(finished), str(files), "--json", str(tmp_path / "p.json")]
    assert run(["predict", *arguments, "--draw", str(picture), "--top", "2"]) == 0
    assert "4 images" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())["predictions"]
    results = vitzoo.predict(finished, sorted(files.iterdir()))
    assert [result.to_dict() for result in results] == written
    assert {one["label"] for one in written[0]["top"]} <= set("0123456789")
    assert results[0].draw().width == 256
    assert picture.stat().st_size > 1000
    with Image.open(finished / "curves.png") as curves:
        assert curves.width > 500
    in_memory = vitzoo.predict(finished, np.asarray(Image.open(files / "0.png")))
    assert in_memory[0].label == written[0]["label"]
    assert in_memory[0].score == pytest.approx(written[0]["score"], rel=1e-5)


def test_list_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "davit"]) == 0
    assert "msft_in1k" in capsys.readouterr().out
    assert run(["list", "--recipes"]) == 0
    assert "davit-digits" in capsys.readouterr().out
    assert run(["info", "vz_davit_tiny.msft_in1k"]) == 0
    assert "28,360,168" in capsys.readouterr().out


def test_a_missing_extra_is_one_sentence() -> None:
    script = (
        "import sys; sys.modules['typer'] = None; sys.argv = ['vitzoo', 'list'];"
        "from vitzoo.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install vitzoo[train]")
    assert len(done.stderr.strip().splitlines()) == 1


def test_all_recipes_are_read() -> None:
    from vitzoo.engine.recipe import configs_folders, load_recipe

    folder = configs_folders()[0]
    for path in sorted(folder.glob("*/*.yaml")):
        loaded = load_recipe(str(path))
        assert loaded.task == path.parent.name
        assert loaded.run.name == path.stem
