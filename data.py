"""The paired beton (write, verify) and the loader of augmented views.

    write_beton('cifar10.beton', samples, len(source), settings)
    loader = PairLoader('cifar10.beton', [recipe, recipe], batch_size=256, seed=0, num_workers=8)
    for batch in loader.epoch(0): ...

The file is a stock FFCV beton with the fields `image`, `view`, `label`, `index`, `noise_level` (and `view_2`, ... where
images have several views): any FFCV Loader reads it. FFCV's format, reader and JPEG library are used as they are; its
worker processes and its EpochIterator are not: the first leave orphans and hang when a sample is bad, the second hangs
on an exception, leaks a thread on an early `break`, overwrites the batches it has handed out and compiles for seconds
at every start. In their place stand a thread pool and one kernel (augment.render) that reads, decodes, crops and
augments all views of a sample. It reads with pread() through the page cache instead of a memory map: as fast, works for
a file larger than RAM, and a file truncated under our feet is an error message instead of a bus error.

JPEGs are decoded to the bit as PIL does where something is measured, and to train on with FFCV's fast DCT: an eighth
less time, one to one and a half levels from PIL's on average.
"""
import json
import os
import sys
import threading
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import c_void_p, cast as c_cast
from pathlib import Path
from unittest import mock

import numba.typed
import numpy as np
import torch

from augment import FILE, HANDLE, HAS_VIEW, IMAGE, KEY, SIZE, VIEW, choose, permutation_keys, recipe_row, render
from config import Fail
from files import atomic, lock
from start import say

# FFCV starts a thread pool at import; TBB's waits for ever at the exit of a process that has forked, as a DataLoader
# does, and may use one core only.
numba.config.THREADING_LAYER = 'workqueue'
torch_threads = torch.get_num_threads()
try:
    with mock.patch.object(numba.typed, 'Dict', dict):   # FFCV compiles one at every import, 4 s, to hold two numbers
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.rgb_image import encode_jpeg
        from ffcv.libffcv import lib, libc               # what lib is linked to is found through it: libjpeg-turbo
        from ffcv.reader import Reader
        from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
except ImportError as e:
    raise ImportError(f'FFCV cannot be imported ({e}). apt install build-essential pkg-config libopencv-dev '
                      'libturbojpeg0-dev && pip install ffcv setuptools') from e
torch.set_num_threads(torch_threads)  # loading libffcv and what it links leaves torch with one thread (measured)

FIELDS = {'image': RGBImageField, 'view': RGBImageField, 'label': IntField, 'index': IntField, 'noise_level': IntField}
JPG, RAW = 0, 1                                          # FFCV's numbers for the two ways to store an image
BLOCK = 1 << 24                                          # bytes per checksum
PACK = 'delete the beton, and gen_views.py packs it again'
FAST_DCT, EXACT_DCT = 2048, 4096                         # turbojpeg.h: TJFLAG_FASTDCT, TJFLAG_ACCURATEDCT
lib.tjInitDecompress.restype, lib.tjDestroy.argtypes = c_void_p, (c_void_p,)


class BeingWritten(Fail):
    """Another process is writing this beton at the moment."""


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
    page_size  bytes, a power of two; no stored image may be larger. Default: 2 MiB for small raw images, else 8 MiB,
               doubled where an image needs it
    views      views per image: the second and further ones become the fields `view_2`, `view_3`, ...
    The bytes do not depend on num_workers. Writes to `<path>.partial` and renames; after an error the partial file is
    removed. Raises Fail for a sample that cannot be stored and when the disk is full."""
    path, partial = Path(path), Path(f'{path}.partial')
    if mode not in ('raw', 'jpg') or n < 1 or num_workers < 1 or not 1 <= quality <= 100 \
            or page_size is not None and page_size not in [1 << k for k in range(12, 32)]:
        raise Fail(f'{path}: mode ({mode!r}) must be raw or jpg, n ({n}) and num_workers ({num_workers}) at least '
                   f'1, quality ({quality}) 1 to 100, page_size ({page_size}) a power of two from 4096 to 2 GiB')
    fields, metadata_type = beton_fields(views)
    pictures = [f'f{k}' for k, kind in enumerate(fields.values()) if kind is RGBImageField]
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as e:                 # now, not after hours
        raise Fail(f'{path}: settings cannot be written as JSON: {e}') from e

    def stored(image, i, name):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
            raise Fail(f'{path}: sample {i}: `{name}` must be a uint8 array (H, W, 3), not {what}')
        h, w = image.shape[:2]
        if not (0 < h <= 65_500 and 0 < w <= 65_500):    # a limit of JPEG
            raise Fail(f'{path}: sample {i}: `{name}` has {h} x {w} pixels; 1 to 65500 a side can be stored')
        if mode == 'jpg' and h * w > 1:                  # the placeholder of a missing view stays raw
            return JPG, w, h, encode_jpeg(np.ascontiguousarray(image), quality).tobytes()
        return RAW, w, h, image.tobytes()

    def sample(i):
        try:
            image, view, label, index, noise_level = samples(i)
        except OSError as e:
            raise Fail(f'{path}: sample {i} cannot be read: {e}') from e
        if (view is None) != (noise_level < 0) or index < 0:
            raise Fail(f'{path}: sample {i}: index must be >= 0 (is {index}), noise_level -1 without a view and '
                       f'>= 0 with one (is {noise_level})')
        view = np.zeros((1, 1, 3), np.uint8) if view is None else view
        several = view if isinstance(view, list) else [view] * (views if noise_level < 0 else 1)
        if len(several) != views:
            raise Fail(f'{path}: sample {i}: {len(several)} views where {views} are expected')
        return [stored(image, i, 'image'), *(stored(v, i, 'view') for v in several)], (label, index, noise_level)

    try:
        file = open(partial, 'ab')
        if not lock(file):                               # then two at once must not write into the same file
            say(f'{path.parent}: a file system without locks: a second process may write {path.name} too', sys.stderr)
            file.close()
            partial.unlink(missing_ok=True)
            partial = Path(f'{path}.{os.uname().nodename}.{os.getpid()}.partial')
            file = open(partial, 'ab')
        if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            file.close()  # between opening and locking another process has finished: this is its file
            raise BlockingIOError
    except BlockingIOError:
        raise BeingWritten(f'{path}: another process is writing it') from None
    except OSError as e:
        raise Fail(f'{path}: cannot be written: {e.strerror}') from e
    try:
        with file, ThreadPoolExecutor(num_workers) as pool:
            automatic = page_size is None
            if automatic:
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
                        while automatic and len(content) > page_size < 1 << 31:
                            page_size *= 2               # what lies within the smaller ones lies within these
                        if len(content) > page_size:
                            raise Fail(f'{path}: sample {i}: an image of {len(content):,} bytes does not fit a '
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
            atomic(f'{path}.json', lambda p: p.write_text(json.dumps(sidecar) + '\n'))
            os.replace(partial, path)
            return sidecar
    except BaseException as e:                           # Ctrl-C too
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise Fail(f'{path}: cannot be written: {e.strerror or e}') from e
        raise


def _crc32(path, blocks):
    with open(path, 'rb') as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda k: zlib.crc32(os.pread(file.fileno(), BLOCK, k * BLOCK)), blocks))


def open_beton(path, verify=True):
    """Check the beton at `path` against its sidecar and return the sidecar. Raises Fail.

    With verify every byte is checked, once: `<path>.verified` remembers it as long as size, time and inode stay the
    same. Without (another rank does it) only header, metadata and allocation table are."""
    path, side, memo = Path(path), Path(f'{path}.json'), Path(f'{path}.verified')
    try:
        stat = path.stat()
        head = np.fromfile(path, HeaderType, 1)
        if not len(head) or head[0]['version'] != CURRENT_VERSION or not 0 < head[0]['num_fields'] < 100:
            raise Fail(f'{path}: empty or not an FFCV beton: {PACK}')
        if not side.exists():
            raise Fail(f'{path}: its sidecar {side.name} is missing: copy it too, or {PACK}')
        try:
            text = side.read_text('utf-8')
            sidecar = json.loads(text)
            samples, size, crc, fields, *_ = (sidecar[k] for k in ('samples', 'bytes', 'crc32', 'fields', 'with_view',
                                                                   'max_resolution', 'settings'))
            if len(crc) != -(-size // BLOCK) or samples < 1:
                raise ValueError('checksums are missing')
        except (ValueError, KeyError, TypeError) as e:
            raise Fail(f'{side}: not the sidecar of a beton ({e!r}): copy it again, or {PACK}') from e
        if stat.st_size != size:
            raise Fail(f'{path}: {stat.st_size:,} bytes, its sidecar says {size:,}: truncated, half copied '
                       f'or not the file the sidecar belongs to: copy both again, or {PACK}')
        described = np.fromfile(path, FieldDescType, int(head[0]['num_fields']), offset=HeaderType.itemsize)
        names = [d['name'].tobytes().rstrip(b'\0').decode('ascii', 'replace') for d in described]
        views = len(names) - len(FIELDS) + 1
        if not names == fields == list(beton_fields(views)[0]):
            raise Fail(f'{path}: its fields are {", ".join(names)}, not {", ".join(FIELDS)}: {PACK}')
        key = f'{size} {stat.st_mtime_ns} {stat.st_ino} {zlib.crc32(text.encode())}\n'
        blocks = range(len(crc))
        if not verify or memo.exists() and memo.read_text(errors='replace') == key:
            front = HeaderType.itemsize + described.nbytes + samples * beton_fields(views)[1].itemsize
            tail = size - (1 + views) * samples * ALLOC_TABLE_TYPE.itemsize
            blocks = [k for k in blocks if k * BLOCK < front or (k + 1) * BLOCK > tail]
        wrong = [k for k, found in zip(blocks, _crc32(path, blocks)) if found != crc[k]]
        if wrong:
            raise Fail(f'{path}: bytes {wrong[0] * BLOCK:,} to {min(size, (wrong[0] + 1) * BLOCK):,} are damaged '
                       f'(checksum; {len(wrong)} of {len(crc)} blocks): copy it again, or {PACK}')
        if head[0]['num_samples'] != samples:
            raise Fail(f'{path}: {head[0]["num_samples"]} samples, its sidecar says {samples}: {PACK}')
    except FileNotFoundError:
        half = ' (only a half-written .partial does)' if Path(f'{path}.partial').exists() else ''
        raise Fail(f'{path}: does not exist{half}: write it first') from None
    except OSError as e:
        raise Fail(f'{path}: cannot be read: {e.strerror or e}') from e
    settings = sidecar['settings'] if isinstance(sidecar['settings'], dict) else {}     # of other writers: any JSON
    sidecar['settings'] = settings if isinstance(settings.get('dataset', {}), dict) else {**settings, 'dataset': {}}
    if len(blocks) == len(crc):
        with suppress(Fail):                             # a read-only folder: it is checked again next time
            atomic(memo, lambda p: p.write_text(key))
    return sidecar


# ---------------------------------------------------------------------------------------------------------------------
# The loader

def _sources(reader, views, columns):
    """Where image and views of every sample lie, (n, 1 + columns), and their bytes; the last view fills up."""
    fields = [0, 1, *range(5, 4 + views)]
    fill = np.minimum(np.arange(1 + columns), views)
    size = reader.alloc_table['size'].astype(np.int64).reshape(-1, 1 + views)
    return np.stack([reader.metadata[f'f{k}'] for k in fields], 1)[:, fill], size[:, fill]


class Decompressor:
    """libjpeg-turbo's, for one thread; released with it."""

    def __init__(self):
        self.handle, self.release = lib.tjInitDecompress(), lib.tjDestroy

    def __del__(self):
        self.release(self.handle)


class PairLoader:
    """Batches of augmented views from a paired beton.

    path         a beton, or a list of betons that make one set in this order: original pairs and extra real or
                 synthetic images, say (GenView Table 4). `index` stays that of the beton a sample comes from
    views        one recipe per view: size (pixels), crop_scale [lo, hi] (share of the area; null: the shorter side is
                 resized to `resize`, the centre cut out), flip, jitter [brightness, contrast, saturation, hue],
                 jitter_prob, gray_prob, blur_prob, blur_sigma [lo, hi], blur_kernel (pixels, null: by sigma),
                 solarize_prob, randaugment (operations), randaugment_magnitude [mean, standard deviation]. What is
                 left out is off.
    generated    what a view that is cut from a synthetic image has instead in its recipe, {'blur_prob': 0.0} say
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
    exact        decode JPEGs as PIL does, bit for bit (see the top of this file)

    The global order of an epoch is a permutation from (seed, epoch); global batch b is perm[b * G:(b + 1) * G] with
    G = batch_size * world, of which every rank takes its slice: the same for any world size with the same G."""

    def __init__(self, path, views, alpha=1.0, swap='random', *, batch_size, seed, num_workers, rank=0, world=1,
                 drop_last=True, shuffle=True, indices=None, verify=None, pin_memory=False, generated=None,
                 exact=False):
        paths = path if isinstance(path, (list, tuple)) else [path]
        if not paths or not all(isinstance(p, (str, os.PathLike)) for p in paths):
            raise Fail(f'path: {path!r} is neither the name of a beton nor a list of such names')
        self.paths, self.alpha, self.shuffle, self.pin_memory = list(map(Path, paths)), alpha, shuffle, pin_memory
        if not views:
            raise Fail('views: at least one recipe is needed')
        self.recipes = np.array([[recipe_row({**r, **instead} if instead else r, f'views[{k}]')
                                  for k, r in enumerate(views)] for instead in (None, generated)])
        if swap not in ('random', 'first', 'second') or (swap == 'second' and len(views) < 2):
            raise Fail(f"swap: {swap!r} is not one of random, first, second (the last with two views or more)")
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise Fail(f'alpha: {alpha!r} is not a probability')
        for name, value, least in (('batch_size', batch_size, 1), ('num_workers', num_workers, 1), ('world', world, 1),
                                   ('rank', rank, 0), ('seed', seed, 0)):
            if not isinstance(value, (int, np.integer)) or not least <= value < 1 << 62:
                raise Fail(f'{name}: {value!r} is not a whole number >= {least}')
        if rank >= world:
            raise Fail(f'rank {rank} does not fit a world of {world}')
        path = ' + '.join(map(str, self.paths))
        sidecars = [open_beton(p, verify=rank == 0 if verify is None else verify) for p in self.paths]
        self.sizes = [sidecar['bytes'] for sidecar in sidecars]
        self.classes = [sidecar['settings'].get('classes') for sidecar in sidecars]
        self.sidecar = sidecars[0] if len(sidecars) == 1 else {
            **{key: sum(sidecar[key] for sidecar in sidecars) for key in ('samples', 'with_view', 'bytes')},
            'max_resolution': max(sidecar['max_resolution'] for sidecar in sidecars),
            'crc32': [crc for sidecar in sidecars for crc in sidecar['crc32']]}
        n = self.sidecar['samples']
        self.indices = np.arange(n) if indices is None else np.asarray(indices)
        if self.indices.ndim != 1 or not len(self.indices) or self.indices.dtype.kind not in 'iu' \
                or self.indices.min() < 0 or self.indices.max() >= n:
            raise Fail(f'{path}: indices must be a non-empty list of positions from 0 to {n - 1}')
        self.global_batch = batch_size * world
        self.batches = (len(self.indices) + (0 if drop_last else self.global_batch - 1)) // self.global_batch
        if not self.batches:
            raise Fail(f'{path}: a batch of {batch_size} on each of {world} processes is more than the '
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
        self.io = np.array([c_cast(libc.pread, c_void_p).value, c_cast(lib.tjDecompress2, c_void_p).value, 0,
                            EXACT_DCT if exact else FAST_DCT, *(file.fileno() for file in self.files)], np.int64)
        size = int(self.recipes[..., SIZE].max())
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
        overwritten. Raises Fail when a beton has changed or a sample cannot be read or decoded."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise Fail(f'epoch {epoch} or start_batch {start_batch} is out of range: it has {len(self)} batches')
        for path, file, before in zip(self.paths, self.files, self.sizes):
            size = os.fstat(file.fileno()).st_size
            if size != before:
                raise Fail(f'{path}: {size:,} bytes, it had {before:,} when it was opened')
        order = self.indices
        if self.shuffle:
            order = order[np.argsort(permutation_keys(self.seed, epoch, len(order)), kind='stable')]
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
        drawn = choose(self.seed, epoch, self.keys[ids], self.view_count[ids])
        for source, column in ((IMAGE, 0), (VIEW, 1 + drawn)):
            stored, columns = self.stored[ids, column], table[:, 5 * source:5 * source + 5].T
            columns[:] = (stored['data_ptr'], self.region_bytes[ids, column], stored['height'], stored['width'],
                          stored['mode'] == JPG)
        table[:, FILE], table[:, KEY], table[:, HAS_VIEW] = self.file_of[ids], self.keys[ids], meta['f4'] >= 0
        sizes = self.recipes[IMAGE, :, SIZE].astype(np.int64)
        areas = sizes ** 2 * 3 * n
        offsets = np.concatenate([[0], np.cumsum(areas)])
        pixels = torch.empty(int(offsets[-1]), dtype=torch.uint8, pin_memory=self.pin_memory)
        synthetic = torch.empty(n, dtype=torch.int8)
        batch = {'views': [], 'synthetic': synthetic}
        for v, size in enumerate(sizes.tolist()):
            batch['views'].append(pixels[offsets[v]:offsets[v + 1]].view(n, size, size, 3).permute(0, 3, 1, 2))
        for name, column in (('label', 'f2'), ('index', 'f3'), ('noise_level', 'f4')):
            batch[name] = torch.from_numpy(meta[column].copy())
        arguments = (self.seed, epoch, float(self.alpha), self.swap, self.recipes, offsets)
        step = -(-n // (4 * self.num_workers))           # four jobs a thread: they end at about the same time
        jobs = [self.threads.submit(self._render, ids, table, first, min(n, first + step), arguments, pixels.numpy(),
                                    synthetic.numpy()) for first in range(0, n, step or 1)]
        return batch, jobs

    def of_thread(self):
        """What a thread has for itself: `io` with its decompressor, `scratch` (pages never touched cost nothing)."""
        if not hasattr(self.local, 'io'):
            self.local.decompressor, self.local.io = Decompressor(), self.io.copy()
            self.local.io[HANDLE] = self.local.decompressor.handle
            self.local.scratch = [np.empty(shape, kind) for shape, kind in self.scratch]
        return self.local

    def _render(self, ids, table, first, last, arguments, pixels, synthetic):
        own = self.of_thread()
        while (failed := render(own.io, table, first, last, *arguments, *own.scratch, pixels, synthetic)) >= 0:
            first, field = failed >> 2, failed >> 1 & 1
            k, what = ids[first], f'is a JPEG that does not decode: {PACK}'
            if not failed & 1:
                what = self._short(table[first], 5 * field)
                if what is None:                         # a signal, a network: now it can be read
                    continue
            field = ('image', 'view')[field]
            raise Fail(f'{self.paths[self.file_of[k]]}: `{field}` of the sample with index '
                       f'{self.metadata["f3"][k]} {what}')

    def _short(self, row, column):
        """Why a read gave less than it should, in words; None where it gives all now (Python goes on after signals)."""
        at, size = row[column:column + 2].tolist()
        try:
            if len(os.pread(self.files[row[FILE]].fileno(), size, at)) == size:
                return None
        except OSError as error:
            return f'cannot be read: {error.strerror}'
        return f'ends early: the file has been truncated: {PACK}'

    def _collect(self, batch, jobs):
        for job in jobs:
            job.result()                                 # raises what the job raised
        return batch


def check_size(loader, sizes, meant=False):
    """Views larger than the stored images only look like more: a text for the log (or None), Fail from twice on, unless
    the size is meant (somebody has written it down: an encoder may have been trained at it).

    sizes: {key of the config: pixels a side}"""
    stored, key = loader.metadata['f0'], max(sizes, key=sizes.get)
    side = int(np.median(np.minimum(stored['height'], stored['width'])))
    text = f'{key}: views of {sizes[key]} px from stored images of {side} px (median of the shorter side)'
    if sizes[key] > 2 * side and not meant:
        where = ' + '.join(map(str, loader.paths))
        raise Fail(f'{text} in {where}: set {key}={side}, or write the beton from larger images'
                   + f'; where the enlargement is meant, set {key}={sizes[key]}' * (meant is None))
    return f'{text} are enlarged' if sizes[key] > side else None
