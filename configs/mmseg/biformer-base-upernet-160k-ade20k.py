# BiFormer-B (arXiv 2303.08810). Published: 51.0 mIoU,
# 51.7 with several scales and mirroring. Regions are 8 x 8 for segmentation. `pretrained` takes the
# authors' file.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_biformer_base", pretrained=None, drop_path_rate=0.4, args=dict(n_win=8)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="AmpOptimWrapper", loss_scale=512.0, paramwise_cfg=dict(norm_decay_mult=0.0)
)
# The backbone has BatchNorm: as the authors do, over all processes where there are several.
sync_bn = "torch"
