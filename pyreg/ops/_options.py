"""Options that are one of a few names, for type checkers; at run time a wrong one is a ``ValueError``.

What stands in for a function of torch takes ``reduction: str``, as torch does.
"""

from __future__ import annotations

from typing import Literal

Reduction = Literal["none", "mean", "sum"]
Kind = Literal["arctan", "arsinh", "erf"]  # of weight companders
DecayOn = Literal["w", "v"]
Variant = Literal["paper", "agedb", "nyud2"]  # of ConR
CostName = Literal["sqeuclidean", "euclidean", "cosine"]
Reference = Literal["product", "counting"]  # what entropy is relative to
