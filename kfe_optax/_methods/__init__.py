"""Preconditioners, one a file, on the contract of `layerwise`: what to do with factors, bases and scales."""
