"""Stage 3: self-supervised pretraining on pairs of an image and its synthetic view (GenView section 3).

    python pretrain.py yamls/pretrain/cifar10_mocov2_genview.yaml
    torchrun --nproc-per-node 8 pretrain.py yamls/pretrain/in1k_mocov2_genview.yaml seed=1

Reads a paired beton of gen_views.py and, for the quality-driven loss, the principal component that fg_proportion.py
wrote with the quality encoder. The baseline is the same command with data.alpha=0 quality.enabled=false. The methods
stand in models.py, their losses in loss.py.

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
micro-batches already find the keys of earlier ones in the queue. The negatives of MoCo v3 and SimCLR, the codes of SwAV
and the statistics of VICReg are those of the micro-batch: there it is another, smaller-batch method.
"""
import difflib
import json
import sys
import time
import warnings
from contextlib import closing, nullcontext
from copy import deepcopy
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import Lars
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (Fail, Log, Processes, StopSignal, changed_keys, load_checkpoint, precision_dtype,
                    random_states, run, save_checkpoint, seed_everything, set_random_states)
from data import CIFAR_MEAN, CIFAR_STD, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PairLoader
from models import (METHODS, VITS, Encoder, Quality, all_features, average_running_statistics, cosine, describe,
                    global_mean, knn_accuracy, synchronize_batch_norm)

DEFAULTS = """
output: null            # run folder, e.g. runs/cifar10/pretrain
seed: 0                 # of initialisation, data order, augmentations and shuffling
device: auto            # auto | cpu | cuda
precision: auto         # auto | fp32 (GPU: products in TF32) | bf16 | fp16 (GPU, with loss scaling; a loss that is not
                        # finite ends the run here too); auto: bf16 where the hardware has it
compile: false          # torch.compile of the backbone: the first steps take minutes, the others less

data:
  beton: null           # paired beton written by gen_views.py, or a list: together one training set (GenView Table 4)
  alpha: 1.0            # probability that one view of a pair comes from the synthetic image (GenView Table 8)
  swap: random          # which one: random (per sample and epoch, as the official code) | first (query) | second (key)
  num_workers: 8        # threads per process that decode and augment

image_size: 224         # pixels, side of a view
normalization: null     # null = clip (as the official code) | imagenet | cifar10 | [[r, g, b], [r, g, b]] (mean, std)
view_1:                 # augmentation of the query; MoCo v2's and SimSiam's recipe
  crop_scale: [0.2, 1.0]        # share of the image's area
  flip: 0.5                     # probability
  jitter: [0.4, 0.4, 0.4, 0.1]  # brightness, contrast, saturation, hue
  jitter_prob: 0.8
  gray_prob: 0.2
  blur_prob: 0.5
  blur_sigma: [0.1, 2.0]        # pixels
  solarize_prob: 0.0
view_2:                 # augmentation of the key
  crop_scale: [0.2, 1.0]
  flip: 0.5
  jitter: [0.4, 0.4, 0.4, 0.1]
  jitter_prob: 0.8
  gray_prob: 0.2
  blur_prob: 0.5
  blur_sigma: [0.1, 2.0]
  solarize_prob: 0.0
small_crops:            # multi-crop, SwAV alone; the other augmentations are those of view_1 and view_2 in turn
  count: 0              # 6 as published
  size: 96              # pixels
  crop_scale: [0.05, 0.14]

method: mocov2          # mocov2 | mocov3 | byol | simsiam | swav | simclr | vicreg
backbone:
  arch: resnet50        # resnet18 | resnet34 | resnet50 | resnet101 | vit_small (12 heads) | vit_base
  stem: imagenet        # ResNet: imagenet (7x7 stride 2, max-pool) | cifar (3x3 stride 1, no max-pool)
  width: 64             # ResNet: channels of the first stage; 64 is the published network, 32 a quarter of its cost
  zero_init_residual: null  # ResNet: last norm of each block starts at 0; null: as the method's official code
  patch_size: 16        # ViT: pixels

# Of the seven blocks that follow, the one of the method counts; the others are not looked at. dim: of the projection,
# hidden: width of the hidden layers. A momentum goes from `momentum` to `momentum_end` on a cosine.
moco:                   # MoCo v2
  dim: 128
  queue: 65536          # keys; a multiple of batch_size (twice that if symmetric)
  momentum: 0.999       # of the momentum encoder, constant
  temperature: 0.2
  bn_splits: 8          # batch norm groups of the global batch, spread over the processes (official: one per GPU, 8)
  symmetric: false      # add the loss with the views exchanged
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
vicreg:
  dim: 8192
  hidden: 8192
  invariance: 25.0      # weights of the three terms
  variance: 25.0
  covariance: 1.0

quality:                # quality-driven contrastive loss (GenView section 3.4)
  enabled: false
  clip:                 # frozen encoder
    model: convnext_base_w
    pretrained: null    # hub tag or local weights file; null for a folder or 'hf-hub:...'
    image_size: null    # pixels; null: the encoder's own. Views of another size are interpolated
  pc: null              # fg_proportion.npz made with the same encoder, or a .npy of shape (K,) or (K, 1)
  temperature: 1.0      # of the softmax over the pairs (eq. 13: 1)

optimizer:
  name: sgd             # sgd | lars (trust coefficient 0.001) | adamw
  lr: 0.03              # for batch_size as it is, not scaled; linear warm-up from 0, then cosine to final_lr per step
  final_lr: 0.0
  warmup_epochs: 0
  momentum: 0.9         # sgd and lars; adamw has betas 0.9 and 0.999
  weight_decay: 0.0001
  exclude_1d: null      # norm scales and biases without weight decay and LARS adaptation; null: as the official codes,
                        # true for lars but with SwAV, false for sgd and adamw
  clip_grad: null       # largest norm of the gradient; null: as it is
epochs: 200
batch_size: 256         # of a step: all processes and micro-batches together
accumulate: 1           # micro-batches of a step, one after the other

knn:                    # monitor: weighted kNN on the backbone's features, without influence on the run
  every: 0              # epochs; 0: never
  train_beton: null     # labelled images; of a beton only `image` is used
  test_beton: null
  k: 200
  temperature: 0.07
log_every: 50           # steps
save_every_epochs: 1
save_every_steps: null  # additionally within an epoch
requeue: false          # on SIGUSR1 (#SBATCH --signal=USR1@120) save, then `scontrol requeue` the Slurm job; torchrun
                        # must be told to hand the signal on, see above
tensorboard: true
"""

# May differ when a run is resumed; everything else shapes the result.
BOOKKEEPING = ('output', 'device', 'compile', 'data.num_workers', 'knn', 'log_every', 'save_every_epochs',
               'save_every_steps', 'requeue', 'tensorboard')
NORMALIZATIONS = {'clip': (CLIP_MEAN, CLIP_STD), 'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
                  'cifar10': (CIFAR_MEAN, CIFAR_STD)}
BLOCKS = {name: 'moco' if name == 'mocov2' else name for name in METHODS}  # a method's block in the config
# Smallest whole number by the last part of a key, or all of it.
LEAST = {'epochs': 1, 'batch_size': 1, 'accumulate': 1, 'seed': 0, 'image_size': 8, 'log_every': 1, 'size': 8,
         'count': 0, 'save_every_epochs': 1, 'save_every_steps': 1, 'every': 0, 'k': 1, 'dim': 1, 'hidden': 1,
         'layers': 1, 'prototypes': 1, 'iterations': 1, 'bn_splits': 1, 'queue': 0, 'moco.queue': 1,
         'queue_from_epoch': 0, 'freeze_prototypes': 0}


def flat(config, prefix=''):
    """Nested dict -> {'key.sub': value}."""
    parts = [flat(v, f'{prefix}{k}.') if isinstance(v, dict) else {f'{prefix}{k}': v} for k, v in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def check(config, world):
    """What can be wrong in the config beyond names and types, before anything is written."""
    method, data, knn, optimizer = (config[key] for key in ('method', 'data', 'knn', 'optimizer'))
    betons = data['beton'] if isinstance(data['beton'], list) and data['beton'] else [data['beton']]
    for key, value in (('output', config['output']), *(('data.beton', path) for path in betons),
                       *((f'knn.{key}', knn[key]) for key in ('train_beton', 'test_beton') if knn['every'])):
        if not isinstance(value, str):
            raise Fail(f'{key}: must name a {"folder" if key == "output" else "file"}, e.g. {key}=runs/...')
    for key, value, known in (('method', method, METHODS), ('optimizer.name', optimizer['name'], OPTIMIZERS)):
        if value not in known:
            near = difflib.get_close_matches(value, known, 1, 0.7)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise Fail(f"{key}: '{value}' is unknown; {hint}")
    block, unused = BLOCKS[method], set(BLOCKS.values()) - {BLOCKS[method]}
    settings, batch, accumulate = config[block], config['batch_size'], config['accumulate']
    for key, value in flat({k: v for k, v in config.items() if k not in unused}).items():
        last = key.rpartition('.')[2]
        least = LEAST.get(key, LEAST.get(last))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None:
            continue
        if least is not None and (type(value) is not int or value < least):
            raise Fail(f'{key}: {value} must be a whole number of at least {least}')
        if last in ('lr', 'clip_grad', 'temperature', 'epsilon') and not (number and value > 0):
            raise Fail(f'{key}: {value} must be above 0')
        if last in ('momentum', 'momentum_end') and not 0 <= value <= 1:
            raise Fail(f'{key}: {value} must be in [0, 1]')
        if last in ('weight_decay', 'final_lr', 'invariance', 'variance', 'covariance') and not value >= 0:
            raise Fail(f'{key}: {value} must not be below 0')
        if last in ('zero_init_residual', 'exclude_1d') and type(value) is not bool:
            raise Fail(f'{key}: {value} must be true, false or null')
    if not 0 <= optimizer['warmup_epochs'] <= config['epochs']:
        raise Fail(f"optimizer.warmup_epochs: {optimizer['warmup_epochs']} must be in [0, epochs = {config['epochs']}]")
    if config['small_crops']['count'] and method != 'swav':
        raise Fail(f'small_crops.count: {method} takes a pair of views; set it to 0, or method=swav')
    parts = f' x {accumulate} micro-batches' * (accumulate > 1)
    if batch % (world * accumulate):
        raise Fail(f'batch_size: {batch} (of all processes) is not a multiple of the {world} processes{parts}')
    if METHODS[method].sync_bn and batch // accumulate < 2:
        raise Fail(f'batch_size: {method} needs two samples at a time for its batch norm')
    keys = batch * (2 if settings.get('symmetric') else 1)
    if settings.get('queue', 0) % keys:
        raise Fail(f"{block}.queue: {settings['queue']} is not a multiple of the {keys} keys of a step; "
                   f"{max(1, round(settings['queue'] / keys)) * keys} is")
    if method == 'mocov2' and (settings['bn_splits'] % world or batch // accumulate % settings['bn_splits']):
        raise Fail(f"moco.bn_splits: {settings['bn_splits']} must be a multiple of the {world} processes (the nearest to "
                   f'what was published is {max(world, 8 // world * world)}) and divide batch_size {batch}'
                   + f' / accumulate {accumulate}' * (accumulate > 1))
    small, patch = config['small_crops'], config['backbone']['patch_size']
    if small['count'] and config['backbone']['arch'] in VITS and small['size'] % patch:
        raise Fail(f"small_crops.size: {small['size']} is not a multiple of backbone.patch_size {patch}")


def check_size(config, loader):
    """Views larger than the stored images only look like more: a text for the log (or None), Fail from twice on."""
    stored, small = loader.metadata['f0'], config['small_crops']
    side = int(np.median(np.minimum(stored['height'], stored['width'])))
    size, key = max((config['image_size'], 'image_size'), (small['size'] if small['count'] else 0, 'small_crops.size'))
    text = f'{key}: views of {size} px from stored images of {side} px (median of the shorter side)'
    if size > 2 * side:
        raise Fail(f'{text}: set {key}={side}, or write the beton from larger images')
    return f'{text} are enlarged' if size > side else None


def normalization(spec):
    """'clip', 'imagenet', 'cifar10', [mean, std] or null -> mean and std, tuples of 3 floats for values in [0, 1]."""
    try:
        mean, std = NORMALIZATIONS[spec or 'clip'] if spec is None or isinstance(spec, str) else spec
        mean, std = (tuple(float(v) for v in values) for values in (mean, std))
        if len(mean) == len(std) == 3 and min(std) > 0:
            return mean, std
    except (KeyError, TypeError, ValueError):
        pass
    raise Fail(f"normalization: {spec!r} is none of {', '.join(NORMALIZATIONS)}, "
               '[[r, g, b], [r, g, b]] (mean, std > 0)')


def build_model(config, steps_per_epoch):
    """The method with its backbone, initialised, on the current default device."""
    mean, std = normalization(config['normalization'])
    return METHODS[config['method']](
        {**config['backbone'], 'image_size': config['image_size']}, **config[BLOCKS[config['method']]], mean=mean,
        std=std, seed=config['seed'], total_steps=config['epochs'] * steps_per_epoch, steps_per_epoch=steps_per_epoch)


def lars(groups, momentum, **settings):
    """timm's, which adapts a group without weight decay only if told so. It divides by |g| + wd |w| (as apex, mmselfsup;
    MoCo v3, BYOL, VICReg and SimCLR: |g + wd w|, the same but for large decays) and multiplies with the learning rate
    after the momentum (as MoCo v3, BYOL and VICReg; SimCLR and mmselfsup: before, which differs while it changes)."""
    for group in groups:
        group['always_adapt'] = not group['exclude']
    return Lars(groups, momentum=momentum, trust_coeff=0.001, **settings)


OPTIMIZERS = {'sgd': torch.optim.SGD, 'lars': lars,
              'adamw': lambda groups, momentum, **settings: torch.optim.AdamW(groups, **settings)}


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
    official codes of MoCo v2 and SimSiam change the learning rate once an epoch, the others every step."""
    warmup, total = optimizer['warmup_epochs'] * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return optimizer['lr'] * step / warmup
    return cosine(optimizer['lr'], optimizer['final_lr'], step - warmup, max(1, total - warmup))


class Monitor:
    """kNN accuracy of the backbone on labelled images. Raises Fail at once when it could not work later."""

    def __init__(self, config, dtype, processes):
        self.config, self.dtype, self.processes, self.knn = config, dtype, processes, config['knn']
        loaders = [self.images(self.knn[f'{part}_beton'], verify=processes.main) for part in ('train', 'test')]
        self.samples = [loader.sidecar['samples'] for loader in loaders]
        self.classes = max(int(loader.metadata['f2'].max()) for loader in loaders) + 1
        if self.knn['k'] > self.samples[0]:
            raise Fail(f"knn.k: {self.knn['k']} neighbours out of {self.samples[0]} images of knn.train_beton")
        if min(int(loader.metadata['f2'].min()) for loader in loaders) < 0:
            raise Fail('knn.train_beton, knn.test_beton: there are images without label (-1)')

    def images(self, path, positions=None, verify=False):
        size = self.config['image_size']
        return PairLoader(path, [{'size': size, 'resize': size, 'crop_scale': None}], alpha=0, swap='first', seed=0,
                          batch_size=256, num_workers=self.config['data']['num_workers'], drop_last=False,
                          shuffle=False, indices=positions, verify=verify)

    def accuracy(self, backbone):
        """backbone: of the training, not touched. Top-1 accuracy between 0 and 1, the same on all processes."""
        mean_std = normalization(self.config['normalization'])
        encoder = Encoder(deepcopy(backbone), *mean_std, self.processes.device, self.dtype)
        (train, labels), test = (
            all_features(partial(self.images, self.knn[f'{part}_beton']), n, encoder, self.processes, f'kNN {part}')
            for part, n in zip(('train', 'test'), self.samples))
        return knn_accuracy(train, labels, *test, self.classes, self.knn['k'], self.knn['temperature'], 256,
                            self.processes)[0] / 100


def export(path, model, config, mean, std):
    """The backbone alone, with torchvision's or timm's names, and what one must know to use it."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.backbone.state_dict().items()}
    save_checkpoint(path, {'state_dict': state, **describe(config['backbone'])[0],
                           'feature_dim': model.backbone.feature_dim, 'mean': list(mean), 'std': list(std),
                           'image_size': config['image_size'], 'method': config['method']})


def main(config):
    processes = Processes(config['device'])
    device, world = processes.device, processes.world
    check(config, world)
    mean, std = normalization(config['normalization'])
    dtype = precision_dtype(config['precision'], device)
    folder, epochs, accumulate = Path(config['output']), config['epochs'], config['accumulate']
    data, settings = config['data'], config['optimizer']
    checkpoint = folder / 'checkpoint.pt'
    saved = load_checkpoint(checkpoint) if checkpoint.is_file() else None
    if saved:
        others = set(BLOCKS.values()) - {BLOCKS[config['method']]}
        changed = changed_keys(saved['config'], config, (*BOOKKEEPING, *others))
        if changed:
            raise Fail(f"{checkpoint} was made with another config: {'; '.join(changed)}. Go back to it, or set "
                       'another output=')
        if saved['epoch'] == epochs and (folder / 'backbone.pt').is_file():
            if processes.main:
                print(f"{folder}: finished ({epochs} epochs): {folder / 'backbone.pt'}")
            return

    # Data, models
    seed_everything(config['seed'])  # the same on all processes: they build the same model
    torch.set_float32_matmul_precision('high')  # TF32 where the GPU has it
    torch.backends.cudnn.benchmark = True
    small = config['small_crops']
    recipes = [{'size': config['image_size'], **config[view]} for view in ('view_1', 'view_2')]
    recipes += [{**recipes[k % 2], 'size': small['size'], 'crop_scale': small['crop_scale']}
                for k in range(small['count'])]
    loader = PairLoader(data['beton'], recipes, data['alpha'], data['swap'],
                        batch_size=config['batch_size'] // (world * accumulate), seed=config['seed'],
                        num_workers=data['num_workers'], rank=processes.rank, world=world,
                        pin_memory=device.type == 'cuda')
    steps_per_epoch, images = len(loader) // accumulate, loader.sidecar['samples']
    if not steps_per_epoch:
        raise Fail(f"batch_size: {config['batch_size']} is more than the {images} images of {data['beton']}")
    enlarged = check_size(config, loader)
    monitor = Monitor(config, dtype, processes) if config['knn']['every'] else None
    beton = sha256(json.dumps(loader.sidecar['crc32']).encode()).hexdigest()
    if saved and saved['beton'] != beton:
        raise Fail(f"{checkpoint} was made with another content of data.beton ({data['beton']}); set another output=")
    model = build_model(config, steps_per_epoch)
    model = model.to(device, memory_format=torch.channels_last)
    model = synchronize_batch_norm(model, device) if model.sync_bn else model
    quality = Quality(config['quality'], device) if config['quality']['enabled'] else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    epoch, batch_index = 0, 0
    if saved:
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        epoch, batch_index = saved['epoch'], saved['batch']
        set_random_states(saved['random'][processes.rank if len(saved['random']) == world else 0])
    if config['compile']:
        for name, module in model.named_children():
            if name.endswith('backbone'):
                module.compile()  # in place: names in the checkpoint stay
    wrapped = model
    if dist.is_initialized():
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')  # torch 2.15's new name is too new
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                          broadcast_buffers=False, gradient_as_bucket_view=True)
    step, last_step = epoch * steps_per_epoch + batch_index, epochs * steps_per_epoch

    stop = StopSignal()
    log = Log(folder, config, processes.main, config['tensorboard'])
    if config['method'] == 'mocov2' and config['moco']['queue'] > images:
        log.write(f"moco.queue: {config['moco']['queue']} keys of {images} images: many negatives are views of the "
                  "query's own image; a quarter of the images is a usual size")
    if processes.main and not saved:
        export(folder / 'backbone_init.pt', model, config, mean, std)
    log.write(enlarged)
    log.write(f"{config['method']} {describe(config['backbone'])[1]}, {sum(p.numel() for p in trained) / 1e6:.2f} M "
              f"trained parameters; {images} images, {loader.sidecar['with_view']} with a synthetic view; global batch "
              f"{config['batch_size']} on {world} process{'es' * (world > 1)} ({device.type}, "
              f"{str(dtype).split('.')[1]}); {steps_per_epoch} steps an epoch, {last_step} in all"
              + (f'; resumed at step {step}' if saved else ''))

    # Figures since the last log line stay on the device: reading one would wait for the GPU.
    never = torch.tensor(last_step + 1, device=device)
    first_bad, loss_sum, counted = never.clone(), torch.zeros((), device=device), 0
    waited, since, last_saved = 0.0, time.perf_counter(), step if saved else None

    def stop_if_not_finite(parameters=()):
        bad = first_bad.clone()
        if parameters and not torch.stack(torch._foreach_norm(parameters)).isfinite().all():
            bad = bad.clamp(max=step)  # the update of the last step did it: its own loss was still finite
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        if bad < never:
            good = f'the last good checkpoint is {checkpoint} (step {last_saved})' if last_saved is not None else \
                'there is no checkpoint yet'
            raise Fail(f'step {int(bad)}: the loss or the weights are not finite; {good}. Lower optimizer.lr, raise '
                       'optimizer.warmup_epochs or set precision=fp32')

    def save():
        nonlocal last_saved
        stop_if_not_finite(trained)
        average_running_statistics(model)
        states = [random_states()]
        if dist.is_initialized():
            states = [None] * world
            dist.all_gather_object(states, random_states())
        if processes.main:
            save_checkpoint(checkpoint, {
                'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'epoch': epoch, 'batch': batch_index, 'step': step, 'random': states, 'config': config,
                'beton': beton})
        last_saved = step
        processes.barrier()  # nobody goes on, or leaves, before it is written

    def look_at_neighbours():
        nonlocal since
        begin = time.perf_counter()
        if monitor and epoch and (epoch % config['knn']['every'] == 0 or epoch == epochs):
            average_running_statistics(model)
            accuracy = monitor.accuracy(model.backbone)
            log.write(f'epoch {epoch}: kNN accuracy {accuracy:.2%}', step=step, knn_accuracy=round(accuracy, 5))
        since += time.perf_counter() - begin  # images/s are those of training

    bar = tqdm(total=last_step, initial=step, unit='step', dynamic_ncols=True, disable=None if processes.main else True)
    leave = False
    if saved and not batch_index and f'"step": {step}, "knn_accuracy"' not in (folder / 'log.jsonl').read_text():
        look_at_neighbours()  # the run ended between saving the epoch and this
    while epoch < epochs and not leave:
        with closing(loader.epoch(epoch, batch_index * accumulate)) as batches:
            while batch_index < steps_per_epoch and not leave:
                look = (step + 1) % config['log_every'] == 0 or step + 1 == last_step
                rate = learning_rate(step, steps_per_epoch, epochs, settings)
                for group in optimizer.param_groups:
                    group['lr'] = settings['lr'] if group['fixed_lr'] else rate
                model.before_step(step)
                optimizer.zero_grad()
                step_loss = 0
                for micro_batch in range(accumulate):
                    begin = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - begin
                    views = [v.to(device, non_blocking=True) for v in batch['views']]
                    last = micro_batch + 1 == accumulate
                    with nullcontext() if last or wrapped is model else wrapped.no_sync():
                        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                            weights, qualities = quality(*views[:2]) if quality else (1.0, None)
                            loss, extra, figures = wrapped(views, step, look)
                        loss = ((loss * weights).mean() + extra) / accumulate
                        scaler.scale(loss).backward()
                    step_loss += loss.detach()
                for parameter in model.frozen(step):
                    parameter.grad = None
                if settings['clip_grad']:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(trained, settings['clip_grad'])
                scaler.step(optimizer)
                scaler.update()
                model.after_step(step)
                loss_sum += step_loss
                counted += 1
                first_bad = torch.where(torch.isfinite(step_loss), first_bad, first_bad.clamp(max=step + 1))
                step, batch_index = step + 1, batch_index + 1
                bar.update()

                if look:
                    stop_if_not_finite()
                    seconds = time.perf_counter() - since
                    line = {'step': step, 'epoch': round(step / steps_per_epoch, 4),
                            'loss': global_mean(loss_sum / counted), 'lr': rate,
                            'images_per_second': round(counted * config['batch_size'] / seconds, 1),
                            'data_wait': round(waited / seconds, 4),
                            **{key: global_mean(value) for key, value in figures.items()}}
                    dim = config[BLOCKS[config['method']]]['dim']
                    line['feature_std_ratio'] = line['feature_std'] * dim ** 0.5  # 0: collapsed
                    if quality:
                        for name, values in (('quality', qualities), ('weight', weights)):
                            line |= {f'{name}_mean': values.mean().item(), f'{name}_min': values.min().item(),
                                     f'{name}_max': values.max().item()}
                    loss_sum, counted, waited, since = torch.zeros_like(loss_sum), 0, 0.0, time.perf_counter()
                    shown = [f"{label} {line[key]:.{digits}f}" for label, key, digits in (
                        ('loss', 'loss', 4), ('top-1', 'contrastive_top1', 3), ('entropy', 'assignment_entropy', 2),
                        ('std', 'feature_std_ratio', 2)) if key in line]
                    collapsed = min(line['feature_std_ratio'], line.get('assignment_entropy', 1)) < 0.05
                    text = (f"{'  '.join(shown)}{' COLLAPSED' * collapsed}  lr {rate:.4g}  "
                            f"{line['images_per_second']:.0f} images/s")
                    bar.set_postfix_str(text)
                    log.write(f"epoch {line['epoch']:.2f}/{epochs}  step {step}/{last_step}  {text}  data wait "
                              f"{line['data_wait']:.0%}" if bar.disable else None, **line)
                ended = batch_index == steps_per_epoch
                leave = processes.any(stop) and step < last_step
                every = config['save_every_steps']
                if leave or not ended and every and batch_index % every == 0:
                    if ended:
                        epoch, batch_index = epoch + 1, 0
                    save()
        if not leave:
            epoch, batch_index, begin = epoch + 1, 0, time.perf_counter()
            if epoch % config['save_every_epochs'] == 0 or epoch == epochs:
                save()
            since += time.perf_counter() - begin
            look_at_neighbours()
    bar.close()
    if leave:
        log.write(f'{stop.name or "stop signal"}: saved at step {step} of {last_step}; the same command resumes')
        if config['requeue'] and processes.any(stop.name == 'SIGUSR1'):  # SIGTERM may be scancel: not to be undone
            log.write(stop.requeue() if processes.main else None)
    elif processes.main:
        export(folder / 'backbone.pt', model, config, mean, std)
        log.plot('loss.png', ['loss'], ['contrastive_top1', 'assignment_entropy', 'feature_std_ratio', 'knn_accuracy'])
        log.write(f"done: {folder / 'backbone.pt'}, {folder / 'loss.png'}")
    log.close()
    if leave:
        sys.exit(stop.exit_code)


if __name__ == '__main__':
    run(main, DEFAULTS)
