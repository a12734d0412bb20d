"""Results side by side on one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitzoo.tasks.results import contact_sheet


def test_titles_stand_over_the_columns() -> None:
    red, blue = (Image.new("RGB", (240, 60), colour) for colour in ("red", "blue"))
    plain = np.asarray(contact_sheet([red, blue, red, blue], columns=2))
    titled = np.asarray(contact_sheet([red, blue, red, blue], columns=2, titles=("one", "two")))
    head = len(titled) - len(plain)
    assert (titled[head:] == plain)[6:].all()
    half = titled.shape[1] // 2
    # Ink on white over both columns.
    assert titled[:head, :half].min() < 100
    assert titled[:head, half:].min() < 100
