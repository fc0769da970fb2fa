"""Stage 4: how good the features of a frozen backbone are: weighted kNN and a linear probe, top-1 and top-5.

    python linear_eval.py yamls/linear_eval/cifar10.yaml checkpoint=runs/cifar10/mocov2_genview/backbone.pt
    torchrun --nproc-per-node 8 linear_eval.py yamls/linear_eval/in1k.yaml checkpoint=resnet50.pth
    python linear_eval.py yamls/linear_eval/transfer.yaml checkpoint=resnet50.pth train_beton=... test_beton=...

checkpoint is a backbone.pt (or backbone_init.pt, the same network untrained) of pretrain.py, or any file that
checkpoints.load_backbone recognises: of torchvision, timm, MoCo, SimSiam, SwAV, BYOL, VICReg, mmpretrain, ... Images
come from betons, of which only `image` is used; gen_views.py with strategy: none writes them from torchvision's
datasets and image folders (yamls/gen_views/transfer_train.yaml).

Several learning rates (linear.more_lrs) are probed in one pass: one forward of the encoder and for each a classifier
that is equal to what it would be alone. Writes results.json, config.yaml, versions.json and log.jsonl into `output` and
prints one line. The accuracy of a probe is that after its last epoch. The same command again resumes at the last epoch,
or shows the results; SIGTERM and SIGUSR1 leave at the next step.
"""
import json
import math
import os
import time
from contextlib import closing, suppress
from copy import deepcopy
from functools import partial
from hashlib import sha256

from config import Fail, check_values, run_folder
from start import run

DEFAULTS = """
checkpoint: !text null  # backbone.pt of pretrain.py, or another's file (.pth, .safetensors)
backbone:               # what another's file does not say
  arch: !text null      # timm architecture, of networks other than ResNet and ViT, e.g. tf_efficientnet_lite0
  heads: !int null      # attention heads of a ViT-S: 6 (timm, DeiT, DINO) | 12 (MoCo v3)
  prefix: !text null    # of the network that is meant, where several compete, e.g. teacher.backbone
train_beton: !text null # labelled training images
test_beton: !text null  # labelled test images
metric: !text null      # of the summary: top1 | mean_per_class; null: as usual for the set, mean_per_class of
                        # OxfordIIITPet, Caltech101, Flowers102 and FGVCAircraft (results.json has both)
output: !text null      # run folder; null: <checkpoint without suffix>_eval
seed: 0                 # of the classifiers, data order and augmentation
device: auto            # auto | cpu | cuda
precision: auto         # of the frozen backbone: auto | fp32 | bf16 | fp16; classifiers are float32
num_workers: 8          # threads per process that decode

normalization: !texts null  # null: the checkpoint's own (where it has none: imagenet) | clip | imagenet | cifar10 |
                            # [[r, g, b], [r, g, b]] (mean, std)
image_size: !int null   # pixels; null: the checkpoint's own (where it has none: 224)
resize: !int null       # shorter side before the centre crop of evaluation, pixels; null: image_size
batch: 512              # images per process when features are computed
keep_features: false    # keep *_features.pt of un-augmented images: the next question about them needs no encoder

knn:                    # weighted kNN on cosine similarity (Wu et al. 2018), as usual for SSL
  k: 200
  temperature: 0.07
  batch: 256            # test images at a time

linear:                 # linear classifier (GenView section 4.1 for Table 5)
  optimizer: sgd        # sgd | lars (trust coefficient 0.001, bias too: apex LARC without clipping, as SimSiam)
  lr: 0.2               # the protocol's, for batch_size as it is, not scaled
  more_lrs: []          # probed beside it in the same pass
  milestones: []        # epochs after which lr is multiplied by 0.1; []: cosine per step to final_share
  final_share: 0.0      # of lr, at the end of the cosine
  epochs: 100
  batch_size: 256       # of all processes together
  momentum: 0.9
  nesterov: false
  weight_decay: 0.0
  batch_norm: false     # before the classifier, of the batch in training (VISSL's transfer probes)
  augment: true         # random resized crops and flips; false: features are computed once, minutes instead of hours
  crop_scale: [0.08, 1.0]       # share of the image's area
  flip: 0.5                     # probability
tensorboard: false
"""
PER_CLASS = ('OxfordIIITPet', 'Caltech101', 'Flowers102', 'FGVCAircraft')  # usual since Kornblith et al. 2019
BOOKKEEPING = ('output', 'device', 'num_workers', 'batch', 'knn.batch', 'keep_features', 'tensorboard', 'checkpoint')
ALLOWED = {
    'checkpoint': 'file', 'train_beton': 'file', 'test_beton': 'file', 'heads': (1, 64),
    'metric': ['top1', 'mean_per_class'], 'seed': (0, 10 ** 12), 'num_workers': (1, 1024), 'image_size': (1, 1024),
    'resize': (1, 4096), 'batch': (1, 10 ** 5), 'k': (1, 10 ** 7), 'temperature': (0.02, 100.0),
    'optimizer': ['sgd', 'lars'], 'lr': (1e-30, 1000.0), 'more_lrs': (1e-30, 1000.0), 'milestones': (1, 10 ** 6),
    'final_share': (0.0, 1.0), 'epochs': (1, 10 ** 6), 'batch_size': (1, 10 ** 6), 'momentum': (0.0, 0.9999),
    'weight_decay': (0.0, 0.999)}


def check(config, world=1):
    from augment import recipe_row
    check_values(config, ALLOWED)
    if config['linear']['batch_size'] % world:
        raise Fail(f"linear.batch_size: {config['linear']['batch_size']} (of all processes together) is not a multiple "
                   f'of the {world} processes')
    if config['linear']['batch_norm'] and config['linear']['batch_size'] == 1:
        raise Fail('linear.batch_norm: one feature has no statistics; needs a linear.batch_size above 1')
    if config['linear']['nesterov'] and not config['linear']['momentum']:
        raise Fail('linear.nesterov: needs a linear.momentum above 0')
    recipe_row({'size': 224, 'crop_scale': config['linear']['crop_scale'], 'flip': config['linear']['flip']}, 'linear')


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoints import backbone_of, digest
from common import Log, Processes, StopSignal, answered, earlier, precision_dtype
from files import load_checkpoint, save_checkpoint, save_json, weights_checksum
from data import PairLoader, check_size
from features import Encoder, all_features, class_map, hits, knn_accuracy, labelled, percent, plain_images
from models import average, decayed, synchronize_batch_norm


def lars(groups, **settings):
    from timm.optim import Lars  # timm takes as long to import as torch
    return Lars(groups, trust_coeff=0.001, always_adapt=True, **settings)


OPTIMIZERS = {'sgd': torch.optim.SGD, 'lars': lars}


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
                        exact=True, pin_memory=processes.device.type == 'cuda')

    def epoch(number):
        with closing(loader.epoch(number)) as parts:
            for part in parts:
                features = [encoder(views) for views in part['views'][0].split(config['batch'])]
                yield torch.cat(features), part['label'].to(processes.device, non_blocking=True)
    return epoch, len(loader)


@torch.no_grad()
def accuracies(classifier, features, labels, classes, batch, processes):
    """{'top1', 'top5', 'mean_per_class'} in percent; the last is top-1 averaged over the classes that occur."""
    counts = torch.zeros(2 + classes, dtype=torch.double, device=processes.device)
    for chunk in torch.arange(len(labels))[processes.rank::processes.world].split(batch):
        scores, truth = classifier(features[chunk].to(processes.device).float()), labels[chunk].to(processes.device)
        counts[:2] += hits(scores, truth)
        counts[2:] += truth[scores.argmax(1) == truth].bincount(minlength=classes)
    totals = torch.cat([torch.tensor([len(labels)] * 2), labels.bincount(minlength=classes)]).to(processes.device)
    top1, top5, *per_class = percent(counts, totals, processes)
    per_class = [value for value in per_class if not math.isnan(value)]
    return {'top1': top1, 'top5': top5, 'mean_per_class': round(sum(per_class) / len(per_class), 3)}


def computed_once(path, question, compute, processes):
    """compute() -> features and labels, or those that an earlier run has kept in `path` for the same question."""
    kept = None
    with suppress(Fail):  # there is none, or a damaged one: what costs minutes to compute need not stop the run
        kept = load_checkpoint(path)
    kept = kept if isinstance(kept, dict) and {'features', 'labels'} <= kept.keys() else {}
    if not processes.any(kept.get('question') != question):
        return kept['features'], kept['labels']
    features, labels = compute()
    if processes.main:
        save_checkpoint(path, {'question': question, 'features': features, 'labels': labels})
    return features, labels


def build_probes(linear, lrs, width, classes, saved, device):
    """A classifier for each learning rate, all equal at the start (as MoCo's), their optimizer and the first epoch."""
    classifier = nn.Linear(width, classes)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    probe, decay = [classifier], linear['weight_decay']
    if linear['batch_norm']:
        probe = [nn.BatchNorm1d(width), classifier]
    probes = nn.ModuleList(nn.Sequential(*deepcopy(probe)) for _ in lrs).to(device)
    synchronize_batch_norm(probes, device)
    optimizer = OPTIMIZERS[linear['optimizer']](
        [{'params': list(part.parameters()), 'base_lr': lr, 'weight_decay': decay * isinstance(part, nn.Linear)}
         for probe, lr in zip(probes, lrs) for part in probe], lr=0.0, momentum=linear['momentum'],
        **({'nesterov': True} if linear['nesterov'] else {}))
    if saved:
        probes.load_state_dict(saved['probes'])
        optimizer.load_state_dict(saved['optimizer'])
    return probes, optimizer, saved['epoch'] if saved else 0


def main(config):
    processes = Processes(config['device'])
    check(config, processes.world)
    device, linear, knn = processes.device, config['linear'], config['knn']
    dtype = precision_dtype(config['precision'], device)
    folder = run_folder(config['output'] or f"{os.path.splitext(config['checkpoint'])[0]}_eval")
    backbone, info = backbone_of(config)
    size = info['image_size']

    # Data: everything is checked before anything is written or computed
    recipe = {'size': size, 'resize': config['resize'] or size, 'crop_scale': None}
    augmented = {'size': size, 'crop_scale': linear['crop_scale'], 'flip': linear['flip']}
    loaders = {part: labelled(config[f'{part}_beton'], recipe, processes) for part in ('train', 'test')}
    enlarged = [check_size(loader, {'image_size': size}, meant=config['image_size']) for loader in loaders.values()]
    known, sidecars = class_map(*loaders.values()), {part: loader.sidecar for part, loader in loaders.items()}
    n_train, n_test = (sidecar['samples'] for sidecar in sidecars.values())
    if knn['k'] > n_train:
        raise Fail(f"knn.k: {knn['k']} neighbours out of {n_train} training images; set a smaller knn.k")
    if linear['batch_size'] > n_train:
        raise Fail(f"linear.batch_size: {linear['batch_size']} is more than the {n_train} training images")
    dataset = sidecars['test']['settings'].get('dataset', {}).get('name')
    metric = config['metric'] or ('mean_per_class' if dataset in PER_CLASS else 'top1')

    # The same question again: show the answer, or go on where it stopped. A new one leaves an earlier answer beside its
    # own, and does not take the place of an unfinished one.
    fingerprint = digest(backbone, info)
    contents = {part: sha256(json.dumps(sidecar['crc32']).encode()).hexdigest() for part, sidecar in sidecars.items()}
    identity = {**config, 'dtype': str(dtype), 'backbone_sha256': fingerprint, 'betons_sha256': contents}
    results_path, checkpoint = folder / 'results.json', folder / 'linear.pt'
    if answered(results_path, identity, BOOKKEEPING, processes, anew=True):
        if processes.main and earlier(checkpoint, identity, BOOKKEEPING, anew=True):
            checkpoint.unlink()  # of the same question: killed between the two
        return
    saved = earlier(checkpoint, identity, BOOKKEEPING, needs=('probes', 'optimizer', 'epoch'))

    stop, log, begin = StopSignal(), Log(folder, config, processes.main, config['tensorboard']), time.perf_counter()
    log.write('; '.join([info['text'], f'{n_train} training and {n_test} test images', *filter(None, enlarged)]))
    torch.manual_seed(config['seed'])
    encoder = Encoder(backbone, info['mean'], info['std'], device, dtype)

    def compute(part):
        images = partial(plain_images, config[f'{part}_beton'], recipe, config['batch'], config['num_workers'],
                         pin_memory=device.type == 'cuda')
        found = all_features(images, sidecars[part]['samples'], encoder, processes, f'{part} features', stop)
        if found is None:
            stop.leave(log, f'left while the {part} features were computed; the same command computes them again')
        if not found[0].isfinite().all():
            raise Fail(f"{config['checkpoint']}: features are not finite; set precision=fp32, or the weights are "
                       'damaged')
        return found
    question = {'backbone': fingerprint, 'recipe': recipe, 'dtype': str(dtype)}
    train, (test, test_labels) = (
        computed_once(folder / f'{part}_features.pt', {**question, 'beton': contents[part]}, partial(compute, part),
                      processes) for part in ('train', 'test'))
    test_labels = known[test_labels]
    classes = int(max(train[1].max(), test_labels.max())) + 1
    nearest = knn_accuracy(*train, test, test_labels, classes, knn['k'], knn['temperature'], knn['batch'], processes)
    log.write(f"kNN (k {knn['k']}, temperature {knn['temperature']}): top-1 {nearest[0]:.2f}  top-5 {nearest[1]:.2f}",
              knn_top1=nearest[0], knn_top5=nearest[1])

    if linear['augment']:
        train = None, train[1]  # ImageNet's features are 10 GB of every process, and kNN alone needed them
    # Linear probes; gradients are averaged by hand (small layers)
    lrs = list(dict.fromkeys([linear['lr'], *map(float, linear['more_lrs'])]))
    probes, optimizer, first = build_probes(linear, lrs, info['feature_dim'], classes, saved, device)
    epoch_batches, steps = batches(config, augmented, train, encoder, processes)
    decay = f"x 0.1 after epochs {linear['milestones']}" if linear['milestones'] else \
        'cosine' + f" to {linear['final_share']} of it" * (linear['final_share'] > 0)
    log.write(f"linear probe: {linear['optimizer']}, lr {', '.join(map(str, lrs))} (as given, not scaled by the "
              f"batch), {decay}, momentum {linear['momentum']}, weight decay {linear['weight_decay']}, "
              f"{linear['epochs']} epochs of {steps} steps, batch {linear['batch_size']}, "
              f"{'augmented images' if linear['augment'] else 'frozen features'}"
              + (f'; resumed at epoch {first}' if saved else ''))
    bar = tqdm(total=linear['epochs'], initial=first, desc='linear probe', unit='epoch',
               disable=None if processes.main else True)
    last_saved = time.perf_counter()
    for epoch in range(first, linear['epochs']):
        loss_sum = torch.zeros(len(lrs), device=device)
        for step, (inputs, labels) in enumerate(epoch_batches(epoch), epoch * steps):
            for group in optimizer.param_groups:
                group['lr'] = group['base_lr'] * decayed(step, steps, linear)
            losses = torch.stack([F.cross_entropy(probe(inputs), labels) for probe in probes])
            optimizer.zero_grad()
            losses.sum().backward()  # none depends on another's parameters
            average(parameter.grad for parameter in probes.parameters())
            optimizer.step()
            loss_sum += losses.detach()
            if processes.any(stop):
                bar.close()
                stop.leave(log, f'left in epoch {epoch + 1} of {linear["epochs"]}; the same command resumes at '
                           + ('its beginning' if linear['augment'] else 'the last one that was saved'))
        bar.update()
        if dist.is_initialized():
            dist.all_reduce(loss_sum)
        loss_sum /= steps * processes.world
        if not loss_sum[0].isfinite():
            checkpoint.unlink(missing_ok=True)  # nothing to go on from
            raise Fail(f"linear probe: the loss is not finite in epoch {epoch + 1}; lower linear.lr")
        log.write(None, step=epoch + 1, loss=loss_sum[0].item(), lr=optimizer.param_groups[0]['lr'],
                  **({'losses': loss_sum.tolist()} if len(lrs) > 1 else {}))
        if processes.main and (linear['augment'] or time.perf_counter() - last_saved > 60):
            save_checkpoint(checkpoint, {'probes': probes.state_dict(), 'optimizer': optimizer.state_dict(),
                                         'epoch': epoch + 1, 'config': identity})
            last_saved = time.perf_counter()
    bar.close()
    probes.eval()
    found = [{'lr': lr, 'protocol': lr == linear['lr'],
              **accuracies(probe, test, test_labels, classes, config['batch'], processes)}
             for lr, probe in zip(lrs, probes)]
    if digest(backbone, info) != fingerprint:
        raise RuntimeError('the frozen backbone has changed: the results are worthless (a bug, please report it)')

    summary = in_words(config, nearest, found, metric, n_test)
    if processes.main:
        if results_path.is_file():  # of another question
            results_path.rename(kept := folder / f'results_{weights_checksum(results_path):08x}.json')
            log.write(f'the results that were there are {kept} now')
        save_json(results_path, {
            'summary': summary, 'metric': metric, 'knn': {'top1': nearest[0], 'top5': nearest[1]},
            'linear': found[0], 'probes': found, 'train_images': n_train, 'test_images': n_test, 'classes': classes,
            'mean': list(info['mean']), 'std': list(info['std']), 'image_size': size,
            'config': identity})
        for path in (checkpoint, *(folder.glob('*_features.pt') if not config['keep_features'] else ())):
            path.unlink(missing_ok=True)
    log.write(f'{summary} -> {results_path}', knn=nearest, linear=found,
              seconds=round(time.perf_counter() - begin, 1))
    log.close()


def in_words(config, nearest, found, metric, n_test):
    per_class = f"mean per class {found[0]['mean_per_class']:.2f}  " * (metric == 'mean_per_class')
    others = ', '.join(f"{probe['lr']}: {probe[metric]:.2f}" for probe in found[1:])
    return (f"{config['checkpoint']}: kNN top-1 {nearest[0]:.2f}  top-5 {nearest[1]:.2f} | linear {per_class}top-1 "
            f"{found[0]['top1']:.2f}  top-5 {found[0]['top5']:.2f} ({n_test} test images)"
            + f" | other than the protocol's lr {config['linear']['lr']}: {others}" * bool(others))


if __name__ == '__main__':
    run(main, DEFAULTS)
