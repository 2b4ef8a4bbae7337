"""For which maps, on which devices, a test runs that is not for bf16 alone (conftest.py)."""

import pytest

ALL = ["bf16", "fp16", "fp16 on sm_75"]
of_all = pytest.mark.parametrize("cuda", ALL, indirect=True)
of_halves = pytest.mark.parametrize("cuda", ALL[1:], indirect=True)
