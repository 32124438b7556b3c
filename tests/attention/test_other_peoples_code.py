"""Adapters, normalisations, pruning, hooks, function transforms and other dtypes and devices around the modules."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, prune

from lightning_attn.attention import DeformableConv, DynamicConv, GatedResidual, TransformerAttention
from lightning_attn.attention.spec import TERM_SETS

DIM = 16
SHAPES = {1: (2, 6, DIM), 2: (2, DIM, 3, 4)}


def make(terms, ndim, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    module = TransformerAttention(DIM, 2, terms, ndim, **settings).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def dynamic(ndim, **settings):
    torch.manual_seed(0)
    return DynamicConv(DIM, 3, 4, ndim, **settings)


def modules():
    """Name, module, and an input, for every kind of attention with linear layers."""
    for ndim, terms in itertools.product((1, 2), TERM_SETS):
        yield f"{terms} {ndim}d", make(terms, ndim), torch.randn(SHAPES[ndim])
    for ndim in (1, 2):
        yield f"dynamic {ndim}d", dynamic(ndim), torch.randn(SHAPES[ndim])


CASES = [pytest.param(module, x, id=name) for name, module, x in modules()]


def projections(module):
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


class LowRankAdapter(nn.Module):
    """What LoRA puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight += self.up.weight @ self.down.weight
        return layer


@pytest.mark.parametrize(("module", "x"), CASES)
def test_an_adapter_in_the_place_of_a_projection_takes_part_and_learns(module, x):
    module = copy.deepcopy(module)
    plain = copy.deepcopy(module)
    for name, layer in projections(module).items():
        adapter = LowRankAdapter(layer)
        setattr(module, name, adapter)
        setattr(plain, name, adapter.merged())
    y = module(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    adapters = [child for child in module.children() if isinstance(child, LowRankAdapter)]
    assert adapters
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().max() > 0
        assert adapter.down.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("module", "x"), CASES)
def test_hooks_of_a_projection_see_one_call_in_each_pass(module, x):
    module = copy.deepcopy(module)
    expected = module(x)
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in projections(module)}
    for name, layer in projections(module).items():
        layer.register_forward_hook(lambda _, __, output, name=name: seen[name].append(tuple(output.shape)))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert {name: len(shapes) for name, shapes in seen.items()} == dict.fromkeys(seen, 1)
    module = copy.deepcopy(module)  # what a hook returns is what counts
    for layer in projections(module).values():
        layer.register_forward_hook(lambda _, __, output: output * 2)
    assert not torch.allclose(module(x), expected)


def test_hooks_for_all_modules_are_seen_too():
    module, x, seen = make("1111", 2), torch.randn(SHAPES[2]), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        module(x)
    finally:
        handle.remove()
    assert {id(layer) for layer in module.children()} <= {id(layer) for layer in seen}


CHANGES = {
    "parametrizations.spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "parametrizations.weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "parametrizations.orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("kind", ["1111", "0010", "dynamic"])
def test_normalised_and_pruned_projections_train(change, ndim, kind):
    module = dynamic(ndim) if kind == "dynamic" else make(kind, ndim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # the old weight_norm
        for layer in projections(module).values():
            if change != "parametrizations.orthogonal" or layer.weight.shape[0] <= layer.weight.shape[1]:
                CHANGES[change](layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(SHAPES[ndim])).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
    # The layers themselves say what their weights are now.
    module.eval()
    plain = dynamic(ndim) if kind == "dynamic" else make(kind, ndim)
    x = torch.randn(SHAPES[ndim])
    expected = module(x)
    with torch.no_grad():
        for name, layer in projections(module).items():
            getattr(plain, name).weight.copy_(layer.weight)
            if layer.bias is not None:
                getattr(plain, name).bias.copy_(layer.bias)
        for name in ("key_bias", "position_bias"):
            if hasattr(plain, name):
                getattr(plain, name).copy_(getattr(module, name))
    torch.testing.assert_close(expected, plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_projection_with_a_bias_counts_it_once(ndim):
    # The energy of both axes of a map is made of two calls; the bias belongs to their sum.
    attention = make("1111", ndim, torch.float64)
    for name in ("query_proj", "key_proj", "value_proj", "position_proj"):
        layer = nn.Linear(DIM, DIM, dtype=torch.float64)
        setattr(attention, name, layer)
    x = torch.randn(SHAPES[ndim], dtype=torch.float64)
    y = attention(x)
    for name in ("query_proj", "key_proj", "value_proj", "position_proj"):
        getattr(attention, name).register_forward_hook(lambda *_: None)
    torch.testing.assert_close(attention(x), y)
    energies = attention.energies(x)
    # u . b and v . b / sqrt(axes) are what the biases add where there is nothing else.
    with torch.no_grad():
        attention.query_proj.weight.zero_()
        attention.query_proj.bias.zero_()
        attention.key_proj.weight.zero_()
        attention.position_proj.weight.zero_()
    found = attention.energies(x)
    by_head = attention.position_proj.bias.view(2, -1)
    torch.testing.assert_close(
        found["E4"],
        ((attention.position_bias * by_head).sum(-1) / ndim**0.5)[None, :, None, None].expand_as(found["E4"]),
    )
    assert energies["E4"].shape == found["E4"].shape


@pytest.mark.parametrize("terms", TERM_SETS)
def test_decoding_calls_changed_projections_too(terms):
    attention = make(terms, 1, torch.float64, causal=True).eval()
    cross = make(terms, 1, torch.float64).eval()
    memory, x = torch.randn(2, 5, DIM).double(), torch.randn(2, 4, DIM).double()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for module in (attention, cross):
        for name, layer in projections(module).items():
            setattr(module, name, LowRankAdapter(layer).double())
    cache, cross_cache = attention.new_cache(), cross.new_cache(memory, mask)
    with torch.no_grad():
        own = torch.cat([attention(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
        other = torch.cat([cross(token, cache=cross_cache) for token in x.split(1, dim=1)], dim=1)
        torch.testing.assert_close(own, attention(x))
        torch.testing.assert_close(other, cross(x, memory, key_padding_mask=mask))


def differentiable():
    for ndim, terms in itertools.product((1, 2), TERM_SETS):
        yield f"{terms} {ndim}d", make(terms, ndim, torch.float64)
    yield "tiled 1d", make("1111", 1, torch.float64, algorithm="tiled")
    yield "tiled 2d", make("0111", 2, torch.float64, algorithm="tiled", window=3)
    gated = GatedResidual(make("1111", 2, torch.float64))
    nn.init.constant_(gated.gamma, 0.7)
    yield "gated 2d", gated
    for ndim in (1, 2):
        yield f"dynamic {ndim}d", dynamic(ndim, renorm_padding=True).double()
        for modulated in (False, True):
            deformable = DeformableConv(DIM, DIM, ndim=ndim, modulated=modulated, offset_groups=2).double()
            nn.init.normal_(deformable.offset.weight, std=0.2)
            nn.init.normal_(deformable.offset.bias, std=0.5)  # away from the grid, where interpolation has a kink
            yield f"deformable {ndim}d {modulated}", deformable


@pytest.mark.parametrize("module", [pytest.param(module, id=name) for name, module in differentiable()])
class TestDerivatives:
    """Against finite differences and plain gradients; never silently zero."""

    @staticmethod
    def draw(module):
        torch.manual_seed(1)
        ndim = module.attention.ndim if isinstance(module, GatedResidual) else module.ndim
        x = torch.randn(SHAPES[ndim], dtype=torch.float64)
        return x, torch.randn_like(x), torch.randn_like(x)

    @staticmethod
    def gradient(module, x, weights):
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((module(x) * weights).sum(), x)
        return found

    def test_forward_mode(self, module):
        x, direction, _ = self.draw(module)
        _, found = jvp(lambda value: module(value), (x,), (direction,))
        step = 1e-6
        with torch.no_grad():
            expected = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_second_derivatives(self, module):
        x, direction, weights = self.draw(module)
        step = 1e-5
        expected = self.gradient(module, x + step * direction, weights)
        expected = (expected - self.gradient(module, x - step * direction, weights)) / (2 * step)
        (forward_over_reverse,) = jvp(grad(lambda v: (module(v) * weights).sum()), (x,), (direction,))[1:]
        torch.testing.assert_close(forward_over_reverse, expected, rtol=1e-4, atol=1e-5)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((module(leaf) * weights).sum(), leaf, create_graph=True)
        if first.requires_grad:  # without E1 to E3 the output is linear in the values
            (twice,) = torch.autograd.grad((first * direction).sum(), leaf, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(twice, expected, rtol=1e-4, atol=1e-5)

    def test_functional_gradients(self, module):
        x, _, weights = self.draw(module)
        expected = self.gradient(module, x, weights)
        torch.testing.assert_close(grad(lambda v: (module(v) * weights).sum())(x), expected)
        parameters = dict(module.named_parameters())

        def loss(values, sample, weight):
            return (functional_call(module, values, (sample[None],)) * weight[None]).sum()

        by_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, weights)
        together = torch.autograd.grad((module(x) * weights).sum(), list(parameters.values()))
        for (name, found), total in zip(by_sample.items(), together, strict=True):
            torch.testing.assert_close(found.sum(0), total, msg=lambda text, name=name: f"{name}: {text}")
        leaf = x.clone().requires_grad_()
        several = torch.stack((weights, 2 * weights))
        (batched,) = torch.autograd.grad(module(leaf), leaf, several, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack((expected, 2 * expected)))


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"key_padding_mask": True}], ids=str)
@pytest.mark.parametrize("terms", ["1000", "1010"])
def test_second_derivatives_of_the_fused_kernels(terms, settings):
    """Torch cannot differentiate the backward pass of its own."""
    masked = settings.pop("key_padding_mask", False)
    fused = TransformerAttention(16, 4, terms, algorithm="sdpa", **settings).double()
    plain = TransformerAttention(16, 4, terms, algorithm="dense", **settings).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 30, 16, dtype=torch.double, requires_grad=True)
    mask = torch.arange(30) >= torch.tensor([[30], [20]]) if masked else None
    found = []
    for module in (fused, plain):
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(module(x, key_padding_mask=mask).pow(3).sum(), leaves, create_graph=True)
        norm = torch.stack([one.pow(2).sum() for one in first]).sum()
        found.append((*first, *torch.autograd.grad(norm, leaves, allow_unused=True, materialize_grads=True)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_second_derivatives_with_dropout_of_a_fused_kernel_are_refused():
    attention = TransformerAttention(16, 4, "1000", algorithm="sdpa", dropout=0.5)
    x = torch.randn(2, 30, 16, requires_grad=True)
    with pytest.raises(ValueError, match=r"dropout=0.5: second derivatives need the dropout mask"):
        torch.autograd.grad(attention(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("ndim", [1, 2])
def test_inputs_of_another_dtype_and_layers_of_another_width_are_named(ndim):
    attention = TransformerAttention(16, 4, ndim=ndim)
    x = torch.randn(2, 5, 16) if ndim == 1 else torch.randn(2, 16, 3, 4)
    with pytest.raises(ValueError, match=r"query is torch.float64, but the module's parameters are torch.float32"):
        attention(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        attention(x.bfloat16())
    attention.key_proj = nn.Linear(16, 12)
    with pytest.raises(ValueError, match=r"key_proj returns 12 features, but dim=16"):
        attention(x)


def test_a_cache_of_something_else_is_named():
    attention = TransformerAttention(16, 4, causal=True)
    with pytest.raises(TypeError, match=r"cache: it must come from new_cache\(\) of this module, got a dict"):
        attention(torch.randn(1, 1, 16), cache={})


# --- Found by others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_the_number_of_threads_may_change_between_both_passes(threads):
    before = torch.get_num_threads()
    attention = TransformerAttention(64, 2, scale=0.1, algorithm="tiled")
    gradients = []
    try:
        for first, second in (threads, (threads[0],) * 2):
            x = torch.linspace(-1, 1, 1400 * 64).view(1, 1400, 64).requires_grad_()
            torch.set_num_threads(first)
            out = attention(x)
            torch.set_num_threads(second)
            out.square().sum().backward()
            gradients.append(x.grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("terms", TERM_SETS)
def test_layers_with_biases_in_the_place_of_projections(terms):
    attention = TransformerAttention(8, 2, terms, causal=True).double().eval()
    for name in dict(attention.named_children()):
        if name != "position_proj":
            setattr(attention, name, nn.Linear(8, 8, dtype=torch.double))
    x = torch.randn(2, 5, 8, dtype=torch.double)
    value = attention.value_proj(x).view(2, 5, 2, 4).transpose(1, 2)
    for causal in (True, False):
        expected = attention.out_proj((attention.weights(x, causal=causal) @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, causal=causal), expected)
    cache = attention.new_cache()
    steps = torch.cat([attention(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, attention(x))


def test_padding_is_hidden_by_augmented_keys_whatever_the_energies():
    attention = TransformerAttention(8, 1, "1000", algorithm="augmented_sdpa")
    nn.init.eye_(attention.query_proj.weight)
    attention.key_proj.weight.data = -torch.eye(8)
    x = torch.full((1, 4, 8), 80.0) + 0.01 * torch.randn(1, 4, 8)
    mask = torch.tensor([[False, False, True, True]])
    found = attention(x, key_padding_mask=mask)[:, :2]
    torch.testing.assert_close(found, attention(x[:, :2]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [3, 100, 300])
def test_outputs_may_be_changed_in_place_in_training(length):
    for module in (TransformerAttention(16, 2), DynamicConv(16, 3, 4)):
        x = torch.randn(2, length, 16, requires_grad=True)
        out = module(x)
        out += x
        nn.functional.relu(out, inplace=True).sum().backward()
        assert x.grad.isfinite().all()


def test_training_after_inference_mode():
    attention = TransformerAttention(16, 4)
    x = torch.randn(1, 611, 16)
    with torch.inference_mode():
        attention(x)
    attention(x).sum().backward()
    assert attention.position_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("terms", ["0010", "0011", "0110", "0111"])
def test_hooked_keys_under_autocast(terms, ndim):
    attention = TransformerAttention(8, 2, terms, ndim=ndim)
    x = torch.randn(2, 5, 8) if ndim == 1 else torch.randn(2, 8, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = attention(x.bfloat16())
        attention.key_proj.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(attention(x.bfloat16()), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_inputs_give_every_parameter_a_gradient(shape):
    attention = TransformerAttention(8, 2)
    attention(torch.randn(*shape)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in attention.parameters())


def test_masks_without_queries():
    attention = TransformerAttention(8, 2)
    mask = torch.zeros(0, 4, dtype=torch.bool)
    assert attention(torch.randn(2, 0, 8), torch.randn(2, 4, 8), attention_mask=mask).shape == (2, 0, 8)


def test_weights_that_multiply_in_their_own_way_are_called():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
            if function is nn.functional.linear:
                return 2 * function(plain[0], plain[1], *plain[2:], **kwargs or {})
            return function(*plain, **kwargs or {})

    attention = TransformerAttention(8, 2, "0010")
    x = torch.randn(2, 5, 8)
    bias = attention.out_proj.bias
    expected = 2 * (attention(x) - bias) + bias
    attention.value_proj._parameters["weight"] = attention.value_proj.weight.detach().as_subclass(Doubled)
    torch.testing.assert_close(attention(x), expected)


def test_caches_of_others_are_refused():
    one, two = DynamicConv(16, 3, 4, causal=True), DynamicConv(16, 5, 4, causal=True)
    with pytest.raises(ValueError, match="cache: another module created it"):
        one(torch.randn(1, 1, 16), cache=two.new_cache())
    with pytest.raises(ValueError, match="cache: it must come from new_cache"):
        DeformableConv(4, 4, ndim=1, causal=True)(torch.randn(1, 1, 4), cache=one.new_cache())


def test_deformable_convolution_of_maps_under_vmap():
    conv = DeformableConv(4, 4)
    x = torch.randn(2, 1, 4, 2, 3)
    torch.testing.assert_close(vmap(conv)(x), torch.stack([conv(one) for one in x]))


def test_forward_over_forward_through_dynamic_convolution():
    conv = DynamicConv(4, 3, 2).double()
    x = torch.randn(1, 3, 4, dtype=torch.double)

    def f(value):
        return conv(value).square().sum()

    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(f))(x), torch.func.hessian(f)(x))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"renorm_padding": True}], ids=str)
def test_dynamic_convolution_of_sentences_by_inductor(options):
    torch._dynamo.reset()
    conv = DynamicConv(16, 5, 4, **options)
    compiled = torch.compile(conv)
    for length in (40, 77, 3, 90):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-5)


def test_whole_jacobians_agree():
    for module in (make("1111", 1, torch.float64), make("0011", 2, torch.float64), dynamic(2).double()):
        x = torch.randn(SHAPES[module.ndim], dtype=torch.float64)[:1]
        torch.testing.assert_close(jacfwd(module)(x), jacrev(module)(x))


class TestDtypes:
    """One policy for all sizes and algorithms: the output is what `out_proj` gives, energies are float32 or better."""

    @pytest.mark.parametrize("terms", TERM_SETS)
    def test_the_output_of_autocast_does_not_depend_on_the_size(self, terms):
        for ndim, sizes in ((1, ((3,), (90,), (300,))), (2, ((3, 3), (8, 9), (20, 30), (31, 33)))):
            module = GatedResidual(make(terms, 2)).eval() if ndim == 2 else make(terms, 1).eval()
            for size, dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
                x = torch.randn(1, *size, DIM) if ndim == 1 else torch.randn(1, DIM, *size)
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    attention = module.attention if ndim == 2 else module
                    assert attention(x.to(dtype)).dtype == torch.bfloat16
                    assert module(x.to(dtype)).dtype == (dtype if ndim == 2 else torch.bfloat16)

    @pytest.mark.parametrize("algorithm", ["dense", "tiled"])
    @pytest.mark.parametrize("ndim", [1, 2])
    def test_energies_are_not_rounded_to_half_precision(self, ndim, algorithm):
        # Energies of about 300, whose differences of less than one decide: bfloat16 has steps of 2 there.
        torch.manual_seed(0)
        attention = TransformerAttention(DIM, 1, "1000", ndim, algorithm=algorithm)
        with torch.no_grad():
            attention.query_proj.weight.copy_(torch.eye(DIM))
            attention.key_proj.weight.copy_(torch.eye(DIM))
        x = torch.zeros(1, 64, DIM)
        x[..., 0] = 16.0
        x[..., 1] = torch.arange(64) / 64
        x[..., 2:] = torch.randn(1, 64, DIM - 2).bfloat16()
        x = x if ndim == 1 else x.transpose(1, 2).reshape(1, DIM, 8, 8)
        with torch.no_grad():
            expected = attention(x)
            with torch.autocast("cpu", torch.bfloat16):
                found = attention(x)
        assert (found.float() - expected).norm() / expected.norm() < 0.02

    def test_sums_of_many_keys_stay_finite_in_float16(self):
        # The sum over all keys is beyond float16; no key or energy is.
        for algorithm in ("auto", "sdpa", "dense", "tiled", "augmented_sdpa"):
            attention = TransformerAttention(64, 1, "1000", 1, algorithm=algorithm).eval()
            state = {
                name: torch.eye(64) if value.dim() == 2 else torch.zeros(64)
                for name, value in attention.state_dict().items()
            }
            attention.load_state_dict(state)
            x = torch.rand(1, 4096, 64)
            with torch.no_grad():
                expected = attention(x)
                with torch.autocast("cpu", torch.float16):
                    autocast = attention(x)
                half = copy.deepcopy(attention).half()(x.half())
            for found in (autocast, half):
                assert found.dtype == torch.float16
                torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)

    def test_what_is_not_finite_stays_visible(self):
        # The CPU's fused kernel returns zeros for a row of energies that are not numbers.
        for bad, algorithm in itertools.product((torch.nan, torch.inf), ("auto", "sdpa", "dense", "tiled")):
            attention = TransformerAttention(DIM, 2, "1000", 1, algorithm=algorithm).eval()
            query, key = torch.randn(2, 800, DIM), torch.randn(2, 800, DIM)
            query[0, 3, 5] = bad
            with torch.no_grad():
                y = attention(query, key)
            assert y[0, 3].isnan().any()
            assert y[1].isfinite().all()
            assert y[0, :3].isfinite().all()

    @pytest.mark.parametrize("make_module", [TransformerAttention, DynamicConv, DeformableConv])
    def test_devices_and_dtypes_are_taken_as_torch_modules_take_them(self, make_module):
        sizes = (DIM, DIM) if make_module is DeformableConv else (DIM,)
        module = make_module(*sizes, dtype=torch.float64)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
        module = make_module(*sizes, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}

    @pytest.mark.parametrize("terms", TERM_SETS)
    def test_shapes_on_the_meta_device(self, terms):
        for ndim, settings in itertools.product((1, 2), ({}, {"window": 3}, {"causal": True}, {"dropout": 0.1})):
            module = TransformerAttention(DIM, 2, terms, ndim, device="meta", **settings)
            x = torch.empty(SHAPES[ndim], device="meta", requires_grad=True)
            y = module(x)
            assert y.shape == x.shape
            y.sum().backward()
        for module in (DynamicConv(DIM, ndim=2, groups=4, device="meta"), DeformableConv(DIM, DIM, device="meta")):
            assert module(torch.empty(SHAPES[2], device="meta")).shape == SHAPES[2]


class TestPadding:
    @pytest.mark.parametrize(("module", "x"), CASES)
    def test_what_the_padding_holds_reaches_no_gradient(self, module, x):
        module = copy.deepcopy(module)
        mask = torch.zeros(2, 6, dtype=torch.bool) if x.dim() == 3 else torch.zeros(2, 3, 4, dtype=torch.bool)
        mask[0, -1:] = True
        hidden = mask.unsqueeze(-1 if x.dim() == 3 else 1)
        results = []
        for content in (0.0, torch.nan):
            filled = x.masked_fill(hidden, content).requires_grad_()
            y = module(filled, key_padding_mask=mask)
            y.masked_fill(hidden, 0.0).square().sum().backward()
            gradients = [filled.grad, *(parameter.grad.clone() for parameter in module.parameters())]
            module.zero_grad()
            results.append((y, *gradients))
        for number, (clean, found) in enumerate(zip(*results, strict=True)):
            assert found.isfinite().all(), number
            torch.testing.assert_close(found, clean, msg=lambda text, number=number: f"{number}: {text}")

    @pytest.mark.parametrize("terms", TERM_SETS)
    def test_nor_does_that_of_another_set(self, terms):
        attention = make(terms, 1)
        query, key, mask = torch.randn(2, 5, DIM), torch.randn(2, 6, DIM), torch.zeros(2, 6, dtype=torch.bool)
        mask[0, 4:] = True
        key[mask] = torch.nan
        attention(query, key, key, key_padding_mask=mask).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())
        cache = attention.new_cache(key, mask)
        assert attention(query, cache=cache).isfinite().all()


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("ndim", [1, 2])
def test_outputs_own_their_memory(terms, ndim):
    module, x = make(terms, ndim).eval(), torch.randn(SHAPES[ndim])
    with torch.no_grad():
        y = module(x)
        expected = y + x
        assert y.is_contiguous()
        y += x
        torch.testing.assert_close(y, expected)
        nn.functional.relu(y, inplace=True)
        assert y.view(2, -1).shape == (2, x[0].numel())
