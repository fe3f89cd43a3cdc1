"""Where things lie in the three records that kernels share, all arrays of int64.

An *operation record* (one line of a program) holds the address of a compiled kernel and that
kernel's arguments. A *step record* says what one run of a program is about: how many tokens, at
which position, whose state. The *control record* is the thread team's: barrier, job, pipes.
Kernels receive the addresses of these records and nothing else.
"""

from ondevice.kernels.simd import load_i64
from quant.jit import inner

WORD = 8

# operation record
OPERATION_WORDS = 32
KERNEL = 0  # address of the compiled kernel
CURSOR = 1  # next task of this operation; the team zeroes it at the barrier that follows
MEET = 2  # 1: the threads meet after this operation
ARGUMENTS = 3  # first argument

# step record
STEP_WORDS = 32
COUNT = 0  # tokens in this batch
POSITION = 1  # position of the first of them
FIRST = 2  # row of the batch that the output head starts from
THREADS = 3
STATE = 4  # address of the recurrent memory
CACHE = 5  # address of the keys and values
CONTEXT = 6  # positions that the keys and values have room for
TOKENS = 7  # address of int32 token ids, one per row
SCRATCH = 8  # address of the threads' private scratch
SCRATCH_BYTES = 9  # of each thread
REPEAT = 10  # 1: run the program again (decode loop); latched by the sampling kernel
STEPS_LEFT = 11  # tokens that the decode loop may still make
SAMPLER = 12  # address of the sampler record
HISTORY = 13  # address of int32 ids: prompt and answer so far; the decode loop appends
HISTORY_LENGTH = 14
CANCEL = 15  # set by another thread: stop at the next token
ABORT = 16  # set by another thread: stop at the next barrier, the state is lost
OUTCOME = 17  # 0 fine, otherwise the code of what went wrong
NOT_FINITE = 1  # OUTCOME: a logit was NaN or infinite


@inner
def word(record: int, index: int) -> int:
    """The int64 at `index` of a record."""
    return load_i64(record + WORD * index)


@inner
def argument(operation: int, index: int) -> int:
    """Argument `index` of an operation record."""
    return load_i64(operation + WORD * (ARGUMENTS + index))
