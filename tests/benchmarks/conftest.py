"""Triton kernels run interpreted here; Triton asks when a kernel is decorated."""

import os

os.environ["TRITON_INTERPRET"] = "1"
