"""The resident engine: weights, buffers and captured graphs that stay from one edit to the next."""
