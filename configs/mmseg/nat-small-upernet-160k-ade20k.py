# NAT-Small (arXiv 2204.07143). Published: 48.0 mIoU,
# 49.5 with several scales.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_nat_small", pretrained=True, drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
