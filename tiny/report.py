"""What the embedded models make of CIFAR-10, which none of them has seen: the tables of tiny/README.md, views.png,
foreground.png.

    python tiny/report.py --judge resnet56-4bfd9763.th                                   # the numbers
    python tiny/report.py --judge resnet56-4bfd9763.th --pictures tiny                   # and both pictures
    python tiny/report.py --foreground tiny/clip tiny/quality --folder imagenette/val    # the foregrounds of any CLIP

Where --work holds what `tiny/train.py prepare` computed, the encoder is measured on Tiny-ImageNet too.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from train import HERE, MEAN, STD, least_squares, load

sys.path.insert(0, str(HERE.parent))
from fg_proportion import choose_sign, first_component, position_share  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from generators import UnCLIP  # noqa: E402
from sources import source_dataset  # noqa: E402


def published_judge(path, device):
    """ResNet-56 for CIFAR-10 (He et al. 2016, shortcuts without weights), github.com/akamaster/pytorch_resnet_cifar10:
    a classifier that had no part in any of this. Returns a function (N, 3, 32, 32) in [0, 1] -> class scores (N, 10),
    features (N, 64)."""
    weights = {k.removeprefix('module.'): v.to(device) for k, v in load(path)['state_dict'].items()}
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))

    def convolve(x, name, number, stride=1):
        x = F.conv2d(x, weights[f'{name}conv{number}.weight'], stride=stride, padding=1)
        return F.batch_norm(x, *(weights[f'{name}bn{number}.{key}'] for key in (
            'running_mean', 'running_var', 'weight', 'bias')))

    def forward(x):
        x = F.relu(convolve((x.to(device) - mean) / std, '', 1))
        for stage in (1, 2, 3):
            for block in range(9):
                name, stride = f'layer{stage}.{block}.', 2 if stage > 1 and block == 0 else 1
                y = convolve(F.relu(convolve(x, name, 1, stride)), name, 2)
                if stride == 2:
                    x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                x = F.relu(x + y)
        features = x.mean((2, 3))
        return (features @ weights['linear.weight'].T + weights['linear.bias']).cpu(), features.cpu()

    return lambda x: tuple(torch.cat(parts) for parts in zip(*map(forward, x.split(250))))


def foreground_figures(maps, images):
    """Whether a foreground follows its subject or its place. maps(images) -> projections (N, H, W), large on the
    foreground, of which 40 % of all tokens are made; images (N, 3, S, S). Returns a dict:
    position: share of the projections' variance that the token's position alone explains,
    fixed_mask: share of the decisions that one mask, the best for all images, gets right,
    flipped, rolled: images upside down, and rolled by half their size along both axes: correlation of the new maps with
        the old ones at the same place, and with the old ones moved along,
    deviation: standard deviation over the images of the foreground proportion."""
    def correlation(a, b):
        return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()

    half = images.shape[2] // 2
    old = maps(images)
    foreground = old > torch.quantile(old.flatten().double(), 0.6)
    share = foreground.float().mean(0)
    found = dict(position=position_share(old).item(), fixed_mask=torch.maximum(share, 1 - share).mean().item(),
                 deviation=foreground.float().mean((1, 2)).std().item())
    shift = (old.shape[1] // 2, old.shape[2] // 2)
    for name, new, along in (('flipped', images.flip(2), old.flip(1)),
                             ('rolled', torch.roll(images, (half, half), (2, 3)), torch.roll(old, shift, (1, 2)))):
        new = maps(new)
        found[name] = correlation(new, old), correlation(new, along)
    return found


@torch.no_grad()
def foregrounds(args, device):
    """Prints foreground_figures of encoders on args.count images of CIFAR-10 and of a folder."""
    sources = {'CIFAR-10': dict(name='CIFAR10', root='data/cifar10', split='train', download=True, subset=args.count)}
    if args.folder:
        sources[args.folder] = dict(name='folder', root=args.folder, split='train', download=False, subset=args.count)
    print('| encoder | images | position explains | one mask gets right | upside down: same place / moved along | '
          'rolled by half: same place / moved along | deviation of the proportion |\n|---|---|---|---|---|---|---|')
    for model in args.foreground:
        clip = FrozenClip({'model': model.split(':')[0], 'pretrained': (model.split(':') + [None])[1]}, device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
        for name, spec in sources.items():
            source = source_dataset(spec)
            x = torch.stack([clip.preprocess(source[i][0]) for i in range(len(source))])

            def tokens(images):
                return torch.cat([clip.tokens(part.to(device)).float().cpu() for part in images.split(50)])
            pc, sign = component(tokens(x))[:2]
            found = foreground_figures(lambda images: sign * torch.einsum('bkhw,k->bhw', tokens(images), pc), x)
            (a, b), (c, d) = found['flipped'], found['rolled']
            print(f"| {model} | {len(x)} of {name} | {found['position']:.2f} | {found['fixed_mask']:.0%} | "
                  f"{a:.2f} / {b:.2f} | {c:.2f} / {d:.2f} | {found['deviation']:.2f} |", flush=True)


def component(tokens):
    """tokens (N, K, H, W) -> their first component (K,), its sign, its share of the variance and why that sign."""
    flat = tokens.permute(0, 2, 3, 1).reshape(-1, tokens.shape[1]).double()
    pc, _, covariance = first_component(len(flat), flat.sum(0).numpy(), (flat.T @ flat).numpy())
    explained, pc = pc @ covariance @ pc / np.trace(covariance), torch.from_numpy(pc).float()
    sign, why = choose_sign(torch.einsum('bkhw,k->bhw', tokens, pc).numpy(), 0.4)
    return pc, sign, explained, why


@torch.no_grad()
def report(args, device):
    """The class of a view is judged by a published ResNet-56, and so is the distance of features."""
    clip, quality = (FrozenClip({'model': str(HERE / name)}, device) for name in ('clip', 'quality'))
    mean, std = MEAN.to(device), STD.to(device)

    def encode(images, clip=clip):
        """(N, 3, 32, 32) in [0, 1] -> tokens (N, K, 8, 8), embeddings (N, D)"""
        parts = (clip.forward((part.to(device) - mean) / std) for part in images.split(250))
        return tuple(torch.cat(p).float().cpu() for p in zip(*parts))

    if (args.work / 'data.pt').exists():
        data = load(args.work / 'data.pt')
        for name, encoder in (('quality', quality), ('clip', clip)):
            known, unknown = (torch.cat([encode(part.float() / 255, encoder)[1] for part in images.split(1000)])
                              for images in (data['images'][::4], data['val']))
            probe = least_squares(known, data['labels'][::4], unknown, data['val_labels'])
            print(f'{name}, Tiny-ImageNet validation: linear probe {probe:.3f}', flush=True)
        tower = open_clip.create_model(f'local-dir:{HERE / "clip"}').eval()
        names = [words.split(',')[0] for words in data['words']]
        directions = tower.encode_text(open_clip.get_tokenizer(f'local-dir:{HERE / "clip"}')(names), normalize=True)
        zero_shot = ((F.normalize(unknown, dim=1) @ directions.T).argmax(1) == data['val_labels']).float().mean()
        print(f'clip, Tiny-ImageNet validation: zero-shot {zero_shot:.3f}', flush=True)

    source = source_dataset(dict(name='CIFAR10', root='data/cifar10', split='train', download=True, subset=args.count))
    x = torch.from_numpy(np.stack([np.asarray(source[i][0]) for i in range(args.count)])).permute(0, 3, 1, 2) / 255
    labels, judge = torch.from_numpy(source.labels), published_judge(args.judge, device)
    tokens, embeddings = encode(x)

    pc, sign, explained, why = component(tokens)
    projection = torch.einsum('bkhw,k->bhw', tokens, pc)
    print(f'foreground: the component has {explained:.0%} of the variance; {why}')
    bright = (sign * projection > torch.quantile(sign * projection.flatten(), 0.6)).float()
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:64]
    mask = F.interpolate(bright[some, None], scale_factor=4)
    overlay = x[some] * (0.2 + 0.8 * mask) + (1 - mask) * torch.tensor([0., .05, .3]).view(3, 1, 1)
    rows = [torch.cat(list(part[start:start + 16]), 2) for start in range(0, 64, 16) for part in (x[some], overlay)]
    picture(torch.cat(rows, 1), args.pictures, 'foreground.png')

    generator = UnCLIP(dict(model=str(HERE / 'unclip'), fallbacks=[], steps=20, guidance_scale=1.0,
                            precision='bf16' if device.type == 'cpu' else 'fp16'), device)
    vae = generator.pipeline.vae
    decoded = torch.cat([vae.decode(vae.encode(part.to(device, vae.dtype) * 2 - 1).latents).sample.float().cpu()
                         for part in x.split(250)]).clamp(-1, 1) / 2 + 0.5
    psnr = -10 * torch.log10((decoded - x).square().mean((1, 2, 3))).mean()
    scores, features = judge(x)
    kept = (scores.argmax(1) == labels).float().mean(), (judge(decoded)[0].argmax(1) == labels).float().mean()
    print(f'autoencoder: {psnr:.1f} dB; class found on originals {kept[0]:.3f}, on reconstructions {kept[1]:.3f}')

    columns = {}
    for scale in args.guidance:
        generator.guidance_scale = scale
        for level in (0, 100, 200, 300, 400):
            def draw(number, seed):
                parts = [slice(at, min(at + 100, number)) for at in range(0, number, 100)]
                views = np.concatenate([generator.views(embeddings[p], [level] * len(x[p]), [
                    seed + i for i in range(p.start, p.stop)]) for p in parts])
                return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255

            start = time.time()
            views = draw(len(x), 0)
            rate = len(x) / (time.time() - start)
            again = draw(len(x) // 5, 1_000_000)  # other noise: how unlike are two views of the same image?
            columns[scale, level] = views
            seen, found = judge(views)
            second, other = views[:len(again)], judge(again)[1]
            print(f'guidance {scale}  level {level}: class kept {(seen.argmax(1) == labels).float().mean():.3f}  to '
                  f'the source: CLIP cosine {F.cosine_similarity(encode(views)[1], embeddings).mean():.3f}  '
                  f'pixels {rms(views, x):.1f}  features {(found - features).norm(dim=1).mean():.2f}  between two '
                  f'views: CLIP cosine {F.cosine_similarity(encode(second)[1], encode(again)[1]).mean():.3f}  '
                  f'pixels {rms(second, again):.1f}  features {(found[:len(again)] - other).norm(dim=1).mean():.2f}  '
                  f'{rate:.1f} views/s', flush=True)
            print('  class kept, of class 0 to 9: ' + ' '.join(
                f'{(seen.argmax(1) == labels)[labels == c].float().mean():.2f}' for c in range(10)), flush=True)

    rows = torch.arange(0, len(x), len(x) // 20)[:20]
    picture(torch.cat([torch.cat([part[i] for i in rows], 2) for part in (x, decoded, *(
        columns[args.guidance[-1], level] for level in (0, 100, 200, 300, 400)))], 1), args.pictures, 'views.png')


def rms(a, b):
    """Mean over the images of the root mean squared difference of pixels, of 255."""
    return ((a - b).square().mean((1, 2, 3)).sqrt().mean() * 255).item()


def picture(pixels, folder, name):
    if folder is None:
        return
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(folder / name)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--judge', default='resnet56-4bfd9763.th', help='classifier of CIFAR-10')
    parser.add_argument('--count', type=int, default=2000, help='how many images are judged')
    parser.add_argument('--guidance', type=float, nargs='+', default=[2.0], help='guidance scales')
    parser.add_argument('--pictures', type=Path, default=None, help='folder for views.png and foreground.png')
    parser.add_argument('--work', type=Path, default=Path('runs/tiny'), help='folder of tiny/train.py')
    parser.add_argument('--foreground', nargs='+', metavar='CLIP', help='encoders (folder, or architecture:hub tag) of '
                        'which to measure, in place of all else, whether their foreground follows the subject')
    parser.add_argument('--folder', default=None, help='of images, for --foreground beside CIFAR-10')
    arguments = parser.parse_args()
    (foregrounds if arguments.foreground else report)(
        arguments, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
