"""FlatFormer's weights: none were published (arXiv 2301.08739)."""

from vitzoo.zoo.entries._entry import WeightEntry

ENTRIES = (
    WeightEntry(
        model="vz_flatformer",
        tag="mit_waymo",
        state="never published",
        origin="https://github.com/mit-han-lab/flatformer",
        paper="2301.08739",
        task="detection3d",
        dataset="Waymo Open Dataset",
        num_classes=3,
        input_size=(128, 468, 468),
        published=(("L1 mAP", 76.1), ("L1 mAPH", 73.4), ("L2 mAP", 69.7), ("L2 mAPH", 67.2)),
        notes="The data set's licence forbids publishing weights. Checkpoints that users trained "
        "with the authors' code load. The accuracy is of the one-frame model, validation set.",
    ),
)
