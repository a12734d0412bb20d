"""Train a narrow DaViT on scikit-learn's digits, evaluate it, and predict on held-out digits."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

from vitzoo.engine.evaluate import evaluate
from vitzoo.engine.predict import predict_files
from vitzoo.engine.recipe import load_recipe
from vitzoo.engine.train import train
from vitzoo.tasks.images import digits

RECIPE = "davit-digits"


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


def main() -> None:
    summary = train(load_recipe(RECIPE, ["run.name=demo"]))
    run = summary.folder
    measured = evaluate(str(run.root))
    baseline = logistic_regression()
    write_held_out(run.root / "held-out", 24)
    picture = run.root / "predictions.png"
    predict_files(str(run.root), [str(run.root / "held-out")], top=1, draw=picture)
    facts = {
        "recipe": RECIPE,
        "top1": measured["top1"],
        "logistic_regression_top1": baseline,
        "training_seconds": run.read_metrics()[-1]["seconds"],
    }
    (run.root / "demo.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"""
360 held-out digits: {measured["top1"]:.1f} % right, a logistic regression {baseline:.1f} %

  {run.curves}             learning curves
  {picture}        predictions, drawn
  {run.metrics}          a line for each epoch
  {run.root}/demo.json              the two figures above
  {run.weights}    the weights, with their labels

Next:
  .venv/bin/vitzoo predict {run.root} {run.root}/held-out          predict on images again
  .venv/bin/vitzoo list                                            the models
  .venv/bin/vitzoo list --recipes                                  the recipes
  .venv/bin/vitzoo train davit-finetune data.root=FOLDER run.name=mine    on your own images""")


if __name__ == "__main__":
    main()
