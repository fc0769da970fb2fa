"""Stage 2c: a small discriminator that tells a GAN's images from real ones, to leave the worse half out
(hierarchical-latent appendix E).

    python train_discriminator.py yamls/train_discriminator/bigbigan.yaml

Reads real images from a beton (gen_views.py, strategy: none) and writes `output`/discriminator.pt, for
latent.discriminator of gen_views.py and data.online.discriminator of pretrain.py; beside it checkpoint.pt, log.jsonl,
config.yaml, versions.json and scores.png. The same command again resumes; on a CPU to the bit.
"""
from contextlib import closing

from config import Fail, check_values, run_folder
from start import run, say

DEFAULTS = """
output: ''              # run folder
beton: ''               # real images
latent:                 # the generator, see gen_views.py
  kind: biggan          # biggan | stylegan2
  model: ''
  truncation: 2.0
  psi: 1.0
  crop: !int null
seed: 0
device: auto            # auto | cpu | cuda
image_size: 128         # pixels: real images are resized (shorter side) and cut, generated ones resized
width: 32               # channels of the first of four convolutions
epochs: 1               # over the real images; as many generated ones beside them
batch_size: 64          # real images a step, of all processes together
lr: 2e-4                # Adam, betas 0.5 and 0.999
num_workers: 8
log_every: 50           # steps
save_every: 500         # steps
"""
BOOKKEEPING = ('output', 'device', 'num_workers', 'log_every', 'save_every')
ALLOWED = {
    'output': 'folder', 'beton': 'file', 'latent.model': 'file', 'kind': ['biggan', 'stylegan2'],
    'truncation': (0.0, 100.0), 'psi': (0.0, 1.0), 'crop': (1, 8192), 'seed': (0, 10 ** 12), 'image_size': (16, 1024),
    'width': (1, 1024), 'epochs': (1, 10 ** 6), 'batch_size': (1, 10 ** 6), 'lr': (1e-30, 1000.0),
    'num_workers': (1, 1024), 'log_every': (1, 10 ** 9), 'save_every': (1, 10 ** 9)}


def check(config, world=1):
    check_values(config, ALLOWED)
    if config['batch_size'] % world:
        raise Fail(f"batch_size: {config['batch_size']} (of all processes) is not a multiple of the {world} processes")


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import json
from hashlib import sha256

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import Log, Processes, StopSignal, earlier
from data import PairLoader, check_size
from files import save_checkpoint, weights_checksum
from latents import Discriminator, LatentGenerator
from models import average_running_statistics, distributed, global_mean, synchronize_batch_norm
from pictures import histograms


def main(config):
    processes = Processes(config['device'])
    check(config, processes.world)
    device, world, batch = processes.device, processes.world, config['batch_size']
    folder = run_folder(config['output'])
    checkpoint, result = folder / 'checkpoint.pt', folder / 'discriminator.pt'
    torch.manual_seed(config['seed'])
    loader = PairLoader(config['beton'], [{'size': config['image_size'], 'crop_scale': None}], 0.0, 'first',
                        batch_size=batch // world, seed=config['seed'], num_workers=config['num_workers'],
                        rank=processes.rank, world=world)
    enlarged = check_size(loader, {'image_size': config['image_size']})  # they would look softer than the generator's
    identity = {**config, 'weights': weights_checksum(config['latent']['model']),
                'beton_sha256': sha256(json.dumps(loader.sidecar['crc32']).encode()).hexdigest()}
    saved = earlier(checkpoint, identity, BOOKKEEPING, needs=('discriminator', 'optimizer', 'step'))
    generator = LatentGenerator(config['latent'], device, config['image_size'])
    discriminator = synchronize_batch_norm(Discriminator(config['width']).to(device), device)
    optimizer, step = torch.optim.Adam(discriminator.parameters(), config['lr'], betas=(0.5, 0.999)), 0
    if saved:
        discriminator.load_state_dict(saved['discriminator'])
        optimizer.load_state_dict(saved['optimizer'])
        step = saved['step']
    last = config['epochs'] * len(loader)
    if saved and step == last and result.is_file():
        if processes.main:
            say(f'{folder}: finished: {result}')
        return
    stop, log = StopSignal(), Log(folder, config, processes.main)
    log.write(enlarged)
    log.write(f'{last} steps of {batch} real images of {config["beton"]} and as many of {generator.name}'
              + f'; resumed at step {step}' * bool(saved))

    def generated(first):
        start = first * batch + processes.rank * (batch // world)
        with torch.no_grad():
            z = generator.anchors(config['seed'], range(start, start + batch // world))
            return generator.images(generator.code(z))

    figures, real, wrapped = [], None, distributed(discriminator, device)
    with tqdm(total=last, initial=step, unit='step', disable=None if processes.main else True) as bar:
        while step < last:
            epoch, start = divmod(step, len(loader))
            with closing(loader.epoch(epoch, start)) as batches:
                for found in batches:
                    real, fake = found['views'][0].to(device).float() / 255, generated(step)
                    scores = wrapped(torch.cat([real, fake]))  # together: batch norm must not tell them apart
                    truth = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))]).to(device)
                    loss = F.binary_cross_entropy_with_logits(scores, truth)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step += 1
                    bar.update()
                    figures.append(torch.stack([loss.detach(), ((scores > 0) == (truth > 0)).float().mean()]))
                    if step % config['log_every'] == 0 or step == last:
                        value, right = (global_mean(v) for v in torch.stack(figures).mean(0))
                        if not torch.isfinite(torch.tensor(value)):
                            raise Fail(f'step {step}: the loss is not finite; lower lr')
                        text = f'step {step}/{last}  loss {value:.4f}  told apart {right:.1%}'
                        log.write(text if bar.disable else None, step=step, loss=value, accuracy=right)
                        figures = []
                    leave = processes.any(stop) and step < last
                    if leave or step % config['save_every'] == 0 or step == last:
                        if not all(p.isfinite().all() for p in discriminator.parameters()):
                            raise Fail(f'step {step}: the weights are not finite; lower lr')
                        average_running_statistics(discriminator)
                        if processes.main:
                            save_checkpoint(checkpoint, {
                                'discriminator': discriminator.state_dict(), 'optimizer': optimizer.state_dict(),
                                'step': step, 'config': identity})
                        processes.barrier()
                    if leave:
                        stop.leave(log, f'saved at step {step} of {last}; the same command resumes')
    if processes.main:
        save_checkpoint(result, {'discriminator': discriminator.state_dict(), 'width': config['width']})
        if real is None:  # nothing was left to do but this file
            return log.close()
        discriminator.eval()
        with torch.no_grad():
            scores = {name: discriminator(images).cpu().numpy()
                      for name, images in (('real', real), ('generated', fake))}
        histograms(folder / 'scores.png', [('score', 'images of the last batch', scores, None)])
        log.write(f'done: {result}')
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
