"""chunks.py: a chunk keeps its bytes, what is wrong with it is named, views come back, foreign ones go by name."""
import io
import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chunks import (ForeignViews, StoredViews, bad, chunk_defects, encode_view, read_chunk, view_names,  # noqa: E402
                    write_chunk)
from config import Fail  # noqa: E402
from conftest import picture  # noqa: E402
from sources import Source, source_dataset  # noqa: E402


def test_names_and_encoding_of_views():
    assert view_names(1, 'jpg')(7) == ['00000007.jpg']
    assert view_names(3, 'png')(12345678) == ['12345678.png', '12345678.2.png', '12345678.3.png']
    image = picture(0, 20, 20)
    opened = [Image.open(io.BytesIO(encode_view(image, 20, kind))) for kind in ('png', 'jpg')]
    assert [x.format for x in opened] == ['PNG', 'JPEG'] and (np.asarray(opened[0]) == image).all()
    assert np.abs(np.asarray(opened[1]).astype(int) - image).mean() < 12
    smaller = np.asarray(Image.open(io.BytesIO(encode_view(image, 12, 'png'))))
    assert (smaller == np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BICUBIC))).all()


def test_a_chunk_of_the_same_files_has_the_same_bytes(tmp_path):
    files = {'00000001.png': b'one', '00000000.png': b'zero', '00000000.json': b'{}'}
    write_chunk(tmp_path / 'a.tar', files)
    write_chunk(tmp_path / 'b.tar', dict(reversed(files.items())))
    assert (tmp_path / 'a.tar').read_bytes() == (tmp_path / 'b.tar').read_bytes()
    assert read_chunk(tmp_path / 'a.tar') == files and list(read_chunk(tmp_path / 'a.tar')) == sorted(files)
    assert bad(tmp_path / 'a.tar') == tmp_path / 'a.tar.bad'


def test_defects_and_checksums_of_a_chunk(tmp_path):
    path, record = tmp_path / '000000.tar', {'seed': 5, 'generator': 'g', 'precision': 'p'}
    views = [encode_view(picture(i, 8, 8), 8, 'png') for i in range(2)]
    files = {'00000000.json': json.dumps(record).encode(), '00000000.png': views[0], '00000001.png': views[1],
             '00000001.json': json.dumps(record).encode()}
    wanted, names = {i: {'seed': 5} for i in range(2)}, {f'{i:08d}.png': i for i in range(2)}
    assert chunk_defects(path, wanted, names, 8) == ([('missing chunks', '000000.tar')], {}, '')
    write_chunk(path, files)
    assert chunk_defects(path, wanted, names, 8) == (
        [], {name: sha256(files[name]).digest() for name in names}, 'g, p')
    write_chunk(path, {**files, '00000001.json': json.dumps({**record, 'error': 'NaN'}).encode(), 'x.txt': b''})
    assert chunk_defects(path, wanted, names, 9)[0] == [
        ('files too many', '000000.tar/x.txt'), ('failed views', '00000001.json: NaN'),
        ('views of another size', '00000000.png'), ('views of another size', '00000001.png')]
    path.write_bytes(b'no tar')
    (kind, where), = chunk_defects(path, wanted, names, 8)[0]
    assert kind == 'unreadable chunks' and where.startswith('000000.tar: ')


def test_stored_views_come_back_in_any_order(tmp_path):
    names, images = view_names(2, 'png'), [picture(i, 8, 8) for i in range(10)]
    for first in (0, 2, 4):
        write_chunk(tmp_path / f'{first // 2:06d}.tar', {
            name: encode_view(images[2 * i + v], 8, 'png') for i in (first, first + 1) if i < 5
            for v, name in enumerate(names(i)) if (i, v) != (3, 1)} | ({'00000003.json': b'{"error": ""}'} if first == 2
                                                                       else {}))
    views = StoredViews(tmp_path, 2, names)
    for i in (4, 0, 3, 1, 2, 0):
        assert len(views[i]) == (1 if i == 3 else 2)
        assert all((view == images[2 * i + v]).all() for v, view in enumerate(views[i]))
    whole = (tmp_path / '000001.tar').read_bytes()
    last = whole.index(b'00000002.png') + 100                       # a header that is cut ends a tar without a word
    for damaged in (whole[:700], b'no tar at all' * 100, b'', whole[:last], whole[:512],
                    whole.replace(b'IDAT', b'IDAX')):
        (tmp_path / '000001.tar').write_bytes(damaged)
        with pytest.raises(Fail, match='000001.tar: .*; delete it, and the same command makes it again') as error:
            StoredViews(tmp_path, 2, names)[2]
        assert '\n' not in str(error.value)


def test_foreign_views_are_found_by_name(tmp_path):
    for name in ('images/a/1.png', 'images/a/2.png', 'images/a/2.jpg', 'images/b/1.png', 'made/a/1.webp',
                 'made/a/2.jpg', 'made/b/3.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(0)).save(tmp_path / name)
    source = source_dataset({'name': 'folder', 'root': tmp_path / 'images'})
    views = ForeignViews(source, tmp_path / 'made', 10)
    found = {source.path(i): views.files[i] and views.files[i].name for i in range(len(source))}
    # of two images a/2 it may be the view of the one whose name it has to the letter
    assert found == {'a/1.png': '1.webp', 'a/2.jpg': '2.jpg', 'a/2.png': None, 'b/1.png': None}
    assert views.left == ['b/3.png'] and [view.shape for view in views[0]] == [(10, 12, 3)]
    assert views[list(found).index('b/1.png')] == []
    (tmp_path / 'made/a/1.webp').write_bytes(b'no picture')
    assert views[0] == []
    for root, words in ((tmp_path / 'none', 'views_root: .* is not a folder'),
                        (tmp_path / 'made/b', 'views_root: no file in .*3.png.* is named like an image of the')):
        with pytest.raises(Fail, match=words) as error:
            ForeignViews(source, root, 10)
        assert '\n' not in str(error.value)
    with pytest.raises(Fail, match='images of CIFAR10 have none'):
        ForeignViews(Source('CIFAR10', None, [0, 1], []), tmp_path / 'made', 40)
