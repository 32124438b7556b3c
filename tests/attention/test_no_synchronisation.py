"""A forward and backward pass on a CUDA device asks the host for no number: fake tensors have none to give."""

import itertools
import math

import pytest
import torch
from fake_cuda import FakeTensorMode, fake_cuda, gradients

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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(40,), (8, 12)], ids=str)
def test_transformer_attention(sizes, case):
    settings = dict(CASES[case])
    padded, pairs = (settings.pop(name, False) for name in ("padding", "pairs"))
    count = math.prod(sizes)
    with fake_cuda():
        padding = torch.empty(2, *sizes, dtype=torch.bool) if padded else None
        mask = torch.empty(2, 1, count, count, dtype=torch.bool) if pairs else None
        for terms, dtype in itertools.product(TERM_SETS, (torch.float32, torch.bfloat16)):
            x = torch.empty((2, *sizes, 32) if len(sizes) == 1 else (2, 32, *sizes), dtype=dtype)
            attention = TransformerAttention(32, 4, terms, len(sizes), dtype=dtype, **settings)
            out = attention(x, key_padding_mask=padding, attention_mask=mask)
            assert out.device.type == "cuda"
            assert out.dtype == dtype
            found = gradients(out.float().sum())
            assert {id(parameter) for parameter in attention.parameters()} <= found.keys(), terms


@pytest.mark.parametrize("sizes", [(40,), (8, 12)], ids=str)
def test_dynamic_convolution(sizes):
    """Backward on the CPU: that of taps and bands calls torch's engine, which needs the driver of a device."""
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            x = torch.empty((2, *sizes, 32) if len(sizes) == 1 else (2, 32, *sizes), device=device)
            out = DynamicConv(32, 5, 4, len(sizes), device=device)(x)
            assert out.shape == x.shape
            if device == "cpu":
                out.sum().backward()
