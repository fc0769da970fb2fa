"""Does anything grow faster than the number of images? The bookkeeping of loader, stage 1 and stage 2 on 1,000 to
1,000,000 images, with tiny ones and networks that compute nothing, and the loader's memory over 50 epochs.

    python benchmarks/scale.py                                     # minutes; `folder` needs under 1 GB
    python benchmarks/scale.py sizes=1000,10000 epochs=5

Every size is a fresh process; `first` counts from its start, imports included. The loader reads pairs of 4 px, stored
raw; opening is timed with the checksum of every byte (once a file) and without (afterwards). Stage 1 is measured with
16 tokens an image, stage 2 with views of 4 px; both are run as users run them, once more when all chunks are there
(resuming), and stage 2 with verify=true. Stages end at `stage_limit` images; larger ones take minutes. The memory over
`epochs` epochs is taken at the second size. The last line is one JSON object: seconds and bytes an image by size, and
`ratio`: of the part that grows fastest, time per image at its two largest sizes, smaller / larger.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bench
import fg_proportion
import gen_views
from common import versions
from config import default_config
from data import PairLoader, open_beton, write_beton
from sources import Source

CLOCKS = ('first', 'open')                               # seconds that do not grow with the images


def resident():
    """Bytes of memory that this process holds."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def timed(work):
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def pixels(count=1024, side=4):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------
# Parts: each a process of its own, function of the number of images and a folder

def packing(n, folder):
    images, beton = pixels(), folder / 'pairs.beton'
    write, _ = timed(lambda: write_beton(beton, lambda i: (images[i % 1024], images[-i % 1024], 0, i, 0), n, {}))
    check, _ = timed(lambda: open_beton(beton))
    return dict(write=write, check=check, disk=beton.stat().st_size / n)


def loading(n, folder, epochs=0):
    before = resident()
    opening, loader = timed(lambda: PairLoader(folder / 'pairs.beton', [{'size': 4, 'crop_scale': None}] * 2, seed=0,
                                               batch_size=256, num_workers=os.cpu_count(), verify=False))
    opened = resident() - before
    next(loader.epoch(0))
    first = time.time() - float(os.environ['STARTED'])
    shuffle = statistics.median(timed(lambda: loader.epoch(k))[0] for k in range(1, 6))
    whole, _ = timed(lambda: [None for _ in loader.epoch(6)])
    found = dict(open=opening, first=first, shuffle=shuffle, epoch=whole, memory=opened / n)
    if epochs:
        held = [resident()]
        for epoch in range(epochs):
            for _ in loader.epoch(epoch):
                pass
            held.append(resident())
        found['growth'] = (held[-1] - held[len(held) // 5]) / epochs     # caches are filled by then
    return found


class Clip:
    """What stage 1 needs of an encoder."""
    image_size, token_dim, embedding_dim = 4, 8, 16

    def __init__(self, spec, device):
        self.preprocess = type('', (), {'transforms': [None, None]})
        self.tokens = torch.randn(256, 8, 4, 4)

    def fingerprint(self):
        return 'none'

    def encode(self, images, dtype):
        return self.tokens[:len(images)], torch.zeros(len(images), 16)


class UnCLIP:
    """What stage 2 needs of a generator."""
    name, dtype, embedding_dim = 'none', torch.float32, 16

    def __init__(self, spec, device):
        pass

    def views(self, embeddings, noise_levels, seeds):
        return np.stack([np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8) for seed in seeds])


def source_of(n):
    """n images, named and not there: their names are looked up, their pixels are always the same ones."""
    images = list(map(Image.fromarray, pixels()))
    return lambda spec: Source('folder', lambda k: images[k % 1024], np.zeros(n, int), ['a'],
                               [f'a/{k:08d}.png' for k in range(n)], '/nowhere')


def stage_1(n, folder):
    import frozen_clip
    fg_proportion.source_dataset, frozen_clip.FrozenClip = source_of(n), Clip
    fg_proportion.Images.__init__ = lambda self, source, clip: self.__dict__.update(
        source=source, size=4, prepare=lambda image: torch.zeros(3, 4, 4, dtype=torch.uint8))
    config = default_config(fg_proportion.DEFAULTS)
    config.update(output=str(folder / 'fg'), pca_images=1000, num_workers=0, device='cpu')
    run = lambda: fg_proportion.measure(config, folder / 'fg')
    sweep, _ = timed(run)
    (folder / 'fg/fg_proportion.npz').unlink()
    return dict(stage_1=sweep, stage_1_resume=timed(run)[0])


def stage_2(n, folder):
    sys.modules['generators'] = sys.modules[__name__]    # in place of diffusers
    gen_views.source_dataset = source_of(n)
    config = default_config(gen_views.DEFAULTS)
    config.update(output=str(folder / 'views'), proportions=str(folder / 'fg'), batch_size=256, view_size=4,
                  view_format='png', beton_mode='raw', device='cpu', pack=False)
    config['generator']['model'], config['dataset'] = 'none', {**config['dataset'], 'name': 'folder', 'root': 'none'}
    run = lambda **changes: timed(lambda: gen_views.main({**config, **changes}))[0]
    return dict(stage_2=run(), stage_2_resume=run(), verify=run(verify=True), pack=run(pack=True))


# ---------------------------------------------------------------------------------------------------

def fresh(part, n, folder, **options):
    """What a part finds, in a process of its own."""
    code = ('import scale, json, pathlib; '
            f'print(json.dumps(scale.{part}({n}, pathlib.Path({str(folder)!r}), **{options})))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent,
                          env={**os.environ, 'STARTED': str(time.time())})
    if done.returncode:
        sys.exit(f'{part}, {n} images: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    options = bench.options(sizes='1000,10000,100000,1000000', stage_limit=100_000, epochs=50, folder='')
    print(f'{bench.device_name()}; {versions()}', flush=True)
    sizes, rows = sorted(map(int, options['sizes'].split(','))), {}
    with tempfile.TemporaryDirectory(dir=options['folder'] or None) as scratch:
        for n in sizes:
            folder = Path(scratch) / str(n)
            folder.mkdir()
            row = rows[n] = {**fresh('packing', n, folder), **fresh('loading', n, folder)}
            if n <= options['stage_limit']:
                row |= {**fresh('stage_1', n, folder), **fresh('stage_2', n, folder)}
            if n == sizes[min(1, len(sizes) - 1)]:
                row |= fresh('loading', n, folder, epochs=options['epochs'])
            subprocess.run(['rm', '-rf', folder], check=True)
            print(f'{n:>9,} images: ' + ', '.join(
                f'{key} {value:.0f} B' if key in ('memory', 'disk', 'growth') else
                f'{key} {value:.2f} s' if key in CLOCKS else f'{key} {1e6 * value / n:.2f} us'
                for key, value in row.items()), flush=True)
    growing = [key for key in rows[sizes[0]] if key not in (*CLOCKS, 'memory', 'disk', 'growth')]
    per_image = {key: {n: row[key] / n for n, row in rows.items() if key in row} for key in growing}
    worst = min((a / b, key) for key, values in per_image.items() for a, b in zip(list(values.values())[-2:-1],
                                                                                    list(values.values())[-1:]))
    print(json.dumps({**options, 'rows': rows, 'worst': worst[1], 'ratio': round(worst[0], 3)}))


if __name__ == '__main__':
    main()
