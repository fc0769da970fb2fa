"""timm's vision transformer as MoCo v3 uses it; not in models.py because timm takes as long to import as torch."""
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models import VITS


class ViT(VisionTransformer):
    """Vision transformer of MoCo v3: images (B, 3, H, W) -> class token after the last norm (B, feature_dim); timm's
    parameter names. Fixed 2-D sin-cos position embedding, frozen random patch embedding, 12 heads at any width: timm's
    and DeiT's vit_small has 6 and reads the same weights without complaint, to no use. Another image size than that of
    training interpolates the position embedding."""

    def __init__(self, arch, patch_size=16, image_size=224):
        self.feature_dim = width = VITS[arch]
        super().__init__(img_size=image_size, patch_size=patch_size, embed_dim=width, depth=12, num_heads=12,
                         num_classes=0, weight_init='moco', dynamic_img_size=True)
        bound = (6 / (3 * patch_size ** 2 + width)) ** 0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in self.patch_embed.grid_size),
                                     indexing='ij')
        frequency = 10_000 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
        angles = [place.reshape(-1, 1) * frequency for place in (row, column)]
        places = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, width), places])[None])  # nothing for the class token
        for frozen in (self.pos_embed, *self.patch_embed.parameters()):
            frozen.requires_grad_(False)
