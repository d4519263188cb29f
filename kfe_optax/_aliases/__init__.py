"""Optimizers ready to use, and `info`."""
