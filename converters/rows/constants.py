"""Rows of arrays between the layers of a graph, and of tables that layers share."""

from fwt import layers as fl
from fwt.converters.rows.row import AxisSetting, P, Row, S

_NOTHING = {"keras": "keras.layers has no layer that takes nothing"}

ROWS: tuple[Row, ...] = (
    Row(
        fl.Buffer,
        "PersistentBuffer",
        None,
        kind="parameter",
        settings=(S("shape", "shape", None),),
        params=(P("value: *p", "value: *p", "-", collection="batch_stats"),),
        lacks=_NOTHING,
        note="in Keras it is a Constant",
    ),
    Row(
        fl.Constant,
        "Constant",
        "Constant",
        kind="parameter",
        settings=(S("shape", "shape", "shape"),),
        params=(P.alike("value: *p"),),
        note="an array that is a setting",
    ),
    Row(
        fl.Indexed,
        "Indexed",
        None,
        kind="parameter",
        settings=(S("shape", "shape", None), S("table", "table", None)),
        params=(P("value: *p", "value: *p", "-"),),
        lacks=_NOTHING,
        note="the array is a setting on its way, what the walk turns are the positions",
    ),
    Row(
        fl.IndexedBuffer,
        "IndexedBuffer",
        None,
        kind="parameter",
        settings=(S("shape", "shape", None), S("table", "table", None)),
        params=(P("value: *p", "value: *p", "-", collection="batch_stats"),),
        lacks=_NOTHING,
        note="the same of an array that is not learned",
    ),
    Row(
        fl.Lookup,
        "Lookup",
        "Lookup",
        several="v f, n t -> n t f",
    ),
    Row(
        fl.Attend,
        "Attend",
        "Attend",
        several="n t f, v f -> n t v",
    ),
    Row(
        None,
        None,
        "ReversibleEmbedding",
        params=(
            P("embedding: v f", "-", "embeddings: v f"),
            P("reverse_embeddings: f v", "-", "reverse_embeddings: f v"),
        ),
        note="tied to its reverse by one array in each framework; untied it is an Embedding and a "
        "Dense",
    ),
    Row(
        fl.Flip,
        "Flip",
        "ops.Flip",
        settings=(AxisSetting("axis", "dim", "axis"),),
        ordered=True,
    ),
)
