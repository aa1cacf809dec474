"""What every device function is given: pointers to global memory, the shared-memory ring, and the record being run."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.codec import WORDS, Word
from megakernel import control_block
from megakernel.control_block import Control, Progress, Source
from megakernel.device.compat import aggregate

OPCODE = gl.constexpr(int(Word.OPCODE))
LAYER = gl.constexpr(int(Word.LAYER))
PAGE = gl.constexpr(int(Word.PAGE))
PAGES = gl.constexpr(int(Word.PAGES))
TAPE = gl.constexpr(int(Word.TAPE))
LOAD_WAIT = gl.constexpr(int(Word.LOAD_WAIT))
LOAD_TARGET = gl.constexpr(int(Word.LOAD_TARGET))
WAITS = gl.constexpr(int(Word.WAITS))
WAIT = gl.constexpr(int(Word.WAIT))
TARGET = gl.constexpr(int(Word.TARGET))
SIGNAL = gl.constexpr(int(Word.SIGNAL))
RELEASE = gl.constexpr(int(Word.RELEASE))
PAYLOAD = gl.constexpr(int(Word.PAYLOAD))
RECORD = gl.constexpr(WORDS)

STOP = gl.constexpr(int(Control.STOP))
FAULT = gl.constexpr(int(Control.FAULT))
PROMPT_LENGTH = gl.constexpr(int(Control.PROMPT_LENGTH))
TOP_K = gl.constexpr(int(Control.TOP_K))
SEED_LOW = gl.constexpr(int(Control.SEED_LOW))
SEED_HIGH = gl.constexpr(int(Control.SEED_HIGH))
INVERSE_TEMPERATURE = gl.constexpr(int(Control.INVERSE_TEMPERATURE))
TOP_P = gl.constexpr(int(Control.TOP_P))
NO_NUMBERS = gl.constexpr(int(Control.NO_NUMBERS))
STOP_TOKENS = gl.constexpr(int(Control.STOP_TOKENS))
REPORTS = gl.constexpr(control_block.REPORTS)
REPORT_WORDS = gl.constexpr(control_block.REPORT_WORDS)
LOADERS = gl.constexpr(control_block.LOADERS)
SEQUENCES = gl.constexpr(control_block.SEQUENCES)
SEQUENCE_WORDS = gl.constexpr(control_block.SEQUENCE_WORDS)
REQUEST = gl.constexpr(control_block.REQUEST)
POSITION = gl.constexpr(int(Progress.POSITION))
USED = gl.constexpr(int(Progress.USED))
END = gl.constexpr(int(Progress.END))
SOURCE = gl.constexpr(int(Progress.SOURCE))
SLICES = gl.constexpr(int(Progress.SLICES))
STEPS = gl.constexpr(int(Progress.STEPS))
LAST = gl.constexpr(int(Progress.LAST))
GIVEN = gl.constexpr(int(Source.GIVEN))

FETCH = gl.constexpr("""{
    .reg .b64 at;
    mad.wide.u32 at, $2, 4, $1;
    ld.global.b32 $0, [at];
}""")
DONE = gl.constexpr(2**31 - 1)  # what the loader says it is at when it has ended


@aggregate
class Bucket:
    """What depends on the program's context bucket: see `megakernel.geometry.Bucket`."""

    slices: gl.tensor
    head_pages: gl.tensor
    partial_stride: gl.tensor
    partial_second: gl.tensor
    end_counter: gl.tensor
    records: gl.tensor


@aggregate
class Memory:
    """Global memory.  weights, cache: bf16; activations, constants, rope, hidden: fp32; the rest int32."""

    weights: gl.tensor
    cache: gl.tensor
    activations: gl.tensor
    constants: gl.tensor
    rope: gl.tensor
    hidden: gl.tensor  # the residual stream that prefill left, for `hand_over`
    words: gl.tensor
    counters: gl.tensor
    tokens: gl.tensor
    control: gl.tensor
    patience: gl.tensor  # clock cycles after which a wait is given up, int64
    stamps: gl.tensor  # int64, see `megakernel.stamps`; with S.trace
    bucket: Bucket


@aggregate
class Ring:
    """Shared memory: the pages with their barriers, one staged activation vector, and the loader's leave to go on."""

    pages: gl.shared_memory_descriptor  # [ring, 128, 64] bf16
    full: gl.shared_memory_descriptor  # a page has landed
    empty: gl.shared_memory_descriptor  # a page has been released
    begun: gl.shared_memory_descriptor  # the loader has begun a token
    taken: gl.shared_memory_descriptor  # the consumer has begun a token
    last: gl.shared_memory_descriptor  # [32] int32: 1 when that token is the last of the launch
    staging: gl.shared_memory_descriptor  # [pages, 512] bf16
    reached: gl.shared_memory_descriptor  # [32] int32: number of the record that the consumer runs, counted from the launch
    doing: gl.shared_memory_descriptor  # [32] int32: its opcode
    loading: gl.shared_memory_descriptor  # [32] int32: the page use n that the loader is at, -1 - n once its page is free


@gluon.constexpr_function
def lanes(warps):
    """Layout of the ring's words, each 32 times: one for every thread of a warp."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def make_shared_word():
    """Shared memory for one of the ring's words."""
    return gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def set_shared_word(place, value):
    """Store one of the ring's words, int32."""
    place.store(gl.full([32], 0, gl.int32, lanes(gl.num_warps())) + value)


@gluon.jit
def shared_word(place):
    """One of the ring's words as this warp sees it, int32."""
    return gl.max(place.load(lanes(gl.num_warps())), axis=0)


@aggregate
class Record:
    """The words of one record that the consumer needs, in registers.

    a, b and c are the first payload words; each twin gives them the names of the instruction's fields.
    """

    opcode: gl.tensor
    layer: gl.tensor
    page: gl.tensor
    pages: gl.tensor
    waits: gl.tensor
    wait0: gl.tensor
    wait1: gl.tensor
    target0: gl.tensor
    target1: gl.tensor
    signal0: gl.tensor
    signal1: gl.tensor
    release: gl.tensor
    a: gl.tensor
    b: gl.tensor
    c: gl.tensor


@aggregate
class Load:
    """The words of one record that the loader needs."""

    opcode: gl.tensor
    page: gl.tensor
    pages: gl.tensor
    tape: gl.tensor
    wait: gl.tensor
    target: gl.tensor
    slice: gl.tensor  # of attention


@aggregate
class Step:
    """One execution of one record: which queue index of which SM, for which token."""

    record: Record
    sm: gl.tensor
    index: gl.tensor
    use: gl.tensor  # number of its first page use in this launch
    position: gl.tensor
    epoch: gl.tensor
    trace: gl.tensor  # where its time stamps go


@gluon.jit
def word(record, index: gl.constexpr):
    """One word of a record in memory."""
    return gl.load(record + index)


@gluon.constexpr_function
def take_asm(number):
    """Assembly that gives all lanes of the warp what one of them has."""
    return f"shfl.sync.idx.b32 $0, $1, {number}, 31, 0xffffffff;"


@gluon.jit
def fetch(memory, index):
    """The record at an index of the program's words, on its way: each lane of a warp has one of its words, in one register.

    Were each word a number of its own, ptxas would keep some in uniform registers, or put some aside where registers are few,
    as soon as they are asked for: it would wait for memory at once, and not when the record's turn has come.
    """
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    at = memory.words + index * RECORD
    return gl.inline_asm_elementwise(FETCH, "=r,l,r", [at, lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def taken(fetched, number: gl.constexpr):
    """One word of a fetched record."""
    TAKE: gl.constexpr = take_asm(number)
    return gl.inline_asm_elementwise(TAKE, "=r,r", [fetched], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def record_of(fetched):
    """What the consumer needs of a fetched record, when its turn has come."""
    return Record(
        taken(fetched, OPCODE),
        taken(fetched, LAYER),
        taken(fetched, PAGE),
        taken(fetched, PAGES),
        taken(fetched, WAITS),
        taken(fetched, WAIT),
        taken(fetched, WAIT + 1),
        taken(fetched, TARGET),
        taken(fetched, TARGET + 1),
        taken(fetched, SIGNAL),
        taken(fetched, SIGNAL + 1),
        taken(fetched, RELEASE),
        taken(fetched, PAYLOAD),
        taken(fetched, PAYLOAD + 1),
        taken(fetched, PAYLOAD + 2),
    )


@gluon.jit
def fetch_load(memory, index):
    """What the loader needs of the record at an index."""
    at = memory.words + index * RECORD
    return Load(
        word(at, OPCODE),
        word(at, PAGE),
        word(at, PAGES),
        word(at, TAPE),
        word(at, LOAD_WAIT),
        word(at, LOAD_TARGET),
        word(at, PAYLOAD + 1),
    )
