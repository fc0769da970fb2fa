"""Paired loading, side by side: our PairLoader on a beton against what users would write instead. Same images, same
recipe, two views a sample (the second from the synthetic image), same number of workers, uint8 CHW batches from all,
alternating rounds.

    python benchmarks/loader.py size=224               photographic JPEGs of 256 to 500 pixels a side
    python benchmarks/loader.py size=32                CIFAR-like, raw in the beton and arrays in RAM for the others
    python benchmarks/loader.py size=224 recipe=byol   the two (large) views of a method's YAML for ImageNet: mocov2,
                                                       mocov3, byol, simsiam, swav, simclr, vicreg, nnclr

pil: DataLoader, torchvision's transforms on PIL images. It blurs with PIL (as MoCo v2 and SimSiam do), the fastest
choice there is; blur=torchvision takes GaussianBlur, whose result ours equals. tensors: DataLoader, decode_jpeg and
torchvision.transforms.v2 on uint8 tensors. dali: the CPU pipeline of NVIDIA DALI, which decodes the crop alone.

The last line is one JSON object: images/s count every view, `ratio` is the median over the rounds of ours / pil (and
[least, most]), `ratio_tensors` and `ratio_dali` the same; `limit` is ours as a share of decoding the same JPEGs and
nothing more. Raw images of 32 pixels are not decoded, and have no such limit.
"""
import json
import os
import statistics
import tempfile
import time

import numpy as np
import torch
import torchvision
from PIL import Image

import bench
import data
import peers

options = bench.options(size=224, workers=os.cpu_count(), rounds=3, seconds=8.0, images=0, batch_size=0, blur='pil',
                        quality=90, recipe='plain', only='')
size, workers = options['size'], options['workers']
n = options['images'] or (1024 if size > 64 else 8192)       # samples an epoch; every pair of images comes four times
batch_size = options['batch_size'] or (64 if size > 64 else 256)
plain = dict(size=size, crop_scale=[0.08 if size > 64 else 0.2, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.2, 0.1],
             jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, blur_sigma=[0.1, 2.0], solarize_prob=0.1)


def dali(pairs, views):
    """epoch(e) of DALI's CPU pipeline over JPEG files. Raises ImportError."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    def view(files, name, r):
        content, _ = fn.readers.file(files=files, random_shuffle=True, name=name)
        image = fn.decoders.image_random_crop(content, random_area=r['crop_scale'], random_aspect_ratio=[3 / 4, 4 / 3])
        image = fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        chance = lambda p: fn.random.coin_flip(probability=p, dtype=types.BOOL)
        around = lambda x: fn.random.uniform(range=[max(0, 1 - x), 1 + x])
        if chance(r['jitter_prob']):
            b, c, s, h = r['jitter']
            image = fn.color_twist(image, brightness=around(b), contrast=around(c), saturation=around(s),
                                   hue=fn.random.uniform(range=[-360 * h, 360 * h]))
        if chance(r['gray_prob']):
            image = fn.color_space_conversion(
                fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY),
                image_type=types.GRAY, output_type=types.RGB)
        if chance(r['blur_prob']):
            image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=r['blur_sigma']),
                                     window_size=int(0.1 * size) | 1)
        if chance(r['solarize_prob']):
            dark = fn.cast(image < 128, dtype=types.UINT8)
            image = dark * image + (1 - dark) * (255 - image)
            image = fn.cast(image, dtype=types.UINT8)
        return fn.transpose(fn.flip(image, horizontal=fn.random.coin_flip(probability=r['flip'])), perm=[2, 0, 1])

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, enable_conditionals=True)
    def pipeline():
        return tuple(view([pair[k] for pair in pairs], f'files{k}', r) for k, r in enumerate(views))

    pipe = pipeline()
    pipe.build()
    iterator = DALIGenericIterator([pipe], ['a', 'b'], reader_name='files0', auto_reset=True,
                                   last_batch_policy=LastBatchPolicy.DROP)
    return lambda e: iterator


def main():
    views = [plain, plain] if options['recipe'] == 'plain' else peers.recipes(options['recipe'], size)[:2]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for i in range(n // 4):
            pair = [peers.photo(rng, size), peers.photo(rng, size)]
            if size > 64:
                for k in range(2):
                    name = f'{folder}/{i}_{k}.jpg'
                    Image.fromarray(pair[k]).save(name, quality=options['quality'])
                    pair[k] = name
            pairs.append(pair)
        pairs *= 4
        pixels = lambda x: x if isinstance(x, np.ndarray) else np.asarray(Image.open(x).convert('RGB'))
        data.write_beton(f'{folder}/pairs.beton', lambda i: (*map(pixels, pairs[i]), i % 10, i, 0), len(pairs), options,
                         mode='jpg' if size > 64 else 'raw', quality=options['quality'], num_workers=workers)
        ours = data.PairLoader(f'{folder}/pairs.beton', views, swap='second', batch_size=batch_size, seed=0,
                               num_workers=workers)
        start = time.perf_counter()
        next(ours.epoch(0))                              # compile, or load what an earlier start has compiled
        print(f'{bench.device_name()}, torch {torch.__version__}, torchvision {torchvision.__version__}, {workers} '
              f'workers; first batch after {time.perf_counter() - start:.1f} s; {len(ours)} batches an epoch, '
              f'{os.path.getsize(f"{folder}/pairs.beton") / len(pairs) / 2e3:.0f} kB an image')
        pil, tensors = (peers.data_loader(peers.Views(pairs, views, t, options['blur']), batch_size, workers)
                        for t in (False, True))
        contenders = {'ours': ours.epoch, 'pil': lambda e: pil, 'tensors': lambda e: tensors}
        if size > 64:
            contenders['decoding'] = peers.decoding(ours)
            try:
                contenders['dali'] = dali(pairs, views)
                for _ in contenders['dali'](0):
                    pass
            except Exception as e:                       # no wheel, no library: whatever keeps it from running here
                contenders.pop('dali', None)
                print(f'dali: left out, it does not run here: {e!r}'[:300])
        else:
            print('dali: left out, it reads files and these images are arrays in memory')
        contenders = {name: epoch for name, epoch in contenders.items()
                      if not options['only'] or name in ('ours', *options['only'].split(','))}
        rounds = {name: [] for name in contenders}
        for r in range(options['rounds']):
            for name, epoch in contenders.items():
                rounds[name].append(peers.throughput(
                    epoch, options['seconds'], (lambda k: k) if name == 'decoding' else lambda _: 2 * batch_size))
            print(f'round {r}: ' + ', '.join(f'{name} {found[-1]:,.0f}' for name, found in rounds.items()) + ' img/s',
                  flush=True)
        found = {**options, 'recipes': views, 'hardware': bench.device_name(),
                 **{name: round(statistics.median(values), 1) for name, values in rounds.items()}}
        for name in contenders:
            ratios = [a / b for a, b in zip(rounds['ours'], rounds[name])]
            key = {'pil': 'ratio', 'decoding': 'limit'}.get(name, f'ratio_{name}')
            if name != 'ours':
                found |= {key: round(statistics.median(ratios), 3),
                          f'{key}_range': [round(min(ratios), 3), round(max(ratios), 3)]}
        print(json.dumps(found))


if __name__ == '__main__':
    main()
