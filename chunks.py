"""Views on disk: chunks of generated ones (write, read, find what is wrong with them), and views made elsewhere.

    write_chunk('views/000012.tar', {'00012000.png': ..., '00012000.json': ...})
    views = StoredViews(Path('views'), 1000, names)
    views[12000]                                         # a list of uint8 (H, W, 3)
"""
import io
import json
import os
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import Fail
from files import unreadable
from sources import is_image, rgb, shrink, walk

MEND = 'delete it, and the same command makes it again'


def view_names(views, kind):
    """Function of an image's index: the names of its views in the chunk, WebDataset's. kind: jpg or png."""
    return lambda i: [f"{i:08d}{f'.{v + 1}' if v else ''}.{kind}" for v in range(views)]


def encode_view(image, side, kind):
    """uint8 (H, W, 3) -> the bytes of a file of side x side pixels."""
    image, file = Image.fromarray(image), io.BytesIO()
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    image.save(file, 'PNG' if kind == 'png' else 'JPEG', quality=95)
    return file.getvalue()


def bad(path):
    """Where a file that was found to be defective is set aside."""
    return path.with_name(f'{path.name}.bad')


def write_chunk(path, files):
    """A tar at `path` of {name: bytes, or a future of them}. The same files give the same bytes: no time stamps."""
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            content = content if isinstance(content, bytes) else content.result()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def read_chunk(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def chunk_defects(path, records, views, side):
    """What is wrong with a chunk, [(kind, where)], the checksums of its views, {name: bytes}, and what made them.

    records    {index: what must stand in its .json; more may}
    views      {name: index} of the views that must be there, `side` pixels a side"""
    if not path.exists():
        return [('missing chunks', path.name)], {}, ''
    try:
        files = read_chunk(path)
    except Exception as error:                           # a damaged header can be anything
        return [('unreadable chunks', f"{path.name}: {' '.join(str(error).split())}")], {}, ''
    named, failed, makers = {f'{i:08d}.json': i for i in records}, set(), set()
    wrong = [('files too many', f'{path.name}/{name}') for name in files if name not in named and name not in views]
    for name, i in named.items():
        try:
            found = json.loads(files[name])
            wrong += [(f'other {key} in the record', name) for key in records[i] if found.get(key) != records[i][key]]
            makers.add(f"{found.get('generator')}, {found.get('precision')}")
            if 'error' in found and 'error' not in records[i]:
                wrong.append(('failed views', f'{name}: {found["error"]}'))
                failed.add(i)
        except (KeyError, AttributeError, ValueError):
            wrong.append(('missing or unreadable records', f'{path.name}/{name}'))
    for name, i in views.items():
        try:
            pixels = np.asarray(Image.open(io.BytesIO(files[name])).convert('RGB'))
            if pixels.shape[:2] != (side, side):
                wrong.append(('views of another size', name))
            if np.ptp(pixels) < 3:
                wrong.append(('black or constant views', name))
        except KeyError:
            wrong += [] if i in failed else [('missing views', name)]
        except Exception:                                # PIL raises a dozen types for a damaged file
            wrong.append(('unreadable views', name))
    return wrong, {name: sha256(files[name]).digest() for name in views if name in files}, '; '.join(sorted(makers))


def defects_of(chunks, records, names, side, workers, distinct, stop):
    """What is wrong in chunks, a list of (path, indices): defects [(kind, what)], the paths of the chunks that hold
    them, the number of views. records(indices): {i: what stands beside its views}; names(i): their names; side: pixels;
    distinct: whether equal views are wrong; stop: true once it is time to leave."""
    def inspect(chunk):
        path, indices = chunk
        beside = records(indices)
        views = {name: i for i in indices if 'error' not in beside[i] for name in names(i)}
        return ([], {}, '') if stop else chunk_defects(path, beside, views, side)

    defects, seen, spoilt, makers = [], {}, set(), {}
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(inspect, chunks), total=len(chunks), unit='chunk', disable=None)
        for (path, _), (wrong, views, maker) in zip(chunks, found):
            makers |= {path: maker} if maker else {}
            for name, checksum in views.items():
                other, where = seen.setdefault(checksum, (name, path))
                if other != name and distinct:
                    wrong.append(('duplicate views', f'{other} and {name}'))
                    spoilt.add(where)  # which of the two is wrong nobody knows
            defects += wrong
            spoilt |= {path} if wrong else set()
    usual = Counter(makers.values()).most_common(1)
    for path in (path for path, maker in makers.items() if maker != usual[0][0]):
        defects.append(('other generator or precision', f'{path.name}: {makers[path]}, most: {usual[0][0]}'))
        spoilt.add(path)
    return defects, spoilt, len(seen)


class StoredViews:
    """views[i] -> the views of image i, a list of uint8 (H, W, 3), from the chunks in a folder; any thread may ask.

    names(i): what they are called in the chunk. Raises Fail for a chunk that cannot be read."""

    def __init__(self, folder, chunk_size, names):
        self.folder, self.chunk_size, self.names = folder, chunk_size, names
        self.lock, self.chunks = threading.Lock(), {}

    def __getitem__(self, i):
        number = i // self.chunk_size
        with self.lock:
            if number not in self.chunks:
                path = self.folder / f'{number:06d}.tar'
                try:
                    files = read_chunk(path)
                except Exception as error:               # a damaged header can be anything
                    raise unreadable(path, error, MEND) from None
                self.chunks = {**dict(list(self.chunks.items())[-1:]), number: files}  # neighbours ask in turn
            files = self.chunks[number]
        path, missing = self.folder / f'{number:06d}.tar', [n for n in self.names(i) if n not in files]
        try:
            if missing and 'error' not in json.loads(files.get(f'{i:08d}.json', '{}')):
                raise ValueError(f'it ends before {missing[0]}')  # tarfile takes a cut header for the end
            return [np.asarray(Image.open(io.BytesIO(files[n])).convert('RGB')) for n in self.names(i) if n in files]
        except Exception as error:                       # PIL raises a dozen types for a damaged file
            raise unreadable(path, error, MEND) from None


class ForeignViews:
    """views[i] -> a list of the view of image i, made elsewhere, or an empty one where there is none that can be read.

    The view is the file below `root` of the same path as the image below the root of its Source; the extension may
    differ. Its shorter side is reduced to `side` pixels. Attributes: files, a Path or None for each image, and left,
    the files that belong to no image. Raises Fail when the images have no paths or none has a view."""

    def __init__(self, source, root, side):
        root, self.side, paths = Path(root), side, [source.path(i) for i in range(len(source))]
        if None in paths:
            raise Fail(f'source: views made elsewhere are found by file name, and images of {source.name} have '
                       'none; only a dataset of files can have such views (name: folder, for one)')
        if not root.is_dir():
            raise Fail(f'views_root: {root} is not a folder')
        stem = lambda path: os.path.splitext(path)[0]
        files = sorted(filter(is_image, walk(root)))
        exact, stems, same = set(files), {stem(f): f for f in files}, Counter(map(stem, paths))
        found = [p if p in exact else stems.get(stem(p)) if same[stem(p)] == 1 else None for p in paths]
        if not any(found):
            raise Fail(f'views_root: no file in {root} ({", ".join(files[:1]) or "which has no images"}) is named '
                       f'like an image of the dataset ({paths[0]}); all but the extension must be the same')
        self.files, self.left = [f and root / f for f in found], sorted(exact - set(found))

    def __getitem__(self, i):
        try:
            return [np.asarray(shrink(rgb(Image.open(self.files[i])), self.side))]
        except Exception:                                # PIL raises a dozen types for a damaged file
            return []
