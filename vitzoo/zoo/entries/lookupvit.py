"""LookupViT's weights (arXiv 2407.12753): none were published, nor was code; a ViT's are a start.

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


# The small size is the zoo's own addition. It goes without a start of its own, which would be what
# its bare name loads.
ENTRIES = (
    _unpublished("base"),
    WeightEntry(
        model="vz_lookupvit_base",
        tag="deit_start",
        sources=("https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",),
        licence="apache-2.0",
        origin="https://github.com/facebookresearch/deit",
        paper="2012.12877",
        notes="Plain DeiT, where training starts; what LookupViT adds to a ViT is untrained. "
        "The licence is the origin's code's; none was read beside the file.",
    ),
    _unpublished("large"),
)
