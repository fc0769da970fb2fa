"""Mask-based views (GenCL section 3.2): MaskGIT draws most of an image's tokens anew, here all but the outer ring.

    generator = MaskGIT(spec, device)
    codes = generator.embed(images)                        # PIL images -> tokens of the VQGAN (B, N), in row order
    generator.views(codes, labels, seeds)                  # -> uint8 (B, H, W, 3) on the CPU

The networks are those of the PyTorch port (valeoai/Maskgit-pytorch at 5ce6c9e) and of taming-transformers, whose files
are read without running what these hold. GenCL used the official ones in JAX, of the same sizes; how that decodes is
the default here.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from diffusers import VQModel
from torch import nn

from common import precision_dtype
from config import Fail
from files import load_checkpoint, load_json
from gan import filled, renamed


# ---------------------------------------------------------------------------------------------------
# Networks

class Transformer(nn.Module):
    """Tokens (B, N) and labels (B,) -> logits of the codes (B, N, codes), under the port's names.

    Ids: codes 0..codes-1, then the mask, the classes and the null class (label `classes`), which stands for no label.
    The label's token comes last. Logits are cut to the codes: the port's code can draw the mask as well."""

    def __init__(self, codes, classes, tokens, width, depth, heads, hidden, dropout=0.1):
        super().__init__()
        self.codes, self.classes, ids = codes, classes, codes + 1 + classes + 1
        self.tok_emb = nn.Embedding(ids, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.bias = nn.Parameter(torch.zeros(tokens + 1, ids))
        norm = lambda: nn.LayerNorm(width, eps=1e-12)
        self.first_layer = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
                                         norm(), nn.Dropout(dropout), nn.Linear(width, width))
        block = lambda name, part: nn.ModuleDict({'norm': nn.LayerNorm(width), 'fn': nn.ModuleDict({name: part})})
        self.transformer = nn.ModuleDict({'layers': nn.ModuleList(nn.ModuleList([
            block('mha', nn.MultiheadAttention(width, heads, dropout, batch_first=True)),
            block('net', nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
                                       nn.Linear(hidden, width), nn.Dropout(dropout)))]) for _ in range(depth))})
        self.last_layer = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), norm())

    def forward(self, tokens, labels):
        x = self.tok_emb(torch.cat([tokens, self.codes + 1 + labels[:, None]], 1)) + self.pos_emb
        x = self.first_layer(x)
        for attention, mlp in self.transformer['layers']:
            h = attention['norm'](x)
            x = x + attention['fn']['mha'](h, h, h, need_weights=False)[0]
            x = x + mlp['fn']['net'](mlp['norm'](x))
        x = self.last_layer(x[:, :-1])
        return x @ self.tok_emb.weight[:self.codes].T + self.bias[:-1, :self.codes]


def load_transformer(path, codes):
    """Transformer of the port's MaskGIT_ImageNet_256.pth (or 512), or of a folder: transformer.safetensors and a
    config.json with `heads` and `classes`, which no shape tells. codes: of its VQGAN. Raises Fail."""
    path, heads, classes = Path(path), 16, 1000
    if path.is_dir():
        config = load_json(path / 'config.json')
        heads, classes, path = config.get('heads'), config.get('classes'), path / 'transformer.safetensors'
        if not all(type(value) is int and value > 0 for value in (heads, classes)):
            raise Fail(f'{path.parent}/config.json: heads and classes must be whole numbers above 0')
    state = load_checkpoint(path)
    try:
        state = {key: value.float() for key, value in state.get('model_state_dict', state).items()}
        (ids, width), tokens = state['tok_emb.weight'].shape, state['pos_emb'].shape[1] - 1
        depth = len({key.split('.')[2] for key in state if key.startswith('transformer.layers.')})
        hidden = len(state['transformer.layers.0.1.fn.net.0.bias'])
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        raise Fail(f'{path}: holds no transformer of MaskGIT (tok_emb.weight, pos_emb, ...)') from None
    if ids != codes + classes + 2:
        raise Fail(f'{path}: has {ids - classes - 2} codes beside {classes} classes, its VQGAN {codes}: they do not '
                   'belong together; set generator.mask.vqgan to the one that it was trained with')
    if math.isqrt(tokens) ** 2 != tokens:
        raise Fail(f'{path}: its {tokens} tokens are no square grid; give a MaskGIT of square images')
    return filled(path, lambda: Transformer(codes, classes, tokens, width, depth, heads, hidden), state)


class _Callback:
    """Stands for the class that a Lightning checkpoint names beside its weights: none of its code runs."""


TAMING = (  # from taming-transformers' names to those of diffusers, but for the decoder's levels, which count down
    (r'\.down\.(\d)\.', r'.down_blocks.\1.'), (r'\.block\.(\d)\.', r'.resnets.\1.'), (r'\.attn\.', '.attentions.'),
    (r'\.(down|up)sample\.', r'.\1samplers.0.'), (r'\.mid\.block_1\.', '.mid_block.resnets.0.'),
    (r'\.mid\.block_2\.', '.mid_block.resnets.1.'), (r'\.mid\.attn_1\.', '.mid_block.attentions.0.'),
    (r'(attentions\.\d\.)([qkv])\.', r'\1to_\2.'), (r'\.proj_out\.', '.to_out.0.'),
    (r'(attentions\.\d\.)norm\.', r'\1group_norm.'), ('nin_shortcut', 'conv_shortcut'), ('norm_out', 'conv_norm_out'))


def _taming(path):
    """Arguments of VQModel and its state, of a checkpoint of taming-transformers (model.yaml is not needed)."""
    names = [f'{module}.callbacks.model_checkpoint.ModelCheckpoint' for module in ('pytorch_lightning',
                                                                                   'lightning.pytorch')]
    with torch.serialization.safe_globals([(_Callback, name) for name in names]):
        found = load_checkpoint(path)
    try:
        found = {key: value.float() for key, value in found.get('state_dict', found).items()
                 if not key.startswith('loss.')}
        levels = len({key.split('.')[2] for key in found if key.startswith('encoder.down.')})
        attention = ['Attn' * (f'encoder.down.{i}.attn.0.q.weight' in found) for i in range(levels)]
        (codes, embedding), latent = found['quantize.embedding.weight'].shape, found['quant_conv.weight'].shape[1]
        config = dict(
            block_out_channels=[len(found[f'encoder.down.{i}.block.0.conv1.bias']) for i in range(levels)],
            layers_per_block=len({key for key in found if re.match(r'encoder\.down\.0\.block\.\d\.conv1\.bias', key)}),
            down_block_types=[f'{name}DownEncoderBlock2D' for name in attention],
            up_block_types=[f'{name}UpDecoderBlock2D' for name in reversed(attention)],
            latent_channels=latent, num_vq_embeddings=codes, vq_embed_dim=embedding)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        raise Fail(f'{path}: holds no VQGAN of taming-transformers (encoder.down, quantize.embedding, ...)') from None
    up = (r'\.up\.(\d)\.', lambda m: f'.up_blocks.{levels - 1 - int(m[1])}.')
    return config, {name: value.flatten(1) if re.search(r'attentions\.\d\.to_.*weight$', name) else value
                    for name, value in renamed(found, (up, *TAMING)).items()}


def load_vqgan(path):
    """diffusers' VQModel of taming's last.ckpt, or of a folder in diffusers' layout. Raises Fail."""
    path = Path(path)
    if path.is_dir():
        config = {k: v for k, v in load_json(path / 'config.json').items() if not k.startswith('_')}
        state = load_checkpoint(path / 'diffusion_pytorch_model.safetensors')
    else:
        config, state = _taming(path)
    return filled(path, lambda: VQModel(**config), state)


# ---------------------------------------------------------------------------------------------------
# Masks and decoders

def token_mask(side, border, share, block, numbers):
    """Which tokens are drawn anew: bool (B, side * side), the same number in every row.

    The outer `border` rings are kept. Of the tokens inside, `share` is masked: random ones, or where `block` is true a
    square at a random place. numbers (B, side * side): uniform in [0, 1)."""
    inner, at = max(0, side - 2 * border), torch.arange(side)
    if block:
        edge = round(inner * share ** 0.5)
        first = border + (numbers[:, :2, None] * (inner - edge + 1)).long()
        down, across = ((at >= first) & (at < first + edge)).unbind(1)
        return (down[:, :, None] & across[:, None]).flatten(1)
    inside = (at >= border) & (at < side - border)
    order = numbers.masked_fill(~(inside[:, None] & inside).flatten(), 2).argsort(1)
    return torch.zeros(numbers.shape, dtype=torch.bool).scatter(1, order[:, :round(share * inner ** 2)], True)


def schedule(decoder, masked, tokens, steps):
    """How many of the `masked` ones of `tokens` tokens each step settles.

    official: after step i of T, floor(masked * cos(pi / 2 * i / T)) are left, at least one (parallel_decode.py, whose
    fp32 has cos(60 degrees) just below a half: where T is a multiple of 3 it may leave one less there).
    port: arccos shares of all tokens, whatever is masked, until none is left (adap_sche and sample of the port)."""
    left = [masked]
    if decoder == 'official' or steps == 1:
        for i in range(1, steps):
            left.append(max(1, min(left[-1] - 1, math.floor(masked * math.cos(math.pi / 2 * i / steps)))))
        return [a - b for a, b in zip(left, [*left[1:], 0])]
    shares = torch.linspace(1, 0, steps).arccos() / (math.pi / 2)
    counts = (shares / shares.sum() * tokens).round().clamp(min=1)
    counts[-1] += tokens - counts.sum()
    for count in counts.int().tolist():
        left.append(left[-1] - max(0, min(count, left[-1])))
    return [a - b for a, b in zip(left, left[1:])]


def decode(tokens, codes, predict, numbers, decoder='official', temperature=4.5, sharpness=1.0):
    """Tokens (B, N) with the id `codes` where they are to be drawn, in as many places of every row -> (B, N) filled in.

    Each step draws all that is left from predict(tokens, progress in 0..1) -> logits (B, N, codes), and keeps the most
    confident: log probability + temperature * cooling * Gumbel noise. Cooling falls to 0 from 1 - 1 / T (official,
    libml/parallel_decode.py) or from 1 (port, Trainer/vit.py). sharpness: factor of the logits, the port's sm_temp.
    numbers (B, T, 2, N): uniform in [0, 1), for the draws and the noise of T steps."""
    steps = numbers.shape[1]
    for i, count in enumerate(schedule(decoder, int((tokens[0] == codes).sum()), tokens.shape[1], steps)):
        if not count:
            continue
        progress = i / max(1, steps - 1)
        chances = (predict(tokens, progress) * sharpness).softmax(2)
        total = chances.cumsum(2)
        drawn = torch.searchsorted(total, numbers[:, i, 0, :, None] * total[..., -1:], right=True)
        drawn = drawn.clamp(max=codes - 1)  # where the product is rounded up
        noise = -(-numbers[:, i, 1].clamp(min=1e-9).log()).log()
        cooling = 1 - ((i + 1) / steps if decoder == 'official' else progress)
        confidence = chances.gather(2, drawn)[..., 0].clamp(min=1e-37).log() + temperature * cooling * noise
        best = confidence.masked_fill(tokens != codes, -math.inf).topk(count, 1).indices
        tokens = tokens.scatter(1, best, drawn[..., 0].gather(1, best))
    return tokens


# ---------------------------------------------------------------------------------------------------
# The generator

class MaskGIT:
    """Views of which MaskGIT draws the masked tokens and keeps the others (GenCL section 3.2).

    spec: the keys of `generator` in gen_views.py: `model` (the transformer's file, or a folder that has the VQGAN in
    vqgan/), `precision`, `mask`. classes: how many the images have; with mask.labels they are the model's.
    Attributes: side (tokens), resolution (pixels), masked (tokens). Raises Fail for what does not fit together.

    All that is random about a view comes from its seed, on the CPU. The encoder runs in fp32, as codes are discrete."""

    def __init__(self, spec, device, classes):
        self.spec, self.device, self.name = spec['mask'], device, spec['model']
        automatic = spec['precision'] == 'auto' and device.type == 'cuda'  # the port's autocast is fp16
        self.dtype = precision_dtype('fp16' if automatic else spec['precision'], device)
        folder, vqgan = Path(self.name), self.spec['vqgan']
        if not vqgan and not folder.is_dir():
            raise Fail(f'generator.mask.vqgan: {self.name} needs the file of its VQGAN (last.ckpt)')
        vqgan = Path(vqgan or folder / 'vqgan')
        self.vqgan = load_vqgan(vqgan)
        self.transformer = load_transformer(folder, self.vqgan.config.num_vq_embeddings)
        for path, network in ((vqgan, self.vqgan), (folder, self.transformer)):
            if not all(value.isfinite().all() for value in network.state_dict().values()):
                raise Fail(f'{path}: its weights are not finite; copy or download it again')
            network.to(device)
        self.tokens = self.transformer.pos_emb.shape[1] - 1
        self.side = math.isqrt(self.tokens)
        self.resolution = self.side << len(self.vqgan.config.block_out_channels) - 1
        if vqgan.is_dir() and self.vqgan.config.sample_size != self.resolution:
            raise Fail(f'{vqgan}: its images of {self.vqgan.config.sample_size} px (sample_size) do not give the '
                       f'{self.side} x {self.side} tokens of {folder}, but images of {self.resolution} px')
        if self.spec['labels'] and classes != self.transformer.classes:
            raise Fail(f'generator.mask.labels: the images have {classes} classes, {folder} knows '
                       f'{self.transformer.classes}; set it to false')
        self.masked = int(self._masks(torch.zeros(1, self.tokens)).sum())
        if not 0 < self.masked < self.tokens:
            raise Fail(f'generator.mask: keep_border and share leave {self.tokens - self.masked} of the '
                       f'{self.side} x {self.side} tokens: a view needs some that are kept and some that are drawn')

    def _masks(self, numbers):
        return token_mask(self.side, *(self.spec[key] for key in ('keep_border', 'share', 'block')), numbers)

    @torch.no_grad()
    def embed(self, images):
        """Codes (B, N) of PIL images: of their middle square."""
        size = (self.resolution, self.resolution)
        pixels = np.stack([np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR)) for image in images])
        pixels = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2) / 127.5 - 1
        return self.vqgan.quantize(self.vqgan.encode(pixels).latents)[2][2].view(len(images), -1)

    @torch.no_grad()
    def views(self, codes, labels, seeds):
        """One view for each row. codes (B, N) of `embed`, labels (B,), seeds B ints -> uint8 (B, H, W, 3) on the CPU.

        What is not finite in half precision is drawn once more in fp32; a view that stays so is black."""
        labels = torch.as_tensor(labels, device=self.device)
        labels = labels if self.spec['labels'] else torch.full_like(labels, self.transformer.classes)
        images = self._draw(codes, labels, seeds, self.dtype)
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all() and self.dtype != torch.float32:
            for k in (~finite).nonzero().flatten().tolist():  # one by one: what else failed must not matter
                images[k] = self._draw(codes[k:k + 1], labels[k:k + 1], seeds[k:k + 1], torch.float32)[0]
            finite = images.isfinite().flatten(1).all(1)
        images = torch.where(finite[:, None, None, None], images, 0)
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _draw(self, codes, labels, seeds, dtype):
        """-> float32 (B, 3, H, W) in 0..1, NaN where anything was not finite."""
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device
        masks = self._masks(torch.stack([torch.rand(self.tokens, generator=g) for g in draws])).to(self.device)
        numbers = torch.stack([torch.rand(self.spec['steps'], 2, self.tokens, generator=g) for g in draws])
        finite, network = torch.ones(len(seeds), dtype=torch.bool, device=self.device), self.transformer

        def predict(tokens, progress):
            logits = network(tokens, labels).float()
            if self.spec['guidance'] and progress:  # classifier-free, its weight rising from 0
                free = network(tokens, torch.full_like(labels, network.classes)).float()
                logits = logits + self.spec['guidance'] * progress * (logits - free)
            finite.logical_and_(logits.isfinite().flatten(1).all(1))
            return logits

        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            codes = decode(codes.masked_fill(masks, network.codes), network.codes, predict, numbers.to(self.device),
                           *(self.spec[key] for key in ('decoder', 'temperature', 'sharpness')))
            entries = self.vqgan.quantize.get_codebook_entry(codes.flatten(), (len(codes), self.side, self.side, -1))
            images = self.vqgan.decoder(self.vqgan.post_quant_conv(entries)).float()
        finite &= images.isfinite().flatten(1).all(1)  # clamp would hide what is infinite
        return torch.where(finite[:, None, None, None], (images.clamp(-1, 1) + 1) / 2, torch.nan)
