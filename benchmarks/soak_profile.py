"""Makes every property test try many more examples, as long as it sets no number itself.

A pytest plug-in: `pytest -p benchmarks.soak_profile`.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "soak", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("soak")
