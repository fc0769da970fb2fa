"""The view generators, behind one small interface:

    generator = UnCLIP(spec, device)
    generator.views(embeddings (B, D), noise_levels (B,), seeds [int] * B) -> uint8 (B, H, W, 3) on the CPU

`seeds` decide everything random: the view of an image does not depend on what else is in its batch. Retrieval, which
generates nothing, takes pairs (index of the image, number of the view) in their place. A generator with classes is
given labels (B,) too.
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import logging as diffusers_logging
from torchvision.transforms.functional import center_crop, resize, to_tensor
from transformers.utils import logging as transformers_logging

import gan
from checkpoints import NORMALIZATIONS, load_backbone
from common import precision_dtype
from config import Fail
from files import damage, load_arrays, unreadable
from sources import same_images, source_dataset
from start import say

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()  # it remarks on every autoencoder but AutoencoderKL
transformers_logging.disable_progress_bar()


class _Pipeline(StableUnCLIPImg2ImgPipeline):
    """Stable unCLIP that is given each sample's noised condition: the published one takes one noise level a call."""

    def _encode_image(self, image_embeds, do_classifier_free_guidance, **_):
        if do_classifier_free_guidance:  # the unconditional half is zeros, as in the published pipeline
            image_embeds = torch.cat([torch.zeros_like(image_embeds), image_embeds])
        return image_embeds


class UnCLIP:
    """Stable unCLIP (GenView eq. 5): an image drawn from noise and a noised CLIP embedding, with an empty prompt.

    spec: `model` (local folder in diffusers' layout, or a hub id, which is downloaded), `fallbacks` (further ids tried
    in turn), `steps`, `guidance_scale`, `precision` ('auto', 'fp32', 'bf16', 'fp16'); and, where wanted, `condition`
    ('pipeline': load its image encoder, for `embed`), `vae_slicing` (decode one image after the other: less memory),
    `compile` (torch.compile of the UNet; give batches of one size).
    """

    def __init__(self, spec, device):
        self.device, self.steps, self.guidance_scale = device, spec['steps'], float(spec['guidance_scale'])
        automatic = spec['precision'] == 'auto' and device.type == 'cuda'  # the published weights are fp16
        self.dtype = precision_dtype('fp16' if automatic else spec['precision'], device)
        self.own_encoder = spec.get('condition') == 'pipeline'
        self.pipeline, self.name = self._load([spec['model'], *spec['fallbacks']])
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.pipeline.unet, self.pipeline.vae):
            part.to(device, memory_format=torch.channels_last if device.type == 'cuda' else torch.contiguous_format)
        self.pipeline.image_normalizer.to(device)
        if self.own_encoder:
            self.pipeline.image_encoder.to(device)
        if spec.get('vae_slicing'):
            self.pipeline.vae.enable_slicing()
        self.embedding_dim = self.pipeline.image_normalizer.mean.shape[1]
        unet = self.pipeline.unet.config
        if unet.projection_class_embeddings_input_dim != 2 * self.embedding_dim:
            raise Fail(f'{self.name}: its UNet takes a condition of {unet.projection_class_embeddings_input_dim}, its '
                       f'normalizer gives 2 x {self.embedding_dim}: not a Stable unCLIP image-variation model')
        self.latent_shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        # The prompt is the empty string for every image (GenView appendix A): encode it once, then the encoder may go.
        with torch.no_grad():
            self.pipeline.text_encoder.to(device)
            self.prompt = self.pipeline.encode_prompt('', device, 1, False)[0]
        self.pipeline.text_encoder = None
        if spec.get('compile'):
            self.pipeline.unet.compile(dynamic=False)

    def _load(self, names):
        problems = []
        needed = ['unet', 'vae', 'scheduler', 'text_encoder', 'tokenizer', 'image_normalizer',
                  'image_noising_scheduler', *(['image_encoder', 'feature_extractor'] if self.own_encoder else [])]
        for name in names:
            folder = Path(name)
            if folder.is_dir() and not (folder / 'model_index.json').is_file():
                raise Fail(f'{folder}: holds no model_index.json; give a folder in the layout of diffusers')
            try:
                if folder.is_dir():  # diffusers would not say which one
                    index = json.loads((folder / 'model_index.json').read_text(encoding='utf-8'))
                    absent = [part for part in needed
                              if not (index.get(part) or [None])[-1] or not (folder / part).is_dir()]
                    if absent:
                        raise ValueError(f"lacks {', '.join(absent)}; download the whole folder")
                # The condition comes from stage 1 (fg_proportion.py), so that the image encoder is not needed.
                unused = {} if self.own_encoder else dict(image_encoder=None, feature_extractor=None)
                load = partial(_Pipeline.from_pretrained, name, dtype=self.dtype, **unused)
                try:  # what was fetched before: no task need ask the hub, or wait for one that it cannot reach
                    pipeline = load(local_files_only=True)
                except Exception:
                    if folder.is_dir():
                        raise
                    pipeline = load()
            except Exception as error:
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                files = [file for part in ('', *needed) for file in sorted((folder / part).glob('*'))]
                damaged = [unreadable(file, error) for file in files
                           if file.suffix in ('.json', '.safetensors', '.bin') and damage(file)[0]]
                problems.append(str(damaged[0]) if damaged else f'{name}: {type(error).__name__}: {reason[:150]}')
                continue
            if problems:
                say(f"generator.model: {'; '.join(problems)}; {name} stands in", sys.stderr)
            return pipeline, str(name)
        raise Fail('generator.model cannot be loaded: ' + '; '.join(problems))

    def condition(self, embeddings, noise_levels, noise):
        """noisy(c, l) of GenView eq. 5 and the level's embedding: (B, D), (B,), (B, D) -> (B, 2 D).

        What StableUnCLIPImg2ImgPipeline.noise_image_embeddings does, with a level for each sample."""
        normalizer, scheduler = self.pipeline.image_normalizer, self.pipeline.image_noising_scheduler
        noised = scheduler.add_noise(normalizer.scale(embeddings), noise, noise_levels)
        level = get_timestep_embedding(noise_levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([normalizer.unscale(noised), level.to(embeddings.dtype)], 1)

    @torch.no_grad()
    def embed(self, images):
        """The pipeline's own condition of PIL images: (B, D) float32, projected and not normalised, on the CPU."""
        pixels = self.pipeline.feature_extractor(images=images, return_tensors='pt').pixel_values
        return self.pipeline.image_encoder(pixels.to(self.device, self.dtype)).image_embeds.float().cpu().numpy()

    @torch.no_grad()
    def views(self, embeddings, noise_levels, seeds):
        """One view for each row. embeddings (B, D), noise_levels (B,) in 0..999, seeds B ints -> uint8 (B, H, W, 3).

        What is not finite in half precision is drawn once more in fp32; a view that stays so is black."""
        rows = (torch.as_tensor(np.asarray(embeddings, np.float32)),
                torch.as_tensor(np.asarray(noise_levels, np.int64)), seeds)
        images = self._draw(*rows)
        finite = torch.isfinite(images).flatten(1).all(1)
        if not finite.all() and self.dtype != torch.float32:
            half = self.dtype
            try:
                self._cast(torch.float32)
                for k in (~finite).nonzero().flatten().tolist():  # one by one: what else failed must not matter
                    images[k] = self._draw(*(row[k:k + 1] for row in rows))[0]
            finally:
                self._cast(half)  # half -> fp32 -> half gives the same weights
            finite = torch.isfinite(images).flatten(1).all(1)
        images = torch.where(finite[:, None, None, None], images, 0)
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _cast(self, dtype):
        for part in (self.pipeline.unet, self.pipeline.vae, self.pipeline.image_normalizer):
            part.to(dtype)
        self.prompt, self.dtype = self.prompt.to(dtype), dtype

    def _draw(self, embeddings, noise_levels, seeds):
        """-> float32 (B, 3, H, W) in 0..1."""
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device
        noise = torch.stack([torch.randn(self.embedding_dim, generator=g) for g in draws])
        latents = torch.stack([torch.randn(self.latent_shape, generator=g) for g in draws])
        to = dict(device=self.device, dtype=self.dtype)
        return self.pipeline(
            prompt_embeds=self.prompt.expand(len(seeds), -1, -1),
            negative_prompt_embeds=self.prompt.expand(len(seeds), -1, -1),
            image_embeds=self.condition(embeddings.to(**to), noise_levels.to(self.device), noise.to(**to)),
            latents=latents.to(**to) * self.pipeline.scheduler.init_noise_sigma, num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale, output_type='pt').images.float()


class ICGAN:
    """IC-GAN (Casanova et al. 2021), the generator of GenCL's noise-based views (section 3.1): an image from a latent
    and the feature of the image whose neighbour it draws.

    spec: `model` (G_ema_best0.pth or G_ema_best1.pth, or the folder of an embedded one: see gan.icgan), and in `noise`
    `truncation` t (normal latents cut off at +-2 t and left at their scale, as in the official demo with 0.7; 0: not
    cut off, as in the official evaluation); with `condition: pipeline` also `noise.extractor`, for `embed`: a file of a
    ResNet-50. The published ones were trained on the features of SwAV's, those with classes on torchvision's
    supervised one."""

    def __init__(self, spec, device):
        self.device, self.truncation, self.dtype = device, spec['noise']['truncation'], torch.float32
        self.network, self.name = gan.icgan(spec['model']).to(device), spec['model']
        self.levels, self.classes, self.side = self.network.levels, self.network.classes, self.network.resolution
        self.embedding_dim = self.network.feature - self.levels
        self.alphas = DDPMScheduler(beta_schedule='squaredcos_cap_v2').alphas_cumprod.to(device)
        if spec['condition'] == 'pipeline':
            self._load_extractor(spec['noise']['extractor'])

    def _load_extractor(self, path):
        self.extractor, known = load_backbone(path)
        self.extractor.to(self.device).requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in NORMALIZATIONS['imagenet'])
        if known['feature_dim'] != self.embedding_dim:
            raise Fail(f"generator.noise.extractor: {path}: {known['text']} gives {known['feature_dim']} features, "
                       f'{self.name} wants {self.embedding_dim}; give the ResNet-50 that it was trained with')
        swav = 'layout of SwAV' in known['note']
        if Path(self.name).is_file() and swav == bool(self.classes):
            wanted = "torchvision's supervised ResNet-50" if swav else 'swav_800ep_pretrain.pth.tar'
            raise Fail(f"generator.noise.extractor: {path}: is {'' if swav else 'not '}SwAV's ResNet-50, and "
                       f"{self.name} {'has' if swav else 'has no'} classes: its features are those of {wanted}")

    @torch.no_grad()
    def embed(self, images):
        """Features of PIL images as the official make_hdf5.py has them: what the generator's resolution shows of the
        middle square, at 224 px. (B, D) float32, not normalised, on the CPU."""
        pixels = torch.stack([to_tensor(resize(center_crop(image, min(image.size)), self.side)) for image in images])
        pixels = (pixels.to(self.device) - self.mean) / self.std
        return self.extractor(F.interpolate(pixels, (224, 224), mode='bicubic')).cpu().numpy()

    def condition(self, features, noise_levels, noise):
        """What conditions the network: (B, D) features, (B,) levels and (B, D) standard normal noise -> (B, D) of
        length 1; with levels (B, D + 1): standardised, noised as in GenView eq. 5, then sqrt(alpha_bar)."""
        if not self.levels:
            return F.normalize(features)
        alpha = self.alphas[noise_levels][:, None]
        features = (features - self.network.feature_mean) / self.network.feature_std
        return torch.cat([alpha.sqrt() * features + (1 - alpha).sqrt() * noise, alpha.sqrt()], 1)

    @torch.no_grad()
    def views(self, features, noise_levels, seeds, labels=None):
        """One view for each row. features (B, D), noise_levels (B,) in 0..999 (a model without levels does not look at
        them), seeds B ints, labels (B,) of a model with classes -> uint8 (B, H, W, 3). What is not finite is black."""
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device
        z = torch.stack([self._latent(g) for g in draws]).to(self.device)
        noise = torch.stack([torch.randn(self.embedding_dim, generator=g) for g in draws]).to(self.device)
        features, levels = (torch.as_tensor(np.asarray(rows, kind), device=self.device) for rows, kind in (
            (features, np.float32), (noise_levels, np.int64)))
        labels = None if labels is None else torch.as_tensor(labels, device=self.device)
        images = self.network(z, self.condition(features, levels, noise), labels)
        images = torch.where(torch.isfinite(images).flatten(1).all(1)[:, None, None, None], images, -1)
        return ((images * 0.5 + 0.5) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _latent(self, draw):
        size, bound = self.network.chunks * self.network.chunk, 2 * self.truncation
        if not bound:
            return torch.randn(size, generator=draw)
        return torch.nn.init.trunc_normal_(torch.empty(size), a=-bound, b=bound, generator=draw)


class Retrieval:
    """In place of a generated view the most similar other image by the cosine of the CLIP embeddings (the baseline of
    GenView Table 10, there from LAION-400M).

    folder: run of fg_proportion.py, the pool: its embeddings.npy, and the dataset that its config.yaml names.
    same: the pool are the images themselves, of which none is its own view. side: pixels of a view, the middle square
    of the image. count: views an image, its nearest in this order. The pool's embeddings stay on the device in fp32
    (ImageNet's, of ViT-H: 5.2 GB)."""
    BLOCK = 65_536  # images of the pool compared at once

    def __init__(self, folder, same, side, count, device):
        mend = f'delete {folder} and run fg_proportion.py again'
        found = load_arrays(folder / 'fg_proportion.npz', mend, keys=())
        embeddings = load_arrays(folder / 'embeddings.npy', mend, mmap_mode='r')
        try:
            dataset = yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))['dataset']
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise unreadable(folder / 'config.yaml', error, mend) from None
        self.source = source_dataset({**dataset, 'download': False})
        if not len(self.source) == len(embeddings) == len(found.get('noise_level', ())):
            raise Fail(f'pool: {folder}: holds {len(embeddings)} embeddings, its dataset {len(self.source)} '
                       f'images; {mend}')
        usable = found['noise_level'] >= 0  # the others could not be read
        if usable.sum() - same < count:
            raise Fail(f'pool: {folder}: has {usable.sum()} images, too few for views_per_image={count}')
        self.pool = torch.empty(embeddings.shape, device=device)
        for start in range(0, len(embeddings), self.BLOCK):
            block = slice(start, start + self.BLOCK)
            part = torch.from_numpy(np.asarray(embeddings[block], np.float32)).to(device)
            self.pool[block] = F.normalize(part, dim=1)
        self.usable, self.known, self.folder = torch.from_numpy(usable).to(device), found.get('identity'), folder
        self.same, self.side, self.count, self.threads = same, side, count, ThreadPoolExecutor(8)
        self.name, self.dtype, self.embedding_dim = f'retrieval from {folder}', torch.float32, embeddings.shape[1]

    @torch.no_grad()
    def nearest(self, embeddings, own):
        """Indices (B, count) of the nearest of the pool, nearest first. embeddings (B, D), own (B,): own indices."""
        queries = F.normalize(torch.as_tensor(np.asarray(embeddings, np.float32), device=self.pool.device), dim=1)
        own = torch.as_tensor(own, device=self.pool.device)[:, None]
        value, index = torch.empty(len(own), 0, device=own.device), torch.empty(len(own), 0, device=own.device).long()
        for start in range(0, len(self.pool), self.BLOCK):
            at = torch.arange(start, min(start + self.BLOCK, len(self.pool)), device=own.device)
            cosine = queries @ self.pool[at[0]:at[-1] + 1].T
            cosine[:, ~self.usable[at]] = -2
            if self.same:
                cosine[own == at] = -2
            value = torch.cat([value, cosine], 1)
            index = torch.cat([index, at.expand(len(own), -1)], 1)
            value, order = value.topk(min(self.count, value.shape[1]), 1)
            index = index.gather(1, order)
        return index.cpu().numpy()

    def views(self, embeddings, noise_levels, pairs):
        """pairs: B of (index of the image, which of its nearest, from 0). Images that do not open are black. Raises
        Fail for chosen images that have changed since their embeddings were made."""
        def view(index):
            try:
                image = self.source[int(index)][0]
                return np.asarray(ImageOps.fit(image, (self.side, self.side), Image.Resampling.BICUBIC))
            except Exception:  # PIL raises nearly everything on a damaged file
                return np.zeros((self.side, self.side, 3), np.uint8)

        numbers = [number for _, number in pairs]
        chosen = self.nearest(embeddings, [i for i, _ in pairs])[range(len(pairs)), numbers]
        if self.known is not None:  # of an earlier version there is none
            same_images(self.source, np.unique(chosen), self.known, self.folder, 'run fg_proportion.py on them again')
        return np.stack(list(self.threads.map(view, chosen)))
