"""Stage 4: how good the features of a frozen backbone are: weighted kNN and a linear probe, top-1 and top-5.

    python linear_eval.py yamls/linear_eval/cifar10.yaml checkpoint=runs/cifar10/genview/backbone.pt
    torchrun --nproc-per-node 8 linear_eval.py yamls/linear_eval/in1k.yaml checkpoint=resnet50.pth

checkpoint is a backbone.pt (or backbone_init.pt, the same network untrained) of pretrain.py, or a torchvision/timm
ResNet state dict. The images come from betons, of which only `image` is used (gen_views.py, strategy: none).
Writes results.json, config.yaml, versions.json and log.jsonl into `output` and prints one line. The accuracy of the
probe is that after its last epoch. The same command again resumes at the last epoch of the probe, or shows the results.
"""
import json
import math
import sys
import time
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (Fail, Log, Processes, StopSignal, changed_keys, load_checkpoint, precision_dtype, run,
                    save_checkpoint, save_json, seed_everything)
from data import CIFAR_MEAN, CIFAR_STD, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PairLoader, open_beton
from models import Encoder, all_features, hits, knn_accuracy, load_backbone, percent

DEFAULTS = """
checkpoint: null        # backbone.pt of pretrain.py, or a torchvision/timm ResNet state dict (.pth, .safetensors)
train_beton: null       # labelled training images
test_beton: null        # labelled test images
output: null            # run folder; null: <checkpoint without suffix>_eval
seed: 0                 # of the classifier, data order and augmentation
device: auto            # auto | cpu | cuda
precision: auto         # of the frozen backbone: auto | fp32 | bf16 | fp16; classifier and kNN are float32
num_workers: 8          # threads per process that decode

normalization: null     # null: the checkpoint's own (foreign files have none: imagenet) | clip | imagenet | cifar10
image_size: null        # pixels; null: the checkpoint's own (foreign files: 224)
resize: null            # shorter side before the centre crop of evaluation, pixels; null: image_size
batch: 512              # images per process when features are computed

knn:                    # weighted kNN on cosine similarity (Wu et al. 2018), as usual for SSL
  k: 200
  temperature: 0.07
  batch: 256            # test images at a time

linear:                 # SGD on a linear classifier (GenView section 4.1 for Table 5)
  lr: 0.2               # for batch_size as it is, not scaled; cosine to 0
  epochs: 100
  batch_size: 256       # of all processes together
  momentum: 0.9
  weight_decay: 0.0
  augment: true         # random resized crops and flips; false: features are computed once, minutes instead of hours
  crop_scale: [0.08, 1.0]       # share of the image's area
  flip: 0.5                     # probability
tensorboard: false
"""

NORMALIZATIONS = {'clip': (CLIP_MEAN, CLIP_STD), 'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
                  'cifar10': (CIFAR_MEAN, CIFAR_STD)}
BOOKKEEPING = ('output', 'device', 'num_workers', 'batch', 'knn.batch', 'tensorboard')  # do not shape the result


def check(config, world):
    for key in ('checkpoint', 'train_beton', 'test_beton'):
        if not isinstance(config[key], str):
            raise Fail(f'{key}: must name a file, e.g. {key}=runs/...')
    if config['normalization'] not in (None, *NORMALIZATIONS):
        raise Fail(f"normalization: {config['normalization']!r} is none of {', '.join(NORMALIZATIONS)}")
    linear, knn = config['linear'], config['knn']
    for key, value in (('batch', config['batch']), ('knn.k', knn['k']), ('knn.batch', knn['batch']),
                       ('linear.epochs', linear['epochs']), ('linear.batch_size', linear['batch_size']),
                       ('image_size', config['image_size'] or 1), ('resize', config['resize'] or 1)):
        if not isinstance(value, int) or value < 1:
            raise Fail(f'{key}: {value} must be a whole number of at least 1')
    for key, value in (('knn.temperature', knn['temperature']), ('linear.lr', linear['lr'])):
        if not value > 0:
            raise Fail(f'{key}: {value} must be above 0')
    if linear['batch_size'] % world:
        raise Fail(f"linear.batch_size: {linear['batch_size']} (of all processes together) is not a multiple of the "
                   f'{world} processes')


def digest(module):
    """sha256 of all parameters and buffers, byte for byte."""
    total = sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def batches(config, recipe, train, encoder, processes):
    """Function (epoch) -> iterator over (features, labels) of this process's part of each global batch, and the number
    of steps of an epoch. The last, smaller batch of an epoch is left out; every epoch shuffles anew."""
    linear, size = config['linear'], config['linear']['batch_size'] // processes.world
    if not linear['augment']:
        features, labels = (t.to(processes.device) for t in train)
        steps = len(labels) // linear['batch_size']

        def epoch(number):
            generator = torch.Generator().manual_seed(config['seed'] * 1_000_003 + number)
            order = torch.randperm(len(labels), generator=generator).to(processes.device)
            for step in range(steps):
                begin = step * linear['batch_size'] + processes.rank * size
                part = order[begin:begin + size]
                yield features[part].float(), labels[part]
        return epoch, steps
    loader = PairLoader(config['train_beton'], [recipe], alpha=0, swap='first', batch_size=size, seed=config['seed'],
                        num_workers=config['num_workers'], rank=processes.rank, world=processes.world, verify=False,
                        pin_memory=processes.device.type == 'cuda')

    def epoch(number):
        with closing(loader.epoch(number)) as parts:
            for part in parts:
                yield encoder(part['views'][0]), part['label'].to(processes.device, non_blocking=True)
    return epoch, len(loader)


def main(config):
    processes = Processes(config['device'])
    check(config, processes.world)
    device, linear, knn = processes.device, config['linear'], config['knn']
    dtype = precision_dtype(config['precision'], device)
    backbone, info = load_backbone(config['checkpoint'])
    own = (info['mean'], info['std']) if info['mean'] else None
    mean, std = NORMALIZATIONS[config['normalization'] or 'imagenet'] if config['normalization'] or not own else own
    size = config['image_size'] or info['image_size'] or 224
    folder = Path(config['output'] or f"{Path(config['checkpoint']).with_suffix('')}_eval")

    # Betons are checked before anything is written or computed
    sidecars = [open_beton(config[key], verify=processes.main) for key in ('train_beton', 'test_beton')]
    n_train, n_test = (sidecar['samples'] for sidecar in sidecars)
    if knn['k'] > n_train:
        raise Fail(f"knn.k: {knn['k']} neighbours out of {n_train} training images; set a smaller knn.k")
    if linear['batch_size'] > n_train:
        raise Fail(f"linear.batch_size: {linear['batch_size']} is more than the {n_train} training images")

    # The same question again: show the answer, or go on where it stopped. A new one in the same folder starts anew.
    fingerprint = digest(backbone)
    betons = sha256(json.dumps([sidecar['crc32'] for sidecar in sidecars]).encode()).hexdigest()
    identity = {**config, 'backbone_sha256': fingerprint, 'betons_sha256': betons}
    results_path, checkpoint = folder / 'results.json', folder / 'linear.pt'
    if results_path.is_file():
        old = json.loads(results_path.read_text())
        if not changed_keys(old['config'], identity, (*BOOKKEEPING, 'checkpoint')):
            if processes.main:
                print(f"{old['summary']} (finished before: {results_path})")
            return
    saved = load_checkpoint(checkpoint) if checkpoint.is_file() else None
    saved = saved if saved and not changed_keys(saved['config'], identity, (*BOOKKEEPING, 'checkpoint')) else None

    recipe = {'size': size, 'resize': config['resize'] or size, 'crop_scale': None}
    augmented = {'size': size, 'crop_scale': linear['crop_scale'], 'flip': linear['flip']}
    stop = StopSignal()
    log = Log(folder, config, processes.main, config['tensorboard'])
    source = config['normalization'] or ('its own' if own else 'imagenet (the file names none)')
    log.write(f"{config['checkpoint']}: {info['text']}, {info['feature_dim']} features"
              f"{'; ' * bool(info['note'])}{info['note']}; normalisation {source}, {size} px; "
              f"{n_train} training and {n_test} test images")

    begin = time.perf_counter()
    seed_everything(config['seed'])
    encoder = Encoder(backbone, mean, std, device, dtype)

    def images(path, positions):
        return PairLoader(path, [recipe], alpha=0, swap='first', batch_size=min(config['batch'], len(positions)),
                          seed=0, num_workers=config['num_workers'], drop_last=False, shuffle=False, indices=positions,
                          verify=False, pin_memory=device.type == 'cuda')
    train, (test, test_labels) = (
        all_features(partial(images, config[f'{part}_beton']), n, encoder, processes, f'{part} features')
        for part, n in (('train', n_train), ('test', n_test)))
    classes = int(max(train[1].max(), test_labels.max())) + 1
    if min(train[1].min(), test_labels.min()) < 0:
        raise Fail(f"{config['train_beton']}, {config['test_beton']}: there are images without label (-1)")
    if not (train[0].isfinite().all() and test.isfinite().all()):
        raise Fail(f"{config['checkpoint']}: features are not finite; set precision=fp32, or the weights are damaged")
    nearest = knn_accuracy(*train, test, test_labels, classes, knn['k'], knn['temperature'], knn['batch'], processes)
    log.write(f"kNN (k {knn['k']}, temperature {knn['temperature']}): top-1 {nearest[0]:.2f}  top-5 {nearest[1]:.2f}",
              knn_top1=nearest[0], knn_top5=nearest[1])

    # Linear probe: parameters start at N(0, 0.01) and 0 as in MoCo's, gradients are averaged by hand (one small layer)
    classifier = nn.Linear(info['feature_dim'], classes)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=linear['momentum'],
                                weight_decay=linear['weight_decay'])
    first = 0
    if saved:
        classifier.load_state_dict(saved['classifier'])
        optimizer.load_state_dict(saved['optimizer'])
        first = saved['epoch']
    epoch_batches, steps = batches(config, augmented, train, encoder, processes)
    log.write(f"linear probe: SGD, lr {linear['lr']} (as given, not scaled by the batch), cosine, momentum "
              f"{linear['momentum']}, weight decay {linear['weight_decay']}, {linear['epochs']} epochs of {steps} "
              f"steps, batch {linear['batch_size']}, {'augmented images' if linear['augment'] else 'frozen features'}"
              + (f'; resumed at epoch {first}' if saved else ''))
    bar = tqdm(total=linear['epochs'], initial=first, desc='linear probe', unit='epoch',
               disable=None if processes.main else True)
    total, leave, accuracy = steps * linear['epochs'], False, None
    for epoch in range(first, linear['epochs']):
        loss_sum = torch.zeros((), device=device)
        for step, (features, labels) in enumerate(epoch_batches(epoch), epoch * steps):
            for group in optimizer.param_groups:
                group['lr'] = linear['lr'] * 0.5 * (1 + math.cos(math.pi * step / total))
            loss = F.cross_entropy(classifier(features), labels)
            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():
                for parameter in classifier.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= processes.world
            optimizer.step()
            loss_sum += loss.detach()
            leave = processes.any(stop) and linear['augment']  # frozen features: what is left takes seconds
            if leave:
                break
        bar.update()
        if leave:
            break
        if not loss_sum.isfinite():
            raise Fail(f"linear probe: the loss is not finite in epoch {epoch + 1}; lower linear.lr")
        log.write(None, step=epoch + 1, loss=loss_sum.item() / steps, lr=optimizer.param_groups[0]['lr'])
        if linear['augment'] and processes.main:
            save_checkpoint(checkpoint, {'classifier': classifier.state_dict(), 'optimizer': optimizer.state_dict(),
                                         'epoch': epoch + 1, 'config': identity})
    bar.close()
    if leave:
        log.write(f'{stop.name or "stop signal"}: left in epoch {epoch + 1} of {linear["epochs"]}; the same command '
                  'resumes at its beginning')
        log.close()
        sys.exit(stop.exit_code)
    counts = torch.zeros(2, dtype=torch.double, device=device)
    with torch.no_grad():
        for chunk in torch.arange(processes.rank, n_test, processes.world).split(config['batch']):
            counts += hits(classifier(test[chunk].to(device).float()), test_labels[chunk].to(device))
    accuracy = percent(counts, n_test, processes)
    if digest(backbone) != fingerprint:
        raise RuntimeError('the frozen backbone has changed: the results are worthless (a bug, please report it)')

    summary = (f"{config['checkpoint']}: kNN top-1 {nearest[0]:.2f}  top-5 {nearest[1]:.2f} | linear top-1 "
               f"{accuracy[0]:.2f}  top-5 {accuracy[1]:.2f} ({n_test} test images)")
    if processes.main:
        save_json(results_path, {
            'summary': summary, 'knn': {'top1': nearest[0], 'top5': nearest[1]},
            'linear': {'top1': accuracy[0], 'top5': accuracy[1]}, 'train_images': n_train, 'test_images': n_test,
            'classes': classes, 'mean': list(mean), 'std': list(std), 'image_size': size,
            'seconds': round(time.perf_counter() - begin, 1), 'config': identity})
        checkpoint.unlink(missing_ok=True)
    log.write(f'{summary} -> {results_path}', knn=nearest, linear=accuracy)
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
