"""Optimizers on the networks that people train today: `python -m benchmarks.today --help`."""
