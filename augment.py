"""Augmentations: the recipe of a view, the parameters drawn from it, and the numba kernels that turn stored images into
views.

    row = recipe_row({'size': 224, 'crop_scale': [0.2, 1.0], 'flip': 0.5}, 'view_1')
    render(...)        # samples of a batch: read, decode, crop, augment; data.PairLoader calls it in its threads

Kernels are compiled once per machine (numba caches them beside this file); parameters are arguments. Every random
number is a hash of (seed, epoch, index of the image, view): pixels do not depend on the number of threads, processes or
on where a run was resumed. The arithmetic is that of torchvision's transforms and timm's RandAugment on PIL images, bit
for bit except the blur (one level in 0.03 % of the values), since Pillow 13 some resizes (one level, see `_resize`) and
a few pixels of a rotation (one level: it cuts decimals off, and sine and cosine may differ in their last digit).

Images are uint8; `p` is planar, (3, n) with n pixels, because three contiguous planes vectorise.
"""
import math
import os
import tempfile
from contextlib import suppress
from functools import reduce
from itertools import permutations

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from config import Fail, check_keys


def cacheable():
    """Whether numba finds a folder to keep compiled kernels in: NUMBA_CACHE_DIR, beside this file, ~/.cache."""
    try:
        njit(cache=True)(cacheable)                      # compiles nothing yet
    except RuntimeError:
        return False
    return True


if not cacheable():                                      # a read-only installation, a user without a home
    with suppress(OSError):
        folder = os.path.join(tempfile.gettempdir(), f'numba-{os.getuid()}')
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if os.lstat(folder).st_uid == os.getuid():       # of others we run no code
            numba.config.CACHE_DIR = folder
JIT = dict(cache=cacheable(), nogil=True, error_model='numpy')
F32 = np.float32
IMAGE, VIEW = 0, 1                                       # the two sources of a sample
SHORT_READ, BAD_JPEG = 1, 2                              # what can go wrong with a sample while reading
# columns of a recipe row and of the parameters drawn from it
(SIZE, RESIZE, SCALE_LO, SCALE_HI, FLIP, JITTER, B, C, S, H, GRAY, BLUR, SIGMA_LO, SIGMA_HI, KERNEL, SOLARIZE,
 RANDAUGMENT, MAGNITUDE, SPREAD) = range(19)
TOP, LEFT, HEIGHT, WIDTH, FLIPPED, ORDER, FB, FC, FS, FH, GRAYED, SIGMA, SOLARIZED, OPS = range(14)
# RandAugment's operations in the order of timm's list; from OPS on stand (operation or -1, level, cubic) of each drawn
(AUTOCONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE_FROM, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS,
 SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y) = range(15)
FILL = np.array([124, 116, 104], np.uint8)               # ImageNet's mean, where an operation moves in from outside
# columns of the table of samples: for each source offset, bytes, height, width, is_jpeg; then
FILE, KEY, HAS_VIEW = 10, 11, 12                         # FILE: which beton; KEY: what the random numbers hang on
# what reads and decodes: addresses of C functions, libjpeg-turbo's handle of this thread and its flags, then files
PREAD, DECOMPRESS, HANDLE, FLAGS, FILES = range(5)
ORDERS = np.array(list(permutations(range(4))))


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


@intrinsic
def _weigh(typingctx, pixels, weights, n, out):
    """Write the sum of n pixels (3 bytes each), each times its weight (int32, in units of 2**-22), to `out`: all three
    channels in one vector instruction, of which numba makes nine. All are addresses; reads and writes a byte more."""
    def codegen(context, builder, signature, values):
        byte, word, long, four = ir.IntType(8), ir.IntType(32), ir.IntType(64), lambda kind: ir.VectorType(kind, 4)
        pixels, weights, n, out = values
        pixels, out = builder.inttoptr(pixels, byte.as_pointer()), builder.inttoptr(out, four(byte).as_pointer())
        weights, half = builder.inttoptr(weights, word.as_pointer()), ir.Constant(four(word), [1 << 21] * 4)

        def add(total, j):
            at = builder.gep(pixels, [builder.mul(j, long(3))])
            pixel = builder.zext(builder.load(builder.bitcast(at, four(byte).as_pointer()), align=1), four(word))
            weight = builder.insert_element(four(word)(ir.Undefined), builder.load(builder.gep(weights, [j])), word(0))
            weight = builder.shuffle_vector(weight, weight, four(word)([0] * 4))
            return builder.add(total, builder.mul(pixel, weight))

        total = cgutils.alloca_once(builder, four(word))
        few = builder.icmp_unsigned('<=', n, long(4))
        with builder.if_else(few) as (then, otherwise):
            with then:                                   # a loop would cost more than it does
                for several in (1, 2, 3, 4):
                    with builder.if_then(builder.icmp_unsigned('==', n, long(several))):
                        builder.store(reduce(add, map(long, range(several)), half), total)
            with otherwise:
                builder.store(half, total)
                with cgutils.for_range(builder, n) as loop:
                    builder.store(add(builder.load(total), loop.index), total)
        levels = builder.trunc(builder.lshr(builder.load(total), four(word)([22] * 4)), four(byte))
        builder.store(levels, out, align=1)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


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
def uniforms(seed, keys, stream, count):
    """(len(keys), count) numbers between 0 and 1, never 0: a row from (seed, key, stream) alone."""
    found = np.empty((len(keys), count), np.float64)
    for i in range(len(keys)):
        key = _key(seed, 0, keys[i], (1 << 35) + stream)
        for n in range(count):
            found[i, n] = _uniform(key, n) + 1.0 / (1 << 54)
    return found


@njit(**JIT)
def permutation_keys(seed, epoch, n):
    keys = np.empty(n, np.uint64)
    for i in range(n):
        keys[i] = _key(seed, epoch, i, 1 << 32)
    return keys


@njit(**JIT)
def choose(seed, epoch, keys, counts):                  # which of its views a sample shows in this epoch
    chosen = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        chosen[i] = int(_uniform(_key(seed, epoch, keys[i], 1 << 34), 0) * counts[i])
    return chosen


@njit(**JIT)
def _draw(key, recipe, height, width):
    """Parameters of one view of a (height, width) image: the distributions of torchvision's RandomResizedCrop,
    RandomHorizontalFlip, RandomApply([ColorJitter]), RandomGrayscale, RandomApply([GaussianBlur]), RandomSolarize, and
    timm's RandAugment, which draws with replacement and applies every other one."""
    operations = int(recipe[RANDAUGMENT])
    p = np.zeros(OPS + 3 * operations, np.float64)
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
    for k in range(operations):
        at, n = OPS + 3 * k, 51 + 6 * k
        normal = math.sqrt(-2 * math.log(1 - _uniform(key, n + 2))) * math.cos(2 * math.pi * _uniform(key, n + 3))
        level = min(max(recipe[MAGNITUDE] + recipe[SPREAD] * normal, 0.0), 10.0)
        p[at] = int(_uniform(key, n) * 15) if _uniform(key, n + 1) < 0.5 else -1
        p[at + 1] = -level if p[at] in (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y) \
            and _uniform(key, n + 4) < 0.5 else level
        p[at + 2] = _uniform(key, n + 5) < 0.5
    return p


@njit(**JIT)
def parameters(seed, epoch, keys, view, recipe, height, width):
    """What render draws for view number `view` of (height, width) images with these keys: a row for each key."""
    drawn = np.empty((len(keys), OPS + 3 * int(recipe[RANDAUGMENT])), np.float64)
    for i in range(len(keys)):
        drawn[i] = _draw(_key(seed, epoch, keys[i], view), recipe, height, width)
    return drawn


@njit(**JIT)
def _source(pair, alpha, swap, views):
    """Which of the first two views comes from the synthetic image, -1 for none."""
    if _uniform(pair, 0) < alpha:
        return swap if swap >= 0 else int(_uniform(pair, 1) * min(2, views))
    return -1


@njit(**JIT)
def sources_of_views(seed, keys, alpha, swap, views):
    """_source of every key (int8), in epoch 0."""
    found = np.empty(len(keys), np.int8)
    for i in range(len(keys)):
        found[i] = _source(_key(seed, 0, keys[i], 1 << 33), alpha, swap, views)
    return found


@njit(**JIT)
def _taps(n_in, n_out, first, count):
    """Pillow's antialiased bilinear filter, n_in -> n_out, for the outputs first..first+count: where each starts and
    the weights in 2**-22 of the inputs it reads, of all the same number (branches on it would not be foreseen).
    Upscaling is plain bilinear."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    start, number = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        centre = (first + i + 0.5) * scale
        start[i] = max(int(centre - support + 0.5), 0)
        number[i] = min(int(centre + support + 0.5), n_in) - start[i]
    most = number.max()
    weight, share = np.zeros((count, most), np.int32), np.empty(most)
    for i in range(count):
        centre, total, lo = (first + i + 0.5) * scale, 0.0, start[i]
        for j in range(number[i]):
            share[j] = max(0.0, 1 - abs(j + lo - centre + 0.5) * (1 / support))
            total += share[j]
        start[i] = min(lo, n_in - most)
        for j in range(number[i]):
            weight[i, j + lo - start[i]] = int(0.5 + share[j] / total * (1 << 22))
    return start, weight


@njit(inline='always', **JIT)
def _across(pixels, start, weights, taps, size, flip, to):
    for o in range(size):
        x = size - 1 - o if flip else o
        _weigh(pixels + 3 * start[x], weights + 4 * x * taps, taps, to + 3 * o)


@njit(**JIT)
def _resize(image, width, top, left, h, w, full_h, full_w, size, flip, rows, p):
    """Resize the box (top, left, h, w) of an interleaved image (flat uint8, `width` pixels a row) to (full_h, full_w)
    and put its central size x size window into p (3, size * size); rows is scratch. Equal to Pillow's bilinear resize
    in the order of Pillow up to 12, across and then down; Pillow 13 swaps some shapes, which is one level at most."""
    oy, ox = int(round((full_h - size) / 2.0)), int(round((full_w - size) / 2.0))
    start, weight = _taps(w, full_w, ox, size)
    ystart, yweight = _taps(h, full_h, oy, size)
    y0, y1, line = ystart[0], ystart[size - 1] + yweight.shape[1], 3 * size
    last_in, last_out = np.empty(3 * w + 1, np.uint8), np.empty(line + 1, np.uint8)      # room for the byte too many
    for y in range(y0, y1):
        at = ((top + y) * width + left) * 3
        pixels, to = np.int64(image.ctypes.data) + at, np.int64(rows.ctypes.data) + (y - y0) * line
        weights, taps = np.int64(weight.ctypes.data), weight.shape[1]    # in the loop: numba frees what is used no more
        if y == y1 - 1:
            for i in range(3 * w):
                last_in[i] = image[at + i]
            pixels, to = np.int64(last_in.ctypes.data), np.int64(last_out.ctypes.data)
        if taps == 2:                                    # numbers the compiler knows: no branches within
            _across(pixels, start, weights, 2, size, flip, to)
        elif taps == 3:
            _across(pixels, start, weights, 3, size, flip, to)
        elif taps == 4:
            _across(pixels, start, weights, 4, size, flip, to)
        else:
            _across(pixels, start, weights, taps, size, flip, to)
    for i in range(line):
        rows[(y1 - 1 - y0) * line + i] = last_out[i]
    sums, levels = np.empty(line, np.int32), last_out
    for y in range(size):
        sums[:] = 1 << 21
        for j in range(yweight.shape[1]):
            at = (ystart[y] - y0 + j) * line
            source, k = rows[at:at + line], yweight[y, j]
            for i in range(line):
                sums[i] += k * np.int32(source[i])
        for i in range(line):
            levels[i] = np.uint8(sums[i] >> 22)
        r, g, b = p[0, y * size:(y + 1) * size], p[1, y * size:(y + 1) * size], p[2, y * size:(y + 1) * size]
        for i in range(size):
            r[i], g[i], b[i] = levels[3 * i], levels[3 * i + 1], levels[3 * i + 2]


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
        # _luma, faster where floats are needed anyway, and exact: every sum is below 2**24
        grey = F32(r[i]) * F32(19595) + F32(g[i]) * F32(38470) + F32(b[i]) * F32(7471) + F32(0x8000)
        grey = F32(np.int32(grey * F32(1 / 65536)))
        r[i], g[i], b[i] = _blend(grey, r[i], factor), _blend(grey, g[i], factor), _blend(grey, b[i], factor)


@njit(**JIT)
def _hue(p, factor):
    """Shift the hue by factor * 255 of 256 steps through 8-bit HSV: equal to PIL for every colour, in float32 alone (8
    pixels at a time where float64 has 4, and no branches)."""
    shift, zero, half, one, full = np.int32(int(factor * 255) & 255), F32(0), F32(0.5), F32(1), F32(255)
    red, green, blue = p[0], p[1], p[2]
    for i in range(red.size):
        r, g, b = F32(red[i]), F32(green[i]), F32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        after, sector = (b, zero) if r == high else ((r, F32(2)) if g == high else (g, F32(4)))
        middle = (high + high + low - r - g - b) / max(high - low, one)
        h = (sector + one - middle if after == low else sector - one + middle) / F32(6)
        h = h + one if h < zero else h
        s = F32(np.int32((high - low) / max(high, one) * full))
        h6 = F32(np.int32(6) * ((np.int32(h * full) + shift) & np.int32(255)))
        # the textbook's p, q, t: v (1 - s), v (1 - s f), v (1 - s (1 - f)), rounded; s and f count 1/255. A channel
        # is v near its own hue, v (1 - s) far from it and goes linearly in between
        step, v = F32(1 / 65025) * high, high
        m = min(max(F32(510) - abs(h6 - F32(765)), zero), full)
        q = min(max(abs(h6 - F32(510)) - full, zero), full)
        t = min(max(abs(h6 - F32(1020)) - full, zero), full)
        red[i] = np.uint8(np.int32(v - step * (s * m) + half))
        green[i] = np.uint8(np.int32(v - step * (s * q) + half))
        blue[i] = np.uint8(np.int32(v - step * (s * t) + half))


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
def blur_reach(size, sigma, kernel):
    """Pixels to each side of the middle in a kernel of so many, an odd number. 0: a tenth of the view (23 at 224, as
    SimCLR's) or three sigma, if that is more: PIL's blur, MoCo v2's and GenView's, is whole on small views too."""
    return int(kernel) // 2 if kernel else max((int(0.1 * size) | 1) // 2, int(math.ceil(3 * sigma)))


@njit(**JIT)
def _blur(p, size, sigma, kernel, scratch):
    """torchvision's GaussianBlur with a kernel of blur_reach: separable, mirrored at the border. Taps below 1e-4 of the
    largest are left out. scratch: float32, at least size * (size + 2 radius)."""
    full = min(blur_reach(size, sigma, kernel), size // 2)
    radius = max(0, min(full, int(math.ceil(4.3 * sigma))))
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
            c, d = (radius + size - 1 + k) * size, (radius + size - 1 - k) * size
            for i in range(size):                        # numba copies slices slowly
                scratch[a + i], scratch[c + i] = scratch[b + i], scratch[d + i]
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
def _tone(p, operation, level):
    """The operations of RandAugment that map the levels of each channel: PIL's ImageOps, exactly."""
    table, count = np.empty(256, np.uint8), np.empty(256, np.int64)
    bits, start, more = int(level / 10 * 4), int(level / 10 * 256), int(level / 10 * 110)
    for c in range(3):
        plane = p[c]
        count[:] = 0
        for i in range(plane.size):
            count[plane[i]] += 1
        lo, hi = 0, 255
        while count[lo] == 0:
            lo += 1
        while count[hi] == 0:
            hi -= 1
        step = (plane.size - count[hi]) // 255
        seen, scale = step // 2, 255 / max(hi - lo, 1)
        for v in range(256):
            new = v
            if operation == AUTOCONTRAST and hi > lo:
                new = int(v * scale - lo * scale)
            elif operation == EQUALIZE and step:
                new, seen = seen // step, seen + count[v]
            elif operation == INVERT or (operation == SOLARIZE_FROM and v >= start):
                new = 255 - v
            elif operation == POSTERIZE:                 # the TPU's: more bits are kept at higher levels
                new = v & ~((1 << (8 - bits)) - 1)
            elif operation == SOLARIZE_ADD and v < 128:
                new = v + more
            table[v] = min(max(new, 0), 255)
        for i in range(plane.size):
            plane[i] = table[plane[i]]


@njit(**JIT)
def _sharpness(p, size, factor):
    factor, source = np.float32(factor), p.copy()
    for c in range(3):
        old, new = source[c], p[c]
        for y in range(1, size - 1):                     # at the border PIL's filter changes nothing
            for i in range(y * size + 1, y * size + size - 1):
                total = 4 * np.int32(old[i])
                for j in (i - size, i, i + size):
                    total += np.int32(old[j - 1]) + np.int32(old[j]) + np.int32(old[j + 1])
                new[i] = _blend(np.float32((2 * total + 13) // 26), old[i], factor)


@njit(**JIT)
def _between(a, b, c, d, t, cubic):                      # the value at t between b and c, as PIL sums it up
    a, b, c, d = float(a), float(b), float(c), float(d)
    return b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a - c + d))) if cubic else b + (c - b) * t


@njit(**JIT)
def _affine(p, size, a, b, c, d, e, f, cubic):
    """PIL's Image.transform: pixel (x, y) comes from (a x + b y + c, d x + e y + f), bilinear or cubic, else FILL."""
    source, down, taps = p.copy(), np.empty(4), 4 if cubic else 2
    for y in range(size):
        for x in range(size):
            u, v = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
            if not (0 <= u < size and 0 <= v < size):
                for channel in range(3):
                    p[channel, y * size + x] = FILL[channel]
                continue
            left, top = math.floor(u - 0.5), math.floor(v - 0.5)
            right, below = u - 0.5 - left, v - 0.5 - top
            x0, x1, x2, x3 = max(left - 1, 0), max(left, 0), min(left + 1, size - 1), min(left + 2, size - 1)
            for channel in range(3):
                for j in range(2 - taps // 2, 2 + taps // 2):
                    row = source[channel, min(max(top + j - 1, 0), size - 1) * size:]
                    down[j] = _between(row[x0], row[x1], row[x2], row[x3], right, cubic)
                total = _between(down[0], down[1], down[2], down[3], below, cubic)
                p[channel, y * size + x] = np.uint8(min(max(total, 0.0), 255.0))


@njit(**JIT)
def _randaugment(p, size, operation, level, cubic):
    """One of timm's operations of RandAugment, in place. level: 0 to 10, with a sign where it turns or moves."""
    share, factor = level / 10, level / 10 * 1.8 + 0.1
    if operation == COLOR:
        _saturation(p, factor)
    elif operation == CONTRAST:
        _contrast(p, factor)
    elif operation == BRIGHTNESS:
        _brightness(p, factor)
    elif operation == SHARPNESS:
        _sharpness(p, size, factor)
    elif operation == ROTATE:
        turn = -math.radians(30 * share)
        a, b, middle = round(math.cos(turn), 15), round(math.sin(turn), 15), size / 2
        _affine(p, size, a, b, -a * middle - b * middle + middle, -b, a, b * middle - a * middle + middle, cubic)
    elif operation == SHEAR_X:
        _affine(p, size, 1.0, 0.3 * share, 0.0, 0.0, 1.0, 0.0, cubic)
    elif operation == SHEAR_Y:
        _affine(p, size, 1.0, 0.0, 0.0, 0.3 * share, 1.0, 0.0, cubic)
    elif operation == TRANSLATE_X:
        _affine(p, size, 1.0, 0.0, 0.45 * share * size, 0.0, 1.0, 0.0, cubic)
    elif operation == TRANSLATE_Y:
        _affine(p, size, 1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * share * size, cubic)
    elif operation >= 0:
        _tone(p, operation, level)


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
    operations = (len(d) - OPS) // 3
    if d[GRAYED] and not operations:
        _grayscale(p)
    if d[SIGMA] > 0:
        _blur(p, size, d[SIGMA], recipe[KERNEL], floats)
    for k in range(OPS, len(d), 3):
        _randaugment(p, size, d[k], d[k + 1], d[k + 2] > 0)
    if d[GRAYED] and operations:                         # InfoMin's order
        _grayscale(p)
    if d[SOLARIZED]:
        _solarize(p)
    r, g, b = p[0], p[1], p[2]
    for i in range(size * size):
        out[3 * i], out[3 * i + 1], out[3 * i + 2] = r[i], g[i], b[i]


@njit(**JIT)
def render(io, table, first, last, seed, epoch, alpha, swap, recipes, offsets, file, images, rows, planes, floats,
            out, synthetic):
    """Fill the samples first..last of a batch. io: see PREAD to FILES; table (B, 13); recipes (2, views, SPREAD + 1) of
    views from the image and of those from the synthetic one. Returns -1, or 4 * sample + 2 * source + error - 1 of
    the first sample that cannot be read."""
    views = recipes.shape[1]
    for i in range(first, last):
        row = table[i]
        pair = _key(seed, epoch, row[KEY], 1 << 33)
        from_view = _source(pair, alpha, swap, views) if row[HAS_VIEW] else -1
        synthetic[i] = from_view
        loaded0 = loaded1 = False
        for v in range(views):
            source = VIEW if v % 2 == from_view else IMAGE
            at, n, height, width, is_jpeg = row[5 * source], row[5 * source + 1], row[5 * source + 2], \
                row[5 * source + 3], row[5 * source + 4]
            image = images[source]
            if not (loaded1 if source == VIEW else loaded0):
                target = file if is_jpeg else image
                if _c(io[PREAD], (io[FILES + row[FILE]], np.int64(target.ctypes.data), n, at)) != n:
                    return 4 * i + 2 * source + SHORT_READ - 1
                if is_jpeg and np.int32(_c(io[DECOMPRESS], (io[HANDLE], np.int64(file.ctypes.data), n,
                                                            np.int64(image.ctypes.data), width, 0, height, 0,
                                                            io[FLAGS]))):
                    return 4 * i + 2 * source + BAD_JPEG - 1
                if source == VIEW:
                    loaded1 = True
                else:
                    loaded0 = True
            recipe = recipes[source, v]
            area = int(recipe[SIZE]) ** 2 * 3
            begin = offsets[v] + i * area
            d = _draw(_key(seed, epoch, row[KEY], v), recipe, height, width)
            _augment(image, height, width, recipe, d, rows, planes, floats, out[begin:begin + area])
    return -1


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

_CHANCE = (0, lambda p: 0 <= p <= 1, 'a probability')
RECIPE = {                                               # default, test, meaning; in the order of SIZE ... SPREAD
    'size': (None, lambda s: 1 <= s <= 1024 and s % 1 == 0, 'a number of pixels, 1 to 1024'),
    'resize': (None, lambda s: 1 <= s <= 4096 and s % 1 == 0, 'a number of pixels from size to 4096'),
    'crop_scale': (None, lambda lo, hi: 0 < lo <= hi <= 1 or lo == hi == 0, 'null or [lo, hi] with 0 < lo <= hi <= 1'),
    'flip': _CHANCE, 'jitter_prob': _CHANCE,
    'jitter': ([0, 0, 0, 0], lambda b, c, s, h: min(b, c, s, h) >= 0 and h <= 0.5,
               '[brightness, contrast, saturation, hue], none below 0, hue up to 0.5'),
    'gray_prob': _CHANCE, 'blur_prob': _CHANCE,
    'blur_sigma': ([0.1, 2.0], lambda lo, hi: 0 < lo <= hi <= 100, '[lo, hi] in pixels with 0 < lo <= hi <= 100'),
    'blur_kernel': (0, lambda n: n == 0 or 1 <= n <= 1023 and n % 2 == 1, 'null or an odd number of pixels up to 1023'),
    'solarize_prob': _CHANCE,
    'randaugment': (0, lambda n: 0 <= n <= 100 and n % 1 == 0, 'a number of operations, 0 to 100'),
    'randaugment_magnitude': ([10.0, 0.5], lambda mean, std: 0 <= mean <= 10 and 0 <= std <= 100,
                              '[mean, standard deviation] with a mean from 0 to 10')}


def recipe_row(recipe, where):
    check_keys(recipe, RECIPE, where)
    row = []
    for key, (default, right, needed) in RECIPE.items():
        value = recipe.get(key, default)
        if value is None:
            value = {'crop_scale': [0, 0], 'resize': recipe.get('size'), 'blur_kernel': 0}.get(key)
        try:
            given = np.atleast_1d(np.asarray(value))
            numbers = given.astype(np.float64).tolist()
            right = given.dtype.kind in 'iuf' and np.isfinite(numbers).all() and right(*numbers) \
                and (key != 'resize' or numbers >= row)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise Fail(f'{where}: {key} is {value!r}, it must be {needed}')
        row += numbers
    return row
