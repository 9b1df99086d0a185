"""What numbers and names may be on the wire; whatever is beyond is refused where it is decoded.

Wider than anything an honest peer says, so that versions can be mixed, and narrow enough that what
is decoded can be counted, kept and computed with. msgspec's bounds refuse NaN, too.
"""

from typing import Annotated

from msgspec import Meta

__all__ = (
    "Amount",
    "Bias",
    "Choices",
    "Count",
    "Listed",
    "Name",
    "Number",
    "Positive",
    "Probability",
    "Stop",
    "Temperature",
    "Token",
    "UnixTime",
    "Wait",
)

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""llama.cpp's tokens have 32 bits; they are kept in an array of such."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A float, as metrics are, still holds it exactly."""
Choices = Annotated[int, Meta(ge=1, le=64)]
"""Each takes memory on the worker before anything is computed."""
Listed = Annotated[int, Meta(ge=0, le=100)]
"""Alternatives told with each token: fewer than any vocabulary has."""
Amount = Annotated[float, Meta(ge=-1e12, le=1e12)]
"""Finite; a difference of two clocks may be negative."""
Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
"""Finite."""
Temperature = Annotated[float, Meta(ge=0, le=1e6)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Bias = Annotated[float, Meta(ge=-1000, le=1000)]
UnixTime = Annotated[float, Meta(ge=0, le=1e11)]
"""Seconds; some 3,000 years."""
Wait = Annotated[float, Meta(ge=0, le=86_400)]
"""Seconds."""
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9-]{1,64}\Z")]
"""An identity, as `shared.subjects.valid_identity` takes it: it becomes a subject and a header."""
Stop = Annotated[str, Meta(min_length=1)]
