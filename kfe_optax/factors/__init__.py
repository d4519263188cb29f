"""Estimators of a layer's curvature as Kronecker factors: pure (init, update) pairs, one a file."""
