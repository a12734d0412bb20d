"""Boxes found in one sweep: drawn from above, and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitzoo.heads.detection3d.boxes import corners_from_above
from vitzoo.heads.detection3d.decode import Detections3D
from vitzoo.heads.detection3d.pillars import PillarGrid

# Wong's palette, which most people who see few colours can tell apart.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_BACKGROUND = (16, 16, 24)
_INK = "#e8e8f0"
_SURE = 0.3


@dataclass(frozen=True)
class Boxes3D:
    """Boxes of one sweep, class by class, each by falling score.

    Attributes:
        source: the file's path, or None where the points came from memory.
        found: boxes, scores, classes.
        labels: names of the classes.
        points: (N, C) the detector's points.
        dropped: points left out: not finite, or outside the range.
        grid: the detector's range.
    """

    source: str | None
    found: Detections3D
    labels: tuple[str, ...]
    points: Tensor = field(repr=False)
    dropped: int
    grid: PillarGrid = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """`source`, `points`, `dropped` and `boxes` in JSON's types; metres and radians."""
        boxes = []
        for row, score, label in zip(
            self.found.boxes.tolist(),
            self.found.scores.tolist(),
            self.found.labels.tolist(),
            strict=True,
        ):
            boxes.append(
                {
                    "label": self.labels[label],
                    "index": label,
                    "score": score,
                    "centre": row[:3],
                    "size": row[3:6],
                    "yaw": row[6],
                }
            )
        if self.found.velocities is not None:
            for box, velocity in zip(boxes, self.found.velocities.tolist(), strict=True):
                box["velocity"] = velocity
        return {
            "source": self.source,
            "points": len(self.points),
            "dropped": self.dropped,
            "boxes": boxes,
        }

    def summary(self, *, min_score: float = _SURE) -> str:
        """Boxes of each class with at least `min_score`, and the points, in a line."""
        sure = self.found.labels[self.found.scores >= min_score].tolist()
        counts = [f"{sure.count(i)} {self.labels[i]}" for i in dict.fromkeys(sure)]
        found = ", ".join(counts) or f"nothing with a score of {min_score:g} or more"
        return f"{found} ({len(self.points)} points, {self.dropped} dropped)"

    def draw(self, *, side: int = 900, min_score: float = _SURE) -> Image.Image:
        """A bird's-eye picture, x to the right and y up, with the vehicle and a scale.

        Args:
            side: pixels of the longer side.
            min_score: boxes below it are left out; the picture says how many.
        """
        x0, y0, _, x1, y1, _ = self.grid.point_range
        scale = side / max(x1 - x0, y1 - y0)
        size = (math.ceil((x1 - x0) * scale), math.ceil((y1 - y0) * scale))
        picture = Image.new("RGB", size, _BACKGROUND)
        draw = ImageDraw.Draw(picture)

        def pixel(x: float, y: float) -> tuple[float, float]:
            return (x - x0) * scale, (y1 - y) * scale

        for x, y, z in self.points[:, :3].tolist():
            grey = int(min(220, max(70, 90 + 60 * z)))
            draw.point(pixel(x, y), fill=(grey, grey, grey))
        # Two metres of arrow: where the vehicle is and where it looks.
        draw.polygon([pixel(1, 0), pixel(-1, 0.8), pixel(-1, -0.8)], fill=_INK)
        font = ImageFont.load_default(max(10, side // 75))
        shown = self.found[self.found.scores >= min_score]
        # The best last, on top of the others.
        for i in shown.scores.argsort().tolist():
            label = int(shown.labels[i])
            colour = _COLOURS[label % len(_COLOURS)]
            outline = [pixel(x, y) for x, y in corners_from_above(shown.boxes[i]).tolist()]
            draw.polygon(outline, outline=colour, width=2)
            (front_x, front_y), (other_x, other_y) = outline[0], outline[3]
            x, y, _, length, _, _, yaw = shown.boxes[i].tolist()
            nose = pixel(x + 0.75 * length * math.cos(yaw), y + 0.75 * length * math.sin(yaw))
            draw.line([((front_x + other_x) / 2, (front_y + other_y) / 2), nose], fill=colour)
            caption = f"{self.labels[label]} {100 * shown.scores[i].item():.0f}"
            beside = max(x for x, _ in outline) + 3, min(y for _, y in outline)
            _write(draw, beside, caption, colour, font)
        bar = _bar(max(x1 - x0, y1 - y0))
        note = (
            f"{bar} m    {len(shown)} of {len(self.found)} boxes, score from {100 * min_score:.0f}"
        )
        left, bottom = side // 60, size[1] - side // 60
        draw.line([(left, bottom), (left + bar * scale, bottom)], fill=_INK, width=2)
        _write(draw, (left, bottom - side // 45), note, _INK, font)
        return picture


def _bar(metres: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that fits into a fifth of `metres`; at least 1."""
    tens = 10 ** max(0, math.floor(math.log10(metres / 5)))
    return max(tens * step for step in (1, 2, 5) if step == 1 or tens * step <= metres / 5)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str, font: Any
) -> None:
    """Text that starts at a place, moved to lie inside the picture."""
    width, height = draw.im.size
    _, _, right, bottom = draw.textbbox((0, 0), text, font)
    place = (max(0, min(at[0], width - right)), max(0, min(at[1], height - bottom)))
    draw.text(place, text, colour, font)
