"""What loader.py and multicrop.py share: photographs, the recipes of the methods, and what users write instead of our
loader: torch DataLoaders with torchvision on PIL images or on tensors."""
import io
import random
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from numba import njit
from PIL import Image, ImageFilter
from torchvision.io import ImageReadMode, decode_jpeg

import bench
import pretrain
from augment import DECOMPRESS, FILES, FLAGS, HANDLE, IMAGE, PREAD, VIEW, _c, blur_reach
from config import load_config
from data import JPG

METHODS = {'mocov2': 'in1k_mocov2_baseline', 'mocov3': 'in1k_mocov3_100ep_baseline', 'byol': 'in1k_byol_baseline',
           'simsiam': 'in1k_simsiam_baseline', 'swav': 'in1k_swav_baseline', 'simclr': 'in1k_simclr_copgen',
           'vicreg': 'in1k_vicreg_gencl', 'nnclr': 'in1k_nnclr_copgen'}


def recipes(method, size):
    """Recipes of the views as pretrain.py makes them from the method's YAML, small crops of `small` pixels included."""
    config = load_config(pretrain.DEFAULTS, [f'{bench.ROOT}/yamls/pretrain/{METHODS[method]}.yaml'])
    views = [{'size': size, **config[view]} for view in ('view_1', 'view_2')]
    small = config['small_crops']
    return views + [{**views[k % 2], 'size': small['size'], 'crop_scale': small['crop_scale']}
                    for k in range(small['count'])]


def photo(rng, size):
    """A smooth colour field with edges and grain: compresses like a photograph. 256 to 500 pixels a side, or `size`."""
    h, w = rng.integers(256, 501, 2) if size > 64 else (size, size)
    image = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8),
                       (int(w), int(h)), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        cv2.circle(image, (int(rng.integers(w)), int(rng.integers(h))), int(rng.integers(2, w // 4)),
                   rng.integers(0, 256, 3).tolist(), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


class PILBlur:
    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def transform(recipe, module, blur='pil'):
    """A recipe in torchvision: module v1 on PIL images and to a tensor at last, or v2 on tensors."""
    size, sigma, jitter = recipe['size'], recipe['blur_sigma'], module.ColorJitter(*recipe['jitter'])
    kernel = 2 * blur_reach(size, sigma[1], 0) + 1  # the widest that ours takes
    blur = PILBlur(sigma) if module is v1 and blur == 'pil' else module.GaussianBlur(kernel, sigma)
    steps = [(1, module.RandomResizedCrop(size, scale=recipe['crop_scale'])),
             (recipe['flip'], module.RandomHorizontalFlip(recipe['flip'])),
             (recipe['jitter_prob'], module.RandomApply([jitter], recipe['jitter_prob'])),
             (recipe['gray_prob'], module.RandomGrayscale(recipe['gray_prob'])),
             (recipe['blur_prob'], module.RandomApply([blur], recipe['blur_prob'])),
             (recipe['solarize_prob'], module.RandomSolarize(128, recipe['solarize_prob']))]
    return module.Compose([step for chance, step in steps if chance] + [v1.PILToTensor()] * (module is v1))


class Views(torch.utils.data.Dataset):
    """Views of samples: samples[i] is a list of images, JPEG files or arrays, of which view v is cut from image
    v % len; an image is decoded once. tensors: torchvision v2 on tensors, else v1 on PIL images."""
    def __init__(self, samples, views, tensors, blur='pil'):
        self.samples, self.tensors = samples, tensors
        self.transforms = [transform(recipe, v2 if tensors else v1, blur) for recipe in views]

    def __len__(self):
        return len(self.samples)

    def load(self, image):
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image).permute(2, 0, 1) if self.tensors else Image.fromarray(image)
        content = Path(image).read_bytes()
        if self.tensors:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        return Image.open(io.BytesIO(content)).convert('RGB')

    def __getitem__(self, i):
        images = [self.load(image) for image in self.samples[i]]
        return [t(images[v % len(images)]) for v, t in enumerate(self.transforms)], i % 10, i


def data_loader(dataset, batch_size, workers):
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers,
                                         persistent_workers=True)
    for _ in loader:
        pass                                             # starts the worker processes, leaves nothing prefetched
    return loader


@njit(nogil=True)
def _decode(io, stored, first, last, file, image):
    for i in range(first, last):
        at, n, height, width, descriptor = stored[i]
        _c(io[PREAD], (descriptor, np.int64(file.ctypes.data), n, at))
        _c(io[DECOMPRESS], (io[HANDLE], np.int64(file.ctypes.data), n, np.int64(image.ctypes.data), width, 0, height, 0,
                            io[FLAGS]))


def decoding(loader, sources=(IMAGE, VIEW)):
    """The limit: epoch(e) reads and decodes every JPEG of these sources of a PairLoader as it does, in as many threads,
    and does nothing more. It yields numbers of images."""
    columns = [np.stack([loader.stored['data_ptr'][:, s], loader.region_bytes[:, s], loader.stored['height'][:, s],
                         loader.stored['width'][:, s], loader.io[FILES + loader.file_of]], 1).astype(np.int64)
               for s in sources]
    assert all((loader.stored['mode'][:, s] == JPG).all() for s in sources)
    stored = np.concatenate(columns)
    stored = stored[np.random.default_rng(0).permutation(len(stored))]

    def job(first):
        own, last = loader.of_thread(), min(first + 16, len(stored))
        _decode(own.io, stored, first, last, own.scratch[0], own.scratch[1][0])
        return last - first

    return lambda e: loader.threads.map(job, range(0, len(stored), 16))


def throughput(epoch, seconds, count):
    """How many a second over about `seconds` of whole epochs; epoch(e) iterates over one, count(batch) says how many a
    batch is. Before that a pause, in which others end what they prefetch."""
    time.sleep(2)
    done, e, begin = 0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for batch in epoch(e):
            done += count(batch)
        e += 1
    return done / (time.perf_counter() - begin)
