"""Stage 5: semi-supervised evaluation: the whole network is fine-tuned with the labels of 1, 5 or 10 % of the images.

    python semi_eval.py yamls/semi_eval/in1k_1percent.yaml checkpoint=runs/in1k/mocov3_300ep_genview/backbone.pt
    torchrun --nproc-per-node 8 semi_eval.py yamls/semi_eval/in1k_10percent.yaml checkpoint=resnet50.pth

checkpoint is any file that checkpoints.load_backbone recognises. Images come from betons, of which `image` is used
(gen_views.py, strategy: none); those whose labels may be used are SimCLR's published list (subset.file) or the same
number of each class, drawn from the seed. subset.txt in the run folder names them by their index in the dataset, and
can be the subset.file of another run.

Writes config.yaml, versions.json, log.jsonl, subset.txt, checkpoint.pt (removed at the end) and results.json into
`output`; prints top-1 and top-5 after the last epoch. The same command again resumes exactly, or shows the results;
SIGTERM and SIGUSR1 save and leave. The result does not depend on the number of processes, but for rounding: batches and
batch norm are those of the global batch.
"""
import json
import os
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from config import Fail, check_values, run_folder
from start import run

DEFAULTS = """
checkpoint: !text null  # backbone.pt of pretrain.py, or another's file (.pth, .safetensors)
backbone:               # what another's file does not say
  arch: !text null      # timm architecture, of networks other than ResNet and ViT
  heads: !int null      # attention heads of a ViT-S: 6 (timm, DeiT, DINO) | 12 (MoCo v3)
  prefix: !text null    # of the network that is meant, where several compete
train_beton: !text null # all training images, labelled
test_beton: !text null  # labelled test images
subset:                 # the training images whose labels are used
  share: 0.01           # of them, the same number of each class; not looked at when there is a file
  file: !text null      # list, one image a line: its file name, as in SimCLR's imagenet_subsets/1percent.txt and
                        # 10percent.txt, or its index in the dataset, as in subset.txt
  root: !text null      # where the dataset lies, for file names; null: as when the beton was written
output: !text null      # run folder; null: <checkpoint without suffix>_semi
seed: 0                 # of subset, classifier, data order and augmentation
device: auto            # auto | cpu | cuda
precision: auto         # auto | fp32 | bf16 | fp16 (GPU, with loss scaling); auto: bf16 where the hardware has it
num_workers: 8          # threads per process that decode

normalization: !texts null  # null: the checkpoint's own (where it has none: imagenet) | clip | imagenet | cifar10 |
                            # [[r, g, b], [r, g, b]] (mean, std)
image_size: !int null   # pixels; null: the checkpoint's own (where it has none: 224)
resize: !int null       # shorter side before the centre crop of evaluation, pixels; null: image_size
batch: 256              # test images per process at a time

epochs: 20
batch_size: 256         # of all processes together
lr_backbone: 0.00001    # for batch_size as it is, not scaled (GenView section 4.1: 1 %; 10 %: 0.02)
lr_head: 1.0            # of the linear classifier (10 %: 0.2)
milestones: []          # epochs after which both are multiplied by gamma; []: cosine per step to 0
gamma: 0.2
momentum: 0.9
nesterov: false
weight_decay: 0.0
crop_scale: [0.08, 1.0] # random resized crops: share of the image's area
flip: 0.5               # probability
log_every: 10           # steps
tensorboard: false
"""

BOOKKEEPING = ('checkpoint', 'output', 'device', 'num_workers', 'batch', 'log_every', 'tensorboard', 'subset.root')
ALLOWED = {
    'checkpoint': 'file', 'train_beton': 'file', 'test_beton': 'file', 'heads': (1, 64), 'share': (1e-9, 1.0),
    'seed': (0, 10 ** 12), 'num_workers': (1, 1024), 'image_size': (1, 1024), 'resize': (1, 4096),
    'batch': (1, 10 ** 5), 'epochs': (1, 10 ** 6), 'batch_size': (1, 10 ** 5), 'lr_backbone': (1e-30, 1000.0),
    'lr_head': (1e-30, 1000.0), 'milestones': (1, 10 ** 6), 'gamma': (1e-12, 1.0), 'momentum': (0.0, 0.9999),
    'weight_decay': (0.0, 0.999), 'log_every': (1, 10 ** 9)}


def check(config, world=1):
    check_values(config, ALLOWED)
    if config['nesterov'] and not config['momentum']:
        raise Fail('nesterov: needs a momentum above 0')
    if config['batch_size'] % world or config['batch_size'] // world < 2:
        raise Fail(f"batch_size: {config['batch_size']} (of all processes together) must be a multiple of the {world} "
                   'processes, and leave each of them two images')


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoints import backbone_of, digest
from common import Log, Processes, StopSignal, answered, earlier, precision_dtype, random_states, restore
from files import atomic, load_arrays, save_checkpoint, save_json
from data import PairLoader, check_size
from features import class_map, hits, labelled, percent, plain_images
from models import average_running_statistics, decayed, distributed, global_mean, normalize, synchronize_batch_norm
from sources import same_images, source_dataset


def balanced(labels, share, seed):
    """Positions of share * len(labels) images, as many of each class as the others (one more or less, fewer where a
    class has not so many), drawn from the seed; sorted."""
    random = np.random.default_rng(seed)
    rank = np.empty(len(labels), np.int64)  # of an image in its class's random order
    classes = random.permutation(np.unique(labels))  # which ones get one more
    for label in classes:
        rank[labels == label] = random.permutation(int((labels == label).sum()))
    place = np.empty(labels.max() + 1, np.int64)
    place[classes] = np.arange(len(classes))
    return np.sort(np.lexsort((place[labels], rank))[:max(1, round(share * len(labels)))])


def listed(path, root, sidecar, indices, beton=None):
    """Positions in the beton of the images that a file names, and how many of its lines the beton does not have.

    indices: (N,) of the beton; beton: its path, beside which gen_views.py leaves what the images were.
    Raises Fail when nothing, or less than 99 % of the list, is found."""
    try:
        names = [line.strip() for line in os.fsdecode(Path(path).read_bytes()).splitlines() if line.strip()]
    except OSError as error:
        raise Fail(f'subset.file: {path}: cannot be read: {error}; subset.file=null takes '
                   'subset.share of the images by the seed instead') from None
    position = {int(index): k for k, index in enumerate(indices)}
    seen = None
    if all(name.isdecimal() for name in names):
        found = [position.get(int(name)) for name in names]
    else:
        spec = sidecar['settings'].get('dataset')
        if not spec:
            raise Fail(f'subset.file: {path}: names files, and the beton does not say of which dataset; give indices')
        source = source_dataset({**spec, **({'root': root} if root else {})})
        if len(source) <= indices.max():
            raise Fail(f"subset.file: {path}: {spec['name']} in {root or spec['root']} has {len(source)} images, the "
                       'beton was written from more: set subset.root')
        whole = any('/' in name for name in names)
        by_name = {source.path(i) if whole else Path(source.path(i) or '').name: k for i, k in position.items()}
        if len(by_name) < len(position):
            raise Fail(f"subset.file: {path}: names files, but those of {spec['name']} are not different; give their "
                       'paths from the root, or indices')
        found = [by_name.get(name) for name in names]
        seen = beton and beton.with_name('images.npy')
    chosen = np.array(sorted({k for k in found if k is not None}), np.int64)
    if seen and seen.is_file():
        same_images(source, indices[chosen], load_arrays(seen, 'delete it'), beton, 'give indices in subset.file')
    lost = found.count(None)
    if lost > 0.01 * len(names) or not len(chosen):
        raise Fail(f'subset.file: {path}: {lost} of its {len(names)} images are not in the training beton, e.g. '
                   f'{names[found.index(None)] if lost else "(empty)"}')
    return chosen, lost


class Classifier(nn.Module):
    """uint8 images (B, 3, S, S) -> scores (B, classes)."""

    def __init__(self, backbone, classes, mean, std):
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(True), nn.Linear(backbone.feature_dim, classes)
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        return self.head(self.backbone(normalize(images, self.mean, self.std)))


def optimizer_of(model, config):
    return torch.optim.SGD([{'params': list(model.backbone.parameters()), 'base_lr': config['lr_backbone']},
                            {'params': list(model.head.parameters()), 'base_lr': config['lr_head']}], lr=0.0,
                           momentum=config['momentum'], nesterov=config['nesterov'],
                           weight_decay=config['weight_decay'])


def save(checkpoint, model, optimizer, scaler, step, identity, processes):
    if not torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all():
        raise Fail(f'step {step}: the weights are not finite; lower lr_backbone or lr_head, or set precision=fp32')
    average_running_statistics(model)
    if processes.main:
        save_checkpoint(checkpoint, {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
            'step': step, 'random': random_states(), 'config': identity})
    processes.barrier()


@torch.no_grad()
def accuracy(model, loader, n, known, autocast, processes):
    """Top-1 and top-5 in percent over n test images. loader: of those of this process, None where it has none; known:
    see class_map."""
    counts = torch.zeros(2, dtype=torch.double, device=processes.device)
    with autocast, closing(loader.epoch(0) if loader else (_ for _ in ())) as batches:
        for batch in tqdm(batches, 'test', len(loader or ()), disable=None if processes.main else True):
            counts += hits(model(batch['views'][0].to(processes.device)).float(),
                           known[batch['label']].to(processes.device))
    return percent(counts, n, processes)


def main(config):
    processes = Processes(config['device'])
    device, world = processes.device, processes.world
    check(config, world)
    dtype = precision_dtype(config['precision'], device)
    folder = run_folder(config['output'] or f"{os.path.splitext(config['checkpoint'])[0]}_semi")
    backbone, info = backbone_of(config)
    size = info['image_size']

    # Data: everything is checked before anything is written
    recipe = {'size': size, 'crop_scale': config['crop_scale'], 'flip': config['flip']}
    plain = {'size': size, 'resize': config['resize'] or size, 'crop_scale': None}
    everything, every_test = (labelled(config[f'{part}_beton'], plain, processes) for part in ('train', 'test'))
    enlarged = [check_size(loader, {'image_size': size}, meant=config['image_size'])
                for loader in (everything, every_test)]
    labels, indices = (everything.metadata[field].astype(np.int64) for field in ('f2', 'f3'))
    n_test, known = len(every_test.metadata), class_map(everything, every_test)
    classes = int(labels.max()) + 1
    last_label = int(known[torch.from_numpy(every_test.metadata['f2'].astype(np.int64))].max())
    if last_label >= classes:
        raise Fail(f"{config['test_beton']}: has a label {last_label}; those of the training images end at "
                   f'{classes - 1}')
    subset = config['subset']
    if subset['file']:
        chosen, lost = listed(subset['file'], subset['root'], everything.sidecar, indices, everything.paths[0])
    else:
        chosen, lost = balanced(labels, subset['share'], config['seed']), 0
    if config['batch_size'] > len(chosen):
        raise Fail(f"batch_size: {config['batch_size']} is more than the {len(chosen)} images of the subset")
    loader = PairLoader(config['train_beton'], [recipe], alpha=0, swap='first',
                        batch_size=config['batch_size'] // world, seed=config['seed'],
                        num_workers=config['num_workers'], rank=processes.rank, world=world, indices=chosen,
                        verify=False, pin_memory=device.type == 'cuda', exact=True)
    mine, steps = np.arange(processes.rank, n_test, world), len(loader)
    tests = plain_images(config['test_beton'], plain, config['batch'], config['num_workers'], mine,
                         device.type == 'cuda') if len(mine) else None

    # The same question again: show the answer, or go on where it stopped
    question = [everything.sidecar['crc32'], every_test.sidecar['crc32'], chosen.tolist(),
                digest(backbone, info)]
    identity = {**config, 'dtype': str(dtype), 'sha256': sha256(json.dumps(question).encode()).hexdigest()}
    results_path, checkpoint = folder / 'results.json', folder / 'checkpoint.pt'
    if answered(results_path, identity, BOOKKEEPING, processes):
        return
    saved = earlier(checkpoint, identity, BOOKKEEPING, needs=('model', 'optimizer', 'scaler', 'step', 'random'))

    torch.manual_seed(config['seed'])  # the same on all processes: they build the same classifier
    torch.set_float32_matmul_precision('high')
    model = Classifier(backbone, classes, info['mean'], info['std']).to(device, memory_format=torch.channels_last)
    model = synchronize_batch_norm(model, device)
    optimizer, scaler = optimizer_of(model, config), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    step = restore(saved, model, optimizer, scaler, processes) if saved else 0
    last_step, wrapped = steps * config['epochs'], distributed(model, device)

    stop, log = StopSignal(), Log(folder, config, processes.main, config['tensorboard'])
    if processes.main:
        atomic(folder / 'subset.txt', lambda p: p.write_text(''.join(f'{i}\n' for i in indices[chosen])))
    log.write(f"{info['text']}; {len(chosen)} of {len(labels)} images, {classes} classes, {n_test} test images"
              + f'; {lost} of the list are not in the beton' * (lost > 0)
              + ''.join(f'; {text}' for text in enlarged if text))
    decay = f"x {config['gamma']} after epochs {config['milestones']}" if config['milestones'] else 'cosine'
    log.write(f"SGD, lr {config['lr_backbone']} (backbone) and {config['lr_head']} (head), not scaled by the batch; "
              f"{decay}, momentum {config['momentum']}, weight decay {config['weight_decay']}, {config['epochs']} "
              f"epochs of {steps} steps, global batch {config['batch_size']} on {world} process{'es' * (world > 1)} "
              f"({device.type}, {str(dtype).split('.')[1]})" + (f'; resumed at step {step}' if saved else ''))
    begin, leave, losses = time.perf_counter(), False, []
    bar = tqdm(total=last_step, initial=step, unit='step', dynamic_ncols=True, disable=None if processes.main else True)
    model.train()
    while step < last_step and not leave:
        with closing(loader.epoch(step // steps, step % steps)) as batches:
            for batch in batches:
                for group in optimizer.param_groups:
                    group['lr'] = group['base_lr'] * decayed(step, steps, config)
                with autocast:
                    scores = wrapped(batch['views'][0].to(device, non_blocking=True))
                loss = F.cross_entropy(scores.float(), batch['label'].to(device, non_blocking=True))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.detach())
                step += 1
                bar.update()
                if step % config['log_every'] == 0 or step == last_step:
                    mean_loss, factor = global_mean(torch.stack(losses).mean()), decayed(step - 1, steps, config)
                    log.write(f'epoch {step / steps:.2f}/{config["epochs"]}  step {step}/{last_step}  loss '
                              f'{mean_loss:.4f}' if bar.disable else None, step=step, loss=mean_loss,
                              lr_backbone=config['lr_backbone'] * factor, lr_head=config['lr_head'] * factor)
                    losses = []
                leave = processes.any(stop) and step < last_step
                if leave:
                    break
        save(checkpoint, model, optimizer, scaler, step, identity, processes)
    bar.close()
    if leave:
        stop.leave(log, f'saved at step {step} of {last_step}; the same command resumes')

    top1, top5 = accuracy(model.eval(), tests, n_test, known, autocast, processes)
    summary = (f"{config['checkpoint']}: fine-tuned on {len(chosen)} of {len(labels)} images: top-1 {top1:.2f}  top-5 "
               f'{top5:.2f} ({n_test} test images)')
    if processes.main:
        save_json(results_path, {
            'summary': summary, 'top1': top1, 'top5': top5, 'train_images': len(chosen), 'all_images': len(labels),
            'test_images': n_test, 'classes': classes, 'mean': list(info['mean']), 'std': list(info['std']),
            'image_size': size, 'config': identity})
        checkpoint.unlink(missing_ok=True)
    log.write(f'{summary} -> {results_path}', step=step, top1=top1, top5=top5,
              seconds=round(time.perf_counter() - begin, 1))
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
