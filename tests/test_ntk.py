"""NTK factors on layers of every kind, against models that are rewritten in NTK units, and against counting."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from infotda.data import load_torchvision
from infotda.features import tangent_features
from infotda.jacobian import flatten_jacobian, per_example_jacobian
from infotda.models import MLP, ResNet9
from infotda.ntk import kernel_alignment, kernel_shares, layer_factor, layer_kernels, linearized, mix_kernels, ntk_factors
from infotda.outputs import call_model, logit, logits_of, token_log_prob

some = settings(max_examples=60, deadline=None, derandomize=True)


class Conv1D(nn.Module):
    "The layout of Hugging Face's layer: y = x @ weight + bias, weight (inputs, outputs)."

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Reader(nn.Module):
    "Embedding, self-attention, HF-style layer, layer norm, a temperature, token outputs; dictionary input."

    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.wide = nn.Embedding(13, 8), nn.MultiheadAttention(8, 2, batch_first=True), Conv1D(16, 8)
        self.norm, self.temperature, self.head = nn.LayerNorm((8,)), nn.Parameter(torch.tensor([1.3])), nn.Linear(16, 13)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        return {"logits": self.temperature * self.head(torch.relu(self.wide(h)))}


def images(*shape, b=4, seed=0):
    return torch.rand(b, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5)).double()


def build(name):
    "A model in double precision, a batch and an output, by name."
    torch.manual_seed(0)
    tokens = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))
    models = {
        "mlp with biases": lambda: (MLP([12, 9, 7, 5], bias=True).double(), images(12), logit(2)),
        "conv1d": lambda: (sequence(nn.Conv1d(4, 6, 3, stride=2, groups=2), nn.ReLU()), images(4, 11), logit(2)),
        "conv2d": lambda: (sequence(nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8), nn.PReLU(8)), images(4, 9, 9), logit(2)),
        "conv3d": lambda: (sequence(nn.Conv3d(2, 3, (1, 3, 2)), nn.GroupNorm(3, 3)), images(2, 4, 5, 6), logit(2)),
        "transposed": lambda: (sequence(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.ReLU()), images(4, 4, 4), logit(2)),
        "bilinear norms": lambda: (sequence(nn.LayerNorm((3, 4)), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(4)), images(3, 4), logit(2)),
        "reader": lambda: (Reader().double(), {"tokens": tokens, "labels": tokens}, token_log_prob()),
        "resnet9": lambda: (ResNet9().double(), images(3, 32, 32, b=2), logit(2)),
        "resnet18": lambda: (load_torchvision().models.resnet18(num_classes=5).double(), images(3, 32, 32, b=2), logit(2)),
    }
    model, batch, output = models[name]()
    if name not in ("reader", "mlp with biases", "resnet9", "resnet18"):
        model(batch)                                                             # the lazy layer learns its size
    return model.eval(), batch, output


MODELS = ["mlp with biases", "conv1d", "conv2d", "conv3d", "transposed", "bilinear norms", "reader", "resnet9", "resnet18"]


def at(batch, i):
    return {k: v[i : i + 1] for k, v in batch.items()} if isinstance(batch, dict) else batch[i : i + 1]


class Rewritten(nn.Module):
    "A model that stores W~ and computes with W = c W~."

    def __init__(self, model, factors):
        super().__init__()
        self.inner, self.factors = [model], factors
        self.tilde = nn.ParameterList([p.detach() / factors[name] for name, p in model.named_parameters()])

    def forward(self, *args, **kwargs):
        weights = {name: c * w for (name, c), w in zip(self.factors.items(), self.tilde)}
        return functional_call(self.inner[0], weights, args, kwargs)


@pytest.mark.parametrize("gain", ["lecun", "kaiming", 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_against_a_rewritten_model(name, gain):
    """Predictions unchanged; Jacobians and features those that autograd gives with respect to W~."""
    model, batch, output = build(name)
    factors = ntk_factors(model, gain)
    assert list(factors) == [n for n, _ in model.named_parameters()]
    twin = Rewritten(model, factors)
    inputs = {"tokens": batch["tokens"]} if isinstance(batch, dict) else batch
    assert_close(logits_of(call_model(twin.inner[0], inputs)), logits_of(twin(**inputs) if isinstance(inputs, dict) else twin(inputs)))
    rows = []
    for i in range(2):
        part = at(batch, i)
        model_output = twin(tokens=part["tokens"]) if isinstance(part, dict) else twin(part)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output(model_output, part)[0], list(twin.tilde))]))
    J = per_example_jacobian(model, batch, output)
    scaled = flatten_jacobian({n: factors[n] * g for n, g in J.items()})
    assert_close(scaled[:2], torch.stack(rows), rtol=1e-7, atol=1e-9)
    Phi = tangent_features(model, batch, output, proj_type="identity", ntk=factors, progress=False).Phi
    assert_close(Phi.double(), scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS[:7])
def test_kernels_by_layer(name):
    """The kernel in any units is the weighted sum of the layers' kernels; shares sum to one."""
    model, batch, output = build(name)
    factors, kernels = ntk_factors(model, "kaiming"), layer_kernels(model, batch, output)
    for ntk in (None, factors):
        J = per_example_jacobian(model, batch, output)
        J = flatten_jacobian({n: (ntk or {}).get(n, 1.0) * g for n, g in J.items()})
        K = mix_kernels(kernels, ntk)
        assert_close(K, J @ J.T)
        shares = kernel_shares(kernels, ntk)
        assert (shares >= 0).all() and math.isclose(shares.sum(), 1.0)
        assert math.isclose(kernel_alignment(K, 5 * K), 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_linearized_against_jacobians(name):
    model, batch, _ = build(name)
    generator = torch.Generator().manual_seed(3)
    move = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
    inputs = {"tokens": batch["tokens"]} if isinstance(batch, dict) else batch
    here, change = linearized(model, inputs, move)
    assert_close(here, logits_of(call_model(model, inputs)).detach())
    pick = (lambda out, b: logits_of(out)[:, 1, 2]) if isinstance(batch, dict) else logit(2)
    J = per_example_jacobian(model, inputs, pick)
    expected = sum((J[n] * d).flatten(1).sum(dim=1) for n, d in move.items())
    assert_close(change[:, 1, 2] if isinstance(batch, dict) else change[:, 2], expected, rtol=1e-7, atol=1e-8)


@given(st.data())
@some
def test_fan_in_is_the_number_of_terms(data):
    """All weights one, input one: an output away from the borders is the count; an average for transposed ones."""
    dims, transposed = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    groups, a, b = (data.draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    kind = {(1, False): nn.Conv1d, (2, False): nn.Conv2d, (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d}[dims, transposed]
    layer = kind(groups * a, groups * b, kernel, stride=stride, groups=groups, dilation=1 if transposed else data.draw(st.integers(1, 2)))
    ones = {n: torch.full_like(p, float(n == "weight")) for n, p in layer.named_parameters()}
    y = functional_call(layer, ones, (torch.ones(1, groups * a, *[40] * dims),))
    middle = y[(0, 0) + tuple((slice(12, 12 + 2 * stride) if transposed else slice(None)) for _ in range(dims))]
    assert math.isclose(middle[middle > 0].mean().item(), 1 / layer_factor(layer, "weight", 1.0) ** 2, rel_tol=1e-6)


@pytest.mark.parametrize("layer, local, fan_in", [
    (nn.Linear(7, 3), "weight", 7), (nn.Linear(7, 3), "bias", 1), (nn.Embedding(50, 8), "weight", 1), (nn.EmbeddingBag(50, 8), "weight", 1),
    (nn.BatchNorm1d(4), "weight", 1), (nn.LayerNorm((3, 5)), "weight", 1), (nn.LayerNorm((3, 5)), "bias", 1), (nn.RMSNorm((3, 5)), "weight", 1),
    (nn.MultiheadAttention(8, 2), "in_proj_weight", 8), (nn.MultiheadAttention(8, 2, kdim=6, vdim=4), "v_proj_weight", 4),
    (nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k", 1), (nn.LSTM(6, 4, proj_size=2), "weight_hh_l0", 2),
    (nn.LSTM(6, 4, proj_size=2), "weight_hr_l0", 4), (nn.GRUCell(6, 4), "weight_ih", 6), (nn.Bilinear(3, 4, 2), "weight", 12), (Conv1D(3, 8), "weight", 8),
])
def test_layers_without_a_count(layer, local, fan_in):
    assert math.isclose(layer_factor(layer, local, 1.0), fan_in**-0.5)
    assert math.isclose(layer_factor(layer, local, 3.0), (3 / fan_in) ** 0.5) or fan_in == 1


def test_vision_transformer_needs_a_word_and_takes_it():
    vit = load_torchvision().models.VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5).eval()
    with pytest.raises(ValueError, match="class_token of VisionTransformer, encoder.pos_embedding of Encoder"):
        ntk_factors(vit)
    factors = ntk_factors(vit, override={"class_token": 1.0, "*pos_embedding": 1.0})
    assert factors["conv_proj.weight"] == (3 * 64) ** -0.5 and factors["encoder.pos_embedding"] == 1.0
    features = tangent_features(vit, images(3, 16, 16).float(), logit(1), proj_dim=64, ntk=factors, progress=False)
    assert features.Phi.shape == (4, 64) and features.ntk == factors
    without = ntk_factors(vit, params=lambda name, p: "class_token" not in name and "pos" not in name)
    assert without == {n: c for n, c in factors.items() if n not in ("class_token", "encoder.pos_embedding")}


class Tied(nn.Module):
    def __init__(self, first, second, equal):
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight if equal else nn.Parameter(self.first.weight.detach().clone())

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_tied_weights():
    same_role = Tied(nn.Linear(6, 6), nn.Linear(6, 6), True)
    assert ntk_factors(same_role)["first.weight"] == 6**-0.5 and "second.weight" not in ntk_factors(same_role)
    torn = Tied(nn.Embedding(9, 6), nn.Linear(6, 9), True)
    with pytest.raises(ValueError, match="a shared parameter.*first.weight of Embedding.*second.weight of Linear.*override"):
        ntk_factors(torn)
    assert ntk_factors(torn, override={"second.weight": 0.3})["first.weight"] == 0.3     # either name means the same tensor
    assert ntk_factors(torn, params="second.bias") == {"second.bias": 1.0}
    assert ntk_factors(Tied(nn.Embedding(9, 6), nn.Linear(6, 9), False))["second.weight"] == 6**-0.5


def test_weight_norm_is_unknown():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="original0 of"):
        ntk_factors(nn.Sequential(layer))


def test_bare_parameter_at_the_top():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.scale = nn.Parameter(torch.eye(3)), nn.Parameter(torch.tensor(2.0))

    with pytest.raises(ValueError, match="matrix of Bare"):
        ntk_factors(Bare())
    assert ntk_factors(Bare(), override={"matrix": 0.5}) == {"matrix": 0.5, "scale": 1.0}


@pytest.mark.parametrize("gain", ["xavier", 0, -1.0, float("nan"), float("inf"), True, None, [2]])
def test_bad_gain(gain):
    with pytest.raises((ValueError, TypeError)):
        ntk_factors(nn.Linear(3, 2), gain)


@pytest.mark.parametrize("override, words", [
    ({"wieght": 1.0}, "close to it"), ({"weight": 0.0}, "positive finite"), ({"weight": float("nan")}, "positive finite"), ({"bias": 2.0}, "selected parameters"),
])
def test_bad_override(override, words):
    with pytest.raises(ValueError, match=words):
        ntk_factors(nn.Linear(3, 2), params="weight", override=override)


def test_a_common_factor_changes_no_score():
    """Without biases and norms the gain is a unit, and scores at noise_var=None do not see it."""
    from infotda.surrogate import info_gain, info_loss

    model, x = MLP([12, 9, 7, 5]), images(12, b=20).float()
    Phi = [tangent_features(model, x, logit(1), proj_type="identity", ntk=ntk_factors(model, g), progress=False).Phi.double() for g in (1, 2)]
    assert_close(Phi[1], 2**0.5 * Phi[0], rtol=1e-5, atol=1e-6)
    for score in (info_gain, info_loss):
        assert_close(score(Phi[0][4:], [1, 2, 3], Phi[0][:4]), score(Phi[1][4:], [1, 2, 3], Phi[1][:4]), rtol=1e-4, atol=1e-7)


def test_model_is_left_as_it_was():
    model, batch, output = build("conv2d")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer_kernels(model, batch, output)
    linearized(model, batch, {n: torch.ones_like(p) for n, p in model.named_parameters()})
    ntk_factors(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    with pytest.raises(ValueError, match="eval"):
        linearized(model, batch, {"0.bias": torch.zeros(8)})


@pytest.mark.gpu
def test_on_gpu():
    model, batch, output = build("conv2d")
    kernels, factors = layer_kernels(model, batch, output), ntk_factors(model)
    move = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    here = linearized(model, batch, move)[1]
    model, batch = model.cuda(), batch.cuda()
    assert ntk_factors(model) == factors
    assert_close(mix_kernels(layer_kernels(model, batch, output), factors).cpu(), mix_kernels(kernels, factors))
    assert_close(linearized(model, batch, move)[1].cpu(), here)
