"""Target-free passes: rewrites of a block's graph into richer ops, one pass a file."""
