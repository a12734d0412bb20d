# DiNAT_s-Large (arXiv 2209.15001). Published: 53.4 mIoU,
# 54.6 with several scales. At 640 as DiNAT-Large, but in half precision, as its authors have it.
_base_ = ["./dinat-large-upernet-160k-ade20k.py"]
model = dict(backbone=dict(name="vz_dinat_s_large.shilabs_in22k"))
optim_wrapper = dict(type="AmpOptimWrapper")
