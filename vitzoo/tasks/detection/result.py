"""Objects found in one image: drawn, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitzoo.tasks.scenes.build import run_lengths

# Wong's palette, which most people who see few colours can tell apart.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


@dataclass(frozen=True)
class Objects:
    """Objects of one image, by falling score.

    Attributes:
        source: the image's path, or None where it came from memory.
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        scores: (N,) from 0 to 1.
        indices: (N,) class numbers from 0.
        masks: (N, H, W) bool, or None where the head gives none.
        labels: names of the classes.
        category_ids: their ids in the COCO file of the training.
        image: the image itself.
    """

    source: str | None
    boxes: Tensor
    scores: Tensor
    indices: Tensor
    masks: Tensor | None = field(repr=False)
    labels: tuple[str, ...]
    category_ids: tuple[int, ...]
    image: Image.Image = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """`source`, `size` and `objects` in JSON's types, boxes and masks in COCO's forms.

        Masks are run lengths as lists, which need no package to be read; `coco_metrics` takes
        them, pycocotools' `loadRes` after its own `mask.frPyObjects`.
        """
        objects: list[dict[str, Any]] = []
        for (x0, y0, x1, y1), score, index in zip(
            self.boxes.tolist(), self.scores.tolist(), self.indices.tolist(), strict=True
        ):
            objects.append(
                {
                    "label": self.labels[index],
                    "category_id": self.category_ids[index],
                    "score": score,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                }
            )
        if self.masks is not None:
            size = [self.image.height, self.image.width]
            for one, mask in zip(objects, self.masks.numpy(), strict=True):
                one["segmentation"] = {"size": size, "counts": run_lengths(mask)}
        return {
            "source": self.source,
            "size": [self.image.width, self.image.height],
            "objects": objects,
        }

    def summary(self, *, min_score: float = 0.5) -> str:
        """How many objects of each class have at least `min_score`, such as `2 coin, 1 bag`."""
        sure = self.indices[self.scores >= min_score].tolist()
        found = [f"{sure.count(i)} {self.labels[i]}" for i in dict.fromkeys(sure)]
        return ", ".join(found) or f"nothing with a score of {min_score:g} or more"

    def draw(self, *, side: int = 512, min_score: float = 0.5) -> Image.Image:
        """The image with boxes, masks, labels and scores.

        Args:
            side: pixels of the longer side.
            min_score: objects below it are left out.
        """
        picture = self.image.convert("RGB")
        shown = [i for i, score in enumerate(self.scores.tolist()) if score >= min_score]
        for i in reversed(shown):
            if self.masks is not None:
                cover = Image.fromarray((self.masks[i].numpy() * 128).astype(np.uint8))
                picture.paste(Image.new("RGB", picture.size, self._colour(i)), (0, 0), cover)
        scale = side / max(picture.size)
        picture = picture.resize([max(1, round(length * scale)) for length in picture.size])
        draw = ImageDraw.Draw(picture)
        line = max(10, side // 28)
        font = ImageFont.load_default(line)
        for i in reversed(shown):
            x0, y0, x1, y1 = (scale * value for value in self.boxes[i].tolist())
            draw.rectangle((x0, y0, x1, y1), outline=self._colour(i), width=2)
            index = int(self.indices[i])
            caption = f"{self.labels[index]} {100 * float(self.scores[i]):.0f}"
            right = picture.width - draw.textlength(caption, font=font) - 2
            place = (max(0.0, min(x0 + 2, right)), max(0.0, y0 - 1.3 * line))
            draw.rectangle(draw.textbbox(place, caption, font=font), fill=self._colour(i))
            draw.text(place, caption, fill="black", font=font)
        return picture

    def _colour(self, i: int) -> str:
        return _COLOURS[int(self.indices[i]) % len(_COLOURS)]
