"""The grouped product, in Gluon: which tiles there are, and how one is multiplied and stored."""
