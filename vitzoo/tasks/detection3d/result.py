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

    def draw(self, *, side: int = 900, min_score: float = 0.3) -> Image.Image:
        """A bird's-eye picture, x to the right and y up.

        Args:
            side: pixels of the longer side.
            min_score: boxes below it are left out.
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
        font = ImageFont.load_default(max(10, side // 75))
        for box, score, label in zip(
            self.found.boxes, self.found.scores.tolist(), self.found.labels.tolist(), strict=True
        ):
            if score < min_score:
                continue
            colour = _COLOURS[label % len(_COLOURS)]
            outline = [pixel(x, y) for x, y in corners_from_above(box).tolist()]
            draw.polygon(outline, outline=colour, width=2)
            (front_x, front_y), (other_x, other_y) = outline[0], outline[3]
            x, y, _, length, _, _, yaw = box.tolist()
            nose = pixel(x + 0.75 * length * math.cos(yaw), y + 0.75 * length * math.sin(yaw))
            draw.line([((front_x + other_x) / 2, (front_y + other_y) / 2), nose], fill=colour)
            caption = f"{self.labels[label]} {100 * score:.0f}"
            draw.text((outline[0][0] + 3, outline[0][1] - side // 60), caption, colour, font)
        return picture
