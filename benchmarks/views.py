"""Which view costs what (GenCL Table 4): likeness to the originals, time and parameters of the embedded generators'
views, beside crop, jitter and blur (VICReg's, by torchvision and PIL, one image after the other).

    python benchmarks/views.py                                           # CIFAR-10, the generators in tiny/
    python benchmarks/views.py images=2000 fid=default_1.pt maskgit=FOLDER device=cuda

A generator whose folder is not there is left out. SSIM is the mean over the pairs. The distance of originals and views
is FID with `fid` (see fid.weights in view_eval.py), else frechet_clip on the embeddings of `clip`, which conditions
generators as well: it flatters them. Milliseconds are from pixels to pixels, the encoder that makes the condition
included, in the median over the calls; parameters are of all networks that this takes. The last line is one JSON
object, the picture `output`/views.png.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps

import bench
import gen_views
from config import default_config
from distances import Frechet, fid_inception, ssim
from files import atomic
from frozen_clip import FrozenClip
from generators import ICGAN, UnCLIP
from maskgit import MaskGIT
from pictures import harmless
from sources import source_dataset

GENERATORS = {  # option that names its folder: class, its networks, whether it sees the images itself
    'unclip': (UnCLIP, lambda g: [g.pipeline.unet, g.pipeline.vae.decoder], False),
    'icgan': (ICGAN, lambda g: [g.network], False),
    'maskgit': (lambda spec, device: MaskGIT(spec, device, 0), lambda g: [g.transformer, g.vqgan], True)}


def references(size):
    """{name: function of PIL images and seeds to views}; what is random comes from torch's generator."""
    transforms = {'crop': T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                  'jitter': T.ColorJitter(0.4, 0.4, 0.2, 0.1),
                  'blur': lambda image: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(1).item()))}
    return {name: lambda images, _, t=transform: np.stack([np.asarray(t(image)) for image in images])
            for name, transform in transforms.items()}


def timed(make, images, batch):
    """Views of all images, and milliseconds a view: the median over the batches."""
    views, times = [], []
    for at in range(0, len(images), batch):
        part, begin = images[at:at + batch], time.perf_counter()
        views += list(make(part, list(range(at, at + len(part)))))
        times.append((time.perf_counter() - begin) / len(part))
    return views, 1000 * statistics.median(times)


@harmless
def draw(path, rows):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3.5), layout='constrained')
    axis = figure.subplots()
    axis.scatter([row['ssim'] for row in rows], [row['ms'] for row in rows])
    for row in rows:
        axis.annotate(row['view'], (row['ssim'], row['ms']), xytext=(4, 4), textcoords='offset points')
    axis.set(xlabel='SSIM with the original', ylabel='ms a view at batch 1', yscale='log')
    axis.margins(0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(path, lambda temporary: figure.savefig(temporary, dpi=120))


@torch.no_grad()
def main():
    options = bench.options(name='CIFAR10', root='data/cifar10', split='train', images=500, size=32, batch=50,
                            singles=20, level=200, steps=20, guidance=2.0, fid='', clip='tiny/clip',
                            device='cuda' if torch.cuda.is_available() else 'cpu', output='runs/views',
                            **{kind: f'tiny/{kind}' for kind in GENERATORS})
    device, size, batch = torch.device(options['device']), options['size'], options['batch']
    source = source_dataset({key: options[key] for key in ('name', 'root', 'split')} | {'download': True})
    chosen = np.random.default_rng(0).permutation(len(source))[:options['images']]
    images = [ImageOps.fit(source[i][0].convert('RGB'), (size, size)) for i in chosen]
    clip = FrozenClip({'model': options['clip']}, device)

    def embed(images):
        return clip.forward(torch.stack([clip.preprocess(image) for image in images]).to(device))[1].cpu()

    makers = {name: (make, []) for name, make in references(size).items()}
    spec = default_config(gen_views.DEFAULTS)['generator']
    spec.update(steps=options['steps'], guidance_scale=options['guidance'])
    for kind, (build, networks, sees) in GENERATORS.items():
        if not Path(options[kind]).exists():
            print(f'{kind}: {options[kind]} is not there, left out')
            continue
        generator = build({**spec, 'model': options[kind]}, device)
        makers[kind] = (lambda images, seeds, g=generator, see=generator.embed if sees else embed: g.views(
            see(images), [options['level']] * len(images), seeds), networks(generator) + [clip.visual] * (not sees))

    if options['fid']:
        inception = fid_inception(options['fid']).to(device)
        features, width, key = lambda part: inception(pixels(part).to(device)), inception.width, 'fid'
    else:
        features, width, key = lambda part: F.normalize(embed(part)), clip.embedding_dim, 'frechet_clip'
    pixels = lambda part: torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    rows = []
    for name, (make, networks) in makers.items():
        for number in (1, batch):                        # the first call of a size chooses kernels, fills caches
            make(images[:number], list(range(number)))
        _, one = timed(make, images[:options['singles']], 1)
        views, many = timed(make, images, batch)
        views = [Image.fromarray(view).resize((size, size), Image.Resampling.BICUBIC) for view in views]
        distance, similarity = Frechet(width, device), []
        for at in range(0, len(images), batch):
            pair = images[at:at + batch], views[at:at + batch]
            similarity += ssim(*map(pixels, pair)).tolist()
            distance.add(*map(features, pair))
        rows.append({'view': name, 'ssim': round(statistics.mean(similarity), 4),
                     key: round(float(distance.compute()), 4), 'ms': round(one, 3), 'ms_batch': round(many, 3),
                     'parameters': sum(p.numel() for network in networks for p in network.parameters())})
        print(rows[-1], flush=True)
    print(f'\n| view | SSIM | {key} | ms, batch 1 | ms, batch {batch} | parameters |\n|---|---|---|---|---|---|')
    for row in rows:
        print(f"| {row['view']} | {row['ssim']:.3f} | {row[key]:.3f} | {row['ms']:.2f} | {row['ms_batch']:.2f} | "
              + (f"{row['parameters'] / 1e6:.1f}M |" if row['parameters'] else 'none |'))
    draw(Path(options['output']) / 'views.png', rows)
    print(json.dumps({**options, 'hardware': bench.device_name(), 'rows': rows}))


if __name__ == '__main__':
    main()
