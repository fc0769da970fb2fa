"""View generation, side by side: the official way, one image per call of diffusers' published pipeline, which runs the
image encoder and encodes the empty prompt every time, against ours, which batches images of mixed noise levels, has the
prompt once and encodes files in threads. Same weights, images, steps and precision; the image encoder counts in both
(ours runs it in stage 1); alternating rounds.

    python benchmarks/gen_views.py                without a GPU: the embedded models
    python benchmarks/gen_views.py device=cuda    the architecture of Stable unCLIP 2.1, random weights, 768 px, fp16

Speed does not depend on the weights' values. The last line is one JSON object: `ratio` is the median over the rounds of
ours / theirs, `range` its lowest and highest; on a GPU also the share of the peak of its dense bf16 products
(operations counted by torch.utils.flop_counter), peak memory in GB, and what the views of ImageNet's training set cost.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bench
import gen_views
from bench import ROOT
from chunks import encode_view
from config import default_config
from frozen_clip import FrozenClip
from generators import UnCLIP

PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}  # operations a second, from the data sheets of the SXM boards
IMAGENET = 1_281_167

# config.json of each part of stabilityai/stable-diffusion-2-1-unclip, as far as it differs from the class's default
UNET = dict(
    sample_size=96, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
    class_embed_type='projection', projection_class_embeddings_input_dim=2048)
VAE = dict(sample_size=768, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
           down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act='gelu',
            projection_dim=512, vocab_size=49408, max_position_embeddings=77)
VISION = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
              image_size=224, hidden_act='gelu', projection_dim=1024)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', prediction_type='v_prediction',
                 skip_prk_steps=True, steps_offset=1)


def stable_unclip(pixels=768):
    """The networks of Stable unCLIP 2.1 with random weights, on torch's default device (`meta`: no memory)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection
    return {'unet': UNet2DConditionModel(**{**UNET, 'sample_size': pixels // 8}), 'vae': AutoencoderKL(**VAE),
            'text_encoder': CLIPTextModel(CLIPTextConfig(**TEXT)),
            'image_encoder': CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))}


def operations(pixels=768, steps=20):
    """Floating-point operations of one view with guidance: UNet and decoder, a product and its sum are two."""
    with torch.device('meta'):
        parts, size = stable_unclip(pixels), pixels // 8
        prompt, condition = torch.zeros(2, 77, 1024), torch.zeros(2, 2048)
        with FlopCounterMode(display=False) as unet:
            parts['unet'](torch.zeros(2, 4, size, size), 1, prompt, class_labels=condition)
        with FlopCounterMode(display=False) as vae:
            parts['vae'].decode(torch.zeros(1, 4, size, size))
    scheduler = noise_schedulers()[0]
    scheduler.set_timesteps(steps)
    return unet.get_total_flops() * len(scheduler.timesteps) + vae.get_total_flops()


def noise_schedulers():
    from diffusers import DDPMScheduler, PNDMScheduler
    return PNDMScheduler(**SCHEDULER), DDPMScheduler(beta_schedule='squaredcos_cap_v2')


def save_stable_unclip(folder, pixels, device, dtype):
    """Write the pipeline with random weights, in diffusers' layout."""
    from diffusers import StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor, CLIPTokenizer
    scheduler, noising = noise_schedulers()
    torch.manual_seed(0)
    with torch.device(device):
        parts = {name: part.to(dtype) for name, part in stable_unclip(pixels).items()}
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / 'tiny/unclip/tokenizer', model_max_length=77)  # '' is 77 tokens
    pipeline = StableUnCLIPImg2ImgPipeline(
        **parts, image_normalizer=StableUnCLIPImageNormalizer(VISION['projection_dim']), scheduler=scheduler,
        image_noising_scheduler=noising, tokenizer=tokenizer, feature_extractor=CLIPImageProcessor())
    pipeline.save_pretrained(folder)


class TinyEncoder(ModelMixin):  # for its `device` and `dtype`
    """tiny/clip as the published pipeline calls its image encoder: tiny/unclip's folder has none."""

    def __init__(self, clip):
        super().__init__()
        self.visual = clip.visual

    def forward(self, pixels):
        return SimpleNamespace(image_embeds=self.visual(pixels))


def published_pipeline(folder, full, device, dtype):
    from diffusers import StableUnCLIPImg2ImgPipeline
    absent = {} if full else {'image_encoder': None, 'feature_extractor': None}
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, dtype=dtype, **absent).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if not full:
        clip = FrozenClip({'model': str(ROOT / 'tiny/clip')})
        pipeline.image_encoder = TinyEncoder(clip).to(device, dtype)
        pipeline.feature_extractor = lambda images, return_tensors: SimpleNamespace(
            pixel_values=torch.stack([clip.preprocess(i) for i in (images if isinstance(images, list) else [images])]))
    return pipeline


def rate(step, seconds):
    """Images a second of step() -> number of images, called for about `seconds`."""
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        images += step()
    return images / (time.perf_counter() - begin)


def main():
    options = bench.options(device='cuda' if torch.cuda.is_available() else 'cpu', model='', batch_size=0, rounds=3,
                            seconds=0.0, steps=20, pixels=768, compile=0, vae_slicing=0, threads=os.cpu_count())
    gpu = options['device'] == 'cuda'
    full = (options['model'] or ('full' if gpu else 'tiny')) == 'full'  # full on a CPU: to try it out at few pixels
    batch_size = options['batch_size'] or (32 if full else 100)
    seconds = options['seconds'] or (60 if gpu else 15)
    device = torch.device(options['device'])
    stored = (512, 'jpg') if full else (32, 'png')  # size and format of the views
    spec = {**default_config(gen_views.DEFAULTS)['generator'], 'model': str(ROOT / 'tiny/unclip'),
            'steps': options['steps'], 'guidance_scale': 10.0 if full else 2.0,
            **{k: bool(options[k]) for k in ('compile', 'vae_slicing')}}
    levels, random = gen_views.LEVELS, np.random.default_rng(0)
    shape = (375, 500, 3) if full else (32, 32, 3)
    images = [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(batch_size)]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options['threads']) as pool:
        if full:
            save_stable_unclip(folder, options['pixels'], device, torch.float16 if gpu else torch.float32)
            spec['model'] = folder
        ours = UnCLIP(spec, device)
        theirs = published_pipeline(spec['model'], full, device, ours.dtype)
        encoder = theirs.image_encoder
        count, files = 0, []

        def one():
            nonlocal count
            count += 1
            view = theirs(images[count % batch_size], prompt='', noise_level=levels[count % 5],
                          generator=torch.Generator(device).manual_seed(count), num_inference_steps=spec['steps'],
                          guidance_scale=spec['guidance_scale']).images[0]
            encode_view(np.asarray(view), *stored)
            if not np.asarray(view).any():
                sys.exit(f'the weights overflow in {ours.dtype}: times would mean nothing')
            return 1

        @torch.no_grad()
        def batch():
            pixels = theirs.feature_extractor(images=images, return_tensors='pt').pixel_values
            embeddings = encoder(pixels.to(device, ours.dtype)).image_embeds.float().cpu().numpy()
            views = ours.views(embeddings, np.resize(levels, batch_size), list(range(batch_size)))
            for file in files:  # of the batch before: its files were encoded meanwhile
                file.result()
            files[:] = [pool.submit(encode_view, view, *stored) for view in views]
            return batch_size

        name = torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} threads'
        print(f'{spec["model"] if not full else "Stable unCLIP 2.1, random weights"}, {ours.dtype}, {name}, '
              f'{spec["steps"]} steps, batches of {batch_size}', flush=True)
        one(), batch()  # the first call of each compiles, chooses kernels, fills caches
        rounds, memory = [], {}
        for r in range(options['rounds']):
            rates = []
            for who, step in (('ours', batch), ('theirs', one)):
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                rates.append(rate(step, seconds))
                if gpu:
                    memory[who] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            rounds.append(rates)
            print(f'round {r}: ours {rates[0]:.2f} images/s, theirs {rates[1]:.2f} images/s, '
                  f'ratio {rates[0] / rates[1]:.2f}', flush=True)
    ratios = [a / b for a, b in rounds]
    result = {**options, 'model': 'full' if full else 'tiny', 'batch_size': batch_size, 'dtype': str(ours.dtype)[6:],
              'ours': round(statistics.median(a for a, _ in rounds), 3),
              'theirs': round(statistics.median(b for _, b in rounds), 3),
              'range': [round(f(ratios), 3) for f in (min, max)]}
    if gpu and full:
        result.update(gpu=name, memory=memory, imagenet_gpu_hours={
            who: round(IMAGENET / result[who] / 3600) for who in ('ours', 'theirs')})
        peak = next((peak for board, peak in PEAK.items() if board in name), None)
        if peak:
            done = operations(options['pixels'], options['steps'])
            result['share_of_peak'] = {who: round(done * result[who] / peak, 3) for who in ('ours', 'theirs')}
    print(json.dumps({**result, 'ratio': round(statistics.median(ratios), 3)}))


if __name__ == '__main__':
    main()
