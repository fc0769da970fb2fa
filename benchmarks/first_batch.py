"""How long a user waits at the second start on a machine (compiled kernels are cached), each time in a fresh process:
for the first batch of pairs and of 8 crops, for the import of a stage, and for the answer to a mistake in the YAML.

    python benchmarks/first_batch.py                     # 224 px; all stages
    python benchmarks/first_batch.py rounds=1 size=32

Imports count, from the start of the process to its first line. The peer is stock FFCV's Loader with random crop and
flip on the same beton, which compiles at every start; `import torch` alone, and with torchvision, is the limit. The
last line is one JSON object: seconds (median over the rounds, and range) of each, `ratio`, the median over the rounds
of FFCV / ours for pairs, and `limit`, that of `import torch` / ours. Contenders alternate. Mistakes are an unknown key
and a number out of range; what only torch or the data can tell (device, precision, labels) is answered after imports.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

import bench
import common
import data

STAGES = ('fg_proportion', 'gen_views', 'pretrain', 'linear_eval', 'semi_eval', 'detect_eval', 'view_eval',
          'train_walker', 'train_discriminator')
OURS = '''
from data import PairLoader
recipe = dict(size={size}, crop_scale=[0.2, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.1], jitter_prob=0.8, gray_prob=0.2,
              blur_prob=0.5, blur_sigma=[0.1, 2.0])
small = dict(recipe, size={small}, crop_scale=[0.05, 0.2])
loader = PairLoader('{beton}', [recipe] * 2 + [small] * {crops}, batch_size={batch}, seed=0, num_workers={workers})
print(len(next(loader.epoch(0))['views']), flush=True)
'''
FFCV = '''
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
crop = lambda: [RandomResizedCropRGBImageDecoder(({size}, {size})), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
loader = Loader('{beton}', {batch}, {workers}, OrderOption.RANDOM, pipelines=dict(
    image=crop(), view=crop(), label=None, index=None, noise_level=None))
print(len(next(iter(loader))), flush=True)
'''


def first_line(*arguments):
    """Seconds from the start of a Python process to its first line, and that line."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=bench.ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
        rest = process.stdout.read()
    return seconds, line + rest * (process.returncode not in (0, 2))


def contenders(options, beton):
    """{name: (arguments of Python, what its first line must begin with)}"""
    filled = dict(options, beton=beton, small=max(8, options['size'] * 96 // 224), crops=0)
    found = {'import torch': ('import torch; print(1, flush=True)', '1'),
             'import torch, torchvision': ('import torch, torchvision; print(1, flush=True)', '1'),
             'pairs': (OURS.format(**filled), '2'), 'ffcv': (FFCV.format(**filled), '2'),
             '8 crops': (OURS.format(**{**filled, 'crops': 6}), '8')}
    found.update({f'import {stage}': (f'import {stage}; print(1, flush=True)', '1') for stage in STAGES})
    found = {name: (['-c', code], answer) for name, (code, answer) in found.items()}
    for stage in STAGES:
        example = sorted((bench.ROOT / 'yamls' / stage).glob('*.yaml'))[0]
        found[f'unknown key, {stage}'] = [f'{stage}.py', str(example), 'sed=1'], f"{stage}.py: command line: unknown"
        found[f'wrong value, {stage}'] = [f'{stage}.py', str(example), 'seed=-1'], f'{stage}.py: seed: -1'
    return found


def main():
    options = bench.options(size=224, batch=64, workers=os.cpu_count(), rounds=3)
    print(f'{bench.device_name()}; {common.versions()}', flush=True)
    rng, side = np.random.default_rng(0), options['size'] * 3 // 2
    with tempfile.TemporaryDirectory() as folder:
        picture = lambda: np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((side, side)))
        pairs = [(picture(), picture()) for _ in range(options['batch'])]
        beton = f'{folder}/pairs.beton'
        data.write_beton(beton, lambda i: (*pairs[i % len(pairs)], 0, i, 0), 8 * len(pairs), {}, mode='jpg')
        runs = contenders(options, beton)
        seconds = {name: [] for name in runs}
        for r in range(-1, options['rounds']):
            for name, (arguments, answer) in runs.items():
                if r < 0 and name not in ('pairs', '8 crops'):
                    continue                             # these two compile what is not yet cached
                took, line = first_line(*arguments)
                if not line.startswith(answer):
                    if name != 'ffcv':
                        sys.exit(f'{name}: {line}')
                    print(f'ffcv: does not run: {line.strip().splitlines()[-1]}')
                    took = float('nan')
                if r >= 0:
                    seconds[name].append(took)
            print(f'round {r}: ' + ', '.join(f'{name} {seconds[name][r]:.2f}' for name in (
                'import torch', 'pairs', '8 crops', 'ffcv')) if r >= 0 else 'kernels are compiled', flush=True)
    for name, values in seconds.items():
        print(f'{name:36} {statistics.median(values):6.2f} s ({min(values):.2f}-{max(values):.2f})')
    share = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))
    print(json.dumps({**options, 'seconds': {name: [round(f(values), 3) for f in (statistics.median, min, max)]
                                             for name, values in seconds.items()},
                      'ratio': round(share('ffcv', 'pairs'), 3), 'ratio_import': round(
                          share('import torch, torchvision', 'import pretrain'), 3),
                      'limit': round(share('import torch', 'pairs'), 3)}))


if __name__ == '__main__':
    main()
