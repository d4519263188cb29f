"""Research: the coarse-space correction of two-level K-FAC."""
