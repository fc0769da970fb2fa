"""What continuous sampling costs: hierarchical-latent Fig. 3. SimCLR steps on batches from a torch DataLoader with
torchvision's transforms, from our PairLoader on a beton, and from a GAN on the training device (OnlinePairs).

    python benchmarks/online.py                          # GPU: BigBiGAN's network, random weights; CPU: a small one
    python benchmarks/online.py model=BigBiGAN_x1.pth images=126789 batch_size=256

As in the paper only anchors are drawn, no positives: one image and two crops of it, an epoch is `images` samples, and
the training step counts. The last line is one JSON object: seconds per epoch of each, median over the rounds, and
watt-hours where the device tells (NVIDIA's counter, else Intel's RAPL).
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from safetensors.torch import save_file

import bench
import gan
from data import PairLoader, write_beton
from models import SimCLR
from online import OnlinePairs

CUDA = torch.cuda.is_available()
options = bench.options(model='', images=0, batch_size=64, workers=8 if CUDA else 1, rounds=3, size=112 if CUDA else 24,
                        arch='resnet18', width=64 if CUDA else 16)
SMALL = dict(widths=[64, 64, 48, 32, 24, 16], up=[1, 0, 1, 0, 1], attention=None, chunk=20, shared=0)


def energy():
    """Joules since some time, or None."""
    try:
        if CUDA:
            import pynvml
            pynvml.nvmlInit()
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1e3
        return sum(int(p.read_text()) for p in Path('/sys/class/powercap').glob('intel-rapl:?/energy_uj')) / 1e6 or None
    except Exception:                                    # a driver that does not tell
        return None


class Crops(torch.utils.data.Dataset):
    def __init__(self, images, recipe):
        self.images, self.transform = images, T.Compose([
            T.RandomResizedCrop(recipe['size'], scale=recipe['crop_scale']), T.RandomHorizontalFlip(recipe['flip']),
            T.RandomApply([T.ColorJitter(*recipe['jitter'])], recipe['jitter_prob']),
            T.RandomGrayscale(recipe['gray_prob']), T.PILToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if isinstance(self.images[i], str) else Image.fromarray(self.images[i])
        image = Image.open(image).convert('RGB') if isinstance(image, str) else image
        return {'views': [self.transform(image) for _ in range(2)]}


def main():
    device = torch.device('cuda' if CUDA else 'cpu')
    size, batch = options['size'], options['batch_size']
    side = 128 if CUDA else 32
    images = options['images'] or (16384 if CUDA else 1024)
    recipe = dict(size=size, crop_scale=[0.2, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.4, 0.1], jitter_prob=0.8,
                  gray_prob=0.2)
    torch.manual_seed(0)
    method = SimCLR({'arch': options['arch'], 'stem': 'imagenet', 'width': options['width']}, norm=False).to(device)
    optimizer = torch.optim.Adam(method.parameters(), 1e-4, betas=(0.5, 0.999))

    def epoch(batches):
        start, before, steps = time.perf_counter(), energy(), 0
        for found in batches:
            views = [view.to(device, non_blocking=True) for view in found['views']]
            with torch.autocast(device.type, torch.bfloat16, enabled=CUDA):
                loss = method(views, steps)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        loss.item()                                      # waits for the device
        seconds, after = time.perf_counter() - start, energy()
        return seconds, None if before is None else (after - before) / 3600

    with tempfile.TemporaryDirectory() as folder:
        model = options['model'] or folder
        if not options['model']:
            config = gan.BIGBIGAN if CUDA else SMALL
            (Path(folder) / 'config.json').write_text(json.dumps(config))
            save_file(gan.BigGAN(**config).state_dict(), Path(folder) / 'model.safetensors')
        spec = dict(kind='biggan', model=model, truncation=2.0, psi=1.0, crop=None, discriminator='', chunks={})
        online = OnlinePairs(spec, [recipe] * 2, 0.0, 'first', batch_size=batch, steps_per_epoch=images // batch,
                             seed=0, device=device)
        rng, few = np.random.default_rng(0), min(images, 2048)
        pictures = [np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((side, side)))
                    for _ in range(few)]
        write_beton(f'{folder}/real.beton', lambda i: (pictures[i % few], None, -1, i, -1), images, {},
                    mode='jpg' if CUDA else 'raw', num_workers=options['workers'])
        ours = PairLoader(f'{folder}/real.beton', [recipe] * 2, 0.0, batch_size=batch, seed=0,
                          num_workers=options['workers'], pin_memory=CUDA)
        stored = pictures
        if CUDA:                                         # files, as they would lie on a disk
            stored = [f'{folder}/{i}.jpg' for i in range(few)]
            for name, picture in zip(stored, pictures):
                Image.fromarray(picture).save(name, quality=90)
        theirs = torch.utils.data.DataLoader(Crops([stored[i % few] for i in range(images)], recipe), batch,
                                             shuffle=True, drop_last=True, num_workers=options['workers'],
                                             persistent_workers=True, pin_memory=CUDA)
        sources = {'torch': lambda e: theirs, 'ours': ours.epoch, 'online': online.epoch}
        for make in sources.values():                    # start workers, compile kernels
            epoch(make(0))
        found = {name: [] for name in sources}
        for r in range(options['rounds']):
            for name, make in sources.items():
                found[name].append(epoch(make(r + 1)))
                print(f'round {r}, {name}: {found[name][-1][0]:.1f} s an epoch of {images}', flush=True)
    result = {name: {'seconds': round(statistics.median(s for s, _ in runs), 2),
                     'watt_hours': None if runs[0][1] is None else round(statistics.median(w for _, w in runs), 3)}
              for name, runs in found.items()}
    print(json.dumps({**options, 'images': images, 'hardware': bench.device_name(), **result}))


if __name__ == '__main__':
    main()
