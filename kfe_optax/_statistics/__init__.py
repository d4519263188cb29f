"""What a tag makes of a layer's inputs and output gradients: rows, or sums over uses; row masks."""
