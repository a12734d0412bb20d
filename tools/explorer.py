"""Write build/explorer.html: the zoo as one static page, from the registry and benchmarks/."""

import base64
import io
import json
import sys
from pathlib import Path

import timm
import torch
from PIL import Image

import vitzoo
from vitzoo.attention.seen import keys_of_query, record_layers
from vitzoo.engine.look import draw_keys
from vitzoo.zoo.published import all_entries

ROOT = Path(__file__).parents[1]
# Of each family a small model, and a part of a layer's name that shows its kind of attention.
PICTURES = (
    ("vz_davit_tiny", "stages.0"),
    ("vz_litv2_small", "window_attention"),
    ("vz_litv2_small", "stages.2.blocks.0.attn/attention"),
    ("vz_biformer_tiny", "stages.1"),
    ("vz_halonet26t", "halo"),
    ("vz_uhalonet_micro", "stages.1"),
    ("vz_nat_mini", "stages.1"),
    ("vz_dinat_mini", "stages.1.blocks.1"),
    ("vz_sparsifiner_deit_tiny", "blocks.0"),
    ("vz_lookupvit_small", "lookup_infuse"),
)


def models() -> list[dict]:
    """A line per model: facts, tasks of its weights, published top-1, measured speed."""
    speeds = measured()
    lines = []
    for record in map(vitzoo.info, vitzoo.list_models()):
        weights = [entry for entry in all_entries() if entry.model == record.name]
        top1 = [
            dict(entry.published)["top1"]
            for entry in weights
            if entry.task == "classification"
            and "top1" in dict(entry.published)
            and entry.dataset == "ImageNet-1K"
        ]
        lines.append(
            {
                "name": record.name,
                "family": record.family,
                "params": record.params and record.params / 1e6,
                "gmacs": record.gmacs,
                "size": "x".join(map(str, record.input_size[1:]))
                if record.modality == "image"
                else "points",
                "fixed": record.fixed_input_size,
                "licence": record.code_licence,
                "tasks": sorted({entry.task for entry in weights}),
                "top1": max(top1, default=None),
                "speed": speeds.get(record.name),
            }
        )
    return lines


def measured() -> dict[str, float]:
    """Images per second of every model that benchmarks/models.json has a float32 forward of."""
    results = json.loads((ROOT / "benchmarks/models.json").read_text())["results"]
    return {
        line["model"]: 1e3 * line["batch"] / line["model_ms"]
        for line in results
        if line["mode"] == "forward" and line["dtype"] == "float32" and line["size"] == 224
    }


def pictures() -> list[dict]:
    """What one query sees in each kind of attention, as data addresses."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg")).resize((224, 224))
    x = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(224, 224, 3)
    x = (x.permute(2, 0, 1)[None].float() / 255 - 0.45) / 0.225
    found = []
    for name, wanted in PICTURES:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        with record_layers(model, (224, 224)) as layers, torch.no_grad():
            model(x)
        layer = next(layer for layer in layers if wanted in layer.name)
        rows, columns = layer.query_grid
        seen = keys_of_query(layer, (rows * 2 // 5, columns * 3 // 5))
        file = io.BytesIO()
        draw_keys(photo, seen).save(file, "PNG", optimize=True)
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        found.append({"model": name, "layer": layer.name, "image": address})
    return found


def page(*, drawn: bool = True) -> str:
    """The page; without pictures in a moment."""
    machine = json.loads((ROOT / "benchmarks/models.json").read_text())["machine"]
    note = f"Forward, float32, 224 pixels, {machine['processor']}, {machine['date']}."
    data = {
        "models": models(),
        "pictures": pictures() if drawn else [],
        "speed_note": note,
    }
    text = json.dumps(data).replace("</", "<\\/")
    return Path(__file__).with_suffix(".html").read_text().replace("/*DATA*/", text)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/explorer.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page())
    print(target)
