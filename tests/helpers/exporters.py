"""ONNX files by torch's two exporters."""

import contextlib
import io
import warnings

import torch


def exported(net, xs, path, dynamo):
    """Writes a net, for any batch."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = tuple({0: torch.export.Dim("n")} for _ in xs)
            torch.onnx.export(net, tuple(xs), str(path), dynamo=True, verbose=False,
                              dynamic_shapes=shapes, external_data=False)  # fmt: skip
        else:
            names = ["x", "z"][: len(xs)]
            free = {n: {0: "n"} for n in names}
            torch.onnx.export(net, tuple(xs), str(path), dynamo=False, input_names=names,
                              dynamic_axes=free, opset_version=17)  # fmt: skip
