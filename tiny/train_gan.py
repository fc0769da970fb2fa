"""Train the embedded GANs, 32 px: one whose latent has six chunks (COP-Gen, hierarchical-latent), and one conditioned
on tiny/clip's embedding (IC-GAN), which draws a view in one pass.

    python tiny/train_gan.py gan   --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth
    python tiny/train_gan.py icgan --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth

BigGAN's generator against discriminators that see the teacher's maps in place of pixels (Projected GAN, arXiv
2111.01007). Alone that ended in a dozen pictures at this budget. So three in four latents of `gan` are the
standardised embeddings of images, noised, and what is drawn from them shall look to the teacher like the image; the
others are normal noise. The discriminator sees image and latent together, as BigBiGAN's.

What `icgan` draws shall besides have the image's thumbnail and, encoded again, its embedding: that took the cosine of
the two from 0.47 to 0.74 in 600 steps. Its first layer sees the condition too (`layout`), or it could place nothing.

All see the 61 classes of Tiny-ImageNet-200 of tiny/train.py, never CIFAR-10. The same command goes on where a killed
one stopped; --steps sets how long. tiny/report_gan.py measures what came out.
"""
import json
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from gan import BigGAN  # noqa: E402
from train import (APPEARANCE, CLASSES, MEAN, SEMANTIC, STD, autocast, embeddings_of, load, parser_of, read,  # noqa: E402
                   save, schedulers, teacher_model, training_images)

NETWORK = dict(widths=[256, 224, 192, 128, 80, 40], up=[0, 1, 0, 1, 1], chunk=20, shared=128)
KINDS = {  # keys of config.json, steps of 64
    'gan': (NETWORK | {'chunk': 32, 'shared': 8}, 2100),
    'icgan': (NETWORK | {'widths': [192, 192, 160, 96, 64, 32], 'feature': 193, 'levels': True, 'layout': True}, 3600)}
ORDER = sorted(range(192), key=lambda i: i / SEMANTIC if i < SEMANTIC else (i - SEMANTIC) / APPEARANCE)
#       of the embedding's dimensions in the latent of `gan`: leading components first, of subject and layout alike
SIDE = 64  # pixels that the teacher sees: at 32 its first maps would be its last


class Discriminator(nn.Module):
    """One small network for each of the teacher's maps, behind a fixed random mixture of its channels. The inner
    product of its features with the condition joins the score (arXiv 1802.05637)."""

    def __init__(self, channels, condition, width=64):
        super().__init__()
        normed, random = nn.utils.parametrizations.spectral_norm, torch.Generator().manual_seed(1)
        self.bodies, self.scores, self.conditions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k, count in enumerate(channels):
            self.register_buffer(f'mix{k}', torch.randn(width, count, 1, 1, generator=random) / count ** 0.5)
            self.bodies.append(nn.Sequential(
                normed(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
                normed(nn.Conv2d(width, width, 3, padding=1, stride=2 if k < 2 else 1)), nn.LeakyReLU(0.2)))
            self.scores.append(normed(nn.Conv2d(width, 1, 1)))
            self.conditions.append(normed(nn.Linear(condition, width)))

    def forward(self, maps, condition):
        """Scores (B, len(maps))."""
        found = []
        for k, x in enumerate(maps):
            h = self.bodies[k](F.conv2d(x, getattr(self, f'mix{k}')))
            score = self.scores[k](h) + (self.conditions[k](condition)[:, :, None, None] * h).mean(1, keepdim=True)
            found.append(score.flatten(1).mean(1))
        return torch.stack(found, 1)


def look(teacher, x, shift=None):
    """x (B, 3, 32, 32) in -1..1, shifted to 0..8 (2, B) from 4 pixels up and left (mirrored borders) -> the teacher's
    maps at strides 4 to 32 and its pooled features (B, 1280)."""
    shift = torch.full((2, len(x)), 4) if shift is None else shift
    rows, columns = (s[:, None].to(x.device) + torch.arange(32, device=x.device) for s in shift)
    padded = F.pad(x, (4, 4, 4, 4), mode='reflect').permute(0, 2, 3, 1)
    x = padded[torch.arange(len(x), device=x.device)[:, None, None], rows[:, :, None], columns[:, None]]
    x = F.interpolate(x.permute(0, 3, 1, 2), size=(SIDE, SIDE), mode='bilinear', align_corners=False)
    x = (x * 127.5 + 0.5) / 128
    final, maps = teacher.forward_intermediates(x.contiguous(memory_format=torch.channels_last), indices=[1, 2, 3, 4])
    return maps, final.mean((2, 3))


def condition_of(embeddings, level, generator):
    """Of standardised embeddings (B, D), noised as Stable unCLIP noises them, and what of them is left: (B, D + 1)."""
    noised = schedulers()[1].add_noise(embeddings, torch.randn(embeddings.shape, generator=generator), level)
    return torch.cat([noised, schedulers()[1].alphas_cumprod[level, None].sqrt()], 1)


def material(args, device):
    """Images (N, 3, 32, 32), their embeddings as they are and mirrored (N, 2, D), and what makes them."""
    root, path = Path(args.data), args.work / 'gan_embeddings.pt'
    images = read(sum((training_images(root, wnid) for wnid in (root / 'wnids.txt').read_text().split()
                       if wnid in CLASSES), []))
    visual = open_clip.create_model(f'local-dir:{HERE / "clip"}').visual.to(device).eval().requires_grad_(False)
    if not path.exists():
        save(path, embeddings_of(visual, images, device))
    return images, load(path), visual


def train(args, device):
    config, steps = KINDS[args.stage]
    batch, steps, path = args.batch_size or 64, args.steps or steps, args.work / f'{args.stage}.ckpt'
    images, embeddings, visual = material(args, device)
    mean, std = embeddings.mean((0, 1)), embeddings.std((0, 1))
    embeddings = (embeddings - mean) / std
    teacher = teacher_model(args, device)
    torch.manual_seed(args.seed)
    generator = BigGAN(**config).train()
    if 'feature' in config:
        generator.load_state_dict(dict(feature_mean=mean, feature_std=std), strict=False)
    generator.to(device, memory_format=torch.channels_last)
    for name, parameter in generator.named_parameters():
        if name.endswith(('gain.weight', 'bias.weight')):  # the norms' conditions: nearly none at first
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        channels = [m.shape[1] for m in look(teacher, torch.zeros(1, 3, 32, 32, device=device))[0]]
        some = torch.randint(len(images), (1024,), generator=torch.Generator().manual_seed(1))
        pooled = torch.cat([look(teacher, images[part].to(device) / 127.5 - 1)[1] for part in some.split(64)])
        centre, spread = pooled.mean(0), pooled.std(0).clamp_min(1e-3)
    discriminator = Discriminator(channels, config.get('feature', len(ORDER))).to(device)
    rate = 4e-4
    optimizers = [torch.optim.Adam(model.parameters(), rate, betas=(0., 0.99)) for model in (generator, discriminator)]
    average, step, seconds = {k: v.clone() for k, v in generator.state_dict().items()}, 0, 0.
    if path.exists():
        state = load(path)
        generator.load_state_dict(state['generator'])
        discriminator.load_state_dict(state['discriminator'])
        for optimizer, found in zip(optimizers, state['optimizers']):
            optimizer.load_state_dict(found)
        average, step, seconds = {k: v.to(device) for k, v in state['average'].items()}, state['step'], state['seconds']
        print(f'{args.stage}: going on at step {step} of {steps}')
    start, seen = time.time(), {}
    while step < steps:
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for optimizer in optimizers:
            optimizer.param_groups[0]['lr'] = rate * min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))
        indices = torch.randint(len(images), (batch,), generator=random)
        mirrored = torch.randint(2, (batch,), generator=random)
        uniform = torch.rand(2, batch, generator=random)
        level = torch.where(uniform[0] < 0.8, 500 * uniform[1].square(), 1000 * uniform[1]).long()  # as the UNet's
        z = torch.randn(batch, generator.chunks * generator.chunk, generator=random)
        if 'feature' in config:
            told, condition = batch, condition_of(embeddings[indices, mirrored], level, random).to(device)
            known = meant = condition
        else:                                            # three in four latents are of images, the others noise alone
            told, condition, share = batch * 3 // 4, None, 0.5 * uniform[0, :, None]
            known = share * z + (1 - share.square()).sqrt() * embeddings[indices, mirrored][:, ORDER]
            z = torch.cat([known[:told], z[told:]])
            known, meant = known.to(device), z.to(device)
        real = images[indices].to(device) / 127.5 - 1
        real = torch.where(mirrored[:, None, None, None].to(device) > 0, real.flip(3), real)
        with autocast(device):
            fake = generator(z.to(device), condition)
        shift = torch.randint(9, (2, batch), generator=random)
        with torch.no_grad():
            real_maps, real_pooled = look(teacher, real, shift)
        maps, pooled = look(teacher, fake.float(), shift)

        with autocast(device):
            kept = discriminator(real_maps, known).float()
            drawn = discriminator([m.detach() for m in maps], meant).float()
        loss = F.relu(1 - kept).mean() + F.relu(1 + drawn).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()

        discriminator.requires_grad_(False)
        with autocast(device):
            adversarial = -discriminator(maps, meant).float().mean()
        cosine = F.cosine_similarity(*((x[:told] - centre) / spread for x in (pooled, real_pooled))).mean()
        deep = slice(1 if 'feature' in config else 2, None)
        likeness = sum((F.normalize(a[:told], dim=1) - F.normalize(b[:told], dim=1)).square().sum(1).mean()
                       for a, b in zip(maps[deep], real_maps[deep])) / 2
        if 'feature' in config:                          # the embedding has a thumbnail of 8 x 8
            likeness = likeness + 5 * F.mse_loss(F.avg_pool2d(fake.float(), 4), F.avg_pool2d(real, 4))
            with autocast(device):
                again = visual(((fake.float() * 0.5 + 0.5) - MEAN.to(device)) / STD.to(device))
            standard = (again.float() - mean.to(device)) / std.to(device)
            echo = F.cosine_similarity(standard, embeddings[indices, mirrored].to(device)).mean()
            likeness = likeness + 10 * (1 - echo)
        optimizers[0].zero_grad()
        (adversarial + 10 * (1 - cosine) + likeness).backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)

        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        for key, value in generator.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        variety = (pooled[-told:].std(0).mean() / real_pooled[-told:].std(0).mean()).detach()  # 0: collapsed
        for name, value in (('discriminator', loss), ('adversarial', adversarial), ('cosine', cosine),
                            ('variety', variety), *([('echo', echo)] if 'feature' in config else [])):
            seen[name] = 0.98 * seen.get(name, value.item()) + 0.02 * value.item()
        if step % 50 == 0 or step == steps:
            spent = seconds + time.time() - start
            print(f'{args.stage} {step}/{steps}' + ''.join(f'  {k} {v:.3f}' for k, v in seen.items())
                  + f'  {spent:.0f} s', flush=True)
        if step % 200 == 0 or step == steps:
            save(path, dict(generator=generator.state_dict(), discriminator=discriminator.state_dict(), average=average,
                            optimizers=[optimizer.state_dict() for optimizer in optimizers], step=step,
                            seconds=seconds + time.time() - start))
            (HERE / args.stage).mkdir(exist_ok=True)
            (HERE / args.stage / 'config.json').write_text(json.dumps(config) + '\n')
            save_file({k: v.half().cpu().contiguous() for k, v in average.items()},
                      HERE / args.stage / 'model.safetensors')


if __name__ == '__main__':
    args = parser_of(__doc__, KINDS).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train(args, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
