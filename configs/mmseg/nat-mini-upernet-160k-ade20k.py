# NAT-Mini (arXiv 2204.07143). Published: 45.1 mIoU,
# 46.4 with several scales.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_nat_mini", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
