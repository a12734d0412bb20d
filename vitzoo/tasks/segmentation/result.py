"""Labels of one image's pixels: drawn over it, and as JSON."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray[Any, Any]


def palette_of(count: int) -> Array:
    """Colours (count, 3) uint8 that differ in hue, then in lightness."""
    # Steps of the golden ratio keep neighbours of any count apart.
    hues = (0.08 + 0.618034 * np.arange(count)) % 1
    lights = 0.45 + 0.2 * (np.arange(count) // 12 % 2)
    rows = [colorsys.hls_to_rgb(h, v, 0.75) for h, v in zip(hues, lights, strict=True)]
    return np.round(255 * np.array(rows)).astype(np.uint8)


@dataclass(frozen=True)
class LabelMap:
    """The label of every pixel of an image.

    Attributes:
        source: the image's path, or None where it came from memory.
        labels: names of the classes.
        mask: (H, W) label numbers.
        palette: colours (classes, 3) uint8.
        image: the image itself.
    """

    source: str | None
    labels: tuple[str, ...]
    mask: Array = field(repr=False, compare=False)
    palette: Array = field(repr=False, compare=False)
    image: Image.Image = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """`source`, `size` (height, width), `classes` by falling area, and `runs` in JSON's types.

        `runs` holds the mask row by row as [label number, length] pairs.
        """
        flat = self.mask.ravel()
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        lengths = np.diff(np.append(starts, flat.size))
        counts = np.bincount(flat, minlength=len(self.labels))
        classes = [
            {
                "label": self.labels[i],
                "index": int(i),
                "pixels": int(counts[i]),
                "share": float(counts[i] / flat.size),
            }
            for i in np.argsort(-counts, kind="stable")
            if counts[i]
        ]
        return {
            "source": self.source,
            "size": list(self.mask.shape),
            "classes": classes,
            "runs": np.stack([flat[starts], lengths], 1).tolist(),
        }

    def summary(self) -> str:
        """The classes of largest area, such as `road 61.3 %, car 4.1 %`."""
        largest = self.to_dict()["classes"][:5]
        return ", ".join(f"{one['label']} {100 * one['share']:.1f} %" for one in largest)

    def mask_image(self) -> Image.Image:
        """The label numbers as a picture with a palette, for a PNG file."""
        wide = Image.fromarray(self.mask.astype(np.uint8 if len(self.labels) <= 256 else np.int32))
        if len(self.labels) <= 256:
            wide.putpalette(self.palette.ravel().tolist())
        return wide

    def draw(self, *, side: int = 384, opacity: float = 0.55) -> Image.Image:
        """The image, its longer side `side` pixels, under its labels' colours, and their names."""
        colours = Image.fromarray(self.palette[self.mask])
        mixed = Image.blend(self.image.convert("RGB"), colours, opacity)
        scale = side / max(mixed.size)
        width, height = (max(1, round(length * scale)) for length in mixed.size)
        mixed = mixed.resize((width, height), Image.Resampling.BICUBIC)
        names = [entry for entry in self.to_dict()["classes"] if entry["share"] >= 0.002][:8]
        line = max(14, side // 22)
        canvas = Image.new("RGB", (width, height + line * len(names) + 4), "white")
        canvas.paste(mixed, (0, 0))
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(line - 4)
        for i, entry in enumerate(names):
            y = height + 2 + i * line
            pen.rectangle(
                (4, y + 2, line, y + line - 3), tuple(self.palette[entry["index"]].tolist())
            )
            caption = f"{entry['label']}  {100 * entry['share']:.1f} %"
            pen.text((line + 6, y), caption, "black", font)
        return canvas
