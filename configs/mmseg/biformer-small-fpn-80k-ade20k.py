# BiFormer-S (arXiv 2303.08810), 8 x 4 images. Published: 48.9 mIoU. Regions are 8 x 8 for
# segmentation. `pretrained` takes the authors' file.
_base_ = ["./_base_/semantic_fpn_80k.py"]
model = dict(
    backbone=dict(name="vz_biformer_small", drop_path_rate=0.15, args=dict(n_win=8)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=1000, end=80000, by_epoch=False),
]
# The backbone has BatchNorm: as the authors do, over all processes where there are several.
sync_bn = "torch"
