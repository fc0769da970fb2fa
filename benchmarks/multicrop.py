"""Multi-crop, 2 x 224 and 6 x 96 pixels a sample as SwAV has them, side by side: our PairLoader, which decodes an image
once, against stock FFCV (a pipeline for each crop, each of which decodes anew) and a DataLoader with torchvision (one
decode, on PIL images and on tensors). Same JPEGs, same number of workers, uint8 batches, alternating rounds.

    python benchmarks/multicrop.py

Stock FFCV crops and flips alone: it has neither hue nor grey nor blur. `ratio_ffcv` compares it with ours doing no
more either; `ratio` (DataLoader on PIL images) and `ratio_tensors` have SwAV's recipe on both sides. The last line is
one JSON object: samples (8 crops) a second, ratios as medians over the rounds and their ranges, `limit` our crops and
flips as a share of decoding every image once and nothing more, `limit_swav` those with SwAV's recipe.
"""
import json
import os
import statistics
import tempfile
import time

import numpy as np
import torch
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from PIL import Image

import bench
import data
import peers
from augment import IMAGE

options = bench.options(workers=os.cpu_count(), rounds=3, seconds=8.0, images=1024, batch_size=32, quality=90)
workers, batch_size = options['workers'], options['batch_size']


def ffcv(path, views):
    """epoch(e) of FFCV's own loader: a pipeline for each crop."""
    pipelines = {name: None for name in data.FIELDS}
    for k, r in enumerate(views):
        pipelines[f'crop{k}'] = PipelineSpec(
            'image', decoder=RandomResizedCropRGBImageDecoder((r['size'], r['size']), tuple(r['crop_scale'])),
            transforms=[RandomHorizontalFlip(r['flip']), ToTensor(), ToTorchImage()])
    loader = Loader(path, batch_size=batch_size, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
                    drop_last=True, pipelines=pipelines)
    return lambda e: loader


def main():
    swav = peers.recipes('swav', 224)
    crops = [{key: r[key] for key in ('size', 'crop_scale', 'flip')} for r in swav]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for i in range(options['images'] // 2):          # every image comes twice
            samples.append([f'{folder}/{i}.jpg'])
            Image.fromarray(peers.photo(rng, 224)).save(samples[-1][0], quality=options['quality'])
        samples *= 2
        path = f'{folder}/images.beton'
        data.write_beton(path, lambda i: (np.asarray(Image.open(samples[i][0])), None, 0, i, -1), len(samples), options,
                         mode='jpg', quality=options['quality'], num_workers=workers)
        ours, plain = (data.PairLoader(path, views, batch_size=batch_size, seed=0, num_workers=workers)
                       for views in (swav, crops))
        contenders = {'ours': ours.epoch, 'ours_crops': plain.epoch, 'decoding': peers.decoding(ours, (IMAGE,)),
                      'ffcv': ffcv(path, crops)}
        for name, tensors in (('pil', False), ('tensors', True)):
            loader = peers.data_loader(peers.Views(samples, swav, tensors), batch_size, workers)
            contenders[name] = lambda e, loader=loader: loader
        for name in ('ours', 'ours_crops', 'ffcv'):      # compile
            start = time.perf_counter()
            for _ in contenders[name](0):
                pass
            print(f'{name}: first epoch {time.perf_counter() - start:.1f} s', flush=True)
        rounds = {name: [] for name in contenders}
        for r in range(options['rounds']):
            for name, epoch in contenders.items():
                rounds[name].append(peers.throughput(
                    epoch, options['seconds'], (lambda k: k) if name == 'decoding' else lambda _: batch_size))
            print(f'round {r}: ' + ', '.join(f'{name} {found[-1]:,.1f}' for name, found in rounds.items()) +
                  ' samples/s', flush=True)
        found = {**options, 'hardware': bench.device_name(), 'torch': torch.__version__,
                 **{name: round(statistics.median(values), 1) for name, values in rounds.items()}}
        for key, a, b in (('ratio', 'ours', 'pil'), ('ratio_tensors', 'ours', 'tensors'),
                          ('ratio_ffcv', 'ours_crops', 'ffcv'), ('limit', 'ours_crops', 'decoding'),
                          ('limit_swav', 'ours', 'decoding')):
            ratios = [x / y for x, y in zip(rounds[a], rounds[b])]
            found |= {key: round(statistics.median(ratios), 3),
                      f'{key}_range': [round(min(ratios), 3), round(max(ratios), 3)]}
        print(json.dumps(found))


if __name__ == '__main__':
    main()
