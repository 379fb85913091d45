"""Layer pieces against autograd, one example at a time, and what a pass leaves behind."""
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from infotda.layers import Scratch, batched_product, layer_shares, onednn_bmm_works
from infotda.outputs import logit


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def added_up(model, x, output, names=None, workspace=None):
    "Per-example gradients from shares, written through one workspace, and those that can be, from their factors."
    values, shares = layer_shares(model, x, output, names or names_of(model), Scratch())
    known = dict(model.named_parameters())
    rows = {name: torch.zeros(len(values), *known[name].shape, dtype=values.dtype) for name in names or known}
    for share in shares:
        g = share.gradient(workspace).clone()
        assert g.shape == (len(values), *share.shape) and share.shape == known[share.name].shape
        if (factors := share.outer()) is not None:
            A, B = factors
            assert_close(torch.einsum("bti,bto->boi", A, B).reshape(g.shape), g)
        if (looked_up := share.rows()) is not None:
            ids, added = looked_up
            for i in range(len(values)):
                assert_close(torch.zeros(share.shape, dtype=g.dtype).index_add_(0, ids[i], added[i]), g[i])
        rows[share.name] += g
    return values, rows


def alone(model, x, output):
    "The oracle: a plain backward pass for each example."
    params = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        f = output(model(x[i : i + 1]), x[i : i + 1]).squeeze(0)
        rows.append(torch.autograd.grad(f, list(params.values()), materialize_grads=True, allow_unused=True))
    return {name: torch.stack(g) for name, g in zip(params, zip(*rows))}


def sum_of_cubes(y, batch):
    return (y.flatten(1) ** 3).sum(1)


def check(model, x, output=sum_of_cubes):
    model = model.double().eval()
    size = 2 * len(x) * max(p.numel() for p in model.parameters())
    values, rows = added_up(model, x, output, workspace=torch.full((size,), float("nan"), dtype=torch.float64))
    assert_close(rows, alone(model, x, output))
    assert_close(values, output(model(x), x).detach())


@st.composite
def convolutions(draw):
    "A convolution and an input that it accepts."
    n = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * n)))
    groups = draw(st.integers(1, 2))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, dilation = each(1, 3), each(1, 2)
    padding = draw(st.one_of(st.just(None), st.sampled_from(["same", "valid"])))
    stride = 1 if padding == "same" else each(1, 3)
    padding = each(0, 2) if padding is None else padding
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](channels, out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    return layer, torch.randn(draw(st.integers(1, 3)), channels, *(draw(st.integers(5, 7)) for _ in range(n)), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions(drawn):
    check(*drawn)


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(3, 4), (5, 3)), (nn.Linear(3, 4, bias=False), (5, 2, 3)), (nn.Linear(3, 4), (5, 2, 3, 3)), (nn.Linear(3, 4), (1, 3)),
    (nn.LayerNorm(3), (5, 3)), (nn.LayerNorm((2, 3)), (5, 4, 2, 3)), (nn.LayerNorm(3, bias=False), (5, 4, 3)), (nn.RMSNorm(3), (5, 2, 3)),
    (nn.GroupNorm(2, 4), (5, 4)), (nn.GroupNorm(2, 4), (5, 4, 3)), (nn.GroupNorm(2, 4), (5, 4, 3, 2)), (nn.GroupNorm(4, 4), (1, 4, 3, 2, 2)),
    (nn.BatchNorm1d(4), (5, 4)), (nn.BatchNorm1d(4), (5, 4, 3)), (nn.BatchNorm2d(4), (5, 4, 3, 2)), (nn.BatchNorm3d(4), (5, 4, 2, 2, 2)),
], ids=str)
def test_layers(layer, shape):
    torch.manual_seed(0)
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
    check(layer, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 2, 3), (1, 6)])
def test_embeddings(options, shape):
    torch.manual_seed(0)
    model, ids = nn.Embedding(6, 3, **options).double(), torch.randint(0, 6, shape)
    plain = nn.Embedding(6, 3, **{**options, "sparse": False}).double()
    plain.load_state_dict(model.state_dict())
    assert_close(added_up(model, ids, sum_of_cubes)[1], alone(plain, ids, sum_of_cubes))


def test_positions_without_a_batch_and_folded_tokens():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions, self.linear, self.norm = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(4)

        def forward(self, ids):
            places = torch.arange(ids.shape[1])[None]
            h = self.words(ids) + self.norm(self.positions(places))
            return self.linear(h.flatten(0, 1)).view(*ids.shape, 3).cumsum(1)

    torch.manual_seed(0)
    for b in (1, 2, 5):
        check(Positions(), torch.randint(0, 7, (b, 6)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("b, T", [(3, 5), (3, 1), (1, 4), (2, 2)])
def test_attention(batch_first, options, b, T):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y = self.attend(x, x, x, need_weights=False)[0]
            return y if batch_first else y.transpose(0, 1)

    torch.manual_seed(0)
    check(Attend(), torch.randn(b, T, 6, dtype=torch.float64))


@pytest.mark.parametrize("module", [
    nn.ConvTranspose2d(2, 3, 2), nn.Bilinear(2, 2, 2), nn.PReLU(), nn.Embedding(4, 3, scale_grad_by_freq=True), nn.EmbeddingBag(4, 3),
    nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.LSTM(4, 3, batch_first=True),
], ids=lambda m: type(m).__name__)
def test_what_has_no_rule_is_refused(module):
    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            y = self.inner(x[..., :2], x[..., 2:]) if isinstance(module, nn.Bilinear) else self.inner(x)
            return (y[0] if isinstance(y, tuple) else y).flatten(1)

    x = torch.randint(0, 4, (3, 5)) if hasattr(module, "num_embeddings") else torch.randn(3, 2, 4, 4) if isinstance(module, nn.ConvTranspose2d) else torch.randn(3, 2, 4)
    model = Wrap().eval()
    for name in names_of(model):
        if name.endswith("bias") and isinstance(module, nn.Linear):
            continue
        with pytest.raises(ValueError, match="used by .* rule"):
            layer_shares(model, x, logit(0), [name])


def test_a_use_inside_no_grad_contributes_nothing():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.base(x)
            return self.head(torch.relu_(h))

    torch.manual_seed(0)
    check(Frozen(), torch.randn(5, 4, dtype=torch.float64))


def test_in_place_layers_and_branches():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.b(self.a(x))
            y += self.c(x)
            return self.relu(y)

    torch.manual_seed(0)
    check(Branches(), torch.randn(3, 2, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_and_traces(mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double(), torch.randn(5, 4, dtype=torch.float64)
    model[2].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    expected = alone(model.requires_grad_(), x, logit(1))
    model[2].bias.requires_grad_(False)
    before = [(p, p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    with mode():
        values, rows = added_up(model, x.clone(), logit(1))
    assert_close(rows, expected)
    assert not values.requires_grad and not any(g.requires_grad for g in rows.values())
    for (p, flag, grad, old), q in zip(before, model.parameters()):
        assert p is q and p.requires_grad == flag and p.grad is grad and torch.equal(p, old)


def test_inference_tensors():
    torch.manual_seed(0)
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double(), torch.randn(5, 4, dtype=torch.float64)
        rows = added_up(model, x, sum_of_cubes)[1]
    usual = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    usual.load_state_dict(model.state_dict())
    assert_close(rows, alone(usual, x.clone(), sum_of_cubes))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("where", ["forward", "output"])
def test_an_interrupted_pass_leaves_nothing_behind(error, where):
    class Breaks(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            if where == "forward":
                raise error
            return y

    def output(y, batch):
        raise error

    model, x = Breaks(3, 2), torch.randn(4, 3)
    before, fast = dict(model.named_parameters()), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(error):
        layer_shares(model, x, output, ["weight", "bias"])
    assert all(p is before[name] and p.requires_grad and p.grad is None for name, p in model.named_parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode() is None


def test_shares_release_their_pieces():
    "Inputs and gradients go as the shares are consumed, last layer first."
    model, x = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)]), torch.randn(5, 6)

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.shape == (5, 6) for o in gc.get_objects())

    _, shares = layer_shares(model, x, logit(0), [f"{i}.weight" for i in range(4)])
    seen, counts = [], []
    for share in shares:
        seen.append(share.name)
        del share
        counts.append(alive())
    assert seen == ["3.weight", "2.weight", "1.weight", "0.weight"]
    assert all(later < earlier for earlier, later in zip(counts, counts[1:])), counts


def test_the_batched_product_is_exact_to_rounding():
    torch.manual_seed(0)
    before = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    for r, t, s in [(3, 1, 5), (33, 17, 65), (64, 300, 576)]:
        a, b = torch.randn(4, r, t), torch.randn(4, s, t).mT
        exact = a.double() @ b.double()
        assert (batched_product(a, b, torch.empty(4, r, s)) - exact).norm() < 1e-6 * exact.norm()
    assert isinstance(onednn_bmm_works(), bool)
    assert getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == before


def test_names_that_are_none():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for names in ([], ["wieght"], ["weight", "0.weight"]):
        with pytest.raises(ValueError, match="select_params"):
            layer_shares(model, x, logit(0), names)


def test_a_parameter_as_input_is_not_overlooked():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.linear = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(self.queries) * x

    model, x = Queries(), torch.randn(5, 4)
    with pytest.raises(ValueError, match="queries, used by linear"):
        layer_shares(model, x, logit(0), ["queries", "linear.weight"])
    assert_close(added_up(model, x, logit(0), ["linear.weight"])[1]["linear.weight"], alone(model, x, logit(0))["linear.weight"])
