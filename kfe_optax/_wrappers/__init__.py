"""Around a preconditioner: length of a step, KL clip, quadratic model, adaptive damping, averages, sharded state."""
