"""Coarse spaces for two-level preconditioners: which directions couple the layers, and the Fisher matrix between them."""
