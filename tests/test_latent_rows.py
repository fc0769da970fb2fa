"""Every kind of row of COP-Gen's and hierarchical-latent's tables, from walker to encoder, on the embedded GAN."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import gen_views  # noqa: E402
import pretrain  # noqa: E402
import train_discriminator  # noqa: E402
import train_walker  # noqa: E402
from config import load_config  # noqa: E402
from conftest import picture  # noqa: E402
from data import PairLoader, open_beton, write_beton  # noqa: E402
from latent_effect import CONTROLS, HL_VIEW, ROWS, RUN  # noqa: E402
from latents import LatentGenerator, chunk_range  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
METHODS = {'none': ['method=nnclr', 'nnclr.queue=64'], 'gaussian': ['simclr.negative_mixing=1.6'],
           'learned': ['view_1.randaugment=2', 'view_2.randaugment=2'], 'steering': ['method=mocov2', 'moco.queue=64'],
           'hl_random': ['method=simsiam', 'simsiam.dim=64', 'simsiam.hidden=16'],
           'hl_random_d': ['method=byol', 'byol.dim=32', 'byol.hidden=32']}


def stage(module, yaml, *keys):
    settings = load_config(module.DEFAULTS, [str(ROOT / f'yamls/{module.__name__}/{yaml}.yaml'), *keys])
    for name in ('model',) if 'latent' in settings else ():
        settings['latent'][name] = str(ROOT / settings['latent'][name])
    module.main(settings)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder with the walkers and the discriminator that the rows name."""
    folder = tmp_path_factory.mktemp('latent')
    short = ['samples=128', 'log_every=1', 'monte_carlo=0', 'device=cpu']
    for name, keys in {'walker': [], 'linear': ['walker=linear'], 'steering': ['walker=steering', 'lr=1e-3'],
                       'walker_1_5': ['chunks=1-5', 'start=small', *HL_VIEW]}.items():
        stage(train_walker, 'latent_effect', *short, *keys, f'output={folder / name}')
    write_beton(folder / 'real.beton', lambda i: (picture(i, 32, 32), None, -1, i, -1), 64, {}, num_workers=1)
    stage(train_discriminator, 'latent_effect', f'beton={folder}/real.beton', f'output={folder}/discriminator',
          'batch_size=16', 'device=cpu')
    return folder


OTHERS = {name: (f'0-5: {{walker: {RUN}/{name}/walker.pt}}', [], '') for name in ('linear', 'steering')}


@pytest.mark.parametrize('row', [row for row in (*ROWS, *OTHERS) if row not in CONTROLS])
def test_row_on_the_embedded_gan(row, trained, tmp_path):
    moves, keys, _ = {**ROWS, **OTHERS}[row]
    moves, keys = moves.replace(str(RUN), str(trained)), [key.replace(str(RUN), str(trained)) for key in keys]
    stage(gen_views, 'latent_effect', f'latent.chunks={{{moves}}}', *keys, f'output={tmp_path}', 'latent.anchors=64',
          'chunk_size=32', 'batch_size=32', 'device=cpu')
    assert len(open_beton(tmp_path / 'pairs.beton')['settings']['classes']) == 0
    plain = {'size': 32, 'crop_scale': None}
    loader = PairLoader(tmp_path / 'pairs.beton', [plain, plain], 1.0, 'second', batch_size=64, seed=0, num_workers=1,
                        shuffle=False)
    anchors, positives = (images.float() for images in next(iter(loader.epoch(0)))['views'])
    moved = (anchors - positives).abs().mean((1, 2, 3))
    if row == 'none':
        assert not moved.any()
    else:
        assert moved.min() > 0.05
    if row in ('gaussian', 'untrained', 'learned', 'linear', 'hl_learned'):  # near its anchor, not another image
        assert moved.mean() < 0.8 * (anchors - positives.roll(1, 0)).abs().mean()
    if 'discriminator' not in ' '.join(keys):            # the anchors are the GAN's for (seed, index), whatever moves
        generator = LatentGenerator(dict(kind='biggan', model=str(ROOT / 'tiny/gan'), truncation=2.0, psi=1.0,
                                         crop=None), torch.device('cpu'), 32)
        images = generator.images(generator.code(generator.anchors(0, np.arange(64))))
        assert ((images * 255).clamp(0, 255).byte() - anchors).abs().max() <= 1
    stage(pretrain, 'latent_effect', f'data.beton={tmp_path}/pairs.beton', f'output={tmp_path}/encoder', 'epochs=1',
          f'data.alpha={int(row != "none")}', 'batch_size=16', 'optimizer.warmup_epochs=0', 'backbone.width=8',
          'device=cpu', *METHODS.get(row, []))
    state = torch.load(tmp_path / 'encoder/backbone.pt', weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in state.values())


def test_chunks_of_the_rows():
    """Those of hierarchical-latent leave the first chunk alone."""
    found = {row: [chunk_range(part.split(':')[0], 6) for part in moves.split('}, ') if part]
             for row, (moves, _, _) in ROWS.items()}
    assert found['none'] == [] and found['learned'] == found['gaussian'] == [(0, 5)]
    assert {name for name, chunks in found.items() if chunks == [(1, 5)]} == {'hl_random', 'hl_learned', 'hl_random_d'}
