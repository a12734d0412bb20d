"""COCO's figures, from pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_results(
    found: dict[str, Tensor], image_id: Any, category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's objects in the form of COCO's result files, with compressed masks.

    Args:
        found: `boxes` (N, 4), `labels` (N,) from 1, `scores` (N,), and `masks` (N, 1, H, W) with
            probabilities.
        image_id: the file's.
        category_ids: the file's id of label i + 1.
    """
    corners = found["boxes"].cpu().double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    results: list[dict[str, Any]] = []
    for box, label, score in zip(
        boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True
    ):
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "bbox": box,
                "score": score,
            }
        )
    if "masks" in found:
        from pycocotools import mask as coco_mask

        masks = (found["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        for result, mask in zip(results, masks, strict=True):
            result["segmentation"] = coco_mask.encode(np.asfortranarray(mask))
    return results


def coco_metrics(
    truth: dict[str, Any], results: list[dict[str, Any]], *, masks: bool
) -> dict[str, float]:
    """COCO's twelve figures in percent: `box_AP`, `box_AP50`, ..., and `mask_AP`, ...

    Figures that nothing defines, such as that of large objects where there are none, are left out;
    without any object there are none.

    Args:
        truth: a COCO file's content, of the images to judge.
        results: in the form of COCO's result files; run lengths of masks may be lists, as
            `Objects.to_dict` gives them.
        masks: also judge masks.
    """
    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    figures: dict[str, float] = {}
    for name, kind in kinds.items():
        stats = _stats(truth, results, kind)
        figures |= {
            f"{name}_{key}": 100 * float(value)
            for key, value in zip(_NAMES, stats, strict=True)
            if value >= 0
        }
    return figures


def _stats(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools writes into the dictionaries that it is given, and prints.
    given = [dict(one) for one in results]
    own = {key: [dict(one) for one in value] for key, value in truth.items()}
    for number, one in enumerate(own["annotations"], start=1):
        # It takes an id of 0 for "none", and annotations of one id for one: files of other tools
        # count from 0, or anew in every image, or have no ids.
        one["id"] = number
        one.setdefault("iscrowd", 0)
    for one in given:
        if kind == "bbox":
            one.pop("segmentation", None)
        else:
            # With a box present, its area would count as the mask's size.
            one.pop("bbox", None)
            one["segmentation"] = _compressed(one["segmentation"])
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = own
        reference.createIndex()
        for one in own["annotations"]:
            if "area" not in one:
                one["area"] = _area(reference, one, kind)
        judged = COCOeval(reference, _found(reference, given), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged.stats


def _compressed(runs: dict[str, Any]) -> dict[str, Any]:
    """Run lengths in the only form that pycocotools takes of results."""
    from pycocotools import mask

    if not isinstance(runs["counts"], list):
        return runs
    found: dict[str, Any] = mask.frPyObjects(runs, *runs["size"])
    return found


def _area(reference: Any, annotation: dict[str, Any], kind: str) -> float:
    from pycocotools import mask

    if kind == "bbox":
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    return float(mask.area(reference.annToRLE(annotation)))


def _found(reference: Any, results: list[dict[str, Any]]) -> Any:
    """The results as pycocotools holds them; its own loading stops where there are none."""
    from pycocotools.coco import COCO

    if results:
        return reference.loadRes(results)
    nothing = COCO()
    nothing.dataset = {**reference.dataset, "annotations": []}
    nothing.createIndex()
    return nothing
