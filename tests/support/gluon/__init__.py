"""Gluon on torch: device functions run as Python, from their own source, with nobody to compile them.

What is held to the source: values, places in global and shared memory, layouts of shared memory bit by bit, barriers and their
phases, copies by TMA that land when they please, roles and thread blocks that go on in any order.  What is not looked at: how
tensors lie in registers, and threads of one role that part (all take every step together).  Fused products and sums are not
fused, and those of the matrix instruction have an order of their own, so numbers agree with a GPU's within rounding.
"""
