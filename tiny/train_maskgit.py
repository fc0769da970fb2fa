"""Train the embedded MaskGIT, 32 px: a VQ autoencoder of 8 x 8 tokens and the transformer that fills masked ones in.

    python tiny/train_maskgit.py vqgan       --data tiny-imagenet-200 --teacher efficientnet-lite0-57934424.pth
    python tiny/train_maskgit.py transformer --data tiny-imagenet-200

Both see the 61 classes of Tiny-ImageNet-200 of tiny/train.py, never CIFAR-10, and write tiny/maskgit. The same command
goes on where a killed one stopped; --steps sets how long.
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from maskgit import Transformer, load_vqgan  # noqa: E402
from train import (CLASSES, autocast, load, look, parser_of, read, save, teacher_model, train,  # noqa: E402
                   training_images)

CODES, SIDE, OUT = 512, 8, HERE / 'maskgit'


def material(args):
    """Images (N, 3, 32, 32) and their labels (N,), of the classes in the order of CLASSES."""
    paths = [training_images(Path(args.data), wnid) for wnid in CLASSES]
    return read(sum(paths, [])), torch.tensor([k for k, names in enumerate(paths) for _ in names])


def flipped(images, generator):
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def vqgan(args, device):
    """Squared error and the teacher's maps (LPIPS without learned weights), as tiny/train.py refine has them; no
    discriminator."""
    from diffusers import VQModel
    images, _ = material(args)
    torch.manual_seed(args.seed)
    model = VQModel(down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3,
                    block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=32, sample_size=32,
                    num_vq_embeddings=CODES, vq_embed_dim=16, norm_num_groups=16, mid_block_add_attention=False)
    model.to(device, memory_format=torch.channels_last)
    teacher, seen, used = teacher_model(args, device), {}, torch.zeros(CODES, device=device)

    def loss_of(indices, generator, progress):
        x = flipped(images[indices], generator).to(device, memory_format=torch.channels_last) / 127.5 - 1
        with autocast(device):
            latents = model.encode(x).latents
        quantised, commitment, (_, _, codes) = model.quantize(latents.float())
        used.mul_(0.99).index_add_(0, codes.flatten(), torch.ones(codes.numel(), device=device))
        if progress < 0.5:                               # a code that nothing is near to never learns: it starts anew
            idle = (used < 0.5).nonzero()[:, 0]
            pool = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2).cpu()
            some = pool[torch.randint(len(pool), (len(idle),), generator=generator)]
            model.quantize.embedding.weight.data[idle] = some.to(device)
            used[idle] = 1.0
        with autocast(device):
            y = model.decode(quantised, force_not_quantize=True).sample
        half = len(x) // 2
        with torch.no_grad():
            meant = look(teacher, x[:half] / 2 + 0.5)[0]
        drawn = look(teacher, y[:half].float() / 2 + 0.5)[0]
        unit = lambda maps: maps / (maps.norm(dim=1, keepdim=True) + 1e-4)
        maps = sum((unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(drawn, meant))
        error = F.mse_loss(y.float(), x)
        seen.update(error=error.item(), maps=maps.item(), codes=(used > 0.5).sum().item())
        return error + commitment + 0.05 * maps

    def report():
        return ''.join(f'  {k} {v:.3f}' for k, v in seen.items())

    train('vqgan', args, model, loss_of, 1e-3, args.steps or 2000, 64, len(images), device, report, ema_decay=0.998)
    model.half().save_pretrained(OUT / 'vqgan')


def transformer(args, device):
    """MaskGIT's training (arXiv 2202.04200): a cosine share of the tokens is masked and predicted; a tenth of the
    labels is left out."""
    path = args.work / 'maskgit_codes.pt'
    if not path.exists():
        images, labels = material(args)
        model = load_vqgan(OUT / 'vqgan').to(device)
        with torch.no_grad():
            codes = [[model.quantize(model.encode(x.to(device)).latents)[2][2].view(len(part), -1).cpu().short()
                      for x in (part / 127.5 - 1, part.flip(3) / 127.5 - 1)] for part in images.split(500)]
        save(path, dict(codes=torch.stack([torch.cat(side) for side in zip(*codes)], 1), labels=labels))
    data = load(path)
    torch.manual_seed(args.seed)
    model = Transformer(CODES, len(CLASSES), SIDE * SIDE, width=144, depth=6, heads=4, hidden=576, dropout=0.0)
    model.to(device)
    nn.init.normal_(model.tok_emb.weight, std=0.02)      # the logits are products with it

    def loss_of(indices, generator, progress):
        b = len(indices)
        whole = data['codes'][indices, torch.randint(2, (b,), generator=generator)].long()
        share = torch.cos(math.pi / 2 * torch.rand(b, 1, generator=generator))
        masked = torch.rand(whole.shape, generator=generator).argsort(1).argsort(1) < (share * SIDE * SIDE).clamp_min(1)
        labels = torch.where(torch.rand(b, generator=generator) < 0.1, len(CLASSES), data['labels'][indices])
        with autocast(device):
            logits = model(torch.where(masked, CODES, whole).to(device), labels.to(device))
        return F.cross_entropy(logits[masked.to(device)].float(), whole[masked].to(device), label_smoothing=0.1)

    train('transformer', args, model, loss_of, 1e-3, args.steps or 4000, 64, len(data['codes']), device,
          ema_decay=0.999)
    (OUT / 'config.json').write_text(json.dumps(dict(heads=4, classes=len(CLASSES))) + '\n')
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, OUT / 'transformer.safetensors')


if __name__ == '__main__':
    args = parser_of(__doc__, ['vqgan', 'transformer']).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    globals()[args.stage](args, torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
