# DiNAT_s-Large (arXiv 2209.15001) with the dilations that its authors give for crops of 512. They
# reached 53.4 mIoU, 54.6 with several scales, at 640, for which they published no dilations: those
# figures are not of this setting.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(
        name="vz_dinat_s_large", pretrained=True, drop_path_rate=0.3, args=dict(dilations="ade20k")
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)})
)
