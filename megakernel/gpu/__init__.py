"""The host side of the kernel: what lies in GPU memory, how a program is launched, what an expired wait meant."""
