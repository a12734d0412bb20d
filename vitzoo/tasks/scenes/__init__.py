"""Generated scenes with exact boxes and masks: a synthetic data set for tests, demos and proofs."""

from vitzoo.tasks.scenes.build import VARIANTS, build_scenes, scenes_folder
from vitzoo.tasks.scenes.compose import HEIGHT, WIDTH, Scene, compose

__all__ = [
    "HEIGHT",
    "VARIANTS",
    "WIDTH",
    "Scene",
    "build_scenes",
    "compose",
    "scenes_folder",
]
