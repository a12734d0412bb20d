"""The training and evaluation loop over a task, and the benchmark runner."""
