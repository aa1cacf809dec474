"""What the kernel does differently where a step computes several columns; with one column none of it is compiled."""
