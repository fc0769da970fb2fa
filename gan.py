"""GAN generators that no library has, reading the files they were published in without running what these hold.

    generator = biggan('BigBiGAN_x1.pth')              # or a folder: config.json and model.safetensors
    image = generator(z)                               # (B, 120) -> (B, 3, 128, 128) in -1..1
    generator = icgan('G_ema_best0.pth')               # or a folder
    image = generator(z, feature)                      # (B, 119), (B, 2048) -> (B, 3, 256, 256)
    generator = stylegan2('stylegan2-car-config-f.pkl')
    image = generator.synthesis(generator.mapping(z)[:, None].expand(-1, generator.num_ws, -1))

All are in eval mode with parameters frozen, and differentiable in their latents.
"""
import io
import math
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import Fail
from files import load_checkpoint, load_json, unreadable


# ---------------------------------------------------------------------------------------------------
# BigGAN with a hierarchical latent (Brock et al. 2019), of which the generators of BigBiGAN and IC-GAN are two

class ConditionalNorm(nn.Module):
    """Batch norm whose scale 1 + gain(y) and shift bias(y) are linear in the condition."""

    def __init__(self, channels, condition, eps):
        super().__init__()
        self.eps = eps
        self.gain, self.bias = (nn.Linear(condition, channels, bias=False) for _ in range(2))
        self.register_buffer('stored_mean', torch.zeros(channels))
        self.register_buffer('stored_var', torch.ones(channels))

    def forward(self, x, y):
        x = F.batch_norm(x, self.stored_mean, self.stored_var, training=self.training, eps=self.eps)
        return x * (1 + self.gain(y))[:, :, None, None] + self.bias(y)[:, :, None, None]


class Norm(nn.Module):
    """Batch norm under the published names."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer('stored_mean', torch.zeros(channels))
        self.register_buffer('stored_var', torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.stored_mean, self.stored_var, self.gain, self.bias, self.training)


class Block(nn.Module):
    def __init__(self, inputs, outputs, condition, up, eps):
        super().__init__()
        self.up = up
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn1, self.bn2 = ConditionalNorm(inputs, condition, eps), ConditionalNorm(outputs, condition, eps)
        self.conv_sc = nn.Conv2d(inputs, outputs, 1) if up or inputs != outputs else nn.Identity()

    def forward(self, x, y):
        h = F.relu(self.bn1(x, y))
        if self.up:
            h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        return self.conv2(F.relu(self.bn2(self.conv1(h), y))) + self.conv_sc(x)


class Attention(nn.Module):
    """Self-attention as in BigGAN's code: no division by the root of the width, keys and values pooled by 2."""

    def __init__(self, channels):
        super().__init__()
        for name, sizes in dict(theta=(channels, channels // 8), phi=(channels, channels // 8),
                                g=(channels, channels // 2), o=(channels // 2, channels)).items():
            setattr(self, name, nn.Conv2d(*sizes, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        query = self.theta(x).flatten(2)
        key, value = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        seen = value @ (query.transpose(1, 2) @ key).softmax(2).transpose(1, 2)
        return self.gamma * self.o(seen.unflatten(2, x.shape[2:])) + x


class BigGAN(nn.Module):
    """Image from a latent of len(widths) chunks: the first is the input, chunk k the condition of block k - 1, behind a
    vector that all blocks share. Names as in PyTorch BigGAN (ajbrock), spectral norm folded into the weights.

    widths: channels of the input and of each block's output. up: which blocks double the side, from 4 pixels on.
    attention: the block that self-attention follows, or None. chunk: dimensions of a chunk. shared: of the vector.
    eps: of the blocks' batch norm.
    IC-GAN (Casanova et al. 2021): feature: dimensions of an instance feature, from which the vector is made. classes:
    (number of classes, dimensions) of an embedding that stands before it, or None. levels: the last of the feature's
    dimensions tells how noisy the others are, which are standardised by feature_mean and feature_std beforehand.
    layout: the vector joins the first chunk too, so that the feature tells what lies where (as in BigGAN-deep)."""

    def __init__(self, widths, up, attention=None, chunk=20, shared=128, feature=None, classes=None, levels=False,
                 layout=False, eps=1e-4):
        super().__init__()
        self.chunks, self.chunk, self.resolution = len(widths), chunk, 4 * 2 ** sum(map(bool, up))
        self.feature, self.classes, self.levels = feature, classes[0] if classes else 0, levels
        if feature:
            self.shared_feat = nn.Linear(feature, shared)
        else:
            self.register_buffer('shared', torch.zeros(shared))  # the condition of all images
        if classes:
            self.shared = nn.Embedding(*classes)
        if levels:
            self.register_buffer('feature_mean', torch.zeros(feature - 1))
            self.register_buffer('feature_std', torch.ones(feature - 1))
        condition = shared + chunk + (classes[1] if classes else 0)
        self.layout, self.linear = layout, nn.Linear(condition if layout else chunk, widths[0] * 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Block(widths[k], widths[k + 1], condition, up[k], eps),
                           *([Attention(widths[k + 1])] if k == attention else [])]) for k in range(len(up)))
        self.output_layer = nn.Sequential(Norm(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z, feature=None, labels=None):
        """z (B, chunks x chunk), feature (B, feature) and labels (B,) where there are some -> (B, 3, resolution,
        resolution) in -1..1."""
        first, *chunks = z.split(self.chunk, 1)
        shared = self.shared.expand(len(z), -1) if feature is None else self.shared_feat(feature)
        if labels is not None:
            shared = torch.cat([self.shared(labels), shared], 1)
        x = self.linear(torch.cat([shared, first], 1) if self.layout else first).unflatten(1, (-1, 4, 4))
        for layers, chunk in zip(self.blocks, chunks):
            for layer in layers:
                x = layer(x, torch.cat([shared, chunk], 1))
        return torch.tanh(self.output_layer(x))


BIGBIGAN = dict(widths=[1536, 1536, 768, 384, 192, 96], up=[1, 1, 1, 1, 1], attention=3, chunk=20, shared=128)


def fold_spectral_norm(state, eps):
    """Weights divided by their largest singular value as the published codes estimate it in eval mode: one power step
    from the stored vector u0 (`sv0` is a log: never filled in BigBiGAN, an average in IC-GAN). Changes `state` and
    returns it."""
    for name in [key.removesuffix('.u0') for key in state if key.endswith('.u0')]:
        weight, u = state[f'{name}.weight'].flatten(1), state.pop(f'{name}.u0')
        state.pop(f'{name}.sv0', None)
        v = F.normalize(u @ weight, eps=eps)
        u = F.normalize(v @ weight.T, eps=eps)
        state[f'{name}.weight'] = state[f'{name}.weight'] / (v @ weight.T @ u.T).squeeze()
    return state


def biggan(path):
    """BigGAN of a file in the layout of BigBiGAN_x1.pth (128 px), or of a folder with config.json (BigGAN's arguments)
    and model.safetensors. Raises Fail for what is not one."""
    path = Path(path)
    if path.is_dir():
        network = _embedded(path)
        if network.feature:
            raise Fail(f'{path}: is conditioned on features of images; gen_views.py generator.kind=icgan takes it')
        return network
    state = load_checkpoint(path)
    if not isinstance(state, dict) or 'shared.weight' not in state or 'linear.u0' not in state:
        raise Fail(f'{path}: is not the state dict of a BigBiGAN generator (no shared.weight, linear.u0)')
    if (state['shared.weight'] != state['shared.weight'][:1]).any():
        raise Fail(f'{path}: is conditioned on classes: the rows of shared.weight differ, which they do not in '
                   'BigBiGAN')
    state = {**state, 'shared': state['shared.weight'][0]}
    del state['shared.weight']
    return filled(path, lambda: BigGAN(**BIGBIGAN), state)


def _embedded(folder):
    config = load_json(folder / 'config.json')
    return filled(folder, lambda: BigGAN(**config), load_checkpoint(folder / 'model.safetensors'))


def icgan(path):
    """IC-GAN's generator of a published file (G_ema_best0.pth or G_ema_best1.pth of any resolution, capacity and kind:
    shapes tell), or of a folder as `biggan` reads it. Raises Fail for what is not one."""
    path = Path(path)
    if path.is_dir():
        network = _embedded(path)
        if not network.feature:
            raise Fail(f'{path}: its config.json names no feature: a BigGAN that no feature conditions')
        return network
    mend = 'of the published files give G_ema_best0.pth or G_ema_best1.pth'
    try:
        state = load_checkpoint(path)
    except Fail as error:  # state_dict_best0.pth, of the training, holds an activation
        raise Fail(f'{error}; {mend}' if 'whose code' in str(error) else error) from None
    if not isinstance(state, dict) or not {'shared_feat.u0', 'shared_feat.weight', 'linear.u0'} <= state.keys():
        raise Fail(f'{path}: is not the state dict of an IC-GAN generator (no shared_feat.weight, linear.u0); {mend}')
    return filled(path, lambda: BigGAN(**_icgan_sizes(state)), state, eps=1e-6)


def _icgan_sizes(state):
    """BigGAN's arguments for IC-GAN's state dict, from which an embedding of classes goes that no block sees."""
    sizes = lambda name: state[f'{name}.weight'].shape
    blocks = [k for k in range(len(state)) if f'blocks.{k}.0.conv1.weight' in state]
    (shared, feature), chunk = sizes('shared_feat'), sizes('linear')[1]
    labelled = sizes('blocks.0.0.bn1.gain')[1] > shared + chunk
    if not labelled:
        state.pop('shared.weight', None)
    return dict(widths=[sizes('linear')[0] // 16, *(sizes(f'blocks.{k}.0.conv1')[0] for k in blocks)],
                up=[1] * len(blocks), chunk=chunk, shared=shared, feature=feature, eps=1e-5,
                attention=next((k for k in blocks if f'blocks.{k}.1.gamma' in state), None),
                classes=list(sizes('shared')) if labelled else None)


def filled(path, make, state, eps=1e-4):
    """The network make() with `state`, in eval mode, frozen. eps: see fold_spectral_norm."""
    try:
        with torch.device('meta'):
            network = make()
        state = {name: value.float() for name, value in state.items()}
        network.load_state_dict(fold_spectral_norm(state, eps), assign=True)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise Fail(f'{path}: does not fit its network: ' + ' '.join(str(error).split())[:200]) from None
    return network.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------
# StyleGAN2 (Karras et al. 2020), configs e and f, with the names of NVlabs/stylegan3

def _filter():
    """The low-pass filter (1, 3, 3, 1) / 8 in both directions."""
    return torch.tensor([[1., 3., 3., 1.], [3., 9., 9., 3.], [3., 9., 9., 3.], [1., 3., 3., 1.]]) / 64


class _Linear(nn.Module):
    """Linear layer; its weight is stored as that in effect * sqrt(inputs) / multiplier, its bias / multiplier."""

    def __init__(self, inputs, outputs, bias=0., multiplier=1.):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.multiplier = multiplier

    def forward(self, x):
        gain = self.multiplier / math.sqrt(self.weight.shape[1])
        return F.linear(x, self.weight * gain, self.bias * self.multiplier)


class _Mapping(nn.ModuleDict):
    """z (B, z_dim) -> w (B, W). z is divided by its RMS first: its length has no effect."""

    def __init__(self, widths):
        super().__init__({f'fc{i}': _Linear(*pair, multiplier=0.01) for i, pair in enumerate(zip(widths, widths[1:]))})
        self.register_buffer('w_avg', torch.zeros(widths[-1]))  # for truncation: w_avg + psi * (w - w_avg)

    def forward(self, z):
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.values():
            x = F.leaky_relu(layer(x), 0.2) * math.sqrt(2)
        return x


class _Conv(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU; `up` doubles the resolution to `resolution`."""

    def __init__(self, w_dim, inputs, outputs, resolution, up, clamp):
        super().__init__()
        self.affine = _Linear(w_dim, inputs, bias=1.)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer('noise_const', torch.randn(resolution, resolution))
        self.register_buffer('resample_filter', _filter())  # used with `up` alone, but in every file
        self.up, self.clamp = up, clamp

    def forward(self, x, w):
        style = self.affine(w)
        x = x * style[:, :, None, None]  # the same as to scale the weight, of which all samples then share one
        if self.up:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            kernel = 4 * self.resample_filter.flip((0, 1)).expand(x.shape[1], 1, 4, 4)
            x = F.conv2d(x, kernel, padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, self.weight, padding=1)
        norm = (style.square() @ self.weight.square().sum((2, 3)).T + 1e-8).rsqrt()
        x = x * norm[:, :, None, None] + self.noise_const * self.noise_strength + self.bias[:, None, None]
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        return x.clamp(-self.clamp, self.clamp) if self.clamp else x


class _ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation."""

    def __init__(self, w_dim, inputs, clamp):
        super().__init__()
        self.affine = _Linear(w_dim, inputs, bias=1.)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.clamp = clamp

    def forward(self, x, w):
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        x = F.conv2d(x * style[:, :, None, None], self.weight, self.bias)
        return x.clamp(-self.clamp, self.clamp) if self.clamp else x


class _Block(nn.Module):
    """One resolution: the first starts from a constant, each other from the block before, and their colours add up."""

    def __init__(self, w_dim, inputs, outputs, resolution, clamp):
        super().__init__()
        self.register_buffer('resample_filter', _filter())
        if inputs is None:
            self.const = nn.Parameter(torch.randn(outputs, 4, 4))
        else:
            self.conv0 = _Conv(w_dim, inputs, outputs, resolution, True, clamp)
        self.conv1 = _Conv(w_dim, outputs, outputs, resolution, False, clamp)
        self.torgb = _ToRGB(w_dim, outputs, clamp)

    def forward(self, x, image, ws):
        if x is None:
            x, image = self.const.expand(len(ws), -1, -1, -1), 0
        else:
            kernel = 4 * self.resample_filter.expand(3, 1, 4, 4)
            image = F.conv_transpose2d(image, kernel, stride=2, padding=1, groups=3)
            x = self.conv0(x, ws[:, -3])
        x = self.conv1(x, ws[:, -2])
        return x, image + self.torgb(x, ws[:, -1])


class _Synthesis(nn.ModuleDict):
    """ws (B, num_ws, W) -> images (B, 3, R, R). The colours of a block share their w with the next block's conv0."""

    def __init__(self, w_dim, channels, clamp):
        super().__init__({f'b{4 << i}': _Block(w_dim, inputs, outputs, 4 << i, clamp)
                          for i, (inputs, outputs) in enumerate(zip([None, *channels], channels))})
        self.shape = 2 * len(channels), w_dim

    def forward(self, ws):
        if ws.shape[1:] != self.shape:
            raise ValueError(f'ws: {tuple(ws.shape)} is not (B, {self.shape[0]}, {self.shape[1]})')
        x = image = None
        for i, block in enumerate(self.values()):
            x, image = block(x, image, ws[:, :2 * i + 2])
        return image


class StyleGAN2(nn.Module):
    """StyleGAN2 generator: `mapping`, z (B, z_dim) -> w (B, W), and `synthesis`, ws (B, num_ws, W) -> images
    (B, 3, R, R) of about -1..1. Both are differentiable; the noise is the stored one ('const'): nothing is random.

    widths: z_dim and the outputs of the mapping's layers, W the last. channels: of the blocks of 4, 8, 16, ... pixels.
    clamp: bound of activations and colours, where the network was trained with one. Starts from random weights.
    Attributes: z_dim, num_ws, resolution R (pixels). Call it in fp32, outside of autocast.

    Source: NVlabs/stylegan3, training/networks_stylegan2.py, whose state dict has the same entries."""

    def __init__(self, widths, channels, clamp=None):
        super().__init__()
        self.mapping, self.synthesis = _Mapping(widths), _Synthesis(widths[-1], channels, clamp)
        self.z_dim, self.num_ws, self.resolution = widths[0], 2 * len(channels), 2 << len(channels)


# Pickles of networks, read into containers of our own: their code does not run, nor do numpy's constructors

class _Shell(dict):
    """Keeps the items and the state of an object."""

    def __setstate__(self, state):
        self.update(state)


class _Dtype:
    def __init__(self, code, *_):
        self.code = re.fullmatch('[biuf][1248]', code) and code  # arrays of other than numbers get no value

    def __setstate__(self, state):
        self.code = self.code and state[1] + self.code


class _Array:
    """numpy's array or scalar; its numbers are in `value`."""

    def __init__(self, dtype=None, data=None):
        if dtype:
            self.__setstate__((1, (), dtype, False, data))

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if dtype.code:
            self.value = np.frombuffer(data, dtype.code).reshape(shape, order='F' if fortran else 'C')


PICKLED = {  # all that the pickle of a network may name
    'builtins.set': set, 'collections.OrderedDict': OrderedDict, 'numpy.ndarray': None, 'numpy.dtype': _Dtype,
    **{f'numpy.{core}.multiarray.{name}': make for core in ('core', '_core')
       for name, make in (('_reconstruct', lambda *_: _Array()), ('scalar', _Array))},
    'dnnlib.util.EasyDict': _Shell, 'dnnlib.tflib.network.Network': _Shell,
    'torch_utils.persistence._reconstruct_persistent_obj': lambda meta: meta['state'],  # beside it: source code
    'torch._utils._rebuild_parameter': lambda value, *_: value,
    'torch._utils._rebuild_tensor_v2': lambda *args: torch._utils._rebuild_tensor(*args[:4]),
    'torch.storage._load_from_bytes': lambda data: torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f'{module}.{name}' not in PICKLED:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return PICKLED[f'{module}.{name}']


def _torch_tensors(net, prefix=''):
    """{name: tensor} of a torch module as it was pickled."""
    found = {prefix + name: value for kind in ('_parameters', '_buffers') for name, value in net[kind].items()}
    for name, part in net['_modules'].items():
        found |= _torch_tensors(part, f'{prefix}{name}.')
    return found


def _tf_arrays(net, prefix=''):
    """{name: array} of a TensorFlow network as it was pickled."""
    found = {prefix + name: np.float32(value.value) for name, value in net['variables'] if name != 'lod'}
    for name, part in net['components'].items():
        found |= _tf_arrays(part, f'{prefix}{name}/')
    return found


# From the names of others to those of NVlabs/stylegan3. Convolutions count from 4 px on, two a resolution but there.
_conv = lambda n: f'synthesis.b{4 << (n + 1) // 2}.conv{(n + 1) % 2}'
ROSINALITY = (
    (r'^style\.(\d+)', lambda m: f'mapping.fc{int(m[1]) - 1}'), (r'^input\.input$', 'synthesis.b4.const'),
    (r'^conv1\.', 'synthesis.b4.conv1.'), (r'^convs\.(\d\d?)\.', lambda m: f'{_conv(int(m[1]) + 1)}.'),
    (r'^to_rgb1\.', 'synthesis.b4.torgb.'), (r'^to_rgbs\.(\d)\.', lambda m: f'synthesis.b{8 << int(m[1])}.torgb.'),
    (r'^noises\.noise_(\d\d?)$', lambda m: f'{_conv(int(m[1]))}.noise_const'), (r'\.conv\.modulation\.', '.affine.'),
    (r'\.conv\.weight$', '.weight'), (r'\.noise\.weight$', '.noise_strength'), (r'\.activate\.bias$', '.bias'),
    (r'(\.conv\.blur|\.torgb\.upsample)\.kernel$', '.resample_filter'), ('^latent_avg$', 'mapping.w_avg'))
TENSORFLOW = (
    (r'^dlatent_avg$', 'mapping.w_avg'), (r'^mapping/Dense(\d+)/', r'mapping.fc\1.'),
    (r'^synthesis/noise(\d\d?)$', lambda m: f'{_conv(int(m[1]))}.noise_const'),
    (r'^synthesis/(\d+)x\1/', r'synthesis.b\1.'), (r'\.Const/const$', '.const'), (r'\.Conv0_up/', '.conv0.'),
    (r'\.Conv1?/', '.conv1.'), (r'\.ToRGB/', '.torgb.'), (r'\.mod_', '.affine.'))
TORCH_MAGIC = bytes.fromhex('8a0a6cfc9c46f9206aa850192e')  # with which torch.save began before it wrote zip archives


def renamed(entries, rules):
    found = {}
    for name, value in entries.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def _from_tf(name, value):
    """A TensorFlow array, under its new name, as a tensor of our layout (NVlabs/stylegan3, legacy.py)."""
    if name.endswith('.weight'):
        value = value[::-1, ::-1] if name.endswith('conv0.weight') else value
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return torch.from_numpy(np.array(value + 1 if name.endswith('affine.bias') else value))


def _pickled(path):
    """What `_read` returns, of a pickle of NVlabs."""
    try:
        with open(path, 'rb') as file:
            content = _Unpickler(file).load()
    except Exception as error:
        names = re.findall(r'GLOBAL (\S+)', str(error))
        if names:
            raise Fail(f'{path}: holds objects of {names[0][:100]}, whose code would have to run to read it: load it '
                       'where you trust it and save the state_dict of G_ema alone') from None
        raise unreadable(path, error, what='the pickle of a network') from None
    if isinstance(content, tuple):  # of TensorFlow: generator, discriminator, mean generator
        state, settings = renamed(_tf_arrays(content[2]), TENSORFLOW), content[2]['static_kwargs']
        state = {name: _from_tf(name, value) for name, value in state.items()}
    else:
        mapping, synthesis = (content['G_ema']['_modules'][name]['_modules'] for name in ('mapping', 'synthesis'))
        dense, conv = mapping['fc0'], synthesis['b4']['_modules']['conv1']
        state, settings = _torch_tensors(content['G_ema']), {
            'mapping_nonlinearity': dense['activation'], 'mapping_lrmul': dense['bias_gain'],
            'nonlinearity': conv['activation'], 'conv_clamp': conv['conv_clamp']}
    for name, ours in (('mapping_nonlinearity', 'lrelu'), ('nonlinearity', 'lrelu'), ('mapping_lrmul', 0.01),
                       ('resample_kernel', [1, 3, 3, 1])):  # what no shape tells
        if settings.get(name, ours) != ours:
            raise Fail(f'{path}: a StyleGAN2 with {name} {str(settings[name])[:60]}, where only {ours} is known')
    return state, settings.get('conv_clamp')


def _read(path):
    """{NVlabs' name: tensor} of a file, and its clamp, which pickles alone tell."""
    head = b''
    with suppress(OSError), open(path, 'rb') as file:
        head = file.read(32)
    if head[:1] == b'\x80' and TORCH_MAGIC not in head and Path(path).suffix != '.safetensors':
        return _pickled(path)
    content = load_checkpoint(path)
    if 'g_ema' in content:
        state = renamed({**content['g_ema'], 'latent_avg': content.get('latent_avg')}, ROSINALITY)
        content = {k: v / 4 if k.endswith('_filter') else v for k, v in state.items()}  # with the gain of up-sampling
    return {k: v for k, v in content.items() if torch.is_tensor(v)}, None


def _listed(names):
    return ', '.join(sorted(names)[:6])[:400] + (f', ... ({len(names)})' if len(names) > 6 else '')


def stylegan2(path):
    """The generator in a file: a StyleGAN2 in evaluation mode whose parameters need no gradient. Shapes decide on
    resolution, channels and widths. The layout is known by its content:

    - rosinality/stylegan2-pytorch: {'g_ema': ..., 'latent_avg': ...} of torch.save;
    - the flat state dict of NVlabs' generator (`mapping.*`, `synthesis.*`), of torch.save or in a .safetensors;
    - NVlabs' .pkl, of stylegan3, stylegan2-ada-pytorch or TensorFlow, of which the mean generator (G_ema) is taken.

    Nothing in a file is run. Pickles tell their clamp; state dicts do not and get none.
    Raises Fail for what cannot be read, objects that would have to run, missing or unexpected entries, other shapes."""
    try:
        state, clamp = _read(path)
        last = max(int(m[1]) for m in (re.match(r'synthesis\.b(\d{1,4})\.', k) for k in state) if m)
        blocks, depth = last.bit_length() - 2, sum(bool(re.fullmatch(r'mapping\.fc\d+\.weight', k)) for k in state)
        size = lambda key, axis: (0, 0, 0, 0, *state[key].shape)[axis] if key in state else 0
        with torch.device('meta'):
            model = StyleGAN2(
                [size('mapping.fc0.weight', -1), *(size(f'mapping.fc{i}.weight', -2) for i in range(depth))],
                [size(f'synthesis.b{4 << i}.conv1.weight', -4) for i in range(blocks)], clamp and float(clamp))
    except Fail:
        raise
    except Exception:
        raise Fail(f"{path}: holds no StyleGAN2 of a known layout (rosinality's, or NVlabs' state dict or pickle)"
                   ) from None
    expected, one = model.state_dict(), lambda shape: [n for n in shape if n != 1]  # layouts differ in axes of size 1
    state = {k: _filter() for k in expected if k.endswith('_filter')} | state
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    shapes = [f'{k} {tuple(v.shape)} {v.dtype} for {tuple(expected[k].shape)}' for k, v in state.items()
              if not missing and k in expected and not (one(v.shape) == one(expected[k].shape) and v.numel()
              and v.is_floating_point() and v.layout is torch.strided and not v.is_meta)]
    problems = [f'{what} {_listed(keys)}' for what, keys in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys]
    if problems:
        raise Fail(f"{path}: no StyleGAN2 of {model.resolution} px: {'; '.join(problems)} (NVlabs' names)")
    model.load_state_dict({k: state[k].detach().float().reshape(v.shape).contiguous() for k, v in expected.items()},
                          assign=True)
    return model.eval().requires_grad_(False)
