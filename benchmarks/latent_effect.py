"""Do moved latents help? COP-Gen's Table 3 and hierarchical-latent's Table 2 in small: pretrained on images of the
embedded GAN (tiny/gan) alone, probed on CIFAR-10, which that has not seen.

    python benchmarks/latent_effect.py                                # all rows, seeds 0, 1, 2
    python benchmarks/latent_effect.py rows=none,hl_random seeds=0    # a part of it
    python benchmarks/latent_effect.py rows=none,nearest judge=resnet56-4bfd9763.th          # and a control

Rows differ in what makes the positive of an anchor; two crops of the anchor (none) are what they are compared with. All
share recipe, augmentations, initialisation and data order of a seed. Numbers go to results/latent_effect.json. What is
finished is not done again; two processes may share the work, other seeds each, once all pairs are there.

judge: a classifier of CIFAR-10 (see cifar10_effect.py), for the controls: same_class takes as the positive another
anchor of the class that it finds, nearest the one that is nearest in its features. The last lines tell how often it
finds the class of an anchor in its positive.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

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
    'same_class': ('', [], 'control: another anchor of the same class'),
    'nearest': ('', [], 'control: the nearest other anchor'),
}
CONTROLS = 'same_class', 'nearest'


@torch.no_grad()
def judged(row, judge):
    """Anchors (N, 32, 32, 3) of RUN/ROW/pairs.beton; for them and for their positives what the judge makes of each:
    scores (N, 10), features (N, D)."""
    from report import published_judge
    judge, plain = published_judge(judge, torch.device('cpu')), dict(size=32, crop_scale=None, resize=32)
    loader = PairLoader(ROOT / RUN / row / 'pairs.beton', [plain, plain], 1.0, 'second', batch_size=250, seed=0,
                        num_workers=1, shuffle=False, drop_last=False)
    anchors, positives = map(torch.cat, zip(*([view.clone() for view in batch['views']] for batch in loader.epoch(0))))
    return (anchors.permute(0, 2, 3, 1).contiguous().numpy(), *(judge(x / 255) for x in (anchors, positives)))


def write_control(row, judge):
    beton = ROOT / RUN / row / 'pairs.beton'
    if beton.exists():
        return
    images, (scores, features), _ = judged('none', judge)
    if row == 'same_class':
        others = partners(scores.argmax(1).numpy(), 1.0, 1)[:, 0]
    else:
        likeness = (unit := F.normalize(features)) @ unit.T
        others = likeness.fill_diagonal_(-1).argmax(1).numpy()
    beton.parent.mkdir(parents=True, exist_ok=True)
    write_beton(beton, lambda i: (images[i], images[others[i]], -1, i, 0), len(images), {'control': row})


def main():
    options = bench.options(rows=','.join(ROWS), seeds='0,1,2', alpha='1.0', judge='')
    rows = [row for row in options['rows'].split(',') if row]
    if unknown := set(rows) - set(ROWS):
        sys.exit(f'no row {", ".join(unknown)}; there are {", ".join(ROWS)}')
    if not options['judge']:
        rows = [row for row in rows if row not in CONTROLS]
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
              f"output={RUN}/{'none' if row in CONTROLS else row}")
        if row in CONTROLS:
            write_control(row, options['judge'])
    for seed in map(int, options['seeds'].split(',')):
        for row in rows:
            bench.measure(RESULTS, RUN, row, seed,
                          ['yamls/pretrain/latent_effect.yaml', f'data.beton={RUN}/{row}/pairs.beton',
                           f"data.alpha={options['alpha'] if row != 'none' else 0}"],
                          ['yamls/linear_eval/effect.yaml', 'train_beton=runs/effect/train/pairs.beton'])
    bench.table(bench.results(RESULTS), {row: title for row, (_, _, title) in ROWS.items()}, 'none')
    for row in rows if options['judge'] else ():
        _, (scores, _), (found, _) = judged(row, options['judge'])
        same = (scores.argmax(1) == found.argmax(1)).float().mean()
        print(f'{row}: {same:.3f} of {len(found)} positives are of the class of their anchor')


if __name__ == '__main__':
    main()
