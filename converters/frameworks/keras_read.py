"""Configs of Keras models, live or from a file, as nets: Sequential, Functional, and both inside
each other, whose layers keep the names of the models that they are in before their own."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fwt._graph import INPUT
from fwt._types import ConversionError, FileFormatError
from fwt.converters.frameworks import keras_2, keras_custom, keras_forms, keras_ops
from fwt.converters.frameworks.keras_forms import (
    ARGUMENTS,
    Ref,
    attended,
    flat,
    form_of,
    names_in_form,
    taken,
    without_idle,
)
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, joined, parts_of, refuse
from fwt.converters.walk import policy
from fwt.converters.walk.convert import MASKED
from fwt.converters.walk.net import Net, fresh
from fwt.layers.recurrent import HARD_SIGMOID

CONTAINERS = ("Sequential", "Functional")
_EPSILON = 1e-7  # keras.config.epsilon(), unless it was changed


def keras_net(config: Any, place: str) -> Net:
    """The net of a Keras Sequential or Functional model by its config.

    An ``activation=`` becomes a layer of its own, named ``<layer>__activation``. The further calls
    of a layer are named ``<layer>__call_2`` and so on, and those of a model so before the names of
    its layers.
    """
    reader = _Reader(place)
    config = keras_custom.named(config)
    kind, body = _body(config, place)
    takes, gives = reader.model(kind, body, (), (), None)
    places = groups(config)
    alone = {x.name for x in reader.layers if x.settings.get("target_shape") in ([], ())}
    for layer in reader.layers:
        if len(layer.inputs) > 1 and alone & set(layer.inputs):
            name = min(alone & set(layer.inputs)).partition("__")[0]
            raise refuse(joined((place, name)), "it gives a tensor of the batch alone, which meets "
                         "another", "keepdims=True keeps an axis")  # fmt: skip
    layers = [dataclasses.replace(x, group=places.get(x.name, "")) for x in reader.layers]
    return Net(layers, reader.inputs, gives, takes)


def groups(config: Mapping[str, Any]) -> dict[str, str]:
    """By the name of a layer, its group in a weights file: its class in snake case and a counter,
    under ``layers`` of the model that it is in."""

    def under(entries: Sequence[Any], inside: tuple[str, ...], where: str) -> Iterator[Any]:
        seen: dict[str, int] = {}
        for entry in entries:
            kind, own = entry["class_name"], entry["config"]
            if keras_ops.is_operation(entry):
                continue
            stem = keras_custom.snake(keras_ops.CLASSES.get(kind, kind))
            count = seen.get(stem, 0)
            seen[stem] = count + 1
            group = f"{where}layers/{stem}" + (f"_{count}" if count else "")
            parts = (*inside, str(own.get("name")))
            if kind in CONTAINERS:
                yield from under(own["layers"], parts, f"{group}/")
            else:
                yield joined(parts), group

    return dict(under(config["config"]["layers"], (), ""))


def _body(config: Any, place: str) -> tuple[str, dict[str, Any]]:
    kind = config.get("class_name") if isinstance(config, dict) else type(config).__name__
    if kind not in CONTAINERS:
        what = "a config that names no class" if kind is None else repr(kind)
        way = "from_keras(keras.Model(x, net.call(x))) of x = keras.Input(...) may convert it"
        way = f"; converters.{way}" if isinstance(kind, str) else ""
        raise ConversionError(
            f"{place}: expected a keras Sequential or Functional, found {what}{way}"
        )
    body = config.get("config")
    if not isinstance(body, dict) or not isinstance(body.get("layers"), list):
        raise FileFormatError(f"{place}: the config has no list of layers")
    check_own(config, place, str(body.get("name")))
    return kind, body


class _Reader:
    def __init__(self, place: str):
        self.place = place
        self.layers: list[Layer] = []
        self.inputs: dict[str, Any] = {}
        self.named: dict[str, int] = {}  # how often each name was given
        self.own: set[str] = set()  # the names that layers have themselves
        self.called = ""  # the name of the layer that is read
        self.beside: dict[str, str] = {}  # of parts of layers, where another layer has their name
        self.shapes: dict[str, Any] = {}  # with the batch, as far as they are known

    # -- models -------------------------------------------------------------------------------

    def model(
        self,
        kind: str,
        body: dict[str, Any],
        inside: tuple[str, ...],
        base: tuple[str, ...],
        given: list[str] | None,
    ) -> tuple[Any, Any]:
        """Reads a model; ``inside`` is its path for this call, ``base`` for the first; tells what
        it takes and gives, each in the model's form."""
        if kind == "Sequential":
            return self._sequential(body, inside, base, given)
        return self._functional(body, inside, base, given)

    def _sequential(
        self,
        body: dict[str, Any],
        inside: tuple[str, ...],
        base: tuple[str, ...],
        given: list[str] | None,
    ) -> tuple[str, str]:
        shape, dtype, tip = body.get("build_input_shape"), None, None
        if given is not None:
            (tip,) = self._as_many(given, 1)
        names = [str(e["config"].get("name")) for e in body["layers"] if isinstance(e, dict)
                 and isinstance(e.get("config"), dict)]  # fmt: skip
        self.own.update(joined((*inside, name)) for name in names)
        start = fresh(INPUT, names)
        count = len(self.layers)
        for entry in body["layers"]:
            kind, settings = entry_of(entry, self.place)
            if kind == "InputLayer":
                dtype = settings.get("dtype")
                shape = self._input_shape(settings) or shape
                continue
            tip = start if tip is None else tip
            (tip,) = self._call(entry, None, [tip], inside, base)
        if given is None:
            self.inputs[start] = self._checked(shape)
        tip = start if tip is None else tip
        start = start if given is None else given[0]
        tip = self._cast(start, dtype, count, inside, tip)
        return start, tip

    def _functional(
        self,
        body: dict[str, Any],
        inside: tuple[str, ...],
        base: tuple[str, ...],
        given: list[str] | None,
    ) -> tuple[Any, Any]:
        entries = {}
        for entry in body["layers"]:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise FileFormatError(f"{self.place}: a layer of a Functional model has no name")
            entries[name] = entry
            self.own.add(joined((*inside, name)))
        takes, gives = self._ends(body, "input_layers"), self._ends(body, "output_layers")
        refs: dict[Ref, str] = {}
        dtypes: dict[str, Any] = {}
        starts = names_in_form(takes) if given is None else flat(takes)
        names = [ref[0] for ref in starts] if given is None else self._as_many(given, len(starts))
        for ref, value in zip(starts, names, strict=True):
            _, settings = entry_of(entries.get(ref[0]), self.place)
            refs[(ref[0], 0, 0)] = value
            dtypes[value] = settings.get("dtype")
            if given is None:
                shape = self.inputs[value] = self._checked(self._input_shape(settings))
                self.shapes[value] = None if shape is None else [None, *shape]
        # Only at the ends does Keras count a call that a Functional model has of its own.
        own = {n for n, e in entries.items() if e.get("class_name") == "Functional"}
        ends = form_of(gives, lambda ref: (ref[0], ref[1] - (ref[0] in own), ref[2]))
        count = len(self.layers)
        todo = list(self._needed(entries, names_in_form(ends), refs))
        while todo:
            left = []
            for name, index, node in todo:
                if any(ref not in refs for ref in keras_ops.histories(node)):
                    left.append((name, index, node))
                    continue
                given_ = [refs[ref] for ref in taken(entries[name], node)]
                made = self._call(entries[name], node, given_, inside, base)
                refs |= {(name, index, k): v for k, v in enumerate(made)}
            if len(left) == len(todo):
                name, _, node = left[0]
                missing = next(ref for ref in keras_ops.histories(node) if ref not in refs)
                if (*missing[:2], 0) in refs:
                    raise refuse(f"{self.place}: {name}", f"it takes output [{missing[2]}] of "
                                 f"{missing[0]}", keras_ops.AS_IT_IS)  # fmt: skip
                raise ConversionError(f"{self.place}: nothing gives what {name} takes")
            todo = left
        for name, _, output in names_in_form(ends):
            if output and entries[name]["class_name"] not in CONTAINERS:
                raise refuse(f"{self.place}: {name}", f"its output [{output}] is one of the model")
        gives = form_of(ends, refs.__getitem__)
        for value in dict.fromkeys(names):
            cast = self._cast(value, dtypes[value], count, inside, value)
            if cast != value:
                gives = form_of(gives, lambda n, v=value, c=cast: c if n == v else n)
        return (form_of(takes, lambda ref: refs[(ref[0], 0, 0)]) if given is None else ()), gives

    def _as_many(self, given: list[str], count: int) -> list[str]:
        if len(given) != count:
            raise ConversionError(f"{self.place}: a model of {count} inputs is called with "
                                  f"{len(given)}")  # fmt: skip
        return given

    def _ends(self, body: Mapping[str, Any], key: str) -> Any:
        """Where a model starts or ends: a reference, or several in a tuple or a dict."""

        def ref(x: Any) -> Ref:
            plain = isinstance(x, list | tuple) and len(x) == 3 and isinstance(x[0], str)
            if not plain:
                raise ConversionError(
                    f"{self.place}: its {key.partition('_')[0]}s are nested deeper than a list or "
                    "a dict of tensors: build the model with one of these"
                )
            return x[0], int(x[1]), int(x[2])

        given = body.get(key)
        if isinstance(given, Mapping) and given:
            return {name: ref(x) for name, x in given.items()}
        if not isinstance(given, list | tuple) or not given:
            raise FileFormatError(f"{self.place}: the config has no {key}")
        if isinstance(given[0], str):
            return ref(given)
        several = tuple(ref(x) for x in given)
        return several[0] if len(several) == 1 else several

    def _needed(
        self, entries: Mapping[str, Any], ends: Sequence[Ref], known: Mapping[Ref, str]
    ) -> Iterator[tuple[str, int, Any]]:
        """The calls that the outputs need, in the order of the config; what computes masks for
        nobody is none of them."""
        wanted: set[tuple[str, int]] = set()
        left = [ref for ref in ends if ref not in known]
        while left:
            name, index, _ = left.pop()
            if (name, index) in wanted:
                continue
            wanted.add((name, index))
            nodes = (entries.get(name) or {}).get("inbound_nodes")
            if not isinstance(nodes, list) or not -1 < index < len(nodes):
                raise FileFormatError(f"{self.place}: there is no call {index} of {name!r}")
            node = nodes[index]
            if not isinstance(node, Mapping):
                raise FileFormatError(f"{self.place}: {name}: a node is {node!r:.80}")
            found = keras_ops.histories(without_idle(node, entries[name]))
            left += [ref for ref in found if ref not in known]
        for name, entry in entries.items():
            for index, node in enumerate(entry.get("inbound_nodes") or []):
                if (name, index) in wanted:
                    yield name, index, without_idle(node, entry)

    def _input_shape(self, settings: Mapping[str, Any]) -> Any:
        if settings.get("sparse") or settings.get("ragged"):
            raise ConversionError(f"{self.place}: a sparse or ragged input can't be converted")
        return settings.get("batch_shape") or settings.get("batch_input_shape")

    def _checked(self, shape: Any) -> Any:
        if shape is not None and not isinstance(shape, list | tuple):
            raise FileFormatError(f"{self.place}: the input shape is {shape!r}")
        return None if shape is None else tuple(shape[1:])

    def _cast(self, start: str, dtype: Any, since: int, inside: tuple[str, ...], tip: str) -> str:
        """Casts what a model takes to half precision, where its first layers may not."""
        keras_ops.check_reached(self.layers[since:], start, dtype)
        readers = [x for x in self.layers[since:] if start in x.inputs]
        if dtype not in ("float16", "bfloat16") or not readers:
            return tip
        exact = {"float16": 2048, "bfloat16": 256}[dtype]
        others = []
        for layer in readers:
            count = layer.settings.get("input_dim")
            if layer.kind != "Embedding":
                others += [layer] if layer.dtype != dtype else []
            elif not isinstance(count, int) or count > exact + 1:
                raise refuse(
                    str(layer),
                    f"its input has dtype {dtype}, which rounds whole numbers above {exact}",
                    "give the model keras.Input(shape, dtype='int32')",
                )
        if not others:
            return tip
        own = parts_of(others[0].name)[len(inside)]
        name = joined((*inside, f"{own}__cast"))
        for layer in readers:
            layer.inputs = tuple(name if i == start else i for i in layer.inputs)
        made = Layer(name, "Identity", {}, fused=True, dtype=dtype, inputs=(start,))
        self.layers.insert(since, made)
        return name if tip == start else tip

    # -- calls --------------------------------------------------------------------------------

    def _call(
        self,
        entry: Any,
        node: Any,
        given: list[str],
        inside: tuple[str, ...],
        base: tuple[str, ...],
    ) -> list[str]:
        """The names of what one call of a layer or a model gives."""
        if keras_ops.is_operation(entry):
            name = self.called = self._name((*inside, str(entry["config"].get("name"))))
            node = keras_forms.with_shapes(node, [self.shapes.get(v) for v in given])
            keras_ops.check_whole(entry["class_name"], node, f"{self.place}: {name}")
            cuts = keras_ops.split_of(entry, node, name, self.place) or []
            stacked = keras_ops.stack_of(entry, node, name, self.place) or []
            chain = cuts or stacked or keras_ops.layers_of(entry, node, name, self.place)
            made = [x.dtype for x in self.layers if x.name in given]
            for part in chain:  # an operation takes no mask and sends none on
                part.maskless = not entry.get(keras_2.OLDER)
                part.dtype = keras_ops.dtype_of(node, made)
            if cuts:
                return [self._chain([part], given) for part in cuts]
            if stacked:
                *ones, whole = stacked
                given = [self._chain([x], [v]) for x, v in zip(ones, given, strict=True)]
                return [self._chain([whole], given)]
            return [self._chain(chain, given[::-1] if chain[0].kind == "ops.Where" else given)]
        kind, settings = entry_of(entry, self.place)
        own = settings.get("name")
        if not isinstance(own, str):
            raise FileFormatError(f"{self.place}: a layer {kind!r} has no name")
        if node is not None:
            self._check_call(kind, own, node)
            keras_ops.check_whole(kind, node, f"{self.place}: {own}")
        label, first = self._name((*inside, own)), joined((*base, own))
        self.called = label
        if kind in CONTAINERS:
            parts, since = (*inside, parts_of(label)[-1]), len(self.layers)
            _, gives = self.model(*_body(entry, self.place), parts, (*base, own), given)
            masks, masked = (node["masks"], node["masked"]) if node else ([], [])
            hidden = set(given if masks else ())
            if len(masked) == len(given):
                hidden = {name for name, is_so in zip(given, masked, strict=True) if is_so}
            for layer in self.layers[since:]:
                if not hidden.isdisjoint(layer.inputs):
                    layer.given_mask = masks[0]
            return flat(gives)
        if (kind, entry.get("module")) == keras_ops.SCALED:
            name = self._name((*parts_of(label)[:-1], f"{parts_of(label)[-1]}__scale"))
            scaled = Layer(name, "Rescaling", {"scale": settings.get("scale")}, fused=True)
            given = [given[0], self._chain([scaled], given[1:])]
            return [self._chain([Layer(label, "Add", {}, fused=True)], given)]
        if kind == "Dot" and node is not None:
            return [self._dot(label, settings, node, given)]
        chain = layer_and_activation(label, kind, settings, self.place)
        if kind in ARGUMENTS and node is not None:
            given = attended(kind, own, node, given, self.place)
        told = {k: True for k in keras_ops.CALLED.get(kind, ()) if node and node["kwargs"].get(k)}
        chain[0].settings.update(told)
        chain[0].given_mask = "=, ".join(node["masks"] if node else ())
        chain[0].masked = (kind in MASKED and not entry.get(keras_2.OLDER)) or bool(
            node and node["masks"]
        )
        if any(r.kind == "merge" for r in table.rows_of("keras", kind)) and node is not None:
            given = self._same_rank(label, node, given)
        if label != first:  # each part is the part of the first call that ends alike
            chain = [dataclasses.replace(x, of=first + x.name.removeprefix(label)) for x in chain]
        return [self._chain(chain, given)]

    def _name(self, parts: tuple[str, ...]) -> str:
        name = joined(parts)
        count = self.named[name] = self.named.get(name, 0) + 1
        again = (*parts[:-1], f"{parts[-1]}__call_{count}")
        if count > 1:  # but no layer of its own is called so
            return self._name(parts if joined(again) in self.own else again)
        return name

    def _chain(self, chain: list[Layer], given: Sequence[str]) -> str:
        """The name of the last of some layers, the first of which takes what is given."""
        for layer in chain:
            name = layer.name
            if name in self.own and name != self.called:
                name = self.beside.setdefault(name, fresh(name, self.own))
            of = layer.of if name == self.called else self.beside.get(layer.of, layer.of)
            self.layers.append(dataclasses.replace(layer, name=name, of=of, inputs=tuple(given)))
            self.shapes[name] = keras_forms.shape_of(layer, [self.shapes.get(v) for v in given])
            given = (name,)
        return given[0]

    def _check_call(self, kind: str, name: str, node: Mapping[str, Any]) -> None:
        """Raises for what a layer is called with beside tensors."""
        place = f"{self.place}: {name}"
        given = {**dict(enumerate(node.get("args") or [])), **(node.get("kwargs") or {})}
        known = ("inputs", *ARGUMENTS.get(kind, ()))
        for key, value in given.items():
            found = keras_ops.histories(value)
            if value is None or value is False:
                continue
            if found and (type(key) is int or key in known):
                if other := keras_ops.others(value):
                    raise refuse(place, f"it is called with {other[0]!r:.80} beside tensors",
                                 "a Rescaling or an Embedding holds it")  # fmt: skip
                continue
            if value is True and key in keras_ops.CALLED.get(kind, ()):
                continue
            if found:
                raise refuse(place, f"it is called with a tensor as {key}=", keras_ops.AS_IT_IS)
            raise refuse(place, f"it is called with {key}={value!r}: only tensors convert")

    def _dot(self, label: str, told: Mapping[str, Any], node: Any, given: list[str]) -> str:
        """Keras's Dot as an einsum, each tensor divided by its length before, if that is asked."""
        where = f"{self.place}: {label} (Dot)"
        ranks = keras_ops.ranks_of(node, where)
        axes = told.get("axes")
        axes = list(axes) if isinstance(axes, list | tuple) else [axes] * len(ranks)
        known = {"name", "trainable", "dtype", "axes", "normalize"}
        fits = len(ranks) == len(axes) == 2 and all(
            type(a) is int and -r <= a < r and a % r for a, r in zip(axes, ranks, strict=False)
        )
        if not fits or set(told) - known:
            raise refuse(where, f"{dict(told)} of tensors of rank {ranks}")
        dtype = _computes_in(told.get("dtype"), where)
        own = parts_of(label)

        def add(part: str, kind: str, inputs: Sequence[str], **how: Any) -> str:
            name = self._name((*own[:-1], f"{own[-1]}__{part}")) if part else label
            made = Layer(name, kind, how, inputs=tuple(inputs), dtype=dtype, fused=bool(part))
            self.layers.append(made)
            return name

        places = [a % r for a, r in zip(axes, ranks, strict=True)]
        for i, at in enumerate(places if told.get("normalize") else ()):
            size = add(f"square_{i}", "ops.Pointwise", [given[i]], function="square")
            size = add(f"sum_{i}", "ops.Reduce", [size], function="sum", axis=at)
            size = add(f"length_{i}", "ops.Pointwise", [size], function="sqrt")
            # The larger one of it and the least that Keras divides by.
            size = add(f"less_{i}", "Rescaling", [size], scale=1.0, offset=-_EPSILON)
            size = add(f"rest_{i}", "ReLU", [size])
            size = add(f"more_{i}", "Rescaling", [size], scale=1.0, offset=_EPSILON)
            unit = add(f"unit_{i}", "ops.TrueDivide", [given[i], size])
            given = [*given[:i], unit, *given[i + 1 :]]
        if ranks == [2, 2]:
            product = add("product", "Multiply", given)
            return add("", "ops.Reduce", [product], function="sum", axis=1)
        letters = "abcdefghijklmnopqrstuvw"
        first = [*"z", *letters[: ranks[0] - 1]]
        second = [*"z", *letters[ranks[0] : ranks[0] + ranks[1] - 1]]
        second[places[1]] = first[places[0]]
        out = [x for x in (*first, *second[1:]) if x != first[places[0]]]
        text = f"{''.join(first)},{''.join(second)}->{''.join(out)}"
        return add("", "ops.Einsum", given, subscripts=text)

    def _same_rank(self, label: str, node: Any, given: list[str]) -> list[str]:
        """Keras puts axes of size 1 behind the batch of what has fewer."""
        shapes = [t["config"].get("shape") for t in keras_ops.tensors(node)]
        if any(not isinstance(s, list | tuple) for s in shapes):
            return given
        rank = max(map(len, shapes))
        out = []
        for index, (value, shape) in enumerate(zip(given, shapes, strict=True)):
            if len(shape) < rank:
                target = [*[1] * (rank - len(shape)), *(-1 if s is None else s for s in shape[1:])]
                made = Layer(self._name((*parts_of(label)[:-1],
                                         f"{parts_of(label)[-1]}__expand_{index}")),
                             "Reshape", {"target_shape": target}, fused=True)  # fmt: skip
                value = self._chain([made], [value])
            out.append(value)
        return out


# -- one layer --------------------------------------------------------------------------------


def entry_of(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    """The class and the settings of a layer of Keras's own."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise FileFormatError(f"{place}: expected a layer, found {entry!r:.80}")
    kind, module = entry.get("class_name"), entry.get("module")
    if not isinstance(kind, str):
        raise FileFormatError(f"{place}: a layer's class is {kind!r}")
    kind = {own: public for public, own in keras_ops.CLASSES.items()}.get(kind, kind)
    if keras_custom.is_custom(kind):  # behind the package that the user registered it in
        own = kind.rpartition(">")[2]
        place = f"{entry['config'].get('name')} ({own})"
        return own, keras_custom.settings_of(own, entry["config"], place)
    if (kind, module) in keras_ops.BESIDE:
        return kind, dict(entry["config"])
    check_own(entry, place, str(entry["config"].get("name", entry.get("name", "a layer"))))
    return kind, dict(entry["config"])


def check_own(entry: Any, place: str, name: str) -> None:
    """Raises for a class that is not Keras's own. One that was defined in a script or a notebook
    has no module, but the name under which it would be registered."""
    kind, module = entry.get("class_name"), entry.get("module")
    registered = entry.get("registered_name")
    parts = ["keras"] if module is None else str(module).split(".")
    nowhere = "module" in entry and module is None and registered is not None
    if nowhere or registered not in (None, kind) or parts[0] != "keras" or "ops" in parts:
        raise ConversionError(
            f"{place}: {name} is a custom layer ({f'{module}.' if module else ''}{kind}), which "
            "can't be converted from a file: converters.register(row) makes a class of your own "
            "known, and converters.transform(model, t) changes the weights of a live model as it is"
        )


def _is_operation(entry: Any) -> bool:
    return keras_ops.is_operation(entry)


def layer_and_activation(name: str, kind: str, settings: dict[str, Any], place: str) -> list[Layer]:
    place_of = f"{name} ({kind})"
    try:
        dtype = _computes_in(settings.pop("dtype", None), place_of)
    except ConversionError:  # what has no row in any dtype says that
        if table.rows_of("keras", kind):
            raise
        raise table.unknown("keras", Layer(name, kind, settings)) from None
    activation = None
    if any(r.fused_activation for r in table.rows_of("keras", kind)):
        activation = settings.pop("activation", "linear")
    elif kind == "Activation":
        settings["activation"] = _function_name(settings.get("activation"))
        if settings["activation"] == HARD_SIGMOID:
            return [dataclasses.replace(x, dtype=dtype) for x in _hard_sigmoid(name)]
    inner: list[Layer] = []
    after: list[Layer] = []
    for role in ("layer", "backward_layer", "cell"):
        if isinstance(settings.get(role), dict):
            wrapped, its = entry_of(settings.pop(role), place)
            own = its.get("name", role)
            parsed = layer_and_activation(own, wrapped, its, place)
            inner.append(dataclasses.replace(parsed[0], dtype=None))  # the wrapper tells it
            if parsed[0].dtype != dtype:
                raise refuse(place_of, f"it computes in {dtype}, and {own} in it in "
                             f"{parsed[0].dtype}", "give both the same dtype=")  # fmt: skip
            # What wraps a layer with an activation does so in two steps.
            after += [
                dataclasses.replace(x, name=name + x.name.removeprefix(own)) for x in parsed[1:]
            ]
    layers = [Layer(name, kind, settings, inner=tuple(inner))]
    if activation is not None:
        layers += _fused(f"{name}__activation", activation, place)
    return [dataclasses.replace(x, dtype=x.dtype or dtype) for x in (*layers, *after)]


def _computes_in(given: Any, place: str) -> str:
    """The dtype that a layer of this policy computes in; its arrays tell the one that they have."""
    name = given
    if isinstance(given, dict):
        inner = given.get("config")
        if isinstance(inner, dict) and "mode" in inner:
            raise refuse(place, f"it is quantised ({inner['mode']}): it computes with other "
                         "numbers than it holds", "take the model as it was before")  # fmt: skip
        name = inner.get("name") if isinstance(inner, dict) else given.get("class_name")
    if name not in (None, *policy.POLICIES):
        raise refuse(
            place,
            f"dtype policy {name!r}: only {', '.join(policy.POLICIES)} are converted",
            "rebuild it in one of them",
        )
    return "float32" if name is None else str(name).removeprefix("mixed_")


def _function_name(activation: Any) -> Any:
    """The name of a function of Keras's own; one that is registered elsewhere stays a dict."""
    if isinstance(activation, dict) and activation.get("class_name") == "function":
        own = activation.get("registered_name") in (None, "function")
        return activation.get("config") if own else activation
    return activation


def _fused(name: str, activation: Any, place: str) -> list[Layer]:
    activation = _function_name(activation)
    if activation in (None, "linear"):
        return []
    if activation == HARD_SIGMOID:
        return _hard_sigmoid(name)
    if isinstance(activation, dict):  # a layer object as activation
        if not isinstance(activation.get("config"), dict) or "class_name" not in activation:
            raise refuse(name, "activation is a function of the user's own")
        kind, settings = entry_of(activation, place)
        dtype = _computes_in(settings.pop("dtype", None), f"{name} ({kind})")
        return [Layer(name, kind, settings, fused=True, dtype=dtype)]
    return [Layer(name, "Activation", {"activation": activation}, fused=True)]


def _hard_sigmoid(name: str) -> list[Layer]:
    """Keras 2's hard_sigmoid, 0.2 x + 0.5 between 0 and 1, in layers that each framework has; the
    factors of 2 round nothing."""
    return [
        Layer(name, "Rescaling", {"scale": 0.4}, fused=True),
        Layer(f"{name}__clipped", "Activation", {"activation": "hard_tanh"}, fused=True),
        Layer(f"{name}__shifted", "Rescaling", {"scale": 0.5, "offset": 0.5}, fused=True),
    ]
