"""How many examples: few and always the same ones, or random ones in rounds (tests/fuzz/__main__.py)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Slow examples are no failures, and neither are arguments that a test sorts out.
_COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
    "report_multiple_bugs": False,
}
settings.register_profile("pyreg-ci", derandomize=True, database=None, max_examples=15, **_COMMON)
settings.register_profile(
    "pyreg-long", max_examples=int(os.environ.get("PYREG_FUZZ_EXAMPLES", "30")), database=None, **_COMMON
)
settings.load_profile(os.environ.get("PYREG_FUZZ", "pyreg-ci"))
