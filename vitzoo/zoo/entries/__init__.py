"""The weights table, a file per family."""

from vitzoo.zoo.entries._entry import DataConfig, State, WeightEntry, tag_arguments, timm_configs

__all__ = ["DataConfig", "State", "WeightEntry", "tag_arguments", "timm_configs"]
