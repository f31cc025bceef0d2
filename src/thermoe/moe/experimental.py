"""Which kernels run that have passed their tests in Triton's interpreter only, and on no GPU yet.

They are off. `THERMOE_EXPERIMENTAL_KERNELS=1` switches them on; `tests/gpu/test_choose_on_gpu.py` tests them.
"""

from __future__ import annotations

import os

EXPERIMENTAL = os.environ.get("THERMOE_EXPERIMENTAL_KERNELS") == "1"
