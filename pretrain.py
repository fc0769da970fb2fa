"""Stage 3: self-supervised pretraining on pairs of an image and its synthetic view (GenView section 3).

    python pretrain.py yamls/pretrain/cifar10_mocov2_genview.yaml
    torchrun --nproc-per-node 8 pretrain.py yamls/pretrain/in1k_mocov2_genview.yaml seed=1

Reads a paired beton of gen_views.py and, for the quality-driven loss, the principal component that fg_proportion.py
wrote with the quality encoder. The baseline is the same command with data.alpha=0 quality.enabled=false (on ImageNet
normalization=imagenet too). The methods stand in models.py, their losses in loss.py.

Writes into `output`: config.yaml, versions.json, log.jsonl, checkpoint.pt, backbone_init.pt (untrained), backbone.pt
(plain torchvision or timm names, for linear_eval.py) and loss.png.

The same command again resumes; SIGTERM and SIGUSR1 save and leave. torchrun hands signals on to its processes only if
told so, and kills them after 30 s: `torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
--shutdown-timeout 120 ...` is what a Slurm job needs. On a CPU a resumed run is bit-exact, on a GPU as far
as its kernels are. The result does not depend on the number of processes, but for rounding: batch size, batch norm,
negatives, queues, codes and quality weights are those of the global batch. So a run may be resumed with another number
of processes: data, schedules, queues and prototypes go on exactly, sums are added up in another order from then on.

A step of several micro-batches (accumulate) equals one of a large batch for losses that look at one pair, SimSiam's and
BYOL's, but for batch norm and quality weights, which are those of the micro-batch. MoCo v2 comes close: later
micro-batches already find the keys of earlier ones in the queue. The negatives of MoCo v3, SimCLR and NNCLR, the codes
of SwAV and the statistics of VICReg are those of the micro-batch: there it is another, smaller-batch method.
"""
import math
import os
import time
from contextlib import closing, nullcontext
from itertools import count, islice

from config import Fail, check_values, few, run_folder
from start import run, say

DEFAULTS = """
output: !text null      # run folder, e.g. runs/cifar10/pretrain
seed: 0                 # of initialisation, data order, augmentations and shuffling
device: auto            # auto | cpu | cuda
precision: auto         # auto | fp32 (GPU: products in TF32) | bf16 | fp16 (GPU, with loss scaling; a loss that is not
                        # finite ends the run here too); auto: bf16 where the hardware has it
compile: false          # torch.compile of the backbone: the first steps take minutes, the others less

data:
  beton: !texts null    # paired beton of gen_views.py, or a list: together one training set (GenView Table 4)
  alpha: 1.0            # probability that one view of a pair comes from the synthetic image (GenView Table 8)
  swap: random          # which one: random (per sample and epoch, as the official code) | first (query) | second (key)
  num_workers: 8        # threads per process that decode and augment
  online:               # instead of a beton: a GAN makes the pairs on the training device (hierarchical-latent 4.1)
    images_per_epoch: 0 # > 0: online, with this many anchors an epoch, never the same twice; ImageNet has 1281167
    kind: biggan        # this and what follows: see gen_views.py
    model: ''
    truncation: 2.0
    psi: 1.0
    crop: !int null
    size: !int null     # pixels: side of the generated images, resized to that; null: as the network makes them
    discriminator: ''
    chunks: !each {std: 0.0, truncation: 2.0, walker: ''}

image_size: 224         # pixels, side of a view
normalization: !texts null  # null = clip (as the official code) | imagenet | cifar10 |
                        # [[r, g, b], [r, g, b]] (mean, std)
view_1:                 # augmentation of the query; MoCo v2's and SimSiam's recipe
  crop_scale: [0.2, 1.0]        # share of the image's area; [0, 0]: no random crop, but
  resize: !int null             # the shorter side resized to this (null: image_size), the centre cut out
  flip: 0.5                     # probability
  jitter: [0.4, 0.4, 0.4, 0.1]  # brightness, contrast, saturation, hue
  jitter_prob: 0.8
  gray_prob: 0.2
  blur_prob: 0.5
  blur_sigma: [0.1, 2.0]        # pixels
  blur_kernel: !int null        # pixels, odd; null: a tenth of the view, or 6 sigma where that is more (PIL's blur)
  solarize_prob: 0.0
  randaugment: 0                # operations of timm's RandAugment, after the blur and before the grey (InfoMin: 2)
  randaugment_magnitude: [10, 0.5]  # mean and standard deviation, of 10
view_2:                 # augmentation of the key
  crop_scale: [0.2, 1.0]
  resize: !int null
  flip: 0.5
  jitter: [0.4, 0.4, 0.4, 0.1]
  jitter_prob: 0.8
  gray_prob: 0.2
  blur_prob: 0.5
  blur_sigma: [0.1, 2.0]
  blur_kernel: !int null
  solarize_prob: 0.0
  randaugment: 0
  randaugment_magnitude: [10, 0.5]
view_generated:         # takes the place of these keys of view_1 and view_2 where that is cut from a synthetic image;
                        # null: it does not
  gray_prob: !float null
  blur_prob: !float null
small_crops:            # multi-crop, SwAV alone; the other augmentations are those of view_1 and view_2 in turn
  count: 0              # 6 as published
  size: 96              # pixels
  crop_scale: [0.05, 0.14]

method: mocov2          # mocov2 | mocov3 | byol | simsiam | swav | simclr | supcon | vicreg | nnclr
backbone:
  arch: resnet50        # resnet18 | resnet34 | resnet50 | resnet101 | vit_small (12 heads) | vit_base
  stem: imagenet        # ResNet: imagenet (7x7 stride 2, max-pool) | cifar (3x3 stride 1, no max-pool)
  width: 64             # ResNet: channels of the first stage; 64 is the published network, 32 a quarter of its cost
  zero_init_residual: !bool null # ResNet: last norm of each block starts at 0; null: as the method's official code
  patch_size: 16        # ViT: pixels

# Of the blocks that follow, the one of the method counts; the others are not looked at. dim: of the projection,
# hidden: width of the hidden layers. A momentum goes from `momentum` to `momentum_end` on a cosine.
moco:                   # MoCo v2
  dim: 128
  queue: 65536          # keys; a multiple of batch_size (twice that if symmetric)
  momentum: 0.999       # of the momentum encoder, constant
  temperature: 0.2
  bn_splits: 8          # batch norm groups of the global batch, spread over the processes (official: one per GPU, 8)
  symmetric: false      # add the loss with the views exchanged
  negative_mixing: 0.0  # a of Beta(a, a), of which a step draws how to mix each negative with another one; 1.6 as
                        # published (negative feature transformation); 0: off
mocov3:
  dim: 256
  hidden: 4096
  momentum: 0.99        # 0.996 for 1000 epochs
  momentum_end: 1.0
  temperature: 1.0      # ViT: 0.2
byol:
  dim: 256
  hidden: 4096          # of projector and predictor
  momentum: 0.99        # 0.996 for 1000 epochs
  momentum_end: 1.0
  fix_predictor_lr: false   # keep the predictor's learning rate at optimizer.lr
simsiam:
  dim: 2048
  hidden: 512           # of the predictor; the projector's is the width of the backbone's features
  fix_predictor_lr: true
swav:
  dim: 128
  hidden: 2048
  prototypes: 3000
  temperature: 0.1
  epsilon: 0.05         # of Sinkhorn-Knopp
  iterations: 3         # of Sinkhorn-Knopp
  queue: 3840           # projections of earlier samples that take part in it, a multiple of batch_size; 0: none
  queue_from_epoch: 15  # epochs without it, counted from 0; it is used as soon as it is full
  freeze_prototypes: 5005   # steps before they learn (batch 4096: 313, and queue: 0)
simclr:
  dim: 128
  layers: 2             # of the projector (SimCLR v2: 3); hidden ones are as wide as the backbone's features
  norm: true            # batch norm in the projector; COP-Gen's has none
  temperature: 0.1
  loss_factor: !float null  # of the mean loss; null: 2 (both directions summed, as SimCLR's code); COP-Gen's: 1.4286
  negative_mixing: 0.0  # as in moco
supcon:                 # positives are all images of the label that the beton gives
  dim: 128
  layers: 2
  norm: false
  temperature: 0.1
vicreg:
  dim: 8192
  hidden: 8192
  invariance: 25.0      # weights of the three terms
  variance: 25.0
  covariance: 1.0
nnclr:
  dim: 256
  hidden: 4096          # of the predictor; the projector's is the width of the backbone's features
  queue: 98304          # projections among which neighbours are looked up, a multiple of batch_size
  temperature: 0.1

quality:                # quality-driven contrastive loss (GenView section 3.4)
  enabled: false
  clip:                 # frozen encoder
    model: convnext_base_w
    pretrained: !text null # hub tag or local weights file; null for a folder or 'hf-hub:...'
    image_size: !int null # pixels; null: the encoder's own. Views of another size are interpolated
  pc: !text null        # fg_proportion.npz made with the same encoder, or a .npy of shape (K,) or (K, 1)
  temperature: 1.0      # of the softmax over the pairs (eq. 13: 1)

optimizer:
  name: sgd             # sgd | lars (trust coefficient 0.001) | adamw
  lr: 0.03              # for batch_size as it is, not scaled; linear warm-up from 0, then cosine to final_lr per step
  final_lr: 0.0
  warmup_epochs: 0
  per_epoch: false      # the cosine moves once an epoch: epoch 1, 2, ... of E has its value at 1/E, 2/E, ...
  momentum: 0.9         # sgd and lars; adamw has betas 0.9 and 0.999
  weight_decay: 0.0001
  exclude_1d: !bool null # norm scales and biases without weight decay and LARS adaptation; null: as the official codes,
                        # true for lars but with SwAV, false for sgd and adamw
  clip_grad: !float null # largest norm of the gradient; null: as it is
epochs: 200
batch_size: 256         # of a step: all processes and micro-batches together
accumulate: 1           # micro-batches of a step, one after the other

knn:                    # monitor: weighted kNN on the backbone's features, without influence on the run
  every: 0              # epochs; 0: never
  train_beton: !text null # labelled images; of a beton only `image` is used
  test_beton: !text null
  k: 200
  temperature: 0.07
log_every: 50           # steps
save_every_epochs: 1
save_every_steps: !int null # additionally within an epoch
requeue: false          # on SIGUSR1 (#SBATCH --signal=USR1@120) save, then `scontrol requeue` the Slurm job; torchrun
                        # must be told to hand the signal on, see above
tensorboard: true
"""

# May differ when a run is resumed; everything else shapes the result.
BOOKKEEPING = ('output', 'device', 'compile', 'data.num_workers', 'knn', 'log_every', 'save_every_epochs',
               'save_every_steps', 'requeue', 'tensorboard')
BLOCKS = {'mocov2': 'moco', **{name: name for name in (  # a method of models.METHODS: its block in the config
    'mocov3', 'byol', 'simsiam', 'swav', 'simclr', 'supcon', 'vicreg', 'nnclr')}}
EVER = 10 ** 9
ALLOWED = {
    'output': 'folder', 'beton': 'file', 'images_per_epoch': (0, 10 ** 10), 'kind': ['biggan', 'stylegan2'],
    'truncation': (0.0, 100.0), 'psi': (0.0, 1.0), 'crop': (1, 8192), 'std': (0.0, 100.0),
    'method': list(BLOCKS), 'alpha': (0.0, 1.0), 'view_generated.gray_prob': (0.0, 1.0),
    'view_generated.blur_prob': (0.0, 1.0), 'blur_kernel': (1, 1023),
    'swap': ['random', 'first', 'second'], 'seed': (0, 10 ** 12), 'num_workers': (1, 1024), 'image_size': (8, 1024),
    'size': (8, 1024), 'count': (0, 100),
    'arch': ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'vit_small', 'vit_base'], 'stem': ['imagenet', 'cifar'],
    'width': (8, 1024), 'patch_size': (1, 1024),
    'dim': (1, 32768), 'hidden': (1, 32768), 'layers': (1, 10), 'prototypes': (1, 10 ** 6), 'iterations': (1, 1000),
    'moco.queue': (1, 10 ** 7), 'nnclr.queue': (1, 10 ** 7), 'queue': (0, 10 ** 7),
    'queue_from_epoch': (0, EVER), 'freeze_prototypes': (0, EVER),
    'bn_splits': (1, 4096), 'momentum': (0.0, 0.999999), 'momentum_end': (0.0, 1.0),
    'temperature': (0.001, 100.0), 'negative_mixing': (0.0, 100.0), 'loss_factor': (1e-6, 1e6),
    'epsilon': (0.001, 100.0), 'invariance': (0.0, 1e6), 'variance': (0.0, 1e6), 'covariance': (0.0, 1e6),
    'optimizer.name': ['sgd', 'lars', 'adamw'], 'lr': (1e-30, 1000.0), 'final_lr': (0.0, 1000.0),
    'optimizer.momentum': (0.0, 0.9999),
    'weight_decay': (0.0, 0.999), 'clip_grad': (1e-12, 1e12), 'epochs': (1, 10 ** 6), 'batch_size': (1, 10 ** 6),
    'accumulate': (1, 10 ** 6), 'every': (0, EVER), 'k': (1, 10 ** 7), 'knn.temperature': (0.02, 100.0),
    'log_every': (1, EVER), 'save_every_epochs': (1, EVER), 'save_every_steps': (1, EVER)}


def check(config, world=1):
    """What can be wrong in the config beyond names and types, before anything is written."""
    method, optimizer = config['method'], config['optimizer']
    block = BLOCKS.get(method)
    allowed = dict(ALLOWED)
    if config['knn']['every']:
        allowed |= {'train_beton': 'file', 'test_beton': 'file'}
    online = config['data']['online']
    if online['images_per_epoch']:
        allowed |= {'beton': None, 'data.online.model': 'file'}
    check_values({k: v for k, v in config.items() if k == block or k not in BLOCKS.values()}, allowed)
    if online['images_per_epoch'] and config['data']['beton']:
        raise Fail('data.online.images_per_epoch: makes the pairs, data.beton holds them; set one of the two')
    if online['images_per_epoch'] and any(v is not None for v in config['view_generated'].values()):
        raise Fail('view_generated: pairs made while training are generated altogether; set view_1 and view_2 alone')
    if 0 < online['images_per_epoch'] < config['batch_size']:
        raise Fail(f"data.online.images_per_epoch: {online['images_per_epoch']} is less than batch_size "
                   f"{config['batch_size']}")
    settings, batch, accumulate = config[block], config['batch_size'], config['accumulate']
    if not 0 <= optimizer['warmup_epochs'] <= config['epochs']:
        raise Fail(f"optimizer.warmup_epochs: {optimizer['warmup_epochs']} must be in [0, epochs = {config['epochs']}]")
    if config['small_crops']['count'] and method != 'swav':
        raise Fail(f'small_crops.count: {method} takes a pair of views; set it to 0, or method=swav')
    parts = f' x {accumulate} micro-batches' * (accumulate > 1)
    if batch % (world * accumulate):
        raise Fail(f'batch_size: {batch} (of all processes) is not a multiple of the {world} processes{parts}')
    if method != 'mocov2' and batch // accumulate < 2:
        raise Fail(f'batch_size: {method} needs two samples at a time for its batch norm')
    keys = batch * (2 if settings.get('symmetric') else 1)
    if settings.get('queue', 0) % keys:
        raise Fail(f"{block}.queue: {settings['queue']} is not a multiple of the {keys} keys of a step; "
                   f"{max(1, round(settings['queue'] / keys)) * keys} is")
    if method == 'mocov2' and (settings['bn_splits'] % world or batch // accumulate % settings['bn_splits']):
        raise Fail(f"moco.bn_splits: {settings['bn_splits']} must be a multiple of the {world} processes (published "
                   f'are 8 groups: start 1, 2, 4 or 8 processes) and divide batch_size {batch}'
                   + f' / accumulate {accumulate}' * (accumulate > 1))
    small, patch = config['small_crops'], config['backbone']['patch_size']
    if small['count'] and config['backbone']['arch'].startswith('vit') and small['size'] % patch:
        raise Fail(f"small_crops.size: {small['size']} is not a multiple of backbone.patch_size {patch}")
    from augment import recipe_row
    for k, recipe in enumerate(recipes_of(config)):
        recipe_row(recipe, f'views[{k}]')


def recipes_of(config):
    """Of each view of a sample, the small crops last: what PairLoader takes."""
    small = config['small_crops']
    recipes = [{'size': config['image_size'], **config[view]} for view in ('view_1', 'view_2')]
    return recipes + [{**recipes[k % 2], 'size': small['size'], 'crop_scale': small['crop_scale']}
                      for k in range(small['count'])]


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints import NORMALIZATIONS, normalization, save_backbone
from common import Log, Processes, StopSignal, earlier, precision_dtype, random_states, restore
from files import checksums, load_json, save_checkpoint
from data import PACK, PairLoader, check_size
from features import Monitor
from frozen_clip import Quality, clip_files
from models import (METHODS, average_running_statistics, cosine, describe, distributed, global_mean,
                    synchronize_batch_norm)
from pictures import curves


# ---------------------------------------------------------------------------------------------------
# Set-up

def betons(config):
    found = config['data']['beton'] or []
    return [found] if isinstance(found, str) else found


def open_pairs(config, processes):
    """The loader of this process's part of each micro-batch."""
    data, recipes = config['data'], recipes_of(config)
    share = dict(batch_size=config['batch_size'] // (processes.world * config['accumulate']), seed=config['seed'],
                 rank=processes.rank, world=processes.world)
    if data['online']['images_per_epoch']:
        from online import OnlinePairs
        if METHODS[config['method']].labelled:
            raise Fail(f"method: {config['method']} needs labels, and pairs made while training have none")
        return OnlinePairs(data['online'], recipes, data['alpha'], data['swap'], size=data['online']['size'],
                           device=processes.device,
                           steps_per_epoch=data['online']['images_per_epoch'] // config['batch_size']
                           * config['accumulate'], **share)
    there = filter(os.path.exists, betons(config))
    stamps = [(s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev) for s in map(os.stat, there)]
    own = stamps != processes.of_first(stamps)  # a copy on this node's disk: nobody else checks its bytes
    loader = PairLoader(data['beton'], recipes, data['alpha'], data['swap'], num_workers=data['num_workers'],
                        pin_memory=processes.device.type == 'cuda',
                        verify=processes.main or own and processes.local_rank == 0,
                        generated={k: v for k, v in config['view_generated'].items() if v is not None}, **share)
    if len(loader) < config['accumulate']:
        raise Fail(f"batch_size: {config['batch_size']} is more than the {loader.sidecar['samples']} images of "
                   f"{data['beton']}")
    if METHODS[config['method']].labelled and loader.metadata['f2'].min() < 0:
        raise Fail(f"method: {config['method']} needs labels, and images of {data['beton']} have none (-1)")
    if METHODS[config['method']].labelled and any(names != loader.classes[0] for names in loader.classes):
        raise Fail(f"method: {config['method']} takes images of one number for one class, and the betons of data.beton "
                   f"name other classes: {'; '.join(few(names or ['none']) for names in loader.classes)}")
    return loader


def micro_batches(loader, step, steps_per_epoch, accumulate):
    """Micro-batches from a step on, epoch after epoch without end."""
    first = step % steps_per_epoch * accumulate
    for epoch in count(step // steps_per_epoch):
        with closing(loader.epoch(epoch, first)) as batches:
            yield from islice(batches, steps_per_epoch * accumulate - first)
        first = 0


def build_model(config, steps_per_epoch):
    """The method with its backbone, initialised, on the current default device."""
    mean, std = normalization(config['normalization'], NORMALIZATIONS['clip'])
    return METHODS[config['method']](
        {**config['backbone'], 'image_size': config['image_size']}, **config[BLOCKS[config['method']]], mean=mean,
        std=std, seed=config['seed'], total_steps=config['epochs'] * steps_per_epoch, steps_per_epoch=steps_per_epoch)


def lars(groups, momentum, **settings):
    """timm's, which adapts a group without weight decay only if told so. It divides by |g| + wd |w| (apex, mmselfsup;
    MoCo v3, BYOL, VICReg and SimCLR: |g + wd w|, the same but for large decays) and multiplies with the learning rate
    after the momentum (as MoCo v3, BYOL and VICReg; SimCLR and mmselfsup: before, which differs while it changes)."""
    from timm.optim import Lars  # timm takes as long to import as torch
    for group in groups:
        group['always_adapt'] = not group['exclude']
    return Lars(groups, momentum=momentum, trust_coeff=0.001, **settings)


def sgd(groups, **settings):
    """torch's in one kernel, which reads no number back from the GPU for fp16 either. It takes the momenta of all
    parameters or of none: those that learn later (SwAV's prototypes) start at 0 like the others."""
    optimizer = torch.optim.SGD(groups, fused=True, **settings)
    for parameter in (p for group in groups for p in group['params']):
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS = {'sgd': sgd, 'lars': lars,
              'adamw': lambda groups, momentum, **settings: torch.optim.AdamW(groups, **settings, fused=True)}


def build_optimizer(model, config):
    """Groups of parameters: with weight decay or without, with the schedule's learning rate or a fixed one."""
    settings, groups = config['optimizer'], {}
    exclude_1d = settings['exclude_1d']
    if exclude_1d is None:
        exclude_1d = settings['name'] == 'lars' and config['method'] != 'swav'  # SwAV's apex LARC takes all
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = exclude_1d and parameter.ndim <= 1, model.fix_predictor_lr and name.startswith('predictor.')
            groups.setdefault(key, []).append(parameter)
    groups = [{'params': parameters, 'exclude': exclude, 'fixed_lr': fixed,
               'weight_decay': 0.0 if exclude else settings['weight_decay']}
              for (exclude, fixed), parameters in groups.items()]
    return OPTIMIZERS[settings['name']](groups, lr=0.0, momentum=settings['momentum'])


def learning_rate(step, steps_per_epoch, epochs, optimizer):
    """Linear warm-up from 0 (SwAV at batch 4096: from 0.3), then cosine to final_lr: a pure function of the step, so
    that resuming needs no scheduler's state. So are the momenta of the methods; the weight decay is constant. The
    official codes of MoCo v2 and SimSiam change the learning rate once an epoch, the others every step. per_epoch: once
    an epoch, counted from 1, as SupContrast and COP-Gen do: epoch e of E has lr (1 + cos(pi e / E)) / 2."""
    warmup, total = optimizer['warmup_epochs'] * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return optimizer['lr'] * step / warmup
    if optimizer['per_epoch']:
        step = (step // steps_per_epoch + 1) * steps_per_epoch
    return cosine(optimizer['lr'], optimizer['final_lr'], step - warmup, max(1, total - warmup))


# ---------------------------------------------------------------------------------------------------
# While training

def train_step(batches, wrapped, optimizer, scaler, quality, step, look, config, dtype):
    """One step on the next micro-batches of the iterator `batches`. wrapped: of models.distributed; quality: or None.
    Returns the loss () on the device, figures, weights and qualities (B,) of the last micro-batch, and the seconds
    that data were waited for. Nothing in it waits for the GPU."""
    model, accumulate = getattr(wrapped, 'module', wrapped), config['accumulate']
    device, waited, total = model.mean.device, 0.0, 0.0
    model.before_step(step)
    optimizer.zero_grad()
    for micro_batch in range(accumulate):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        views = [view.to(device, non_blocking=True) for view in batch['views']]
        labels = (batch['label'].to(device),) if model.labelled else ()
        last = micro_batch + 1 == accumulate
        with nullcontext() if last or wrapped is model else wrapped.no_sync():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                weights, qualities = quality(*views[:2]) if quality else (1.0, None)
                loss, extra, figures = wrapped(views, step, look, *labels)
            loss = ((loss * weights).mean() + extra) / accumulate
            scaler.scale(loss).backward()
        total = total + loss.detach()
    for parameter in model.frozen(step):
        parameter.grad = None
    if config['optimizer']['clip_grad']:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config['optimizer']['clip_grad'])
    scaler.step(optimizer)
    scaler.update()
    model.after_step(step)
    return total, figures, weights, qualities, waited


def stop_if_not_finite(losses, parameters, step, last_saved, checkpoint):
    """Raises Fail, on all processes, where one has a loss (those of the steps up to `step`) or a parameter that is not
    finite."""
    finite = torch.stack(losses).isfinite().tolist() if losses else []
    bad = step - len(losses) + 1 + finite.index(False) if False in finite else math.inf
    if parameters and not torch.stack(torch._foreach_norm(parameters)).isfinite().all():
        bad = min(bad, step)  # the update of the last step did it: its own loss was still finite
    if dist.is_initialized():
        first = torch.tensor(float(bad))
        dist.all_reduce(first, dist.ReduceOp.MIN)
        bad = first.item()
    if bad < math.inf:
        good = f'the last good checkpoint is {checkpoint} (step {last_saved})' if last_saved is not None else \
            'there is no checkpoint yet'
        raise Fail(f'step {int(bad)}: the loss or the weights are not finite; {good}. Lower optimizer.lr, raise '
                   'optimizer.warmup_epochs or set precision=fp32')


def contents(config):
    """Checksums of the files that decide this training beside its config, {key: numbers}; None of what is gone."""
    online, quality = config['data']['online'], config['quality']
    sides = [f'{path}.json' for path in betons(config)]
    files, found = {}, {
        'data.beton': [load_json(side, PACK).get('crc32') if os.path.exists(side) else None for side in sides]}
    if online['images_per_epoch']:
        files['data.online'] = [online['model'], online['discriminator'],
                                *(move['walker'] for move in online['chunks'].values())]
    if quality['enabled']:
        files |= {'quality.pc': [quality['pc']], 'quality.clip': clip_files(quality['clip'])}
    return found | {key: [checksums(path).get(path) for path in paths] for key, paths in files.items()}


def save(checkpoint, model, optimizer, scaler, step, steps_per_epoch, config, made_of, processes):
    average_running_statistics(model)
    states = [random_states()]
    if dist.is_initialized():
        states = [None] * processes.world
        dist.all_gather_object(states, random_states())
    if processes.main:
        epoch, batch = divmod(step, steps_per_epoch)
        save_checkpoint(checkpoint, {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
            'epoch': epoch, 'batch': batch, 'step': step, 'random': states, 'config': config, 'contents': made_of,
            'dtype': str(precision_dtype(config['precision'], processes.device))})
    processes.barrier()  # nobody goes on, or leaves, before it is written


def due(epoch, batch, config):
    """Whether a checkpoint is, `batch` steps into an epoch (0: an epoch has just ended)."""
    every = config['save_every_steps']
    if batch:
        return every is not None and batch % every == 0
    return epoch % config['save_every_epochs'] == 0 or epoch == config['epochs']


def look_at_neighbours(monitor, model, step, steps_per_epoch, config, log):
    """Log the kNN accuracy where an epoch has ended after which it is asked for."""
    epoch, batch = divmod(step, steps_per_epoch)
    if epoch and not batch and (epoch % config['knn']['every'] == 0 or epoch == config['epochs']):
        average_running_statistics(model)
        accuracy = monitor.accuracy(model.backbone)
        log.write(f'epoch {epoch}: kNN accuracy {accuracy:.2%}', step=step, knn_accuracy=round(accuracy, 5))


def health(losses, figures, weights, qualities, config):
    """Figures for the log that show whether the run is well."""
    line = {'loss': global_mean(torch.stack(losses).mean()), **{k: global_mean(v) for k, v in figures.items()}}
    line['feature_std_ratio'] = line['feature_std'] * config[BLOCKS[config['method']]]['dim'] ** 0.5  # 0: collapsed
    for name, values in (('quality', qualities), ('weight', weights)) if qualities is not None else ():
        line |= {f'{name}_mean': values.mean().item(), f'{name}_min': values.min().item(),
                 f'{name}_max': values.max().item()}
    return line


def collapsed(line):
    """What is wrong with the features, or ''."""
    if min(line['feature_std_ratio'], line.get('assignment_entropy', 1)) < 0.05:
        return 'the features of all images are nearly the same'
    if 'batch_top1' in line and line['contrastive_top1'] > 0.25 > 10 * line['batch_top1']:
        return 'keys are told from those of the queue by their age, hardly by their image'
    return ''


def in_words(line):
    shown = [f'{label} {line[key]:.{digits}f}' for label, key, digits in (
        ('loss', 'loss', 4), ('top-1', 'contrastive_top1', 3), ('entropy', 'assignment_entropy', 2),
        ('std', 'feature_std_ratio', 2)) if key in line]
    return (f"{'  '.join(shown)}{' COLLAPSED' * bool(collapsed(line))}  lr {line['lr']:.4g}  "
            f"{line['images_per_second']:.0f} images/s")


def introduce(log, model, loader, config, processes, dtype, steps_per_epoch, step):
    """What the log says before the first step."""
    images, queue = loader.sidecar['samples'], config['moco']['queue']
    if config['method'] == 'mocov2' and queue > images:
        log.write(f"moco.queue: {queue} keys of {images} images: many negatives are views of the query's own image; a "
                  'quarter of the images is a usual size')
    if config['accumulate'] > 1 and config['method'] not in ('mocov2', 'simsiam', 'byol'):
        log.write(f"accumulate: negatives, codes or statistics of {config['method']} are those of "
                  f"{config['batch_size'] // config['accumulate']} samples, as in so small a batch; more processes or "
                  'half precision keep batch_size as it is named')
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.write(f"{config['method']} {describe(config['backbone'])[1]}, {trained / 1e6:.2f} M trained parameters; "
              f"{images} images, {loader.sidecar['with_view']} with a synthetic view; global batch "
              f"{config['batch_size']} on {processes.world} process{'es' * (processes.world > 1)} "
              f"({processes.device.type}, {str(dtype).split('.')[1]}); {steps_per_epoch} steps an epoch, "
              f"{config['epochs'] * steps_per_epoch} in all" + f'; resumed at step {step}' * bool(step))


def main(config):
    processes = Processes(config['device'])
    device, world = processes.device, processes.world
    check(config, world)
    mean, std = normalization(config['normalization'], NORMALIZATIONS['clip'])
    dtype = precision_dtype(config['precision'], device)
    settings, epochs, accumulate = (config[key] for key in ('optimizer', 'epochs', 'accumulate'))
    folder = run_folder(config['output'])
    checkpoint, finished = folder / 'checkpoint.pt', folder / 'backbone.pt'
    made_of = contents(config)
    processes.agree(made_of, 'data, quality')
    # what lies there is compared: it may lie elsewhere now
    moved = [key for key in ('data.beton', 'quality.pc') if made_of.get(key) and None not in made_of[key]]
    saved = earlier(checkpoint, config, (*BOOKKEEPING, *moved, *{*BLOCKS.values()} - {BLOCKS[config['method']]}),
                    needs=('model', 'optimizer', 'scaler', 'epoch', 'step', 'random', 'contents'))
    before = saved['contents'] if saved else {}
    other = [key for key, found in made_of.items() if key in before and (
        len(before[key]) != len(found) or any(new not in (None, old) for old, new in zip(before[key], found)))]
    if other:
        raise Fail(f"{checkpoint} was made with another content of {', '.join(other)}; set another output=")
    if saved and saved['epoch'] == epochs and finished.is_file():
        if processes.main:
            say(f'{folder}: finished ({epochs} epochs): {finished}')
        return
    if saved and saved.get('dtype', str(dtype)) != str(dtype):
        raise Fail(f"{checkpoint}: was trained in {saved['dtype'][6:]}, this device would go on in {str(dtype)[6:]}; "
                   'go on where it began, or set another output=')

    torch.manual_seed(config['seed'])  # the same on all processes: they build the same model
    torch.set_float32_matmul_precision('high')  # TF32 where the GPU has it
    torch.backends.cudnn.benchmark = True
    loader = open_pairs(config, processes)
    steps_per_epoch = len(loader) // accumulate
    last_step = epochs * steps_per_epoch
    small = config['small_crops']
    enlarged = check_size(loader, {'image_size': config['image_size'],
                                   'small_crops.size': small['count'] and small['size']})
    monitor = Monitor(config, (mean, std), dtype, processes) if config['knn']['every'] else None
    model = build_model(config, steps_per_epoch).to(device, memory_format=torch.channels_last)
    model = synchronize_batch_norm(model, device) if model.sync_bn else model
    quality = Quality(config['quality'], device) if config['quality']['enabled'] else None
    trained, optimizer = [p for p in model.parameters() if p.requires_grad], build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = restore(saved, model, optimizer, scaler, processes) if saved else 0
    for name, module in model.named_children():
        if config['compile'] and name.endswith('backbone'):
            module.compile()  # in place: names in the checkpoint stay
    wrapped = distributed(model, device)

    stop, log = StopSignal(), Log(folder, config, processes.main, config['tensorboard'])
    if processes.main and not saved:
        save_backbone(folder / 'backbone_init.pt', model.backbone, config, mean, std)
    log.write(enlarged)
    introduce(log, model, loader, config, processes, dtype, steps_per_epoch, step)
    said = (folder / 'log.jsonl').read_text(errors='replace') if processes.main else ''
    if monitor and saved and processes.any(processes.main and f'"step": {step}, "knn_accuracy"' not in said):
        look_at_neighbours(monitor, model, step, steps_per_epoch, config, log)  # it ended between saving and this
    losses, waited, since, last_saved, leave = [], 0.0, time.perf_counter(), step if saved else None, False
    wrong = ''

    bar = tqdm(total=last_step, initial=step, unit='step', dynamic_ncols=True, disable=None if processes.main else True)
    with closing(micro_batches(loader, step, steps_per_epoch, accumulate)) as batches:
        while step < last_step and not leave:
            look = (step + 1) % config['log_every'] == 0 or step + 1 == last_step
            rate = learning_rate(step, steps_per_epoch, epochs, settings)
            for group in optimizer.param_groups:
                group['lr'] = settings['lr'] if group['fixed_lr'] else rate
            loss, figures, weights, qualities, seconds = train_step(batches, wrapped, optimizer, scaler, quality, step,
                                                                    look, config, dtype)
            losses.append(loss)  # on the device: reading one would wait for the GPU
            waited += seconds
            step += 1
            bar.update()

            if look:
                stop_if_not_finite(losses, [], step, last_saved, checkpoint)
                seconds = time.perf_counter() - since
                line = {'step': step, 'epoch': round(step / steps_per_epoch, 4), 'lr': rate,
                        'images_per_second': round(len(losses) * config['batch_size'] / seconds, 1),
                        'data_wait': round(waited / seconds, 4),
                        **health(losses, figures, weights, qualities, config)}
                bar.set_postfix_str(in_words(line))
                log.write(f"epoch {line['epoch']:.2f}/{epochs}  step {step}/{last_step}  {in_words(line)}  data wait "
                          f"{line['data_wait']:.0%}" if bar.disable else None, **line)
                losses, waited, since, wrong = [], 0.0, time.perf_counter(), collapsed(line)
            leave, paused = processes.any(stop) and step < last_step, time.perf_counter()
            if leave or due(*divmod(step, steps_per_epoch), config):
                stop_if_not_finite(losses, trained, step, last_saved, checkpoint)
                save(checkpoint, model, optimizer, scaler, step, steps_per_epoch, config, made_of, processes)
                last_saved = step
            if monitor and not leave:
                look_at_neighbours(monitor, model, step, steps_per_epoch, config, log)
            since += time.perf_counter() - paused  # images/s are those of training
    bar.close()
    if leave:
        stop.leave(log, f'saved at step {step} of {last_step}; the same command resumes',
                   config['requeue'] and processes.any(stop.name == 'SIGUSR1'))  # SIGTERM may be scancel: not to undo
    if processes.main:
        save_backbone(finished, model.backbone, config, mean, std)
        curves(folder / 'loss.png', folder / 'log.jsonl', ['loss'],
               ['contrastive_top1', 'assignment_entropy', 'feature_std_ratio', 'knn_accuracy'])
        log.write(f"done: {finished}, {folder / 'loss.png'}")
        if wrong:
            log.write(f'WARNING: COLLAPSED: {wrong}. {finished} is worth no more than an untrained network. Try a '
                      'lower optimizer.lr, longer optimizer.warmup_epochs, a momentum nearer to 1, or data.alpha=0.5',
                      collapsed=wrong)
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
