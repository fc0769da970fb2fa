"""Stage 2: one synthetic positive view of every image (GenView section 3.3), packed into a beton of pairs.

    python gen_views.py yamls/gen_views/cifar10_adaptive.yaml
    torchrun --nproc-per-node 8 gen_views.py yamls/gen_views/in1k_adaptive.yaml
    python gen_views.py yamls/gen_views/in1k_adaptive.yaml shard=3/64     # a Slurm array needs no shard
    python gen_views.py yamls/gen_views/in1k_adaptive.yaml verify=true

Reads the noise levels and CLIP embeddings of stage 1 (fg_proportion.py). Views are kept in chunks of consecutive
images, OUTPUT/views/000012.tar with {index:08d}.png (or .jpg) and .json, WebDataset's naming. A chunk appears when it
is complete and is never made again: the same command goes on where a killed one stopped, and processes share the work
by taking every n-th chunk. The process that finds all chunks there writes OUTPUT/pairs.beton and pairs.png. By
images.npy, written with the first view or at packing, the images are known again: when they have changed since then or
since stage 1, nothing is made of them.

verify=true reads everything back (of several processes each its share, and duplicates within it), counts what is wrong
and exits with 1. A chunk with something wrong becomes 000012.tar.bad (empty where the chunk was missing): it has been
reported, and the same command, with verify=true or without, makes it again. So it is with a beton that is damaged or
was packed from such chunks.

generator.kind: icgan has IC-GAN draw a neighbour of the image (GenCL). With condition: pipeline it needs nothing of
stage 1: the features that it starts from are made here, in the same pass over the images.

strategy: latent needs no images: a GAN makes both of a pair from latents (COP-Gen, hierarchical-latent), of which the
second is the first one moved (`latent.chunks`). The chunk then holds {index:08d}.png, the anchor, and .1.png.

generator.kind: maskgit needs no stage 1: of the images themselves it draws most anew, and keeps the rest (GenCL).

The view of image i depends on (seed, i) and the settings alone, not on batches, processes or order. (In half precision
a GPU rounds differently for other batch sizes: the same picture, not the same bytes.)
"""
import json
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from config import Fail, changed_keys, check_values, few, run_folder
from start import run, say

DEFAULTS = """
output: ''                # run folder
dataset:                  # the images, as in stage 1
  name: ''                # a name of torchvision.datasets, 'tiny-imagenet', or 'folder'
  root: ''                # where it is or goes
  split: train
  download: false
  subset: !int null       # the first images of each class, this many in all; null: all
proportions: ''           # run folder of fg_proportion.py: noise levels and embeddings of the same images
source: generator         # generator | folder (views made elsewhere, such as the official pre-generated ones)
views_root: ''            # of source folder: its files are named like the images below root, up to the extension
strategy: adaptive        # adaptive (eq. 8) | constant | random (0, 100, ..., 400) (Table 7) | retrieval (in place of a
                          # generated view the most similar other image, Table 10; needs no generator) | latent (the
                          # images are generated too, see below) | none (no views: a beton for baselines and for
                          # evaluation sets)
noise_level: 200          # of strategy constant (and of views made elsewhere, where `proportions` is empty), 0-999
pool: ''                  # of strategy retrieval: run folder of fg_proportion.py (same encoder) on the images to choose
                          # from, which must still be where they were; empty: the images themselves
generator:
  kind: unclip            # unclip | icgan (GenCL's noise-based views; takes model, condition and noise alone) | maskgit
                          # (GenCL's mask-based ones: draws most of an image's tokens anew; needs no proportions, takes
                          # model, precision and mask alone)
  model: ''               # folder in diffusers' layout or hub id of a Stable unCLIP image-variation model; icgan: a
                          # published G_ema_best*.pth, or a folder (config.json, model.safetensors)
  fallbacks: []           # further ids, tried in turn
  steps: 20               # denoising steps (appendix A)
  guidance_scale: 10.0    # (appendix A)
  precision: auto         # fp32 | bf16 | fp16 | auto: fp16 on a GPU, on a CPU bf16 if it has AVX512-BF16
                          # and else fp32
  condition: stored       # stored: the embeddings of stage 1 | pipeline: the generator's own image encoder sees the
                          # images, for one that was trained with another encoder than that of stage 1 (icgan:
                          # noise.extractor does, and proportions may stay empty)
  vae_slicing: false      # decode one image after the other: less memory
  compile: false          # torch.compile of the UNet: the first batch takes minutes, the others less
  noise:                  # of kind icgan
    extractor: ''         # the ResNet-50 it was trained with: swav_800ep_pretrain.pth.tar; with classes: torchvision's
    truncation: 0.0       # latents are standard normal, cut off at +- twice this (official demo: 0.7); 0: not cut off
    label: !int null      # class of all views, of a generator with classes; null: each image's own
  mask:                   # of kind maskgit, whose model is MaskGIT_ImageNet_256.pth, or a folder (config.json,
                          # transformer.safetensors, vqgan/ in diffusers' layout)
    vqgan: ''             # taming's last.ckpt, or a folder in diffusers' layout; empty: vqgan/ in the model's folder
    keep_border: 1        # rings of tokens around the image that are kept (GenCL section 3.2)
    share: 1.0            # of the tokens inside, how many are drawn anew: random ones,
    block: false          # true: a square at a random place
    decoder: official     # official (cosine schedule of the masked tokens) | port (arccos schedule of all tokens)
    steps: 12             # (GenCL section 3.2)
    temperature: 4.5      # of the noise on the confidences, falls to 0
    sharpness: 1.0        # factor of the logits (the port's sm_temp)
    labels: false         # true: the image's class is told; the dataset's classes must be the model's, in their order
    guidance: 0.0         # classifier-free, with labels; reached at the last step
latent:                   # of strategy latent; takes the place of dataset, proportions and generator
  kind: biggan            # biggan (BigBiGAN) | stylegan2
  model: ''               # BigBiGAN_x1.pth, a folder (config.json, model.safetensors), or a StyleGAN2 file (.pt, .pkl,
                          # .safetensors)
  anchors: 1300000        # how many
  truncation: 2.0         # anchors are standard normal, cut off here; 0: not cut off
  psi: 1.0                # StyleGAN2's truncation in W
  crop: !int null         # pixels: the middle square that is kept, then resized to view_size (StyleGAN2 cars: 384)
  discriminator: ''       # of train_discriminator.py: of two candidates the better pair; empty: none
  chunks: !each           # what makes the positive: a range of chunks (3, or 1-5) and its move; {}: none, anchor alone
    std: 0.0              # normal noise,
    truncation: 2.0       # cut off at +- this many times std; 0: not cut off
    walker: ''            # or a walker of train_walker.py (also COP-Gen's and hierarchical-latent's files)
seed: 0
views_per_image: 1        # the loader then draws one per epoch
batch_size: 16            # images at once; halved when the GPU has not enough memory
chunk_size: 1000          # images a chunk: what a killed process loses at most
view_size: 512            # pixels a side of the stored view (official code: 768 reduced to 512)
view_format: jpg          # jpg (quality 95) | png (lossless, for small views)
image_size: !int null     # shorter side of the stored original; null: as it is
beton_mode: jpg           # jpg | raw (for images of a few thousand pixels)
beton_quality: 90         # of jpg
grid: 40                  # pairs in pairs.png
num_workers: 2            # threads that encode, write and check
shard: ''                 # i/n: take every n-th chunk from the i-th on (0/4 ... 3/4); empty: the Slurm array's, if any
verify: false             # true: read everything back (see above)
pack: !bool null          # null: whichever process finds all chunks there writes the beton | true: do nothing else |
                          # false: leave it
device: auto              # auto | cpu | cuda
"""
LEVELS = (0, 100, 200, 300, 400)
UNREADABLE = 'source image cannot be read'
# keys of `generator` that the views of a kind do not depend on; the first kind is known by having none in its settings
UNSEEN = {'unclip': {'kind', 'noise', 'mask'}, 'icgan': {'fallbacks', 'steps', 'guidance_scale', 'precision', 'mask'},
          'maskgit': {'fallbacks', 'steps', 'guidance_scale', 'condition', 'noise', 'vae_slicing', 'compile'}}
ALLOWED = {
    'output': 'folder', 'name': 'dataset', 'root': 'folder', 'split': ['train', 'test', 'val'], 'subset': (1, 10 ** 10),
    'source': ['generator', 'folder'], 'strategy': ['adaptive', 'constant', 'random', 'retrieval', 'latent', 'none'],
    'generator.kind': list(UNSEEN), 'label': (0, 10 ** 6), 'keep_border': (0, 1000), 'share': (0.0, 1.0),
    'decoder': ['official', 'port'], 'temperature': (0.0, 1000.0), 'sharpness': (0.001, 1000.0),
    'guidance': (0.0, 1000.0), 'latent.kind': ['biggan', 'stylegan2'], 'anchors': (1, 10 ** 9),
    'truncation': (0.0, 100.0), 'psi': (0.0, 1.0), 'crop': (1, 8192), 'std': (0.0, 100.0),
    'noise_level': (0, 999),
    'steps': (1, 1000), 'guidance_scale': (0.0, 1000.0), 'condition': ['stored', 'pipeline'], 'seed': (0, 10 ** 12),
    'views_per_image': (1, 90), 'batch_size': (1, 10 ** 5), 'chunk_size': (1, 10 ** 9), 'view_size': (1, 8192),
    'view_format': ['jpg', 'png'], 'image_size': (1, 65_500), 'beton_mode': ['jpg', 'raw'], 'beton_quality': (1, 100),
    'grid': (1, 10 ** 4), 'num_workers': (1, 1024)}


def by_mask(config):
    """Whether MaskGIT makes the views."""
    return config['generator']['kind'] == 'maskgit' and config['source'] == 'generator' \
        and config['strategy'] not in ('none', 'latent', 'retrieval')


def check(config):
    elsewhere, generated = config['source'] == 'folder', config['strategy'] != 'none'
    needs = ['views_root'] if elsewhere else ['proportions', 'generator.model'] if generated else []
    latent, absent = config['strategy'] == 'latent', []
    if config['strategy'] == 'retrieval' and not elsewhere:
        needs.remove('generator.model')
    if by_mask(config):
        needs.remove('proportions')
        if config['strategy'] != 'adaptive':
            raise Fail(f"strategy: {config['strategy']} chooses noise levels, and generator.kind maskgit has none; "
                       'leave it out')
        if config['generator']['mask']['guidance'] and not config['generator']['mask']['labels']:
            raise Fail('generator.mask.guidance: without labels there is nothing to guide by; set it to 0')
    if latent:
        if elsewhere:
            raise Fail('strategy: latent makes the views, source: folder has them; set one of the two')
        if config['views_per_image'] > 1 and not config['latent']['chunks']:
            raise Fail('views_per_image: strategy latent without latent.chunks makes no views; set it to 1')
        needs, absent = ['latent.model'], ['name', 'root']
    if 'generator.model' in needs and (config['generator']['kind'], config['generator']['condition']) == (
            'icgan', 'pipeline'):
        needs.append('generator.noise.extractor')
        if not config['proportions']:
            needs.remove('proportions')
            if config['strategy'] != 'constant':
                raise Fail(f"strategy: {config['strategy']} needs the noise levels of proportions; set strategy to "
                           "constant (noise_level to 0 for IC-GAN's published files), or proportions")
    check_values(config, {**{k: rule for k, rule in ALLOWED.items() if k not in absent},
                          **{need: 'file' if latent or need.endswith('extractor') else 'folder' for need in needs}})
    if elsewhere and (not generated or config['views_per_image'] > 1):
        raise Fail('source: folder packs one view an image; set views_per_image to 1, strategy to another than none')
    if elsewhere and config['strategy'] == 'retrieval':
        raise Fail('strategy: retrieval chooses the views, source: folder has them; set one of the two')
    for name in config['generator']['fallbacks']:
        if not isinstance(name, str):
            raise Fail(f'generator.fallbacks: {name!r} is no folder or hub id')


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from chunks import ForeignViews, StoredViews, bad, defects_of, encode_view, view_names, write_chunk
from common import Log, Processes, StopSignal, shard
from files import atomic, checksums, load_arrays, load_json, save_json, weights_checksum
from data import BeingWritten, open_beton, write_beton
from pictures import grid, harmless
from sources import Source, same_images, shrink, source_dataset


def main(config):
    processes = Processes(config['device'], group=False)  # nothing here waits for another process
    check(config)
    first, step = shard(config['shard'], processes)
    stop, output, elsewhere = StopSignal(), run_folder(config['output']), config['source'] == 'folder'
    latent = config['strategy'] == 'latent'
    source = Source('latents', None, np.full(config['latent']['anchors'], -1), []) if latent else \
        source_dataset(config['dataset'])
    levels, embeddings, checksum, known = noise_levels(config, source)
    settings = {'stage': 'gen_views', 'dataset': {k: config['dataset'][k] for k in ('name', 'root', 'split', 'subset')},
                'images': len(source), 'strategy': config['strategy']}
    if elsewhere:
        views = ForeignViews(source, config['views_root'], config['view_size'])
        levels = np.where([file is None for file in views.files], -1, levels)
        settings.update(source='folder', views=int((levels >= 0).sum()), levels=zlib.crc32(levels.tobytes()),
                        **{k: config[k] for k in ('views_root', 'view_size')})
    elif config['strategy'] != 'none':
        settings.update(recipe(config, checksum))
    moved = () if embeddings is None else ('dataset.root',)  # a dataset may move: its embeddings tell which one it is
    same_settings(output / 'settings.json', settings, (*moved, 'made_by'))  # before anything is written
    unmoved = {**settings, 'dataset': {k: v for k, v in settings['dataset'].items() if k != 'root'}}
    digest = f'{zlib.crc32(json.dumps(unmoved, sort_keys=True).encode()):08x}'
    log = Log(output, config, main=processes.main, alone=False)  # tasks of an array share it
    log.write(source.note)
    beton, chunks, mine, images = output / 'pairs.beton', [], [], output / 'images.npy'

    def claim(made_by):
        """Write down, if no other task has, what these views are made from and by which generator: those of a fallback,
        of other weights or in another precision must not mix with them."""
        path, ours = output / 'settings.json', {**made_by, **checksums(made_by['generator'])}
        same_settings(path, {**settings, 'made_by': ours}, (*moved, 'made_by'), claim=True)
        theirs = load_json(path).get('made_by', ours)  # an earlier version did not write it
        if theirs != ours and config['strategy'] != 'retrieval':  # its embeddings have been compared
            raise Fail(f"{output}: its views were made by {', '.join(map(str, theirs.values()))}, not by "
                       f"{', '.join(map(str, ours.values()))} (name, precision, checksum of the weights): make that "
                       'generator available again, or set generator.precision')
        if known is None and not latent and not images.exists():  # no stage 1 knows the images
            remember_images()

    def remember_images(once=True):
        identities = source.identities(range(len(source)))
        atomic(images, lambda path: np.save(path, identities), once)

    def compare(indices):
        """With the images that stage 1 saw, and with those that were packed."""
        if latent:
            return
        packed = load_arrays(images, 'delete it') if images.is_file() and (chunks or beton.exists()) else None
        for seen, what, remedy in ((known, config['proportions'], 'run fg_proportion.py on them again'),
                                   (packed, output, 'choose another output folder')):
            if seen is not None:
                same_images(source, indices, seen, what, remedy)

    def record(i):
        """What stands in the chunk beside the view of image i, but for generator and precision."""
        known = dict(index=i, path=source.path(i), noise_level=int(levels[i]), settings=digest)
        return known | (dict(error='stage 1 could not read the source image') if levels[i] < 0 else
                        dict(seed=draw(config['seed'], i)))

    if elsewhere:
        without = [source.path(i) for i, file in enumerate(views.files) if file is None]
        for files, what in ((without, 'images have no view'), (views.left, 'files there belong to no image')):
            log.write(f"{config['views_root']}: {len(files)} {what}" + f': {few(files)}' * bool(files))
    elif config['strategy'] != 'none':
        chunks = [(output / 'views' / f'{number:06d}.tar', range(start, min(start + config['chunk_size'], len(source))))
                  for number, start in enumerate(range(0, len(source), config['chunk_size']))]
        mine = chunks[first::step]
        todo = [c for c in mine if not c[0].exists() and (not config['verify'] or bad(c[0]).exists())]
        if todo or config['verify']:
            compare(np.array([i for _, part in mine for i in part], int))
        log.write(f'{len(source)} images, levels {histogram(levels)}; {len(chunks)} chunks, {len(todo)} to make here')
        if todo and config['pack'] is not True:
            generate(config, todo, source, levels, embeddings, record, claim, processes, log, stop)
    if config['verify']:
        unseen = source if known is None and not latent else None  # no stage 1 has looked at these images
        verify(config, mine, unseen, record, beton, first == 0, log, stop)
        if step > 1:  # only this share is known to be good
            return
    missing = [path.name for path, _ in chunks if not path.exists()]
    if missing and config['pack'] is True:
        raise Fail(f"{output / 'views'}: {len(missing)} of {len(chunks)} chunks are missing ({few(missing)}); make "
                   'them first, without pack=true')
    if missing or stop:
        log.write(f'{stop.name}: leaving; ' * bool(stop) + f'{len(missing)} of {len(chunks)} chunks are still to be '
                  'made; the same command goes on')
        sys.exit(stop.exit_code if stop else 0)
    if config['pack'] is False:
        log.write(f'all chunks are there; pack=true writes {beton}')
        return
    if first == 0 or not beton.exists():  # not all tasks at all images
        compare(np.arange(len(source)))
    settings.update({k: config[k] for k in ('image_size', 'beton_mode', 'beton_quality')}, classes=source.classes)
    if beton.exists():
        packed = {'classes': source.classes, **open_beton(beton, verify=False)['settings']}  # earlier ones name none
        changed = changed_keys(packed, settings, moved)
        if changed:
            raise Fail(f"{beton}: was packed with other settings: {', '.join(changed)}; delete it, and the same "
                       'command packs it again')
        log.write(f'{beton} is complete')
        return
    if not elsewhere:
        names = view_names(per_index(config), config['view_format'])
        views = StoredViews(output / 'views', config['chunk_size'], names)
    try:
        if not latent:
            remember_images(once=False)
        pack(config, beton, source, levels, views, settings, log, stop)
    except BeingWritten:
        log.write(f'{beton}: another process is packing it')


def recipe(config, checksum):
    """What decides the generated views beside their images, and checksums of the weights. checksum: of noise_levels."""
    spec, latent, retrieved = config['generator'], config['latent'], config['strategy'] == 'retrieval'
    found, made_of = {k: config[k] for k in ('seed', 'view_size', 'view_format', 'chunk_size')}, []
    if config['strategy'] == 'latent' or by_mask(config) or config['views_per_image'] > 1:
        found['views_per_image'] = config['views_per_image']
    if config['strategy'] == 'latent':
        found.update(dataset={'name': 'latents'}, latent=latent)
        made_of = [latent['model'], latent['discriminator'], *(move['walker'] for move in latent['chunks'].values())]
    else:
        unseen = {'vae_slicing', 'compile', *UNSEEN[spec['kind']]} | (
            {'condition'} if spec['condition'] == 'stored' else set())
        found['generator'] = None if retrieved else {k: v for k, v in spec.items() if k not in unseen}
        if by_mask(config):
            made_of = [spec['model'], spec['mask']['vqgan']]
        else:
            found.update(proportions=checksum,
                         noise_level=config['noise_level'] if config['strategy'] == 'constant' else None)
            if retrieved:  # None: among the images' own embeddings, whose checksum is known
                found['pool'] = zlib.crc32(np.ascontiguousarray(load_arrays(
                    Path(config['pool']) / 'embeddings.npy', f"run fg_proportion.py into {config['pool']} again",
                    mmap_mode='r'))) if config['pool'] else None
            elif spec['kind'] == 'icgan':
                made_of = [spec['model'], spec['noise']['extractor'] * (spec['condition'] == 'pipeline')]
    return {**found, 'weights': [weights_checksum(name) for name in made_of if name]} if made_of else found


def noise_levels(config, source):
    """Noise level (-1: no view) and embedding of every image, a checksum of both, and what stage 1 knew them by."""
    count = len(source)
    if config['strategy'] in ('none', 'latent') or by_mask(config):
        return np.full(count, -1 if config['strategy'] == 'none' else 0), None, None, None
    if not config['proportions']:  # views made elsewhere, or of images that no stage has seen
        return np.full(count, config['noise_level']), None, None, None
    retrieved = config['strategy'] == 'retrieval'
    stored = retrieved or config['source'] == 'generator' and config['generator']['condition'] == 'stored'
    folder, embeddings = Path(config['proportions']), None
    for name in ('fg_proportion.npz', 'embeddings.npy')[:1 + stored]:
        if not (folder / name).is_file():
            raise Fail(f'{folder / name}: no such file; run fg_proportion.py on this dataset first')
    mend = f'delete {folder} and run fg_proportion.py on this dataset again'
    found = load_arrays(folder / 'fg_proportion.npz', mend, keys=())
    if 'noise_level' not in found:
        raise Fail(f'{folder}: was made with proportions=false; run fg_proportion.py without it')
    adaptive, known = found['noise_level'], found.get('identity')  # of an earlier version there is none
    if stored:
        embeddings = load_arrays(folder / 'embeddings.npy', mend, mmap_mode='r')
    if known is not None and len(known) != count:
        same_images(source, np.arange(count), known, folder, 'run fg_proportion.py with the same dataset keys')
    if not len(adaptive) == len(adaptive if embeddings is None else embeddings) == count:
        raise Fail(f'{folder}: holds {len(adaptive)} noise levels' + f' and {len(embeddings)} embeddings' * stored +
                   f', the dataset {count} images; run fg_proportion.py with the same dataset keys')
    if config['strategy'] == 'constant':
        levels = np.full(count, config['noise_level'])
    elif config['strategy'] == 'random':
        levels = np.array([LEVELS[draw(config['seed'], i, 1) % len(LEVELS)] for i in range(count)])
    else:
        levels = np.zeros(count, int) if retrieved else adaptive.astype(int)
    levels = np.where(adaptive < 0, -1, levels)  # stage 1 could not read these
    checksum = zlib.crc32(np.ascontiguousarray(embeddings)) if stored else 0
    return levels, embeddings, zlib.crc32(levels.tobytes(), checksum), known


def per_index(config):
    """Pictures that a chunk holds of each index: its views, and of latents the anchor."""
    anchors = config['strategy'] == 'latent'
    return config['views_per_image'] * bool(config['latent']['chunks'] or not anchors) + anchors


def draw(*numbers):
    """A 63-bit number from a tuple of integers: all that is random about image i comes from (seed, i)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def histogram(levels):
    counts = sorted(Counter(levels.tolist()).items())
    return ', '.join(f"{level if level >= 0 else 'none'}: {n}" for level, n in counts)


def same_settings(path, settings, moved, claim=False):
    """Views made with other settings must not mix with these. moved: keys that may differ. claim: write the file, if no
    other task has."""
    if claim:
        save_json(path, settings, once=True)
    mend = 'delete it where the views beside it were made with these settings; verify=true looks whether they were'
    changed = path.exists() and changed_keys(load_json(path, mend), settings, moved)
    if changed:
        raise Fail(f"{path.parent}: was made with other settings: {', '.join(changed)}; choose another output folder "
                   'or delete this one')


# ---------------------------------------------------------------------------------------------------
# Generation

def generate(config, chunks, source, levels, embeddings, record, claim, processes, log, stop):
    retrieved, latent = (config['strategy'] == name for name in ('retrieval', 'latent'))
    conditions, labels = levels, None
    if latent:
        from latents import LatentPairs
        generator = LatentPairs(config['latent'], config['seed'], config['view_size'], processes.device)
    elif retrieved:
        from generators import Retrieval
        folder, own = Path(config['pool'] or config['proportions']), Path(config['proportions'])
        generator = Retrieval(folder, folder.resolve() == own.resolve(), config['view_size'], config['views_per_image'],
                              processes.device)
    elif by_mask(config):
        from maskgit import MaskGIT
        generator, conditions = MaskGIT(config['generator'], processes.device, len(source.classes)), source.labels
    elif config['generator']['kind'] == 'icgan':
        from generators import ICGAN
        generator = ICGAN(config['generator'], processes.device)
        labels = classes_of_views(config, generator, source)
        if not generator.levels and (config['strategy'], config['noise_level']) != ('constant', 0):
            raise Fail(f'strategy: {generator.name} knows no noise levels; set strategy to constant, noise_level to 0')
    else:
        from generators import UnCLIP
        generator = UnCLIP(config['generator'], processes.device)
    if embeddings is not None and embeddings.shape[1] != generator.embedding_dim:
        raise Fail(f"{config['proportions']}: embeddings have {embeddings.shape[1]} dimensions, {generator.name} wants "
                   f'{generator.embedding_dim}; run fg_proportion.py with the encoder that the generator was trained '
                   'with, or set generator.condition to pipeline')
    log.write(f'generator {generator.name} on {processes.device}, {generator.dtype}')
    several, kind, claimed = per_index(config), config['view_format'], False
    names = view_names(several, kind)
    size = min(config['batch_size'], len(levels) * several)
    # Encoding and writing happen while the generator goes on, two batches and one chunk behind at most; what goes wrong
    # there is raised here.
    encoding, writing = deque(), deque()

    def collect():
        while writing:
            future, path, views, seconds = writing.popleft()
            future.result()
            bad(path).unlink(missing_ok=True)
            log.write(f'{path.name}: {views} views, {views / seconds:.1f} a second' if bar.disable else None,
                      step=int(path.stem), views=views, views_per_second=views / seconds)

    total = sum(len(indices) for _, indices in chunks) * several
    with tqdm(total=total, unit='view', disable=None if processes.main else True) as bar, \
            ThreadPoolExecutor(config['num_workers']) as pool:
        for path, indices in chunks:
            start, at, files = time.time(), 0, {}
            made_by = {'generator': generator.name, 'precision': str(generator.dtype)[6:]}
            records = {i: {**record(i), **made_by} for i in indices}
            wanted = [(i, v) for i in indices if levels[i] >= 0 for v in range(several)]
            while at < len(wanted) and not stop:
                part = wanted[at:at + size]
                # A full batch always, the last view repeated: rounding may depend on the shape, a view must not. To
                # run on into the next chunk instead would save 0.8 % with batches of 16 and chunks of 1000.
                full = part + part[-1:] * (size - len(part))
                batch = [i for i, _ in full]
                try:  # the images are read for the generator's own encoder alone
                    own = embeddings is None and not latent
                    pictures = list(pool.map(lambda i: opened(source, i), batch)) if own else full
                    condition = None if latent else embeddings[batch] if not own else generator.embed(
                        [picture[0] if picture else Image.new('RGB', (64, 64)) for picture in pictures])
                    drawn = full if retrieved or latent else [view_seed(config['seed'], *pair) for pair in full]
                    classes = [] if labels is None else [labels[batch]]
                    images = generator.views(condition, conditions[batch], drawn, *classes)
                except torch.cuda.OutOfMemoryError:
                    images = None  # what the error holds on to is free only below
                if images is None:
                    if size == 1:
                        raise Fail(f'{processes.device}: too little memory for one image; set generator.vae_slicing to '
                                   'true, or generator.precision to fp16')
                    size //= 2
                    torch.cuda.empty_cache()
                    say(f'{processes.device}: out of memory; batches of {size} from here on')
                    continue
                if not claimed:  # only now: a generator that does not work leaves nothing behind
                    if not images.any():
                        raise Fail(f'{generator.name}: gave NaN for all of the first batch, in {generator.dtype} and '
                                   'in fp32: its weights are damaged')
                    claim(made_by)
                    claimed = True
                for (i, v), picture, image in zip(part, pictures, images):
                    if not picture or not (image.any() or latent):  # a GAN may well draw black
                        records[i]['error'] = 'the generator gave NaN' if picture else UNREADABLE
                    else:
                        files[names(i)[v]] = pool.submit(encode_view, image, config['view_size'], kind)
                        encoding.append(files[names(i)[v]])
                while len(encoding) > 2 * size:
                    encoding.popleft().result()
                at += len(part)
                bar.update(len(part))
            if stop:  # chunks are whole or not there
                break
            collect()
            views, seconds = len(files), time.time() - start
            files.update({f'{i:08d}.json': json.dumps(r).encode() for i, r in records.items()})
            writing.append((pool.submit(atomic, path, partial(write_chunk, files=files)), path, views, seconds))
        collect()


def classes_of_views(config, generator, source):
    """The class (N,) that the view of each image is to have, or None where the generator knows no classes."""
    label, classes = config['generator']['noise']['label'], generator.classes
    if label is None and not classes:
        return None
    if (label or 0) >= classes:
        raise Fail(f'generator.noise.label: {label}, but {generator.name} has {classes} classes; set it to '
                   + (f'0 to {classes - 1}' if classes else 'null'))
    if label is None and len(source.classes) != classes:
        raise Fail(f'generator.noise.label: {generator.name} has {classes} classes, the dataset {len(source.classes)}: '
                   'which is which is not known; set it to the class that all views shall have')
    return source.labels if label is None else np.full(len(source), label)


def view_seed(seed, i, v):
    """Of view v of image i; (seed, i, 1) is taken by the random levels."""
    return draw(seed, i, v + 1) if v else draw(seed, i)


# ---------------------------------------------------------------------------------------------------
# Verification

def verify(config, chunks, unseen, record, beton, beton_too, log, stop):
    """Read chunks and beton back. What is wrong is counted, what holds it set aside, and the process exits with 1.
    unseen: images of which it is not known whether they can be read, or None."""
    def records(indices):
        found = {i: record(i) for i in indices}
        for i in indices if unseen and not stop else ():
            if 'error' not in found[i] and not opened(unseen, i):
                found[i]['error'] = UNREADABLE
        return found

    names, distinct = view_names(per_index(config), config['view_format']), config['strategy'] != 'retrieval'
    defects, spoilt, count = defects_of(chunks, records, names, config['view_size'], config['num_workers'], distinct,
                                        stop)
    if stop:
        return
    if beton.exists() and beton_too:
        Path(f'{beton}.verified').unlink(missing_ok=True)  # every byte, whatever was checked before
        try:
            open_beton(beton)
        except Fail as error:
            defects.append(('damaged beton', str(error)))
    kinds = Counter(kind for kind, _ in defects)
    examples = [f'; {kind}: {n} ({", ".join([what for k, what in defects if k == kind][:3])}{", ..." * (n > 3)})'
                for kind, n in kinds.items()]
    say(f'verify: {count} views in {len(chunks)} chunks' + f' and {beton.name}' * (beton.exists() and beton_too)
        + (''.join(examples) or '; all is well'))
    log.write(verified=len(chunks), defects=kinds)
    if not defects:
        return
    for path in spoilt:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.replace(bad(path)) if path.exists() else bad(path).touch()
    if set(kinds) != {'missing chunks'}:
        with suppress(FileNotFoundError):  # there is none yet, or the task with another share was first
            beton.replace(bad(beton))
    say(f'the same command makes {len(spoilt)} chunks again')
    sys.exit(1)


# ---------------------------------------------------------------------------------------------------
# Packing

def pack(config, beton, source, levels, views, settings, log, stop):
    for leftover in (beton.parent / 'views').glob('.*.tmp.tar'):  # of killed processes: every chunk is complete now
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 60:  # a second task may be at the same chunk
                leftover.unlink()

    def leave_if_asked():  # write_beton removes what it has begun
        if stop:
            log.write(f'{stop.name}: leaving; the same command packs {beton} again')
            sys.exit(stop.exit_code)

    readable = list(range(len(source)))
    latent = config['strategy'] == 'latent'
    if not latent and ((levels < 0).any() or not config['proportions']):  # only then may some not open
        with ThreadPoolExecutor(config['num_workers']) as pool:
            opens = pool.map(lambda i: not stop and opened(source, i) is not None, readable)
            readable = [i for i, good in zip(readable, tqdm(opens, 'readable?', len(readable), disable=None)) if good]
        leave_if_asked()
    if not readable:
        raise Fail(f'{beton}: none of the {len(source)} source images can be read, so there is nothing to pack')
    lost, several, failed = len(source) - len(readable), config['views_per_image'], set()

    def sample(k):
        leave_if_asked()
        bar.update()  # (nothing happens once it is closed)
        i = readable[k]
        made = views[i] if levels[i] >= 0 else []
        image, label = (made.pop(0), -1) if latent and made else source[i]
        if levels[i] >= 0 and not made and (not latent or config['latent']['chunks']):
            failed.add(i)
        made = [made[v % len(made)] for v in range(several)] if made else None  # others stand in for one that failed
        image = image if latent else np.asarray(shrink(image, config['image_size']))
        return image, made, label, i, int(levels[i]) if made else -1

    with tqdm(desc=beton.name, total=len(readable), unit='image', disable=None) as bar:
        write_beton(beton, sample, len(readable), settings, mode=config['beton_mode'], quality=config['beton_quality'],
                    num_workers=config['num_workers'], views=several)
    bad(beton).unlink(missing_ok=True)
    log.write(f'{beton}: {len(readable)} samples' + (f'; {lost} source images could not be read and are left out: '
              f'{sorted(set(range(len(source))) - set(readable))[:10]}' if lost else '')
              + (f'; {len(failed)} views failed or cannot be read: {sorted(failed)[:10]}' if failed else ''))

    @harmless
    def draw_pairs(path):
        shown = [sample(k) for k in spread(levels[readable], config['grid'])]
        if grid(path, [((), [(f'level {level}', [image, made and made[0]]) for image, made, _, _, level in shown])]):
            log.write(f'{path}: source above, view below')

    if config['strategy'] != 'none':
        draw_pairs(beton.with_suffix('.png'))


def opened(source, i):
    """(PIL image, label) or None."""
    try:
        return source[i]
    except Exception:
        return None


def spread(levels, count):
    """`count` positions, as many of each level as there are, lower levels first."""
    found = [np.flatnonzero(levels == level) for level in sorted(set(levels.tolist()) - {-1})]
    each = -(-count // max(1, len(found)))
    return [int(p) for positions in found for p in positions[:each]][:count]


if __name__ == '__main__':
    run(main, DEFAULTS)
