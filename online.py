"""Pairs made while training (continuous sampling): a GAN draws anchors and positives on the training device, and the
augmentations run there too, one set of parameters per sample.

    loader = OnlinePairs(spec, [recipe, recipe], batch_size=256, steps_per_epoch=5004, seed=0, device=device)
    for batch in loader.epoch(0): batch['views']           # as data.PairLoader

The parameters of an augmentation are drawn by the loader's own code (augment.parameters); `augment` applies them as
torch operations on float images, differentiable in these. A view equals the loader's of the same image and parameters
to within the rounding to whole grey levels, which the loader does after each operation.
"""
import numpy as np
import torch
import torch.nn.functional as F

from augment import (BLUR, FB, FC, FH, FLIPPED, FS, GRAYED, HEIGHT, KERNEL, LEFT, ORDER, ORDERS, RANDAUGMENT, RESIZE,
                     SCALE_HI, SIGMA, SIGMA_HI, SIZE, SOLARIZED, TOP, WIDTH, blur_reach, parameters, recipe_row,
                     sources_of_views)
from config import Fail
from latents import LatentPairs

LUMA = torch.tensor([19595., 38470., 7471.]).view(1, 3, 1, 1) / 65536


def augment(images, recipe, drawn):
    """Views (B, 3, size, size) in 0..255 of float images (B, 3, H, W) in 0..255. recipe: of augment.recipe_row; drawn:
    of augment.parameters, on the CPU."""
    d, size = drawn.to(images.device, torch.float32), int(recipe[SIZE])
    height, width = full_h, full_w = images.shape[2:]
    if recipe[SCALE_HI] > 0:
        full_h = full_w = size
    else:                                                # no random crop: resize the shorter side, cut the centre
        short = int(recipe[RESIZE])
        full_h, full_w = short * height // min(height, width), short * width // min(height, width)
    down = _resampling(d[:, TOP], d[:, HEIGHT], full_h, size, height)
    across = _resampling(d[:, LEFT], d[:, WIDTH], full_w, size, width)
    across = torch.where(d[:, FLIPPED, None, None] > 0, across.flip(1), across)
    x = down[:, None] @ images @ across.transpose(1, 2)[:, None]
    orders = torch.as_tensor(ORDERS)[drawn[:, ORDER].long()]
    for place in range(4):
        for kind, (column, neutral, change) in enumerate(JITTER):
            some = ((orders[:, place] == kind) & (drawn[:, column] != neutral)).nonzero()[:, 0]
            if len(some):                                # known on the CPU: to ask the GPU would be to wait for it
                some = some.to(x.device)
                x = x.index_put((some,), change(x[some], d[some, column].view(-1, 1, 1, 1)))
    x = torch.where(d[:, GRAYED].view(-1, 1, 1, 1) > 0, _luma(x), x)
    if recipe[BLUR] > 0:
        x = torch.where(d[:, SIGMA].view(-1, 1, 1, 1) > 0, _blur(x, d[:, SIGMA], recipe), x)
    return torch.where((d[:, SOLARIZED].view(-1, 1, 1, 1) > 0) & (x >= 128), 255 - x, x)


def _resampling(start, extent, full, size, length):
    """Pillow's antialiased bilinear filter as matrices (B, size, length): the central `size` of `full` outputs from the
    `extent` inputs after `start`."""
    scale, middle = extent[:, None] / full, round((full - size) / 2)
    centre = (middle + torch.arange(size, device=start.device) + 0.5) * scale
    at = torch.arange(length, device=start.device) + 0.5 - start[:, None]
    weight = 1 - (at[:, None] - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weight = weight.clamp(min=0) * ((at > 0) & (at < extent[:, None]))[:, None]
    return weight / weight.sum(2, keepdim=True)


def _luma(x):
    return (x * LUMA.to(x.device)).sum(1, keepdim=True)


def _blend(other, x, factor):
    return (other + factor * (x - other)).clamp(0, 255)


def _hue(x, factor):
    """Through HSV: hue shifted by a share of the circle."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma, (r, g, b) = (high - low).clamp(min=1e-6), x.split(1, 1)
    hue = torch.where(high == r, (g - b) / chroma, torch.where(high == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
    k = (torch.tensor([5., 3., 1.], device=x.device).view(1, 3, 1, 1) + hue + 6 * factor) % 6
    return high - (high - low) * torch.minimum(k, 4 - k).clamp(0, 1)


JITTER = (  # in the order of augment.ORDERS: the column of its factor, which value changes nothing, and what it does
    (FB, 1, lambda x, f: _blend(0, x, f)),
    (FC, 1, lambda x, f: _blend(_luma(x).mean((2, 3), keepdim=True), x, f)),
    (FS, 1, lambda x, f: _blend(_luma(x), x, f)),
    (FH, 0, _hue))


def _blur(x, sigma, recipe):
    """Gaussian blur with the kernels of augment.blur_reach, mirrored at the border; sigma (B,), 0 where it is not
    looked at."""
    size = x.shape[3]
    widest, least = (min(blur_reach(size, s, recipe[KERNEL]), size // 2) for s in (recipe[SIGMA_HI], 0.0))
    at = torch.arange(-widest, widest + 1, device=x.device)
    weight = torch.exp(-0.5 * (at / sigma.clamp(min=1e-3)[:, None]) ** 2)
    if not recipe[KERNEL]:
        weight = weight * (at.abs() <= torch.ceil(3 * sigma).clamp(min=least)[:, None])
    weight = (weight / weight.sum(1, keepdim=True))[:, None, None]  # (B, 1, 1, taps): a group a sample
    x = F.pad(x.transpose(0, 1), [widest] * 4, mode='reflect')
    x = F.conv2d(F.conv2d(x, weight, groups=len(sigma)), weight.transpose(2, 3), groups=len(sigma))
    return x.transpose(0, 1)


class OnlinePairs:
    """Batches of views of pairs that a GAN makes, with the interface of data.PairLoader.

    spec: `latent` of gen_views.py (anchors is not looked at). recipes, alpha, swap: as PairLoader's. size: pixels a
    side of the generated images, None: as the network makes them. batch_size: pairs of this process and step.

    Sample k of the run is a function of (seed, k) alone, and step b of all processes takes the samples b G to
    (b + 1) G - 1, G = batch_size x world: a resumed run goes on exactly, whatever the number of processes, and no two
    processes or steps see the same sample."""

    def __init__(self, spec, recipes, alpha, swap, *, size=None, batch_size, steps_per_epoch, seed, device, rank=0,
                 world=1):
        self.pairs, self.alpha, self.seed = LatentPairs(spec, seed, size, device), alpha, seed
        self.recipes = np.array([recipe_row(recipe, f'views[{k}]') for k, recipe in enumerate(recipes)])
        if self.recipes[:, RANDAUGMENT].any():
            raise Fail('randaugment: is not there for pairs made while training; set it to 0, or write them into a '
                       'beton')
        self.swap = {'random': -1, 'first': 0, 'second': 1}[swap]
        self.batch_size, self.batches, self.rank, self.world = batch_size, steps_per_epoch, rank, world
        samples = steps_per_epoch * batch_size * world
        self.sidecar = {'samples': samples, 'with_view': samples * bool(spec['chunks'])}
        self.paths, side = [spec['model']], np.array([self.pairs.generator.size])
        self.metadata = {'f0': {'height': side, 'width': side}}  # for data.check_size

    def __len__(self):
        return self.batches

    def epoch(self, epoch, start_batch=0):
        for b in range(start_batch, len(self)):
            first = ((epoch * len(self) + b) * self.world + self.rank) * self.batch_size
            yield self.batch(np.arange(first, first + self.batch_size))

    @torch.no_grad()
    def batch(self, indices):
        """Views of the samples `indices`: float (B, 3, S, S) in 0..255 on the device."""
        anchors, positives = (255 * images.float() for images in self.pairs.images(indices))
        synthetic = sources_of_views(self.seed, indices, self.alpha, self.swap, len(self.recipes))
        views = []
        for v, recipe in enumerate(self.recipes):
            other = torch.as_tensor(synthetic == v % 2, device=anchors.device).view(-1, 1, 1, 1)
            drawn = parameters(self.seed, 0, indices, v, recipe, *anchors.shape[2:])
            view = augment(torch.where(other, positives, anchors), recipe, torch.from_numpy(drawn))
            views.append(view.contiguous(memory_format=torch.channels_last))
        count = torch.full((len(indices),), -1)
        return {'views': views, 'index': torch.from_numpy(indices), 'label': count, 'noise_level': count + 1,
                'synthetic': torch.from_numpy(synthetic)}
