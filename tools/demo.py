"""Train narrow models on digits, then on generated scenes; draw what they find in held-out ones."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

import vitzoo
from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.predict import predict_files
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.runfolder import RunFolder
from vitzoo.engine.train import train
from vitzoo.errors import InputError
from vitzoo.tasks.images import digits
from vitzoo.tasks.results import contact_sheet
from vitzoo.tasks.scenes import scenes_folder

DIGITS = "davit-digits"
PIXELS, OBJECTS = "davit-upernet-scenes-quick", "davit-maskrcnn-scenes-quick"
COLUMNS = ("objects found: class, score in %", "class found for every pixel", "the truth")
FIGURES = ("box_AP50", "mask_AP50", "mIoU")


def logistic_regression() -> float:
    """Accuracy in percent of a logistic regression on the pixels of the same split."""
    train_set, held_out = digits(train=True), digits(train=False)
    pixels = [np.reshape(half.images, (len(half), -1)) / 255 for half in (train_set, held_out)]
    model = LogisticRegression(max_iter=5000).fit(pixels[0], train_set.targets)
    return 100 * float(model.score(pixels[1], held_out.targets))


def write_held_out(folder: Path, count: int) -> None:
    """The first held-out digits as image files that say what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = digits(train=False)
    for i in range(count):
        image, target = held_out.image(i)
        image.resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{i:02d}-is-{target}.png")


def learn_digits() -> tuple[RunFolder, dict[str, Any]]:
    """The run, with a picture of predictions, and its figures."""
    run = train(load_recipe(DIGITS, ["run.name=demo"])).folder
    figures = {
        "recipe": DIGITS,
        "top1": evaluate(str(run.root))["top1"],
        "logistic_regression_top1": logistic_regression(),
        "training_seconds": run.read_metrics()[-1]["seconds"],
    }
    write_held_out(run.root / "held-out", 24)
    picture = run.root / "predictions.png"
    predict_files(str(run.root), [str(run.root / "held-out")], top=1, draw=picture)
    print(f"""
360 held-out digits: {figures["top1"]:.1f} % right, a logistic regression \
{figures["logistic_regression_top1"]:.1f} %

  {run.curves}             learning curves
  {picture}        predictions, drawn
  {run.metrics}          a line for each epoch
  {run.weights}    the weights, with their labels
""")
    return run, figures


def learn_scenes(folder: Path, count: int) -> dict[str, Any]:
    """Two runs under `folder`, their figures, and `scenes.png` with `count` held-out scenes."""
    pixels = train(load_recipe(PIXELS, [f"run.folder={folder}", "run.name=pixels"]))
    # The detector begins with what the segmenter has learnt of the scenes.
    start = f"model.checkpoint={pixels.folder.weights}"
    objects = train(load_recipe(OBJECTS, [f"run.folder={folder}", "run.name=objects", start]))
    data = scenes_folder("scenes-digits")
    files = sorted((data / "images" / "val").glob("*.png"))[:count]
    rows = []
    for file, boxes, labels in zip(
        files,
        vitzoo.predict(objects.folder.root, files),
        vitzoo.predict(pixels.folder.root, files),
        strict=True,
    ):
        truth = replace(labels, mask=np.asarray(Image.open(data / "masks" / "val" / file.name)))
        rows += [found.draw(side=512) for found in (boxes, labels, truth)]
    contact_sheet(rows, columns=len(COLUMNS), titles=COLUMNS).save(folder / "scenes.png")
    reached = objects.metrics | pixels.metrics
    runs = (pixels.folder, objects.folder)
    return {
        "data": "100 held-out scenes, generated: synthetic",
        "recipes": [PIXELS, OBJECTS],
        **{key: reached[key] for key in FIGURES},
        "training_seconds": sum(run.read_metrics()[-1]["seconds"] for run in runs),
    }


def main() -> None:
    run, facts = learn_digits()
    written = run.root / "demo.json"
    written.write_text(json.dumps(facts, indent=2) + "\n")
    print("Next, boxes, masks and every pixel's class in generated scenes: some nine minutes.\n")
    scenes = learn_scenes(run.root, count=3)
    written.write_text(json.dumps(facts | {"scenes": scenes}, indent=2) + "\n")
    print(f"""
100 held-out scenes (synthetic): box AP50 {scenes["box_AP50"]:.0f}, mask AP50 \
{scenes["mask_AP50"]:.0f}, mIoU {scenes["mIoU"]:.0f}

  {run.root}/scenes.png             boxes, masks and classes of three of them, and the truth
  {run.root}/predictions.png        held-out digits
  {written}              the figures

Next:
  .venv/bin/vitzoo predict {run.root} {run.root}/held-out          predict on images again
  .venv/bin/vitzoo predict {run.root}/objects IMAGES            boxes and masks
  .venv/bin/vitzoo list                                            the models
  .venv/bin/vitzoo list --recipes                                  the recipes
  .venv/bin/vitzoo train davit-finetune data.root=FOLDER run.name=mine    on your own images""")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
