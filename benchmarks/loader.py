"""Paired loading, side by side: our PairLoader on a beton against what users would write instead, a torch DataLoader
with torchvision's transforms on PIL images. Same images, same BYOL-like recipe, two views a sample (the second from the
synthetic image), same number of workers, uint8 CHW batches from both, alternating rounds.

    python benchmarks/loader.py size=224          photographic JPEGs of 256 to 500 pixels a side
    python benchmarks/loader.py size=32           CIFAR-like, raw in the beton and arrays in RAM for the DataLoader

Theirs blurs with PIL (as MoCo v2 and SimSiam do), the fastest choice there is; blur=torchvision takes
torchvision.transforms.GaussianBlur, whose result ours equals. The last line is one JSON object: images/s count every
view, `ratio` is the median over the rounds of ours / theirs.
"""
import json
import os
import random
import statistics
import tempfile
import time

import cv2
import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter

import bench
import data

options = bench.options(size=224, workers=os.cpu_count(), rounds=3, seconds=8.0, images=0, batch_size=0, blur='pil',
                        quality=90)
size, workers, seconds = options['size'], options['workers'], options['seconds']
n = options['images'] or (1024 if size > 64 else 8192)       # samples an epoch; every pair of images comes four times
batch_size = options['batch_size'] or (64 if size > 64 else 256)
recipe = dict(size=size, crop_scale=[0.08 if size > 64 else 0.2, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.2, 0.1],
              jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, blur_sigma=[0.1, 2.0], solarize_prob=0.1)


class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*recipe['blur_sigma'])))


class Pairs(torch.utils.data.Dataset):
    """images[i] is the pair (original, synthetic) as JPEG files or arrays."""
    def __init__(self, images):
        blur = PILBlur() if options['blur'] == 'pil' else T.GaussianBlur(int(0.1 * size) | 1, recipe['blur_sigma'])
        self.images, self.transform = images, T.Compose([
            T.RandomResizedCrop(size, scale=recipe['crop_scale']), T.RandomHorizontalFlip(recipe['flip']),
            T.RandomApply([T.ColorJitter(*recipe['jitter'])], recipe['jitter_prob']),
            T.RandomGrayscale(recipe['gray_prob']), T.RandomApply([blur], recipe['blur_prob']),
            T.RandomSolarize(128, recipe['solarize_prob']), T.PILToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        load = lambda x: Image.fromarray(x) if isinstance(x, np.ndarray) else Image.open(x).convert('RGB')
        return [self.transform(load(x)) for x in self.images[i]], i % 10, i


def photo(rng):
    """A smooth colour field with edges and grain: compresses like a photograph."""
    h, w = rng.integers(256, 501, 2) if size > 64 else (size, size)
    image = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8),
                       (int(w), int(h)), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        cv2.circle(image, (int(rng.integers(w)), int(rng.integers(h))), int(rng.integers(2, w // 4)),
                   rng.integers(0, 256, 3).tolist(), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def throughput(epoch):
    """Views per second over about `seconds` of whole epochs, epoch(e) iterates over one."""
    views, e, begin = 0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for batch in epoch(e):
            views += 2 * batch_size
        e += 1
    return views / (time.perf_counter() - begin)


if __name__ == '__main__':
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for i in range(n // 4):
            pair = [photo(rng), photo(rng)]
            if size > 64:
                for k in range(2):
                    name = f'{folder}/{i}_{k}.jpg'
                    Image.fromarray(pair[k]).save(name, quality=options['quality'])
                    pair[k] = name
            pairs.append(pair)
        pairs *= 4
        n = len(pairs)
        pixels = lambda x: x if isinstance(x, np.ndarray) else np.asarray(Image.open(x).convert('RGB'))
        data.write_beton(f'{folder}/pairs.beton', lambda i: (*map(pixels, pairs[i]), i % 10, i, 0), n, options,
                         mode='jpg' if size > 64 else 'raw', quality=options['quality'], num_workers=workers)
        ours = data.PairLoader(f'{folder}/pairs.beton', [recipe, recipe], swap='second', batch_size=batch_size, seed=0,
                               num_workers=workers)
        theirs = torch.utils.data.DataLoader(Pairs(pairs), batch_size, shuffle=True, drop_last=True,
                                             num_workers=workers, persistent_workers=True)
        start = time.perf_counter()
        next(ours.epoch(0))                              # compile, or load what an earlier start has compiled
        print(f'first batch after {time.perf_counter() - start:.1f} s; {len(ours)} batches an epoch, '
              f'{os.path.getsize(f"{folder}/pairs.beton") / n / 2e3:.0f} kB an image')
        for _ in theirs:
            pass                                         # start the worker processes
        rounds = []
        for r in range(options['rounds']):
            rounds.append((throughput(ours.epoch), throughput(lambda e: theirs)))
            print(f'round {r}: ours {rounds[-1][0]:,.0f} img/s, theirs {rounds[-1][1]:,.0f} img/s, '
                  f'ratio {rounds[-1][0] / rounds[-1][1]:.2f}', flush=True)
        print(json.dumps({**options, 'workers': workers, 'ours': round(statistics.median(a for a, _ in rounds), 1),
                          'theirs': round(statistics.median(b for _, b in rounds), 1),
                          'ratio': round(statistics.median(a / b for a, b in rounds), 3)}))
