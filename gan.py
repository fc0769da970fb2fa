"""Networks of generators that no library has, reading the files they were published in.

    generator = biggan('BigBiGAN_x1.pth')              # or a folder: config.json and model.safetensors
    image = generator(z)                               # (B, 120) -> (B, 3, 128, 128) in -1..1

All are in eval mode with parameters frozen, and differentiable in their latents.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Fail
from files import load_checkpoint, load_json


# ---------------------------------------------------------------------------------------------------
# BigGAN with a hierarchical latent (Brock et al. 2019), of which BigBiGAN's generator is one

class ConditionalNorm(nn.Module):
    """Batch norm whose scale 1 + gain(y) and shift bias(y) are linear in the condition."""

    def __init__(self, channels, condition):
        super().__init__()
        self.gain, self.bias = (nn.Linear(condition, channels, bias=False) for _ in range(2))
        self.register_buffer('stored_mean', torch.zeros(channels))
        self.register_buffer('stored_var', torch.ones(channels))

    def forward(self, x, y):
        x = F.batch_norm(x, self.stored_mean, self.stored_var, training=self.training, eps=1e-4)
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
    def __init__(self, inputs, outputs, condition, up):
        super().__init__()
        self.up = up
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn1, self.bn2 = ConditionalNorm(inputs, condition), ConditionalNorm(outputs, condition)
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
    attention: the block that self-attention follows, or None. chunk: dimensions of a chunk. shared: of the vector."""

    def __init__(self, widths, up, attention=None, chunk=20, shared=128):
        super().__init__()
        self.chunks, self.chunk, self.resolution = len(widths), chunk, 4 * 2 ** sum(map(bool, up))
        self.register_buffer('shared', torch.zeros(shared))  # the condition of all images, unless another is given
        self.linear = nn.Linear(chunk, widths[0] * 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Block(widths[k], widths[k + 1], shared + chunk, up[k]),
                           *([Attention(widths[k + 1])] if k == attention else [])]) for k in range(len(up)))
        self.output_layer = nn.Sequential(Norm(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z, shared=None):
        """z (B, chunks x chunk), shared (B, shared) or None -> (B, 3, resolution, resolution) in -1..1."""
        first, *chunks = z.split(self.chunk, 1)
        shared = self.shared.expand(len(z), -1) if shared is None else shared
        x = self.linear(first).unflatten(1, (-1, 4, 4))
        for layers, chunk in zip(self.blocks, chunks):
            for layer in layers:
                x = layer(x, torch.cat([shared, chunk], 1))
        return torch.tanh(self.output_layer(x))


BIGBIGAN = dict(widths=[1536, 1536, 768, 384, 192, 96], up=[1, 1, 1, 1, 1], attention=3, chunk=20, shared=128)


def fold_spectral_norm(state):
    """Weights divided by their largest singular value as the published code estimates it in eval mode: one power step
    from the stored vector u0 (`sv0`, a log, was never filled). Changes `state` and returns it."""
    for name in [key.removesuffix('.u0') for key in state if key.endswith('.u0')]:
        weight, u = state[f'{name}.weight'].flatten(1), state.pop(f'{name}.u0')
        state.pop(f'{name}.sv0', None)
        v = F.normalize(u @ weight, eps=1e-4)
        u = F.normalize(v @ weight.T, eps=1e-4)
        state[f'{name}.weight'] = state[f'{name}.weight'] / (v @ weight.T @ u.T).squeeze()
    return state


def biggan(path):
    """BigGAN of a file in the layout of BigBiGAN_x1.pth (128 px), or of a folder with config.json (BigGAN's arguments)
    and model.safetensors. Raises Fail for what is not one."""
    path = Path(path)
    if path.is_dir():
        config, state = load_json(path / 'config.json'), load_checkpoint(path / 'model.safetensors')
    else:
        config, state = BIGBIGAN, load_checkpoint(path)
        if not isinstance(state, dict) or 'shared.weight' not in state or 'linear.u0' not in state:
            raise Fail(f'{path}: is not the state dict of a BigBiGAN generator (no shared.weight, linear.u0)')
        if (state['shared.weight'] != state['shared.weight'][:1]).any():
            raise Fail(f'{path}: is conditioned on classes: the rows of shared.weight differ, which they do not in '
                       'BigBiGAN')
        state = fold_spectral_norm({**state, 'shared': state['shared.weight'][0]})
        del state['shared.weight']
    return filled(path, lambda: BigGAN(**config), {key: value.float() for key, value in state.items()})


def filled(path, make, state):
    """The network make() with `state`, in eval mode, frozen."""
    try:
        with torch.device('meta'):
            network = make()
        network.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise Fail(f'{path}: does not fit its network: ' + ' '.join(str(error).split())[:200]) from None
    return network.eval().requires_grad_(False)
