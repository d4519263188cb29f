"""Optax gradient transformations, one a file; all take `taps=` in `update`."""
