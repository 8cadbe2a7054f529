"""Rows of layers that take several tensors, and of what stands between the layers of a graph."""

from fwt import layers as fl
from fwt.converters.rows.row import AxisSetting, P, Row, S, whole

ROWS: tuple[Row, ...] = (
    *(
        Row(flax, flax.__name__, flax.__name__, kind="merge")
        for flax in (
            fl.Add,
            fl.Subtract,
            fl.Multiply,
            fl.Average,
            fl.Maximum,
            fl.Minimum,
        )
    ),
    Row(fl.Divide, "Divide", "ops.TrueDivide", kind="merge"),
    Row(fl.Masked, "Masked", "ops.Where", kind="merge"),
    Row(
        fl.Concatenate,
        "Concatenate",
        "Concatenate",
        kind="join",
        settings=(AxisSetting("axis", "dim", "axis"),),
    ),
    Row(
        fl.MatMul,
        "MatMul",
        "ops.Matmul",
        several="*b t i, *b i s -> *b t s",
    ),
    Row(
        None,
        None,
        "Dot",
        note="by an equation; with normalize=True each tensor is divided by its length before",
    ),
    Row(
        fl.Einsum,
        "Einsum",
        "ops.Einsum",
        kind="contract",
        settings=(S("equation", "equation", "subscripts"),),
    ),
    Row(
        fl.Slice,
        "Slice",
        "ops.GetItem",
        kind="slice",
        settings=(
            AxisSetting("axis", "dim", "axis"),
            S("start", "start", "start", 0),
            S("stop", "stop", "stop", None),
            S("step", "step", "step", 1),
        ),
    ),
    Row(
        fl.LayerScale,
        "LayerScale",
        "LayerScale",
        axes="n *s c -> n *s c",
        torch_axes="n c *s -> n c *s",
        settings=(S("features", "size", "projection_dim", normal=whole),),
        params=(P.alike("gamma: c"),),
        note="of keras.applications",
    ),
    Row(
        fl.Parameter,
        "Parameter",
        "Parameter",
        kind="parameter",
        settings=(S("shape", "shape", "shape"),),
        params=(P.alike("value: *p"),),
        note="a learned array between the layers of a graph",
    ),
)
