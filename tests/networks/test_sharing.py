"""One set of parameters for two networks of the same structure."""

import copy

import pytest
import torch

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_resnet
from lightning_attn.networks.sharing import share_parameters, statistics_in

ATTENTION = AttentionSpec(terms="0110", num_heads=2, convolution="deformable")


def network(stride=32, norm="batch", width=8):
    return build_resnet(ResNetSpec(name="bottleneck14", width=width, norm=norm), ATTENTION, stride)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_gradients_of_both_networks_add_up(norm):
    """As those of two networks with equal weights do."""
    one, other = network(32, norm), network(8, norm)
    share_parameters(one, other)
    apart = copy.deepcopy(one), network(8, norm)
    apart[1].load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for first, second in ((one, other), apart):
        (first(images)["c5"].square().mean() + second(images)["c5"].square().mean()).backward()
    sums = {name: parameter.grad for name, parameter in one.named_parameters()}
    for (name, first), (_, second) in zip(*(part.named_parameters() for part in apart), strict=True):
        torch.testing.assert_close(sums[name], first.grad + second.grad, msg=name)


def test_statistics_stay_apart():
    one, other = network(), network()
    share_parameters(one, other)
    other(torch.randn(2, 3, 64, 64))
    names = statistics_in(other)
    assert names == {name for name in other.state_dict() if name not in dict(other.named_parameters())}
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) is (name not in names), name


def test_copies_share_as_their_originals_do():
    """Averages of weights are made from such a copy."""
    pair = torch.nn.ModuleList([network(), network(8)])
    share_parameters(*pair)
    first, second = copy.deepcopy(pair)
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(a is b for a, b in zip(first.parameters(), pair[0].parameters(), strict=True))


def test_other_structures_are_refused():
    with pytest.raises(ValueError, match=r"backbones differ in \d+ tensors: bn1.bias \(\(8,\) and \(16,\)\)"):
        share_parameters(network(), network(width=16))
    with pytest.raises(ValueError, match=r"bn1.num_batches_tracked \(\(\) and None\)"):
        share_parameters(network(), network(norm="group"))
