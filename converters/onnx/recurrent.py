"""ONNX's RNN, GRU and LSTM, and what is around them to bring the batch first and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt.converters.onnx.graph import Graph
from fwt.converters.onnx.numbers import ZEROS, Node, axes_of, slices_of
from fwt.converters.onnx.reader import Handler, Reader
from fwt.converters.rows.row import refuse
from fwt.layers.recurrent import HARD_SIGMOID

_GATES: Mapping[tuple[str, float | None, float | None], str] = {
    ("Tanh", None, None): "tanh",
    ("Sigmoid", None, None): "sigmoid",
    ("Relu", None, None): "relu",
    ("Softsign", None, None): "softsign",
    ("Softplus", None, None): "softplus",
    ("HardSigmoid", 1 / 6, 0.5): "hard_sigmoid",
    ("HardSigmoid", 0.2, 0.5): HARD_SIGMOID,
    ("Elu", 1.0, None): "elu",
    ("LeakyRelu", 0.2, None): "leaky_relu",
    ("Affine", 1.0, 0.0): "linear",
}
_WITH_ALPHA = {"HardSigmoid": 0.2, "Elu": 1.0, "LeakyRelu": 0.01, "Affine": None}
_WITH_BETA = {"HardSigmoid": 0.5, "Affine": 0.0}
_RECURRENT = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(reader: Reader, node: Node, time_first: bool = False, inside: bool = False) -> str:
    """An RNN, GRU or LSTM and what is around it; the value after them.

    Args:
        reader: where the line is.
        node: the operator.
        time_first: whether the value of the line has the time first; else the batch is first
            there, and first again after what follows.
        inside: whether it takes what another has given, in that one's order.
    """
    graph, gates = reader.graph, _RECURRENT[node.op]
    h, direction = node("hidden_size"), node("direction", "forward")
    count = 2 if direction == "bidirectional" else 1
    if node("clip") is not None or node("input_forget", 0):
        raise refuse(str(node), "clip or input_forget off their defaults")
    for index, what in ((5, "initial_h"), (6, "initial_c"), (7, "P")):
        value = graph.const(node, index)
        if value is not None and value is not ZEROS and np.any(value):
            raise refuse(str(node), f"{what} is not zero")
    lengths = graph.const(node, 4)
    if lengths is not None:
        steps = (graph.shapes.get(reader.at) or (None, None))[0 if time_first else 1]
        if steps is None or np.any(np.asarray(lengths) != steps):
            raise refuse(str(node), "sequence_lens shortens its input")
    weight, hidden, bias = (graph.const(node, i) for i in (1, 2, 3))
    names = _activations(node, gates, count)
    # Gates i, o, f, c as i, f, c, o.
    order = {1: (0,), 3: (0, 1, 2), 4: (0, 2, 3, 1)}[gates]

    def sorted_(value: np.ndarray) -> np.ndarray:
        parts = np.split(value, gates)
        return np.concatenate([parts[i] for i in order])

    after = bool(node("linear_before_reset", 0))
    arrays: dict[str, Any] = {}
    for index, end in enumerate(("", "_reverse")[:count]):
        arrays[f"kernel{end}"] = np.ascontiguousarray(sorted_(weight[index]).T)
        arrays[f"recurrent_kernel{end}"] = np.ascontiguousarray(sorted_(hidden[index]).T)
        if bias is not None:
            first, second = (sorted_(b) for b in np.split(bias[index], 2))
            if node.op == "GRU" and after:
                first, second = first.copy(), second.copy()
                first[: 2 * h] += second[: 2 * h]  # which only appear as their sum
                second[: 2 * h] = 0
                arrays[f"bias{end}"] = np.stack([first, second])
            else:
                arrays[f"bias{end}"] = first + second
    name = reader.name(node, node.inputs[1])
    what, end, letters = _given_out(graph, node, count)
    settings: dict[str, Any] = {
        "input_size": weight.shape[-1], "hidden_size": h, "num_layers": 1, "bias": bias is not None,
        "batch_first": True, "dropout": 0.0, "bidirectional": count == 2,
        "select": {"what": what, "merge": "concat" if count == 2 else None},
        "activation": names[-1],
    }  # fmt: skip
    if node.op != "RNN":
        settings["recurrent_activation"] = names[0]
    if node.op == "LSTM":
        settings["proj_size"] = 0
    if node.op == "GRU":
        settings["reset_after"] = after
    if direction == "reverse":
        settings["reverse"] = True
    if time_first and not inside:
        reader.permute((1, 0, 2), f"{name}__batch", fused=True)
    reader.add(name, node.op, arrays, **settings)
    if letters != _TIME_FIRST:
        return end
    users = graph.users.get(end, [])
    if are_recurrent(users):
        reader.at = end
        reader.only(users[0])
        return recurrent(reader, users[0], time_first, inside=True)
    if not time_first:
        raise refuse(str(node), "its input has the batch first, and its output the time")
    reader.permute((1, 0, 2), f"{name}__time", fused=True)
    return end


def _activations(node: Node, gates: int, count: int) -> list[str]:
    """Keras's names of the functions of gates and states, the same in both directions."""
    usual = {1: ["Tanh"], 3: ["Sigmoid", "Tanh"], 4: ["Sigmoid", "Tanh", "Tanh"]}[gates]
    given = node("activations") or usual * count
    alphas, betas = list(node("activation_alpha") or ()), list(node("activation_beta") or ())
    found = []
    for kind in given:
        alpha = (alphas.pop(0) if alphas else _WITH_ALPHA[kind]) if kind in _WITH_ALPHA else None
        beta = (betas.pop(0) if betas else _WITH_BETA[kind]) if kind in _WITH_BETA else None
        if kind == "Affine" and alpha is None:
            why = "the activation Affine without an alpha, for which ONNX names no default"
            raise refuse(str(node), why, "give activation_alpha")
        known = [v for (k, a, b), v in _GATES.items() if k == kind and _near(a, alpha)
                 and _near(b, beta)]  # fmt: skip
        if not known:
            raise refuse(str(node), f"the activation {kind} with alpha={alpha}, beta={beta}")
        found.append(known[0])
    one = found[: len(usual)]
    if found != one * count or (gates == 4 and one[1] != one[2]):
        raise refuse(str(node), f"the activations {given}: one for all gates, and one for states")
    return one


def _near(a: float | None, b: float | None) -> bool:
    return a is b or (a is not None and b is not None and abs(a - b) < 1e-6)


_TIME_FIRST, _BATCH_FIRST = ["t", "n", "h"], ["n", "t", "h"]


def are_recurrent(users: list[Node]) -> bool:
    return len(users) == 1 and users[0].op in _RECURRENT and not users[0]("layout", 0)


def _ends(graph: Graph, at: str) -> bool:
    """Whether a sequence that has the time first is used so, not turned, nor its last step."""
    users = graph.users.get(at, [])
    turned = len(users) == 1 and users[0].op == "Transpose" and users[0]("perm") == [1, 0, 2]
    cut = len(users) == 1 and users[0].op in ("Gather", "Slice")
    return not turned and not cut


def _given_out(graph: Graph, node: Node, count: int) -> tuple[str, str, list[str]]:
    """What of its outputs is used, the value where what is around it ends, and the axes there.

    The axes are followed by letters: time, direction, n for the batch, h.
    """
    used = [i for i, n in enumerate(node.outputs) if n and n in graph.users]
    if node("direction", "forward") == "reverse" and used == [0]:
        raise refuse(str(node), "direction='reverse' of a sequence, whose last step is its first")
    if used not in ([0], [1]):
        raise refuse(str(node), f"its outputs {used} are used, expected the first or the second")
    at = node.outputs[used[0]]
    letters = ["t", "d", "n", "h"] if used == [0] else ["d", "n", "h"]
    sizes = dict(zip("tn", graph.shapes.get(node.inputs[0]) or (None, None)))
    if node("layout", 0):
        letters = ["n", "t", "d", "h"] if used == [0] else ["n", "d", "h"]
        sizes = {"t": sizes["n"], "n": sizes["t"]}
    what = "sequence" if used == [0] else "last"
    while letters not in (_BATCH_FIRST, ["n", "h"]):
        users = graph.users.get(at, [])
        if letters == _TIME_FIRST and _ends(graph, at):
            return "sequence", at, letters
        if len(users) == 2 and "d" in letters and count == 2:
            return _halves(graph, at, letters, node)
        if len(users) != 1:
            raise refuse(str(node), f"its output is used by {len(users)} nodes")
        step = users[0]
        if step.op == "Squeeze":
            gone = [a % len(letters) for a in axes_of(graph, step) or ()]
            names = {letters[a] for a in gone}
            if not names <= {"d", "one"} or count != 1:
                raise refuse(str(step), f"it drops the axes {gone} of {letters}")
            letters = [x for x in letters if x not in names]
        elif step.op == "Transpose":
            letters = [letters[a] for a in step("perm")]
        elif step.op == "Reshape" and letters[-2:] == ["d", "h"]:
            target = np.ravel(graph.const(step, 1)).tolist()
            known = {x: (0, -1, sizes[x]) for x in "tn"}
            size = count * (node("hidden_size") or 0)
            rest = zip(letters[:-2], target, strict=False)
            if len(target) != len(letters) - 1 or target[-1] not in (-1, size) or (
                target.count(-1) > 1 or any(s not in known[x] for x, s in rest)
            ):  # fmt: skip
                raise refuse(str(step), f"it reshapes {letters} to {target}")
            letters = [*letters[:-2], "h"]
        elif step.op == "Gather" and np.shape(graph.const(step, 1)) == ():
            axis, index = step("axis", 0) % len(letters), int(graph.const(step, 1))
            if letters[axis] == "d" and count == 1 and index in (0, -1):
                letters.pop(axis)
            elif letters[axis] == "t" and index == -1 and count == 1:
                letters.pop(axis)
                what = "last"
            else:
                raise refuse(str(step), f"it takes entry {index} of the axis {letters[axis]!r}")
        elif step.op == "Slice" and count == 1:
            cuts = slices_of(graph, step, len(letters))
            for i, cut in enumerate(cuts):
                if letters[i] == "t" and cut == slice(-1, None, 1):
                    letters[i], what = "one", "last"
                elif cut != slice(None) and not (letters[i] == "d" and cut.start in (0, None)):
                    raise refuse(str(step), f"it takes {cut} of the axis {letters[i]!r}")
        else:
            raise refuse(str(step), f"after {node}: it works on {letters}, the batch not first")
        at = step.outputs[0]
    if letters == _BATCH_FIRST:
        what, at = _last_step(graph, at, what, count)
    return what, at, letters


def _halves(graph: Graph, at: str, letters: list[str], node: Node) -> tuple[str, str, list[str]]:
    """Two directions that are taken apart and joined again."""
    ends: dict[int, tuple[str, list[str], int | None]] = {}
    for step in graph.users[at]:
        left, direction, time = list(letters), None, None
        while True:
            if step.op == "Slice":
                for i, cut in enumerate(slices_of(graph, step, len(left))):
                    if cut == slice(None):
                        continue
                    if left[i] == "d" and cut in (slice(0, 1, 1), slice(1, 2, 1),
                                                  slice(1, None, 1)):  # fmt: skip
                        direction, left[i] = int(cut.start), "one"
                    elif left[i] == "t" and cut in (slice(0, 1, 1), slice(-1, None, 1)):
                        time, left[i] = int(cut.start), "one"
                    else:
                        raise refuse(str(step), f"it takes {cut} of the axis {left[i]!r}")
            elif step.op == "Squeeze":
                gone = {a % len(left) for a in axes_of(graph, step) or ()}
                left = [x for i, x in enumerate(left) if not (i in gone and x == "one")]
            elif step.op == "Gather" and np.shape(graph.const(step, 1)) == ():
                axis, index = step("axis", 0) % len(left), int(graph.const(step, 1))
                if left[axis] == "d":
                    direction = index % 2
                elif left[axis] == "t" and index in (0, -1):
                    time = index
                else:
                    raise refuse(str(step), f"it takes entry {index} of the axis {left[axis]!r}")
                left.pop(axis)
            elif step.op == "Transpose":
                left = [left[a] for a in step("perm")]
            else:
                raise refuse(str(step), f"after {node}: it works on one direction")
            end = step.outputs[0]
            after = graph.users.get(end, [])
            if len(after) != 1:
                raise refuse(str(node), f"one of its directions is used by {len(after)} nodes")
            step = after[0]
            if step.op == "Concat":
                break
        if direction is None:
            raise refuse(str(node), "its directions are joined in a way that is not known")
        ends[direction] = end, left, time
    wanted = [ends[d][0] for d in sorted(ends)]
    (left, first), (other, second) = (ends[d][1:] for d in sorted(ends))
    if step.inputs != wanted or len(ends) != 2 or left != other or (
        step("axis", 0) % len(left) != len(left) - 1 or left[-1] != "h"
    ):  # fmt: skip
        raise refuse(str(step), "it joins the directions in another order or axis")
    if (first, second) not in ((None, None), (-1, 0)):
        raise refuse(str(node), f"the steps {first} and {second} of its directions")
    what = "sequence" if "t" in left else "last"
    at = step.outputs[0]
    after = graph.users.get(at, [])
    if left == _TIME_FIRST and not _ends(graph, at) and after[0].op == "Transpose":
        return what, after[0].outputs[0], _BATCH_FIRST
    if left in (_TIME_FIRST, _BATCH_FIRST, ["n", "h"]):
        return what, at, left
    raise refuse(str(node), f"after it are the axes {left}, the batch not first")


def _last_step(graph: Graph, at: str, what: str, count: int) -> tuple[str, str]:
    """Whether only the last step of a sequence (n, t, h) is used."""
    users = graph.users.get(at, [])
    if len(users) != 1 or count != 1 or users[0].op not in ("Gather", "Slice"):
        return what, at
    step = users[0]
    if step.op == "Gather":
        index = graph.const(step, 1)
        if step("axis", 0) % 3 == 1 and np.shape(index) == () and int(index) == -1:
            return "last", step.outputs[0]
        return what, at
    cuts = slices_of(graph, step, 3)
    after = graph.users.get(step.outputs[0], [])
    one = cuts[0] == cuts[2] == slice(None) and (cuts[1].start, cuts[1].stop) == (-1, None)
    if one and len(after) == 1 and after[0].op == "Squeeze" and axes_of(graph, after[0]) == [1]:
        return "last", after[0].outputs[0]
    return what, at


def _alone(reader: Reader, node: Node) -> str:
    """One that no transposition leads to."""
    reader.only(node)
    return recurrent(reader, node, time_first=not node("layout", 0))


OPS: Mapping[str, Handler] = dict.fromkeys(_RECURRENT, _alone)
