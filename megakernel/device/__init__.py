"""The kernel, in Gluon: one file an instruction, named as its twin in `instructions`; the loader; the interpreter."""
