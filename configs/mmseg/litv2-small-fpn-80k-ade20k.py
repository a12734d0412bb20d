# LITv2-S (arXiv 2205.13213), 8 x 2 images, whole images at test. Published: 44.3 mIoU. The authors'
# trained segmenter loads with load_from as it is:
# https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_s_fpn_r50_512x512_80k_ade20k.pth
_base_ = ["./_base_/semantic_fpn_80k.py"]
model = dict(
    backbone=dict(name="vz_litv2_small.ziplab_in1k", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
