"""For which maps, on which devices, a test runs that is not for bf16 alone (conftest.py)."""

import pytest

ALL = ["bf16", "fp16", "fp16 on sm_75", "fp32", "fp32 on sm_75"]
of_all = pytest.mark.parametrize("cuda", ALL, indirect=True)
# One of each: kernels of maps of 16 bits and of floats are written apart.
of_both = pytest.mark.parametrize("cuda", ["bf16", "fp32"], indirect=True)
of_floats = pytest.mark.parametrize("cuda", ["fp32", "fp32 on sm_75"], indirect=True)
