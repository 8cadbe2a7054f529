"""What a live layer computes is converted, or it is refused; the truth is its own output."""

import jax
import keras
import numpy as np
import pytest
import torch
from compare import close, in_flax, in_keras, in_torch

import fwt
from fwt import converters

k, t = keras.layers, torch.nn


def data(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def seen_before(layer, x):
    """A Normalization whose variables were assigned since it took its statistics."""
    layer.adapt(x * 3 + 1)
    layer.set_weights([w + 1 for w in layer.get_weights()])


def tensor(name, *shape):
    return lambda layer, x: setattr(layer, name, keras.ops.convert_to_tensor(data(*shape)))


def lora(layer, x):
    layer.enable_lora(2, lora_alpha=3)
    layer.lora_kernel_b.assign(data(*layer.lora_kernel_b.shape))


def lora_inside(layer, x):
    lora(layer._output_dense, x)


def lora_table(layer, x):
    layer.enable_lora(2)
    layer.lora_embeddings_b.assign(data(*layer.lora_embeddings_b.shape))


def attribute(name, value):
    return lambda layer, x: setattr(layer, name, value)


def inside(name, *then):
    def change(layer, x):
        for part in then[:-1]:
            layer = getattr(layer, part)
        setattr(layer, name, then[-1])

    return change


IMAGE = (1, 5, 7, 3)
KERAS = {
    "assigned statistics": (k.Normalization, (3, 4), seen_before),
    "assigned, inverted": (lambda: k.Normalization(axis=(1, 2), invert=True), (2, 3, 4),
                           seen_before),
    "adapted": (k.Normalization, (3, 4), lambda layer, x: layer.adapt(x + 2)),
    "found bins": (lambda: k.Discretization(num_bins=3), (9, 4), lambda y, x: y.adapt(x)),
    "given bins": (lambda: k.Discretization(num_bins=3), (9, 4),
                   attribute("bin_boundaries", [-0.3, 0.1])),
    "lora": (lambda: k.Dense(3, activation="tanh"), (2, 4), lora),
    "lora of images": (lambda: k.Conv2D(4, (3, 2)), IMAGE, lora),
    "lora inside": (lambda: k.MultiHeadAttention(2, 3), None, lora_inside),
    "a tensor as kernel": (lambda: k.Dense(3), (2, 4), tensor("_kernel", 4, 3)),
    "an array as kernel": (lambda: k.Dense(3), (2, 4), attribute("_kernel", data(4, 3))),
    "a tensor as statistics": (k.BatchNormalization, IMAGE, tensor("moving_mean", 3)),
    "a tensor as slopes": (k.PReLU, (2, 5, 4), tensor("alpha", 5, 4)),
    "settings since": (lambda: k.Conv2D(4, 3), IMAGE, attribute("strides", (2, 1))),
    "spectral norm": (lambda: k.SpectralNormalization(k.Dense(3)), (2, 4),
                      lambda layer, x: layer(x, training=True)),
}  # fmt: skip


def keras_model(make, shape, change):
    if shape is None:  # attention of one tensor with itself
        x, layer = data(2, 5, 4), make()
        given = keras.Input((5, 4))
        net = keras.Model(given, layer(given, given))
    else:
        x, layer = data(*shape), make()
        net = keras.Sequential([keras.Input(shape[1:]), layer])
    change(layer, x)
    return net, x


@pytest.mark.parametrize("name", KERAS)
def test_a_keras_layer_crosses_as_it_computes(name):
    net, x = keras_model(*KERAS[name])
    model = converters.from_keras(net)
    expected = in_keras(net, x)
    close(in_flax(model, x), expected)
    close(in_keras(converters.to_keras(*model), x), expected)


KERAS_REFUSED = {
    "no bias any more": (lambda: k.Dense(3), (2, 4), attribute("bias", None), "bias is None"),
    "own call": (lambda: k.Dense(3), (2, 4), attribute("call", lambda x: x), "its call is"),
    "own operation": (lambda: k.Conv2D(4, 3), IMAGE,
                      attribute("convolution_op", lambda x, w: x), "convolution_op is"),
    "own call inside": (lambda: k.LSTM(3), (2, 5, 4),
                        inside("call", "cell", lambda x, s: (x, s)), "its call is"),
    "own scale": (lambda: k.MultiHeadAttention(2, 3), None,
                  attribute("_inverse_sqrt_key_dim", 1.0), "scaled by 1.0"),
    "own activation": (lambda: k.MultiHeadAttention(2, 3), None,
                       inside("activation", "_output_dense", keras.activations.relu),
                       "activation of its own"),
    "own number": (lambda: k.ELU(), (2, 4), attribute("alpha", 3.0), "alpha=3.0"),
    "own mean": (lambda: k.Normalization(mean=[1.0] * 4, variance=[2.0] * 4), (2, 4),
                 attribute("mean", np.ones((1, 4), np.float32) * 3), "its mean is not"),
    "int8": (lambda: k.Dense(3), (2, 4), lambda y, x: y.quantize("int8"), "quanti"),
    "float8": (lambda: k.Dense(3), (2, 4), lambda y, x: y.quantize("float8"), "quanti"),
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS_REFUSED)
def test_a_keras_layer_that_does_something_else_is_refused(name):
    *how, why = KERAS_REFUSED[name]
    with pytest.raises(converters.ConversionError, match=why):
        converters.from_keras(keras_model(*how)[0])


def test_a_class_of_the_users_own_is_no_sequential():
    class Sequential(keras.Sequential):
        def call(self, x, **more):
            return super().call(x, **more) * 2

    with pytest.raises(converters.ConversionError, match=r"takes a keras\.Sequential"):
        converters.from_keras(Sequential([keras.Input((4,)), k.Dense(3)]))
    net = keras.Sequential([keras.Input((4,)), k.Dense(3)])
    net.compile("sgd", "mse")
    net.fit(data(2, 4), data(2, 3), verbose=0)
    converters.from_keras(net)  # what compile and fit put on a model is none of these
    net.call = lambda x: x
    with pytest.raises(converters.ConversionError, match="its call is"):
        converters.from_keras(net)


def test_a_lora_is_transformed_as_a_sum():
    net, _ = keras_model(*KERAS["lora"])
    layer = net.layers[0]
    expected = np.asarray(layer.kernel)
    pruned = fwt.prune(0.5)({"kernel": expected})["kernel"]
    converters.transform(net, fwt.prune(0.5))
    np.testing.assert_allclose(np.asarray(layer.kernel), pruned, atol=1e-6)
    assert np.array_equal(np.asarray(layer.kernel) == 0, np.asarray(pruned) == 0)

    net, _ = keras_model(*KERAS["a tensor as kernel"])
    before = [np.asarray(v) for v in net.weights]
    with pytest.raises(converters.ConversionError, match=r"dense.*a constant"):
        converters.transform(net, fwt.prune(0.5))
    assert all(np.array_equal(a, b) for a, b in zip(before, net.weights, strict=True))
    net, _ = keras_model(lambda: k.Dense(3), (2, 4), lambda y, x: y.quantize("int8"))
    with pytest.raises(converters.ConversionError, match="quantised"):
        converters.transform(net, fwt.prune(0.5))


def padded(mode="zeros"):
    return lambda: t.Conv2d(3, 4, 3, padding=1, padding_mode=mode)


def encoder():
    return t.TransformerEncoderLayer(8, 2, 6, batch_first=True)


TORCH = {
    "settings since": (padded(), IMAGE, attribute("padding", (2, 0))),
    "whole numbers": (padded(), IMAGE, attribute("stride", 2)),
    "another padding": (padded(), IMAGE, attribute("padding_mode", "circular")),
    "notes": (padded("reflect"), IMAGE, attribute("note", lambda: 3)),
    "heads": (encoder, (2, 5, 8), inside("num_heads", "self_attn", 4)),
    "no bias any more": (lambda: t.Linear(4, 3), (2, 4), attribute("bias", None)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_layer_crosses_as_it_computes(name):
    make, shape, change = TORCH[name]
    x = np.moveaxis(data(*shape), -1, 1) if shape is IMAGE else data(*shape)
    net = t.Sequential(make()).eval()
    change(net[0], x)
    expected = in_torch(net, x)
    close(in_flax(converters.from_torch(net, x.shape[1:], layout="source"), x), expected)


class Doubled(t.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 2


class Backwards(t.Sequential):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def put(name, value):
    return lambda layer, x: vars(layer).update({name: value})


TORCH_REFUSED = {
    "kept from before": (padded("reflect"), attribute("padding", (2, 0)), "_reversed_padding"),
    "the faster path": (encoder, attribute("activation", t.functional.gelu), "relu_or_gelu"),
    "own forward": (padded(), attribute("forward", lambda x: x), "a forward of its own"),
    "own step": (padded(), attribute("_conv_forward", lambda x, w, b: x), "_conv_forward is"),
    "own part": (encoder, inside("forward", "linear1", lambda x: x), "its 'linear1'"),
    "before the weight": (lambda: t.Linear(4, 3), put("weight", torch.ones(3, 4)), "its weight"),
}


@pytest.mark.parametrize("name", TORCH_REFUSED)
def test_a_torch_layer_that_does_something_else_is_refused(name):
    make, change, why = TORCH_REFUSED[name]
    net = t.Sequential(make())
    change(net[0], None)
    with pytest.raises(converters.ConversionError, match=why):
        converters.from_torch(net)


def test_what_is_around_torch_layers_is_refused():
    for cls in (Doubled, Backwards):
        with pytest.raises(converters.ConversionError, match=f"{cls.__name__} runs its layers"):
            converters.from_torch(cls(t.Linear(4, 3)))
    hook = t.modules.module.register_module_forward_hook(lambda m, x, y: y * 2)
    try:
        with pytest.raises(converters.ConversionError, match="hook of all modules"):
            converters.from_torch(t.Sequential(t.Linear(4, 3)))
    finally:
        hook.remove()


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_torch_model_made_ready_for_quantisation_is_refused_by_name():
    import torch.ao.quantization as ready

    class Own(t.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    def net():
        return t.Sequential(ready.QuantStub(), t.Linear(4, 3), t.ReLU(), ready.DeQuantStub())

    trained, looked_at = net().train(), net().eval()
    trained.qconfig = ready.get_default_qat_qconfig("fbgemm")
    looked_at.qconfig = ready.get_default_qconfig("fbgemm")
    ready.prepare_qat(trained, inplace=True)
    ready.prepare(looked_at, inplace=True)
    looked_at(torch.ones(2, 4))
    converted = ready.convert(looked_at)
    dynamic = ready.quantize_dynamic(t.Sequential(t.Linear(4, 3)), {t.Linear})
    for model in (trained.eval(), looked_at, converted, dynamic):
        for given in (model, Own(model).eval()):
            with pytest.raises(converters.ConversionError, match=r"before it is prepared or conv"):
                converters.from_torch(given, input_shape=(4,))
    plain = Own(net()).eval()  # whose stubs do nothing yet
    made = converters.from_torch(plain, input_shape=(4,))
    x = torch.randn(5, 4)
    np.testing.assert_allclose(made(x.numpy()), plain(x).detach(), rtol=1e-5, atol=1e-6)


def test_quantised_torch_weights_are_not_passed_over():
    class Observed(t.Linear):  # what torch.ao makes for training that knows of quantisation
        def __init__(self):
            super().__init__(4, 3)
            self.weight_fake_quant = torch.ao.quantization.FakeQuantize()

        def forward(self, x):
            return t.functional.linear(x, self.weight_fake_quant(self.weight), self.bias)

    with pytest.raises(converters.ConversionError, match="quantised weight"):
        converters.transform(t.Sequential(Observed()), fwt.prune(0.5))
    dynamic = torch.ao.nn.quantized.dynamic.Linear(4, 3)
    with pytest.raises(converters.ConversionError, match="quantised weight"):
        converters.transform(t.Sequential(t.Linear(4, 4), dynamic), fwt.prune(0.5))


def test_what_keras_computes_otherwise_under_its_global_settings():
    held = keras.config.epsilon()
    layer = keras.layers.Normalization(mean=[0.0, 0.0], variance=[1e-8, 1.0])
    net = keras.Sequential([keras.Input((2,)), layer])
    model = converters.from_keras(net)
    keras.config.set_epsilon(1e-2)
    try:
        for call in (lambda: converters.from_keras(net), lambda: converters.to_keras(*model)):
            with pytest.raises(converters.ConversionError, match=r"epsilon\(\), which is 0.01"):
                call()
    finally:
        keras.config.set_epsilon(held)


def test_rms_norm_of_float64_has_its_epsilon():
    net = torch.nn.Sequential(torch.nn.RMSNorm(4)).double()
    x = torch.full((1, 4), 1e-4, dtype=torch.float64)
    model = converters.from_torch(net)
    with jax.enable_x64(True):
        np.testing.assert_allclose(model(x.numpy()), net(x).detach(), rtol=1e-9)
        np.testing.assert_allclose(converters.to_torch(*model)(x).detach(), net(x).detach())


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_the_bias_of_a_gru_tells_where_its_reset_stands(tmp_path, bare, after):
    layer = k.GRU(3, reset_after=after) if bare else k.RNN(k.GRUCell(3, reset_after=after))
    net = keras.Sequential([keras.Input((4, 5)), layer])
    layer.cell.reset_after = not after
    with pytest.raises(converters.ConversionError, match=f"reset_after={not after} takes a bias"):
        converters.from_keras(net)
    net.save(tmp_path / "a.keras")
    with pytest.raises(fwt.FwtError, match=f"reset_after={not after} takes a bias"):
        converters.load(tmp_path / "a.keras")
    layer = k.GRU(3, use_bias=False, reset_after=after)  # without one it is free
    net = keras.Sequential([keras.Input((4, 5)), layer])
    layer.cell.reset_after = not after
    x = data(3, 4, 5)
    close(in_flax(converters.from_keras(net), x), in_keras(net, x))
