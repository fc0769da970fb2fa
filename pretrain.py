"""Stage 3: self-supervised pretraining on pairs of an image and its synthetic view (GenView section 3).

    python pretrain.py yamls/pretrain/cifar10_mocov2_genview.yaml
    torchrun --nproc-per-node 8 pretrain.py yamls/pretrain/in1k_mocov2_genview.yaml seed=1

Reads a paired beton of gen_views.py and, for the quality-driven loss, the principal component that fg_proportion.py
wrote with the quality encoder. The baseline is the same command with data.alpha=0 quality.enabled=false.

Writes into `output`: config.yaml, versions.json, log.jsonl, checkpoint.pt, backbone_init.pt (untrained), backbone.pt
(plain torchvision names, for linear_eval.py) and loss.png. The same command again resumes; SIGTERM and SIGUSR1 save and
leave. On a CPU a resumed run is bit-exact. The result does not depend on the number of processes, but for rounding:
batch size, batch norm groups, queue and quality weights are those of the global batch.
"""
import json
import math
import sys
import time
import warnings
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (Fail, Log, Processes, StopSignal, atomic, changed_keys, load_checkpoint, precision_dtype,
                    random_states, run, save_checkpoint, seed_everything, set_random_states)
from data import CIFAR_MEAN, CIFAR_STD, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PairLoader
from loss import pair_quality, quality_weights
from models import FrozenClip, MoCo, normalize

DEFAULTS = """
output: null            # run folder, e.g. runs/cifar10/pretrain
seed: 0                 # of initialisation, data order, augmentations and shuffling
device: auto            # auto | cpu | cuda
precision: auto         # auto | fp32 | bf16 | fp16 (GPU, with loss scaling); auto: bf16 where the hardware has it

data:
  beton: null           # paired beton written by gen_views.py
  alpha: 1.0            # probability that one view of a pair comes from the synthetic image (GenView Table 8)
  swap: random          # which one: random (per sample and epoch, as the official code) | first (query) | second (key)
  num_workers: 8        # threads per process that decode and augment

image_size: 224         # pixels, side of a view
normalization: null     # null = clip (as the official code) | imagenet | cifar10 | [[r, g, b], [r, g, b]] (mean, std)
view_1:                 # augmentation of the query; MoCo v2's recipe
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

method: mocov2
backbone:
  arch: resnet50        # resnet18 | resnet34 | resnet50 | resnet101
  stem: imagenet        # imagenet (7x7 stride 2, max-pool) | cifar (3x3 stride 1, no max-pool)
  width: 64             # channels of the first stage; 64 is the published network, 32 a quarter of its cost
moco:
  dim: 128              # projection
  queue: 65536          # keys; a multiple of batch_size (twice that if symmetric)
  momentum: 0.999       # of the momentum encoder, constant
  temperature: 0.2
  bn_splits: 8          # batch norm groups of the global batch, spread over the processes (official: one per GPU, 8)
  symmetric: false      # add the loss with the views exchanged

quality:                # quality-driven contrastive loss (GenView section 3.4)
  enabled: false
  clip:                 # frozen encoder
    model: convnext_base_w
    pretrained: null    # hub tag or local weights file; null for a folder or 'hf-hub:...'
    image_size: null    # pixels; null: the encoder's own. Views of another size are interpolated
  pc: null              # fg_proportion.npz made with the same encoder, or a .npy of shape (K,) or (K, 1)
  temperature: 1.0      # of the softmax over the pairs (eq. 13: 1)

optimizer:              # SGD
  lr: 0.03              # for batch_size as it is, not scaled; linear warm-up, then cosine to 0
  momentum: 0.9
  weight_decay: 0.0001  # on all parameters
  warmup_epochs: 0
epochs: 200
batch_size: 256         # of all processes together

log_every: 50           # steps
save_every_epochs: 1
save_every_steps: null  # additionally within an epoch
tensorboard: true
"""

# May differ when a run is resumed; everything else shapes the result.
BOOKKEEPING = ('output', 'device', 'data.num_workers', 'log_every', 'save_every_epochs', 'save_every_steps',
               'tensorboard')
NORMALIZATIONS = {'clip': (CLIP_MEAN, CLIP_STD), 'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
                  'cifar10': (CIFAR_MEAN, CIFAR_STD)}


def check(config, world):
    """What can be wrong in the config beyond names and types, before anything is written."""
    for key, value in (('output', config['output']), ('data.beton', config['data']['beton'])):
        if not isinstance(value, str):
            raise Fail(f'{key}: must name a {"folder" if key == "output" else "file"}, e.g. {key}=runs/...')
    if config['method'] != 'mocov2':
        raise Fail(f"method: '{config['method']}' is unknown; there is mocov2")
    batch, moco, optimizer = config['batch_size'], config['moco'], config['optimizer']
    for key, value, low in (('epochs', config['epochs'], 1), ('batch_size', batch, 1), ('moco.queue', moco['queue'], 1),
                            ('moco.bn_splits', moco['bn_splits'], 1), ('moco.dim', moco['dim'], 1),
                            ('log_every', config['log_every'], 1), ('image_size', config['image_size'], 8),
                            ('save_every_epochs', config['save_every_epochs'], 1), ('seed', config['seed'], 0),
                            ('save_every_steps', config['save_every_steps'] or 1, 1)):
        if not isinstance(value, int) or value < low:
            raise Fail(f'{key}: {value} must be a whole number of at least {low}')
    for key, value in (('moco.temperature', moco['temperature']), ('optimizer.lr', optimizer['lr']),
                       ('quality.temperature', config['quality']['temperature'])):
        if not value > 0:
            raise Fail(f'{key}: {value} must be above 0')
    if not 0 <= moco['momentum'] <= 1:
        raise Fail(f"moco.momentum: {moco['momentum']} must be in [0, 1]")
    if not 0 <= optimizer['warmup_epochs'] <= config['epochs']:
        raise Fail(f"optimizer.warmup_epochs: {optimizer['warmup_epochs']} must be in [0, epochs = {config['epochs']}]")
    if batch % world:
        raise Fail(f'batch_size: {batch} (of all processes together) is not a multiple of the {world} processes')
    keys = batch * (2 if moco['symmetric'] else 1)
    if moco['queue'] % keys:
        raise Fail(f"moco.queue: {moco['queue']} is not a multiple of the {keys} keys of a step; "
                   f"{max(1, round(moco['queue'] / keys)) * keys} is")
    if moco['bn_splits'] % world or batch % moco['bn_splits']:
        raise Fail(f"moco.bn_splits: {moco['bn_splits']} must be a multiple of the {world} processes and divide "
                   f'batch_size {batch}')


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


class Quality:
    """Weights of a batch of pairs from the frozen encoder (GenView eq. 10-14), which sees the very same views.

    All pairs are weighted, those without a synthetic view too, as in the official code."""

    def __init__(self, config, device):
        path = Path(config['pc'] or '')
        if not path.is_file():
            raise Fail(f"quality.pc: {config['pc']}: no such file; fg_proportion.py writes it as fg_proportion.npz")
        try:
            loaded = np.load(path)
            pc = np.asarray(loaded['pc'] if path.suffix == '.npz' else loaded, np.float32).reshape(-1)
            encoder = str(loaded['encoder']) if path.suffix == '.npz' and 'encoder' in loaded else None
        except (KeyError, ValueError, OSError) as error:
            raise Fail(f'quality.pc: {path}: no principal component in it ({error})') from None
        self.clip, self.temperature = FrozenClip(config['clip'], device), config['temperature']
        if len(pc) != self.clip.token_dim:
            raise Fail(f"quality.pc: {path} has width {len(pc)}, tokens of {config['clip']['model']} have "
                       f'{self.clip.token_dim}: run fg_proportion.py with this encoder')
        if encoder not in (None, self.clip.fingerprint()):
            raise Fail(f"quality.pc: {path} was made with other weights than {config['clip']['model']}: run "
                       'fg_proportion.py with this encoder')
        self.pc = torch.from_numpy(pc).to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.clip.mean, self.clip.std))

    @torch.no_grad()
    def __call__(self, view_1, view_2):
        """uint8 views (B, 3, S, S) -> weights (B,) of mean 1 over the global batch, quality (B,)."""
        images = normalize(torch.cat([view_1, view_2]), self.mean, self.std)
        if images.shape[-1] != self.clip.image_size:
            images = F.interpolate(images, size=self.clip.image_size, mode='bilinear')
        quality = pair_quality(*self.clip.tokens(images).chunk(2), self.pc)
        return quality_weights(quality, self.temperature), quality


def learning_rate(step, steps_per_epoch, epochs, optimizer):
    """Linear warm-up, then cosine to 0: a pure function of the step, so that resuming needs no scheduler's state."""
    warmup, total = optimizer['warmup_epochs'] * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return optimizer['lr'] * (step + 1) / warmup
    return optimizer['lr'] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def global_mean(tensor):
    """Mean over the processes of a scalar tensor, as a float."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor.item()


def average_running_statistics(model):
    """Processes keep their own batch norm statistics while they train; what is saved is their mean, on all of them."""
    if dist.is_initialized():
        for name, buffer in model.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def export(path, model, config, mean, std):
    """The backbone alone, with torchvision's names, and what one must know to use it."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.backbone.state_dict().items()}
    save_checkpoint(path, {'state_dict': state, **config['backbone'], 'feature_dim': model.backbone.feature_dim,
                           'mean': list(mean), 'std': list(std), 'image_size': config['image_size']})


def plot(folder):
    """loss.png from log.jsonl; of a step that was done twice (after a kill) the last line counts."""
    lines = {}
    for text in (folder / 'log.jsonl').read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line cut short by a kill
        if 'loss' in line:
            lines[line['step']] = line
    steps = sorted(lines)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout='constrained')
    axes[0].plot(steps, [lines[s]['loss'] for s in steps], color='tab:blue')
    axes[0].set(xlabel='step', ylabel='contrastive loss')
    axes[1].plot(steps, [lines[s]['contrastive_top1'] for s in steps], label='own key is nearest (share)')
    axes[1].plot(steps, [lines[s]['feature_std_ratio'] for s in steps], label='feature std x sqrt(dim): 0 = collapse')
    axes[1].set(xlabel='step', ylim=(0, 1.05))
    axes[1].legend(frameon=False)
    atomic(folder / 'loss.png', lambda p: figure.savefig(p, dpi=110))
    plt.close(figure)


def main(config):
    processes = Processes(config['device'])
    device, world = processes.device, processes.world
    check(config, world)
    mean, std = normalization(config['normalization'])
    dtype = precision_dtype(config['precision'], device)
    folder, epochs = Path(config['output']), config['epochs']
    checkpoint = folder / 'checkpoint.pt'
    saved = load_checkpoint(checkpoint) if checkpoint.is_file() else None
    if saved:
        changed = changed_keys(saved['config'], config, BOOKKEEPING)
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
    data = config['data']
    recipes = [{'size': config['image_size'], **config[view]} for view in ('view_1', 'view_2')]
    loader = PairLoader(data['beton'], recipes, data['alpha'], data['swap'], batch_size=config['batch_size'] // world,
                        seed=config['seed'], num_workers=data['num_workers'], rank=processes.rank, world=world,
                        pin_memory=device.type == 'cuda')
    beton = sha256(json.dumps(loader.sidecar['crc32']).encode()).hexdigest()
    if saved and saved['beton'] != beton:
        raise Fail(f"{checkpoint} was made with another content of data.beton ({data['beton']}); set another output=")
    model = MoCo(config['backbone'], **config['moco'], mean=mean, std=std, seed=config['seed'])
    model = model.to(device, memory_format=torch.channels_last)
    quality = Quality(config['quality'], device) if config['quality']['enabled'] else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=config['optimizer']['momentum'],
                                weight_decay=config['optimizer']['weight_decay'])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    epoch, batch_index, steps_per_epoch = 0, 0, len(loader)
    if saved:
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        epoch, batch_index = saved['epoch'], saved['batch']
        set_random_states(saved['random'][processes.rank if len(saved['random']) == world else 0])
    wrapped = model
    if dist.is_initialized():
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')  # torch 2.15's new name is too new
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                          broadcast_buffers=False, gradient_as_bucket_view=True)
    step, last_step = epoch * steps_per_epoch + batch_index, epochs * steps_per_epoch

    stop = StopSignal()
    log = Log(folder, config, processes.main, config['tensorboard'])
    if config['moco']['queue'] > loader.sidecar['samples']:
        log.write(f"moco.queue: {config['moco']['queue']} keys of {loader.sidecar['samples']} images: many negatives are "
                  "views of the query's own image; a quarter of the images is a usual size")
    if processes.main and not saved:
        export(folder / 'backbone_init.pt', model, config, mean, std)
    log.write(f"{config['method']} {config['backbone']['arch']} (width {config['backbone']['width']}, "
              f"{config['backbone']['stem']} stem), {sum(p.numel() for p in trained) / 1e6:.2f} M trained parameters; "
              f"{loader.sidecar['samples']} images, {loader.sidecar['with_view']} with a synthetic view; global batch "
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

    bar = tqdm(total=last_step, initial=step, unit='step', dynamic_ncols=True, disable=None if processes.main else True)
    leave = False
    while epoch < epochs and not leave:
        with closing(loader.epoch(epoch, batch_index)) as batches:
            while batch_index < steps_per_epoch and not leave:
                begin = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - begin
                view_1, view_2 = (v.to(device, non_blocking=True) for v in batch['views'])
                for group in optimizer.param_groups:
                    group['lr'] = learning_rate(step, steps_per_epoch, epochs, config['optimizer'])
                look = (step + 1) % config['log_every'] == 0 or step + 1 == last_step
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    weights, qualities = quality(view_1, view_2) if quality else (1.0, None)
                    loss, figures = wrapped(view_1, view_2, step, look)
                loss = (loss * weights).mean()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                loss_sum += loss.detach()
                counted += 1
                first_bad = torch.where(torch.isfinite(loss.detach()), first_bad, first_bad.clamp(max=step + 1))
                step, batch_index = step + 1, batch_index + 1
                bar.update()

                if look:
                    stop_if_not_finite()
                    seconds = time.perf_counter() - since
                    line = {'step': step, 'epoch': round(step / steps_per_epoch, 4),
                            'loss': global_mean(loss_sum / counted), 'lr': optimizer.param_groups[0]['lr'],
                            'images_per_second': round(counted * config['batch_size'] / seconds, 1),
                            'data_wait': round(waited / seconds, 4),
                            'contrastive_top1': global_mean(figures['contrastive_top1']),
                            'feature_std': global_mean(figures['feature_std'])}
                    line['feature_std_ratio'] = line['feature_std'] * config['moco']['dim'] ** 0.5  # 0: collapsed
                    if quality:
                        for name, values in (('quality', qualities), ('weight', weights)):
                            line |= {f'{name}_mean': values.mean().item(), f'{name}_min': values.min().item(),
                                     f'{name}_max': values.max().item()}
                    loss_sum, counted, waited, since = torch.zeros_like(loss_sum), 0, 0.0, time.perf_counter()
                    text = (f"loss {line['loss']:.4f}  top-1 {line['contrastive_top1']:.3f}  std "
                            f"{line['feature_std_ratio']:.2f}  lr {line['lr']:.4g}  "
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
            epoch, batch_index = epoch + 1, 0
            if epoch % config['save_every_epochs'] == 0 or epoch == epochs:
                save()
    bar.close()
    if leave:
        log.write(f'{stop.name or "stop signal"}: saved at step {step} of {last_step}; the same command resumes')
    elif processes.main:
        export(folder / 'backbone.pt', model, config, mean, std)
        plot(folder)
        log.write(f"done: {folder / 'backbone.pt'}, {folder / 'loss.png'}")
    log.close()
    if leave:
        sys.exit(stop.exit_code)


if __name__ == '__main__':
    run(main, DEFAULTS)
