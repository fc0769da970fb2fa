"""Pairs from the latent space of a GAN (COP-Gen, hierarchical-latent): drawing latents, moving them, making images.

    generator = LatentGenerator(spec, device)              # BigBiGAN, StyleGAN2
    moves = Moves({'1-5': {'std': 1.0, ...}}, generator)
    z = generator.anchors(seed, indices)                   # (B, dim)
    images = generator.images(generator.code(z))           # (B, 3, S, S) in 0..1, differentiable in z
    positives = generator.images(generator.moved(z, moves(z, seed, indices, 1)))
    anchors, positives = LatentPairs(spec, seed, size, device).images(indices)           # all of it

A latent consists of chunks that enter the network one after the other, from the whole to the details: BigGAN's parts of
z, StyleGAN2's four groups of rows of W. A move is a displacement of z for a range of them; what no move names stays.

Anchor i and its n-th positive are functions of (seed, i) and (seed, i, n): not of batches, processes or order.
"""
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gan
from augment import uniforms
from checkpoints import NORMALIZATIONS
from config import Fail
from files import load_checkpoint, save_checkpoint, unreadable, weights_checksum

BLOCK = 64              # samples whose images are made at once

# ---------------------------------------------------------------------------------------------------
# Random numbers

def uniform(seed, indices, stream, count):
    """(len(indices), count) float64 in the open interval (0, 1), a row from (seed, index, stream) alone."""
    return torch.from_numpy(uniforms(seed, np.asarray(indices, np.int64), stream, count))


def normal(numbers, truncation=0.0):
    """Uniform numbers -> standard normal ones, float32; with truncation those of a normal distribution that is cut off
    at +-truncation (scipy's truncnorm), so that the standard deviation is smaller than 1."""
    if truncation:
        low = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
        numbers = low + (1 - 2 * low) * numbers
    return torch.special.ndtri(numbers).float()


# ---------------------------------------------------------------------------------------------------
# Generators

class LatentGenerator:
    """A frozen GAN with a hierarchical latent.

    spec: `kind` (biggan | stylegan2), `model` (its file, or the folder of an embedded one), `truncation` of the anchors
    (0: none), `psi` (StyleGAN2: truncation in W), `crop` (pixels: the middle square that is kept, None: all).
    size: pixels a side of the images, None: as the network makes them."""

    def __init__(self, spec, device, size=None):
        self.hierarchy = (_BigGAN if spec['kind'] == 'biggan' else _StyleGAN2)(spec['model'], spec['psi'], device)
        self.device, self.truncation, self.crop, self.name = device, spec['truncation'], spec['crop'], spec['model']
        self.dim, self.chunks, whole = self.hierarchy.dim, self.hierarchy.chunks, self.hierarchy.network.resolution
        self.part, self.code, self.moved = self.hierarchy.part, self.hierarchy.code, self.hierarchy.moved
        if (self.crop or 1) > whole:
            raise Fail(f'latent.crop: {self.crop} is more than the {whole} pixels of {self.name}')
        self.size = size or self.crop or whole

    def anchors(self, seed, indices):
        """Latents (B, dim) of the anchors `indices`."""
        return normal(uniform(seed, indices, 0, self.dim), self.truncation).to(self.device)

    def images(self, code):
        """Images (B, 3, size, size) in 0..1."""
        x = self.hierarchy.synthesise(code)
        if self.crop:
            edge = (x.shape[3] - self.crop) // 2
            x = x[:, :, edge:edge + self.crop, edge:edge + self.crop]
        if x.shape[3] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode='bilinear', align_corners=False, antialias=True)
        return x.clamp(0, 1)


class _BigGAN:
    """Chunks are equal parts of z; chunk 0 is the input, the others condition a block each."""
    levels = 256                                         # uint8 is floor(256 x), COP-Gen's and GenRep's code

    def __init__(self, model, psi, device):
        if psi != 1:
            raise Fail('latent.psi: is StyleGAN2\'s truncation in W; of a BigGAN set latent.truncation')
        self.network = gan.biggan(model).to(device)
        self.chunks, self.width = self.network.chunks, self.network.chunk
        self.dim = self.chunks * self.width

    def part(self, z, first, last):
        """What a walker of the chunks first..last sees, and by what it displaces."""
        return z[:, first * self.width:(last + 1) * self.width]

    def code(self, z):
        """What `images` makes one of."""
        return z

    def moved(self, z, moves):
        """The code of z displaced. moves: {(first, last): displacement of part(z, first, last)}."""
        pieces = list(z.split(self.width, 1))
        for (first, last), shift in moves.items():
            for k, piece in zip(range(first, last + 1), shift.split(self.width, 1)):
                pieces[k] = pieces[k] + piece
        return torch.cat(pieces, 1)

    def synthesise(self, code):
        return (self.network(code) + 1) / 2

    def distances(self, code, other):
        """Euclidean distance of two codes within each chunk, (B, chunks)."""
        return (other - code).unflatten(1, (self.chunks, self.width)).norm(dim=2)


class _StyleGAN2:
    """Chunks are four groups of rows of W, all from one z: a displaced z is mapped anew and gives the rows of its
    chunks, the others stay (hierarchical-latent's code). W's rows enter one a layer."""
    chunks, levels = 4, 255

    def __init__(self, model, psi, device):
        self.network, self.psi = gan.stylegan2(model).to(device), psi
        self.dim, rows = self.network.z_dim, self.network.num_ws
        self.edges = [round(rows * k / 4) for k in range(5)]

    def part(self, z, first, last):
        return z

    def code(self, z):
        w = self.network.mapping(z)
        if self.psi != 1:                                # rounding: 1 shall change nothing
            w = self.network.mapping.w_avg.lerp(w, self.psi)
        return w[:, None].expand(-1, self.network.num_ws, -1)

    def moved(self, z, moves):
        rows = list(self.code(z).unbind(1))
        for (first, last), shift in moves.items():
            other = self.code(z + shift)
            for k in range(self.edges[first], self.edges[last + 1]):
                rows[k] = other[:, k]
        return torch.stack(rows, 1)

    def synthesise(self, code):
        return (self.network.synthesis(code) * 127.5 + 128) / 255

    def distances(self, code, other):
        parts = (other - code).split([b - a for a, b in zip(self.edges, self.edges[1:])], 1)
        return torch.stack([part.flatten(1).norm(dim=1) for part in parts], 1)


# ---------------------------------------------------------------------------------------------------
# Moves

class Walker(nn.Module):
    """T of COP-Gen (eq. 5): z (B, width) -> displacement (B, width), two linear layers.

    relu: between them (False: COP-Gen's linear variant). start: default (PyTorch's initialisation, COP-Gen's code) or
    small (weights of std 0.01, biases within 0.001: hierarchical-latent's)."""

    def __init__(self, width, relu=True, start='default'):
        super().__init__()
        self.width, self.relu, self.start = width, relu, start
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        for layer in self.layers if start == 'small' else ():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.uniform_(layer.bias, -0.001, 0.001)

    def forward(self, z, numbers=None):
        first, second = self.layers
        return second(F.relu(first(z)) if self.relu else first(z))


class Steering(nn.Module):
    """Directions that all latents share (Jahanian et al. 2021, as GenRep's code): displacement = sliders x directions.

    The sliders are those of EDITS; at generation they are drawn as in training, the 3-D rotation's times 5."""
    EDITS = ('rotation_3d', 'rotation', 'zoom', 'shift_x', 'shift_y', 'red', 'green', 'blue')
    NUMBERS = 9                                          # uniform numbers that a row of sliders takes

    def __init__(self, width):
        super().__init__()
        self.width, self.directions = width, nn.Parameter(torch.randn(len(self.EDITS), width) * 0.1)

    @staticmethod
    def sliders(numbers):
        """(B, 9) uniform -> (B, 8): rotations and shifts -1..1 in steps (of 10 degrees to 60, of 5 to 30, of a tenth),
        zoom log of U(1/4, 1) or U(1, 4) by coin, colours -0.5..0.5."""
        u = numbers.float()
        steps = lambda x, n: torch.floor(x * (2 * n + 1)).clamp(max=2 * n) / n - 1
        zoom = torch.where(u[:, 8] < 0.5, 0.25 + 0.75 * u[:, 2], 1 + 3 * u[:, 2]).log()
        return torch.stack([steps(u[:, 0], 6), steps(u[:, 1], 6), zoom, steps(u[:, 3], 10), steps(u[:, 4], 10),
                            *(u[:, 5:8] - 0.5).unbind(1)], 1)

    def forward(self, z, numbers):
        sliders = self.sliders(numbers).to(z.device)
        sliders[:, 0] *= 5
        return sliders @ self.directions


def chunk_range(name, chunks):
    """'1-5' or '3' -> (first, last)."""
    found = re.fullmatch(r'(\d+)(?:-(\d+))?', str(name))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < chunks:
        raise Fail(f"chunks: '{name}' is no chunk or range of chunks from 0 to {chunks - 1} (3, or 1-5)")
    return first, last


class Moves:
    """moves(z, seed, indices, number) -> {(first, last): displacement}, for LatentGenerator.moved.

    chunks: {range: {std, truncation, walker}}. With `walker` (a file of train_walker.py, or COP-Gen's navigator) the
    displacement is the walker's; else normal noise, cut off at +-truncation x std (0: not), of standard deviation std
    before that. Ranges of StyleGAN2 share one noise vector, as in hierarchical-latent's code. Raises Fail."""

    def __init__(self, chunks, generator):
        self.generator, self.parts, taken = generator, [], set()
        for name, spec in chunks.items():
            first, last = chunk_range(name, generator.chunks)
            if taken & set(range(first, last + 1)):
                raise Fail(f"chunks: '{name}' and another range share chunks; each may move once")
            taken |= set(range(first, last + 1))
            walker = None
            if not spec['walker'] and not spec['std']:
                raise Fail(f'chunks.{name}: nothing moves it; set its std or its walker, or leave it out')
            if spec['walker']:
                if spec['std']:
                    raise Fail(f"chunks.{name}: std is of noise, walker moves by itself; set one of the two")
                walker = load_walker(spec['walker'])
                width = generator.part(torch.zeros(1, generator.dim), first, last).shape[1]
                if walker.width != width:
                    raise Fail(f"chunks.{name}: {spec['walker']} is a walker of width {walker.width}, these chunks of "
                               f'{generator.name} have {width}')
                if walker.chunks not in (None, [first, last]):
                    raise Fail(f"chunks.{name}: {spec['walker']} was trained on the chunks "
                               f'{walker.chunks[0]}-{walker.chunks[1]}')
                if walker.weights not in (None, weights_checksum(generator.name)):
                    raise Fail(f"chunks.{name}: {spec['walker']} was trained on other weights than {generator.name}")
                walker.to(generator.device)
            self.parts.append(((first, last), spec['std'], spec['truncation'], walker))

    @torch.no_grad()
    def __call__(self, z, seed, indices, number):
        numbers, moves = uniform(seed, indices, number, self.generator.dim + Steering.NUMBERS), {}
        for (first, last), std, truncation, walker in self.parts:
            if walker:
                moves[first, last] = walker(self.generator.part(z, first, last), numbers[:, -Steering.NUMBERS:])
            else:
                part = self.generator.part(numbers[:, :-Steering.NUMBERS], first, last)
                moves[first, last] = std * normal(part, truncation).to(z.device)
        return moves


class LatentPairs:
    """Anchors and positives, and gen_views.py's interface to them (see generators.py).

    spec: as LatentGenerator's, with `chunks` (see Moves) and `discriminator` (a file of train_discriminator.py, or
    empty). With one, sample i is the better of two candidates, the latents 2 i and 2 i + 1, by the mean score of anchor
    and positive. (hierarchical-latent appendix E keeps the better half of a batch that was sampled twice; so a sample
    would depend on its batch.)"""

    def __init__(self, spec, seed, size, device):
        self.generator, self.seed = LatentGenerator(spec, device, size), seed
        self.moves, self.name, self.dtype = Moves(spec['chunks'], self.generator), spec['model'], torch.float32
        self.discriminator = load_discriminator(spec['discriminator']).to(device) if spec['discriminator'] else None

    @torch.no_grad()
    def images(self, indices, number=1):
        """Images in 0..1 (B, 3, size, size) of the anchors and of their positives `number`, which are the anchors where
        nothing moves. BLOCK samples at once: at 128 px an image takes some 85 MB (measured on a CPU)."""
        parts = [self._block(np.asarray(indices[at:at + BLOCK]), number) for at in range(0, len(indices), BLOCK)]
        return tuple(map(torch.cat, zip(*parts)))

    def _block(self, indices, number):
        if not self.discriminator:
            return self._made(indices, number)
        candidates = np.stack([2 * indices, 2 * indices + 1], 1).reshape(-1)
        first = self._made(candidates, 1)
        scores = sum(self.discriminator(images) for images in first).view(-1, 2)
        chosen = scores.argmax(1) + 2 * torch.arange(len(indices), device=scores.device)
        if number == 1:
            return tuple(images[chosen] for images in first)
        return self._made(candidates[chosen.cpu().numpy()], number)

    def _made(self, indices, number):
        generator, z = self.generator, self.generator.anchors(self.seed, indices)
        moves = self.moves(z, self.seed, indices, number)
        if not moves:
            return (generator.images(generator.code(z)),) * 2
        return generator.images(torch.cat([generator.code(z), generator.moved(z, moves)])).chunk(2)

    def views(self, embeddings, noise_levels, pairs):
        """pairs: of (i, n); (i, 0) is the anchor i, (i, n) its n-th positive. uint8 (B, size, size, 3) on the CPU,
        rounded as the papers' codes do."""
        indices, numbers = np.array(pairs).T
        images, left = torch.empty(len(pairs), 3, *[self.generator.size] * 2), np.ones(len(pairs), bool)
        for number in sorted(set(numbers), reverse=True):  # positives first: their anchors are made with them
            at = np.flatnonzero(left & (numbers == number))
            if not len(at):
                continue
            anchors, positives = self.images(indices[at], max(1, int(number)))
            images[at] = (positives if number else anchors).cpu()
            place = {index: k for k, index in enumerate(indices[at])}
            also = [k for k in np.flatnonzero(left & (numbers == 0)) if indices[k] in place]
            images[also] = anchors[[place[indices[k]] for k in also]].cpu()
            left[at] = left[also] = False
        if not images.isfinite().all():
            raise Fail(f'{self.name}: gave NaN: its weights, or a walker, are damaged')
        levels = self.generator.hierarchy.levels
        return (images * levels).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


class Discriminator(nn.Sequential):
    """Images (B, 3, S, S) in 0..1 -> a score (B,), higher for what looks real (hierarchical-latent appendix E). They
    are blurred first (5 taps, sigma 1.5), which hides what every generated image has. The paper does not tell the
    network: here four convolutions with stride 2."""

    def __init__(self, width=32):
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        super().__init__(*(layer for a, b in zip(channels, channels[1:]) for layer in (
            nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 1))
        self.width = width
        taps = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.5) ** 2)
        self.register_buffer('blur', (taps / taps.sum()).outer(taps / taps.sum()).expand(3, 1, 5, 5), persistent=False)
        for name, value in zip(('mean', 'std'), NORMALIZATIONS['imagenet']):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        blurred = F.conv2d(F.pad(images, [2] * 4, mode='reflect'), self.blur, groups=3)
        return super().forward((blurred - self.mean) / self.std)[:, 0]


def load_discriminator(path):
    found = load_checkpoint(path)
    try:
        discriminator = Discriminator(found['width'])
        discriminator.load_state_dict(found['discriminator'])
        if not all(value.isfinite().all() for value in discriminator.state_dict().values()):
            raise ValueError('its weights are not finite')
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise unreadable(path, error, 'train it again with train_discriminator.py', 'a discriminator') from None
    return discriminator.eval().requires_grad_(False)


class _Shell:
    """Stands for a class that a file names: keeps what it held, runs nothing."""

    def __setstate__(self, state):
        self.__dict__.update(state)


# COP-Gen's and hierarchical-latent's walkers were saved as whole objects of these classes.
PICKLED = [f'{module}.{name}' for module, names in {
    'torch.nn.parallel.data_parallel': ['DataParallel'], 'torch.nn.modules.container': ['Sequential'],
    'torch.nn.modules.linear': ['Linear'], 'torch.nn.modules.activation': ['ReLU'],
    '__main__': ['NonlinearWalk', 'LinearWalk'],
    'src.noise_maker.walkers': ['NonlinearWalker', 'LinearWalker']}.items() for name in names]


def save_walker(path, walker, **about):
    """about: what else to remember, plain values."""
    kind = {'steering': True} if isinstance(walker, Steering) else {'relu': walker.relu, 'start': walker.start}
    save_checkpoint(path, {'walker': walker.state_dict(), 'width': walker.width, **kind, **about})


def load_walker(path):
    """A Walker or Steering, frozen, from a file of train_walker.py or one of COP-Gen's or hierarchical-latent's. None
    of the code that these name is run. Its `chunks` and `weights` (checksum of the generator's) are what it was trained
    on, None where the file does not tell. Raises Fail."""
    with torch.serialization.safe_globals([(_Shell, name) for name in PICKLED]):
        found = load_checkpoint(path)
    try:
        if 'nn_walker' in found:
            layers = _linear_layers(found['nn_walker'])
            walker = Walker(layers[0]['weight'].shape[0], relu=_holds_relu(found['nn_walker']))
            state = {f'layers.{k}.{name}': layers[k][name] for k in range(2) for name in ('weight', 'bias')}
            if len(layers) != 2:
                raise ValueError(f'{len(layers)} linear layers, not two')
        else:
            walker = Steering(found['width']) if found.get('steering') else Walker(found['width'], found['relu'])
            state = found['walker']
        walker.load_state_dict(state)
        if not all(value.isfinite().all() for value in walker.state_dict().values()):
            raise ValueError('its weights are not finite')
        walker.chunks, walker.weights = found.get('chunks'), found.get('weights')
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise unreadable(path, error, 'train it again with train_walker.py', 'a walker') from None
    return walker.eval().requires_grad_(False)


def _linear_layers(shell):
    """Parameters of the layers in a pickled module that have a weight, in their order."""
    own = {key: value.float() for key, value in shell.__dict__.get('_parameters', {}).items() if value is not None}
    return ([own] if 'weight' in own else []) + [
        layer for child in shell.__dict__.get('_modules', {}).values() if child is not None
        for layer in _linear_layers(child)]


def _holds_relu(shell):
    """Whether a module without parameters or parts, the ReLU, is among the parts of a pickled module."""
    parts = shell.__dict__.get('_modules', {})
    return not parts and not shell.__dict__.get('_parameters') or any(map(_holds_relu, parts.values()))
