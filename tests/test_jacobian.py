"""Per-example Jacobians against autograd, one example at a time, over many kinds of models."""
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from infotda.data import load_torchvision
from infotda.jacobian import check_ready, coverage, flatten_jacobian, per_example_jacobian, select_params
from infotda.models import MLP, ResNet9
from infotda.outputs import batch_size, call_model, log_prob, logit, map_batch, margin, token_log_prob, true_logit


class Attention(nn.Module):
    "Embedding, masked self-attention, layer norm; keyword inputs and an object with .logits, as hub models have."

    def __init__(self, vocabulary=30, width=8, heads=2, classes=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.attend = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.norm, self.drop, self.head = nn.LayerNorm(width), nn.Dropout(0.1), nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids)
        mixed, _ = self.attend(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)
        h = self.norm(h + self.drop(mixed)) * attention_mask[..., None]
        return {"logits": self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))}


class TiedDecoder(nn.Module):
    "A causal language model whose embedding scores the tokens as well."

    def __init__(self, vocabulary=13, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.score = nn.Linear(width, vocabulary, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, input_ids, use_cache=True):
        T = input_ids.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).triu(1)
        return {"logits": self.score(self.block(self.embed(input_ids), src_mask=causal))}


class Encoder(nn.Module):
    "PyTorch's own encoder with a padding mask: in evaluation mode it would take the nested-tensor fast path."

    def __init__(self, vocabulary=13, width=8, classes=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.encode = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.encode(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)[:, 0])}


class Temperature(nn.Linear):
    "Logits times a parameter without dimensions."

    def __init__(self):
        super().__init__(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * super().forward(x)


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 6, 3, groups=2, stride=2, dilation=2), nn.GroupNorm(3, 6), nn.GELU(),
        nn.Flatten(2), nn.Conv1d(6, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 3))


class Twice(nn.Module):
    "One layer called twice, one matrix used by two layers and once more by hand."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.b.weight = self.a.weight

    def forward(self, x):
        h = self.norm(torch.tanh(self.a(self.norm(self.a(x)))))
        return nn.functional.linear(torch.tanh(self.b(h)), self.a.weight[:3] * 2) + nn.functional.linear(h, self.b.weight)[:, 3:]


class Recurrent(nn.Module):
    "Has parameters that neither hooks nor torch.func can follow."

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def hub(name):
    "A small random model of a kind that hubs share, from its library."
    load_torchvision()  # the library imports torchvision, which has to fit this torch
    lib = pytest.importorskip("transformers")
    size = dict(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=12)
    ids, y = torch.randint(1, 30, (4, 6)), torch.tensor([2, 0, 1, 2])
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long()
    if name == "bert":
        return lib.BertForSequenceClassification(lib.BertConfig(**size, num_labels=3)), {"input_ids": ids * mask, "attention_mask": mask, "labels": y}, margin()
    if name == "gpt2":
        config = lib.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
        model = lib.GPT2LMHeadModel(config)
    else:
        model = lib.LlamaForCausalLM(lib.LlamaConfig(**size, num_key_value_heads=1, tie_word_embeddings=True))
    return model, {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([1]), 3), "use_cache": False}, token_log_prob()


def build(name):
    "A model in evaluation mode, a batch of four examples, and the output to differentiate, all in float64."
    torch.manual_seed(0)
    y = torch.tensor([2, 0, 1, 2])
    images = torch.rand(4, 3, 32, 32)
    if name == "mlp":
        case = MLP([64, 16, 8, 10]), (torch.rand(4, 1, 8, 8), y), margin()
    elif name == "mlp with bias":
        case = MLP([64, 16, 10], bias=True), (torch.rand(4, 1, 8, 8), y), log_prob()
    elif name == "resnet9":
        case = ResNet9(), (images, y), margin()
    elif name == "resnet18":
        case = load_torchvision().models.resnet18(weights=None, num_classes=5), (images, y), true_logit()
    elif name == "attention":
        ids = torch.randint(1, 30, (4, 6))
        mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long()
        case = Attention(), {"input_ids": ids * mask, "attention_mask": mask, "labels": y}, margin()
    elif name == "tied decoder":
        ids = torch.randint(0, 13, (4, 5))
        case = TiedDecoder(), {"input_ids": ids, "labels": ids.clone().index_fill_(1, torch.tensor([1]), -100), "use_cache": False}, token_log_prob()
    elif name == "encoder":
        mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [4]])).long()
        case = Encoder(), {"input_ids": torch.randint(0, 13, (4, 5)), "attention_mask": mask}, logit(1)
    elif name == "scalar parameter":
        case = Temperature(), (torch.rand(4, 6), y), margin()
    elif name == "convolutions":
        case = convolutions(), torch.rand(4, 2, 10, 10), logit(2)
    elif name == "vision transformer":
        model = load_torchvision().models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
        nn.init.normal_(model.heads.head.weight)  # zero at first, and then so is the gradient of everything else
        case = model, (torch.rand(4, 3, 16, 16), y), margin()
    elif name == "twice":
        case = Twice(), (torch.rand(4, 6), y), margin()
    elif name == "recurrent":
        case = Recurrent(), (torch.rand(4, 5, 4), y), margin()
    else:
        case = hub(name)
    model, batch, output = case
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        with torch.no_grad():  # running statistics that are not mean 0, variance 1
            model.train()(torch.rand(8, 3, 32, 32))
    return to(model, batch, torch.float64) + (output,)


def to(model, batch, dtype, device="cpu"):
    batch = map_batch(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), batch)
    return copy.deepcopy(model).to(device, dtype).eval(), batch


def one_at_a_time(model, batch, output):
    "The oracle: a plain backward pass for each example."
    params = dict(model.named_parameters())
    rows = []
    for i in range(batch_size(batch)):
        one = map_batch(lambda t: t[i : i + 1], batch)
        f = output(call_model(model, one), one).squeeze(0)
        rows.append(torch.autograd.grad(f, list(params.values()), materialize_grads=True))
    return {name: torch.stack(g) for name, g in zip(params, zip(*rows))}


def deviation(a, b):
    "Largest error of a row, relative to its length."
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


HUB = ["bert", "gpt2", "llama"]  # in some versions of their library, torch.func cannot batch how masks are made
NAMES = ["mlp", "mlp with bias", "resnet9", "resnet18", "attention", "tied decoder", "convolutions", "encoder", "scalar parameter",
    "vision transformer", "twice", *HUB]
COVERED = set(NAMES) - {"twice"}


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def case(named):
    return named[1]


@pytest.mark.parametrize("engine", ["auto", "hooks", "func", "loop"])
def test_equals_autograd(named, engine):
    name, (model, batch, output) = named
    if engine == "hooks" and name not in COVERED:
        with pytest.raises(ValueError, match="engine='auto'"):
            per_example_jacobian(model, batch, output, engine=engine)
        return
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        rows = per_example_jacobian(model, batch, output, engine=engine)
    except RuntimeError as error:
        if engine == "func" and name in HUB:
            pytest.skip(str(error).splitlines()[0])
        raise
    assert list(rows) == select_params(model) == [name for name, _ in model.named_parameters()]
    assert_close(rows, one_at_a_time(model, batch, output))
    assert not any(g.requires_grad for g in rows.values())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_coverage_says_what_is_left(named):
    name, (model, batch, output) = named
    left = {key: why for key, why in coverage(model, batch, output, select_params(model)).items() if why}
    assert (not left) == (name in COVERED), left
    if name == "twice":
        assert list(left) == ["a.weight"] and "__getitem__" in left["a.weight"]


def test_what_no_engine_but_the_definition_can_do():
    model, batch, output = build("recurrent")
    reasons = coverage(model, batch, output, select_params(model))
    assert [name for name, why in reasons.items() if why is None] == ["head.weight", "head.bias"] and "lstm" in reasons["rnn.weight_ih_l0"]
    with pytest.raises(RuntimeError) as caught:
        per_example_jacobian(model, batch, output)
    assert "engine='loop'" in caught.value.__notes__[-1]
    assert_close(per_example_jacobian(model, batch, output, engine="loop"), one_at_a_time(model, batch, output))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_coverage_of_small_batches(batch_size):
    "Places in front are noticed even if there is only one example, and whatever the number of places."
    class PlacesFirst(nn.Linear):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).square().sum(0)

    torch.manual_seed(0)
    model, x = PlacesFirst(3, 2).double(), torch.rand(batch_size, 6, 3, dtype=torch.float64)
    reasons = coverage(model, x, logit(0), ["weight", "bias"])
    assert all(reasons.values()), reasons
    assert_close(per_example_jacobian(model, x, logit(0)), one_at_a_time(model, x, logit(0)))


def test_engines():
    model, batch, output = build("mlp")
    for bad in ("fast", None, ""):
        with pytest.raises(ValueError, match="engine"):
            per_example_jacobian(model, batch, output, engine=bad)
    model, batch, output = build("twice")
    with pytest.raises(ValueError, match=r"a\.weight \(used by __getitem__.*engine='auto'"):
        per_example_jacobian(model, batch, output, engine="hooks")
    rows = per_example_jacobian(model, batch, output, engine="hooks", params=["a.bias", "norm.*"])
    assert_close(rows, {name: g for name, g in one_at_a_time(model, batch, output).items() if name in rows})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_batch_invariance(case, dtype, tolerance):
    model, batch = to(*case[:2], dtype)
    whole = flatten_jacobian(per_example_jacobian(model, batch, case[2]))
    assert whole.dtype == dtype
    for chunk_size in (1, 2, 3, 100):
        assert deviation(flatten_jacobian(per_example_jacobian(model, batch, case[2], chunk_size=chunk_size)), whole) < tolerance
    for rows in ([3], [2, 0], [1, 1]):
        part = map_batch(lambda t: t[rows], batch)
        assert deviation(flatten_jacobian(per_example_jacobian(model, part, case[2])), whole[rows]) < tolerance


def test_a_subset_of_the_parameters_changes_nothing(case):
    model, batch, output = case
    full = per_example_jacobian(model, batch, output)
    last = list(full)[-2:]
    assert_close(per_example_jacobian(model, batch, output, params=last), {name: full[name] for name in last})


def test_frozen_parameters_are_skipped_unless_named():
    model, batch, output = build("mlp")
    full = per_example_jacobian(model, batch, output)
    model.linear1.requires_grad_(False)
    assert_close(per_example_jacobian(model, batch, output), {name: full[name] for name in list(full)[1:]})
    assert_close(per_example_jacobian(model, batch, output, params="*"), full)


@pytest.mark.parametrize("name", ["resnet9", "attention", "tied decoder"])
def test_training_mode_is_refused(name):
    model, batch, output = build(name)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        per_example_jacobian(model.train(), batch, output)
    check_ready(model.eval())


def test_works_under_no_grad_and_leaves_no_graph():
    model, batch, output = build("mlp")
    reference = per_example_jacobian(model, batch, output)
    with torch.no_grad():
        assert_close(per_example_jacobian(model, batch, output), reference)
    with torch.inference_mode():
        assert_close(per_example_jacobian(model, batch, output), reference)


def test_a_non_finite_jacobian_names_example_and_parameter():
    model, batch, output = build("attention")
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    batch["input_ids"] = torch.where(batch["input_ids"] == 7, 8, batch["input_ids"])
    batch["input_ids"][2, 0] = 7
    for chunk_size in (None, 1, 3):
        with pytest.raises(ValueError, match=r"1 example\(s\), first at position 2 of the batch, in embed\.weight"):
            per_example_jacobian(model, batch, output, params="embed.weight", chunk_size=chunk_size)


def test_user_output_on_a_model_of_its_own_kind():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x), x

    x = torch.rand(5, 3)
    rows = per_example_jacobian(Pair(), x, lambda out, batch: (out[0][:, 0] * batch[:, 1]))
    assert_close(rows["linear.weight"][:, 0], x * x[:, 1:2])
    assert_close(rows["linear.bias"][:, 1], torch.zeros(5))


def test_detached_outputs_are_refused():
    model, batch, _ = build("mlp")
    for fn in (lambda z, b: z[:, 0].detach(), lambda z, b: z.argmax(1).to(z), lambda z, b: torch.ones(len(z))):
        with pytest.raises(ValueError, match="do not detach"):
            per_example_jacobian(model, batch, fn)


def test_an_output_that_does_not_reach_the_selected_parameters_is_refused():
    model, batch, _ = build("mlp")
    first = model.linear1

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, nn.Linear(16, 3).double()

        def forward(self, x):
            h = self.first(x.flatten(1))
            return {"logits": self.second(h), "hidden": h}

    def hidden(out, batch):
        return out["hidden"][:, 0]

    assert per_example_jacobian(Early(), batch, hidden, params="first.*")["first.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="selected parameters"):
        per_example_jacobian(Early(), batch, hidden, params="second.*")


@pytest.mark.parametrize("module", [nn.Embedding(5, 3, max_norm=0.5), nn.EmbeddingBag(5, 3, max_norm=0.5), nn.FractionalMaxPool2d(2, output_size=3)])
@pytest.mark.parametrize("training", [True, False])
def test_refused_in_any_mode(module, training):
    with pytest.raises(ValueError, match="max_norm|random pooling"):
        check_ready(nn.Sequential(module).train(training))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_normalisation(norm):
    torch.manual_seed(0)
    model, x = norm(nn.Linear(4, 3)).double(), torch.rand(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="spectral"):
        per_example_jacobian(model.train(), x, logit(0))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows = per_example_jacobian(model.eval(), x, logit(0))
    assert_close(rows, one_at_a_time(model, x, logit(0)))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_precision_mismatch_is_named():
    x = torch.rand(4, 3)
    for model, batch in [(nn.Linear(3, 2).double(), x), (nn.Linear(3, 2), x.double()), (nn.Linear(3, 2), (x.double(), torch.zeros(4, dtype=torch.long)))]:
        with pytest.raises(TypeError, match="the parameters' type"):
            per_example_jacobian(model, batch, logit(0))
    with pytest.raises(RuntimeError, match="shapes"):  # another reason stays what it is
        per_example_jacobian(nn.Linear(4, 2), x, logit(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_integer_labels(dtype):
    model, (x, y), output = build("mlp")
    assert_close(per_example_jacobian(model, (x, y.to(dtype)), output), per_example_jacobian(model, (x, y), output))


def test_chunk_sizes():
    model, batch, output = build("mlp")
    assert_close(per_example_jacobian(model, batch, output, chunk_size=np.int64(3)), per_example_jacobian(model, batch, output))
    for bad in (True, 0, -1, 2.0, "4"):
        with pytest.raises(ValueError, match="chunk_size"):
            per_example_jacobian(model, batch, output, chunk_size=bad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_cuda_equals_cpu(name, dtype, tolerance):
    "On CUDA the numbers are those of the CPU in float64: to 1e-10 in float64, to 1e-3 in float32 without TF32."
    model, batch, output = build(name)
    reference = flatten_jacobian(per_example_jacobian(model, batch, output))
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        rows = flatten_jacobian(per_example_jacobian(*to(model, batch, dtype, "cuda"), output))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    assert rows.is_cuda and rows.dtype == dtype
    assert deviation(rows.cpu().double(), reference) < tolerance
