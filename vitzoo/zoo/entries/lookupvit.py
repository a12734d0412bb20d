"""LookupViT's weights (arXiv 2407.12753): none were published, nor was code.

The paper's accuracy tables are not quoted: nobody here has been able to read them.
"""

from vitzoo.zoo.entries._entry import WeightEntry


def _unpublished(size: str) -> WeightEntry:
    return WeightEntry(
        model=f"vz_lookupvit_{size}",
        tag="deepmind_in1k",
        state="never published",
        origin="https://arxiv.org/abs/2407.12753",
        paper="2407.12753",
        notes="A plain ViT's weights serve as a start, see vitzoo/backbones/lookupvit.py.",
    )


# The small size is the zoo's own addition.
ENTRIES = (_unpublished("base"), _unpublished("large"))
