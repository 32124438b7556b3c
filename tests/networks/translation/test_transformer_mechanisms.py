"""The Transformer with what else than attention can stand in its self-attention slots (Fig. 2b)."""

import pytest
import torch
from torch import nn

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, beam_search
from lightning_attn.networks.translation.transformer import Transformer

PAD, BOS, EOS, WORDS = 0, 2, 3, 20
SPECS = {
    "dynamic": AttentionSpec(mechanism="dynamic", groups=4, kernel_size=3),
    "deformable_1111": AttentionSpec(num_heads=2, convolution="deformable"),
    "modulated_0010": AttentionSpec(terms="0010", num_heads=2, convolution="modulated_deformable"),
    "deformable_dynamic": AttentionSpec(mechanism="dynamic", groups=2, kernel_size=5, convolution="deformable"),
    "deformable_none": AttentionSpec(mechanism="none", convolution="deformable"),
}


@pytest.fixture(params=SPECS)
def network(request) -> Transformer:
    """Two layers with offsets that are not zero."""
    torch.manual_seed(1)
    network = Transformer(
        WORDS,
        PAD,
        self_attention=SPECS[request.param],
        cross_attention=AttentionSpec(num_heads=2),
        dim=16,
        hidden_dim=32,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
    )
    for name, parameter in network.named_parameters():
        if ".offset." in name:
            nn.init.normal_(parameter, std=0.3)
    return network.double().eval()


def batch():
    source = torch.tensor([[5, 9, 14, 7, EOS], [11, 6, EOS, PAD, PAD]])
    target = torch.tensor([[BOS, 8, 17, 4, 12, EOS], [BOS, 10, 7, EOS, PAD, PAD]])
    return source, target


def test_padding_changes_nothing(network):
    source, target = batch()
    together = network(source, target)
    torch.testing.assert_close(together[:1], network(source[:1], target[:1]))
    torch.testing.assert_close(together[1:, :4], network(source[1:, :3], target[1:, :4]))


def test_decoder_sees_no_later_token(network):
    source, target = batch()
    before = network(source, target)
    changed = target.clone()
    changed[:, 3] = 19
    after = network(source, changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_step_by_step_is_the_full_pass(network):
    source, target = batch()
    full = network(source, target)
    state = network.start_decoding(source)
    with torch.no_grad():
        for position in range(target.shape[1]):
            torch.testing.assert_close(state.step(target[:, position]), full[:, position])
            if position == 2:  # swap the sentences and back, as a beam search does
                state.reorder(torch.tensor([1, 0]))
                state.reorder(torch.tensor([1, 0]))


def test_beam_search_scores_sentences_as_the_full_pass_does(network):
    """Prefixes are swapped, doubled and dropped on the way; each hypothesis must keep what belongs to it."""
    source, _ = batch()
    found = beam_search(
        network.start_decoding(source),
        2,
        BeamSearchOptions(beam_size=4, nbest=4, stopping="exact"),
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        max_lengths=torch.tensor([7, 5]),
    )
    for row, hypotheses in zip(source, found, strict=True):
        assert len(hypotheses) == 4
        for hypothesis in hypotheses:
            tokens = torch.tensor([[BOS, *hypothesis.tokens, EOS]])
            log_probabilities = network(row[row != PAD][None], tokens[:, :-1])[0].log_softmax(dim=1)
            expected = log_probabilities.gather(1, tokens[0, 1:, None]).sum().item()
            assert hypothesis.log_probability == pytest.approx(expected, rel=1e-5)


def test_every_parameter_gets_a_gradient(network):
    loss, _, _ = network.train().loss(*batch())
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_bfloat16_autocast_trains_and_decodes(network):
    network.float()
    source, target = batch()
    expected, _, number = network.loss(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = network.loss(source, target)
        state = network.start_decoding(source)
        with torch.no_grad():
            logits = torch.stack([state.step(tokens) for tokens in target.T], dim=1)
        full = network(source, target)
    loss.backward()
    assert (loss / number).item() == pytest.approx((expected / number).item(), abs=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (logits.float() - full.float()).abs().max() < 0.1 * full.float().std()
