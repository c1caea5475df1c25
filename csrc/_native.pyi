"""Native kernels of holdfast."""
