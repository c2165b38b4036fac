import torch

from domainbed_ext.averaging.mean import Mean


def visited(count, drift=0.0, kind=torch.float32):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 5, generator=draw) * 1e-3
    return (1.0 + drift * torch.arange(count)[:, None] + noise).to(kind)


def test_the_mean_of_many_small_changes_is_the_plain_mean_in_double_precision():
    weights = visited(3000, drift=1e-7)
    mean = Mean()
    for each in weights:
        mean.add({"w": each})
    expected = weights.double().mean(0)
    assert torch.allclose(mean.value()["w"], expected, rtol=1e-14, atol=0) and mean.count == 3000


def test_means_of_segments_count_as_often_as_they_have_steps():
    weights = visited(10)
    mean = Mean()
    mean.add({"w": weights[:7].double().mean(0)}, 7)
    mean.add({"w": weights[7:].double().mean(0)}, 3)
    assert torch.allclose(mean.value()["w"], weights.double().mean(0), rtol=1e-14, atol=0)


def test_tensors_are_copied_and_of_any_type():
    weight, half = torch.ones(2, dtype=torch.complex64), torch.full((2,), 0.5, dtype=torch.bfloat16)
    mean = Mean()
    mean.add({"w": weight, "half": half})
    weight += 2j
    mean.add({"w": weight, "half": half})
    assert mean.value()["w"].tolist() == [1 + 1j] * 2
    assert mean.value()["half"].tolist() == [0.5] * 2


def test_a_copy_can_be_added_to_without_changing_the_mean():
    mean = Mean()
    mean.add({"w": torch.zeros(2)})
    copy = mean.copy()
    copy.add({"w": torch.full((2,), 4.0)})
    assert (mean.value()["w"].tolist(), copy.value()["w"].tolist()) == ([0.0] * 2, [2.0] * 2)
