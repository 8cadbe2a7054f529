"""A user's own linen Sequential, which no converter has seen."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fwt
from fwt import converters


def net():
    return nn.Sequential(
        [
            nn.Conv(4, (3, 2), strides=(2, 1), name="first"),
            nn.relu,
            partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
            nn.Sequential(
                [nn.Conv(3, (2, 2), padding="VALID"), partial(nn.leaky_relu, negative_slope=0.2)]
            ),
            partial(nn.avg_pool, window_shape=(2, 1), padding=((1, 0), (0, 0))),
            fwt.layers.Flatten(),
            nn.Dense(5),
            partial(nn.gelu, approximate=False),
            nn.Dense(2),
            partial(nn.softmax, axis=-1),
        ]
    )


def test_it_goes_to_keras_torch_and_files(tmp_path):
    module = net()
    x = np.random.default_rng(0).normal(size=(3, 11, 9, 3)).astype(np.float32)
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), x))
    expected = np.asarray(module.apply(variables, x))
    shape = (11, 9, 3)
    real = converters.to_keras(module, variables, shape)
    np.testing.assert_allclose(np.asarray(real(x)), expected, atol=1e-5)
    for layout, given in (("channels_first", np.moveaxis(x, -1, 1)), ("source", x)):
        there = converters.to_torch(module, variables, shape, layout)
        with torch.no_grad():
            found = there(torch.from_numpy(np.ascontiguousarray(given))).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "layers_3.layers_0.weight" in there.state_dict()
    converters.save(tmp_path / "net.safetensors", module, variables)
    again = converters.load(tmp_path / "net.safetensors")
    np.testing.assert_allclose(np.asarray(again(x)), expected, atol=1e-6)
    assert fwt.paths(again.variables) == fwt.paths(variables)


def test_every_setting_of_a_partial_counts(tmp_path):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 4)), jnp.float32)
    for function in (
        partial(nn.elu, alpha=0.5), partial(nn.celu, alpha=0.7), partial(nn.glu, axis=-1),
        partial(nn.log_softmax, axis=1), partial(nn.relu), partial(nn.gelu),
        partial(nn.max_pool, window_shape=(2, 3)),
        partial(nn.max_pool, window_shape=(2, 3), strides=(2, 1), padding="SAME"),
        partial(nn.avg_pool, window_shape=(2, 3), padding="SAME"),
        partial(nn.avg_pool, window_shape=(2, 3), strides=(1, 2), count_include_pad=False,
                padding=((1, 1), (0, 1))),
    ):  # fmt: skip
        layer = fwt.layers.from_function(function)
        np.testing.assert_allclose(layer.apply({}, x), function(x), atol=1e-6)
    for function, said in (
        (partial(nn.leaky_relu, 0.2), "by name"),
        (partial(nn.softmax, where=None), "no such setting"),
        (partial(jnp.reshape, shape=(1, -1)), "no linen module"),
        (lambda x: x * 2, "no linen module"),
    ):
        with pytest.raises(fwt.FwtError, match=said):
            converters.to_torch(nn.Sequential([function]), {"params": {}}, (3,))


def test_one_layer_in_two_places_is_refused():
    layer = nn.Dense(3)
    net = nn.Sequential([layer, nn.relu, layer])
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(converters.ConversionError):
        converters.to_torch(net, variables, (3,))


def test_how_the_weights_were_drawn_does_not_matter():
    ones = nn.initializers.ones
    drawn = {"out_kernel_init": ones, "out_bias_init": ones}
    rng = np.random.default_rng(0)
    for layer, x in (
        (nn.Embed(5, 4, embedding_init=ones), rng.integers(0, 5, (3, 6)).astype(np.int32)),
        (nn.MultiHeadDotProductAttention(2, **drawn), rng.normal(size=(3, 6, 4)).astype("f")),
    ):
        module = fwt.Sequential([("a", layer)], x.shape[1:])
        variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), x))
        there = converters.to_torch(module, variables, layout="source")
        with torch.no_grad():
            found = there(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(found, module.apply(variables, x), atol=1e-5)
