"""Levelling: the LM head is cut so that every SM streams about the same number of bytes in a token.

No operation divides evenly: on 132 SMs some run two row blocks of a QKV matrix of 192 and others one.  The LM head is the
last and largest operation and its cut is free, so it takes up what the layers left uneven: the SMs with the fewest bytes so
far get the longest runs.  Who waits for whom does not change, since its readers wait for the whole head.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from instructions.base import Instruction
from instructions.lm_head import LmHead
from instructions.shape import Shape
from scheduler.place import Queues


def level_head(program: Sequence[Instruction], shape: Shape, queues: Queues) -> list[Instruction]:
    """The program with the same LM-head instructions, in the same places, re-cut to level the SMs' bytes."""
    heads = {i: sm for sm, queue in enumerate(queues) for i in queue if isinstance(program[i], LmHead)}
    matrix = shape.matrix("head")
    total = [
        sum(program[i].cost(shape, shape.bucket).bytes for i in queue if not isinstance(program[i], LmHead)) for queue in queues
    ]
    blocks = dict.fromkeys(heads, 1)
    block = LmHead(0, 0, 1, 0).cost(shape, shape.bucket).bytes
    least = [(total[sm], i) for i, sm in heads.items()]
    heapq.heapify(least)
    for _ in range(matrix.blocks - len(heads)):
        load, i = least[0]
        blocks[i] += 1
        heapq.heapreplace(least, (load + block, i))
    levelled, first = list(program), 0
    for slot, i in enumerate(sorted(heads)):
        levelled[i] = LmHead(0, first, blocks[i], slot)
        first += blocks[i]
    return levelled
