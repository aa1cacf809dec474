"""What the machine has: the numbers that the scheduler plans with and the checker checks against.

Hardware figures are those of compute capability 9.0 (NVIDIA CUDA C++ Programming Guide, technical specifications).
"""

from __future__ import annotations

MAX_SMS = 200  # thread blocks of one program, one per SM; no device of today has more SMs
SHARED_MEMORY = 227 * 1024  # bytes one thread block may use
RESERVED = 3 * 1024  # bytes for barriers, reductions and layout conversions of the kernel,
RESERVED_QUANTISED = 5 * 1024  # and where weights are widened in registers
INT32_MAX = 2**31 - 1
COUNTER_STRIDE = 32  # int32 elements between counters: each has a 128-byte line of its own
