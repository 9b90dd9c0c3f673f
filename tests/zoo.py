"""The zoo: tiny models of every family, each with the counts that a person reads in its source.

`CASES` convert and `REFUSED` do not; `EXTRA_CASES` and `EXTRA_REFUSED` are further families.
"""

from __future__ import annotations

from zoo_case import Case, Inputs, case_ids, float_outputs, perturb, to_float64
from zoo_decoders import DECODER_CASES, DECODER_REFUSED
from zoo_encoders import ENCODER_CASES, ENCODER_REFUSED
from zoo_extra import EXTRA_CASES, EXTRA_REFUSED
from zoo_handwritten import HANDWRITTEN_CASES, HANDWRITTEN_REFUSED
from zoo_torch import TORCH_CASES, TORCH_REFUSED

__all__ = [
    "ALL_CASES",
    "CASES",
    "EXTRA_CASES",
    "EXTRA_REFUSED",
    "REFUSED",
    "Case",
    "Inputs",
    "by_name",
    "case_ids",
    "float_outputs",
    "perturb",
    "to_float64",
]

CASES: tuple[Case, ...] = (*DECODER_CASES, *ENCODER_CASES, *TORCH_CASES, *HANDWRITTEN_CASES)
REFUSED: tuple[Case, ...] = (
    *DECODER_REFUSED,
    *ENCODER_REFUSED,
    *TORCH_REFUSED,
    *HANDWRITTEN_REFUSED,
)
ALL_CASES: tuple[Case, ...] = (*CASES, *REFUSED, *EXTRA_CASES, *EXTRA_REFUSED)


def by_name(name: str) -> Case:
    return next(case for case in ALL_CASES if case.name == name)
