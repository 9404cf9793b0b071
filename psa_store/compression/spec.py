"""How float32 travels in fewer bytes: rounded, quantized, or only the largest elements of a gradient.

=============== ======================================================================= ==================
text            an element travels as                                                   bytes per element
=============== ======================================================================= ==================
``none``        float32                                                                 4
``bf16``        bfloat16, to nearest even                                               2
``bf16:both``   the same, and parameters too                                            2
``fp16``        float16 times a power of two per block of 256                           2 + 1/256
``int8``        -127..127 times a scale per block of 256, rounded at random             1 + 2/256
``int4``        -7..7 times a scale per block of 64, rounded at random                  1/2 + 2/64
``topk:0.01``   nothing, but for the largest 1%: their places and float32 values        8 * fraction
=============== ======================================================================= ==================

Rounding at random is unbiased: up with the probability that makes the mean exact, to within 2**-16 of a scale. Its
random numbers are a pure function of :func:`rounding_stream`, so a rank that is computed again sends the same bytes.
What ``topk`` does not send stays in the residual, which is added to the next gradient (error feedback: Lin et al.,
arXiv 1712.01887). So its bytes depend on the residual too: a rank that moves to another worker without its residual
loses what was held back, and its bytes differ from those of an undisturbed run.

All but ``bf16:both`` are made of a finished gradient by :mod:`psa_store.compression.codec`; in rounds parameters travel
in the same form, each version as what it adds to the one before. With ``bf16:both`` the memory in which gradients and
parameters are shared and sent is bfloat16 itself, see :mod:`psa_store.job.wire_layout`.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from psa_store.errors import UsageError

HALF_BLOCK = 256
_FRACTION_MAX = 0.5
_KNOWN = "none, bf16, bf16:both, fp16, int8, int4, or topk:0.01"


class Form(StrEnum):
    NONE = "none"
    BF16 = "bf16"
    BF16_BOTH = "bf16:both"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    TOPK = "topk"


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels -levels..levels times the scale of a block."""

    levels: int
    """One less than a power of two. Then the float32 quotient peak / levels is never rounded down to a value with the
    8 significant bits of a scale, and a scale that is not smaller than the quotient keeps every code within levels."""
    block: int
    per_byte: int

    @property
    def scale_max(self) -> float:
        """A power of two: with any code whatsoever, the value is finite."""
        return 2.0**127 / (self.levels + 1)

    def sizes(self, n: int) -> tuple[int, int]:
        """Bytes of scales, bytes of codes."""
        return 2 * -(-n // self.block), -(-n // self.per_byte)


GRIDS = {Form.INT8: Grid(levels=127, block=256, per_byte=1), Form.INT4: Grid(levels=7, block=64, per_byte=2)}


@dataclass(frozen=True, slots=True)
class Compression:
    """Use :func:`parse_compression`. ``str()`` gives the text back, in its shortest form.

    The way of a gradient::

        payload = torch.empty(compression.payload_bytes(flat.numel()), dtype=torch.uint8)
        codec.encode(compression, flat, payload, stream=rounding_stream(seed, step, rank, shard))
        codec.decode(compression, payload, gradient)
    """

    form: Form = Form.NONE
    fraction: float = 0.0
    """``topk``: the share of elements that is sent."""

    @property
    def needs_residual(self) -> bool:
        """Whether ``encode`` wants the caller to keep what was not sent: as many float32, zero at first."""
        return self.form is Form.TOPK

    def __str__(self) -> str:
        return f"{self.form.value}:{self.fraction}" if self.form is Form.TOPK else self.form.value

    def payload_bytes(self, n: int) -> int:
        """The size of any encoding of ``n`` elements."""
        match self.form:
            case Form.NONE:
                return 4 * n
            case Form.BF16 | Form.BF16_BOTH:
                return 2 * n
            case Form.FP16:
                return 2 * n + -(-n // HALF_BLOCK)
            case Form.INT8 | Form.INT4:
                return sum(GRIDS[self.form].sizes(n))
            case Form.TOPK:
                return 8 * self.kept(n)

    @property
    def encodes(self) -> bool:
        """Whether the codec has a part in it: gradients travel as payloads that mean something to it alone."""
        return self.form not in (Form.NONE, Form.BF16_BOTH)

    @property
    def narrows(self) -> bool:
        """Whether the memory in which float32 gradients and parameters are shared and sent is bfloat16."""
        return self.form is Form.BF16_BOTH

    def applies_to(self, dtype: str) -> bool:
        """Whether gradients of this dtype are encoded; others travel as the wire's layout says."""
        return self.encodes and dtype == "float32"

    def kept(self, n: int) -> int:
        """``topk``: how many of ``n`` elements are sent."""
        # The fraction as it is written: in floats, 0.07 of 100 elements would be 8.
        return math.ceil(Fraction(str(self.fraction)) * n)


NONE = Compression()


def parse_compression(text: str) -> Compression:
    """Read a compression from text such as ``int8``, ``bf16:both`` or ``topk:0.01``.

    Raises:
        UsageError: it is none; names what is known.
    """
    name, colon, number = text.partition(":")
    try:
        form = Form(name)
    except ValueError as error:
        raise UsageError(f"compression {text!r}: there is no {name!r}; use {_KNOWN}") from error
    if text == Form.BF16_BOTH:
        return Compression(Form.BF16_BOTH)
    if form is not Form.TOPK:
        if colon:
            raise UsageError(f"compression {text!r}: {name} takes no options; use {_KNOWN}")
        return Compression(form)
    try:
        fraction = float(number)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= _FRACTION_MAX:
        raise UsageError(
            f"compression {text!r}: give topk the share of elements to send, as in topk:0.01; above 0, and at most "
            f"{_FRACTION_MAX}, where places and values take as many bytes as all elements"
        )
    return Compression(form, fraction)
