"""Train narrow models on digits and on generated scenes; evaluate and predict on held-out ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.predict import predict, predict_files
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train
from vitzoo.tasks.images import digits
from vitzoo.tasks.results import contact_sheet
from vitzoo.tasks.scenes import build_scenes

RECIPE = "davit-digits"
# Half a minute on two cores for both heads: enough for a sketch.
SCENES = {"train": 80, "val": 16}
NARROW = "model.args={depths: [1, 1, 1, 1], embed_dims: [16, 32, 64, 96], num_heads: [1, 2, 4, 6]}"
BOXES = [
    "data.source=coco",
    "data.train_annotations=annotations/instances_train.json",
    "data.val_annotations=annotations/instances_val.json",
    "data.train_images=images/train",
    "data.val_images=images/val",
    "data.min_size=[96]",
    "data.max_size=128",
    "model.channels=32",
    "model.anchor_sizes=[8,16,32,48,64]",
    "schedule.epochs=8",
]
SHOWN = ("box_AP50", "mask_AP50", "mIoU")
LABELS = ["data.size=[96,128]", "data.batch_size=8", "schedule.epochs=8"]


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


def learn_digits() -> tuple[Any, dict[str, float]]:
    """The run's folder, with a picture of predictions, and its figures."""
    run = train(load_recipe(RECIPE, ["run.name=demo"])).folder
    write_held_out(run.root / "held-out", 24)
    picture = run.root / "predictions.png"
    predict_files(str(run.root), [str(run.root / "held-out")], top=1, draw=picture)
    return run, {
        "top1": evaluate(str(run.root))["top1"],
        "logistic_regression_top1": logistic_regression(),
        "training_seconds": run.read_metrics()[-1]["seconds"],
    }


def learn_scenes(folder: Path) -> dict[str, float]:
    """Boxes, masks and labels of generated scenes; draws `scenes.png`."""
    data = folder / "scenes"
    if not (data / "classes.json").is_file():
        build_scenes(data, "scenes-digits", counts=SCENES)
    shared = [NARROW, f"data.root={data}", f"run.folder={folder}", "schedule.warmup_updates=20"]
    shared += ["run.eval_every=100"]
    held_out = sorted(str(path) for path in (data / "images" / "val").glob("*.png"))[:3]
    figures, drawn = {"training_seconds": 0.0}, []
    for recipe, values in (("davit-maskrcnn-scenes", BOXES), ("davit-upernet-scenes", LABELS)):
        summary = train(load_recipe(recipe, [*shared, *values]))
        figures |= {key: summary.metrics[key] for key in SHOWN if key in summary.metrics}
        figures["training_seconds"] += summary.folder.read_metrics()[-1]["seconds"]
        drawn.append([found.draw() for found in predict(summary.folder.root, held_out)])
    # A row is a scene: its objects, its labels.
    pairs = [picture for row in zip(*drawn, strict=True) for picture in row]
    contact_sheet(pairs, columns=2).save(folder / "scenes.png")
    return figures


def main() -> None:
    run, facts = learn_digits()
    scenes = learn_scenes(run.root)
    written = {"recipe": RECIPE, **facts, "scenes": scenes}
    (run.root / "demo.json").write_text(json.dumps(written, indent=2) + "\n")
    linear = facts["logistic_regression_top1"]
    reached = ", ".join(f"{key} {scenes[key]:.0f}" for key in SHOWN)
    print(f"""
360 held-out digits: {facts["top1"]:.1f} % right, a logistic regression {linear:.1f} %
{SCENES["val"]} held-out scenes, generated ones: {reached}
after {scenes["training_seconds"]:.0f} s on {SCENES["train"]} scenes: a sketch

  {run.curves}             learning curves
  {run.root}/predictions.png        predictions, drawn
  {run.root}/scenes.png             boxes, masks and labels of three held-out scenes
  {run.metrics}          a line for each epoch
  {run.root}/demo.json              the figures above
  {run.weights}    the weights, with their labels

Next:
  .venv/bin/vitzoo predict {run.root} {run.root}/held-out          predict on images again
  .venv/bin/vitzoo list                                            the models
  .venv/bin/vitzoo list --recipes                                  the recipes
  .venv/bin/vitzoo train davit-finetune data.root=FOLDER run.name=mine    on your own images""")


if __name__ == "__main__":
    main()
