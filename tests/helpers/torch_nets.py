"""Nets as torchvision, timm and lucidrains write them, narrow, with their names of parts.

``NETS`` has, by name, what makes a net and the shapes of its inputs without the batch.
"""

# ruff: noqa: C408, E501, RUF059
# fmt: off

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, s=1, p=None, **more):
    return nn.Conv2d(i, o, k, s, k // 2 if p is None else p, bias=False, **more)


class ConvNorm(nn.Sequential):
    """torchvision's Conv2dNormActivation."""

    def __init__(self, i, o, k=3, s=1, act=nn.ReLU, **more):
        parts = [conv(i, o, k, s, **more), nn.BatchNorm2d(o)]
        super().__init__(*parts, *([act(inplace=True)] if act else []))


class Block(nn.Module):
    """BasicBlock, and with groups or ``deep`` the Bottleneck."""

    def __init__(self, i, o, s=1, deep=False, groups=1):
        super().__init__()
        out, mid = (o * 4, o * groups // 2 if groups > 1 else o) if deep else (o, o)
        sizes = [(i, mid, 1, 1), (mid, mid, 3, s), (mid, out, 1, 1)] if deep else [
            (i, o, 3, s), (o, o, 3, 1)]
        for n, (a, b, k, step) in enumerate(sizes, 1):
            self.add_module(f"conv{n}", conv(a, b, k, step, groups=groups if n == 2 else 1))
            self.add_module(f"bn{n}", nn.BatchNorm2d(b))
        self.relu, self.count = nn.ReLU(inplace=True), len(sizes)
        self.downsample = None
        if s > 1 or i != out:
            self.downsample = nn.Sequential(conv(i, out, 1, s), nn.BatchNorm2d(out))

    def forward(self, x):
        identity, out = x, x
        for n in range(1, self.count + 1):
            out = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(out))
            out = self.relu(out) if n < self.count else out
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, deep=False, groups=1, blocks=(2, 1)):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 8, 7, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        i = 8
        for n, count in enumerate(blocks, 1):
            o = 4 * 2**n
            made = []
            for k in range(count):
                made.append(Block(i, o, 2 if k == 0 and n > 1 else 1, deep, groups))
                i = o * 4 if deep else o
            self.add_module(f"layer{n}", nn.Sequential(*made))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(i, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Features(nn.Module):
    """VGG and AlexNet: features, avgpool, flatten, classifier."""

    def __init__(self, features, pool, classifier):
        super().__init__()
        self.features, self.avgpool = nn.Sequential(*features), nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg():
    layers = []
    for i, o in ((3, 4), (4, 8), (8, 8)):
        norm = nn.BatchNorm2d(o)
        layers += [nn.Conv2d(i, o, 3, padding=1), norm, nn.ReLU(True), nn.MaxPool2d(2, 2)]
    ends = [nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5)]
    return Features(layers, (7, 7), ends)


def alexnet():
    layers = [nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 5, 1, 2),
              nn.ReLU(True), nn.MaxPool2d(3, 2)]
    ends = [nn.Dropout(), nn.Linear(12 * 36, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5)]
    return Features(layers, (6, 6), ends)


class Fire(nn.Module):
    def __init__(self, i, squeeze, expand):
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(i, squeeze, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeeze, expand, 1), nn.ReLU(True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)),
                          self.expand3x3_activation(self.expand3x3(x))], 1)


def squeezenet():
    net = Features(
        [nn.Conv2d(3, 8, 3, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6)],
        (1, 1), [nn.Dropout(0.5), nn.Conv2d(12, 5, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d((1, 1))],
    )
    del net.avgpool
    net.__class__ = type("SqueezeNet", (Features,), {
        "forward": lambda self, x: torch.flatten(self.classifier(self.features(x)), 1)})
    return net


class SqueezeExcitation(nn.Module):
    def __init__(self, i, mid, activation=nn.ReLU, scale=nn.Sigmoid):
        super().__init__()
        self.avgpool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), conv1(i, mid), conv1(mid, i)
        self.activation, self.scale_activation = activation(), scale()

    def forward(self, x):
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


def conv1(i, o):
    return nn.Conv2d(i, o, 1)


class StochasticDepth(nn.Module):
    """torchvision.ops.StochasticDepth."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * noise.div_(1 - self.p)


class Inverted(nn.Module):
    """InvertedResidual of MobileNetV2 and V3, MBConv of EfficientNet."""

    def __init__(self, i, o, s, expand, act=nn.ReLU6, se=None, name="conv", drop=None, k=3):
        super().__init__()
        layers = [] if expand == 1 else [ConvNorm(i, i * expand, 1, act=act)]
        i *= expand
        layers.append(ConvNorm(i, i, k, s, act=act, groups=i))
        layers += [se(i, max(i // 4, 2))] if se else []
        layers += [*ConvNorm(i, o, 1, act=None)] if name == "conv" else [ConvNorm(i, o, 1, act=None)]
        self.add_module(name, nn.Sequential(*layers))
        self.name, self.add = name, s == 1 and i // expand == o
        if drop:
            self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x):
        out = getattr(self, self.name)(x)
        if self.add:
            out = self.stochastic_depth(out) if hasattr(self, "stochastic_depth") else out
            out += x
        return out


class MobileNet(nn.Module):
    def __init__(self, act, last, blocks, mean=False):
        super().__init__()
        self.features = nn.Sequential(ConvNorm(3, 8, 3, 2, act=act), *blocks, ConvNorm(8, 16, 1, act=act))
        self.avgpool, self.mean = nn.AdaptiveAvgPool2d(1), mean
        self.classifier = nn.Sequential(*last)

    def forward(self, x):
        x = self.features(x)
        if self.mean:
            return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))
        x = self.avgpool(x)
        return self.classifier(x.view(x.shape[0], -1))


def mobilenet_v3():
    se = partial(SqueezeExcitation, scale=nn.Hardsigmoid)
    more = dict(act=nn.Hardswish, name="block", k=5)
    blocks = [Inverted(8, 8, 1, 1, nn.ReLU, se, "block"), Inverted(8, 8, 2, 3, se=se, **more),
              Inverted(8, 8, 1, 3, se=se, **more)]
    last = [nn.Linear(16, 12), nn.Hardswish(inplace=True), nn.Dropout(0.2, True), nn.Linear(12, 5)]
    return MobileNet(nn.Hardswish, last, blocks)


def mobilenet_v2():
    blocks = [Inverted(8, 8, 1, 1), Inverted(8, 8, 2, 3), Inverted(8, 8, 1, 3)]
    return MobileNet(nn.ReLU6, [nn.Dropout(0.2), nn.Linear(16, 5)], blocks, mean=True)


def efficientnet():
    se = partial(SqueezeExcitation, activation=partial(nn.SiLU, inplace=True))
    more = dict(act=nn.SiLU, se=se, name="block", drop=0.1)
    blocks = [Inverted(8, 8, 1, 1, **more), Inverted(8, 8, 2, 3, **more), Inverted(8, 8, 1, 3, **more)]
    return MobileNet(nn.SiLU, [nn.Dropout(0.2, True), nn.Linear(16, 5)], blocks)


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(i), nn.ReLU(inplace=True)
        self.conv1, self.norm2 = conv(i, 2 * growth, 1), nn.BatchNorm2d(2 * growth)
        self.relu2, self.conv2 = nn.ReLU(inplace=True), conv(2 * growth, growth)
        self.drop_rate = 0.3

    def forward(self, given):
        out = self.conv1(self.relu1(self.norm1(torch.cat(given, 1))))
        out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, p=self.drop_rate, training=self.training)


class DenseBlock(nn.ModuleDict):
    def __init__(self, count, i, growth):
        super().__init__({f"denselayer{n + 1}": DenseLayer(i + n * growth, growth) for n in range(count)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        transition = OrderedDict(norm=nn.BatchNorm2d(16), relu=nn.ReLU(True), conv=conv(16, 8, 1), pool=nn.AvgPool2d(2, 2))
        self.features = nn.Sequential(OrderedDict(
            conv0=conv(3, 8, 7, 2), norm0=nn.BatchNorm2d(8), relu0=nn.ReLU(inplace=True), pool0=nn.MaxPool2d(3, 2, 1),
            denseblock1=DenseBlock(2, 8, 4), transition1=nn.Sequential(transition), denseblock2=DenseBlock(2, 8, 4),
            norm5=nn.BatchNorm2d(16)))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class BasicConv2d(nn.Module):
    def __init__(self, i, o, **more):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, bias=False, **more), nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch1x1, self.branch5x5_1 = BasicConv2d(i, 4, kernel_size=1), BasicConv2d(i, 3, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(3, 5, kernel_size=5, padding=2)
        self.branch7x7 = BasicConv2d(i, 4, kernel_size=(1, 7), padding=(0, 3))
        self.branch_pool = BasicConv2d(i, 3, kernel_size=1)

    def forward(self, x):
        pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        outputs = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), self.branch7x7(x), pool]
        return torch.cat(outputs, 1)


class InceptionB(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch3x3 = BasicConv2d(i, 4, kernel_size=3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.maxpool1 = BasicConv2d(3, 6, kernel_size=3, stride=2), nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_6a = InceptionA(6), InceptionB(16)
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(), nn.Linear(20, 5)

    def forward(self, x):
        x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        x = self.maxpool1(self.Conv2d_1a_3x3(torch.cat((x_ch0, x_ch1, x_ch2), 1)))
        x = self.avgpool(self.Mixed_6a(self.Mixed_5b(x)))
        return self.fc(torch.flatten(self.dropout(x), 1))


class GoogLeBlock(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch1 = BasicConv2d(i, 4, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(i, 3, kernel_size=1), BasicConv2d(3, 4, kernel_size=3, padding=1))
        pool = nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True)
        self.branch4 = nn.Sequential(pool, BasicConv2d(i, 4, kernel_size=1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = BasicConv2d(3, 6, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a, self.aux1 = GoogLeBlock(6), None
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(12, 5)

    def forward(self, x):
        x = self.inception3a(self.maxpool1(self.conv1(x)))
        if self.aux1 is not None and self.training:
            x = self.aux1(x)
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def channel_shuffle(x, groups):
    n, c, height, width = x.size()
    x = x.view(n, groups, c // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(n, c, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.stride, half = stride, o // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(conv(i, i, 3, stride, groups=i), nn.BatchNorm2d(i), *ConvNorm(i, half, 1))
        i = i if stride > 1 else half
        self.branch2 = nn.Sequential(*ConvNorm(i, half, 1), conv(half, half, 3, stride, groups=half),
                                     nn.BatchNorm2d(half), *ConvNorm(half, half, 1))

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.maxpool = ConvNorm(3, 6, 3, 2), nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(ShuffleUnit(6, 12, 2), ShuffleUnit(12, 12, 1))
        self.conv5, self.fc = ConvNorm(12, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv5(self.stage2(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class CNBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim), Permute([0, 2, 3, 1]), nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), Permute([0, 3, 1, 2]))
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1) * 0.3)
        self.stochastic_depth = StochasticDepth(0.1)

    def forward(self, x):
        result = self.layer_scale * self.block(x)
        return self.stochastic_depth(result) + x


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        norm = partial(LayerNorm2d, eps=1e-6)
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 4, 4), norm(6)), nn.Sequential(CNBlock(6), CNBlock(6)),
            nn.Sequential(norm(6), nn.Conv2d(6, 10, 2, 2)), nn.Sequential(CNBlock(10)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(norm(10), nn.Flatten(1), nn.Linear(10, 5))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)))


class DoubleConv(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.double_conv = nn.Sequential(*ConvNorm(i, o), *ConvNorm(o, o))

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, i, o, bilinear):
        super().__init__()
        self.up = nn.ConvTranspose2d(i, i // 2, kernel_size=2, stride=2)
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(i + i // 2 if bilinear else i, o)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, bilinear=False):
        super().__init__()
        self.inc = DoubleConv(1, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.up1, self.up2, self.outc = Up(16, 8, bilinear), Up(8, 4, bilinear), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.up1(self.down2(x2), x2)
        return self.outc(self.up2(x, x1))


class EncoderBlock(nn.Module):
    """torchvision's, of its ViT."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, dim), nn.Dropout(0.1))

    def forward(self, input):
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_size, self.patch_size, self.hidden_dim = 12, 4, 8
        self.conv_proj = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, 10, 8).normal_(std=0.02))
        self.encoder.layers = nn.Sequential(OrderedDict(
            (f"encoder_layer_{i}", EncoderBlock(8, 2)) for i in range(2)))
        self.encoder.ln = nn.LayerNorm(8)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(8, 5)))

    def forward(self, x):
        n, c, h, w = x.shape
        p = self.patch_size
        torch._assert(h == self.image_size, "Wrong image height!")
        x = self.conv_proj(x).reshape(n, self.hidden_dim, (h // p) * (w // p)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.encoder.ln(self.encoder.layers(x + self.encoder.pos_embedding))
        return self.heads(x[:, 0])


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, i, hidden, act=nn.GELU):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(i, hidden), act(), nn.Linear(hidden, i)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """timm's, of its vision transformers."""

    def __init__(self, dim, heads, fused=True):
        super().__init__()
        self.num_heads, self.fused, self.scale = heads, fused, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, c)))


class SwinBlock(nn.Module):
    """A block with shifted windows, as torchvision has it."""

    def __init__(self, dim=8, heads=2, window=2, shift=1, size=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.window, self.shift, self.heads = window, shift, heads
        self.attn.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None]).permute(1, 2, 0) + window - 1
        index = (apart[..., 0] * (2 * window - 1) + apart[..., 1]).flatten()
        self.attn.register_buffer("relative_position_index", index)
        self.stochastic_depth, self.mlp = StochasticDepth(0.1), Mlp(dim, 12)

    def attention(self, x):
        b, h, w, c = x.shape
        n = self.window
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b * (h // n) * (w // n), n * n, c)
        qkv = self.attn.qkv(x).reshape(x.size(0), x.size(1), 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (c // self.heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.attn.relative_position_bias_table[self.attn.relative_position_index]
        attn = attn + bias.view(n * n, n * n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        mask = x.new_zeros((h, w))
        edges = ((0, -n), (-n, -self.shift), (-self.shift, None))
        for i, (a, z) in enumerate(edges):
            for j, (e, f) in enumerate(edges):
                mask[a:z, e:f] = 3 * i + j
        mask = mask.view(h // n, n, w // n, n).permute(0, 2, 1, 3).reshape((h // n) * (w // n), n * n)
        mask = mask.unsqueeze(1) - mask.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        attn = attn.view(x.size(0) // mask.size(0), mask.size(0), self.heads, n * n, n * n)
        attn = (attn + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, n * n, n * n)
        x = attn.softmax(dim=-1).matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), c)
        x = self.attn.proj(x).view(b, h // n, w // n, n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))

    def forward(self, x):
        x = x + self.stochastic_depth(self.attention(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class TimmBlock(nn.Module):
    """Of timm's vision transformer, with its LayerScale."""

    def __init__(self, dim=8, fused=True):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, 2, fused)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 12)
        self.gamma = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.gamma
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(dim, eps=1e-6), Mlp(tokens, 6)
        self.norm2, self.mlp_channels = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 12)

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Module()
        self.stem.proj = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(9, 8), MixerBlock(9, 8))
        self.norm, self.head = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem.proj(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.start_conv = nn.Conv1d(2, 6, 1)
        self.filter_convs, self.gate_convs = nn.ModuleList(), nn.ModuleList()
        self.residual_convs, self.skip_convs = nn.ModuleList(), nn.ModuleList()
        self.dilations = (1, 2, 4)
        for d in self.dilations:
            self.filter_convs.append(nn.Conv1d(6, 6, 2, dilation=d))
            self.gate_convs.append(nn.Conv1d(6, 6, 2, dilation=d))
            self.residual_convs.append(nn.Conv1d(6, 6, 1))
            self.skip_convs.append(nn.Conv1d(6, 8, 1))
        self.end_conv_1, self.end_conv_2 = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x):
        x, skip = self.start_conv(x), 0
        for i, d in enumerate(self.dilations):
            residual = x
            gated = torch.tanh(self.filter_convs[i](x)) * torch.sigmoid(self.gate_convs[i](x))
            s = self.skip_convs[i](gated)
            try:
                skip = skip[:, :, -s.size(2):]
            except TypeError:
                skip = 0
            skip = s + skip
            x = self.residual_convs[i](gated) + residual[:, :, d:]
        return self.end_conv_2(F.relu(self.end_conv_1(F.relu(skip))))


class BiLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(11, 6), nn.Dropout(0.5)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(10, 3)

    def forward(self, text):
        output, (hidden, cell) = self.lstm(self.dropout(self.embedding(text)))
        return self.fc(self.dropout(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)))


class PositionalEncoding(nn.Module):
    def __init__(self, dim, most=12):
        super().__init__()
        at, pe = torch.arange(most).unsqueeze(1), torch.zeros(1, most, dim)
        step = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(at * step), torch.cos(at * step)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return self.dropout(x + self.pe[:, : x.size(1)])


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.src_tok_emb, self.tgt_tok_emb = nn.Embedding(9, 8), nn.Embedding(10, 8)
        self.positional_encoding = PositionalEncoding(8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 12, 0.1, batch_first=True)
        self.generator = nn.Linear(8, 10)

    def forward(self, src, trg):
        src = self.positional_encoding(self.src_tok_emb(src.long()) * math.sqrt(8))
        tgt = self.positional_encoding(self.tgt_tok_emb(trg.long()) * math.sqrt(8))
        mask = nn.Transformer.generate_square_subsequent_mask(trg.size(1))
        return self.generator(self.transformer(src, tgt, tgt_mask=mask))


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, heads, flash, block=9):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.resid_dropout, self.n_head, self.n_embd, self.flash = nn.Dropout(0.1), heads, dim, flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))


class GPTBlock(nn.Module):
    def __init__(self, dim, flash):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim, bias=False), CausalSelfAttention(dim, 2, flash)
        self.ln_2, self.mlp = nn.LayerNorm(dim), nn.Module()
        self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj = nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, flash=True):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(11, 8), wpe=nn.Embedding(9, 8), drop=nn.Dropout(0.1),
            h=nn.ModuleList([GPTBlock(8, flash) for _ in range(2)]), ln_f=nn.LayerNorm(8, bias=False)))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        b, t = idx.size()
        assert t <= 9, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def ups(*sizes):
    made = []
    for n, (i, o, k, s, p) in enumerate(sizes):
        last = n == len(sizes) - 1
        made.append(nn.ConvTranspose2d(i, o, k, s, p, bias=False))
        made += [nn.Tanh()] if last else [nn.BatchNorm2d(o), nn.ReLU(True)]
    return nn.Sequential(*made)


class DCGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.ngpu, self.main = 0, ups((10, 8, 4, 1, 0), (8, 6, 4, 2, 1), (6, 3, 4, 2, 1))

    def forward(self, input):
        return self.main(input)


class VAEDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder_input, self.decoder = nn.Linear(6, 8 * 4), ups((8, 6, 3, 2, 1), (6, 6, 3, 2, 1))
        self.final_layer = nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.LeakyReLU(), nn.Tanh())

    def forward(self, z):
        return self.final_layer(self.decoder(self.decoder_input(z).view(-1, 8, 2, 2)))


class STN3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 9)

    def forward(self, x):
        batchsize = x.size()[0]
        x = torch.max(F.relu(self.bn1(self.conv1(x))), 2, keepdim=True)[0].view(-1, 6)
        x = self.fc2(F.relu(self.fc1(x)))
        iden = torch.eye(3).view(1, 9).repeat(batchsize, 1)
        return (x + iden).view(-1, 3, 3)


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stn, self.conv1, self.bn1 = STN3d(), nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        trans = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        x = torch.max(F.relu(self.bn1(self.conv1(x))), 2)[0]
        return F.log_softmax(self.fc(x), dim=1), trans


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn1 = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
        self.fc1 = nn.Sequential(nn.Linear(4 * 30, 7), nn.ReLU(inplace=True), nn.Linear(7, 5))
        self.fc2 = nn.Linear(5, 1)

    def forward_once(self, x):
        output = self.cnn1(x)
        return self.fc1(output.view(output.size()[0], -1))

    def forward(self, input1, input2):
        return torch.sigmoid(self.fc2(torch.abs(self.forward_once(input1) - self.forward_once(input2))))


NETS = {
    "ResNet-18": (ResNet, (3, 33, 29)),
    "ResNet-50": (partial(ResNet, True), (3, 33, 29)),
    "ResNeXt": (partial(ResNet, True, 4), (3, 33, 29)),
    "VGG": (vgg, (3, 56, 56)),
    "AlexNet": (alexnet, (3, 227, 227)),
    "SqueezeNet": (squeezenet, (3, 35, 31)),
    "MobileNetV2": (mobilenet_v2, (3, 17, 23)),
    "MobileNetV3": (mobilenet_v3, (3, 17, 23)),
    "DenseNet": (DenseNet, (3, 35, 31)),
    "Inception": (Inception, (3, 35, 31)),
    "GoogLeNet": (GoogLeNet, (3, 35, 31)),
    "ShuffleNet": (ShuffleNet, (3, 33, 29)),
    "EfficientNet": (efficientnet, (3, 17, 23)),
    "ConvNeXt": (ConvNeXt, (3, 24, 16)),
    "U-Net": (UNet, (1, 18, 13)),
    "ViT": (ViT, (3, 12, 12)),
    "Swin": (SwinBlock, (6, 6, 8)),
    "MLP-Mixer": (Mixer, (3, 12, 12)),
    "WaveNet": (WaveNet, (2, 19)),
    "BiLSTM": (BiLSTM, (7,)),
    "Transformer": (Seq2Seq, ((7,), (5,))),
    "nanoGPT": (GPT, (9,)),
    "DCGAN": (DCGAN, (10, 1, 1)),
    "VAE decoder": (VAEDecoder, (6,)),
    "PointNet": (PointNet, (3, 14)),
    "Siamese": (Siamese, ((1, 5, 6), (1, 5, 6))),
}
MORE = {
    "U-Net, bilinear": (partial(UNet, True), (1, 16, 12)),
    "timm block": (TimmBlock, (7, 8)),
    "timm block, unfused": (partial(TimmBlock, 8, False), (7, 8)),
    "nanoGPT, slow": (partial(GPT, False), (7,)),
    "Swin, unshifted": (partial(SwinBlock, shift=0), (6, 6, 8)),
}
INTEGERS = {"BiLSTM", "Transformer", "nanoGPT", "nanoGPT, slow"}


def made(name, seed=0):
    """A net with statistics and biases away from 0 and 1, and inputs for it."""
    make, shapes = (NETS | MORE)[name]
    torch.manual_seed(seed)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    for value in net.parameters():
        if value.ndim < 2:
            value.data += torch.randn_like(value) * 0.2
    shapes = shapes if isinstance(shapes[0], tuple) else (shapes,)
    whole = name in INTEGERS
    return net, [torch.randint(0, 9, (3, *s)) if whole else torch.randn(3, *s) for s in shapes]


class Net(nn.Module):
    """What a function does, with modules and parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *xs):
        return self.function(self, *xs)
