"""Stage 2b: learn how far a latent may move, for generators whose anchors are synthetic too (COP-Gen,
hierarchical-latent).

    python train_walker.py yamls/train_walker/bigbigan_copgen.yaml
    python train_walker.py yamls/train_walker/bigbigan_copgen.yaml monte_carlo=1000000   # distances of a finished one

walker: learned or linear. COP-Gen eq. 6: an estimator learns to find the positive g(z + T(z)) of an anchor g(z) among
those of other anchors (InfoNCE), and the walker T learns to make that hard. Nothing but the estimator's success holds
the walker back, so that it is stopped early: by a budget (`samples`) or by the loss (`stop_loss`).
walker: steering. GenRep: directions that turn, zoom, shift and colour the image as editing it does (least squares).

Writes into `output`: walker.pt (for latent.chunks of gen_views.py and data.online of pretrain.py), untrained.pt (it
before the first step: PyTorch's initialisation moves a latent already, so train with both), checkpoint.pt, log.jsonl,
config.yaml, versions.json, pairs_*.png, and with monte_carlo distances.json and distances.png.

The same command again resumes; on a CPU to the bit. Sample k of a run depends on (seed, k) alone; estimator and loss
are of the global batch (COP-Gen: one per GPU), so the number of processes changes nothing but rounding.
"""
from config import Fail, check_values, run_folder
from start import run

DEFAULTS = """
output: ''              # run folder
seed: 0
device: auto            # auto | cpu | cuda
latent:                 # the generator, see gen_views.py
  kind: biggan          # biggan | stylegan2
  model: ''
  truncation: 2.0       # of the anchors
  psi: 1.0
  crop: !int null
  size: !int null       # pixels: side of the generated images, resized to that; null: as the network makes them
chunks: ''              # which of the latent's move: 0-5 (all of BigBiGAN's), 1-5, 3
walker: learned         # learned (Linear, ReLU, Linear) | linear (without ReLU) | steering
start: default          # default (PyTorch's initialisation: COP-Gen) | small (hierarchical-latent's)
lr: 1e-5                # of the walker; Adam
samples: 200000         # anchors; 0: none, walker.pt is the untrained one
batch_size: 176         # anchors a step, of all processes together
stop_loss: !float null  # nats: end once the mean loss of a log_every has been below and is above it again. Published
                        # losses are 0.1 / 0.07 = 1.43 times ours: hierarchical-latent's 1.05 is 0.735, its code's 2.5
                        # is 1.75
stop_after: 0           # anchors before which stop_loss is not looked at
first: estimator        # who takes the first step on a batch: estimator (COP-Gen's code) | walker
estimator:
  arch: resnet18
  stem: imagenet        # imagenet | cifar (for images of 32 px)
  width: 64
  hidden: 512
  dim: 128
  temperature: 0.1
  lr: 3e-5
image_size: 128         # pixels a side of what the estimator sees
view:                   # augmentation of both images, inside the graph, per sample; {crop_scale: [0, 0], flip: 0,
                        # jitter_prob: 0, gray_prob: 0}: none
  crop_scale: [0.2, 1.0]
  resize: !int null     # without crop_scale: the shorter side, of which image_size is cut from the centre
  flip: 0.5
  jitter: [0.4, 0.4, 0.4, 0.1]
  jitter_prob: 0.8
  gray_prob: 0.2
  blur_prob: 0.0
  blur_sigma: [0.1, 2.0]
  blur_kernel: !int null
  solarize_prob: 0.0
normalization: imagenet # imagenet | cifar10 | clip
monte_carlo: 0          # anchors whose distance to their positive is measured at the end (hierarchical-latent Table 1)
log_every: 10           # steps
save_every: 100         # steps
grid_every: 10000       # anchors between two pictures of pairs
"""
BOOKKEEPING = ('output', 'device', 'samples', 'monte_carlo', 'log_every', 'save_every', 'grid_every')
EVER = 10 ** 12
ALLOWED = {
    'output': 'folder', 'latent.model': 'file', 'chunks': 'range of chunks', 'kind': ['biggan', 'stylegan2'],
    'truncation': (0.0, 100.0), 'psi': (0.0, 1.0), 'crop': (1, 8192), 'latent.size': (8, 8192), 'seed': (0, EVER),
    'walker': ['learned', 'linear', 'steering'], 'start': ['default', 'small'], 'lr': (1e-30, 1000.0),
    'samples': (0, EVER), 'batch_size': (2, 10 ** 6), 'stop_loss': (0.0, 100.0), 'stop_after': (0, EVER),
    'first': ['estimator', 'walker'], 'arch': ['resnet18', 'resnet34', 'resnet50'], 'stem': ['imagenet', 'cifar'],
    'width': (8, 1024), 'hidden': (1, 32768), 'dim': (1, 32768), 'temperature': (0.001, 100.0),
    'image_size': (8, 1024), 'normalization': ['imagenet', 'cifar10', 'clip'], 'monte_carlo': (0, EVER),
    'log_every': (1, EVER), 'save_every': (1, EVER), 'grid_every': (1, EVER)}


def check(config, world=1):
    check_values(config, ALLOWED)
    from augment import recipe_row  # the name below is not there yet when this is asked first
    recipe_row({'size': config['image_size'], **config['view']}, 'view')
    if config['batch_size'] % world:
        raise Fail(f"batch_size: {config['batch_size']} (of all processes) is not a multiple of the {world} processes")


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from augment import parameters, recipe_row
from checkpoints import NORMALIZATIONS, normalization
from common import Log, Processes, StopSignal, earlier
from files import save_checkpoint, save_json, weights_checksum
from latents import LatentGenerator, Steering, Walker, chunk_range, load_walker, save_walker, uniform
from loss import nt_xent
from models import average, build_backbone, global_mean, synchronize_batch_norm
from online import augment
from pictures import grid, histograms

PUBLISHED = 0.1 / 0.07  # SupConLoss multiplies with temperature / base temperature
SHOWN = 8               # pairs in a picture
BLOCK = 256             # latents at once where nothing is learned


class Estimator(nn.Module):
    """COP-Gen's: ResNet without its classifier, Linear - ReLU - Linear, unit length."""

    def __init__(self, arch, stem, width, hidden, dim, normalization):
        super().__init__()
        self.backbone = build_backbone(arch, stem, width)
        self.head = nn.Sequential(nn.Linear(self.backbone.feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for name, value in zip(('mean', 'std'), normalization):
            self.register_buffer(name, 255 * torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        """Images (B, 3, S, S) in 0..255 -> (B, dim)."""
        return F.normalize(self.head(self.backbone((images - self.mean) / self.std)), dim=1)


def edited(images, sliders):
    """The target of steering: images (B, 3, S, S) in -1..1 and sliders (B, 8) of Steering -> edited images and a mask
    (B, 1, S, S), 0 where they show nothing. Colours are added; then one homography rotates in space (60 degrees at 1,
    seen from a distance of the diagonal), in the plane (30 degrees), shrinks (exp; below 0 it enlarges) and shifts (100
    of 256 pixels). What a rotation leaves empty GenRep's code has learned as grey; here the mask leaves it out too."""
    rotation_3d, rotation, zoom, *shifts = sliders[:, :5].unbind(1)
    matrix = lambda *rows: torch.stack([torch.stack([torch.as_tensor(v, device=images.device).expand(len(images))
                                                     for v in row], 1) for row in rows], 1)
    turn, tilt, far = rotation * torch.pi / 6, rotation_3d * torch.pi / 3, 8 ** 0.5
    # x and y are -1..1 in the image; GenRep shifts a tilted one by a fifth of a pixel (of 256) per degree
    space = matrix([far * tilt.cos(), 0., -far * 12 * rotation_3d / 128], [0., far, 0.], [tilt.sin(), 0., far])
    flat = matrix([turn.cos(), turn.sin(), 0.], [-turn.sin(), turn.cos(), 0.], [0., 0., 0.])
    flat = flat * (-zoom).exp()[:, None, None]
    flat = flat + matrix([0., 0., shifts[0] / 1.28], [0., 0., shifts[1] / 1.28], [0., 0., 1.])
    at = F.affine_grid(torch.eye(2, 3, device=images.device)[None], (1, 1, *images.shape[2:]), align_corners=False)
    seen = F.pad(at, (0, 1), value=1.).expand(len(images), -1, -1, -1) @ torch.linalg.inv(flat @ space)[:, None].mT
    where = seen[..., :2] / seen[..., 2:]
    colours = torch.cat([images + sliders[:, 5:, None, None], torch.ones_like(images[:, :1])], 1)
    found = F.grid_sample(colours, where, align_corners=False)
    return found[:, :3], (found[:, 3:] > 0.99).float()


class Game:
    """The walker, what trains it, and one step of both."""

    def __init__(self, config, processes):
        self.config, self.processes, self.steering = config, processes, config['walker'] == 'steering'
        self.generator = LatentGenerator(config['latent'], processes.device, config['latent']['size'])
        self.range = chunk_range(config['chunks'], self.generator.chunks)
        self.recipe = np.array(recipe_row({'size': config['image_size'], **config['view']}, 'view'))
        width = self.generator.part(torch.zeros(1, self.generator.dim), *self.range).shape[1]
        self.walker = (Steering(width) if self.steering else
                       Walker(width, config['walker'] == 'learned', config['start'])).to(processes.device)
        estimator = config['estimator']
        self.estimator = Estimator(*(estimator[k] for k in ('arch', 'stem', 'width', 'hidden', 'dim')), normalization(
            config['normalization'], NORMALIZATIONS['imagenet'])).to(processes.device)
        self.estimator = synchronize_batch_norm(self.estimator, processes.device)
        adam = dict(betas=(0.9, 0.999) if self.steering else (0.5, 0.999))
        self.walks = torch.optim.Adam(self.walker.parameters(), config['lr'], **adam)
        self.estimates = torch.optim.Adam(self.estimator.parameters(), estimator['lr'], **adam)

    def state(self):
        return {name: getattr(self, name).state_dict() for name in ('walker', 'estimator', 'walks', 'estimates')}

    def restore(self, saved):
        for name in self.state():
            getattr(self, name).load_state_dict(saved[name])

    def displaced(self, z, numbers):
        return self.walker(self.generator.part(z, *self.range), numbers)

    def step(self, indices):
        """A step on the anchors `indices` of this process; returns the mean loss before it, in nats (steering: squared
        error)."""
        z = self.generator.anchors(self.config['seed'], indices)
        with torch.no_grad():
            anchors = self.generator.images(self.generator.code(z))
        if self.steering:
            numbers = uniform(self.config['seed'], indices, 1, Steering.NUMBERS)
            sliders = Steering.sliders(numbers).to(z.device)
            target, mask = edited(2 * anchors - 1, sliders)
            images = self.generator.images(self.generator.moved(z, {self.range: sliders @ self.walker.directions}))
            seen = 3 * mask.sum()
            if dist.is_initialized():  # of the global batch: processes see more or less of their images
                dist.all_reduce(seen)
            loss = ((2 * images - 1 - target).square() * mask).sum() * self.processes.world / seen
            self._learn(self.walks, loss)
            return loss.detach()
        positives = self.generator.images(self.generator.moved(z, {self.range: self.displaced(z, None)}))
        views = [augment(255 * images, self.recipe, torch.from_numpy(parameters(
            self.config['seed'], 0, indices, k, self.recipe, *images.shape[2:])))
            for k, images in enumerate((anchors, positives))]
        temperature, losses = self.config['estimator']['temperature'], []
        turns = [(self.estimates, 1, [v.detach() for v in views]), (self.walks, -1, views)]
        for optimizer, sign, seen in turns if self.config['first'] == 'estimator' else turns[::-1]:
            rows = self.estimator(torch.cat(seen)).chunk(2)  # together, as both codes: batch norm must see the move
            losses.append(nt_xent(*rows, temperature).mean())
            self._learn(optimizer, sign * losses[-1])
        return losses[0].detach()

    def _learn(self, optimizer, loss):
        self.walks.zero_grad()
        self.estimates.zero_grad()
        loss.backward()
        average(parameter.grad for group in optimizer.param_groups for parameter in group['params'])
        optimizer.step()

    @torch.no_grad()
    def movement(self, walker, count=2048):
        """Figures of a walker's displacement T over `count` anchors: standard deviation over latents and dimensions,
        mean length, and how much of it is the same for all latents (mean of the dimensions' means, absolute)."""
        indices = range(count)
        z = self.generator.part(self.generator.anchors(self.config['seed'], indices), *self.range)
        shift = walker(z, uniform(self.config['seed'], indices, 1, Steering.NUMBERS))
        return {'move_std': shift.std().item(), 'move_length': shift.norm(dim=1).mean().item(),
                'move_shared': shift.mean(0).abs().mean().item(), 'latent_std': z.std().item(),
                'moved_std': (z + shift).std().item()}

    @torch.no_grad()
    def pairs(self, indices):
        z = self.generator.anchors(self.config['seed'], indices)
        shift = self.displaced(z, uniform(self.config['seed'], indices, 1, Steering.NUMBERS))
        return self.generator.code(z), self.generator.moved(z, {self.range: shift})

    def draw(self, path):
        anchors, positives = (self.generator.images(code).permute(0, 2, 3, 1).cpu().numpy()
                              for code in self.pairs(range(SHOWN)))
        grid(path, [((), [('', pair) for pair in zip(anchors, positives)])], columns=SHOWN)

    def distances(self, count):
        """Euclidean distance of anchor and positive within each chunk that moves, {chunk: (count,)}:
        hierarchical-latent Table 1 (StyleGAN2: over the rows of W)."""
        found = []
        for start in range(0, count, BLOCK):
            anchors, positives = self.pairs(range(start, min(start + BLOCK, count)))
            found.append(self.generator.hierarchy.distances(anchors, positives).cpu())
        return {k: torch.cat(found)[:, k].numpy() for k in range(self.range[0], self.range[1] + 1)}


def in_words(figures, before):
    return (f"moves by {figures['move_length']:.3f} (untrained {before['move_length']:.3f}), std "
            f"{figures['move_std']:.3f} ({before['move_std']:.3f}), the same for all {figures['move_shared']:.3f} "
            f"({before['move_shared']:.3f}); latents {figures['latent_std']:.3f} -> {figures['moved_std']:.3f}")


def measure(game, folder, count, log):
    distances = game.distances(count)
    table = {str(k): {'mean': float(v.mean()), 'std': float(v.std()), 'median': float(np.median(v))}
             for k, v in distances.items()}
    save_json(folder / 'distances.json', {'anchors': count, 'chunks': table})
    curves = {f'chunk {k}': v for k, v in distances.items()}
    histograms(folder / 'distances.png', [('distance', 'anchors', curves, None)])
    for k, row in table.items():
        log.write(f"chunk {k}: distance {row['mean']:.3f} +- {row['std']:.3f}, median {row['median']:.3f} "
                  f'({count} anchors)')


def main(config):
    processes = Processes(config['device'])
    check(config, processes.world)
    batch, world = config['batch_size'], processes.world
    folder, last = run_folder(config['output']), config['samples'] // batch
    checkpoint, result = folder / 'checkpoint.pt', folder / 'walker.pt'
    saved = earlier(checkpoint, config, BOOKKEEPING, needs=('walker', 'estimator', 'walks', 'estimates', 'step',
                                                            'done', 'weights', 'losses', 'lowest'))
    torch.manual_seed(config['seed'])
    game = Game(config, processes)
    step, lowest = (saved['step'], saved['lowest']) if saved else (0, None)
    done = bool(saved) and (saved['done'] or step >= last)
    if step > last:
        raise Fail(f'samples: {checkpoint} has seen {step * batch} already; set at least that many, or another output=')
    if saved:
        game.restore(saved)
    stop, log = StopSignal(), Log(folder, config, processes.main)
    model = config['latent']['model']
    about = dict(chunks=list(game.range), generator=model, weights=weights_checksum(model))
    if saved and saved['weights'] != about['weights']:
        raise Fail(f'{checkpoint}: was made with other weights than {model} has now; set another output=')
    if processes.main and not saved:
        save_walker(folder / 'untrained.pt', game.walker, **about)
    processes.barrier()
    before, reason = game.movement(load_walker(folder / 'untrained.pt').to(processes.device)), ''
    losses = list(saved['losses'].to(processes.device)) if saved else []
    log.write(f"{config['walker']} walker of width {game.walker.width} for the chunks {config['chunks']} of "
              f"{game.generator.name}: {last} steps of {batch}" + f'; resumed at step {step}' * bool(saved))

    def finite(loss=0.0):
        if not np.isfinite(loss) or not all(p.isfinite().all() for p in game.walker.parameters()):
            raise Fail(f'step {step}: the loss or the walker is not finite; lower lr and estimator.lr')

    def save(done):
        finite()
        since = [global_mean(loss.clone()) for loss in losses]  # the last line of the log; stop_loss needs them
        if processes.main:
            save_checkpoint(checkpoint, {**game.state(), 'step': step, 'lowest': lowest, 'done': done,
                                         'losses': torch.tensor(since), 'weights': about['weights'], 'config': config})
        processes.barrier()

    with tqdm(total=last, initial=step, unit='step', disable=None if processes.main else True) as bar:
        while step < last and not done:
            first = step * batch + processes.rank * (batch // world)
            losses.append(game.step(np.arange(first, first + batch // world)))
            step += 1
            bar.update()
            if step % config['log_every'] == 0 or step == last:
                loss = global_mean(torch.stack(losses).mean())
                finite(loss)
                figures = game.movement(game.walker)
                line = dict(step=step, samples=step * batch, loss=loss, published_loss=loss * PUBLISHED, **figures)
                unit = 'squared error' if game.steering else f'nats (published scale {loss * PUBLISHED:.3f})'
                log.write(f'step {step}/{last}  loss {loss:.4f} {unit}  {in_words(figures, before)}'
                          if bar.disable else None, **line)
                losses, lowest = [], min(loss, loss if lowest is None else lowest)
                if config['stop_loss'] and step * batch >= config['stop_after'] and lowest < config['stop_loss'] < loss:
                    done, reason = True, f" after {step * batch} anchors: the loss is back at {config['stop_loss']} " \
                        'nats'
            if processes.main and step * batch // config['grid_every'] > (step - 1) * batch // config['grid_every']:
                game.draw(folder / f'pairs_{step * batch:08d}.png')
            leave = processes.any(stop) and step < last and not done
            if leave or done or step % config['save_every'] == 0 or step == last:
                save(done)
            if leave:
                stop.leave(log, f'saved at step {step} of {last}; the same command resumes')
    if processes.main:
        save_walker(result, game.walker, **about)
        game.draw(folder / 'pairs.png')
        log.write(f'done{reason}: {result}, {folder / "pairs.png"}: {in_words(game.movement(game.walker), before)}')
        if config['monte_carlo']:
            measure(game, folder, config['monte_carlo'], log)
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
