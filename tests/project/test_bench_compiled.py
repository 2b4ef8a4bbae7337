"""What is read of compiled kernels, and the model made of it, on code and numbers that are known."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SASS = Path(__file__).parent / "recorded/loops.sass"


@pytest.fixture(scope="module")
def bench():
    """Imports a module of bench/gpu by its name."""
    import sys

    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "bench/gpu"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench/gpu"))
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / "bench/gpu")):
            del sys.modules[name]


# ---- machine code


@pytest.fixture(scope="module")
def loops(bench):
    (kernel,) = bench("sass").read(SASS.read_text()).values()
    return kernel


def test_loops_are_found_with_what_is_in_them(loops):
    outer, inner = loops.loops
    assert inner.parent is outer
    assert outer.children == [inner]
    assert outer.parent is None
    assert [i.opcode for at in inner.blocks for i in loops.blocks[at].instructions] == [
        "IMAD.MOV.U32", "LDG.E", "IADD3", "ISETP.GE.AND", "IADD3", "IMAD.X", "FFMA", "BRA"
    ]  # fmt: skip
    assert loops.kinds(inner.blocks) == Counter({"float": 3, "global": 1, "integer": 3, "control": 1, "issue": 8})
    own = loops.kinds(outer.own)
    assert own["issue"] == 38
    assert own["wavefronts"] == 2  # a store and a load of 4 bytes a lane
    assert (own["special"], own["half"], own["global"]) == (2, 1, 1)
    assert own["control"] == 6  # BSSY, BSYNC, two branches, two barriers
    # Before and behind it; the branch to itself that follows cannot be reached.
    assert loops.kinds(loops.outside)["issue"] == 14


def test_a_way_through_a_loop_leaves_out_what_is_not_on_it(bench):
    text = """.text.branches:
        /*0000*/                   MOV R0, R1 ;
.L_x_0:
        /*0010*/              @P0 BRA `(.L_x_1) ;
        /*0020*/                   FADD R0, R0, R0 ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   MUFU.EX2 R0, R0 ;
        /*0050*/                   MUFU.RCP R0, R0 ;
.L_x_2:
        /*0060*/                   STS.128 [R0], R4 ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""
    kernel = bench("sass").read(text)["branches"]
    (loop,) = kernel.loops
    left = next(at for at in loop.blocks if kernel.blocks[at].count("FADD"))
    right = next(at for at in loop.blocks if kernel.blocks[at].count("MUFU"))
    assert kernel.kinds(kernel.path(loop, []))["issue"] == 7
    assert kernel.kinds(kernel.certain(loop, []))["issue"] == 3  # the first branch, and what is behind both ways
    assert kernel.certain(loop, [left]) == kernel.path(loop, [left])
    assert kernel.kinds(kernel.certain(None, [loop.header]))["issue"] == 2
    assert kernel.kinds(kernel.path(loop, [left])) == Counter(
        {"float": 1, "control": 3, "shared store": 1, "issue": 5, "wavefronts": 4}
    )
    assert kernel.kinds(kernel.path(loop, [right]))["special"] == 2
    with pytest.raises(ValueError, match="branches: no way goes through"):
        kernel.path(loop, [left, right])


@pytest.mark.parametrize(
    ("opcode", "kind", "wavefronts"),
    [
        ("HMMA.16816.F32.BF16", "tensor", 0),
        ("HFMA2", "half", 0),
        ("HMNMX2.NAN", "half", 0),
        ("F2FP.BF16.F32.PACK_AB", "convert", 0),
        ("F2I.TRUNC.NTZ", "special", 0),
        ("LDSM.16.M88.4", "shared load", 4),
        ("LDS.64", "shared load", 2),
        ("LDGSTS.E.BYPASS.128", "global", 4),
        ("LDGDEPBAR", "control", 0),
        ("LDC.64", "integer", 0),
        ("ULDC", "integer", 0),
        ("STG.E.128", "global", 0),
        ("STS.128", "shared store", 4),
        ("FSETP.GT.AND", "integer", 0),
    ],
)
def test_instructions_are_of_their_classes(bench, opcode, kind, wavefronts):
    instruction = bench("sass").Instruction(0, False, opcode, "", ())
    assert (instruction.kind, instruction.wavefronts) == (kind, wavefronts)


def test_targets_of_a_jump_table_are_followed_and_unknown_ones_refused(bench):
    read = bench("sass").read
    table = """.text.switch:
        /*0000*/                   BRX R4 -0x10   (*"BRANCH_TARGETS .L_x_0,.L_x_1"*);
.L_x_0:
        /*0010*/                   EXIT ;
.L_x_1:
        /*0020*/                   BRA `(.L_x_0) ;
"""
    assert [block.after for block in read(table)["switch"].blocks] == [[1, 2], [], [1]]
    with pytest.raises(ValueError, match="switch: no target of BRX"):
        read(table.replace("BRANCH_TARGETS .L_x_0,.L_x_1", ""))


def test_without_nvdisasm_is_said_where_it_comes_from(bench, monkeypatch, tmp_path):
    sass = bench("sass")
    monkeypatch.setattr(sass, "find_nvdisasm", lambda: None)
    with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvdisasm"):
        sass.disassemble(tmp_path / "no.cubin")


# ---- what ptxas says

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5smallPf' for 'sm_90'
ptxas info    : Function properties for _Z5smallPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 1936 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5largePf' for 'sm_100'
ptxas info    : Function properties for _Z5largePf
    24 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
BOUNDS = {("_Z5smallPf", "90"): (256, 3), ("_Z5largePf", "100"): (512, 1)}


def test_registers_shared_memory_and_stack_are_read(bench):
    nvcc = bench("nvcc")
    small, large = nvcc.read_ptxas(PTXAS, "file", BOUNDS)
    assert small == nvcc.Resources("small", "_Z5smallPf", "file", "9.0", 40, 128, 0, 256, 3)
    assert large == nvcc.Resources("large", "_Z5largePf", "file", "10.0", 255, 0, 24, 512, 1)
    assert nvcc.complaints(PTXAS) == "large: 24 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads"


def test_launch_bounds_are_read_of_ptx(bench):
    ptx = """.version 9.0
.target sm_90
.visible .entry _Z5smallPf(
	.param .u64 .ptr .align 1 _Z5smallPf_param_0
)
.maxntid 128, 2
.minnctapersm 3
{
}
.visible .entry _Z5plainPf(
)
.maxntid 64
{
}
"""
    launch_bounds = bench("nvcc").launch_bounds
    assert launch_bounds(ptx, ["9.0"]) == {("_Z5smallPf", "90"): (256, 3), ("_Z5plainPf", "90"): (64, 1)}
    with pytest.raises(ValueError, match="_Z5plainPf: expected __launch_bounds__, found none"):
        launch_bounds(ptx.replace(".maxntid 64\n", ""), ["9.0"])


def test_names_lose_namespaces_and_parameters(bench):
    name = (
        "void greedynas::cuda::(anonymous namespace)::project_kernel<greedynas::cuda::PointwiseTile<16, 32, 1>, true>"
        "(greedynas::cuda::Group<greedynas::cuda::Project>, int, int, int)"
    )
    assert bench("nvcc").short_name(name) == "project_kernel<PointwiseTile<16, 32, 1>, true>"


# ---- occupancy and budgets


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        ("9.0", 256, 128, 0, 2),  # registers: 65,536 / (256 x 128)
        ("9.0", 256, 129, 0, 1),  # 136 of them, in portions
        ("9.0", 192, 96, 0, 3),  # 20 warps of registers, six to a block
        ("9.0", 1024, 32, 0, 2),  # 64 warps
        ("8.6", 1024, 32, 0, 1),  # 48 warps
        ("9.0", 32, 16, 0, 32),  # blocks
        ("7.5", 32, 16, 0, 16),
        ("9.0", 64, 16, 75 << 10, 3),  # 228 KB, and 1 KB of each block is the system's
        ("9.0", 64, 16, (75 << 10) + 1, 2),
        ("8.6", 64, 16, 99 << 10, 1),
        ("8.6", 64, 16, (99 << 10) + 1, 0),  # more than a block may have
        ("7.5", 64, 16, 32 << 10, 2),  # nothing is the system's
    ],
)
def test_blocks_of_a_multiprocessor(bench, architecture, threads, registers, shared, blocks):
    assert bench("occupancy").resident_blocks(architecture, threads, registers, shared) == blocks


def test_what_is_over_its_budget_is_named(bench, tmp_path):
    resources, nvcc = bench("kernel_resources"), bench("nvcc")
    file = tmp_path / "budgets.toml"
    file.write_text('[file]\n"small*" = { registers = 40, "9.0" = 39, static = 100 }\n"gone" = { registers = 8 }\n')
    budgets = resources.read_budgets(file)
    assert [budget.registers_on(architecture) for budget in budgets[:1] for architecture in ("8.6", "9.0")] == [40, 39]
    found = resources.over_budget(nvcc.read_ptxas(PTXAS, "file", BOUNDS), budgets)
    assert found == [
        "file: small for 9.0: 40 registers, expected at most 39",
        "file: small for 9.0: 128 bytes of static shared memory, expected at most 100",
        "file: large for 10.0: 24 bytes of stack, expected none",
        "file: large for 10.0: 0 blocks fit by registers and threads, launch bounds promise 1",
        "file: large for 10.0: no budget in budgets.toml",
        "file: gone: no such kernel",
    ]
    generous = [resources.Budget("file", "*", {"any": 255}, 128)]
    assert resources.over_budget(nvcc.read_ptxas(PTXAS, "file", BOUNDS)[:1], generous) == []
    elsewhere = [resources.Budget("other", "*", {"any": 255}, 128)]
    assert len(resources.over_budget(nvcc.read_ptxas(PTXAS, "file", BOUNDS)[:1], elsewhere)) == 2


# ---- how often parts are executed

SHAPE = {"images": 10, "height": 56, "width": 56, "in_channels": 32, "hidden_channels": 192, "kernel": 3, "stride": 1}


@pytest.mark.parametrize(("group", "turns"), [(64, 112.0), (48, 84.0)])
def test_a_band_that_slides_down_the_image(bench, group, turns):
    plan = {"group": group, "images": 1, "rows": 56, "cols": 56, "step": 4}
    (piece,) = bench("kernel_work").pieces(SHAPE, plan)
    # A row before the first output (that above the image is none), then 13 steps of 4 rows, and one of 3.
    assert piece.pixels == 56 * 56
    assert piece.tiles == 2 + 13 * 7 + 6
    assert piece.steps == 15
    assert (piece.whole, piece.cut) == (14 * 8, 0)
    assert piece.item_warps == turns  # eight items a step; of 48 channels, three warps have four of them


def test_whole_images_of_seven_pixels(bench):
    shape = {**SHAPE, "height": 7, "width": 7, "kernel": 7}
    (piece,) = bench("kernel_work").pieces(shape, {"group": 64, "images": 3, "rows": 8, "cols": 7, "step": 8})
    assert (piece.pixels, piece.tiles, piece.steps) == (147, 5, 1)
    assert (piece.whole, piece.cut) == (3, 3)  # rows 0 to 3, and 4 to 6


@pytest.mark.parametrize(("height", "kernel", "stride"), [(112, 3, 2), (28, 5, 1), (14, 7, 2), (13, 5, 2)])
def test_pieces_cover_the_image_however_it_is_cut(bench, height, kernel, stride):
    shape = {**SHAPE, "height": height, "width": height, "kernel": kernel, "stride": stride}
    small, item = math.ceil(height / stride), 4 if stride == 1 else 2
    for rows, cols, step in ((small, small, small), (small, 7, item), (2 * item, 14, item), (item, small, item)):
        plan = {"group": 64, "images": 1, "rows": rows, "cols": min(cols, small), "step": step}
        found = bench("kernel_work").pieces(shape, plan)
        assert len(found) == math.ceil(small / rows) * math.ceil(small / plan["cols"])
        outputs = sum(piece.whole + piece.cut for piece in found) * item * 7
        assert outputs >= small**2
        # What an image has, and at most the halo of every piece beside it.
        halo = kernel - stride
        most = sum((min(rows, small) * stride + halo) * (plan["cols"] * stride + halo) for _ in found)
        assert (height - stride + 1) ** 2 <= sum(piece.pixels for piece in found) <= most


# ---- the model


def test_a_time_is_that_of_what_binds(bench, monkeypatch):
    model, nodes, work = bench("gpu_model"), bench("gpu_nodes"), bench("kernel_work")
    device = model.Device(
        multiprocessors=10, clock=1e9, dram=1e12, l2=2e12, tensor=1e14, issue=0.5, half=2.0, integer=2.0, special=0.5,
        shared=1.0, warps=16, launch=1e-6,
    )  # fmt: skip
    node = nodes.Node("project", (1000, 100, 48, 16, 0, 2))
    resources = SimpleNamespace(kernel="project_kernel", registers=128, static_shared=0)
    program = SimpleNamespace(resources={"symbol": resources})
    launch = work.Launch("symbol", (30, 1, 1), 256, 0, {"passes": 1})
    kinds = Counter(issue=2_000_000, half=10, integer=100, special=1, wavefronts=50_000, tensor=1000)
    monkeypatch.setattr(model, "work", lambda *_: {"all": kinds})
    found = model.modelled(program, node, [launch], None, device)
    # 2M instructions of 20G a second; 1,000 products of 4,096 operations; 30 blocks, of which 20 run at a time.
    assert found.parts["issue"] == pytest.approx(100e-6)
    assert found.parts["tensor"] == pytest.approx(4.096e-8)
    assert found.parts["shared"] == pytest.approx(5e-6)
    assert found.parts["dram"] == pytest.approx(2 * 1000 * 64 / 1e12)
    assert found.seconds == pytest.approx((100e-6 + 4.096e-8) * (2 / 1.5) + 1e-6)
    assert (found.bound, found.resident) == ("issue", 2)
    resources.registers = 255  # one block, eight of the sixteen warps; 30 blocks are three whole waves
    assert model.modelled(program, node, [launch], None, device).seconds == pytest.approx(
        1.5 * (100e-6 + 4.096e-8) + 1e-6
    )
    kinds["issue"] = 1
    kinds["wavefronts"] = kinds["tensor"] = 0
    assert model.modelled(program, node, [launch], None, device).bound == "dram"
    with pytest.raises(ValueError, match="project_kernel does not fit with 300000 bytes"):
        model.modelled(program, node, [work.Launch("symbol", (1, 1, 1), 256, 300_000, {})], None, device)


def entry(kernel, name, shape, images, buffers, products):
    ways = {buffer: {"read": {"sectors": read}, "written": {"sectors": written}} for buffer, (read, written) in buffers}
    shared = {"load": {"wavefronts": 60}, "store": {"wavefronts": 20}}
    return {
        "kernel": kernel, "name": name, "shape": shape, "images": images, "buffers": ways, "shared": shared,
        "warp": {"matrix_products": products},
    }  # fmt: skip


def test_counts_of_emulated_launches_are_those_of_the_node(bench, tmp_path):
    traffic, nodes = bench("gpu_traffic"), bench("gpu_nodes")
    expand = {"height": 56, "width": 56, "in_channels": 32, "hidden_channels": 96, "kernel": 3, "stride": 1}
    finish = {"pixels": 400, "channels": 32}
    launches = [
        entry("expand_depthwise", "56x32", expand, 8, [("x", (100, 0)), ("d", (0, 60))], 16),
        entry("finish_map", "plain", finish, 8, [("map", (10, 10))], 40),
        entry("finish_map", "added", finish, 8, [("map", (10, 10)), ("residual", (10, 0))], 40),
        entry("finish_map", "added", finish, 8, [("partials", (5, 0))], 0),
        entry("linear", "other", {"rows": 3}, None, [], 0),
    ]
    file = tmp_path / "traffic.json"
    file.write_text(json.dumps({"launches": launches}))
    counts = traffic.Traffic(file)
    assert len(counts) == 3
    node = nodes.Node("expand_depthwise", (1000, 56, 56, 32, 96, 3, 1, 2))
    assert counts.of(node) == traffic.Counted(l2=160 * 32 * 125, wavefronts=80 * 125, matrix_products=2000)
    assert counts.of(nodes.Node("expand_depthwise", (1000, 56, 56, 32, 96, 5, 1, 2))) is None
    plain, added = (counts.of(nodes.Node("finish_map", (4000, 32, residual, 1, 0))) for residual in (0, 1))
    assert plain == traffic.Counted(l2=20 * 32 * 10, wavefronts=800, matrix_products=400)
    assert added == traffic.Counted(l2=35 * 32 * 10, wavefronts=1600, matrix_products=400)
    assert counts.of(nodes.Node("linear", (3, 4, 5))) is None
    assert len(traffic.Traffic(tmp_path / "none.json")) == 0


def test_counted_traffic_takes_the_place_of_planned(bench, monkeypatch):
    model, nodes, work = bench("gpu_model"), bench("gpu_nodes"), bench("kernel_work")
    program = SimpleNamespace(
        resources={"symbol": SimpleNamespace(kernel="project_kernel", registers=64, static_shared=0)}
    )
    launch = work.Launch("symbol", (8, 1, 1), 256, 0, {"passes": 1})
    monkeypatch.setattr(model, "work", lambda *_: {"all": Counter(issue=10, wavefronts=1, tensor=30)})
    counted = bench("gpu_traffic").Counted(l2=5.5e8, wavefronts=1.7e9 * 132, matrix_products=20)
    found = model.modelled(program, nodes.Node("project", (1000, 100, 48, 16, 0, 2)), [launch, launch], counted)
    assert found.parts["l2"] == pytest.approx(100e-6)
    assert found.parts["shared"] == pytest.approx(1 / 0.85)
    assert (found.counted, found.products) == (True, 3.0)  # two launches of 30


def test_nodes_of_an_evaluation(bench):
    from greedynas import get_space

    nodes, space = bench("gpu_nodes"), get_space("mbv2-7")
    identity = space.encode(["id"] * space.num_layers).tolist()
    other = space.encode(["e3k7"] + ["id"] * (space.num_layers - 1)).tolist()
    stages = nodes.evaluation(space, [identity, identity, other], 8, 224)
    assert list(stages) == ["stem", *(f"layer {at}" for at in range(space.num_layers)), "head"]
    assert sum(count for node, count in stages["layer 0"].items() if node.function == "strided_conv") == 1
    (expand,) = [node for node in stages["layer 0"] if node.function == "expand_depthwise"]
    assert expand.line == "expand_depthwise 8 112 112 16 48 7 2 2"
    assert not stages["layer 1"]  # identities that keep the shape
    assert sum(stages["layer 4"].values()) == 2 * 3  # of two prefixes: convolution, statistics, last pass
    assert stages["head"][nodes.Node("head_pool", (8, 49, 320, 1280, 2))] == 2
    assert expand.dram_bytes == 2 * 8 * (112 * 112 * 16 + 56 * 56 * 48)
    assert expand.tensor_flop == 2 * 8 * 112 * 112 * 16 * 48


def test_the_nodes_that_are_compared_are_those_that_were_measured(bench):
    measured = json.loads((ROOT / "bench/results/h100/kernels.json").read_text())["kernels"]
    ours = [(entry.node.function, entry.layer, entry.detail) for entry in bench("gpu_nodes").layer_nodes(1000)]
    assert ours == [(entry["kernel"], entry["layer"], entry["detail"]) for entry in measured]
    floors = [entry["floor"] for entry in measured]
    bytes_ = [entry.node.dram_bytes for entry in bench("gpu_nodes").layer_nodes(1000)]
    ratios = {round(count / floor / 1e9) for count, floor in zip(bytes_, floors, strict=True)}
    assert len(ratios) == 1


def test_the_study_is_weighted_by_the_layers_of_the_space(bench):
    page = bench("gpu_model_page")
    from greedynas import get_space

    shapes, size = Counter(), 112
    for layer in get_space("mbv2-7").layers:
        shapes[f"{size}x{layer.in_channels}s{layer.stride}"] += 1
        size = math.ceil(size / layer.stride)
    assert {name: shapes[name] for name in page.LAYERS_OF_SHAPE} == page.LAYERS_OF_SHAPE
    rows = [
        {"kernel": "expand_depthwise", "layer": "56x32s1", "detail": "t3 k3", "seconds": 1e-3, "measured": 2e-3},
        {"kernel": "expand_depthwise", "layer": "56x32s1", "detail": "t3 k5", "seconds": 1.0, "measured": 1.0},
        {"kernel": "project", "layer": "56x32", "detail": "t3", "seconds": 1.0, "measured": 1.0},
    ]
    sums = page.study_sums(rows, 1000)
    assert sums == pytest.approx({"study": 3 * 0.45, "modelled": 3.0, "measured": 6.0})


# ---- the roofline


def test_bytes_of_a_path_are_those_of_its_tensors(bench):
    from greedynas import get_space

    roofline, space = bench("roofline"), get_space("mbv2-7")
    identity = space.encode(["id"] * space.num_layers).tolist()
    wide = space.encode(["id", "e6k3"] + ["id"] * (space.num_layers - 2)).tolist()
    # An inverted bottleneck of 32 channels at 56x56: read, expanded, read, convolved, read, projected and added.
    pixels = 56 * 56
    eager = pixels * (32 + 6 * 192 + 192 + 6 * 192 + 192 + 4 * 32 + 3 * 32)
    compiled = pixels * (32 + 4 * 192 + 192 + 4 * 192 + 192 + 4 * 32 + 1 * 32)
    for passes, numbers in ((roofline.EAGER, eager), (roofline.COMPILED, compiled)):
        more = roofline.path_bytes(space, wide, 224, passes) - roofline.path_bytes(space, identity, 224, passes)
        assert more == 2 * numbers
    dense, depthwise = roofline.operations(space, wide, 224)
    assert dense + depthwise == 2 * space.macs(wide, 224)


def test_the_roofline_page(bench, tmp_path, monkeypatch, capsys):
    import sys

    page, picture = tmp_path / "roofline.md", tmp_path / "roofline.png"
    files = ["--markdown", page, "--picture", picture, "--modelled", tmp_path / "none.json", "--paths", "2"]
    monkeypatch.setattr(sys, "argv", ["roofline.py", *map(str, files)])
    bench("roofline").main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "**Computed**" in page.read_text()
    eager, compiled, ours = (float(line.split()[-6]) for line in capsys.readouterr().out.splitlines())
    assert eager > compiled > 2 * ours
