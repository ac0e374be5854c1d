"""Parameters, cells, the evidence store and executors."""
