"""Linear algebra of Kronecker products: inverses, eigenbases, damping, and how devices divide the work."""
