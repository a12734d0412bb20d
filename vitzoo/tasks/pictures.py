"""Images as people have them, files or values in memory, to PIL images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample

_ORIENTATION = 0x0112  # The EXIF tag; 1 is upright.


def open_image(file: Any, *, where: str, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """A decoded image from a path, a file object or a PIL image.

    Args:
        file: see above.
        where: what to call it in a message.
        mode: Pillow's, of the result.
        upright: turn a photograph as its EXIF orientation says. Not where coordinates or masks that
            somebody drew lie on the pixels as they are stored.

    Raises:
        UnreadableSample: missing, truncated, or no image.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        # Asked first: the transposition copies images that need none, too.
        if upright and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if mode in ("RGB", "L"):
            image = _eight_bits(image)
        # The conversion decodes every pixel, so a truncated file fails here and not later.
        return image.convert(mode)
    except FileNotFoundError:
        raise UnreadableSample(where, "no such file") from None
    except Image.UnidentifiedImageError:
        raise UnreadableSample(where, "not an image that Pillow can identify") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableSample(where, str(error)) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit image scaled to 8 bit, where Pillow's conversion would cut at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float32)
    # Pillow opens some 16-bit files as 32-bit integers, the mode of small whole numbers, too.
    if image.mode == "I" and values.max(initial=0) <= 255:
        return image
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))


def image_of(given: Any, *, mode: str = "RGB") -> Image.Image:
    """An image as somebody has it -> PIL image.

    Args:
        given: a path, a PIL image, or an array or tensor (H, W), (H, W, 3), tensors also
            (1 or 3, H, W), of uint8 or of floats from 0 to 1 (not normalised).
        mode: Pillow's, of the result.

    Raises:
        InputError: anything else.
        UnreadableSample: a path that is no readable image.
    """
    if isinstance(given, str | Path):
        if Path(given).is_dir():
            raise InputError(f"{given} is a folder: name the images in it")
        return open_image(given, where=str(given), mode=mode)
    if isinstance(given, np.ndarray) and given.size and np.issubdtype(given.dtype, np.floating):
        given = _bytes(torch.from_numpy(given.astype(np.float32))).numpy()
    if isinstance(given, torch.Tensor):
        given = _pixels(given.detach().cpu())
    if isinstance(given, np.ndarray):
        try:
            given = Image.fromarray(given)
        except (TypeError, ValueError):
            found = f"{given.dtype} {given.shape}"
            raise InputError(f"an array of an image is uint8 (H, W, 3), not {found}") from None
    if not isinstance(given, Image.Image):
        raise InputError(
            f"an image is a path, a PIL image, an array or a tensor, not {type(given)}"
        )
    return open_image(given, where="an image in memory", mode=mode)


def _bytes(image: torch.Tensor) -> torch.Tensor:
    """Floats from 0 to 1 -> uint8."""
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"an image of floats has values from 0 to 1, not {low:.3g} to {high:.3g}: give it "
            "before it is normalised"
        )
    return (image * 255).round().to(torch.uint8)


def check_drawable(path: Path) -> None:
    """Check the path of a picture to write.

    Raises:
        InputError: its name says no format that Pillow writes.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path} cannot be drawn: its name must end in .png, .jpg or the like")


def _pixels(image: torch.Tensor) -> Any:
    """uint8 array (H, W) or (H, W, 3) of a tensor's image."""
    if image.is_floating_point():
        image = _bytes(image)
    # (3, H, 3) can be read both ways: torch's own layout is the likelier.
    if image.dim() == 3 and image.shape[0] in (1, 3):
        image = image.movedim(0, -1)
    return image.squeeze(-1).numpy() if image.dim() == 3 and image.shape[-1] == 1 else image.numpy()
