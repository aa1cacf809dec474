"""When and where: lowering, the DAG, placement, the page plan, proofs, the serialised program, simulation."""
