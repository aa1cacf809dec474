"""A product of 1 to 64 tokens with an FP8 matrix, bound by the reading of the matrix: `megakernel.gemm.gemm.skinny_gemm`."""
