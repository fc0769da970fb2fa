"""Stage 2: one synthetic positive view of every image (GenView section 3.3), packed into a beton of pairs.

    python gen_views.py yamls/gen_views/cifar10_adaptive.yaml
    torchrun --nproc-per-node 8 gen_views.py yamls/gen_views/in1k_adaptive.yaml

Reads the noise levels and CLIP embeddings of stage 1 (fg_proportion.py). Views are kept in chunks of consecutive
images, OUTPUT/views/000012.tar with {index:08d}.png (or .jpg) and .json, WebDataset's naming. A chunk appears when it
is complete and is never made again: the same command goes on where a killed one stopped, and processes share the work
by taking every n-th chunk. The process that finds all chunks there writes OUTPUT/pairs.beton and pairs.png.

The view of image i depends on (seed, i) and the settings alone, not on batches, processes or order. (In half precision
a GPU rounds differently for other batch sizes: the same picture, not the same bytes.)
"""
import io
import json
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import Fail, Log, Processes, StopSignal, atomic, run, save_json
from data import BeingWritten, open_beton, source_dataset, write_beton

DEFAULTS = """
output: ''                # run folder
dataset:                  # the images, as in stage 1
  name: ''                # a name of torchvision.datasets, 'tiny-imagenet', or 'folder'
  root: ''                # where it is or goes
  split: train
  download: false
  subset: null            # the first images of each class, this many in all; null: all
proportions: ''           # run folder of fg_proportion.py: noise levels and embeddings of the same images
strategy: adaptive        # adaptive (eq. 8) | constant | random (0, 100, ..., 400) (Table 7) | none (no views: a beton
                          # for baselines and for evaluation sets)
noise_level: 200          # of strategy constant, 0-999
generator:
  model: ''               # folder in diffusers' layout or hub id of a Stable unCLIP image-variation model
  fallbacks: []           # further ids, tried in turn
  steps: 20               # denoising steps (appendix A)
  guidance_scale: 10.0    # (appendix A)
  precision: auto         # fp32 | bf16 | fp16 | auto: fp16 on a GPU, on a CPU bf16 if it has AVX512-BF16
                          # and else fp32
seed: 0
batch_size: 16            # images at once
chunk_size: 1000          # images a chunk: what a killed process loses at most
view_size: 512            # pixels a side of the stored view (official code: 768 reduced to 512)
view_format: jpg          # jpg (quality 95) | png (lossless, for small views)
image_size: null          # shorter side of the stored original; null: as it is
beton_mode: jpg           # jpg | raw (for images of a few thousand pixels)
beton_quality: 90         # of jpg
grid: 40                  # pairs in pairs.png
num_workers: 2            # threads that write the beton
device: auto              # auto | cpu | cuda
"""
LEVELS = (0, 100, 200, 300, 400)


def main(config):
    processes = Processes(config['device'], group=False)  # nothing here waits for another process
    check(config)
    stop, output = StopSignal(), Path(config['output'])
    source = source_dataset(config['dataset'])
    levels, embeddings, checksum = noise_levels(config, len(source))
    settings = {'stage': 'gen_views', 'dataset': {k: config['dataset'][k] for k in ('name', 'root', 'split', 'subset')},
                'images': len(source), 'strategy': config['strategy']}
    if config['strategy'] != 'none':
        settings.update({k: config[k] for k in ('seed', 'view_size', 'view_format', 'chunk_size')},
                        generator=config['generator'], proportions=checksum,
                        noise_level=config['noise_level'] if config['strategy'] == 'constant' else None)
    same_settings(output / 'settings.json', settings)  # before anything is written
    log = Log(output, config, main=processes.main)

    if config['strategy'] != 'none':
        chunks = [(output / 'views' / f'{number:06d}.tar', range(start, min(start + config['chunk_size'], len(source))))
                  for number, start in enumerate(range(0, len(source), config['chunk_size']))]
        todo = [c for c in chunks[processes.rank::processes.world] if not c[0].exists()]
        log.write(f'{len(source)} images, levels {histogram(levels)}; {len(chunks)} chunks, {len(todo)} to make here')
        if todo:
            generate(config, todo, source, levels, embeddings, settings, processes, log, stop)
        missing = sum(not path.exists() for path, _ in chunks)
        if missing or stop:
            log.write(f'{stop.name}: leaving; ' * bool(stop) + f'{missing} of {len(chunks)} chunks are still to be '
                      'made; the same command goes on')
            sys.exit(stop.exit_code if stop else 0)
    settings.update({k: config[k] for k in ('image_size', 'beton_mode', 'beton_quality')})
    beton = output / 'pairs.beton'
    if beton.exists():
        packed = open_beton(beton, verify=False)['settings']
        for key, value in settings.items():
            if packed.get(key) != value:
                raise Fail(f'{beton}: was packed with {key} = {packed.get(key)!r}, now it is {value!r}; delete it, and '
                           'the same command packs it again')
        log.write(f'{beton} is complete')
        return
    try:
        pack(config, beton, source, levels, settings, log, stop)
    except BeingWritten:
        log.write(f'{beton}: another process is packing it')


def check(config):
    for key in ('output', 'dataset.name', *(('proportions', 'generator.model') if config['strategy'] != 'none' else ())):
        value = config
        for part in key.split('.'):
            value = value[part]
        if not value:
            raise Fail(f"'{key}' is not set; write it into the YAML")
    for key, allowed in (('strategy', ('adaptive', 'constant', 'random', 'none')), ('view_format', ('jpg', 'png')),
                         ('beton_mode', ('jpg', 'raw'))):
        if config[key] not in allowed:
            raise Fail(f"'{key}' must be one of {', '.join(allowed)}, not {config[key]!r}")
    if not 0 <= config['noise_level'] <= 999:
        raise Fail(f"'noise_level' must lie in 0..999, not {config['noise_level']}")
    for key in ('batch_size', 'chunk_size', 'view_size', 'num_workers'):
        if config[key] < 1:
            raise Fail(f"'{key}' must be at least 1, not {config[key]}")


def noise_levels(config, count):
    """Noise level (-1: no view) and embedding of every image, and a checksum of both."""
    if config['strategy'] == 'none':
        return np.full(count, -1), None, None
    folder = Path(config['proportions'])
    for name in ('fg_proportion.npz', 'embeddings.npy'):
        if not (folder / name).is_file():
            raise Fail(f'{folder / name}: no such file; run fg_proportion.py on this dataset first')
    embeddings = np.load(folder / 'embeddings.npy', mmap_mode='r')
    adaptive = np.load(folder / 'fg_proportion.npz')['noise_level']
    if not len(adaptive) == len(embeddings) == count:
        raise Fail(f'{folder}: holds {len(adaptive)} noise levels and {len(embeddings)} embeddings, the dataset '
                   f'{count} images; run fg_proportion.py with the same dataset keys')
    if config['strategy'] == 'constant':
        levels = np.full(count, config['noise_level'])
    elif config['strategy'] == 'random':
        levels = np.array([LEVELS[draw(config['seed'], i, 1) % len(LEVELS)] for i in range(count)])
    else:
        levels = adaptive.astype(int)
    levels = np.where(adaptive < 0, -1, levels)  # stage 1 could not read these
    return levels, embeddings, zlib.crc32(levels.tobytes(), zlib.crc32(np.ascontiguousarray(embeddings)))


def draw(*numbers):
    """A 63-bit number from a tuple of integers: all that is random about image i comes from (seed, i)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def histogram(levels):
    return ', '.join(f'{level}: {n}' if level >= 0 else f'none: {n}' for level, n in sorted(Counter(levels.tolist()).items()))


def same_settings(path, settings):
    """Views made with other settings must not mix with these. (The file appears with the first chunk.)"""
    if path.exists():
        old = json.loads(path.read_text())
        flat = [{f'{k}.{j}' if isinstance(v, dict) else k: u for k, v in s.items()
                 for j, u in (v.items() if isinstance(v, dict) else [(None, v)])} for s in (old, settings)]
        for key in {**flat[1], **flat[0]}:
            if flat[0].get(key) != flat[1].get(key):
                raise Fail(f"{path.parent}: was made with {key} = {flat[0].get(key)!r}, now it is "
                           f'{flat[1].get(key)!r}; choose another output folder or delete this one')


# ---------------------------------------------------------------------------------------------------
# Generation

def generate(config, chunks, source, levels, embeddings, settings, processes, log, stop):
    from generators import UnCLIP
    generator = UnCLIP(config['generator'], processes.device)
    if embeddings.shape[1] != generator.embedding_dim:
        raise Fail(f"{config['proportions']}: embeddings have {embeddings.shape[1]} dimensions, {generator.name} wants "
                   f'{generator.embedding_dim}; run fg_proportion.py with the CLIP that the generator was trained with')
    log.write(f'generator {generator.name} on {processes.device}, {generator.dtype}')
    bar = tqdm(total=sum(len(indices) for _, indices in chunks), unit='view', disable=None)
    for path, indices in chunks:
        start, members = time.time(), {}
        wanted = [i for i in indices if levels[i] >= 0]
        for at in range(0, len(wanted), config['batch_size']):
            batch = wanted[at:at + config['batch_size']]
            real = len(batch)
            # A full batch always, the last image repeated: rounding may depend on the shape, a view must not.
            batch = batch + batch[-1:] * (min(config['batch_size'], len(levels)) - real)
            seeds = [draw(config['seed'], i) for i in batch]
            images = generator.views(embeddings[batch], levels[batch], seeds)
            for i, seed, image in list(zip(batch, seeds, images))[:real]:
                record = dict(index=i, path=source.path(i), seed=seed, noise_level=int(levels[i]),
                              generator=generator.name)
                members[i] = (encode(image, config), record)
            bar.update(real)
            if stop:  # chunks are whole or not there
                bar.close()
                return
        for i in indices:
            members.setdefault(i, (None, dict(index=i, path=source.path(i), noise_level=-1,
                                              error='stage 1 could not read the source image')))
        save_json(Path(config['output']) / 'settings.json', settings)
        atomic(path, lambda temporary: write_chunk(temporary, members, config['view_format']))
        seconds = time.time() - start
        log.write(None if bar.disable is False else f'{path.name}: {len(wanted)} views, {len(wanted) / seconds:.1f} a second',
                  step=int(path.stem), views=len(wanted), views_per_second=len(wanted) / seconds)
    bar.close()


def encode(image, config):
    image = Image.fromarray(image)
    if image.size != (config['view_size'],) * 2:
        image = image.resize((config['view_size'],) * 2, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, *(['PNG'] if config['view_format'] == 'png' else ['JPEG']), quality=95)
    return file.getvalue()


def write_chunk(path, members, suffix):
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for i, (image, record) in sorted(members.items()):
            for name, content in ((suffix, image), ('json', json.dumps(record).encode())):
                if content is not None:
                    entry = tarfile.TarInfo(f'{i:08d}.{name}')  # no time stamp: the same views give the same bytes
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


# ---------------------------------------------------------------------------------------------------
# Packing

class Views:
    """views[i] -> uint8 (H, W, 3) or None, read from the chunks; safe to call from several threads."""

    def __init__(self, folder, chunk_size, suffix):
        self.folder, self.chunk_size, self.suffix = Path(folder), chunk_size, suffix
        self.lock, self.chunks = threading.Lock(), {}

    def __getitem__(self, i):
        number = i // self.chunk_size
        with self.lock:
            if number not in self.chunks:
                path = self.folder / f'{number:06d}.tar'
                try:
                    with tarfile.open(path) as tar:
                        files = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(self.suffix)}
                except (OSError, tarfile.TarError) as error:
                    raise Fail(f'{path}: cannot be read ({error}); delete it, and the same command makes it again') from None
                self.chunks = {**dict(list(self.chunks.items())[-1:]), number: files}  # neighbours ask in turn
            content = self.chunks[number].get(f'{i:08d}.{self.suffix}')
        return None if content is None else np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))


def pack(config, beton, source, levels, settings, log, stop):
    views = Views(beton.parent / 'views', config['chunk_size'], config['view_format'])
    for leftover in views.folder.glob('.*.tmp.tar'):  # of killed processes: every chunk is complete now
        leftover.unlink(missing_ok=True)

    def original(i):
        image, label = source[i]
        scale = config['image_size'] and config['image_size'] / min(image.size)
        if scale and scale < 1:
            image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
        return np.asarray(image), label

    readable = list(range(len(source)))
    if (levels < 0).any() or config['strategy'] == 'none':  # only then can there be images that do not open
        readable = [i for i in readable if opens(source, i)]
    lost = len(source) - len(readable)

    def sample(k):
        if stop:  # write_beton removes what it has begun
            log.write(f'{stop.name}: leaving; the same command packs {beton} again')
            sys.exit(stop.exit_code)
        i = readable[k]
        image, label = original(i)
        view = views[i] if levels[i] >= 0 else None
        return image, view, label, i, int(levels[i])

    write_beton(beton, sample, len(readable), settings, mode=config['beton_mode'], quality=config['beton_quality'],
                num_workers=config['num_workers'])
    log.write(f'{beton}: {len(readable)} samples' + (f'; {lost} source images could not be read and are left out: '
              f'{sorted(set(range(len(source))) - set(readable))[:10]}' if lost else ''))
    if config['strategy'] != 'none':
        picture(beton.with_suffix('.png'), [sample(k) for k in spread(levels[readable], config['grid'])])
        log.write(f"{beton.with_suffix('.png')}: source above, view below")


def opens(source, i):
    try:
        return bool(source[i])
    except Exception:
        return False


def spread(levels, count):
    """`count` positions, as many of each level as there are, lower levels first."""
    found = [np.flatnonzero(levels == level) for level in sorted(set(levels.tolist()) - {-1})]
    each = -(-count // max(1, len(found)))
    return [int(p) for positions in found for p in positions[:each]][:count]


def picture(path, samples):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    columns = 10
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(2 * rows, columns, figsize=(columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for k, (image, view, _, index, level) in enumerate(samples):
        above, below = axes[2 * (k // columns), k % columns], axes[2 * (k // columns) + 1, k % columns]
        above.imshow(image)
        above.set_title(f'level {level}', fontsize=7, pad=2)
        below.imshow(view)
    figure.tight_layout(pad=0.3)
    atomic(path, lambda p: figure.savefig(p, dpi=120))
    plt.close(figure)


if __name__ == '__main__':
    run(main, DEFAULTS)
