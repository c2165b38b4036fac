import pytest
import torch

from domainbed_ext.objectives.mixstyle import draw_partners, mix_styles
from tests.domainbed_ext.objectives.small_algorithms import SHAPE, batches, make


def test_styles_are_means_and_deviations_of_channels():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 6, 3, generator=draw) * 2 + 1
    partners, shares = torch.tensor([2, 3, 1, 0]), torch.tensor([0.2, 1.0, 0.0, 0.7])
    expected = tokens.double().clone()
    wide = tokens.double()
    for i in range(4):
        for channel in range(3):
            own, other = wide[i, :, channel], wide[partners[i], :, channel]
            share = shares[i].double()
            mean = share * own.mean() + (1 - share) * other.mean()
            deviation = share * own.std() + (1 - share) * other.std()
            expected[i, :, channel] = (own - own.mean()) / own.std() * deviation + mean
    torch.testing.assert_close(mix_styles(tokens, partners, shares).double(), expected, atol=1e-5, rtol=1e-5)
    grid = tokens.reshape(4, 2, 3, 3)  # as in Swin
    assert torch.equal(mix_styles(grid, partners, shares), mix_styles(tokens, partners, shares).reshape(grid.shape))


def test_gradients_do_not_pass_through_styles():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, generator=draw).requires_grad_()
    partners, shares = torch.tensor([1, 0]), torch.tensor([0.3, 0.6])
    (gradient,) = torch.autograd.grad(mix_styles(tokens, partners, shares).sum(), tokens)
    deviation = tokens.detach().std(1, keepdim=True)
    factor = (0.3, 0.6)
    expected = torch.stack([f * deviation[i] + (1 - f) * deviation[1 - i] for i, f in enumerate(factor)]) / deviation
    torch.testing.assert_close(gradient, expected.expand_as(gradient), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_format_stays(dtype):
    tokens = torch.randn(2, 5, 3).to(dtype)
    assert mix_styles(tokens, torch.tensor([1, 0]), torch.tensor([0.3, 0.6])).dtype == dtype


@pytest.mark.parametrize("sizes", [(4,), (3, 3), (4, 4, 4), (2, 5, 3)])
def test_partners_are_of_another_domain(sizes):
    domains = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for seed in range(5):
        torch.manual_seed(seed)
        partners = draw_partners(sizes)
        own, others = domains, domains[partners]
        assert len(partners) == sum(sizes) and ((own != others).all() or len(sizes) == 1)
        for domain in range(len(sizes)):  # all of one other domain, and none twice before each was there once
            of_domain = partners[own == domain]
            assert len(others[own == domain].unique()) == 1
            assert len(of_domain.unique()) == min(len(of_domain), sizes[others[own == domain][0]])


def block_outputs(algorithm, **hparams):
    """The output of each block in a training step's forward pass."""
    outputs = []
    hooks = [b.register_forward_hook(lambda _, i, o: outputs.append(o.detach().clone())) for b in blocks(algorithm)]
    algorithm.update(batches())
    for hook in hooks:
        hook.remove()
    return outputs


def blocks(algorithm):
    return list(algorithm.backbone.blocks)


@pytest.mark.parametrize(("hparams", "count"), [({}, 1), ({"mixstyle_blocks": 3}, 3)])
def test_the_patch_tokens_of_the_first_blocks_are_mixed(hparams, count, monkeypatch):
    algorithm = make("FullFT+MixStyle", mixstyle_p=1.0, **hparams)
    seen = []

    def mixed(tokens, partners, shares):
        seen.append((tokens.shape, shares.tolist()))
        return tokens + 1000

    monkeypatch.setattr("domainbed_ext.objectives.mixstyle.mix_styles", mixed)
    outputs = []
    for block in algorithm.backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].detach().clone()))
    algorithm.update(batches())
    assert [shape for shape, _ in seen] == [(12, 16, 128)] * count  # without the class token
    assert all(0 <= share <= 1 for _, shares in seen for share in shares) and len(set(seen[0][1])) > 6
    for index, tokens in enumerate(outputs[1:], 1):
        assert (tokens[:, 1:].mean() > 500) and tokens[:, :1].abs().max() < 500, index


def test_styles_are_mixed_with_probability_p(monkeypatch):
    algorithm, mixed = make("LP+MixStyle"), []

    def mix(tokens, partners, shares):
        mixed.append(1)
        return tokens

    monkeypatch.setattr("domainbed_ext.objectives.mixstyle.mix_styles", mix)
    torch.manual_seed(0)
    for _ in range(40):
        algorithm.update(batches())
    assert 10 <= len(mixed) <= 30
    never = make("LP+MixStyle", mixstyle_p=0.0)
    before = len(mixed)
    never.update(batches())
    assert len(mixed) == before


@pytest.mark.parametrize("method", ["BOnly", "FullFT", "LP"])
def test_evaluation_is_that_of_the_model(method):
    algorithm, plain = make(f"{method}+MixStyle", mixstyle_p=1.0), make(method)
    algorithm.update(batches())
    plain.load_state_dict({k: v for k, v in algorithm.state_dict().items() if not k.startswith("objective.")})
    images = torch.randn(5, *SHAPE)
    assert torch.equal(algorithm.eval().predict(images), plain.eval().predict(images))
    assert torch.equal(algorithm.train().predict(images), plain.train().predict(images))  # nor does it stay behind


def test_the_same_seed_mixes_the_same():
    values = []
    for _ in range(2):
        algorithm = make("BOnly+MixStyle", mixstyle_p=1.0)
        torch.manual_seed(7)
        values.append([algorithm.update(batches()) for _ in range(2)])
    assert values[0] == values[1]
