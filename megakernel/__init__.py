"""How it runs: the Gluon kernel, its launch, the CPU virtual machine, and the engine (token ids in, token ids out)."""

from models.process import begin_as_module

begin_as_module()
