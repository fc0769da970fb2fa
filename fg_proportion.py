"""Stage 1: how much of every image is foreground, which noise level follows from it, and its CLIP embedding.

    python fg_proportion.py yamls/fg_proportion/cifar10.yaml
    torchrun --nproc-per-node 8 fg_proportion.py yamls/fg_proportion/in1k.yaml
    sbatch --array=0-63 slurm/fg_proportion.sbatch yamls/fg_proportion/in1k.yaml       # or shard=i/n by hand

The same command again resumes; a finished run says so. `key.sub=value` after the file overrides the YAML. The tasks of
an array know of each other through the files in OUTPUT/parts alone, of which the first complete one counts. Each takes
every n-th chunk of pass 2, and any of them can do pass 1: they share it as far as they run at the same time. The task
that finds all chunks there writes the result.

Pass 1 takes `pca_images` random images and sums the covariance of their CLIP tokens in float64; its first eigenvector
is the foreground direction (GenView section 3.3). A second look at the same images projects every token on it (not
centred, as in the official code: the mean would only shift the threshold; it is stored all the same) and settles
- the sign: of the two, the one whose foreground sits more in the middle of the images than along their border;
- the threshold a: the quantile of the raw projections of these images that makes `foreground_share` of the tokens
  foreground. (Section 3.3 normalises a map to [0, 1] before it thresholds; the official code and this one do not, so
  that an image without a subject may have no foreground at all.)
Pass 2 takes every image once: proportion p_i of tokens whose projection exceeds a (eq. 7), noise level
100 * floor(p_i / 0.2), at most 400 (eq. 8), and the image embedding, the condition of stage 2. The official code closes
its bins on the right, (0.2, 0.4] -> 100, so that p_i = 0.4 gets 100 there and 200 here; with the 256 tokens of ViT-H-14
no proportion but 0 and 1 is a multiple of 0.2, and both rules agree.

Run folder: fg_proportion.npz with `pc` (K,) of length 1 pointing towards the foreground, `sign` (what turned the
eigenvector, or the file of `pca`, into it), `mean` (K,), `threshold`, `explained` (share of the variance), `encoder`
(fingerprint of the weights) and, for N images, `proportion` float32 (N,) (NaN: unreadable), `noise_level` int16 (N,)
(-1: unreadable), `identity` uint32 (N,) (by which later stages know the images again; `pca_identity` of the images
`pca_images` out of `images`, also without proportions); embeddings.npy (N, D) float16,
projected and not normalised (zeros: unreadable), made for numpy.load(..., mmap_mode='r'); histogram.png,
foreground.png, config.yaml, versions.json, log.jsonl.
"""
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import Fail, changed_keys, check_values, run_folder
from start import ranks, run, say

DEFAULTS = """
output: runs/fg_proportion  # run folder
dataset:
  name: CIFAR10             # name in torchvision.datasets, or `folder`: an image folder
  root: data/cifar10        # folder it lies in
  split: train              # train | test | val
  download: false           # true: fetch it when it is not there
  subset: !int null         # images, the same number of each class; null: all
clip:
  model: tiny/clip          # open_clip architecture, hf-hub:owner/name, or a local folder
  pretrained: !text null    # hub tag or local weights file of an architecture; null for a folder or hub id
  image_size: !int null     # pixels; null: the model's own
pca_images: 10000           # random images for the component, sign and threshold (appendix A)
pca: !text null             # component to use in place of our own: .npy as published, (K,) or (K, 1), or another
                            # run's fg_proportion.npz
sign: !int null             # 1 or -1 turns the component by hand; null: by the rule
foreground_share: 0.40      # share of tokens that are foreground over the pca images (appendix A)
proportions: true           # false: stop at the component (for the encoder of the quality loss)
batch_size: 256             # images per process
chunk: 1024                 # images between two saves
num_workers: 2              # processes that decode, per process
shard: ''                   # i/n: take every n-th chunk from the i-th on (0/4 ... 3/4); empty: as a Slurm array says
precision: auto             # auto | fp32 | bf16 | fp16; auto: fp16 on a GPU (as the official code), fp32 on a CPU
device: auto                # auto | cpu | cuda
seed: 0                     # which images are the random ones
"""
FREE = ('output', 'dataset.download', 'batch_size', 'num_workers', 'shard', 'device')  # may differ on resuming
ALLOWED = {
    'output': 'folder', 'root': 'folder', 'split': ['train', 'test', 'val'], 'subset': (1, 10 ** 10),
    'image_size': (1, 4096), 'pca_images': (1, 10 ** 10), 'sign': [1, -1], 'foreground_share': (0.001, 0.999),
    'batch_size': (1, 10 ** 5), 'chunk': (1, 10 ** 10), 'num_workers': (0, 1024), 'seed': (0, 10 ** 12)}


def check(config):
    check_values(config, ALLOWED)
    if config['pca'] is not None and not Path(config['pca']).is_file():
        raise Fail(f"pca: {config['pca']}: no such file")


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import Log, Processes, StopSignal, precision_dtype, shard
from files import atomic, load_arrays, unreadable
from pictures import grid, harmless, histograms, overlay
from sources import same_images, source_dataset


# ---------------------------------------------------------------------------------------------------
# Foreground

def noise_level(proportion):
    """Noise level of a foreground proportion (GenView eq. 8): 100 * floor(p / 0.2), at most 400; -1 for NaN.

    proportion: array of p in [0, 1]. Returns int16 of the same shape."""
    proportion = np.asarray(proportion, np.float64)
    level = np.floor(5 * proportion + 1e-6)  # p / 0.2 is 2.9999... for p = 0.6
    return np.where(np.isnan(level), -1, 100 * np.clip(np.nan_to_num(level), 0, 4)).astype(np.int16)


def first_component(count, total, outer):
    """First principal component of tokens from their sums. count: number of tokens, total: (K,) their sum,
    outer: (K, K) sum of their outer products, float64. Returns pc (K,) of length 1 whose largest entry is positive
    (an eigenvector has no sign of its own), mean (K,) and covariance (K, K)."""
    mean = total / count
    covariance = outer / count - np.outer(mean, mean)
    pc = np.linalg.eigh(covariance)[1][:, -1]
    return pc * np.sign(pc[np.abs(pc).argmax()]), mean, covariance


def middle_and_border(projection, sign, share):
    """Shares of foreground among the central and among the border tokens when `sign` * projection is thresholded so
    that `share` of all tokens are foreground. projection: (N, H, W). Returns two numbers in [0, 1]."""
    height, width = projection.shape[1:]
    foreground = sign * projection > np.quantile(sign * projection, 1 - share)
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    middle = np.zeros((height, width), bool)
    middle[height // 4:height - height // 4, width // 4:width - width // 4] = True
    return foreground[:, middle & ~border].mean(), foreground[:, border].mean()


def choose_sign(projection, share, forced=None):
    """The sign that puts the foreground in the middle of the images, and a line that says why. projection: (N, H, W)
    of the eigenvector as it comes; forced: 1, -1 or None."""
    if forced is not None:
        return forced, f'sign {forced:+d} (set by hand)'
    if min(projection.shape[1:]) < 3:
        raise Fail(f'sign: maps of {projection.shape[1]} x {projection.shape[2]} tokens have no middle for the rule '
                   'to look at; set sign to 1 or -1 (foreground.png shows which), or a larger clip.image_size')
    shares = {sign: middle_and_border(projection, sign, share) for sign in (1, -1)}
    sign = max(shares, key=lambda s: shares[s][0] - shares[s][1])
    (middle, border), (other_middle, other_border) = shares[sign], shares[-sign]
    line = (f'sign {sign:+d}: foreground are {middle:.0%} of the central and {border:.0%} of the border tokens '
            f'(with {-sign:+d}: {other_middle:.0%} and {other_border:.0%})')
    if middle - border < 0.05:
        line += '; the rule is not sure: look at foreground.png and set sign if it shows the background'
    return sign, line


def position_share(projection):
    """Share of the variance of projections (N, H, W) that the token's position alone explains: 1 where the map is the
    same in all images, 0 where every position has the same mean (or all projections are equal)."""
    return projection.mean(0).var() / max(projection.var(), 1e-30)


# ---------------------------------------------------------------------------------------------------
# The encoder over lists of images. A chunk of images is the unit of work: its result is one file, written whole, and
# never made again. No result depends on who makes which chunk.

class Images(Dataset):
    """(image uint8 (3, S, S), readable, identity): an image that cannot be read is zeros and False."""

    def __init__(self, source, clip):
        # all of open_clip's preparation but its last two steps, ToTensor and Normalize: bytes are a quarter of the work
        # for the decoding processes and of the memory that they share with this one
        from torchvision.transforms import Compose, PILToTensor
        self.source, self.size = source, clip.image_size
        self.prepare = Compose([*clip.preprocess.transforms[:-2], PILToTensor()])

    def __getitem__(self, index):
        try:
            return self.prepare(self.source[index][0]), True, self.source.identity(index)
        except Exception:  # PIL raises nearly everything on a damaged file
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False, self.source.identity(index)


class Sweep:
    """sweep(name, indices, per_batch, join): one pass over images; returns the files of its chunks, in order."""

    def __init__(self, config, folder, source, clip, dtype, processes, log):
        self.config, self.folder, self.clip, self.processes, self.log = config, folder, clip, processes, log
        self.images, self.dtype, self.stop = Images(source, clip), dtype, StopSignal()
        self.first, self.step = shard(config['shard'], processes)

    def save(self, file, result, finite):
        if not finite:
            raise Fail(f'precision: {str(self.dtype)[6:]} overflows in this encoder; '
                       'set precision=bf16 or fp32 (or the weights are damaged)')
        arrays = {key: value.cpu().numpy() for key, value in result.items()}
        atomic(file, lambda path: np.savez(path, **arrays), once=True)

    def __call__(self, name, indices, per_batch, join, share=True):
        """per_batch(tokens, embedding, readable, identity) -> dict of tensors; join: two tensors of a chunk -> one.
        share: make the chunks of this process alone; otherwise then also those that other tasks have not made yet."""
        chunks = [indices[start:start + self.config['chunk']] for start in range(0, len(indices), self.config['chunk'])]
        files = [self.folder / f'{name}-{number:06d}.npz' for number in range(len(chunks))]
        self.make(name, list(zip(files, chunks))[self.first::self.step], per_batch, join)
        stopped = self.processes.any(self.stop)  # also the barrier after which torchrun's processes have made theirs
        if not share and not stopped:
            for number in np.random.default_rng(self.first).permutation(len(chunks)):  # so that tasks rarely meet
                if not files[number].is_file() and not self.stop:
                    self.make(name, [(files[number], chunks[number])], per_batch, join)
            stopped = self.processes.any(self.stop)
        if stopped:
            self.stop.leave(self.log, 'finished chunks are saved; the same command resumes')
        return files

    def make(self, name, chunks, per_batch, join):
        """Make those of chunks, (file, indices), that are not there."""
        size, source = self.config['batch_size'], self.images.source
        for file, chunk in chunks if name == 'proportion' else ():
            for part in load_parts([file], 'identity') if file.is_file() else ():
                known = np.zeros(len(source), np.uint32)
                known[chunk] = part['identity']
                same_images(source, chunk, known, file, 'delete the run folder to start again')
        batches = [(file, chunk[start:start + size], start + size >= len(chunk)) for file, chunk in chunks
                   if not file.is_file() for start in range(0, len(chunk), size)]
        loader = iter(DataLoader(self.images, batch_sampler=[batch.tolist() for _, batch, _ in batches],
                                 num_workers=min(self.config['num_workers'], len(batches)),
                                 pin_memory=self.processes.device.type == 'cuda'))
        total = sum(len(chunk) for _, chunk in chunks)
        before = done = total - sum(len(batch) for _, batch, _ in batches)
        bar = tqdm(total=total, initial=done, desc=name, unit='image', disable=None if self.processes.main else True)
        if before and batches:
            self.log.write(f'{name}: {before:,} of {total:,} images were done before')
        begin = spoke = time.perf_counter()
        waited, result, finite, saved = 0.0, None, True, None
        try:
            with ThreadPoolExecutor(1) as saver:  # waits for GPU and disk while the next batches are launched
                for file, batch, last in batches:
                    asked = time.perf_counter()
                    images, readable, identity = next(loader)
                    waited += time.perf_counter() - asked
                    tokens, embedding = self.clip.encode(images, self.dtype)
                    finite = torch.isfinite(tokens).all() & finite
                    new = per_batch(tokens, embedding, readable.to(self.processes.device), identity)
                    result = new if result is None else {key: join(result[key], new[key]) for key in new}
                    if last:
                        if saved:
                            saved.result()
                        saved, result = saver.submit(self.save, file, result, finite), None
                    done += len(batch)
                    bar.update(len(batch))
                    now = time.perf_counter()
                    if now - spoke > 10 or done == total:
                        rate, spoke = (done - before) / (now - begin), now
                        text = f'{name}: {done:,} of {total:,} images' + (
                            f' (process 0 of {self.processes.world})' if self.processes.world > 1 else '')
                        text += f', {rate:,.0f} images/s, {(total - done) / rate:.0f} s to go'
                        self.log.write(text if bar.disable else None, stage=name, step=done,
                                       images_per_second=round(rate, 1), data_wait=round(waited / (now - begin), 4))
                    if self.stop:
                        break
                if saved:
                    saved.result()
        except RuntimeError as error:  # a signal to the whole process group takes the workers along
            if not (self.stop and 'DataLoader worker' in str(error)):
                raise
        bar.close()


def load_parts(files, *keys):
    """The arrays of the chunks, one dict with `keys` after another, in order."""
    for file in files:
        for _ in range(90):  # seconds: how long a network file system may hide what another node has written
            if file.is_file():
                break
            time.sleep(1)
        yield load_arrays(file, 'delete it and start the same command again', keys)


# ---------------------------------------------------------------------------------------------------

@harmless
def draw(folder, sweep, indices, pc, projection, threshold, proportion, level):
    """histogram.png: projections with the threshold and, where given, proportions (N,) with their noise levels.
    foreground.png: up to 32 readable images in order of their foreground proportion, each above its overlay."""
    panels = [('projection of a token', 'tokens of the pca images', {'': projection},
               (threshold, f'threshold: {(projection > threshold).mean():.0%} foreground'))]
    if proportion is not None:
        panels.append(('foreground proportion', 'images', {
            f'level {value}: {(level == value).sum():,}': proportion[level == value] for value in range(0, 500, 100)},
            None))
    histograms(folder / 'histogram.png', panels)
    images = []
    for index in np.random.default_rng(0).permutation(indices):
        image, readable, _ = sweep.images[index]
        images += [image] * readable
        if len(images) == 32:
            break
    tokens, _ = sweep.clip.encode(torch.stack(images), sweep.dtype)
    masks = (torch.einsum('bkhw,k->bhw', tokens, pc) > float(threshold)).cpu().numpy()
    images = [image.permute(1, 2, 0).numpy() / 255 for image in images]
    examples = [(f'p {masks[k].mean():.2f}  level {noise_level(masks[k].mean())}',
                 [images[k], overlay(images[k], masks[k])]) for k in masks.mean((1, 2)).argsort(kind='stable')]
    grid(folder / 'foreground.png', [((), examples)], columns=8)


# ---------------------------------------------------------------------------------------------------

def main(config):
    check(config)
    folder, first = run_folder(config['output']), ranks()[0] == 0
    same_settings(folder, config)
    finished = folder / 'fg_proportion.npz'
    if not finished.is_file():
        try:
            measure(config, folder)
        except Fail:
            if not finished.is_file():  # otherwise another task was faster and has removed what this one was reading
                raise
            same_settings(folder, config)
    elif first:
        result = load_arrays(finished, f'delete {folder} to start again', keys=())
        if 'SLURM_ARRAY_TASK_ID' not in os.environ and not config['shard']:  # not all tasks look at all images
            source = source_dataset({**config['dataset'], 'download': False})
            if 'identity' in result:
                same_images(source, np.arange(len(source)), result['identity'], finished,
                            'delete the folder to start again')
            elif 'pca_images' in result:
                same_pca_images(source, result, finished)
        say(f'{folder}: this run is finished; delete the folder to start again')
    if finished.is_file() and first:
        for leftover in folder.glob('.*.tmp*'):  # of killed processes
            leftover.unlink(missing_ok=True)
        shutil.rmtree(folder / 'parts', ignore_errors=True)


def same_settings(folder, config):
    if not (folder / 'config.yaml').is_file():
        return
    try:
        old = yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))
        if not isinstance(old, dict) or not config.keys() <= old.keys():
            raise ValueError('not all keys are there')
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(folder / 'config.yaml', error, 'nothing else tells which settings the files beside it '
                         f'were made with: delete {folder} to start again') from None
    changed = changed_keys(old, config, FREE)
    if changed:
        raise Fail(f"{folder}: holds a run with other settings: {', '.join(changed)}; "
                   'choose another output, or delete the folder to start again')


def same_pca_images(source, seen, what):
    """Raises Fail where the images of the component are not the ones that are `seen`: their numbers and identities."""
    known = np.zeros(int(seen['images']), np.uint32)
    known[seen['pca_images']] = seen['pca_identity']
    same_images(source, seen['pca_images'], known, what, 'delete the folder to start again')


def same_start(parts, mine, source, config):
    """Raises Fail where the first task of this run, in run.npz, began with something else than this one."""
    again = f'delete {parts.parent} to start again'
    old = load_arrays(parts / 'run.npz', again, mine)
    changed = changed_keys(json.loads(str(old['config'])), config, FREE)
    if changed:
        raise Fail(f"{parts.parent}: another task has begun with other settings: {', '.join(changed)}; choose another "
                   'output')
    if (str(old['encoder']), int(old['images'])) != (mine['encoder'], mine['images']):
        raise Fail(f'{parts.parent}: was started with other weights or another number of images; {again}')
    if str(old['dtype']) != mine['dtype']:
        raise Fail(f"{parts.parent}: was started in {str(old['dtype'])[6:]}, this device would go on in "
                   f"{mine['dtype'][6:]}: set precision to one that both can, and {again}")
    if not np.array_equal(old['pca_identity'], mine['pca_identity']):
        same_pca_images(source, old, parts.parent)


def measure(config, folder):
    parts = folder / 'parts'  # what is finished of an unfinished run
    from frozen_clip import FrozenClip, load_component  # here: it takes seconds, a mistake in the YAML should not
    processes = Processes(config['device'])
    automatic = 'fp16' if processes.device.type == 'cuda' else 'fp32'
    dtype = precision_dtype(automatic if config['precision'] == 'auto' else config['precision'], processes.device)
    if processes.main:
        source = source_dataset(config['dataset'])  # downloads, if it has to, once
    processes.barrier()
    if not processes.main:
        source = source_dataset({**config['dataset'], 'download': False})
    clip = FrozenClip(config['clip'], processes.device)
    pca_count = min(config['pca_images'], len(source))
    published = load_component('pca', config['pca'], clip) if config['pca'] is not None else None
    picked = np.sort(np.random.default_rng(config['seed']).choice(len(source), pca_count, replace=False))
    seen = {'images': len(source), 'pca_images': picked, 'pca_identity': source.identities(picked)}
    mine = {**seen, 'encoder': clip.fingerprint(), 'dtype': str(dtype), 'config': json.dumps(config)}
    if processes.main:
        atomic(parts / 'run.npz', lambda path: np.savez(path, **mine), once=True)
    processes.barrier()
    same_start(parts, mine, source, config)
    processes.barrier()
    log = Log(folder, config, processes.main, alone=False)  # tasks of an array share it
    log.write(source.note)
    log.write(f"{len(source):,} images; {config['clip']['model']}: {clip.image_size} px, tokens {clip.token_dim}, "
              f'embedding {clip.embedding_dim}; {processes.world} x {processes.device.type}; run folder {folder}')
    if pca_count < config['pca_images']:
        log.write(f"pca_images: {config['pca_images']:,} asked for, the dataset has {pca_count:,}: all are used")
    sweep = Sweep(config, parts, source, clip, dtype, processes, log)

    # Pass 1: covariance of the tokens, then projections of the same tokens
    def sums(tokens, embedding, readable, identity):
        rows = tokens[readable].permute(0, 2, 3, 1).reshape(-1, clip.token_dim).double()
        return {'count': torch.tensor(float(len(rows))), 'total': rows.sum(0), 'outer': rows.T @ rows}

    files = sweep('covariance', picked, sums, torch.add, share=False)
    if not (parts / 'component.npz').is_file() and processes.main:
        count, total, outer = 0, 0, 0
        for part in load_parts(files, 'count', 'total', 'outer'):
            count, total, outer = count + part['count'], total + part['total'], outer + part['outer']
        if not count:
            raise Fail(f'{source.path(picked[0])}: unreadable, and so are all of the pca images')
        pc, mean, covariance = first_component(count, total, outer)
        pc = pc if published is None else published
        if not np.trace(covariance) > 0:
            raise Fail('the tokens of all pca images are equal: there is no component to find')
        explained = pc @ covariance @ pc / np.trace(covariance)
        atomic(parts / 'component.npz', lambda path: np.savez(path, pc=pc, mean=mean, explained=explained), once=True)
    processes.barrier()
    component, = load_parts([parts / 'component.npz'], 'pc', 'mean', 'explained')
    pc = torch.from_numpy(component['pc']).float().to(processes.device)

    def projections(tokens, embedding, readable, identity):
        return {'projection': torch.einsum('bkhw,k->bhw', tokens, pc)[readable]}

    concatenate = lambda *parts: torch.cat(parts)
    files = sweep('projection', picked, projections, concatenate, share=False)
    projection = np.concatenate([part['projection'] for part in load_parts(files, 'projection')])
    sign, line = choose_sign(projection, config['foreground_share'], config['sign'])
    projection, pc = sign * projection, sign * pc
    threshold = np.float32(np.quantile(projection, 1 - config['foreground_share']))
    log.write(f"component: {component['explained']:.1%} of the variance; {line}; threshold {threshold:.4f}: "
              f'{(projection > threshold).mean():.1%} of the tokens are foreground',
              stage='component', explained=float(component['explained']), sign=sign, threshold=float(threshold))
    position = float(position_share(projection))
    line = f"position: where a token lies explains {position:.0%} of its projection's variance"
    if position > 0.6:
        line += ('; WARNING: the foreground is nearly the same spot in every image, so that proportions, noise levels '
                 'and quality weights say little about them; take another clip.model, or its own image_size')
    log.write(line, stage='position', position=round(position, 4))

    # Pass 2: every image once
    def measures(tokens, embedding, readable, identity):
        proportion = (torch.einsum('bkhw,k->bhw', tokens, pc) > float(threshold)).float().mean((1, 2))
        return {'proportion': torch.where(readable, proportion, torch.nan),
                'embedding': (embedding * readable[:, None]).half(), 'identity': identity}

    result = {'pc': pc.cpu().numpy(), 'mean': component['mean'].astype(np.float32), 'threshold': threshold,
              'sign': sign, 'explained': component['explained'], 'encoder': mine['encoder'], **seen}
    if config['proportions']:
        files = sweep('proportion', np.arange(len(source)), measures, concatenate)
    if not processes.main:
        return
    missing = sum(not file.is_file() for file in files)
    if missing:
        log.write(f'{folder}: {missing} of {len(files)} chunks are still to be made by other tasks; the one that finds '
                  'all of them there writes the result')
        return
    proportion = level = None
    if config['proportions']:
        proportion, identity = map(np.concatenate, zip(*(
            (part['proportion'], part['identity']) for part in load_parts(files, 'proportion', 'identity'))))
        level = noise_level(proportion)
        same_images(source, np.arange(len(source)), identity, folder, 'delete it to start again')
        result.update(proportion=proportion, noise_level=level, identity=identity.astype(np.uint32))

        def write_embeddings(path):
            with open(path, 'wb') as file:  # on a full disk writing to a memory map ends in a SIGBUS
                np.lib.format.write_array_header_1_0(file, {'descr': '<f2', 'fortran_order': False,
                                                            'shape': (len(source), clip.embedding_dim)})
                for part in load_parts(files, 'embedding'):
                    file.write(part['embedding'].tobytes())
        atomic(folder / 'embeddings.npy', write_embeddings)
    atomic(folder / 'fg_proportion.npz', lambda path: np.savez(path, **result), once=True)  # last: it marks the end
    if config['proportions']:
        counts = {int(value): int((level == value).sum()) for value in range(0, 500, 100)}
        log.write('noise level: ' + ', '.join(f'{value}: {count:,}' for value, count in counts.items())
                  + f' images; mean proportion {np.nanmean(proportion):.3f}', stage='levels', **{
                      f'level_{value}': count for value, count in counts.items()})
        report_unreadable(source, np.flatnonzero(level < 0), log)
    draw(folder, sweep, picked, pc, projection, threshold, proportion, level)
    log.write(f'wrote {folder}/fg_proportion.npz; see {folder}/foreground.png and histogram.png')
    log.close()


def report_unreadable(source, indices, log):
    """Name the images that could not be read, with the reason of each."""
    if not len(indices):
        return
    reasons = []
    for index in indices.tolist():
        try:
            source[index]
            reason = 'could be read on the second attempt'
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'
        reasons.append({'index': index, 'path': str(source.path(index)), 'reason': reason})
    first = '; '.join(f"{r['index']} {r['path']} ({r['reason'][:100]})" for r in reasons[:5])
    log.write(f'{len(indices):,} unreadable images have noise level -1 and get no view: {first}'
              + ('; all are in log.jsonl' if len(reasons) > 5 else ''), unreadable=reasons)


if __name__ == '__main__':
    run(main, DEFAULTS)
