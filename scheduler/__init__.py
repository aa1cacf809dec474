"""When and where: lowering, the DAG, placement, the page plan, proofs, the serialised program, simulation."""

from models.command import begin_as_module

begin_as_module()
