"""What the machine can do: one file an instruction.  See `instructions.registry` for the list."""
