"""Plain PyTorch, on whatever device it has: for whoever has no GPU that runs the kernel."""
