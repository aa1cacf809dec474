"""What every device function is given: pointers to global memory, the shared-memory ring, and the record being run."""

from dataclasses import fields

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.codec import WORDS, Word
from megakernel.device.compat import aggregate
from megakernel.geometry import Geometry
from scheduler.limits import MAX_SMS

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

# Words of the control block, int32: written by the kernel, read by the host after a launch.
STOP = gl.constexpr(0)  # first position that is not to be decoded: set when a stop token was chosen
FAULT = gl.constexpr(1)  # 1 once some wait has expired
PROMPT_LENGTH = gl.constexpr(2)
TOP_K = gl.constexpr(3)
SEED_LOW = gl.constexpr(4)
SEED_HIGH = gl.constexpr(5)
INVERSE_TEMPERATURE = gl.constexpr(6)  # fp32 bits; 0: greedy
TOP_P = gl.constexpr(7)  # fp32 bits
NO_NUMBERS = gl.constexpr(8)  # 1 once some logit was no number, or not finite: then STOP is set, too
STOP_TOKENS = gl.constexpr(9)  # how many, then the tokens
REPORTS = gl.constexpr(64)  # from here on, what each consumer, then each loader was stuck in: 1, record, counter,
#                             wanted, seen, position; counter -1: a value
LOADERS = gl.constexpr(MAX_SMS)  # place of the first loader among the reports
REPORT_WORDS = gl.constexpr(8)
CONTROL_WORDS = gl.constexpr(64 + 2 * 8 * MAX_SMS)

DONE = gl.constexpr(2**31 - 1)  # what the loader says it is at when it has ended


class Sizes:
    """A `Geometry` as the kernel takes it: each of its numbers is a compile-time constant in the device functions."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        for field in fields(geometry):
            setattr(self, field.name, gl.constexpr(getattr(geometry, field.name)))

    def __repr__(self) -> str:
        return repr(self.geometry)

    def __hash__(self) -> int:
        return hash(self.geometry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sizes) and self.geometry == other.geometry


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
    """Global memory.  weights, cache: bf16; activations, constants, rope: fp32; the rest int32."""

    weights: gl.tensor
    cache: gl.tensor
    activations: gl.tensor
    constants: gl.tensor
    rope: gl.tensor
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
    """The words of one record that the consumer needs, in registers: fetched while the record before it runs.

    a, b and c are the first payload words.
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
    """The words of one record that the loader needs, fetched while the record before is streamed."""

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


@gluon.jit
def fetch(memory, index):
    """The record at an index of the program's words."""
    at = memory.words + index * RECORD
    return Record(
        word(at, OPCODE),
        word(at, LAYER),
        word(at, PAGE),
        word(at, PAGES),
        word(at, WAITS),
        word(at, WAIT),
        word(at, WAIT + 1),
        word(at, TARGET),
        word(at, TARGET + 1),
        word(at, SIGNAL),
        word(at, SIGNAL + 1),
        word(at, RELEASE),
        word(at, PAYLOAD),
        word(at, PAYLOAD + 1),
        word(at, PAYLOAD + 2),
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


@gluon.jit
def settled(number):
    """The same number, of which every lane of the warp has a copy."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def settle(record):
    """The same record, when its turn has come.

    ptxas keeps some of its words in uniform registers, to which it would move them as soon as they are asked for: it would
    wait for loads whose words are needed a whole record later.  It cannot do so with what comes from a shuffle.
    """
    return Record(
        record.opcode,
        record.layer,
        settled(record.page),
        record.pages,
        record.waits,
        record.wait0,
        record.wait1,
        record.target0,
        record.target1,
        settled(record.signal0),
        settled(record.signal1),
        settled(record.release),
        record.a,
        record.b,
        record.c,
    )
