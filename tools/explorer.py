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
from vitzoo.attention.seen import keys_of_query, on_map, record_layers
from vitzoo.backbones.flatformer import flatten_windows
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
POINTS = "vz_flatformer"


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
                "speed": speeds[record.name]["rate"] if record.name in speeds else None,
                "speed_size": speeds[record.name]["size"] if record.name in speeds else None,
            }
        )
    return lines


def measured() -> dict[str, dict]:
    """Images per second of every model that benchmarks/models.json has a float32 forward of."""
    results = json.loads((ROOT / "benchmarks/models.json").read_text())["results"]
    found: dict[str, dict] = {}
    for line in results:
        if (line["mode"], line["dtype"]) != ("forward", "float32"):
            continue
        rate = 1e3 * line["batch"] / line["model_ms"]
        # The fastest of the settings that were measured: what somebody gets who asks for it.
        if rate > found.get(line["model"], {"rate": 0.0})["rate"]:
            found[line["model"]] = {"rate": rate, "size": line["size"]}
    return found


def growth() -> list[dict]:
    """How cost grows: panels of curves, each from the sweeps that were measured."""
    report = json.loads((ROOT / "benchmarks/models.json").read_text())
    models = [
        {
            "name": name,
            "points": [[row["size"] ** 2, row["model_ms"]] for row in sweep["rows"]],
            "exponent": sweep["exponents"].get("model"),
        }
        for name, sweep in report["sweeps"].items()
    ]
    baselines = {
        (sweep["baseline"], row["size"]): row["baseline_ms"]
        for sweep in report["sweeps"].values()
        for row in sweep["rows"]
    }
    for name in sorted({baseline for baseline, _ in baselines}):
        points = [[size**2, ms] for (own, size), ms in sorted(baselines.items()) if own == name]
        models.append({"name": name, "points": points, "exponent": None})
    slopes = json.loads((ROOT / "benchmarks/ops.json").read_text())["slopes"]
    operators = [
        {
            "name": name,
            "points": [list(pair) for pair in zip(slope["tokens"], slope["ms"], strict=True)],
            "exponent": slope["exponent"],
        }
        for name, slope in slopes.items()
    ]
    panels = (
        ("Whole models, one image", "pixels", models),
        ("Attention operators", "tokens of the map", operators),
    )
    return [{"title": t, "unit": unit, "curves": curves} for t, unit, curves in panels if curves]


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
        found.append({"model": name, "layer": layer.name, "image": address(draw_keys(photo, seen))})
    return [*found, points_picture()]


def points_picture() -> dict:
    """The group of one pillar of a generated LiDAR frame, from above."""
    torch.manual_seed(0)
    grid = (56, 56)
    # Walls and noise, as a sweep has them: most cells are empty.
    ring = torch.arange(400) / 400 * 6.283
    walls = torch.stack([28 + 22 * ring.sin(), 28 + 18 * ring.cos()], 1)
    cells = torch.cat([walls.round().long(), torch.randint(0, 56, (160, 2))]).unique(dim=0)
    coords = torch.nn.functional.pad(cells, (1, 0))
    model = timm.create_model(POINTS, in_chans=16, num_heads=2, grid_size=grid, group_size=36)
    with record_layers(model.eval(), grid) as layers, torch.no_grad():
        model(torch.randn(len(cells), 16), coords, 1)
    order = flatten_windows(coords, grid, model.window_size)[0]
    seen = on_map(keys_of_query(layers[0], (0, len(cells) // 2)), cells[order], grid)
    ground = torch.full(grid, 60, dtype=torch.uint8)
    ground[cells[:, 0], cells[:, 1]] = 255
    above = Image.fromarray(ground.numpy()).resize((224, 224), Image.Resampling.NEAREST)
    return {"model": POINTS, "layer": layers[0].name, "image": address(draw_keys(above, seen))}


def address(picture: Image.Image) -> str:
    """A picture as a data address."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(*, drawn: bool = True) -> str:
    """The page; without pictures in a moment."""
    machine = json.loads((ROOT / "benchmarks/models.json").read_text())["machine"]
    note = f"Forward, float32, batch 8, {machine['processor']}, {machine['date']}."
    data = {
        "models": models(),
        "growth": growth(),
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
