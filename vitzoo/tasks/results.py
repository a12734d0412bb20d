"""What `predict` returns: typed results that draw themselves and turn into JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Ranked:
    """One class of a ranking."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Classification:
    """The classes of one image, best first.

    Attributes:
        source: the image's path, or None where it came from memory.
        top: the best classes with their softmax scores.
        image: the image itself.
    """

    source: str | None
    top: tuple[Ranked, ...]
    image: Image.Image = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """Name of the best class."""
        return self.top[0].label

    @property
    def score(self) -> float:
        """Softmax score of the best class."""
        return self.top[0].score

    def to_dict(self) -> dict[str, Any]:
        """`source`, `label`, `score` and `top` in JSON's types."""
        return {
            "source": self.source,
            "label": self.label,
            "score": self.score,
            "top": [
                {"label": one.label, "index": one.index, "score": one.score} for one in self.top
            ],
        }

    def draw(self, *, side: int = 256) -> Image.Image:
        """The image, its longer side `side` pixels, with the best class under it."""
        scale = side / max(self.image.size)
        size = tuple(max(1, round(length * scale)) for length in self.image.size)
        # Small pictures grow by whole pixels, so that one sees what the model saw.
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        picture = self.image.convert("RGB").resize((size[0], size[1]), resample)
        caption = f"{self.label}  {100 * self.score:.0f} %"
        font = ImageFont.load_default(max(10, side // 14))
        height = max(16, side // 9)
        canvas = Image.new("RGB", (picture.width, picture.height + height), "white")
        canvas.paste(picture, (0, 0))
        ImageDraw.Draw(canvas).text((4, picture.height + 1), caption, fill="black", font=font)
        return canvas


def contact_sheet(
    pictures: list[Image.Image], *, columns: int = 8, gap: int = 6, titles: Sequence[str] = ()
) -> Image.Image:
    """Pictures side by side, in rows of `columns`, on white; `titles` stand over the columns."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    width = max(picture.width for picture in pictures) + gap
    height = max(picture.height for picture in pictures) + gap
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    line = max(16, width // 24)
    head = line + gap if titles else 0
    sheet = Image.new("RGB", (columns * width + gap, head + rows * height + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * width, head + gap + i // columns * height))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(line - 2)
    for i, title in enumerate(titles[:columns]):
        pen.text((gap + i * width, gap // 2), title, "black", font)
    return sheet
