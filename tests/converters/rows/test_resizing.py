"""Resizing by a scale, where rounding leaves an axis its size or doubles it: torch then copies."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from compare import close, in_flax, in_keras, in_torch
from marks import thorough_but
from onnx import TensorProto, helper, numpy_helper

import fwt
from fwt import converters

SCALES = (0.3, 0.7, 1.0, 1.02, 1.25, 1.3, 1.9, 2.0, 2.1, 2.4, 3.1)
SWEEPS = [
    *((rank, (1.3, 2.1), (3,)) for rank in (1, 2, 3)),
    # Each axis is by itself: what a second and a third add, some scales and sizes show.
    pytest.param(1, SCALES, range(1, 13), marks=pytest.mark.thorough),
    *(pytest.param(n, SCALES[1::4], (1, 2, 5, 12), marks=pytest.mark.thorough) for n in (2, 3)),
]
LINEAR = ("linear", "bilinear", "trilinear")


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "align_corners"])
@pytest.mark.parametrize(("rank", "scales", "sizes"), SWEEPS)
def test_each_scale_and_size_is_torchs(rank, scales, sizes, mode):
    corners = {"align_corners": True} if mode == "align_corners" else {}
    kind = mode if mode.startswith("nearest") else LINEAR[rank - 1]
    for scale in scales:
        every = (scale, 1.7, 1.3)[:rank]
        net = torch.nn.Upsample(scale_factor=every, mode=kind, **corners)
        model = converters.from_torch(
            torch.nn.Sequential(net), (2, *[None] * rank), layout="source"
        )
        for n in sizes:
            if math.floor(n * scale):
                x = image(1, 2, *(n, 4, 3)[:rank])
                wanted = in_torch(net, x)
                np.testing.assert_allclose(
                    model(x), wanted, rtol=1e-5, atol=1e-6, err_msg=f"{scale} of {n}"
                )


@pytest.mark.parametrize(
    ("shape", "settings"),
    thorough_but(
        2,
        [
            ((2, 3, 4), {"scale_factor": (2.1, 1.2)}),
            ((2, 7), {"scale_factor": 1.1, "mode": "linear"}),
            ((2, 3, 7), {"scale_factor": 1.3, "mode": "bilinear"}),
            ((2, 5, 3), {"scale_factor": 2.1, "mode": "nearest-exact"}),
        ],
    ),
)
def test_what_torch_copies_goes_everywhere(tmp_path, shape, settings):
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Upsample(**settings)

        def forward(self, x):
            return self.up(x) + self.up(x * 2)

    x = image(1, *shape)
    for net in (torch.nn.Sequential(torch.nn.Upsample(**settings)), Branching()):
        model = converters.from_torch(net, shape, layout="source")
        wanted = in_torch(net, x)
        close(in_flax(model, x), wanted)
        assert converters.verify(net, model, inputs=x).ok
        close(in_torch(converters.to_torch(*model, layout="source"), x), wanted)
        if isinstance(model.module, fwt.Sequential):
            path = tmp_path / "a.onnx"
            converters.to_onnx(*model, path)
            session = onnxruntime.InferenceSession(path)
            close(session.run(None, {session.get_inputs()[0].name: x})[0], wanted)


def test_an_axis_that_torch_copies_goes_to_keras():
    x = image(2, 5, 3, 2)
    net = torch.nn.Upsample(scale_factor=(1.2, 1.3), mode="bilinear")
    model = converters.from_torch(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), net), (2, 5, 3))
    assert in_flax(model, x).shape == (2, 6, 3, 2)
    close(in_keras(converters.to_keras(*model), x), in_flax(model, x))
    model = converters.from_torch(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), net), (2, 7, 3))
    with pytest.raises(converters.ConversionError, match="Keras can't say scale"):
        converters.to_keras(*model)


def test_onnx_goes_by_the_scale_alone(tmp_path):
    """As ONNX defines it; torch can't say that, but at sizes where it is the same."""

    def read(scale, *shape, **how):  # onnxruntime copies what keeps all its sizes
        end = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        scales = np.array([1, 1, *scale], np.float32)
        graph = helper.make_graph(
            [helper.make_node("Resize", ["x", "", "s"], ["y"], **how)], "g", [end], [out],
            [numpy_helper.from_array(scales, "s")])  # fmt: skip
        opset = [helper.make_opsetid("", 13)]
        path = tmp_path / "a.onnx"
        path.write_bytes(
            helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
        )
        x = image(2, *shape)
        wanted = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
        model = converters.from_onnx(path)
        close(in_flax(model, x), wanted)
        return model, x, wanted

    linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    nearest = {"mode": "nearest", "nearest_mode": "floor",
               "coordinate_transformation_mode": "asymmetric"}  # fmt: skip
    for scale, shape, how in (
        ((1.25, 1.25), (2, 3, 7), linear), ((1.25,), (2, 9), linear),
        ((1.25, 1.25), (2, 3, 7), nearest), ((2.25, 3.0), (2, 3, 4), nearest),
    ):  # fmt: skip
        model, x, wanted = read(scale, *shape, **how)
        if scale == (1.25,):  # to 11
            close(in_torch(converters.to_torch(*model, layout="source"), x), wanted)
            continue
        with pytest.raises(converters.ConversionError, match=rf"resizes \({shape[1]}, .*copies"):
            converters.to_torch(*model, layout="source")
    for scale, how in (((1.25, 1.25), linear), ((1.5, 2.5), nearest)):
        model, x, wanted = read(scale, 2, 8, 6, **how)
        close(in_torch(converters.to_torch(*model, layout="source"), x), wanted)
    for scale in ((2.25,), (1.25, 2.25, 1.0)):  # where torch, too, goes by the scale
        model, x, wanted = read(scale, *(2, 3, 4, 5)[: len(scale) + 1], **nearest)
        close(in_torch(converters.to_torch(*model, layout="source"), x), wanted)


def test_copies_that_torch_lacks_are_refused():
    layer = fwt.layers.Resize(scale=(2.25,), copies=True)
    assert layer.steps((3,)) == [(6, 0.5)]
    for shape, said in (((3, 2), r"resizes \(3,\).*torch goes by the scale"), (None, "not known")):
        net = fwt.Sequential([("up", layer)], input_shape=shape)
        with pytest.raises(converters.ConversionError, match=said):
            converters.to_torch(net, {}, shape)


def test_a_method_that_is_none_is_refused():
    with pytest.raises(fwt.FwtError, match="method='bicubic': expected one of nearest"):
        fwt.layers.Resize(scale=(2.0,), method="bicubic")
