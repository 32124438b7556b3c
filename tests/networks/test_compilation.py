"""Compiled networks: the same results and names, and no compilation for each size of a batch."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters  # noqa: PLC2701 - torch has no public name

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.compilation import compile_modules
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Detector, Segmenter
from lightning_attn.networks.translation.transformer import EncoderLayer, Transformer

ATTENTION = AttentionSpec(num_heads=2)
SENTENCES = [(3, 7, 6), (4, 9, 8), (2, 12, 5), (5, 7, 9), (6, 11, 13), (3, 15, 4)]
IMAGES = [(2, 65, 97), (3, 70, 60), (2, 97, 65), (2, 50, 81), (4, 33, 129), (3, 129, 97)]


@pytest.fixture(autouse=True)
def own_graphs():
    """Counts this test's graphs alone, and gives back torch's limit."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["recompile_limit"]
    return counters["stats"]["unique_graphs"]


def with_gammas(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return network.train()


def step(network, inputs) -> torch.Tensor:
    """The loss of a step, with its gradients."""
    torch.manual_seed(1)
    if isinstance(network, Transformer):
        loss, _, number = network.loss(*inputs, 0.1)
        loss = loss / number
    else:
        loss = torch.stack(list(network(*inputs).values())).sum()
    network.zero_grad()
    loss.backward()
    return loss.detach()


def compare(network, batches, backend, *, tolerance=1e-5) -> list[int]:
    """Compares the steps of a compiled copy with those of the network; the number of graphs after each."""
    compiled = copy.deepcopy(network)
    modules = compiled.modules_to_compile()
    compile_modules(modules, backend)
    assert list(compiled.state_dict()) == list(network.state_dict())
    numbers = []
    for batch in batches:
        torch.testing.assert_close(step(compiled, batch), step(network, batch), rtol=1e-5, atol=1e-6)
        for (name, parameter), twin in zip(network.named_parameters(), compiled.parameters(), strict=True):
            if parameter.grad is not None:
                scale = parameter.grad.abs().max().clamp(min=1e-3)
                torch.testing.assert_close(twin.grad / scale, parameter.grad / scale, rtol=0, atol=tolerance, msg=name)
        numbers.append(graphs())
    torch.testing.assert_close(compiled.state_dict(), network.state_dict())  # statistics of normalisations too
    copied = copy.deepcopy(compiled)
    assert all(module._compiled_call_impl is None for module in copied.modules())
    return numbers


def sentences(sizes=SENTENCES):
    for rows, source, target in sizes:
        pair = torch.randint(1, 50, (rows, source)), torch.randint(1, 50, (rows, target))
        pair[0][0, -2:] = 0
        yield pair


def pictures(targets, sizes=IMAGES):
    for number, height, width in sizes:
        images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(number)]
        yield images, [targets(height, width) for _ in range(number)]


def test_a_layer_is_compiled_once_for_all_sizes_and_all_layers_of_its_kind():
    layers = [EncoderLayer(8, 16, ATTENTION, "self", 0.0, "pre") for _ in range(2)]
    compiled = copy.deepcopy(layers)
    compile_modules(compiled, "aot_eager")
    numbers = []
    for rows, length, _ in SENTENCES:
        x = torch.randn(rows, length, 8)
        for one, other in zip(compiled, layers, strict=True):
            torch.testing.assert_close(one(x, None), other(x, None))
            numbers.append(graphs())
    assert set(numbers) == {3}, "before the attention, its residual connection, and the feed-forward network"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_transformer(dropout):
    numbers = compare(Transformer(50, 0, ATTENTION, ATTENTION, 16, 32, 2, 2, dropout=dropout), sentences(), "inductor")
    assert len(set(numbers)) == 1, "one compilation, in the first step"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("head", [{}, {"head": "pyramid", "output_stride": 32}], ids=["ccnet", "pyramid"])
def test_segmentation(head):
    spec = SegmenterSpec(head_channels=16, dropout=0.0, **head)
    backbone = build_backbone(ResNetSpec("bottleneck14", width=8), ATTENTION, spec.output_stride)
    network = with_gammas(Segmenter(3, backbone, ATTENTION, spec))
    batches = pictures(lambda *size: torch.randint(0, 3, size).to(torch.uint8))
    # In float64: in float32, batch normalisation magnifies rounding in another order.
    numbers = compare(network.double(), batches, "inductor")
    assert len(set(numbers)) == 1, "one compilation, in the first step"


@pytest.mark.slow
def test_detection():
    spec = AttentionSpec(terms="0010", num_heads=2, convolution="deformable")
    backbone = build_backbone(ResNetSpec("bottleneck14", width=8, attended_blocks=("conv5",)), spec)
    network = with_gammas(Detector(2, backbone, DetectorSpec(fpn_channels=8, fc_dim=8)))
    target = {"boxes": torch.tensor([[2.0, 3, 20, 30]]), "labels": torch.tensor([1])}
    # torch makes other graphs for sizes of 1, so the coarsest level of the pyramid has more.
    sizes = [(2, 97, 130), (3, 129, 100), (2, 160, 97)]
    numbers = compare(network, pictures(lambda *_: target, sizes), "aot_eager", tolerance=1e-4)
    assert len(set(numbers)) == 1, "one compilation, in the first step"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and neither g\+\+ nor clang\+\+ is installed"):
        compile_modules([layer], "inductor")
    compile_modules([layer], "aot_eager")
