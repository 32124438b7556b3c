"""A forward and backward pass on a CUDA device asks the host for no number: fake tensors have none to give."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import DynamicConv, TransformerAttention
from lightning_attn.attention.spec import TERM_SETS

CASES = {
    "plain": {},
    "padding": {"padding": True},
    "stride": {"kv_stride": 2},
    "window": {"window": 3},
    "causal": {"causal": True},
    "causal with padding": {"causal": True, "padding": True},
    "dropout": {"dropout": 0.1},
    "pairs": {"pairs": True},
}


def inputs(sizes: tuple[int, ...], device: str, dtype: torch.dtype, padded: bool, pairs: bool):
    shape = (2, *sizes, 32) if len(sizes) == 1 else (2, 32, *sizes)
    count = math.prod(sizes)
    x = torch.empty(shape, device=device, dtype=dtype)
    padding = torch.empty(2, *sizes, dtype=torch.bool, device=device) if padded else None
    mask = torch.empty(2, 1, count, count, dtype=torch.bool, device=device) if pairs else None
    return x, {"key_padding_mask": padding, "attention_mask": mask}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(40,), (8, 12)], ids=str)
def test_transformer_attention(sizes, case):
    settings = dict(CASES[case])
    masks = [settings.pop(name, False) for name in ("padding", "pairs")]
    with FakeTensorMode():
        for terms, dtype in itertools.product(TERM_SETS, (torch.float32, torch.bfloat16)):
            x, keywords = inputs(sizes, "cuda", dtype, *masks)
            attention = TransformerAttention(32, 4, terms, len(sizes), device="cuda", dtype=dtype, **settings)
            out = attention(x, **keywords)
            assert out.device.type == "cuda"
            assert out.dtype == dtype
        # Without a device autograd has no CUDA thread: the same algorithms' backward passes on the CPU.
        for terms, algorithm in itertools.product(TERM_SETS, ("pooled", "separable", "sdpa", "augmented_sdpa")):
            x, keywords = inputs(sizes, "cpu", torch.float32, *masks)
            attention = TransformerAttention(32, 4, terms, len(sizes), algorithm=algorithm, **settings)
            try:
                out = attention(x, **keywords)
            except ValueError as error:
                assert "cannot compute this attention" in str(error)  # noqa: PT017
                continue
            out.sum().backward()
            assert all(parameter.grad is not None for parameter in attention.parameters())


@pytest.mark.parametrize("sizes", [(40,), (8, 12)], ids=str)
def test_convolutions(sizes):
    ndim = len(sizes)
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            x, _ = inputs(sizes, device, torch.float32, False, False)
            out = DynamicConv(32, 5, 4, ndim, device=device)(x)
            assert out.shape == x.shape
            if device == "cpu":
                out.sum().backward()


def test_a_number_that_the_host_asks_for_is_found():
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"_local_scalar_dense|item"):
        float(torch.empty(2, device="cuda").sum())
