"""What a traced loss holds in the place of layers and registered losses, and the tag of registered outputs."""
