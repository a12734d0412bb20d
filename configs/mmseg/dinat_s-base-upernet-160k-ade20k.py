# DiNAT_s-Base (arXiv 2209.15001). Published: 49.4 mIoU,
# 50.2 with several scales. Dilations are the authors' for this task; they hold no parameters.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(
        name="vz_dinat_s_base", pretrained=True, drop_path_rate=0.3, args=dict(dilations="ade20k")
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
