"""When and where: lowering, the DAG, placement, the page plan, proofs, the serialised program, simulation."""

from models.process import begin_as_module

begin_as_module()
