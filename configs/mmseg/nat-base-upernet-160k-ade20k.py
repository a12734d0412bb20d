# NAT-Base (arXiv 2204.07143). Published: 48.5 mIoU,
# 49.7 with several scales.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_nat_base", pretrained=True, drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
