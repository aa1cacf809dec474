"""The skinny product y = x Wᵀ of a few tokens with an FP8 matrix: how it is shared out, loaded, multiplied and finished."""
