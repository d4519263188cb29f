"""What a layer is: its parameters as one matrix, its kind, what feeds it, chains of layers, the printed table."""
