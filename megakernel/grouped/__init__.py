"""Products of a mixture of experts: rows that are sorted by expert, each times its expert's matrix, in one launch."""
