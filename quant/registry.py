"""Every format we read and write, by name and by GGUF type number, and the names of the rest."""

from pathlib import Path

from quant.errors import Error
from quant.format import Format
from quant.iq4_nl import IQ4_NL
from quant.iq4_xs import IQ4_XS
from quant.mxfp4 import MXFP4
from quant.plain import BF16, F16, F32
from quant.q2_k import Q2_K
from quant.q3_k import Q3_K
from quant.q4_0 import Q4_0
from quant.q4_1 import Q4_1
from quant.q4_k import Q4_K
from quant.q5_0 import Q5_0
from quant.q5_1 import Q5_1
from quant.q5_k import Q5_K
from quant.q6_k import Q6_K
from quant.q8_0 import Q8_0

_ALL = (
    *(F32, F16, BF16, Q8_0),
    *(Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4),
    *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}

BY_TYPE: dict[int, Format] = {format.type_id: format for format in FORMATS.values()}

TYPE_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    4: "Q4_2",  # 4, 5, 31 to 33 and 36 to 38: retired, but old files hold them
    5: "Q4_3",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def unsupported(type_id: int, tensor: str, path: Path | str) -> Error:
    """The error for a tensor of a type we cannot read: names it and the ones we can."""
    name = TYPE_NAMES.get(type_id, f"number {type_id}, which is unknown")
    return Error(
        f"{path}: tensor {tensor} has type {name}; supported types are {', '.join(FORMATS)}"
    )
