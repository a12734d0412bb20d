"""Detection in LiDAR sweeps: data, augmentation, metrics and the task."""
