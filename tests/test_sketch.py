"""Sketches of drawn layers: every way gives the same numbers, whatever the batch, the blocks, the memory or the device."""
import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from infotda.fold import Workspace, add_fold, add_fold_fourier, add_fold_lookup, add_fold_rows, add_rotated, fold_vectors, fourier_is_cheaper, gather_rotated
from infotda.jacobian import per_example_jacobian
from infotda.layers import batched_product, layer_shares
from infotda.outputs import logit
from infotda.philox import block_by_torch, block_by_triton, counted_place, rademacher_block, rademacher_entry, signs_by, triton_agrees
from infotda.sketch import PROJ_TYPES, Projector, SketchMatrix, SketchSpec, add_rademacher_half, half_product_works, row_scale, split_half_reliability

TYPES = [*PROJ_TYPES[:4], "sjlt-4"]
CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def share(name, shape, outer=None, rows=None, full=None):
    return SimpleNamespace(name=name, shape=torch.Size(shape), outer=lambda: outer, rows=lambda: rows, gradient=lambda out: out.copy_(full))


@st.composite
def layers(draw):
    "Sizes (b, T, d_out, d_in, m) with one and several pieces, few and many terms."
    return [draw(st.integers(1, high)) for high in (5, 12, 20, 70, 40)]


# ---- three ways ---------------------------------------------------------------------------------------

@few
@given(layers(), st.integers(0, 2**64 - 1), st.integers(0, 5000), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_three_ways_agree(sizes, seed, nbytes, last, dtype):
    b, T, d_out, d_in, m = sizes
    A, B = normal(b, T, d_in, dtype=dtype), normal(b, T, d_out, seed=1, dtype=dtype)
    if last:  # terms last in memory, as a convolution has them
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT
    W = torch.einsum("bti,btj->bij", B.double(), A.double())
    exact = torch.zeros(b, m, dtype=torch.float64)
    add_fold(exact, W.flatten(1), (d_out, d_in), 3, seed)
    layout = fold_vectors((d_out, d_in), m, 3, seed, dtype, CPU)
    spectrum, ring = torch.zeros(b, m // 2 + 1, dtype=torch.promote_types(dtype, torch.complex64)), torch.zeros(b, 2 * m, dtype=dtype)
    add_fold_fourier(spectrum, A, B, m, layout)
    add_fold_rows(ring, A, B, layout, Workspace(nbytes, CPU), batched_product)
    size = A.double().norm() * B.double().norm()
    for found in (torch.fft.irfft(spectrum, n=m), ring[:, :m] + ring[:, m:]):
        assert found.dtype == dtype
        assert (found - exact).norm() <= (1e-12 if dtype == torch.float64 else 2e-6) * size


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 50), st.integers(1, 20))
def test_bins_see_what_rows_do(b, rows, d, m):
    W, h = normal(b, rows, d), torch.randint(0, m, (rows, -(-d // m)), generator=torch.Generator().manual_seed(d))
    here, there = torch.zeros(2, b, 2 * m, dtype=torch.float64)
    add_rotated(here, W, h)
    gather_rotated(there, W, h)
    assert_close(here[:, :m] + here[:, m:], there[:, :m])


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 50), st.integers(1, 20))
def test_lookup(b, T, d, m):
    ids, values = torch.randint(0, 6, (b, T), generator=torch.Generator().manual_seed(d)), normal(b, T, d)
    table = torch.zeros(b, 6, d, dtype=torch.float64)
    for i in range(b):
        table[i].index_add_(0, ids[i], values[i])
    ring, exact = torch.zeros(b, 2 * m, dtype=torch.float64), torch.zeros(b, m, dtype=torch.float64)
    add_fold_lookup(ring, ids, values, fold_vectors((6, d), m, 3, 9, torch.float64, CPU))
    add_fold(exact, table.flatten(1), (6, d), 3, 9)
    assert_close(ring[:, :m] + ring[:, m:], exact)


def test_the_rule_knows_slow_lengths():
    assert fourier_is_cheaper(1, 512, 784, 4096) and fourier_is_cheaper(16, 512, 4608, 512)
    assert not fourier_is_cheaper(1024, 128, 576, 4096) and not fourier_is_cheaper(16, 512, 4608, 20011)


# ---- share by share -------------------------------------------------------------------------------------

@st.composite
def networks(draw):
    "Shapes of a few parameters, and shares of them: factors (some parameters twice), looked-up rows, full gradients."
    b, shares, total = draw(st.integers(1, 5)), [], {}
    for k in range(draw(st.integers(1, 4))):
        form, name = draw(st.sampled_from(["outer", "rows", "full", "vector"])), f"p{k}"
        shape = tuple(draw(st.integers(1, 12)) for _ in range({"outer": 3, "rows": 2, "full": draw(st.sampled_from([0, 2, 4])), "vector": 1}[form]))
        for use in range(draw(st.integers(1, 2))):
            seed, matrix = 10 * k + use, (shape[0], max(1, torch.Size(shape[1:]).numel())) if shape else (1, 1)
            outer = rows = None
            W = normal(b, *shape, seed=seed)
            if form == "outer":
                outer = normal(b, 3, matrix[1], seed=seed), normal(b, 3, matrix[0], seed=seed + 5)
                W = torch.einsum("bti,btj->bij", outer[1], outer[0]).view(b, *shape)
            if form == "rows":
                rows = torch.randint(0, shape[0], (b, 4), generator=torch.Generator().manual_seed(seed)), normal(b, 4, shape[1], seed=seed)
                W = torch.einsum("bti,btj->bij", nn.functional.one_hot(rows[0], shape[0]).double(), rows[1])
            shares.append(share(name, shape, outer, rows, W))
            total[name] = total.get(name, 0) + W
    return b, shares, total


@few
@given(networks(), st.sampled_from([*TYPES, "identity"]), st.integers(0, 3), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_running_equals_projector(network, proj_type, size, nbytes, shuffle):
    b, shares, total = network
    shapes = {name: G.shape[1:] for name, G in total.items()}
    p = sum(s.numel() for s in shapes.values())
    projector = Projector(shapes, p if proj_type == "identity" else (8, 20, 48, 4)[size], proj_type, 5)
    factors = {name: 0.5 + k for k, name in enumerate(total)}
    expected = projector({name: factors[name] * G for name, G in total.items()})
    running = projector.running(b, torch.float64, "cpu", workspace=nbytes)
    for _ in range(2):  # in any order, and the object can be used again
        shuffle.shuffle(shares)
        for one in shares:
            running.add(one, factors[one.name])
        out = torch.full_like(expected, torch.nan)
        assert running.result(out) is out
        assert_close(out, expected, rtol=0, atol=1e-12 * (1 + float(expected.abs().max())))


@pytest.mark.parametrize("proj_type", TYPES)
def test_running_agrees_for_subsets_and_batches(proj_type):
    shapes = {"a": (30, 40), "b": (6, 5, 3, 3), "c": (17,)}
    grads = {name: normal(9, *shape) for name, shape in shapes.items()}
    def sketch(names, rows, dtype=torch.float64):
        n = len(range(9)[rows])
        running = Projector({k: shapes[k] for k in names}, 64, proj_type).running(n, dtype, "cpu")
        for k in names:
            running.add_gradient(k, grads[k][rows].to(dtype))
        return running.result()
    whole = sketch("abc", slice(None))
    assert_close(torch.cat([sketch("cab", slice(0, 2)), sketch("bca", slice(2, 9))]), whole)
    assert_close(sketch("a", slice(None)) + sketch("bc", slice(None)), whole)
    for dtype, tol in [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]:
        rough = sketch("abc", slice(None), dtype)
        assert rough.dtype == torch.float32 and (rough - whole).norm() < tol * whole.norm()


def test_running_batches_of_other_sizes():
    projector = Projector({"a": (7, 9)}, 16)
    running, grads = projector.running(4, torch.float64, "cpu"), normal(3, 7, 9)
    running.reset(3)
    running.add_gradient("a", grads)
    assert_close(running.result(), projector({"a": grads}))
    with pytest.raises(ValueError, match=r"shape \(3, 7, 9\)"):
        running.add_gradient("a", normal(4, 7, 9))
    with pytest.raises(ValueError, match="one row for each"):
        running.result(torch.empty(3, 15))


@pytest.mark.parametrize("proj_type", TYPES)
def test_running_on_a_network(proj_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(6 * 16, 7)).double().eval()
    x = normal(5, 2, 6, 6)
    J = per_example_jacobian(model, x, logit(3))
    projector = Projector({name: G.shape[1:] for name, G in J.items()}, 48, proj_type)
    _, stream = layer_shares(model, x, logit(3), list(J))
    running = projector.running(5, torch.float64, "cpu")
    for one in stream:
        running.add(one)
    assert_close(running.result(), projector(J))


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_bad_parameter_is_named(proj_type, value):
    A, B = normal(6, 3, 20), normal(6, 3, 30, seed=1)
    A[4, 1, 2] = value
    full = torch.einsum("bti,btj->bij", B, A)
    running = Projector({"good": (8, 8), "bad": (30, 20), "late": (5,)}, 48, proj_type).running(6, torch.float64, "cpu")
    running.add_gradient("good", normal(6, 8, 8))
    running.add(share("bad", (30, 20), (A, B), full=full))
    running.add_gradient("late", normal(6, 5))
    with pytest.raises(ValueError, match=r"example 104, in parameters \['bad'\]"):
        running.result(start=100)


MEMORY = """
import resource, torch
from types import SimpleNamespace
from infotda.sketch import Projector
torch.set_num_threads(1)
b, T, d, layers = 16, 1100, 768, 6
shapes = {f"w{k}": (d, d) for k in range(layers)} | {"few": (d, d)}
A, B = torch.randn(b, T, d), torch.randn(b, T, d)
shares = [SimpleNamespace(name=k, shape=torch.Size((d, d)), outer=lambda s=T if k != "few" else 1: (A[:, :s], B[:, :s])) for k in shapes]
running = Projector(shapes, 512).running(b, torch.float32, "cpu", workspace=2**24)
torch.bmm(A[:, :2].mT, B[:, :2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for share in shares:
    running.add(share)
running.result()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, running.nbytes // 1024, b * d * d * 4 // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_is_one_workspace():
    "Six layers of 36 MiB of gradients each, in a workspace of 16 MiB: the peak stays below one layer."
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    grown, held, one_layer = map(int, done.stdout.split())
    assert held < 20 * 1024 and grown < held + 16 * 1024 < one_layer + 1


# ---- the sparse transform -------------------------------------------------------------------------------

@few
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_sparse_columns(nnz, width, p, seed):
    S = SketchMatrix(p, nnz * width, f"sjlt-{nnz}", seed).dense()
    blocks = S.view(nnz, width, p) * nnz**0.5
    assert ((blocks != 0).sum(dim=1) == 1).all()
    assert_close((S**2).sum(dim=0), torch.ones(p, dtype=torch.float64))
    x = normal(2, p)
    assert_close(Projector(p, nnz * width, f"sjlt-{nnz}", seed)(x), x @ S.T)


@pytest.mark.parametrize("proj_type", ["sjlt", "sjlt-4", "fold"])
def test_unbiased_with_the_variance_of_dense_signs(proj_type):
    x, y = normal(2, 40)
    x[3], y[3] = 5.0, 4.0
    inner = torch.tensor([float(torch.prod(Projector({"v": (40,)}, 16, proj_type, seed)(torch.stack([x, y])), dim=0).sum()) for seed in range(1500)])
    assert abs(inner.mean() - x @ y) < 5 * inner.std() / 1500**0.5
    if proj_type != "fold":
        square = (inner - x @ y) ** 2
        theory = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / 16
        assert abs(square.mean() - theory) < 5 * square.std() / 1500**0.5


def test_sparse_frozen():
    "What this version gives; a change here makes every stored sketch unreadable."
    bins, signs = counted_place(torch.arange(8), 1, 1000, stream=77, seed=2**63 + 5)
    assert (bins * signs.long()).tolist() == [758, -538, 467, 656, -310, -164, -232, 832]


@pytest.mark.parametrize("bad, words", [((10, "sjlt-3"), "multiple of 3"), ((10, "sjlt-0"), "sjlt-s"), ((10, "sjlt4"), "sjlt-s"), ((10, "sjlt-"), "sjlt-s"), ((2, "sjlt-4"), "multiple of 4")])
def test_sparse_refusals(bad, words):
    with pytest.raises(ValueError, match=words):
        SketchSpec(20, *bad)


# ---- half precision -------------------------------------------------------------------------------------

@few
@given(st.integers(-40, 37), st.integers(1, 400), st.integers(0, 10**6))
def test_row_scale_is_exact(exponent, d, seed):
    G = normal(3, d, seed=seed, dtype=torch.float32) * 10.0**exponent
    scale, top = row_scale(G), G.abs().amax(dim=1)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((3, 1), 0.5))
    assert torch.equal(G * scale / scale, G) or top.min() < 1e-36
    usual = (top > 1e-33) & (top < 1e37)
    assert ((G * scale).abs().amax(dim=1)[usual] >= 2**14).all() and ((G * scale).abs().amax(dim=1) < 2**15).all()


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e20])
def test_half_precision_error(size):
    G = (normal(4, 3000, dtype=torch.float64) * size).float()
    exact = G.double() @ rademacher_entry(torch.arange(200)[:, None], torch.arange(3000), 3, 9).T
    for width in (256, 1024, None):
        out = torch.zeros(4, 200)
        add_rademacher_half(out, G, 3, 9, width)
        assert (out - exact).norm() < 2.9e-4 * exact.norm()


def test_block_of_signs_into_a_buffer():
    buffer = torch.empty(20, 512, dtype=torch.float16)
    assert rademacher_block(20, 256, 512, 3, 9, dtype=torch.float16, out=buffer) is buffer
    assert torch.equal(buffer.float(), rademacher_block(20, 256, 512, 3, 9))


# ---- signs by Triton --------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infotda.philox import block_by_torch, block_by_triton, triton_agrees

word = st.one_of(st.sampled_from([0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(0, 2**31 - 1), st.integers(1, 7), word, word, word, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def check(m, first, blocks, stream, low, high, dtype):
    room = torch.full((m + 2, 256 * blocks), 7, dtype=dtype)
    found = block_by_triton(room[1:-1], 256 * first, stream, high << 32 | low)
    assert torch.equal(found.float(), block_by_torch(m, 256 * first, 256 * blocks, stream, high << 32 | low))
    assert (room[0] == 7).all() and (room[-1] == 7).all()

check()
assert all(triton_agrees(torch.device("cpu"), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
try:
    block_by_triton(torch.zeros(512, 4).T, 0, 0, 0)
except RuntimeError as error:
    assert "view" in str(error)
else:
    raise AssertionError("a matrix with gaps was written to")
"""

COMPILED = """
import infotda.philox as philox
philox.sign_kernel()
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction
for capability, dtype in [(80, "bf16"), (90, "fp16"), (90, "bf16"), (90, "fp32")]:
    signature = {"out": "*" + dtype} | dict.fromkeys(["m", "blocks", "first", "stream", "k0", "k1"], "i32")
    stages = compile(ASTSource(JITFunction(philox.sign_tile), signature), target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}).asm
    ptx = stages["ptx"]
    assert f".target sm_{capability}" in ptx and "st.global" in ptx and stages["cubin"][:4] == b"\\x7fELF"
    assert "ld.local" not in ptx and "st.local" not in ptx  # everything stays in registers
"""

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("script, interpret", [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled for GPUs"])
def test_triton_kernel_without_a_gpu(script, interpret, tmp_path):
    env = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_needs_triton():
    subprocess.run([sys.executable, "-c", """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, infotda
from infotda.philox import triton_agrees
infotda.Projector({"w": (4, 300)}, 16, "rademacher")(torch.ones(2, 1200))
assert not triton_agrees(torch.device("cpu"), torch.float16)
"""], check=True)


def wrong(out, start, stream, seed):
    return out.copy_(-block_by_torch(len(out), start, out.shape[1], stream, seed))


def fails(out, start, stream, seed):
    raise RuntimeError("PTX of another age")


@pytest.mark.parametrize("write, words", [(wrong, "other signs"), (fails, "RuntimeError: PTX of another age")])
def test_a_kernel_that_does_not_agree_is_not_used(write, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.warns(UserWarning, match=words):
        assert not triton_agrees(CPU, torch.float16, write)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert not triton_agrees(CPU, torch.float16, write)


# ---- reliability ----------------------------------------------------------------------------------------

def test_reliability_predicts_another_seed():
    shapes = {"w": (40, 50)}
    x = normal(200, 5) @ normal(5, 2000, seed=1) + 0.5 * normal(200, 2000, seed=2)
    phi = [Projector(shapes, 256, "rademacher", seed)(x) for seed in range(8)]
    scores = torch.stack([p[:190] @ p[190:].T for p in phi])
    R = torch.stack([split_half_reliability(p[:190], p[190:]) for p in phi]).mean()
    centred = scores - scores.mean(dim=1, keepdim=True)
    centred = centred / centred.norm(dim=1, keepdim=True)
    between = torch.stack([(centred[i] * centred[j]).sum(dim=0).mean() for i in range(8) for j in range(i)]).mean()
    assert abs(R - between) < 0.05
    doubled = split_half_reliability(phi[0][:190], phi[0][190:], lambda Phi, phi: 2 * Phi @ phi.T)
    assert_close(doubled, split_half_reliability(phi[0][:190], phi[0][190:]))


def test_reliability_refusals():
    with pytest.raises(ValueError, match="One column for each query"):
        split_half_reliability(normal(5, 4), normal(2, 4), lambda Phi, phi: Phi @ phi[0])
    with pytest.raises(ValueError, match="equal scores for query 1"):
        split_half_reliability(normal(5, 4), torch.stack([torch.ones(4), torch.zeros(4)]).double())


# ---- on a GPU -------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 5e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_running_on_gpu(proj_type, dtype, tol):
    shapes = {"many": (40, 300), "one": (200, 300), "table": (50, 40), "b": (200,)}
    A, B = normal(6, 400, 300), normal(6, 400, 40, seed=1)
    a, c = normal(6, 1, 300, seed=2), normal(6, 1, 200, seed=3)
    ids, values = torch.randint(0, 50, (6, 7)), normal(6, 7, 40, seed=4)
    table = torch.einsum("bti,btj->bij", nn.functional.one_hot(ids, 50).double(), values)
    grads = {"many": torch.einsum("bti,btj->bij", B, A), "one": torch.einsum("bti,btj->bij", c, a), "table": table, "b": normal(6, 200, seed=5)}
    projector = Projector(shapes, 256, proj_type)
    expected, on = projector(grads), dict(device="cuda", dtype=dtype)
    running = projector.running(6, dtype, "cuda", workspace=2**20)
    for one in (share("many", (40, 300), (A.to(**on), B.to(**on)), full=grads["many"].to(**on)), share("one", (200, 300), (a.to(**on), c.to(**on)), full=grads["one"].to(**on)),
                share("table", (50, 40), None, (ids.cuda(), values.to(**on)), table.to(**on)), share("b", (200,), full=grads["b"].to(**on))):
        running.add(one)
    assert (running.result().cpu() - expected).norm() < tol * expected.norm()


@pytest.mark.gpu
def test_half_product_on_gpu():
    assert half_product_works(torch.device("cuda", torch.cuda.current_device()))
    G = (normal(4, 30_000) * 1e-6).float()
    for m in (100, 4096):
        here, there = torch.zeros(4, m), torch.zeros(4, m, device="cuda")
        add_rademacher_half(here, G, 3, 9)
        add_rademacher_half(there, G.cuda(), 3, 9)
        assert (there.cpu() - here).norm() < 1e-5 * here.norm()


@pytest.mark.gpu
def test_signs_on_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert signs_by(device, dtype) == ("triton" if importlib.util.find_spec("triton") else "torch")
        for m, start, width, stream, seed in [(37, 256, 768, 5, 9), (1, 0, 256, 2**32 - 1, 2**64 - 1), (4096, 2**39, 4096, 2**31, 2**63 + 5)]:
            exact = block_by_torch(m, start, width, stream, seed)
            for out in (None, torch.full((m, width), 7, dtype=dtype, device=device)):
                found = rademacher_block(m, start, width, stream, seed, device, dtype, out)
                assert found.dtype == dtype and torch.equal(found.float().cpu(), exact)
            assert torch.equal(block_by_torch(m, start, width, stream, seed, device, dtype).float().cpu(), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_kernel_on_gpu_keeps_to_its_memory():
    room = torch.full((39, 768), 7, dtype=torch.float16, device="cuda")
    assert torch.equal(block_by_triton(room[1:-1], 256, 5, 9).float().cpu(), block_by_torch(37, 256, 768, 5, 9))
    assert (room[0] == 7).all() and (room[-1] == 7).all()


@pytest.mark.gpu
def test_a_projector_says_how():
    form = Projector(1000, 64, "rademacher").form("cuda")
    assert form == f"16-bit factors, signs by {signs_by(torch.device('cuda'), torch.float16)}"
    assert Projector(1000, 64, "rademacher").form("cuda", torch.float64).startswith("64-bit factors")
    assert Projector(1000, 64).form("cuda") == "torch operations"
