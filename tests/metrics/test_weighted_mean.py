import math

import pytest
import torch

from lightning_attn.metrics import WeightedMean


def loss_terms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, generator=generator) * 1e3, torch.randint(1, 40, (size,), generator=generator)


def test_weighted_mean_is_exact():
    mean = WeightedMean("val")
    mean.update([2, 0], torch.tensor([1e16, 1.0], dtype=torch.float64), torch.tensor([2, 3]))
    mean.update([1, 2], torch.tensor([-1e16, 5.0], dtype=torch.float64), torch.tensor([0, 2]))
    assert mean.compute() == 1.0 / 5
    mean.reset()
    sums, counts = loss_terms(101)
    mean.update(torch.arange(101), sums, counts)
    assert mean.compute() == math.fsum(sums.tolist()) / int(counts.sum())


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        (torch.ones(3), torch.ones(2).long(), r"each of the 2 ids.*shapes \[3\] and \[2\]"),
        (torch.ones(2, 1), torch.ones(2, 1).long(), r"shapes \[2, 1\] and \[2, 1\]"),
        (torch.ones(2), torch.ones(2), "counts of torch.float32"),
    ],
)
def test_weighted_mean_refuses_what_does_not_fit(sums, counts, message):
    with pytest.raises(ValueError, match=message):
        WeightedMean("val").update([0, 1], sums, counts)


def test_weighted_mean_refuses_an_id_of_two_samples():
    mean = WeightedMean("val")
    mean.update([1], torch.ones(1), torch.tensor([3]))
    with pytest.raises(ValueError, match="sample id 1 belongs to two different samples, 3 and 4"):
        mean.update([1], torch.ones(1), torch.tensor([4]))


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match=r"no element of the split 'test' to score"):
        WeightedMean("test").compute()
