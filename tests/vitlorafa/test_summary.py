from small_models import build

from vitlorafa import AdapterConfig, count_parameters, inject, print_trainable_parameters, summary


def test_counts():
    model = build("test_vit")
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total)
    inject(model, AdapterConfig(rank=2), train_head=True)
    factors = 6 * 2 * 2 * 64
    assert count_parameters(model) == (factors + 5 * 65, total + 2 * factors)


def test_prints_pefts_line(capsys):
    print_trainable_parameters(inject(build("test_vit"), AdapterConfig(rank=2)))
    assert capsys.readouterr().out == "trainable params: 1,536 || all params: 303,493 || trainable%: 0.5061\n"


def test_summary():
    lines = summary(inject(build("test_vit"), AdapterConfig(rank=2, targets="q,v,fc2", train="BA"))).splitlines()
    assert lines[0].split() == ["layer", "adapts", "weight", "rank", "trains", "trainable"]
    assert lines[1].split() == ["blocks.0.attn.qkv", "q,", "v", "192", "×", "64", "2", "BA", "512"]
    assert lines[2].split()[:2] == ["blocks.0.mlp.fc2", "fc2"]
    assert len(lines) == 2 + 2 * 6 and lines[-1].startswith("model")
    assert len({line.index(" BA ") for line in lines[1:-1]}) == 1
