"""Does a generated positive view improve the representation? GenView's Tables 6 and 7 in small, on real CIFAR-10,
beside controls that tell what the instrument can see.

    python benchmarks/cifar10_effect.py                                  # all rows, seeds 0, 1, 2
    python benchmarks/cifar10_effect.py rows=controls                    # two crops and the controls: is it qualified?
    python benchmarks/cifar10_effect.py rows=two_crops,adaptive seeds=0  # a part of it
    python benchmarks/cifar10_effect.py rows= judge=resnet56-4bfd9763.th # the table again, and the test of the quality

All rows share a YAML apart from the keys under test (ROWS), one network initialisation and data order per seed. Runs
the stage scripts one after the other as a user would; what is finished is not done again, so that a killed run goes on.
Numbers go to results/cifar10_effect.json, one object per row and seed; the table at the end is made from that file.

Controls take in place of the generated view
- same_class_100, _75, _50, _25, _10: another real image, in that share of the pairs of the same class, else of another
  one; 100 is the positive control, 10, as a random image would be, the negative one;
- retrieval: the nearest other image by tiny/clip's embedding (strategy: retrieval of gen_views.py);
- reconstruction: what the generator's autoencoder keeps of the image itself.

rows=gencl: two crops, and views of tiny/icgan and tiny/maskgit in 25, 50, 75 and 100 % of the pairs (GenCL's gamma);
with figure=docs/gamma.png as a picture, of these seeds in `precision`.

judge: a CIFAR-10 classifier that had no part in any of this (ResNet-56 of github.com/akamaster/pytorch_resnet_cifar10).
With it the last lines tell how often views keep the class of their source, and whether the quality of a pair (eq. 12)
is higher where they do: the area under the curve, 0.5 for no relation.

Two processes may share the work, other rows or other seeds each, once the views are there. After a change of the YAML
or of the models delete runs/effect.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu

import bench
from bench import ROOT, stage
import gen_views
from config import load_config
from data import PairLoader, write_beton
from frozen_clip import Quality
from generators import UnCLIP
from sources import source_dataset

RUN, RESULTS = Path('runs/effect'), ROOT / 'results/cifar10_effect.json'
PLAIN, WEIGHTED, CROPS = ['quality.enabled=false'], ['quality.enabled=true'], ['data.alpha=0']
SHARES = (100, 75, 50, 25, 10)  # 10 is chance: the negative control
GENCL = {  # views: keys of yamls/gen_views/effect.yaml
    'icgan': ['strategy=constant', 'noise_level=0', 'generator.kind=icgan', 'generator.model=tiny/icgan'],
    'maskgit': ['generator.kind=maskgit', 'generator.model=tiny/maskgit']}
GAMMAS = 0.25, 0.5, 0.75, 1.0
ROWS = {  # row: (views, keys of yamls/pretrain/effect.yaml, title)
    'two_crops': ('same_class_100', CROPS + PLAIN, 'two crops (alpha 0)'),
    **{f'same_class_{share}': (f'same_class_{share}', PLAIN, f'real images, {share} % of the same class')
       for share in SHARES},
    'retrieval': ('retrieval', PLAIN, 'nearest other real image'),
    'reconstruction': ('reconstruction', PLAIN, 'reconstruction of the image'),
    'quality': ('same_class_100', CROPS + WEIGHTED, 'two crops + quality weights'),
    'constant': ('constant', PLAIN, 'views, level 200'),
    'random': ('random', PLAIN, 'views, random level'),
    'adaptive': ('adaptive', PLAIN, 'views, adaptive level'),
    'adaptive_quality': ('adaptive', WEIGHTED, 'views, adaptive level + quality weights'),
    **{f'{views}_{gamma:g}': (views, [f'data.alpha={gamma}', *PLAIN], f'views of tiny/{views}, gamma {gamma:g}')
       for views in GENCL for gamma in GAMMAS},
}
CONTROLS = list(ROWS)[:8]
SETS = {'controls': CONTROLS, 'gencl': ['two_crops', *(row for row in ROWS if ROWS[row][0] in GENCL)]}


def area_under_curve(scores, positive):
    """Probability that a positive scores higher than a negative, ties half. scores (N,), positive (N,) bool."""
    return mannwhitneyu(scores[positive], scores[~positive]).statistic / (positive.sum() * (~positive).sum())


def partners(labels, share, count):
    """For each of N images `count` others, (N, count), each with probability `share` of the same class and otherwise of
    another one. labels (N,)."""
    random = np.random.default_rng(0)
    found = np.empty((len(labels), count), int)
    for i, label in enumerate(labels):
        same = labels == label
        of = {True: np.setdiff1d(np.flatnonzero(same), i), False: np.flatnonzero(~same)}
        found[i] = [random.choice(of[bool(kept)]) for kept in random.random(count) < share]
    return found


@torch.no_grad()
def write_control(views):
    """RUN/VIEWS/pairs.beton of a control that no stage makes: as many views an image as the generated ones have."""
    beton = ROOT / RUN / views / 'pairs.beton'
    if beton.exists():
        return
    config = load_config(gen_views.DEFAULTS, [str(ROOT / 'yamls/gen_views/effect.yaml')])
    source, count = source_dataset(config['dataset']), config['views_per_image']
    images, labels = np.stack([np.asarray(source[i][0]) for i in range(len(source))]), np.asarray(source.labels)
    if views == 'reconstruction':
        vae = UnCLIP({**config['generator'], 'precision': 'fp32'}, torch.device('cpu')).pipeline.vae
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        x = torch.cat([vae.decode(vae.encode(part).latents).sample for part in x.split(250)])
        made = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()[:, None].repeat(count, 1)
    else:
        made = images[partners(labels, int(views.removeprefix('same_class_')) / 100, count)]
    beton.parent.mkdir(parents=True, exist_ok=True)
    write_beton(beton, lambda i: (images[i], list(made[i]) if count > 1 else made[i, 0], int(labels[i]), i, 0),
                len(images), {'dataset': config['dataset'], 'control': views, 'classes': source.classes}, views=count,
                num_workers=2)


@torch.no_grad()
def judged(path):
    from report import published_judge
    judge = published_judge(path, torch.device('cpu'))
    quality_of = Quality({'clip': {'model': str(ROOT / 'tiny/quality')}, 'pc': ROOT / RUN / 'quality/fg_proportion.npz',
                          'temperature': 1.0}, 'cpu')
    plain = dict(size=32, crop_scale=None, resize=32)
    for strategy in dict.fromkeys(views for views, _, _ in ROWS.values()):
        beton = ROOT / RUN / strategy / 'pairs.beton'
        if not beton.exists():
            continue
        loader = PairLoader(beton, [plain, plain], 1.0, 'second', batch_size=250, seed=0, num_workers=2, shuffle=False,
                            drop_last=False)
        kept, quality, levels = [], [], []
        for batch in loader.epoch(0):
            quality.append(quality_of(*batch['views'])[1])
            kept.append(judge(batch['views'][1] / 255)[0].argmax(1) == batch['label'])
            levels.append(batch['noise_level'])
        kept, quality, levels = (torch.cat(parts).numpy() for parts in (kept, quality, levels))
        print(f'{strategy}: {kept.mean():.3f} of {len(kept)} views keep the class of their source ('
              + ', '.join(f'level {v}: {kept[levels == v].mean():.3f} of {(levels == v).sum()}'
                          for v in np.unique(levels))
              + f'); area under the curve of the pair quality {area_under_curve(quality, kept):.3f}')


def draw(path, done):
    """Top-1 over gamma, mean and standard deviation over the seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3), layout='constrained')
    for axis, key, name in zip(figure.subplots(1, 2), ('knn', 'linear'), ('kNN', 'linear')):
        for views in GENCL:
            points = [(gamma, [r[key] for r in done if r['row'] == (f'{views}_{gamma:g}' if gamma else 'two_crops')])
                      for gamma in (0, *GAMMAS)]
            if points := [(gamma, np.mean(v), np.std(v, ddof=1)) for gamma, v in points if len(v) > 1]:
                axis.errorbar(*zip(*points), label=f'tiny/{views}', marker='o', capsize=3)
        axis.set(xlabel='gamma (data.alpha)', ylabel=f'{name} top-1', xticks=(0, *GAMMAS))
    axis.legend()
    figure.savefig(path, dpi=120)


def main():
    options = bench.options(rows=','.join(ROWS), seeds='0,1,2', judge='', figure='', precision='bfloat16')
    rows = SETS.get(options['rows'], [row for row in options['rows'].split(',') if row])
    if unknown := set(rows) - set(ROWS):
        sys.exit(f'no row {", ".join(unknown)}; there are {", ".join(ROWS)}')
    if rows:
        if set(rows) - {'two_crops', 'reconstruction', *(f'same_class_{share}' for share in SHARES)}:
            stage('fg_proportion.py', 'yamls/fg_proportion/effect.yaml')
            stage('fg_proportion.py', 'yamls/fg_proportion/effect_quality.yaml')
        stage('gen_views.py', 'yamls/gen_views/cifar10_test.yaml')
        for views in sorted({ROWS[row][0] for row in rows}):
            if views == 'reconstruction' or views.startswith('same_class'):
                write_control(views)
            else:
                stage('gen_views.py', 'yamls/gen_views/effect.yaml', f'output={RUN}/{views}',
                      *GENCL.get(views, [f'strategy={views}']))
    seeds = list(map(int, options['seeds'].split(',')))
    for seed in seeds:                                   # seed by seed: a part of the table is a table
        for row in rows:
            views, keys, _ = ROWS[row]
            bench.measure(RESULTS, RUN, row, seed, ['yamls/pretrain/effect.yaml',
                                                    f'data.beton={RUN}/{views}/pairs.beton', *keys],
                          ['yamls/linear_eval/effect.yaml', f'train_beton={RUN}/{views}/pairs.beton'])
    bench.table(bench.results(RESULTS), {row: title for row, (_, _, title) in ROWS.items()}, 'two_crops')
    if options['figure']:
        draw(options['figure'], [r for r in bench.results(RESULTS)
                                 if r['precision'] == options['precision'] and r['seed'] in seeds])
    if options['judge']:
        judged(options['judge'])


if __name__ == '__main__':
    main()
