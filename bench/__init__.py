"""Measurements of Cloister: an emulated link, a bare gRPC baseline, and the benchmarks that use them."""

from __future__ import annotations

import os

# As `cloister` does for its own processes, before torch is imported; here it holds for all that is compared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
