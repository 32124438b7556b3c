import pytest
import torch
import torch.nn.functional as F

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, beam_search
from lightning_attn.networks.translation.transformer import Transformer

PAD, BOS, EOS, WORDS = 0, 2, 3, 20


def build(self_terms="1111", cross_terms="1111", **arguments) -> Transformer:
    none = self_terms == "none"
    torch.manual_seed(1)
    network = Transformer(
        **{
            "vocabulary_size": WORDS,
            "pad_id": PAD,
            "self_attention": AttentionSpec(mechanism="none") if none else AttentionSpec(terms=self_terms, num_heads=2),
            "cross_attention": AttentionSpec(terms=cross_terms, num_heads=2),
            "dim": 16,
            "hidden_dim": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "dropout": 0.0,
        }
        | arguments
    )
    return network.double().eval()


def batch(lengths=(5, 3), target_lengths=(6, 4)):
    generator = torch.Generator().manual_seed(2)
    source = torch.full((len(lengths), max(lengths)), PAD)
    target = torch.full((len(lengths), max(target_lengths)), PAD)
    for row, (s, t) in enumerate(zip(lengths, target_lengths, strict=True)):
        source[row, : s - 1] = torch.randint(4, WORDS, (s - 1,), generator=generator)
        source[row, s - 1] = EOS
        target[row, 0], target[row, t - 1] = BOS, EOS
        target[row, 1 : t - 1] = torch.randint(4, WORDS, (t - 2,), generator=generator)
    return source, target


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize(("self_terms", "cross_terms"), [("1111", "1111"), ("none", "1000"), ("0010", "0111")])
def test_padding_changes_nothing(self_terms, cross_terms, norm_position):
    network = build(self_terms, cross_terms, norm_position=norm_position)
    source, target = batch()
    together = network(source, target[:, :-1])
    for row, (s, t) in enumerate(((5, 6), (3, 4))):
        alone = network(source[row : row + 1, :s], target[row : row + 1, : t - 1])
        torch.testing.assert_close(together[row : row + 1, : t - 1], alone)


@pytest.mark.parametrize(("self_terms", "cross_terms"), [("1111", "1111"), ("0101", "0011"), ("none", "1111")])
def test_decoder_sees_no_later_token(self_terms, cross_terms):
    network = build(self_terms, cross_terms)
    source, target = batch()
    before = network(source, target)
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % WORDS
    after = network(source, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("self_terms", ["1111", "0110", "0001", "1000", "none"])
def test_step_by_step_is_the_full_pass(self_terms, norm_position):
    network = build(self_terms, norm_position=norm_position)
    source, target = batch()
    full = network(source, target)
    state = network.start_decoding(source)
    for position in range(target.shape[1]):
        torch.testing.assert_close(state.step(target[:, position]), full[:, position])
        if position == 2:  # swap the sentences and back, as a beam search does
            state.reorder(torch.tensor([1, 0]))
            state.reorder(torch.tensor([1, 0]))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize(
    ("self_terms", "cross_terms"), [("1111", "1111"), ("0011", "0001"), ("0010", "0010"), ("none", "0111")]
)
def test_rows_of_a_beam_search_are_the_full_pass(self_terms, cross_terms, norm_position):
    network = build(self_terms, cross_terms, norm_position=norm_position)
    source, _ = batch((5, 3, 4), (6, 6, 6))
    state = network.start_decoding(source)
    generator = torch.Generator().manual_seed(3)
    sentence, prefixes = torch.arange(3), torch.full((3, 0), BOS)
    moves = [[0, 0, 1, 1, 2, 2], [1, 0, 2, 2, 5, 4], [0, 1, 5, 4], [1, 1, 2, 3], [0, 1, 3, 2]]
    for move in [*moves, None]:
        tokens = torch.randint(4, WORDS, (len(prefixes),), generator=generator)
        prefixes = torch.cat((prefixes, tokens.unsqueeze(1)), dim=1)
        torch.testing.assert_close(state.step(tokens), network(source[sentence], prefixes)[:, -1])
        if move is not None:
            state.reorder(torch.tensor(move))
            sentence, prefixes = sentence[move], prefixes[move]


def test_decoding_in_single_precision_makes_no_graph():
    network = build().float()
    source, target = batch()
    state = network.start_decoding(source)
    steps = [state.step(tokens) for tokens in target.unbind(dim=1)]
    assert not any(logits.requires_grad for logits in steps)
    torch.testing.assert_close(torch.stack(steps, dim=1), network(source, target).detach(), rtol=1e-4, atol=1e-4)


def test_decoding_under_autocast_stays_within_its_rounding():
    network = build().float()
    source, target = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = network.start_decoding(source)
        steps = torch.stack([state.step(tokens) for tokens in target.unbind(dim=1)], dim=1)
    exact = network(source, target).detach()
    assert (steps - exact).norm() / exact.norm() < 8 * 2**-8


def test_loss_is_the_sum_over_target_tokens():
    network = build()
    source, target = batch()
    loss, likelihood, count = network.loss(source, target, label_smoothing=0.1)
    logits, labels = network(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, ignore_index=PAD, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(likelihood, F.cross_entropy(logits, labels, ignore_index=PAD, reduction="sum"))
    assert int(count) == 5 + 3
    losses, counts = network.sentence_losses(source, target)
    torch.testing.assert_close(losses.double().sum(), likelihood, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [5, 3]


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("self_terms", ["1111", "0010", "none"])
def test_every_parameter_gets_a_gradient(self_terms, tie_embeddings):
    network = build(self_terms, tie_embeddings=tie_embeddings).train()
    loss, _, _ = network.loss(*batch())
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    embeddings = [name for name, _ in network.named_parameters() if "embedding" in name]
    assert len(embeddings) == (1 if tie_embeddings else 3)


def test_without_self_attention_there_is_none():
    names = [name for name, _ in build("none").named_modules()]
    assert not any("self_attention" in name for name in names)
    assert any("cross_attention" in name for name in names)


def test_greedy_search_follows_the_network():
    network = build()
    source, _ = batch()
    limits = torch.tensor([7, 7])
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    found = beam_search(network.start_decoding(source), 2, BeamSearchOptions(beam_size=1), max_lengths=limits, **ids)
    for row, (hypothesis,) in enumerate(found):
        length = int((source[row] != PAD).sum())
        prefix = [BOS]
        while len(prefix) <= 7:
            logits = network(source[row : row + 1, :length], torch.tensor([prefix]))[0, -1]
            logits[[PAD, BOS]] = -torch.inf
            best = int(logits.argmax())
            if best == EOS:
                break
            prefix.append(best)
        assert hypothesis.tokens == prefix[1:]


def test_paper_size():
    """Base model: 6 + 6 layers, 512, FFN 2048; the attention parameters are those of paper.md's count."""
    with torch.device("meta"):
        spec = AttentionSpec()
        network = Transformer(37000, 0, spec, spec)
    attentions = 18
    per_attention = 5 * 512**2 + 512 + 2 * 512  # U, V^C, V^R, W', W with its bias, u, v
    feed_forward = 12 * (2 * 512 * 2048 + 2048 + 512)
    norms = (6 * 2 + 6 * 3) * 2 * 512
    expected = 37000 * 512 + attentions * per_attention + feed_forward + norms
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dim": 15}, "dim=15 cannot be divided among num_heads=2"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
