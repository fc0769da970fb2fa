"""The frozen CLIP encoder, and the quality of a pair of views as it sees them."""
import difflib
import hashlib
import logging
import re
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from config import Fail
from files import damage, load_arrays, unreadable
from loss import pair_quality, quality_weights
from models import normalize


class FrozenClip:
    """Image tower of any open_clip model: tokens and embedding of one pass, without gradient.

    spec: model       an architecture of open_clip ('ViT-H-14'), 'hf-hub:owner/name', or a local folder that holds
                      open_clip_config.json and open_clip_model.safetensors
          pretrained  for an architecture: hub tag ('laion2b_s32b_b79k') or local weights file; otherwise null
          image_size  pixels (optional; default: the model's own). ViT position embeddings are interpolated; the maps of
                      a ConvNeXt grow with it (convnext_base_w is published at 256; 224 gives the 7 x 7 of GenView)

    Attributes: image_size (pixels), mean and std (of the inputs, 3 floats each), token_dim K, embedding_dim D,
    preprocess: PIL image -> (3, S, S), normalised. Not an nn.Module, so that it never gets into a checkpoint, an
    optimizer or DistributedDataParallel. Raises Fail when the model or its weights cannot be had.
    """

    def __init__(self, spec, device='cpu'):
        import open_clip
        name, pretrained, image_size = _clip_source(spec, open_clip)
        read = open_clip.factory.load_state_dict

        def read_in_full(*args, **kwargs):  # position embeddings of half precision cannot be interpolated on a CPU
            return {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
                    for k, v in read(*args, **kwargs).items()}
        logging.disable(logging.CRITICAL)  # open_clip logs what it then raises; ours is one line
        try:
            with mock.patch.object(open_clip.factory, 'load_state_dict', read_in_full):
                model = open_clip.create_model(name, pretrained, force_image_size=image_size, require_pretrained=True)
        except Exception as error:  # the hub, files and timm raise nearly everything
            reason = ' '.join(str(error).split())
            where = f"{spec['model']}{f' / {pretrained}' if pretrained else ''}"
            if re.search('connect|resolve|offline|timed out|Max retries|LocalEntryNotFound', reason, re.IGNORECASE):
                raise Fail(f'clip.model: {where}: the hub cannot be reached; download the weights on a machine that '
                           'can, and name the file in clip.pretrained or the folder in clip.model') from None
            folder = Path(name.removeprefix('local-dir:'))
            for file in [Path(pretrained)] if pretrained else sorted(folder.glob('open_clip_*')):
                if file.is_file() and damage(file)[0]:
                    raise Fail(f'clip.model: {unreadable(file, error)}') from None
            raise Fail(f'clip.model: {where} cannot be loaded: {type(error).__name__}: {reason[:160]}') from None
        finally:
            logging.disable(logging.NOTSET)
        self.device = torch.device(device)
        self.visual = model.visual.eval().requires_grad_(False).to(self.device)  # the text tower goes
        settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self.preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)
        self.mean, self.std = tuple(settings.mean), tuple(settings.std)
        self.mean_std = [torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std)]
        self.image_size = settings.size[0] if isinstance(settings.size, (tuple, list)) else settings.size
        tokens, embedding = self.forward(torch.zeros(1, 3, self.image_size, self.image_size, device=self.device))
        self.token_dim, self.embedding_dim = tokens.shape[1], embedding.shape[1]

    @torch.no_grad()
    def forward(self, images):
        """images: (B, 3, S, S), normalised with `mean` and `std`. Returns tokens (B, K, H, W) and the projected,
        not normalised embedding (B, D).

        ViT: patch tokens after the final norm, without class token, before the projection. ConvNeXt and other timm
        towers: the trunk's last map, before pooling and head norm. Call under autocast for half precision."""
        output = self.visual.forward_intermediates(images, **self._last_map())
        return output['image_intermediates'][-1], output['image_features']

    def encode(self, images, dtype):
        """uint8 images (B, 3, S, S) -> tokens (B, K, H, W) and embedding (B, D), computed in dtype, as float32."""
        images = normalize(images.to(self.device, non_blocking=True), *self.mean_std)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            tokens, embedding = self.forward(images)
        return tokens.float(), embedding.float()

    @torch.no_grad()
    def tokens(self, images):
        """The tokens of `forward` alone, (B, K, H, W); pooling and projection are skipped."""
        return self.visual.forward_intermediates(
            images, **self._last_map(), intermediates_only=True)['image_intermediates'][-1]

    def _last_map(self):
        # the norm after an attention pool (CoCa) belongs to the pooled vector and may have another width
        norm = getattr(self.visual, 'attn_pool', None) is None
        return {'indices': 1, 'output_fmt': 'NCHW', 'normalize_intermediates': norm}

    def fingerprint(self):
        """12 hex digits of the weights: tells a principal component of this encoder from that of another one."""
        digest = hashlib.sha256()
        for key, value in self.visual.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]


def _clip_source(spec, open_clip):
    """Check a `clip:` spec without loading anything. Returns (name for open_clip, pretrained, image size or None)."""
    name, pretrained, image_size = spec['model'], spec.get('pretrained'), spec.get('image_size')
    if name.replace('/', '-') in open_clip.list_models():
        name = name.replace('/', '-')
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:
            raise Fail(f"clip.pretrained: {name} needs a hub tag ({', '.join(tags[:4])}) or a local weights file")
        if not open_clip.get_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
            near = difflib.get_close_matches(pretrained, tags, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"tags: {', '.join(tags) or 'none'}"
            raise Fail(f"clip.pretrained: '{pretrained}' is no weights file and no tag of {name}; {hint}")
        return name, pretrained, image_size
    folder = Path(name.removeprefix('local-dir:'))
    if not name.startswith('hf-hub:') and not folder.is_dir():
        near = difflib.get_close_matches(name, open_clip.list_models(), 1, 0.6)
        hint = f"did you mean '{near[0]}'?" if near else 'open_clip.list_models() names the architectures'
        raise Fail(f"clip.model: '{name}' is no folder and no open_clip architecture; {hint}")
    if pretrained is not None:
        raise Fail(f"clip.pretrained must be null for '{name}': a folder or hub id brings its own weights")
    if name.startswith('hf-hub:'):
        return name, None, image_size
    for file in ('open_clip_config.json', 'open_clip_model.safetensors'):
        if not (folder / file).is_file():
            raise Fail(f'clip.model: {folder / file}: no such file')
    return f'local-dir:{folder}', None, image_size


def clip_files(spec):
    """Where a `clip:` spec's weights may lie on this machine: for files.checksums."""
    return spec['model'].removeprefix('local-dir:'), spec.get('pretrained')


def load_component(setting, path, clip):
    """First principal component of the tokens of `clip`: `pc` of stage 1's fg_proportion.npz, or a .npy of shape (K,)
    or (K, 1). Returns it scaled to length 1, (K,) float64. setting: the YAML's key that names it, for messages."""
    whole, again = str(path).endswith('.npz'), 'run fg_proportion.py with this encoder'
    try:
        found = load_arrays(path, f'{again} again', () if whole else None)
    except Fail as error:
        raise Fail(f'{setting}: {error}') from None
    pc, encoder = (found.get('pc', np.zeros(0)), str(found.get('encoder', ''))) if whole else (found, '')
    if pc.ndim not in (1, 2) or pc.shape[1:] not in ((), (1,)) or pc.dtype.kind not in 'fiu' \
            or not np.isfinite(pc).all() or not pc.any():
        raise Fail(f'{setting}: {path}: no principal component in it: it must be of shape (K,) or (K, 1), finite and '
                   'not zero')
    pc = pc.reshape(-1).astype(np.float64)
    if len(pc) != clip.token_dim:
        raise Fail(f'{setting}: {path} has width {len(pc)}, the tokens of this encoder have {clip.token_dim}: {again}')
    if encoder not in ('', clip.fingerprint()):
        raise Fail(f'{setting}: {path} was made with other weights than this encoder: {again}')
    return pc / np.linalg.norm(pc)


class Quality:
    """Weights of a batch of pairs from the frozen encoder (GenView eq. 10-14), which sees the very same views.

    All pairs are weighted, those without a synthetic view too, as in the official code."""

    def __init__(self, config, device):
        if not Path(config['pc'] or '').is_file():
            raise Fail(f"quality.pc: {config['pc']}: no such file; fg_proportion.py writes it as fg_proportion.npz")
        self.clip, self.temperature = FrozenClip(config['clip'], device), config['temperature']
        self.pc = torch.from_numpy(load_component('quality.pc', config['pc'], self.clip)).float().to(device)

    @torch.no_grad()
    def __call__(self, view_1, view_2):
        """uint8 views (B, 3, S, S) -> weights (B,) of mean 1 over the global batch, quality (B,)."""
        images = normalize(torch.cat([view_1, view_2]), *self.clip.mean_std)
        if images.shape[-1] != self.clip.image_size:
            images = F.interpolate(images, size=self.clip.image_size, mode='bilinear')
        quality = pair_quality(*self.clip.tokens(images).chunk(2), self.pc)
        return quality_weights(quality, self.temperature), quality
