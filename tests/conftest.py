"""What several test files share: fixtures, and drawn images to import from here."""
import json
import os
import signal
import sys
from pathlib import Path

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the tests are of CPUs, and start more processes than a machine has GPUs

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FULL = dict(size=32, crop_scale=[0.2, 1.0], flip=0.5, jitter=[0.4, 0.4, 0.2, 0.1], jitter_prob=0.8, gray_prob=0.2,
            blur_prob=0.5, blur_sigma=[0.1, 2.0], solarize_prob=0.2)


def picture(seed, h=40, w=48):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
    return np.clip(np.asarray(small) + rng.normal(0, 10, (h, w, 3)), 0, 255).astype(np.uint8)


def coloured_samples():
    """Samples for write_beton: images of 16 px whose 3 classes differ in colour, separable in any network."""
    random = np.random.default_rng(0)

    def samples(i):
        image = random.integers(0, 60, (16, 16, 3), np.uint8)
        image[..., i % 3] += 150
        return image, None, i % 3, i, -1
    return samples


def named_betons(folder):
    """abc.beton and, to test on, bc.beton and de.beton, which name their classes. Returns the folder."""
    from data import write_beton
    samples, of = coloured_samples(), lambda split: {'dataset': {'name': 'folder', 'root': 'r', 'split': split}}
    write_beton(folder / 'abc.beton', samples, 96, {**of('train'), 'classes': ['a', 'b', 'c']}, num_workers=1)
    image = [samples(i)[0] for i in range(60)]
    bc = [i for i in range(60) if i % 3]
    for name, classes in (('bc', ['b', 'c']), ('de', ['d', 'e'])):
        write_beton(folder / f'{name}.beton', lambda k: (image[bc[k]], None, bc[k] % 3 - 1, k, -1), len(bc),
                    {**of('test'), 'classes': classes}, num_workers=1)
    return folder


@pytest.fixture(scope='module')
def one_thread():
    """For stages that run in this process: sums are made in the same order as in a sub-process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def damages(path):
    """Damage the file in all the ways that happen, one after the other; yields a word of what is to be said of it."""
    whole = path.read_bytes()
    for word, content in (('is empty', b''), ('', whole[:len(whole) // 2]), ('is a web page', b'<!DOCTYPE html>\n'),
                          ('begins with zeros', bytes(len(whole))), ('is a Git LFS pointer', b'version https://git-lfs.'),
                          ('', b'noise\n\xff\0' * 9)):
        path.write_bytes(content)
        yield word
    path.write_bytes(whole)


def held(stage, key, last):
    """Launcher of a stage that waits, once a checkpoint whose `key` is `last` is written, for the signal to come: on a
    busy machine it would otherwise have finished before."""
    code = (f'import runpy, sys, time; sys.argv.pop(0); sys.path.insert(0, {str(ROOT)!r}); import files; '
            f'save = files.save_checkpoint; files.save_checkpoint = lambda path, state: (save(path, state), '
            f'state.get({key!r}) == {last} and time.sleep(900)); '
            f'runpy.run_path({str(ROOT / stage)!r}, run_name="__main__")')
    return sys.executable, '-c', code


LONG = ('readme', 'fg_proportion', 'gen_views', 'pretrain', 'detect_eval', 'mutations', 'tiny', 'speed', 'linear_eval',
        'view_eval', 'latent_rows', 'train_walker', 'semi_eval', 'yamls')  # minutes; files of two workers, these first


def pytest_collection_modifyitems(items):
    names = [f'test_{name}' for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}


@pytest.fixture(autouse=True)
def signal_handlers():
    """A stage that ran in this process leaves its own behind: pytest would not end on SIGTERM."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


TEXT = {'context_length': 8, 'vocab_size': 64, 'width': 16, 'heads': 2, 'layers': 1}
TOWERS = {'vit': {'image_size': 32, 'patch_size': 4, 'width': 24, 'layers': 2, 'head_width': 12},
          'convnext': {'image_size': 96, 'timm_model_name': 'convnext_atto', 'timm_pool': '', 'timm_proj': 'linear',
                       'timm_model_pretrained': False}}


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    """Folders in open_clip's format with random weights: {'vit': path, 'convnext': path}."""
    import open_clip
    from safetensors.torch import save_file
    folders = {}
    for name, tower in TOWERS.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        (folder / 'open_clip_config.json').write_text(json.dumps({
            'model_cfg': {'embed_dim': 20, 'vision_cfg': tower, 'text_cfg': TEXT},
            'preprocess_cfg': {'mean': [0.5, 0.4, 0.3], 'std': [0.2, 0.3, 0.4]}}))
        torch.manual_seed(0)
        model = open_clip.create_model(f'local-dir:{folder}')
        for key, weight in model.named_parameters():  # fresh norms are the identity: a test could not see a missing one
            if weight.ndim == 1:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()},
                  folder / 'open_clip_model.safetensors')
    return folders


def small_gan(folder, **changes):
    """A folder for gan.biggan: 32 px, 6 chunks of 8, random weights. Returns it."""
    from safetensors.torch import save_file
    from gan import BigGAN
    torch.manual_seed(0)
    config = dict(widths=[32, 32, 32, 16, 16, 16], up=[1, 0, 1, 0, 1], attention=None, chunk=8, shared=4, **changes)
    network = BigGAN(**config)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.5)  # chunks shall show
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(network.state_dict(), folder / 'model.safetensors')
    return folder
