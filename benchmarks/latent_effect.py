"""Do moved latents help? COP-Gen's Table 3 and hierarchical-latent's Table 2 in small: pretrained on images of the
embedded GAN (tiny/gan) alone, probed on CIFAR-10, which that has not seen.

    python benchmarks/latent_effect.py                                # all rows, seeds 0, 1, 2
    python benchmarks/latent_effect.py rows=none,hl_random seeds=0    # a part of it
    python benchmarks/latent_effect.py rows=none,same_class judge=resnet56-4bfd9763.th       # and the positive control

Rows differ in what makes the positive of an anchor; two crops of the anchor (none) are what they are compared with. All
share recipe, augmentations, initialisation and data order of a seed. Numbers go to results/latent_effect.json. What is
finished is not done again; two processes may share the work, other seeds each, once all pairs are there.

judge: a classifier of CIFAR-10 (see cifar10_effect.py). same_class takes as the positive another anchor of the class
that it finds, which must help if anything can; the last lines tell how often it finds the class of an anchor in its
positive.
"""
import sys
from pathlib import Path

import numpy as np
import torch

import bench
from bench import ROOT, stage
from cifar10_effect import partners
from data import PairLoader, write_beton

RUN, RESULTS = Path('runs/latent'), ROOT / 'results/latent_effect.json'
ALL, LOWER = '0-5', '1-5'                # hierarchical-latent leaves the first chunk, which says what is seen

HL_VIEW = ['view.crop_scale=[0, 0]', 'view.flip=0', 'view.jitter_prob=0', 'view.gray_prob=0']  # no T_x, as its code


def noise(std):
    return f'{{std: {std}, truncation: 2.0}}'


def walker(name):
    return f'{{walker: {RUN}/{name}}}'


ROWS = {  # row: (moves, further keys of gen_views.py, title)
    'none': ('', [], 'none: two crops of the anchor'),
    'gaussian': (f'{ALL}: {noise(0.2)}', [], 'all chunks, gaussian 0.2 (COP-Gen)'),
    'untrained': (f'{ALL}: {walker("walker/untrained.pt")}', [], 'all chunks, untrained walker'),
    'learned': (f'{ALL}: {walker("walker/walker.pt")}', [], 'all chunks, learned walker (COP-Gen)'),
    'hl_random': (f'{LOWER}: {noise(1.0)}', [], 'chunks 1 to 5, random 1.0 (hierarchical-latent)'),
    'hl_learned': (f'{LOWER}: {walker("walker_1_5/walker.pt")}', [], 'chunks 1 to 5, learned walker (HL)'),
    'hl_random_d': (f'{LOWER}: {noise(1.0)}', [f'latent.discriminator={RUN}/discriminator/discriminator.pt'],
                    'chunks 1 to 5, random 1.0, with discriminator (HL)'),
    'all_random': (f'{ALL}: {noise(1.0)}', [], 'all chunks, random 1.0 (control: also what is seen)'),
    'same_class': ('', [], 'another anchor of the same class (positive control)'),
}


@torch.no_grad()
def judged(row, judge):
    """Anchors (N, 32, 32, 3) of RUN/ROW/pairs.beton, classes (N,) found in them and in their positives."""
    from report import published_judge
    judge, plain = published_judge(judge, torch.device('cpu')), dict(size=32, crop_scale=None, resize=32)
    loader = PairLoader(ROOT / RUN / row / 'pairs.beton', [plain, plain], 1.0, 'second', batch_size=250, seed=0,
                        num_workers=1, shuffle=False, drop_last=False)
    anchors, positives = map(torch.cat, zip(*([view.clone() for view in batch['views']] for batch in loader.epoch(0))))
    return (anchors.permute(0, 2, 3, 1).contiguous().numpy(),
            *(judge(images / 255)[0].argmax(1).numpy() for images in (anchors, positives)))


def write_same_class(judge):
    beton = ROOT / RUN / 'same_class/pairs.beton'
    if not beton.exists():
        images, classes, _ = judged('none', judge)
        print('anchors by class:', np.bincount(classes, minlength=10))
        others = partners(classes, 1.0, 1)[:, 0]
        beton.parent.mkdir(parents=True, exist_ok=True)
        write_beton(beton, lambda i: (images[i], images[others[i]], -1, i, 0), len(images), {'control': 'same_class'})


def main():
    options = bench.options(rows=','.join(ROWS), seeds='0,1,2', alpha='1.0', judge='')
    rows = [row for row in options['rows'].split(',') if row]
    if unknown := set(rows) - set(ROWS):
        sys.exit(f'no row {", ".join(unknown)}; there are {", ".join(ROWS)}')
    if 'same_class' in rows and not options['judge']:
        rows.remove('same_class')
        print('same_class is left out: it needs judge=FILE')
    if rows:
        stage('gen_views.py', 'yamls/gen_views/effect_train.yaml')
        stage('gen_views.py', 'yamls/gen_views/cifar10_test.yaml')
    if {'untrained', 'learned'} & set(rows):
        stage('train_walker.py', 'yamls/train_walker/latent_effect.yaml')
    if 'hl_learned' in rows:
        stage('train_walker.py', 'yamls/train_walker/latent_effect.yaml', f'chunks={LOWER}', 'start=small',
              f'output={RUN}/walker_1_5', *HL_VIEW)
    if 'hl_random_d' in rows:
        stage('train_discriminator.py', 'yamls/train_discriminator/latent_effect.yaml')
    for row in rows:
        moves, keys, _ = ROWS[row]
        stage('gen_views.py', 'yamls/gen_views/latent_effect.yaml', f'latent.chunks={{{moves}}}', *keys,
              f"output={RUN}/{'none' if row == 'same_class' else row}")
        if row == 'same_class':
            write_same_class(options['judge'])
    for seed in map(int, options['seeds'].split(',')):
        for row in rows:
            bench.measure(RESULTS, RUN, row, seed,
                          ['yamls/pretrain/latent_effect.yaml', f'data.beton={RUN}/{row}/pairs.beton',
                           f"data.alpha={options['alpha'] if row != 'none' else 0}"],
                          ['yamls/linear_eval/effect.yaml', 'train_beton=runs/effect/train/pairs.beton'])
    bench.table(bench.results(RESULTS), {row: title for row, (_, _, title) in ROWS.items()}, 'none')


if __name__ == '__main__':
    main()
