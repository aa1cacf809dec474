"""What the network is: configuration, checkpoints, the weight tape, RoPE tables, the plain PyTorch reference."""
