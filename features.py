"""Frozen features of many images, and what is counted on them: kNN, hits, percent."""
import os
from contextlib import closing
from copy import deepcopy
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from config import Fail, few
from data import PairLoader, check_size
from models import gather, normalize
from sources import parts


class Encoder:
    """Frozen backbone with its normalisation: uint8 (B, 3, S, S) -> float32 features (B, D)."""

    def __init__(self, backbone, mean, std, device, dtype):
        self.backbone = backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images):
        images = normalize(images.to(self.device, non_blocking=True), self.mean, self.std)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.backbone(images).float()


def labelled(path, recipe, processes):
    """A PairLoader on the originals of a beton, to see what is in it. Raises Fail where labels are missing."""
    loader = PairLoader(path, [recipe], alpha=0, swap='first', batch_size=1, seed=0, num_workers=1,
                        verify=processes.main)
    if loader.metadata['f2'].min() < 0:
        raise Fail(f'{path}: there are images without label (-1)')
    if len(set(loader.metadata['f2'].tolist())) < 2:
        names, label = loader.sidecar['settings'].get('classes') or [], int(loader.metadata['f2'][0])
        raise Fail(f'{path}: all images are of one class ({names[label] if label < len(names) else label}), which any '
                   'encoder finds: images belong into a folder for each class, directly below dataset.root or below '
                   'the folder of the split')
    processes.agree(loader.sidecar['crc32'], path)
    return loader


def class_map(train, test):
    """The training label of each label of the test images, int64 (number of them,): both know their classes by name.

    train, test: loaders of `labelled`. Of betons that were not written from datasets the numbers count. Raises Fail
    where the test images have other classes, or are the training images."""
    pair = f'{test.paths[0]} (test) and {train.paths[0]} (train)'
    described = [loader.sidecar['settings'] for loader in (train, test)]
    ours, theirs = ([described[k].get('dataset', {}).get(key) for key in ('name', 'root', 'split')] for k in (0, 1))
    place = lambda described: [described[0], described[1] and os.path.realpath(described[1])]
    if train.sidecar['crc32'] == test.sidecar['crc32'] or ours[0] and place(ours) == place(theirs) and (
            parts(ours[0], ours[2]) & parts(theirs[0], theirs[2])):
        raise Fail(f'{pair} hold the same images, or some of them, and what is measured on those says nothing about '
                   'new ones: test on another split')
    names, test_names = (d.get('classes') or [] for d in described)
    occurring = np.unique(test.metadata['f2'])
    if not names or len(test_names) <= occurring[-1]:
        if ours[0] and theirs[0] and (ours[0] != theirs[0] or ours[0] == 'folder' and (names or test_names)):
            raise Fail(f'{pair} are of the datasets {ours[0]} and {theirs[0]}, and do not both name their classes: '
                       'delete the one that names none, and gen_views.py packs it again')
        return torch.arange(occurring[-1] + 1)
    strange = [test_names[k] for k in occurring if test_names[k] not in names]
    if strange or len(set(names)) < len(names) and names != test_names:
        raise Fail(f'{pair} have other classes: {few(strange)} of the test images are not among {few(names)}')
    number = {name: k for k, name in enumerate(names)}
    return torch.arange(len(names)) if names == test_names else torch.tensor([number.get(n, 0) for n in test_names])


def plain_images(path, recipe, batch, num_workers, positions, pin_memory=False):
    """A PairLoader on the originals at `positions` of a beton, each once and in this order; checked before."""
    return PairLoader(path, [recipe], alpha=0, swap='first', batch_size=batch, seed=0, num_workers=num_workers,
                      drop_last=False, shuffle=False, indices=positions, verify=False, pin_memory=pin_memory,
                      exact=True)


def everywhere(rows, n, processes, block=1 << 15):
    """Rows of every world-th image from each process -> all n of them (n, ...), in order, on every process's CPU.
    block: rows of a process that travel at once; no device holds all."""
    share, world = -(-n // processes.world), processes.world
    if world == 1:
        return rows.cpu()
    rows = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, share - len(rows)))  # the last processes may have one less
    found = torch.empty(share * world, *rows.shape[1:], dtype=rows.dtype)
    for at in range(0, share, block):
        part = rows[at:at + block].to(processes.device)
        found[at * world:(at + len(part)) * world] = gather(part).view(world, *part.shape).transpose(0, 1).flatten(0, 1)
    return found[:n]


def all_features(loader_of, n, encoder, processes, what, stop=False):
    """Features (N, D) and labels (N,) of n images, in their order, on the CPU of every process. None instead when
    `stop` has become true on one of them.

    loader_of: function of positions (an array, not empty) -> PairLoader over them, in order and with the last batch.
    Each process encodes every world-th image: none is encoded twice, whatever n is. Half precision is kept as such."""
    mine = np.arange(processes.rank, n, processes.world)
    features, labels = [], []
    kept = torch.float32 if encoder.dtype == torch.float32 else torch.float16  # as exact, and ImageNet's fit in memory
    loader = loader_of(mine) if len(mine) else None
    shared = torch.tensor(len(loader) if loader else 0)  # batches that every process has: there they can ask each other
    if dist.is_initialized():
        dist.all_reduce(shared, dist.ReduceOp.MIN)
    with closing(loader.epoch(0) if loader else (_ for _ in ())) as batches:
        bar = tqdm(batches, what, len(loader or ()), disable=None if processes.main else True)
        for number, batch in enumerate(bar):
            if number < shared and processes.any(stop):
                return None
            features.append(encoder(batch['views'][0]).to(kept).cpu())
            labels.append(batch['label'])
    width = encoder.backbone.feature_dim
    features = torch.cat([torch.empty(0, width, dtype=kept), *features])
    labels = torch.cat([torch.empty(0).long(), *labels])
    return everywhere(features, n, processes), everywhere(labels, n, processes)


def hits(scores, labels):
    """How many rows of scores (B, C) have their label (B,) first, and among the first five: tensor (2,)."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.any(1).sum()]).double()


def percent(counts, n, processes):
    """Hits (K,) of this process's share of n images (a number or (K,)) -> percent over all processes, a list."""
    if dist.is_initialized():
        counts = counts.to(processes.device)
        dist.all_reduce(counts)
    return [round(v, 3) for v in (100 * counts / n).tolist()]


def knn_accuracy(train, train_labels, test, test_labels, classes, k, temperature, batch, processes):
    """Weighted kNN (Wu et al. 2018): the k nearest by cosine vote with exp(cosine / temperature). [top-1, top-5]."""
    device = processes.device
    kept = train.dtype if device.type == 'cuda' else torch.float32  # ImageNet's features: 5 GB of a GPU, not 10
    train = torch.cat([F.normalize(part.to(device).float(), dim=1).to(kept) for part in train.split(65536)])
    train_labels = train_labels.to(device)
    counts = torch.zeros(2, dtype=torch.double, device=device)
    for chunk in torch.arange(len(test))[processes.rank::processes.world].split(batch):
        query = F.normalize(test[chunk].to(device).float(), dim=1)
        cosines, nearest = (query.to(kept) @ train.T).float().topk(k, dim=1)
        votes = torch.zeros(len(chunk), classes, device=device)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        counts += hits(votes, test_labels[chunk].to(device))
    return percent(counts, len(test), processes)


class Monitor:
    """kNN accuracy of a backbone in training (`knn` of pretrain.py). Raises Fail at once where it cannot work later."""

    def __init__(self, config, mean_std, dtype, processes):
        size, self.knn, self.workers = config['image_size'], config['knn'], config['data']['num_workers']
        self.recipe = {'size': size, 'resize': size, 'crop_scale': None}
        self.mean_std, self.dtype, self.processes = mean_std, dtype, processes
        loaders = [labelled(self.knn[f'{part}_beton'], self.recipe, processes) for part in ('train', 'test')]
        for loader in loaders:
            check_size(loader, {'image_size': size})
        self.known, self.samples = class_map(*loaders), [len(loader.metadata) for loader in loaders]
        self.loaders = {}  # opened once: their threads and checks would cost as much as a short evaluation
        self.classes = int(max(loaders[0].metadata['f2'].max(), self.known.max())) + 1
        if self.knn['k'] > self.samples[0]:
            raise Fail(f"knn.k: {self.knn['k']} neighbours out of {self.samples[0]} images of knn.train_beton")

    def opened(self, part, positions):
        if part not in self.loaders:
            self.loaders[part] = plain_images(self.knn[f'{part}_beton'], self.recipe, 256, self.workers, positions)
        return self.loaders[part]

    def accuracy(self, backbone):
        """backbone: of the training, not touched. Top-1 accuracy between 0 and 1, the same on all processes."""
        encoder = Encoder(deepcopy(backbone), *self.mean_std, self.processes.device, self.dtype)
        (train, labels), (test, test_labels) = (
            all_features(partial(self.opened, part), n, encoder, self.processes, f'kNN {part}')
            for part, n in zip(('train', 'test'), self.samples))
        return knn_accuracy(train, labels, test, self.known[test_labels], self.classes, self.knn['k'],
                            self.knn['temperature'], 256, self.processes)[0] / 100
