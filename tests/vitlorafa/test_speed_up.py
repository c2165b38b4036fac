import copy
import importlib
import pickle

import pytest
import torch
from small_models import build, images, perturb
from timm.layers import Mlp, set_fused_attn, set_reentrant_ckpt, use_fused_attn, use_reentrant_ckpt
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitlorafa import TRAIN, AdapterConfig, inject, merge, merge_and_unload, remove, use_ways
from vitlorafa.convolutions import PatchConv2d
from vitlorafa.layers import FastLinear
from vitlorafa.speed_up import ClassTokenTransformer, FastAttention, FastBlock, FastMlp, speed_up

pytestmark = pytest.mark.numbers

ops, linear, module = (
    importlib.import_module(f"vitlorafa.{name}") for name in ("ops.attention", "ops.linear", "speed_up")
)
VIT = "vit_small_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"

# An architecture, how it is built, and whether its last block can leave tokens out.
MODELS = {
    "class token": (VIT, {}, True),
    "one block": (VIT, {"depth": 1}, True),
    "registers and layer scale": (REGISTERS, {}, True),
    "norm of q and k": (VIT, {"qk_norm": True}, True),
    "norm behind attention": (VIT, {"scale_attn_norm": True, "scale_mlp_norm": True}, True),
    "odd head width": (VIT, {"embed_dim": 45}, True),
    "stochastic depth": (VIT, {"drop_path_rate": 0.5, "depth": 4}, True),
    "attention dropout": (VIT, {"attn_drop_rate": 0.2}, True),
    "dropout before and behind": (VIT, {"pos_drop_rate": 0.2, "drop_rate": 0.2, "patch_drop_rate": 0.4}, True),
    "norm before": ("vit_base_patch16_clip_224", {}, True),
    "norm behind the pooling": (VIT, {"fc_norm": True}, True),
    "any image size": (VIT, {"dynamic_img_size": True}, True),
    "no head": (VIT, {"num_classes": 0}, True),
    "deit 3": ("deit3_small_patch16_224", {}, True),
    "mean": (VIT, {"global_pool": "avg"}, False),
    "mean, dropout behind attention": (VIT, {"global_pool": "avg", "proj_drop_rate": 0.2}, False),
    "no pooling": (VIT, {"global_pool": ""}, False),
    "attention pool": ("vit_base_patch16_siglip_224", {}, False),
    "two heads": ("deit_tiny_distilled_patch16_224", {}, False),
    "in parallel": ("vit_small_patch16_18x2_224", {}, False),
}
OTHERS = ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "eva02_base_patch14_224"]


@pytest.fixture(params=[False, True], ids=["fused", "products"])
def products(request, monkeypatch):
    """Attention in both ways, whatever the CPU and the precision."""
    if request.param:
        monkeypatch.setattr(module, "attention", ops.attention_by_matmuls)


def double(architecture=VIT, **kwargs):
    return build(architecture, **kwargs).double().train()


def adapted(train="B", fast=False, **kwargs):
    model = double(**kwargs)
    model = speed_up(model) if fast else model
    inject(model, AdapterConfig(rank=4, train=train, targets="all", seed=0), train_head=True)
    perturb(model)
    return model


def step(model, x, forward=None):
    """Output and gradients of a forward and a backward pass."""
    model.zero_grad()
    torch.manual_seed(5)
    y = (model if forward is None else forward)(x)
    (y.float() if y.dtype == torch.bfloat16 else y).sin().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# The same


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_gradients(products, name):
    architecture, kwargs, leaves_out = MODELS[name]
    model = double(architecture, **kwargs)
    x = images(model, 3).double()
    fast = copy.deepcopy(model)
    assert speed_up(fast) is fast
    tokens = []
    fast.norm.register_forward_hook(lambda _, args, y: tokens.append(y.shape[1]))
    for training in (True, False):
        assert_same(step(fast.train(training), x), step(model.train(training), x))
    assert (tokens == [1, 1]) == leaves_out
    assert not any(type(m) is Attention for m in fast.modules())
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("part", ["bias", "norm", "blocks.1."])
def test_same_gradients_where_a_part_trains(products, part):
    """As in partial tuning; and nothing below what trains has a gradient."""
    model = double(depth=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    x = images(model, 3).double()
    ours, expected = step(speed_up(copy.deepcopy(model)), x), step(model, x)
    assert_same(ours, expected)
    assert len(ours) > 5 and all(part in name for name in ours.keys() - {"y"})


@pytest.mark.skipif("gated" not in Attention.__init__.__annotations__, reason="timm has no gated attention yet")
def test_gated_attention(products):
    model = double()
    for block in model.blocks:
        block.attn.gate = nn.Linear(48, 48).double()
    x = images(model).double()
    assert_same(step(speed_up(copy.deepcopy(model)), x), step(model, x))


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_models_stay_as_they_are_but_for_their_mlps_and_patches(architecture):
    model = double(architecture)
    faster = {Mlp: FastMlp, nn.Conv2d: PatchConv2d}
    before = [faster.get(type(m), type(m)) for m in model.modules()]
    x = images(model).double()
    expected = step(model, x)
    assert [type(m) for m in speed_up(model).modules()] == before
    assert_same(step(model, x), expected)
    assert speed_up(nn.Linear(2, 3))(torch.ones(1, 2)).shape == (1, 3)


def test_subclasses_and_unknown_parts_stay_as_they_are():
    class MyAttention(Attention):
        pass

    class MyTransformer(VisionTransformer):
        pass

    model = double(depth=3)
    model.blocks[0].attn.__class__ = MyAttention
    model.blocks[1].attn.extra = nn.Identity()
    model.blocks[1].mlp.extra = nn.Identity()
    speed_up(model)
    assert [type(block.mlp) for block in model.blocks] == [FastMlp, Mlp, FastMlp]
    assert [type(block.attn) for block in model.blocks] == [MyAttention, Attention, FastAttention]
    model = double()
    model.__class__ = MyTransformer
    assert type(speed_up(model)) is MyTransformer and type(model.blocks[-1]) is FastBlock
    model = double()
    model.blocks[-1].extra = nn.Identity()
    assert type(speed_up(model)) is VisionTransformer and type(model.blocks[-1]) is Block


class Additions(TorchDispatchMode):
    """Counts additions of residuals, [batch, tokens, width], in new memory and in place."""

    def __init__(self, width):
        super().__init__()
        self.width, self.counts = width, {"add": 0, "add_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.counts and args[0].dim() == 3 and args[0].shape[-1] == self.width:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_additions(model, x):
    with Additions(model.embed_dim) as counter:
        y = model(x)
    return y.detach(), counter.counts


@pytest.mark.parametrize("autocast", [False, True])
def test_residuals_are_added_in_place_without_gradients(autocast):
    model = double(depth=3).float().eval()
    fast, x = speed_up(copy.deepcopy(model)), images(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert count_additions(fast, x)[1]["add_"] == 0
        with torch.no_grad():
            in_place, fewer = count_additions(fast, x)
            parts = [part for block in fast.blocks for part in (block, block.norm1, block.norm2)]
            handles = [part.register_forward_hook(lambda *_: None) for part in parts]  # they could keep every tensor
            y, counts = count_additions(fast, x)
    for handle in handles:
        handle.remove()
    assert counts["add_"] == 0 and torch.equal(in_place, y)
    assert fewer == {"add": counts["add"] - 5, "add_": 5}  # all but the first of six
    for p in fast.parameters():
        p.requires_grad_(False)
    assert count_additions(fast, x)[1]["add_"] == 5  # frozen, as below a linear probe


def test_what_hooks_and_callers_keep_is_not_overwritten():
    model = speed_up(double(depth=3)).eval()
    kept = []

    def keep(_, args, y):
        kept.extend((t, t.clone()) for t in (args[0], y))

    x = images(model).double()
    for block in model.blocks:
        for part in (block, block.norm1, block.norm2):
            part.register_forward_hook(keep)
    tokens = torch.randn(2, 5, 48, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        before = tokens.clone()
        model.blocks[0](tokens)
    assert torch.equal(tokens, before)
    assert len(kept) == 24 and all(torch.equal(t, then) for t, then in kept)


def test_a_model_within_another():
    model = nn.Sequential(double(), nn.ReLU())
    x = images(model[0]).double()
    expected = step(model, x)
    assert_same(step(speed_up(model), x), expected)
    assert type(model[0]) is ClassTokenTransformer


def test_features_are_those_of_timm():
    model = double(REGISTERS).eval()
    fast = speed_up(copy.deepcopy(model))
    x = images(model).double()
    expected = model.forward_features(x)
    torch.testing.assert_close(fast.forward_features(x), expected)
    torch.testing.assert_close(fast.class_token(x), expected[:, :1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.forward_head(fast.class_token(x), pre_logits=True), expected[:, 0])
    for kwargs in ({"norm": True}, {"return_prefix_tokens": True, "indices": [1]}):
        torch.testing.assert_close(fast.forward_intermediates(x, **kwargs), model.forward_intermediates(x, **kwargs))
    torch.testing.assert_close(fast.get_intermediate_layers(x, n=2), model.get_intermediate_layers(x, n=2))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_what_changes_later_is_seen():
    model = double().eval()
    fast = speed_up(copy.deepcopy(model))
    x = images(model).double()
    for change in (
        lambda m: m.reset_classifier(7, "avg"),
        lambda m: m.reset_classifier(3, "token"),
        lambda m: setattr(m, "attn_pool", Mean()),
        lambda m: setattr(m, "attn_pool", None),
        lambda m: m.prune_intermediate_layers([0], prune_head=False),
    ):
        for each in (model, fast):
            change(each)
            each.double()
        fast.load_state_dict(model.state_dict())
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)


def test_masks_go_to_timm():
    model = double().eval()
    fast = speed_up(copy.deepcopy(model))
    x = images(model).double()
    mask = torch.randn(5, 5).double()
    expected = model(x, attn_mask=mask)
    assert not torch.allclose(expected, model(x))
    torch.testing.assert_close(fast(x, attn_mask=mask), expected)
    torch.testing.assert_close(fast(x, attn_mask=None), model(x))
    torch.testing.assert_close(fast.forward_features(x, attn_mask=mask), model.forward_features(x, attn_mask=mask))
    if "is_causal" in VisionTransformer.forward.__annotations__:
        torch.testing.assert_close(fast(x, is_causal=True), model(x, is_causal=True))


# With adapters


@pytest.mark.parametrize("train", TRAIN)
def test_adapters_before_or_after(products, train):
    expected_model, x = adapted(train), images(double()).double()
    expected = step(expected_model, x)
    for model in (speed_up(adapted(train)), adapted(train, fast=True)):
        assert_same(step(model, x), expected)
        assert {n for n in expected if n != "y"} == {n for n, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(merge(model)(x), expected["y"])
        merge_and_unload(model)
        assert type(model) is ClassTokenTransformer and type(model.blocks[0].attn.qkv) is nn.Linear
        torch.testing.assert_close(model(x), expected["y"])


def test_adapters_come_out_again(products):
    model = adapted(fast=True)
    x = images(model).double()
    torch.testing.assert_close(remove(model)(x), double()(x))


@pytest.mark.parametrize("train", TRAIN)
def test_keeps_no_more(train):
    """In bfloat16, if attention weights are recomputed; if not, they come on top."""
    use_ways({"attention": "matmuls 1 MiB"})

    def kept(model):
        storages = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(t):
            if t.data_ptr() not in parameters:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(x)
        return sum(storages.values())

    before = adapted(train, depth=3).float()
    x = images(before, 4)
    floor = kept(before)
    recomputed = kept(speed_up(before, recompute=True))
    assert recomputed < floor
    B, H, N = 4, 3, 5
    weights = B * H * (2 * N * N + N)  # in the last block the class token's alone
    assert kept(speed_up(before)) == recomputed + 2 * weights


# Less work


@pytest.mark.parametrize(("name", "N"), [("class token", 5), ("registers and layer scale", 9)])
def test_linear_products_fall_by_three_quarters_of_a_block(name, N):
    architecture, kwargs, _ = MODELS[name]
    model = double(architecture, **kwargs)
    B, d, x = 3, 48, images(model, 3).double()

    def linear_flops(model, run):
        with FlopCounterMode(display=False) as counter:
            run(model)
        total = counter.get_flop_counts()["Global"]
        return sum(total.get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm))

    fast = speed_up(copy.deepcopy(model))
    block, head = 12 * 2 * B * N * d**2, 2 * B * d * 5
    saved = 9 * 2 * B * (N - 1) * d**2  # of 12 units: all but qkv, on all tokens but one
    for run, times in ((lambda m: m(x), 1), (lambda m: m(x).sum().backward(), 3)):
        assert linear_flops(model, run) == times * (2 * block + head)
        assert linear_flops(fast, run) == times * (2 * block + head - saved)
    assert saved / block == pytest.approx(9 / 12 * (N - 1) / N)


def test_attention_takes_bfloat16_attention_by_matmuls(monkeypatch):
    use_ways({"attention": "matmuls 1 MiB"})
    taken, own = [], ops.attention_by_matmuls
    monkeypatch.setattr(
        ops, "attention_by_matmuls", lambda *args, **options: taken.append(args) or own(*args, **options)
    )
    model = double().float()
    x = images(model, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, x)
        ours = step(speed_up(model), x)
    assert [(q.shape, k.shape) for q, k, *_ in taken] == [((3, 3, m, 16), (3, 3, 5, 16)) for m in (5, 1)]
    assert ours["y"].dtype == expected["y"].dtype
    for name, value in expected.items():
        assert (ours[name] - value).norm() < 0.05 * value.norm(), name


def gelus(model, x):
    """How many times torch is asked for GELU."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profiled:
        y = model(x)
    return y, sum(event.count for event in profiled.key_averages() if event.key == "aten::gelu")


@pytest.mark.skipif(not linear.can_fuse(torch.bfloat16), reason="torch's operation does not work on this CPU")
@pytest.mark.parametrize("kind", ["plain", "adapted", "held", "merged"])
def test_gelu_comes_with_the_product_without_gradients(kind):
    use_ways({"linear": "fused"})
    model = (double() if kind == "plain" else adapted()).float().eval()
    if kind == "held":
        for block in remove(model).blocks:
            block.mlp.fc1.bfloat16().__class__ = FastLinear
    model = merge(model) if kind == "merged" else model
    x = images(model, 3)
    expected, plain = gelus(model, x)
    y, ours = gelus(speed_up(model), x)
    assert (plain, ours) == (2, 2 if kind == "merged" else 0)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("part", ["fc1", "act"])
def test_what_lies_between_is_there_for_a_hook(part):
    if linear.can_fuse(torch.bfloat16):
        use_ways({"linear": "fused"})
    model = speed_up(double().float().eval())
    x = images(model, 3)
    seen = []
    getattr(model.blocks[0].mlp, part).register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    y, count = gelus(model, x)
    ((before, after),) = seen
    assert count == (1 if linear.can_fuse(torch.bfloat16) else 2)
    mlp = model.blocks[0].mlp
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, mlp.fc1(before) if part == "fc1" else nn.functional.gelu(before))
    assert y.isfinite().all()


@pytest.mark.parametrize("act", [nn.GELU("tanh"), nn.SiLU()])
def test_other_activations_stay(act):
    model = double().float().eval()
    for block in model.blocks:
        block.mlp.act = act
    x = images(model, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mlp, z = model.blocks[0].mlp, torch.randn(3, 5, 48)
        expected = mlp(z)
        speed_up(model)
        assert torch.equal(mlp(z), expected) and model(x).isfinite().all()


def test_a_first_layer_of_another_kind_stays():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = double()
    model.blocks[0].mlp.fc1.__class__ = Twice
    x = images(model).double()
    assert_same(step(speed_up(copy.deepcopy(model)), x), step(model, x))


def test_again_changes_recomputation_alone():
    model = speed_up(double(), recompute=True)
    types = [type(m) for m in model.modules()]
    assert all(block.attn.recompute for block in model.blocks)
    speed_up(model)
    assert [type(m) for m in model.modules()] == types and not any(block.attn.recompute for block in model.blocks)


# What else is done with models


def test_copies_and_files(tmp_path):
    model = speed_up(adapted("BA"), recompute=True)
    x = images(model).double()
    expected = step(model, x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert_same(step(other, x), expected)
        assert other.blocks[0].attn.recompute and type(other.blocks[-1]) is FastBlock
    plain = adapted("BA")
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})
    model.load_state_dict(plain.state_dict())
    assert_same(step(model, x), step(plain, x))


def test_hooks_are_called():
    model = speed_up(double(depth=3))
    shapes = []
    for block in model.blocks:
        for part in (block, block.attn, block.mlp):
            part.register_forward_hook(lambda _, args, y: shapes.append(tuple(y.shape[1:])))
    model(images(model).double())
    assert shapes == [(5, 48)] * 6 + [(1, 48)] * 3
    shapes.clear()
    model.forward_features(images(model).double())
    assert shapes == [(5, 48)] * 9


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(products, reentrant):
    before = use_reentrant_ckpt()
    model = speed_up(adapted("BA", drop_path_rate=0.3))
    x = images(model).double().requires_grad_()  # which reentrant blocks want
    expected = step(model, x)
    model.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        calls = []
        model.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
        assert_same(step(model, x), expected)
        assert len(calls) == 2
    finally:
        set_reentrant_ckpt(before)


@pytest.mark.parametrize("low", [False, True], ids=["float64", "autocast"])
def test_compiles_into_one_graph(low):
    use_ways({"attention": "matmuls 1 MiB"})
    torch._dynamo.reset()
    model = speed_up(adapted("BA"))
    x = images(model).double()
    if low:
        model, x = model.float(), x.float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        ours, expected = step(model, x, compiled), step(model, x)
    torch._dynamo.reset()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= (0.05 if low else 1e-10) * value.norm(), name


def test_torch_func_without_fused_attention():
    """CPU's fused one knows no forward-mode gradients."""
    before = bool(use_fused_attn())
    set_fused_attn(False)
    try:
        model = speed_up(adapted("BA"))
    finally:
        set_fused_attn(before)
    x = images(model, 3).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).sin().sum()

    ours = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = step(model, image[None])
        del expected["y"]
        assert_same({name: g[i] for name, g in ours.items()}, expected)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = jvp(lambda p: loss(p, x[2]), (parameters,), (direction,))
    torch.testing.assert_close(tangent, sum((g * direction[name]).sum() for name, g in expected.items()))
