"""The curvature statistics of one step, in a lazy form: forward pass, draws, reductions, microbatches."""
