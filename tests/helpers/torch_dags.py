"""Random torch modules that are graphs, and their way through the other frameworks.

``python tests/graphs.py --random torch COUNT`` runs many; ``run(seed)`` is one.
"""

import copy
import math
import re
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fwt import converters
from fwt.converters.frameworks import flax, torch_layers

BATCHES = (3, 1)  # neither of them the example's, which is 2
LARGEST = 400  # entries of one example
TABLE = 7  # rows of each Embedding
# By which from_torch says that its own check found a difference, which is a fault of fwt.
FAULT = "report it, please"


class Net(nn.Module):
    """Calls one after the other, each of what inputs or calls before it give."""

    def __init__(self):
        super().__init__()
        self.calls, self.ends, self.form = [], [], "one"
        self.between = None  # what is done to the tensor that each call gives

    def run(self, *xs):
        held = list(xs)
        for function, taken, _ in self.calls:
            y = function(self, *(held[i] for i in taken))
            held.append(self.between(y) if self.between else y)
        outs = [held[i] for i in self.ends]
        if self.form == "dict":
            return {f"out{i}": y for i, y in enumerate(outs)}
        return outs[0] if self.form == "one" else tuple(outs)


class One(Net):
    def forward(self, x):
        return self.run(x)


class Two(Net):
    def forward(self, x, y):
        return self.run(x, y)


class Three(Net):
    def forward(self, x, y, z):
        return self.run(x, y, z)


ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid,
               nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6, nn.Mish, nn.Softsign, nn.CELU,
               nn.SELU, nn.LogSigmoid, nn.Tanhshrink, nn.Dropout, nn.Identity)  # fmt: skip
FUNCTIONS = (
    lambda x: F.hardtanh(x, -0.3, 0.7), lambda x: F.threshold(x, 0.1, 0.1),
    F.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu, F.hardswish, F.softplus, torch.abs, F.mish,
    torch.square, torch.sin, torch.cos, torch.neg, torch.erf, torch.arctan, torch.exp2,
    torch.absolute,
    lambda x: x.abs().add(0.5).sqrt(), lambda x: torch.rsqrt(x * x + 0.3),
    lambda x: x.clamp(-1.5, 1.0), lambda x: x.clamp(min=-0.3), lambda x: x.clamp(max=0.7),
    lambda x: x.clamp(max=2).exp(), lambda x: torch.log1p(x.abs()), lambda x: (x.abs() + 1).log(),
    lambda x: x * 2 + 1, lambda x: 1 - x, lambda x: x / 3, lambda x: 2 / (x.abs() + 1),
    lambda x: x**2, lambda x: x**3, lambda x: F.gelu(x, approximate="tanh"),
    lambda x: -(x + 0).relu_(),
    lambda x: F.leaky_relu(x, 0.3), lambda x: F.elu(x, 0.5), lambda x: F.dropout(x, 0.5, False),
    lambda x: torch.maximum(x, torch.tensor(0.1)),
    lambda x: torch.where(torch.tensor(True), x, 0.0),
)  # fmt: skip


class Draw:
    """A module that grows by one call at a time, and what it gives for an example of two."""

    STEPS = ("window", "window", "linear", "norm", "norm", "act", "function", "function", "soft",
             "pool", "joined", "joined", "stacked", "merge", "merge", "merge", "reduce", "reduce",
             "flat", "view", "turn", "turn", "ones", "cut", "cut", "parts", "pad", "resize",
             "learned", "learned", "held", "token", "product", "attend", "recurrent", "again",
             "again", "inside", "listed", "merged", "shuffled")  # fmt: skip

    def __init__(self, rng, net, inputs):
        self.rng, self.net = rng, net
        self.tensors = list(inputs)
        self.modules = []  # (name, the shape that it takes), to be called again
        self.count = 0

    # -- drawing -------------------------------------------------------------------------------

    def one(self, values):
        return values[int(self.rng.integers(len(values)))]

    def chance(self, p=0.5):
        return bool(self.rng.random() < p)

    def n(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def pick(self, *ranks):
        """The place of a tensor, one of the newer ones more often."""
        fitting = [
            i for i, t in enumerate(self.tensors)
            if t is not None and t.is_floating_point() and (not ranks or t.ndim in ranks)
        ]  # fmt: skip
        if not fitting:
            return None
        # Those that nothing takes yet still more often.
        taken = {i for _, at, _ in self.net.calls for i in at}
        weights = np.arange(1, len(fitting) + 1) ** 1.5
        weights *= [1 if i in taken else 3 for i in fitting]
        return fitting[self.rng.choice(len(fitting), p=weights / weights.sum())]

    def fitting(self, test):
        return [i for i, t in enumerate(self.tensors) if t is not None and t.is_floating_point()
                and test(t)]  # fmt: skip

    def put(self, kind, value):
        """A module, Parameter or buffer under a name of its own."""
        self.count += 1
        name = f"{kind.lower()}{self.count}"
        setattr(self.net, name, value)
        return name

    def call(self, function, *taken, uses=()):
        """One call more, unless what it gives is too large or ill."""
        with torch.no_grad():
            y = function(self.net, *(self.tensors[i] for i in taken))
        large = float(y.abs().max()) if y.numel() else math.nan
        good = y.ndim > 1 and len(y) == 2 and 0 < y[0].numel() <= LARGEST and y.ndim <= 5
        if not good or not 1e-2 < large < 100:
            for name in uses:
                if not any(name in used for _, _, used in self.net.calls):
                    delattr(self.net, name)
            self.modules = [m for m in self.modules if hasattr(self.net, m[0])]
            return None
        self.net.calls.append((function, taken, frozenset(uses)))
        self.tensors.append(y)
        return len(self.tensors) - 1

    def module(self, made, i):
        """A module of a tensor, that may be called again."""
        name = self.put(type(made).__name__, randomised(made, self.rng))
        if self.tensors[i].is_floating_point():
            self.modules.append((name, self.tensors[i].shape))
        return self.call(lambda net, x: getattr(net, name)(x), i, uses=(name,))

    # -- steps ---------------------------------------------------------------------------------

    def step(self):
        getattr(self, self.one(self.STEPS))()

    def window(self):
        if (i := self.pick(3, 4)) is None:
            return
        c, *sizes = self.tensors[i].shape[1:]
        r, out = len(sizes), self.n(1, 6)
        k = self.n(1, 3)
        groups = self.one([g for g in (1, 1, 2, 3, 4, 5) if c % g == 0])
        out *= groups if groups > 1 else 1
        how = {"groups": groups, "bias": self.chance(0.7), "stride": self.one((1, 1, 2))}
        if out > 8:
            return
        if self.chance(0.3):
            more = self.n(0, how["stride"] - 1)
            how |= {"padding": self.n(0, (k - 1) // 2), "output_padding": more}
            self.module(getattr(nn, f"ConvTranspose{r}d")(c, out, k, **how), i)
            return
        how |= {"padding": self.one((0, "same", k // 2)), "dilation": self.one((1, 1, 2))}
        how["padding_mode"] = self.one(("zeros", "zeros", "zeros", "reflect", "circular"))
        if how["padding"] == "same":
            how["stride"] = 1
        if any(s <= (k - 1) * how["dilation"] for s in sizes):
            return
        self.module(getattr(nn, f"Conv{r}d")(c, out, k, **how), i)

    def linear(self):
        i = self.pick()
        self.module(nn.Linear(self.tensors[i].shape[-1], self.n(1, 6), bias=self.chance(0.8)), i)

    def norm(self):
        i = self.pick()
        shape = self.tensors[i].shape
        c, rank = shape[1], len(shape)
        kinds = [lambda: nn.LayerNorm(shape[-1]), lambda: nn.RMSNorm(shape[-1], eps=1e-3)]
        kinds = kinds if shape[-1] > 1 else []  # of one number either is rounding alone
        if rank > 2:
            kinds.append(lambda: nn.LayerNorm(shape[-2:]))
        if rank in (2, 3):
            kinds += [lambda: nn.BatchNorm1d(c), lambda: nn.BatchNorm1d(c, affine=False)]
        if rank == 4:
            kinds += [lambda: nn.BatchNorm2d(c)]
        if rank == 4 and shape[2:].numel() > 1:
            kinds += [lambda: nn.InstanceNorm2d(c, affine=True)]
        if rank > 2:
            kinds.append(lambda: nn.GroupNorm(self.one([g for g in (1, 2, 3) if c % g == 0]), c))
        self.module(self.one(kinds)(), i)

    def act(self):
        i = self.pick()
        c = self.tensors[i].shape[1]
        kind = self.one((*ACTIVATIONS, nn.PReLU))
        self.module(kind(c) if kind is nn.PReLU else kind(), i)

    def function(self):
        f = self.one(FUNCTIONS)
        self.call(lambda net, x: f(x), self.pick())

    def soft(self):
        i = self.pick()
        dim = self.n(1, self.tensors[i].ndim - 1) - self.one((0, self.tensors[i].ndim))
        if self.chance():
            self.module(self.one((nn.Softmax, nn.LogSoftmax))(dim), i)
        else:
            f = self.one((torch.softmax, F.log_softmax, lambda x, dim: F.normalize(x, dim=dim)))
            self.call(lambda net, x: f(x, dim=dim), i)

    def pool(self):
        if (i := self.pick(3, 4)) is None:
            return
        sizes = self.tensors[i].shape[2:]
        r = len(sizes)
        kind = self.one(("Max", "Avg", "AdaptiveAvg", "AdaptiveMax"))
        if kind.startswith("Adaptive"):
            parts = [n for n in range(1, 6) if sizes[0] % n == 0]
            size = 1 if self.chance(0.6) else self.one(parts)
            self.module(getattr(nn, f"{kind}Pool{r}d")(size), i)
            return
        if min(sizes) < 2:
            return
        k = self.n(2, min(3, *sizes))
        how = {"stride": self.n(1, 2), "padding": self.n(0, 1), "ceil_mode": self.chance(0.2)}
        if kind == "Avg":
            how["count_include_pad"] = self.chance()
        self.module(getattr(nn, f"{kind}Pool{r}d")(k, **how), i)

    def joined(self):
        i = self.pick()
        x = self.tensors[i]
        dim = self.n(1, x.ndim - 1)
        rest = [n for d, n in enumerate(x.shape) if d != dim]
        near = self.fitting(lambda t: t.ndim == x.ndim and rest == [
            n for d, n in enumerate(t.shape) if d != dim])  # fmt: skip
        more = [self.one(near) for _ in range(self.n(1, 2))]
        at = dim - self.one((0, x.ndim))
        join = self.one((torch.cat, torch.cat, torch.concat))
        self.call(lambda net, *xs: join(xs, at), i, *more)

    def stacked(self):
        i = self.pick(2, 3)
        if i is None:
            return
        near = self.fitting(lambda t: t.shape == self.tensors[i].shape)
        dim = self.n(1, self.tensors[i].ndim)
        self.call(lambda net, *xs: torch.stack(xs, dim), i, self.one(near))

    def merge(self):
        i = self.pick()
        x = self.tensors[i]
        f = self.one((torch.add, torch.mul, torch.sub, torch.maximum, torch.minimum,
                      lambda a, b: a / (b * b + 1),
                      lambda a, b: torch.add(a, b, alpha=2)))  # fmt: skip

        def meets(t):
            return t.ndim == x.ndim and all(
                1 in (a, b) or a == b for a, b in zip(t.shape, x.shape, strict=True)
            )

        if self.chance(0.25) and x.ndim > 2:  # one of a lower rank
            dim = self.n(1, x.ndim - 1)
            near = self.fitting(lambda t: t.ndim == x.ndim - 1 and meets(t.unsqueeze(dim)))
            if near:
                self.call(lambda net, a, b: f(a, b.unsqueeze(dim)), i, self.one(near))
                return
        other = self.fitting(lambda t: meets(t) and t.shape != x.shape)
        if not other or self.chance():
            other = self.fitting(meets)
        pair = [i, self.one(other)]
        self.call(lambda net, a, b: f(a, b), *(pair if self.chance() else pair[::-1]))

    def reduce(self):
        i = self.pick(3, 4, 5)
        if i is None:
            return
        rank = self.tensors[i].ndim
        dims = tuple(int(d) for d in self.rng.permutation(rank - 1)[: self.n(1, rank - 2)] + 1)
        dims = tuple(d - self.one((0, rank)) for d in dims)
        keep = self.chance()
        kinds = [torch.mean, torch.mean, torch.sum, torch.amax, torch.amin, torch.logsumexp,
                 lambda x, d, k: torch.linalg.vector_norm(x, dim=d, keepdim=k),
                 lambda x, d, k: x.max(d[0], k).values]  # fmt: skip
        if math.prod(self.tensors[i].shape[d] for d in dims) > 2:
            kinds += [lambda x, d, k: x.var(d, keepdim=k), lambda x, d, k: x.var(d, False, k)]
        f = self.one(kinds)
        self.call(lambda net, x: f(x, dims, keep), i)

    def flat(self):
        if (i := self.pick(3, 4)) is None:
            return
        rank = self.tensors[i].ndim
        start = self.n(1, rank - 2)
        end = self.one(range(start + 1, rank))
        if self.chance(0.6):
            start, end = 1, -1
        y = self.call(lambda net, x: x.flatten(start, end), i)
        if y is not None and self.chance(0.6):
            self.module(nn.Linear(self.tensors[y].shape[-1], self.n(1, 5)), y)

    def view(self):
        i = self.pick()
        size, shape = self.tensors[i][0].numel(), self.tensors[i].shape
        first = self.one([n for n in range(1, 7) if size % n == 0])
        kind = self.n(0, 3)
        if kind == 0:
            self.call(lambda net, x: x.reshape(x.shape[0], first, -1), i)
        elif kind == 1:
            self.call(lambda net, x: x.reshape(-1, first, size // first), i)
        elif kind == 2:
            self.call(lambda net, x: x.contiguous().view(x.size(0), size), i)
        else:
            dim = self.n(1, len(shape) - 1)
            part = self.one([n for n in range(1, 7) if shape[dim] % n == 0])
            self.call(lambda net, x: x.unflatten(dim, (part, -1)), i)

    def turn(self):
        if (i := self.pick(3, 4, 5)) is None:
            return
        rank = self.tensors[i].ndim
        a, b = self.n(1, rank - 1), self.n(1, rank - 1)
        order = (0, *(int(d) + 1 for d in self.rng.permutation(rank - 1)))
        f = self.one((lambda x: x.transpose(a, b), lambda x: x.permute(order),
                      lambda x: x.movedim(a, b), lambda x: x.transpose(a - rank, b)))  # fmt: skip
        self.call(lambda net, x: f(x), i)

    def ones(self):
        """Axes of one entry: made, taken away, repeated."""
        i = self.pick(2, 3, 4)
        x = self.tensors[i]
        alone = [d for d in range(1, x.ndim) if x.shape[d] == 1]
        if alone and x.ndim > 2 and self.chance():
            dim = self.one(alone)
            if self.chance():
                self.call(lambda net, x: x.squeeze(dim), i)
            else:
                to = [-1] * x.ndim
                to[dim] = self.n(2, 4)
                self.call(lambda net, x: x.expand(*to), i)
            return
        dim = self.n(1, x.ndim)
        self.call(lambda net, x: x.unsqueeze(dim), i)

    def cut(self):
        i = self.pick()
        x = self.tensors[i]
        dim = self.n(1, x.ndim - 1)
        size = x.shape[dim]
        if size < 2:
            return
        start, step = self.n(0, size - 2), self.one((1, 1, 2))
        stop = self.n(start + 1, size) - self.one((0, 0, size))
        cut = self.one((slice(start, stop or None, step), slice(-start - 1, None)))
        at = (*[slice(None)] * dim, cut)
        kinds = [lambda x: x[at], lambda x: x[at], lambda x: x.narrow(dim, start, 1),
                 lambda x: x.flip(dim), lambda x: x.roll(start + 1, dim)]  # fmt: skip
        if x.ndim > 2:
            kinds += [lambda x: x.select(dim, start - size), lambda x: x[(*at[:dim], start)]]
        order = [int(n) for n in self.rng.integers(0, size, self.n(1, 4))]
        kinds.append(lambda x: x[(*at[:dim], order)])
        f = self.one(kinds)
        self.call(lambda net, x: f(x), i)

    def parts(self):
        """What chunk, split or unbind give, put together otherwise."""
        i = self.pick()
        x = self.tensors[i]
        even = [d for d in range(1, x.ndim) if x.shape[d] % 2 == 0]
        if not even:
            return
        dim = self.one(even)
        half = x.shape[dim] // 2
        cut = self.one((lambda x: x.chunk(2, dim), lambda x: x.split(half, dim),
                        lambda x: torch.split(x, [half, half], dim)))  # fmt: skip
        join = self.one((lambda a, b: a * b.sigmoid(), lambda a, b: torch.cat([b, a], dim),
                         lambda a, b: a - b))  # fmt: skip
        self.call(lambda net, x: join(*cut(x)), i)

    def pad(self):
        if (i := self.pick(3, 4)) is None:
            return
        x = self.tensors[i]
        count = self.n(1, x.ndim - 2)
        by = [self.n(0, 2) for _ in range(2 * count)]
        mode = self.one(("constant", "constant", "reflect", "replicate", "circular"))
        if mode != "constant":
            count = x.ndim - 2
            by = [min(self.n(0, 1), x.shape[-1 - j // 2] - 1) for j in range(2 * count)]
        elif self.chance(0.3) and x.ndim == 3:
            by += [1, 0]
        value = self.one((0, 0.5)) if mode == "constant" else None
        if any(by):
            self.call(lambda net, x: F.pad(x, by, mode, value), i)

    def resize(self):
        if (i := self.pick(3, 4)) is None:
            return
        r = self.tensors[i].ndim - 2
        mode = self.one(("nearest", "nearest", ("linear", "bilinear")[r - 1]))
        size = [self.n(1, 6) for _ in range(r)]
        more = {"scale_factor": self.n(2, 3)} if self.chance() else {"size": size}
        if mode != "nearest":
            more["align_corners"] = self.chance(0.3)
        self.call(lambda net, x: F.interpolate(x, mode=mode, **more), i)

    def learned(self):
        """A Parameter that meets a tensor."""
        i = self.pick()
        shape = self.tensors[i].shape[1:]
        front = tuple(n if self.chance() else 1 for n in shape)
        c = shape[0]
        back = (Ellipsis, *[None] * (len(shape) - 1))
        own, view = self.one((
            ((), lambda p: p), (shape[-1:], lambda p: p), (front, lambda p: p),
            ((1, *front), lambda p: p), ((c,), lambda p: p[back]),
            ((c,), lambda p: p.view(1, c, *[1] * (len(shape) - 1))),
            ((c + 2, *shape[1:]), lambda p: p[:c]),
        ))  # fmt: skip
        name = self.put("gain", nn.Parameter(draws(self.rng, own)))
        f = self.one((torch.mul, torch.add, torch.sub))
        self.call(lambda net, x: f(x, view(getattr(net, name))), i, uses=(name,))

    def held(self):
        """A buffer, which the state dict may have or not."""
        i = self.pick()
        shape = tuple(n if self.chance() else 1 for n in self.tensors[i].shape[1:])
        self.count += 1
        name = f"held{self.count}"
        self.net.register_buffer(name, draws(self.rng, shape), persistent=self.chance(0.6))
        f = self.one((torch.mul, torch.add))
        self.call(lambda net, x: f(x, getattr(net, name)), i, uses=(name,))

    def token(self):
        if (i := self.pick(3)) is None:
            return
        width = self.tensors[i].shape[-1]
        name = self.put("token", nn.Parameter(draws(self.rng, (1, 1, width))))

        def run(net, x):
            return torch.cat([getattr(net, name).expand(x.shape[0], -1, -1), x], 1)

        y = self.call(run, i, uses=(name,))
        if y is not None and self.chance():
            self.call(lambda net, x: x[:, 0], y)

    def product(self):
        i = self.pick(3, 4)
        if i is None:
            return
        x = self.tensors[i]
        n = self.n(1, 5)
        near = self.fitting(lambda t: t.ndim == 3 == x.ndim and t.shape[-1] == x.shape[-1])
        if near and self.chance(0.7):
            f = self.one((lambda a, b: a @ b.mT, lambda a, b: torch.einsum("btc,bsc->bts", a, b),
                          lambda a, b: (a @ b.transpose(1, 2)).softmax(-1) @ b, torch.bmm,
                          lambda a, b: F.scaled_dot_product_attention(a, b, b)))  # fmt: skip
            if f is torch.bmm:
                near = self.fitting(lambda t: t.ndim == 3 and t.shape[1] == x.shape[-1])
            if near:
                self.call(lambda net, a, b: f(a, b), i, self.one(near))
            return
        name = self.put("weight", nn.Parameter(draws(self.rng, (x.shape[-1], n))))
        letters = "bcde"[: x.ndim]
        said = f"{letters},{letters[-1]}o->{letters[:-1]}o"
        f = self.one((torch.matmul, lambda x, w: torch.einsum(said, x, w)))
        self.call(lambda net, x: f(x, getattr(net, name)), i, uses=(name,))

    def attend(self):
        if (i := self.pick(3)) is None:
            return
        width = self.tensors[i].shape[-1]
        heads = self.one([n for n in (1, 2, 3) if width % n == 0])
        if self.chance(0.25):
            self.module(nn.TransformerEncoderLayer(width, heads, 7, batch_first=True), i)
            return
        made = nn.MultiheadAttention(width, heads, bias=self.chance(0.8), batch_first=True)
        name = self.put("attention", randomised(made, self.rng))
        near = self.fitting(lambda t: t.ndim == 3 and t.shape[-1] == width)
        other = i if self.chance() else self.one(near)
        self.call(lambda net, x, y: getattr(net, name)(x, y, y, need_weights=False)[0], i, other,
                  uses=(name,))  # fmt: skip

    def recurrent(self):
        if (i := self.pick(3)) is None:
            return
        kind = self.one((nn.LSTM, nn.GRU, nn.RNN))
        how = {"num_layers": self.n(1, 2), "bidirectional": self.chance(0.3)}
        first = self.chance(0.8)
        made = kind(self.tensors[i].shape[-1], self.n(1, 4), batch_first=first, **how)
        name = self.put(kind.__name__, randomised(made, self.rng))
        what = self.n(0, 2)

        def run(net, x):
            y, h = getattr(net, name)(x if first else x.transpose(0, 1))
            if what == 2:
                return (h[0] if kind is nn.LSTM else h)[-1]
            y = y if first else y.transpose(0, 1)
            return y[:, -1] if what else y

        self.call(run, i, uses=(name,))

    def again(self):
        """A module called once more."""
        near = [(n, i) for n, shape in self.modules
                for i in self.fitting(lambda t, s=shape: t.shape == s)]  # fmt: skip
        if near:
            name, i = self.one(near)
            self.call(lambda net, x: getattr(net, name)(x), i, uses=(name,))

    def inside(self):
        """A module of several calls, which may be called twice."""
        if type(self.net) is not One and self.chance(0.3):
            return
        i = self.pick()
        block = One()
        draw = Draw(self.rng, block, [self.tensors[i]])
        for _ in range(self.n(2, 4)):
            draw.one_of(("window", "linear", "norm", "act", "function", "merge", "learned", "turn"))
        if len(draw.tensors) == 1:
            return
        draw.finish([len(draw.tensors) - 1])
        self.module(block, i)

    def one_of(self, steps):
        getattr(self, self.one(steps))()

    def bridge(self, i):
        """Brings a tensor that nothing takes to the last one."""
        last = len(self.tensors) - 1
        rank = self.tensors[last].ndim
        y = self.call(lambda net, x: x.flatten(1), i)
        if y is None:
            return
        made = nn.Linear(self.tensors[y].shape[-1], self.tensors[last].shape[-1])
        if (y := self.module(made, y)) is None:
            return
        self.call(lambda net, a, b: a + b.view(-1, *[1] * (rank - 2), b.shape[-1]), last, y)

    def listed(self):
        """Layers in a list that forward goes through, or in a Sequential in a Sequential."""
        i = self.pick()
        w = self.tensors[i].shape[-1]
        made = [
            nn.Linear(w, w),
            self.one(ACTIVATIONS)(),
            nn.Sequential(nn.LayerNorm(w) if w > 1 else nn.ReLU(), nn.Tanh()),
        ]
        made = [made[int(j)] for j in self.rng.permutation(3)]
        if self.chance():
            self.module(nn.Sequential(*made), i)
            return
        name = self.put("layers", randomised(nn.ModuleList(made), self.rng))

        def run(net, x):
            for layer in getattr(net, name):
                x = x + layer(x)
            return x

        self.call(run, i, uses=(name,))

    def merged(self):
        """The batch among other axes, and back."""
        if (i := self.pick(3)) is None:
            return
        t, w = self.tensors[i].shape[1:]
        n = self.n(1, 5)
        name = self.put("linear", randomised(nn.Linear(w, n), self.rng))

        def run(net, x):
            return getattr(net, name)(x.reshape(-1, w)).view(-1, t, n)

        self.call(run, i, uses=(name,))

    def shuffled(self):
        if (i := self.pick(4)) is None:
            return
        c, h, w = self.tensors[i].shape[1:]
        if c % 4 == 0:
            self.call(lambda net, x: F.pixel_shuffle(x, 2), i)
        elif h % 2 == w % 2 == 0:
            self.call(lambda net, x: F.pixel_unshuffle(x, 2), i)
        elif c % 3 == 0:
            self.call(lambda net, x: F.channel_shuffle(x, 3), i)

    # -- the end -------------------------------------------------------------------------------

    def finish(self, ends):
        """Leaves out the calls and the parts that no end follows from."""
        net, first = self.net, len(self.tensors) - len(self.net.calls)
        needed, left = set(), list(ends)
        while left:
            i = left.pop()
            if i >= first and i not in needed:
                needed.add(i)
                left += net.calls[i - first][1]
            needed.add(i)
        place = {i: i for i in range(first)}
        for i in sorted(needed - set(place)):
            place[i] = len(place)
        kept = [net.calls[i - first] for i in sorted(needed) if i >= first]
        net.calls = [(f, tuple(place[j] for j in taken), uses) for f, taken, uses in kept]
        net.ends = [place[i] for i in ends]
        used = frozenset().union(*(u for _, _, u in kept))
        for name in {*net._modules, *net._parameters, *net._buffers} - used:
            delattr(net, name)
        return needed


def draws(rng, shape):
    return torch.from_numpy(rng.normal(0.3, 0.6, shape).astype("float32"))


def randomised(module, rng):
    """Every weight and statistic away from its default."""
    with torch.no_grad():
        for name, v in [*module.named_parameters(), *module.named_buffers()]:
            if v.is_floating_point():
                new = rng.normal(0, 0.4, tuple(v.shape))
                new = abs(new) + 0.3 if name.endswith("running_var") else new
                v.copy_(torch.from_numpy(np.asarray(new, "float32")))
    return module.eval()


def draw(seed):
    """A module, inputs of each batch, and the shapes of its inputs."""
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        made = _drawn(rng)
        if made is not None and _told(*made[:2]):
            return made
    raise AssertionError(f"seed {seed} draws nothing")


def _drawn(rng):
    count = int(rng.choice([1, 1, 1, 2, 3]))
    net = (One, Two, Three)[count - 1]()
    shapes, whole = [], []
    for _ in range(count):
        sizes = [int(n) for n in rng.permutation([3, 4, 5, 6])]  # each another, to tell an order
        whole.append(rng.random() < 0.12)
        shapes.append(tuple(sizes[: 1 if whole[-1] else rng.choice([1, 2, 3, 3])]))

    def inputs(batch):
        return [
            torch.from_numpy(rng.integers(0, TABLE, (batch, *s)) if w
                             else rng.normal(size=(batch, *s)).astype("float32"))
            for s, w in zip(shapes, whole, strict=True)
        ]  # fmt: skip

    it = Draw(rng, net, inputs(2))
    for i, w in enumerate(whole):
        if w:
            made = nn.Embedding(TABLE, int(rng.integers(2, 6)))
            it.module(made, i)
    for _ in range(rng.integers(6, 22)):
        it.step()
    for i in range(count):
        if not any(i in taken for _, taken, _ in net.calls):
            it.bridge(i)
    made = range(count, len(it.tensors))
    if not made:
        return None
    more = int(min(rng.choice([0, 0, 0, 1, 2]), len(made) - 1))
    ends = [made[-1], *(int(i) for i in rng.choice(made[:-1], more, replace=False))] if more else [
        made[-1]]  # fmt: skip
    used = it.finish(ends)
    if not set(range(count)) <= used:
        return None  # each input is taken
    alone = ("one",) * 8 if len(ends) == 1 else ()
    net.form = it.one((*alone, "tuple", "dict"))
    return net.eval(), [inputs(b) for b in BATCHES], shapes


def outputs(y):
    many = list(y.values()) if isinstance(y, dict) else y if isinstance(y, tuple | list) else [y]
    return [np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in many]


def _told(net, batches):
    """Whether float32 itself computes the outputs far closer than they are compared, and a rounding
    of what each call gives moves them no further."""
    wide = copy.deepcopy(net).double()
    rng = np.random.default_rng(0)

    def rounded(x):
        if not x.is_floating_point():
            return x
        return x * (1 + 1e-7 * torch.from_numpy(rng.choice([-1.0, 1.0], tuple(x.shape))))

    with torch.no_grad():
        for xs in batches:
            try:
                found = outputs(net(*xs))
            except (RuntimeError, ValueError):  # what 2 examples can do and 1 can't
                return False
            given = [x.double() if x.is_floating_point() else x for x in xs]
            exact = outputs(wide(*given))
            wide.between = rounded
            moved = outputs(wide(*map(rounded, given)))
            wide.between = None
            for a, b, c in zip(found, exact, moved, strict=True):
                largest = np.abs(b).max()
                if not np.isfinite(a).all() or not np.abs(a - b).max() <= 1e-6 * largest:
                    return False
                if not np.abs(c - b).max() <= 5e-6 * largest:
                    return False
    return True


def moved(x):
    """An array, and it with one of its axes elsewhere, as a layout may have moved its channels."""
    axes = range(1, x.ndim)
    return [x, *(np.moveaxis(x, a, b) for a in axes for b in axes if a != b)]


def arranged(xs, shapes):
    """The inputs with their axes as these shapes have them, told by their sizes."""
    return [next(y for y in moved(x) if y.shape[1:] == tuple(s))
            for x, s in zip(xs, shapes, strict=True)]  # fmt: skip


def taken(model):
    """The shapes of the inputs of the torch model that to_torch makes by default."""
    return torch_layers.torch_net(flax.read_flax(*model), "channels_first").inputs.values()


def same(found, wanted, what, ends_move=False):
    found = outputs(found)
    assert len(found) == len(wanted), f"{what}: {len(found)} outputs, expected {len(wanted)}"
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        forms = moved(b) if ends_move else [b]
        forms = [f for f in forms if f.shape == a.shape]
        assert forms, f"{what}: output {i} is {a.shape}, expected {b.shape}"
        assert np.isfinite(a).all(), f"{what}: output {i} is not finite"
        apart = min(float(np.abs(a - f).max()) for f in forms) / max(float(np.abs(b).max()), 1e-30)
        assert apart <= 1e-5, f"{what}: output {i} is {apart:.2g} off"


def bits(found, net, what):
    """The state of a module, bit for bit under the same keys."""
    summed = {n for n, m in net.named_modules() if isinstance(m, nn.RNNBase)}
    one, two = net.state_dict(), found.state_dict()
    # The matrix of a product is a Linear's, under the name of the product.
    named = re.compile(r"(.*/)?(weight\d+|(matmul|einsum)\w*\.weight)")
    there, here = ({k: d[k] for k in d if named.fullmatch(k)} for d in (one, two))
    flat = [sorted(v.flatten().sort().values.numpy().tobytes() for v in d.values())
            for d in (there, here)]  # fmt: skip
    assert flat[0] == flat[1], f"{what}: the matrices of products"
    one, two = ({k: d[k] for k in d if k not in own} for d, own in ((one, there), (two, here)))
    assert set(one) == set(two), f"{what}: keys {sorted(set(one) ^ set(two))}"
    for key, value in two.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.rpartition(".")[0] in summed and ".bias_" in key:  # which cross as their sum
            other = key.replace("_hh_", "_ih_"), key.replace("_ih_", "_hh_")
            a, b = (sum(s[k] for k in other) for s in (one, two))
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6), f"{what}: {key}"
            continue
        assert torch.equal(value, one[key]), f"{what}: {key}"


class Tour:
    """One module's way through the frameworks; ``said`` are the refusals on it."""

    def __init__(self, seed):
        self.net, batches, self.shapes = draw(seed)
        self.xs = [[x.numpy() for x in xs] for xs in batches]
        self.batches = batches
        self.seed = seed
        with torch.no_grad():
            self.wanted = [outputs(self.net(*xs)) for xs in batches]
        self.said = []

    def refused(self, what, function):
        """What a step gives; None and its reason among the refusals if it refuses by name."""
        try:
            return function()
        except converters.ConversionError as error:
            text = str(error)
            assert FAULT not in text, f"{what}: {text}"
            assert ": " in text or " can't " in text, f"{what} names no place: {text}"
            self.said.append(f"{what}: {text}")
            return None

    def here(self, model, what, move=False):
        """Whether a Flax model gives what torch does; what has come back, for one of the batches,
        since to compile is what takes long here."""
        shapes = model.module.input_shape
        shapes = [shapes] if len(self.shapes) == 1 else shapes
        run = jax.jit(model.module.apply)
        both = list(zip(self.xs, self.wanted, strict=True))
        for xs, wanted in both if "again" not in what else [both[self.seed % len(both)]]:
            same(run(model.variables, *arranged(xs, shapes)), wanted, what, move)

    def go(self):
        given = self.batches[0] if self.seed % 3 == 0 else self.shapes
        given = list(given) if len(given) > 1 else given[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.seed % 2:  # torch.export takes half the time
                self.back(given)
            model = self.refused(
                "from_torch", lambda: converters.from_torch(self.net, given, layout="source")
            )
            if model is None:
                return self.said
            self.here(model, "flax")
            self.refused("torch", lambda: self.torch(model, "source"))
            self.refused("keras", lambda: self.keras(model))
            self.refused("onnx", lambda: self.onnx(model))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                self.refused("safetensors", lambda: self.plain_file(model, path))
                self.refused(".keras", lambda: self.keras_file(model, path))
        return self.said

    def back(self, given):
        """With the channels last in Flax and first in torch, as no layout says otherwise."""
        model = self.refused("by default", lambda: converters.from_torch(self.net, given))
        if model is not None:
            self.here(model, "flax by default", True)
            self.refused("torch by default", lambda: self.torch(model, "channels_first"))

    def torch(self, model, layout):
        net, free = converters.to_torch(model, layout=layout), layout != "source"
        shapes = taken(model) if free else self.shapes
        for xs, wanted in zip(self.xs, self.wanted, strict=True):
            given = [torch.tensor(y) for y in arranged(xs, shapes)]
            with torch.no_grad():
                same(net(*given), wanted, f"torch {layout}", free)
        bits(net, self.net, f"torch {layout}")

    def in_keras(self, made, what):
        """Whether a Keras model gives what torch does.

        On TensorFlow keras.ops.add takes (1, 1, 3) for a bias of (1, 3, 1), and gives (1, 3, 1): so
        there one example is given twice.
        """
        import keras

        for xs, wanted in zip(self.xs, self.wanted, strict=True):
            alone = len(xs[0]) == 1 and keras.backend.backend() == "tensorflow"
            xs = [np.concatenate([x, x]) for x in xs] if alone else xs
            found = outputs(made(xs[0] if len(xs) == 1 else xs, training=False))
            same([y[:1] for y in found] if alone else found, wanted, what)

    def keras(self, model):
        made = converters.to_keras(model)
        self.in_keras(made, "keras")
        self.here(converters.from_keras(made), "keras again")

    def onnx(self, model):
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "net.onnx")
            converters.to_onnx(model, path=path, check=False)  # which is done here
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            kinds = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32"}
            for xs, wanted in zip(self.xs, self.wanted, strict=True):
                feed = {i.name: x.astype(kinds[i.type])
                        for i, x in zip(session.get_inputs(), xs, strict=True)}  # fmt: skip
                same(session.run(None, feed), wanted, "onnx")
            again = self.refused("from_onnx", lambda: converters.from_onnx(path))
            if again is not None:
                self.here(again, "onnx again")

    def plain_file(self, model, folder):
        path = folder / "net.safetensors"
        converters.save(path, model)
        again = converters.load(path)
        assert again.module == model.module, "safetensors: another module"
        for a, b in zip(*(jax.tree.leaves(m.variables) for m in (model, again)), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), "safetensors: bits"

    def keras_file(self, model, folder):
        import keras

        path = folder / "net.keras"
        converters.save(path, model)
        made = keras.saving.load_model(path, compile=False)
        self.in_keras(made, ".keras")
        self.here(converters.load(path), ".keras again")


def run(seed):
    """The refusals on the way of the module of a seed; raises for what is wrong."""
    return Tour(seed).go()
