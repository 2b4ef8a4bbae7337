"""GREEDYNAS_CPU_CAPABILITY: each instruction set computes the same losses; wrong and refused ones are not used."""

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

NAMES = ("portable", "avx2", "avx512", "amx")
SCRIPT = """
    import json, sys
    sys.path[:0] = [sys.argv[1]]
    import torch
    from greedynas_ext import _library, evaluate_paths
    from supernets import draw_images, plain_image_losses, relative_error
    from test_fused_spaces import calibration_for, covering_paths, small_supernet

    torch.set_num_threads(1)
    found = {"used": _library.require_chain().used_capability(), "bf16": _library.require_chain().bf16_kernels()}
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
        assert bf16 == ""
    elif name == "amx":
        assert bf16 == "amx"
    elif machine_has("amx"):
        assert bf16 == "avx512_bf16"
    else:
        assert bf16 in ("", "avx512_bf16")
    wide = "avx512" if name == "amx" else name  # matrix tiles multiply bfloat16 alone
    assert len(found) == 27
    for case, (kernels, error) in found.items():
        precision = case.split()[-1]
        if precision == "bf16" and bf16:
            assert kernels == f"fused, {bf16}", case
            assert 1e-5 < error < 0.1, case
        else:
            assert kernels == f"fused, {wide}", case  # bf16 where there are no such products is fp32
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


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx512_bf16"])
def test_an_unknown_name_is_refused(name: str) -> None:
    done = run(name, REFUSED)
    assert done.returncode == 0, done.stderr
    message = f"GREEDYNAS_CPU_CAPABILITY: expected one of portable, avx2, avx512, amx, got {name}"
    assert done.stdout.splitlines() == [message, message]


def test_an_empty_name_is_none() -> None:
    done = run("", "from greedynas_ext import _library; print(_library.require_chain().used_capability())")
    assert done.stdout.strip() == _library.require_chain().machine_capability()


# Before torch is loaded: from here on Linux refuses this process the registers of matrix tiles, by a filter of system
# calls in the kernel's own little machine language.
REFUSE_TILES = """
    import ctypes, struct

    ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, EPERM = 158, 0x1023, 1
    PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
    LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
    ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | EPERM
    instructions = [  # code, jump if true, jump if false, constant; offsets are those of struct seccomp_data
        (LOAD, 0, 0, 4), (EQUAL, 0, 5, 0xC000003E),  # x86-64
        (LOAD, 0, 0, 0), (EQUAL, 0, 3, ARCH_PRCTL),
        (LOAD, 0, 0, 16), (EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
        (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(filters)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0
    ):
        raise SystemExit(f"no filter: errno {ctypes.get_errno()}")
"""
FALLS_BACK = """
    import json, sys
    sys.path[:0] = [sys.argv[1]]
    from greedynas_ext import _library, evaluate_paths, info
    from supernets import draw_images
    from test_fused_spaces import covering_paths, small_supernet
    import torch

    chain = _library.require_chain()
    found = {name: getattr(chain, name)() for name in ("machine_capability", "capability_reason")}
    try:
        found["used"] = chain.used_capability()
    except ValueError as error:
        found["used"] = str(error)
    else:
        found["bf16"] = chain.bf16_kernels()
        net = small_supernet(torch.float32)
        images = draw_images(6, 33, dtype=torch.float32)
        result = evaluate_paths(net, covering_paths(net), *images, precision="bf16", fused=True)
        found["kernels"], found["losses"] = result.plan.kernels, result.losses.tolist()
    found["info"] = info.describe()["CPU kernels"]
    print(json.dumps(found))
"""


def without_tiles(capability: str) -> dict[str, Any]:
    if not machine_has("amx"):
        pytest.skip("this machine lacks amx")
    done = run(capability, textwrap.dedent(REFUSE_TILES) + textwrap.dedent(FALLS_BACK))
    if done.stderr.startswith("no filter"):
        pytest.skip(f"this system has no filters of system calls: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["machine_capability"] == "avx512"
    assert "it has amx too, but was refused it: Operation not permitted" in found["capability_reason"]
    return found


def test_tiles_that_linux_refuses_are_not_used() -> None:
    found = without_tiles("")
    assert found["used"] == "avx512"
    assert found["bf16"] in ("", "avx512_bf16")
    assert found["kernels"] == f"fused, {found['bf16'] or 'avx512'}"
    assert found["capability_reason"] in found["info"]
    forced = run("avx512", FALLS_BACK)  # the same kernels where nothing is refused
    assert forced.returncode == 0, forced.stderr
    unrefused = json.loads(forced.stdout)
    assert unrefused["machine_capability"] == "amx"
    assert "refused" not in unrefused["capability_reason"]
    assert (unrefused["kernels"], unrefused["losses"]) == (found["kernels"], found["losses"])


def test_tiles_that_linux_refuses_cannot_be_asked_for() -> None:
    message = "GREEDYNAS_CPU_CAPABILITY: this machine has at most avx512, got amx"
    assert without_tiles("amx")["used"] == message
