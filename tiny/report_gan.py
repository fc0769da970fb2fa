"""What the embedded GANs and MaskGIT draw: the tables of tiny/README.md on them, their pages of pictures.

    python tiny/report_gan.py gan     --inception default_1.pt --pictures tiny   # tiny/gan
    python tiny/report_gan.py icgan   --judge resnet56-4bfd9763.th               # tiny/icgan, on CIFAR-10
    python tiny/report_gan.py maskgit --judge resnet56-4bfd9763.th               # tiny/maskgit, likewise

--inception: FID's network, see fid.weights in view_eval.py. --data as for tiny/train_gan.py.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from report import picture, published_judge, rms
from train import CLASSES, HERE, MEAN, STD, read, training_images

sys.path.insert(0, str(HERE.parent))
import gen_views  # noqa: E402
from config import default_config  # noqa: E402
from distances import Frechet, fid_inception  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from latents import LatentGenerator, Moves, normal, uniform  # noqa: E402
from sources import source_dataset  # noqa: E402


def frechet(a, b):
    """Fréchet distance of features (N, D) each."""
    distance = Frechet(a.shape[1], 'cpu')
    distance.add(a, b)
    return float(distance.compute())


def covered(of, by, neighbours=3):
    """Share of the rows of `of` (N, D) that lie within the distance of some row of `by` (M, D) to its third neighbour:
    recall of real by generated, precision the other way round (Kynkäänniemi et al. 2019)."""
    radius = torch.cdist(by, by).kthvalue(neighbours + 1, 1).values
    return (torch.cdist(of, by) <= radius).any(1).float().mean().item()


def variety(features):
    """Effective number of dimensions of features (N, D): (sum of the covariance's eigenvalues)^2 / sum of squares."""
    covariance = torch.cov(features.double().T)
    return (covariance.trace() ** 2 / covariance.square().sum()).item()


def encode(clip, images):
    """Embeddings (N, D) of images (N, 3, 32, 32) in 0..1."""
    return torch.cat([clip.forward((part - MEAN) / STD)[1] for part in images.split(250)]).float()


def quantised(images):
    return (images * 255).clamp(0, 255).byte().float() / 255


@torch.no_grad()
def report_gan(args):
    """FID and recall against the training images, distance of two samples, a page, and for each chunk a page in which
    it alone moves."""
    generator = LatentGenerator(dict(model=str(HERE / 'gan'), kind='biggan', truncation=2.0, psi=1.0, crop=None),
                                torch.device('cpu'), 32)
    count = args.count
    z = torch.cat([generator.anchors(0, np.arange(at, min(at + 500, count))) for at in range(0, count, 500)])
    start = time.time()
    made = torch.cat([quantised(generator.images(generator.code(part))) for part in z.split(250)])
    print(f'{count / (time.time() - start):.0f} images a second')
    root = Path(args.data)
    wnids = [wnid for wnid in (root / 'wnids.txt').read_text().split() if wnid in CLASSES]
    paths = sum((training_images(root, wnid) for wnid in wnids), [])
    order = np.random.default_rng(0).permutation(len(paths))[:2 * count]
    real = read([paths[i] for i in order]).float() / 255
    print(f'two samples differ by {rms(made[::2], made[1::2]):.1f} (pixels, rms of 255), '
          f'two real images by {rms(real[:count:2], real[1:count:2]):.1f}')
    clip = FrozenClip({'model': str(HERE / 'clip')}, torch.device('cpu'))
    parts = real[:count], real[count:], made
    a, b, fake = (encode(clip, x) for x in parts)
    mean, std = torch.cat([a, b]).mean(0), torch.cat([a, b]).std(0)
    a, b, fake = ((x - mean) / std for x in (a, b, fake))
    print(f'tiny/clip, {count} images each: recall {covered(a, fake):.3f} (other real images {covered(a, b):.3f}), '
          f'precision {covered(fake, a):.3f}, variety {variety(fake):.1f} (real {variety(a):.1f})', flush=True)
    if args.inception:
        network = fid_inception(args.inception)
        a, b, fake = (torch.cat([network((part * 255).round().byte()) for part in x.split(50)]) for x in parts)
        print(f'FID {frechet(a, fake):.1f}, of as many other real images {frechet(a, b):.1f}')
    page = lambda images, columns: torch.cat([torch.cat(list(images[at:at + columns]), 2)
                                              for at in range(0, len(images), columns)], 1)
    picture(page(made[:160], 20), args.pictures, 'gan.png')
    rows, width = [], generator.dim // generator.chunks
    for chunk in range(generator.chunks):
        at, changed = slice(width * chunk, width * (chunk + 1)), z.clone()
        changed[:, at] = z.roll(1, 0)[:, at]
        other = torch.cat([quantised(generator.images(generator.code(part))) for part in changed.split(250)])
        print(f'chunk {chunk} of another sample: changes the picture by {rms(other, made):.1f}')
        random = normal(uniform(1, np.arange(7), chunk, generator.dim), 2.0)
        for anchor in z[:2]:
            moved = anchor.repeat(8, 1)
            moved[1:, at] = random[:, at]
            rows.append(generator.images(generator.code(moved)))
    picture(torch.cat([page(torch.cat(rows[0::2]), 8), page(torch.cat(rows[1::2]), 8)], 2), args.pictures,
            'gan_chunks.png')
    anchors, rows = range(20), [made[:20]]
    for chunks, std in (('0-5', 0.2), ('1-5', 1.0), ('0-5', 1.0)):
        moves = Moves({chunks: dict(std=std, truncation=2.0, walker='')}, generator)(z[:20], 0, anchors, 1)
        rows.append(generator.images(generator.moved(z[:20], moves)))
    picture(page(torch.cat(rows), 20), args.pictures, 'gan_pairs.png')


LEVELS = 0, 100, 200, 300, 400
MASKS = {'all but the outer ring': {}, 'a block of half of these': dict(share=0.5, block=True),
         'half of these': dict(share=0.5), 'a quarter': dict(share=0.25), 'one': dict(share=1 / 36)}


@torch.no_grad()
def report_views(args):
    """The table of views of tiny/unclip for tiny/icgan, a row for each noise level, and tiny/maskgit, for each mask."""
    from generators import ICGAN
    from maskgit import MaskGIT
    device, count = torch.device('cpu'), args.count
    clip = FrozenClip({'model': str(HERE / 'clip')}, device)
    source = source_dataset(dict(name='CIFAR10', root='data/cifar10', split='train', download=True, subset=count))
    images = [source[i][0] for i in range(count)]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    labels, judge, embeddings = torch.from_numpy(source.labels), published_judge(args.judge, device), encode(clip, x)
    features, shown = judge(x)[1], [x]
    spec = dict(default_config(gen_views.DEFAULTS)['generator'], model=str(HERE / args.model), condition='stored')
    if args.model == 'icgan':
        generator = ICGAN({**spec, 'noise': dict(truncation=args.truncation)}, device)
        made = {level: lambda part, seeds, l=level: generator.views(embeddings[part], [l] * len(seeds), seeds)
                for level in LEVELS}
    else:
        generators = {name: MaskGIT({**spec, 'mask': {**spec['mask'], **mask}}, device, 0)
                      for name, mask in MASKS.items()}
        made = {name: lambda part, seeds, g=g: g.views(g.embed(images[part]), [0] * len(seeds), seeds)
                for name, g in generators.items()}
    for name, make in made.items():
        def draw(number, seed):
            parts = [slice(at, min(at + 100, number)) for at in range(0, number, 100)]
            views = np.concatenate([make(p, [seed + i for i in range(p.start, p.stop)]) for p in parts])
            return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255

        start = time.time()
        views = draw(count, 0)
        rate, again = count / (time.time() - start), draw(count // 5, 1_000_000)
        (scores, found), other, second = judge(views), judge(again)[1], views[:len(again)]
        shown.append(views)
        print(f'| {name} | {(scores.argmax(1) == labels).float().mean():.1%} | '
              f'{F.cosine_similarity(encode(clip, views), embeddings).mean():.3f} | {rms(views, x):.1f} | '
              f'{(found - features).norm(dim=1).mean():.2f} | '
              f'{F.cosine_similarity(encode(clip, second), encode(clip, again)).mean():.3f} | '
              f'{rms(second, again):.1f} | '
              f'{(found[:len(again)] - other).norm(dim=1).mean():.2f} | {rate:.0f} views/s', flush=True)
    rows = torch.arange(0, count, count // 20)[:20]
    picture(torch.cat([torch.cat([part[i] for i in rows], 2) for part in shown], 1), args.pictures,
            f'{args.model}.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', choices=['gan', 'icgan', 'maskgit'])
    parser.add_argument('--data', default='tiny-imagenet-200', help='folder with train/')
    parser.add_argument('--inception', default=None)
    parser.add_argument('--judge', default='resnet56-4bfd9763.th', help='classifier of CIFAR-10')
    parser.add_argument('--truncation', type=float, default=0.0, help='of icgan: bound of its latents, halved')
    parser.add_argument('--count', type=int, default=2000, help='images to measure on')
    parser.add_argument('--pictures', type=Path, default=None, help='folder for the pictures')
    args = parser.parse_args()
    (report_gan if args.model == 'gan' else report_views)(args)
