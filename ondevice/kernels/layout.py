"""Where things lie in the three records that kernels share, all arrays of int64.

An *operation record* (one line of a program) holds the address of a compiled kernel, how many tasks
its work falls into, and that kernel's arguments. A *step record* says what one run of a program is
about: how many tokens, at which position, whose state. The *control record* is the thread team's.
Kernels receive the addresses of the first two and nothing else.
"""

from ondevice.kernels.simd import load_i64
from quant.jit import inner

WORD = 8

# operation record
OPERATION_WORDS = 32
KERNEL = 0  # address of the compiled kernel
# it has TASKS * (COUNT, if PER_TOKEN) * (the int64 at TIMES, if that is not 0) tasks, at least 1;
# with at most FEW tokens FEW_TASKS instead of TASKS, unless that is 0
TASKS = 1
PER_TOKEN = 2
TIMES = 3
THEN = 4  # what may follow
FEW_TASKS = 5
ARGUMENTS = 6  # first argument
LOOP = 30  # 0, or address of an int64: unless that is 0, its group is followed by another one,
BACK = 31  # which begins so many operations before the next, or after it where this is negative

BARRIER = 0  # THEN: the next operation begins when all tasks of this one are done
BESIDE = 1  # the next operation's tasks may run at the same time
# the next operation has as many tasks, each to follow the same one of this; none where TIMES says 0
CHAIN = 2

FEW = 8
"""Tokens up to which a batch is few: reading the weights takes longer than multiplying them."""

# step record
STEP_WORDS = 32
COUNT = 0  # tokens in this batch
POSITION = 1  # position of the first of them
FIRST = 2  # row of the batch that the output head starts from
STATE = 3  # address of the recurrent memory
CACHE = 4  # address of the keys and values
CONTEXT = 5  # positions that the keys and values have room for
TOKENS = 6  # address of int32 token ids, one per row
SCRATCH = 7  # address of the threads' private scratch
SCRATCH_BYTES = 8  # of each thread
REPEAT = 9  # 1: run the program again (decode loop); latched by the sampling kernel
STEPS_LEFT = 10  # tokens that the decode loop may still make
SAMPLER = 11  # address of the sampler record
HISTORY = 12  # address of int32 ids: prompt and answer so far; the decode loop appends
HISTORY_LENGTH = 13
CANCEL = 14  # set by another thread: stop at the next token
ABORT = 15  # set by another thread: stop at the next barrier, the state is lost
OUTCOME = 16  # 0 fine, otherwise the code of what went wrong
JOURNAL = 17  # address of the tentative tokens' inputs to the recurrences (kernels/delta.py)
PENDING = 18  # tokens of the journal that have been accepted and are not in the memory yet
TENTATIVE = 19  # last tokens of this batch that may be taken back: the memory stays before them
STEADY = 20  # not 0: a batch of this program cannot be aborted
NOT_FINITE = 1  # OUTCOME: a logit was NaN or infinite
READ_FAILED = 2  # OUTCOME: an expert could not be read


@inner
def word(record: int, index: int) -> int:
    """The int64 at `index` of a record."""
    return load_i64(record + WORD * index)


@inner
def argument(operation: int, index: int) -> int:
    """Argument `index` of an operation record."""
    return load_i64(operation + WORD * (ARGUMENTS + index))


@inner
def are_few(step: int) -> bool:
    """Whether the batch has at most FEW tokens."""
    return word(step, COUNT) <= FEW


@inner
def heads_of_task(step, task, heads, few):
    """(token, first head, end): all heads of a token, or `few` of them where tokens are few."""
    used = few if are_few(step) else heads
    parts = heads // used
    return task // parts, task % parts * used, (task % parts + 1) * used
