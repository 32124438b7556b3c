import pytest
import torch
import torch.nn.functional as F

from lightning_attn.networks.translation import cross_entropy
from lightning_attn.networks.translation.cross_entropy import summed_cross_entropy


def example(rows=11, classes=7, dtype=torch.float64):
    hidden = torch.randn(rows, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, 5, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(classes, (rows,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_values_and_gradients_are_those_of_torch(monkeypatch, smoothing, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    hidden, weight, target = example()
    loss, likelihood = summed_cross_entropy(hidden, weight, target, smoothing)
    (3 * loss).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(likelihood, F.cross_entropy(logits, target, reduction="sum"))
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad))
    assert not likelihood.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [0, 3])
def test_ignored_rows_are_like_rows_that_are_not_there(monkeypatch, smoothing, ignored):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    hidden, weight, target = example(classes=4)
    kept = target != ignored
    assert 0 < kept.sum() < len(kept)
    found = summed_cross_entropy(hidden, weight, target, smoothing, ignored)
    gradients = torch.autograd.grad(found[0], (hidden, weight))
    expected = summed_cross_entropy(hidden[kept], weight, target[kept], smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected[0], (hidden, weight)))
    assert not gradients[0][~kept].any()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_neither_overflow_nor_lose_the_normaliser(size):
    hidden, weight, target = example(dtype=torch.float32)
    with torch.no_grad():
        weight *= size
    for smoothing in (0.0, 0.1):
        loss, likelihood = summed_cross_entropy(hidden, weight, target, smoothing)
        logits = F.linear(hidden, weight)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum"))
        torch.testing.assert_close(likelihood, F.cross_entropy(logits, target, reduction="sum").detach())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(bad):
    hidden, weight, target = example()
    with torch.no_grad():
        hidden[3, 2] = bad
    loss, likelihood = summed_cross_entropy(hidden, weight, target)
    loss.backward()
    assert loss.isnan()
    assert likelihood.isnan()
    assert hidden.grad[3].isnan().all()
    assert hidden.grad[:3].isfinite().all()


def test_gradcheck():
    hidden, weight, target = example(rows=4)
    torch.autograd.gradcheck(lambda h, w: summed_cross_entropy(h, w, target, 0.1)[0], (hidden, weight))


def test_bf16_autocast_is_within_its_rounding():
    hidden, weight, target = example(rows=600, classes=50, dtype=torch.float32)
    exact, _ = summed_cross_entropy(hidden, weight, target, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = summed_cross_entropy(hidden, weight, target, 0.1)
    assert rounded.dtype == torch.float32
    # Every logit is rounded to 8 bits; over 600 rows the errors average out far below that.
    assert abs(rounded - exact) / exact < 2**-8
    rounded.backward()
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.isfinite().all()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, target = example()
    loss, _ = summed_cross_entropy(hidden.detach(), weight, target)
    loss.backward()
    assert weight.grad is not None
    assert hidden.grad is None
    with torch.no_grad():
        assert not summed_cross_entropy(hidden, weight, target)[0].requires_grad


def test_no_rows():
    hidden, weight, target = example(rows=0)
    loss, likelihood = summed_cross_entropy(hidden, weight, target, 0.1)
    loss.backward()
    assert loss == likelihood == 0
    assert (weight.grad == 0).all()
