"""What nvcc makes of the CUDA kernels, on every architecture that setup.py builds for; nothing here runs on a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from greedynas import available_spaces, get_space

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench/gpu"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def bench():
    """Imports a module of bench/gpu by its name."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def nvcc(bench):
    module = bench("nvcc")
    if module.SETUP.find_nvcc() is None:
        pytest.skip("no nvcc on PATH or under CUDA_HOME/bin")
    return module


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """All kernels for all architectures: warnings and spills are errors."""
    return nvcc.compile_kernels(nvcc.BUILT_FOR, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def program(bench, compiled):
    return bench("gpu_model").Program(compiled)


@pytest.fixture
def disassembled(bench, program):
    if bench("sass").find_nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return program


# The whole list, with the multiprocessors of such a device. What setup.py does not build for is skipped.
DEVICES = {"7.5": 40, "8.0": 108, "8.6": 84, "8.9": 128, "9.0": 132, "10.0": 148, "12.0": 170}


@pytest.mark.parametrize("architecture", DEVICES)
def test_every_kernel_is_within_its_budget(bench, nvcc, request, architecture):
    if architecture not in [element.removesuffix("+PTX") for element in nvcc.BUILT_FOR]:
        pytest.skip(f"setup.py does not build for {architecture}")
    resources = bench("kernel_resources")
    compiled = request.getfixturevalue("compiled")
    found = [entry for entry in compiled.resources if entry.architecture == architecture]
    others = {entry.symbol for entry in compiled.resources if entry.architecture != architecture}
    assert {entry.symbol for entry in found} == others
    assert resources.over_budget(found, resources.read_budgets()) == []


def test_later_architectures_are_served_by_ptx(nvcc):
    """Of the newest that has PTX of its own: what comes after it can run that."""
    written = [nvcc.SETUP.ptx_of(element, nvcc.BUILT_FOR) for element in nvcc.BUILT_FOR]
    embedded = [element.removesuffix("+PTX") for element in nvcc.BUILT_FOR if element.endswith("+PTX")]
    assert embedded == [max(written, key=float)]


def planted(nvcc, monkeypatch, tmp_path, code: str) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(code)
    monkeypatch.setattr(nvcc, "sources", lambda: [source])
    nvcc.compile_kernels(["8.0"], tmp_path / "out")


def test_a_spill_is_an_error(nvcc, monkeypatch, tmp_path):
    code = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
      float v[64];
      for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
      __syncthreads();
      for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[63 - i] + v[(i + 7) % 64];
    }
    """
    with pytest.raises(RuntimeError, match=r"planted.cu: nvcc failed:\n(?s:.*)spills(?s:.*)bytes spill stores"):
        planted(nvcc, monkeypatch, tmp_path, code)


def test_a_warning_is_an_error(nvcc, monkeypatch, tmp_path):
    code = 'extern "C" __global__ void __launch_bounds__(32) warns(int* x) { int unused; x[0] = 1; }'
    with pytest.raises(RuntimeError, match="was declared but never referenced"):
        planted(nvcc, monkeypatch, tmp_path, code)


def test_a_kernel_without_launch_bounds_is_refused(nvcc, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unbounded: expected __launch_bounds__, found none"):
        planted(nvcc, monkeypatch, tmp_path, 'extern "C" __global__ void unbounded(int* x) { x[0] = 1; }')


# ---- launches, as the kernels' host code makes them


def space_nodes(nodes):
    """Every node of every space that kernels evaluate in bfloat16, at a few sizes."""
    found = {}
    for name in available_spaces():
        space = get_space(name)
        everything = [[op] * space.num_layers for op in range(space.num_operations)]
        for images in (1, 64, 1000):
            for stage in nodes.evaluation(space, everything, images, space.resolution).values():
                found.update(dict.fromkeys(stage))
    return list(found)


@pytest.mark.parametrize(("architecture", "multiprocessors"), DEVICES.items())
def test_launches_fit_the_devices(bench, compiled, program, architecture, multiprocessors):
    if architecture not in {entry.architecture for entry in compiled.resources}:
        pytest.skip(f"setup.py does not build for {architecture}")
    limits = bench("occupancy").MULTIPROCESSORS[architecture]
    launches = bench("gpu_model").record(
        program.recorder, space_nodes(bench("gpu_nodes")), multiprocessors, limits.block_shared
    )
    taken = {entry.symbol: entry for entry in compiled.resources if entry.architecture == architecture}
    assert sum(map(len, launches.values())) > 200
    for node, of in launches.items():
        assert of, node.line
        for launch in of:
            entry = taken[launch.symbol]
            shared = entry.static_shared + launch.dynamic_shared
            blocks = bench("occupancy").resident_blocks(architecture, launch.threads, entry.registers, shared)
            assert blocks > 0, f"{node.line}: {entry.kernel}: {shared} bytes, {launch.threads} threads"
            assert launch.threads <= entry.threads


def test_plans_refuse_what_does_not_fit(bench, program):
    """98 KB of shared memory hold a piece of x and of the weights for 512 input channels, not for 2,048."""
    node, record = bench("gpu_nodes").Node, bench("gpu_model").record
    fits = node("expand_depthwise", (2, 7, 7, 512, 3072, 3, 1, 2))
    assert record(program.recorder, [fits], 84, 99 << 10)[fits]
    with pytest.raises(ValueError, match="2048 input channels do not fit into the device's shared memory"):
        record(program.recorder, [node("expand_depthwise", (2, 7, 7, 2048, 4096, 3, 1, 2))], 84, 99 << 10)


def test_units_of_a_launch_are_those_of_its_statistics(bench, program):
    node = bench("gpu_nodes").Node("project", (1000, 100, 48, 16, 0, 2))
    (launch,) = bench("gpu_model").record(program.recorder, [node], 132, 227 << 10)[node]
    assert launch.grid == (8, 1, 1)  # tiles of 128 pixels
    assert (launch.threads, launch.plan["passes"]) == (256, 1)


# ---- the model


def test_the_model_runs_through(bench, disassembled, monkeypatch, tmp_path, capsys):
    model = bench("gpu_model")
    monkeypatch.setattr(model, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(model, "Program", lambda _: disassembled)
    files = ["--output", tmp_path / "modelled.json", "--markdown", tmp_path / "page.md"]
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--quick", *map(str, files)])
    model.main()
    assert "2 paths on 1,000 images" in capsys.readouterr().out
    found = json.loads((tmp_path / "modelled.json").read_text())
    assert {row["kernel"] for row in found["kernels"]} == {"expand_depthwise", "project", "finish_map"}
    for row in found["kernels"]:
        assert row["seconds"] >= row["dram_bytes"] / model.H100.dram
        # Far from what was measured a part was not found or its turns were not counted.
        assert 0.4 < row["seconds"] / row["measured"] < 2.5
    assert "| expand_depthwise |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_counted_products_and_multiply_adds_are_at_least_those_of_the_shape(bench, disassembled, kernel, stride):
    model, node = bench("gpu_model"), bench("gpu_nodes").Node
    for size, into, hidden in ((56, 32, 192), (28, 40, 120), (14, 96, 288), (7, 192, 1152)):
        shape = node("expand_depthwise", (100, size, size, into, hidden, kernel, stride, 2))
        launches = disassembled.launches([shape])[shape]
        by_part = model.work(disassembled, shape, launches[0])
        kinds = bench("kernel_work").added(by_part.values())
        least = shape.tensor_flop / 4096
        assert least <= kinds["tensor"] < 3.5 * least
        small = -(-size // stride)
        multiply_adds = 100 * small**2 * hidden * kernel**2 / 64
        assert multiply_adds <= kinds["half"] < 3 * multiply_adds + 0.5 * kinds["issue"]
        assert sum(kinds[kind] for kind in kinds if kind not in ("issue", "wavefronts")) == pytest.approx(
            kinds["issue"]
        )
