"""GREEDYNAS_CPU_CAPABILITY: each instruction set computes the same losses, and wrong names are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from greedynas_ext import _library

NAMES = ("portable", "avx2", "avx512")
SCRIPT = """
    import json, sys
    sys.path[:0] = [sys.argv[1]]
    import torch
    from greedynas_ext import _library, evaluate_paths
    from supernets import draw_images, plain_image_losses, relative_error
    from test_fused_spaces import calibration_for, covering_paths, small_supernet

    torch.set_num_threads(1)
    found = {"used": _library.require_chain().used_capability(), "bf16": _library.require_chain().bf16_available()}
    for activation in ("relu6", "hswish", "silu"):
        net = small_supernet(torch.float32, activation=activation)
        exact = small_supernet(activation=activation)
        exact.load_state_dict(net.state_dict())
        paths = covering_paths(net)
        images, targets = draw_images(6, 33, dtype=torch.float32)
        for bn in ("batch", "running", "recalibrated"):
            calibration = calibration_for(bn, images)
            double = None if calibration is None else calibration.double()
            expected = plain_image_losses(exact, paths, images.double(), targets, bn, double)[0].mean(1)
            for precision in ("fp64", "fp32", "bf16"):
                given = {"bn": bn, "calibration": calibration, "fused": True}
                if precision == "fp64":
                    result = evaluate_paths(exact, paths, images, targets, **given)
                else:
                    result = evaluate_paths(net, paths, images, targets, precision=precision, **given)
                error = relative_error(result.losses, expected)
                found[f"{activation} {bn} {precision}"] = [result.plan.kernels, error]
    print(json.dumps(found))
"""


def run(capability: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GREEDYNAS_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def machine_has(name: str) -> bool:
    best: str = _library.require_chain().machine_capability()
    return NAMES.index(name) <= NAMES.index(best)


@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set(name: str) -> None:
    if not machine_has(name):
        pytest.skip(f"this machine lacks {name}")
    done = run(name, SCRIPT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    used, bf16 = found.pop("used"), found.pop("bf16")
    assert used == name
    if name in ("portable", "avx2"):
        assert not bf16
    assert len(found) == 27
    for case, (kernels, error) in found.items():
        precision = case.split()[-1]
        if precision == "bf16" and bf16:
            assert kernels == "fused, avx512_bf16", case
            assert 1e-5 < error < 0.1, case
        else:
            assert kernels == f"fused, {used}", case  # bf16 where there are no such products is fp32
            assert error <= (1e-10 if precision == "fp64" else 1e-5), case


REFUSED = """
    import sys
    sys.path[:0] = [sys.argv[1]]
    from greedynas_ext import evaluate_paths
    from supernets import draw_images
    from test_fused_spaces import covering_paths, small_supernet

    net = small_supernet()
    for fused in (True, None):
        try:
            evaluate_paths(net, covering_paths(net), *draw_images(3, 17), fused=fused)
        except ValueError as error:
            print(error)
    evaluate_paths(net, covering_paths(net), *draw_images(3, 17), fused=False)
"""


@pytest.mark.parametrize("name", ["avx1024", "AVX2"])
def test_an_unknown_name_is_refused(name: str) -> None:
    done = run(name, REFUSED)
    assert done.returncode == 0, done.stderr
    message = f"GREEDYNAS_CPU_CAPABILITY: expected one of portable, avx2, avx512, got {name}"
    assert done.stdout.splitlines() == [message, message]


def test_an_empty_name_is_none() -> None:
    done = run("", "from greedynas_ext import _library; print(_library.require_chain().used_capability())")
    assert done.stdout.strip() == _library.require_chain().machine_capability()
