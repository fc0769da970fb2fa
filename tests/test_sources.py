"""sources.py: folders and datasets by name; transfer sets' official splits from trees in the layout of each set."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sources  # noqa: E402
from config import Fail  # noqa: E402
from conftest import picture  # noqa: E402
from chunks import ForeignViews  # noqa: E402
from sources import HOMES, Source, same_images, source_dataset  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    for k, (split, name) in enumerate([('train', 'cat'), ('train', 'dog'), ('val', 'cat'), ('val', 'dog')]):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(5 - k % 2):
            Image.fromarray(picture(10 * k + i)).save(tmp_path / split / name / f'{i}.png')
    (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
    return tmp_path


def test_image_folder(folder):
    source = source_dataset({'name': 'folder', 'root': str(folder)})
    assert len(source) == 9 and source.classes == ['cat', 'dog'] and source.labels.tolist() == [0] * 5 + [1] * 4
    image, label = source[6]
    assert image.mode == 'RGB' and label == 1 and source.path(6) == 'dog/1.png'
    assert (np.asarray(image) == picture(11)).all()
    test = source_dataset({'name': 'folder', 'root': folder, 'split': 'test'})
    assert (np.asarray(test[0][0]) == picture(20)).all()
    assert [label for _, label in source] == source.labels.tolist()


def test_hidden_system_and_empty_folders_are_no_classes(folder):
    plain = source_dataset({'name': 'folder', 'root': folder})
    for name in ('.ipynb_checkpoints', '__MACOSX', '#recycle', 'empty', 'cat/.ipynb_checkpoints'):
        (folder / 'train' / name).mkdir()
    for name in ('.ipynb_checkpoints/a.png', '__MACOSX/a.png', '#recycle/a.png', 'cat/.ipynb_checkpoints/0.png',
                 'cat/._0.png'):
        Image.fromarray(picture(0)).save(folder / 'train' / name)
    source = source_dataset({'name': 'folder', 'root': folder})
    assert source.classes == ['cat', 'dog'] and source.paths == plain.paths
    assert source.note.endswith('folders without images, which are no classes: empty; files that are not read, by '
                                'extension: 1 .txt') and source.note.count(': empty;') == 1


@pytest.mark.parametrize('others', [['__MACOSX'], ['annotations'], ['.git', 'docs', 'masks']])
def test_splits_are_found_beside_other_folders(folder, others):
    for name in others:
        (folder / name).mkdir()
        Image.fromarray(picture(0)).save(folder / name / 'a.png')
    source = source_dataset({'name': 'folder', 'root': folder, 'split': 'val'})
    assert source.classes == ['cat', 'dog'] and len(source) == 9
    assert ('not used beside the splits' in (source.note or '')) == (others != ['__MACOSX'])


@pytest.mark.parametrize('train, val', [('train', 'valid'), ('Train', 'Validation'), ('training', 'test')])
def test_usual_names_of_a_split(folder, train, val):
    (folder / 'train').rename(folder / train)
    (folder / 'val').rename(folder / val)
    paths = {split: source_dataset({'name': 'folder', 'root': folder, 'split': split}).home
             for split in ('train', 'val', 'test')}
    assert paths == {'train': folder / train, 'val': folder / val, 'test': folder / val}


def test_a_split_that_is_not_there_is_one_line(folder):
    for root, words in ((folder / 'train', "has no split 'test': it has no folders train, val, test. To read all"),
                        (folder, "has no split 'test'; there is train")):
        if root == folder:
            shutil.rmtree(folder / 'val')
        with pytest.raises(Fail, match=words):
            source_dataset({'name': 'folder', 'root': root, 'split': 'test'})


def test_pictures_of_trains(tmp_path):
    for name in ('bus', 'train'):
        (tmp_path / name / 'more').mkdir(parents=True)
        Image.fromarray(picture(0)).save(tmp_path / name / 'more' / '0.png')
    with pytest.raises(Fail, match='is train a split, or a class beside bus'):
        source_dataset({'name': 'folder', 'root': tmp_path})
    Image.fromarray(picture(1)).save(tmp_path / 'train' / '1.png')
    source = source_dataset({'name': 'folder', 'root': tmp_path})
    assert source.classes == ['bus', 'train'] and source.labels.tolist() == [0, 1, 1]


def test_what_is_not_used_is_said(folder):
    root = folder / 'train'
    Image.fromarray(picture(0)).save(root / 'loose.png')
    for name in ('dog/a.HEIC', 'dog/b.heic', 'dog/README', 'index.csv'):
        (root / name).write_bytes(b'')
    source = source_dataset({'name': 'folder', 'root': root})
    assert len(source) == 9 and '1 images directly in it are not used, only those of its folders' in source.note
    assert source.note.endswith('by extension: 1 without extension, 1 .csv, 2 .heic, 1 .txt')
    Image.fromarray(picture(0)).save(folder / 'beside.png')
    (folder / 'beside.tgz').write_bytes(b'')
    source = source_dataset({'name': 'folder', 'root': folder})
    assert len(source) == 9 and 'not used beside the splits: beside.png;' in source.note and '1 .tgz' in source.note
    (folder / 'other').mkdir()
    (folder / 'other/a.heic').write_bytes(b'')
    with pytest.raises(Fail, match='no images .* there are other files: 1 .heic'):
        source_dataset({'name': 'folder', 'root': folder / 'other'})


def test_links_are_followed_but_not_in_circles(folder):
    root = folder / 'train'
    (root / 'cat/linked').symlink_to(folder / 'val/cat')
    (folder / 'val/cat/back').symlink_to(root / 'cat')
    (root / 'cat/self').symlink_to(root / 'cat/self')   # leads nowhere
    (folder.parent / f'{folder.name}_pool').mkdir()
    (folder / 'val/dog').rename(dog := folder.parent / f'{folder.name}_pool/dog')
    (root / 'bird').symlink_to(dog)
    for home in (root / 'cat', dog):                     # to where the other classes lie, and the other split
        for name, place in (('up', home.parent), ('train', root), ('top', folder)):
            (home / name).symlink_to(place)
    source = source_dataset({'name': 'folder', 'root': root})
    assert source.classes == ['bird', 'cat', 'dog'] and np.bincount(source.labels).tolist() == [4, 10, 4]
    assert [source.path(i) for i in (4, 9, 13)] == ['cat/0.png', 'cat/linked/0.png', 'cat/linked/4.png']
    assert (np.asarray(source[9][0]) == picture(20)).all()
    views = ForeignViews(source, root, 40)              # a tree of views is walked in the same way
    assert all(views.files) and not views.left


def test_identity_tells_changed_images(folder):
    spec = {'name': 'folder', 'root': str(folder)}
    source = source_dataset(spec)
    known, every = source.identities(np.arange(9)), np.arange(9)
    assert len(set(known.tolist())) == 9 and known.dtype == np.uint32
    shutil.copytree(folder, folder / 'moved/data')
    moved = source_dataset({**spec, 'root': folder / 'moved/data'})
    same_images(moved, every, known, 'file', 'remedy')
    (folder / 'train/cat/2.png').unlink()               # one removed, one added: as many as before
    Image.fromarray(picture(3)).save(folder / 'train/dog/9.png')
    changed = source_dataset(spec)
    with pytest.raises(Fail, match=r'file: was made from other images: image 2 of 9 is cat/3.png now.* or remedy'):
        same_images(changed, every, known, 'file', 'remedy')
    same_images(changed, every[:2], known, 'file', 'remedy')
    (folder / 'train/dog/9.png').unlink()
    (folder / 'train/cat/2.png').write_bytes((folder / 'moved/data/train/cat/2.png').read_bytes())
    with pytest.raises(Fail, match='image 4 of 9 is dog/0.png now, one of 8'):
        same_images(source_dataset({**spec, 'subset': 8}), every, known, 'file', 'remedy')
    with pytest.raises(Fail, match='image 7 of 7 is dog/2.png now, one of 9'):
        same_images(source_dataset(spec), every, known[:7], 'file', 'remedy')
    with pytest.raises(Fail, match='image 9 of 10 is gone, one of 9'):
        same_images(source_dataset(spec), every, np.append(known, 1), 'file', 'remedy')
    same_images(source_dataset(spec), every, known, 'file', 'remedy')
    with open(folder / 'train/cat/4.png', 'ab') as file:
        file.write(b'x')
    with pytest.raises(Fail, match='image 4 of 9 is cat/4.png now'):
        same_images(source_dataset(spec), every, known, 'file', 'remedy')


def test_identity_of_images_in_memory():
    pixels = [picture(i) for i in range(4)]
    source = Source('CIFAR10', pixels.__getitem__, [0, 1, 0, 1], ['a', 'b'])
    known = source.identities(np.arange(4))
    same_images(source, np.arange(4), known, 'file', 'remedy')
    pixels[2] = picture(9)
    with pytest.raises(Fail, match='image 2 of 4 is another one now'):
        same_images(source, np.arange(4), known, 'file', 'remedy')


def test_a_set_whose_labels_are_no_numbers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr('sources._torchvision', lambda *_: (None, ['a.xml', {}], [], []))
    with pytest.raises(Fail, match='dataset FakeData in .*: its labels are no class numbers') as error:
        source_dataset({'name': 'FakeData', 'root': str(tmp_path)})
    assert '\n' not in str(error.value)


def test_a_set_without_split_has_no_test_images(tmp_path):
    put(tmp_path / 'eurosat/2750', 'River/1.jpg', 'Forest/1.jpg')
    assert source_dataset({'name': 'EuroSAT', 'root': tmp_path}).classes == ['Forest', 'River']
    for split in ('test', 'val'):
        with pytest.raises(Fail, match=f"EuroSAT has no official split, so no '{split}': .*name: folder"):
            source_dataset({'name': 'EuroSAT', 'root': tmp_path, 'split': split})


def test_a_folder_that_torchvision_would_take_for_a_class_is_one_line(tmp_path):
    put(tmp_path / 'eurosat/2750', 'Forest/a.jpg', 'River/b.jpg')
    assert source_dataset({'name': 'EuroSAT', 'root': tmp_path}).classes == ['Forest', 'River']
    put(tmp_path / 'eurosat/2750', '.ipynb_checkpoints/a.jpg')
    with pytest.raises(Fail, match='EuroSAT in .*: .ipynb_checkpoints would be a class: delete that folder'):
        source_dataset({'name': 'EuroSAT', 'root': tmp_path})


def test_flat_folder(folder):
    source = source_dataset({'name': 'folder', 'root': folder / 'train' / 'dog'})
    assert len(source) == 4 and source[2][1] == -1 and source.classes == [] and source.path(2) == '2.png'


def test_subset_is_balanced_and_stable(folder):
    pick = lambda n: source_dataset({'name': 'folder', 'root': folder, 'subset': n})
    assert [pick(4).path(i) for i in range(4)] == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']
    assert pick(3).labels.tolist() == [0, 0, 1] and len(pick(9)) == 9
    for bad in (0, 10, 2.5):
        with pytest.raises(Fail, match='subset'):
            pick(bad)


def test_a_wrong_subset_does_not_advise_a_download(tmp_path, monkeypatch):
    images = [np.zeros((2, 2, 3), np.uint8)] * 4
    monkeypatch.setattr(sources, '_cifar', lambda *_: (np.stack(images), [0, 1, 0, 1], ['a', 'b']))
    for subset in ('abc', 0, -1, 2.5, True, 5):
        with pytest.raises(Fail, match='subset') as error:
            source_dataset({'name': 'CIFAR10', 'root': str(tmp_path), 'subset': subset})
        assert 'unpack' not in str(error.value)
    assert len(source_dataset({'name': 'CIFAR10', 'root': str(tmp_path), 'subset': 2})) == 2


def test_an_unreadable_image_is_one_error_of_its_own(folder):
    broken = folder / 'train' / 'cat' / '1.png'
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / 'train' / 'cat' / '2.png').write_bytes(b'')
    source = source_dataset({'name': 'folder', 'root': folder})
    for i in (1, 2):
        with pytest.raises(Fail, match=f'image {i} .cat/{i}.png. cannot be read'):
            source[i]
    assert source[0][0].size == source[3][0].size == (48, 40)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = Image.fromarray(picture(0))
    deep = (np.asarray(rgb.convert('L')).astype(np.uint16) * 257)
    clear = rgb.copy()
    clear.putalpha(Image.new('L', rgb.size, 0))
    kinds = {'cmyk.jpg': rgb.convert('CMYK'), 'deep.png': Image.fromarray(deep), 'palette.png': rgb.convert('P'),
             'gray.jpg': rgb.convert('L'), 'clear.png': clear, 'bits.png': rgb.convert('1'),
             'la.png': rgb.convert('LA'), 'float.tiff': rgb.convert('F')}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    rgb.save(tmp_path / 'moves.gif', save_all=True, append_images=[Image.new('RGB', rgb.size)])
    source = source_dataset({'name': 'folder', 'root': tmp_path})
    found = {source.path(i): source[i][0] for i in range(len(source))}
    assert len(found) == 9 and all(x.mode == 'RGB' and x.size == (48, 40) for x in found.values())
    assert (np.asarray(found['deep.png'])[..., 0] == deep // 257).all()
    assert (np.asarray(found['clear.png']) == 255).all()
    assert abs(np.asarray(found['float.tiff'])[..., 0] - np.asarray(rgb.convert('F'))).max() <= 0.51
    for name in ('cmyk.jpg', 'palette.png', 'moves.gif'):
        assert abs(np.asarray(found[name]).astype(int) - picture(0)).mean() < 25


@pytest.mark.parametrize('spec, words', [
    ({'name': 'CIFAR11'}, "did you mean 'CIFAR10'"),
    ({'name': 'tiny_imagenet'}, "did you mean 'tiny-imagenet'"),
    ({'nam': 'CIFAR10'}, "unknown key 'nam'; did you mean 'name'"),
    ({'name': None}, 'no dataset is named'),
    ('CIFAR10', 'expected the keys'),
    ({'name': 'CIFAR10', 'split': 'all'}, 'split'),
    ({'name': 'CIFAR10'}, 'CIFAR10 in .*: Dataset not found'),
    ({'name': 'tiny-imagenet'}, 'tiny-imagenet is not in'),
    ({'name': 'folder', 'root': 'nowhere'}, 'No such file'),
    ({'name': 'STL10'}, 'dataset STL10 in'),
    ({'name': 'folder'}, 'no images')])
def test_a_wrong_dataset_is_one_clear_line(tmp_path, spec, words):
    if isinstance(spec, dict):
        spec = {**spec, 'root': str(tmp_path / spec.get('root', ''))}
    with pytest.raises(Fail, match=words) as e:
        source_dataset(spec)
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)


def test_torchvisions_folder_is_ours(tmp_path):
    """Its own would take splits, and hidden folders with images, for classes."""
    for i, name in enumerate(('train/a', 'train/b', 'train/.ipynb_checkpoints', 'val/b')):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(picture(i)).save(tmp_path / name / 'x.png')
    source = source_dataset({'name': 'ImageFolder', 'root': str(tmp_path)})
    assert source.classes == ['a', 'b'] and source[1][1] == 1 and source.path(1) == 'b/x.png'
    assert (np.asarray(source[1][0]) == picture(1)).all()


def test_trees_that_are_a_level_too_deep(tmp_path):
    put(tmp_path, *(f'{top}/{kind}/{k}.png' for top in ('seg_train', 'seg_test') for kind in ('x', 'y') for k in '12'))
    note = source_dataset({'name': 'folder', 'root': str(tmp_path)}).note
    assert 'lie in folders inside them: seg_test/x, seg_train/x' in note and '\n' not in note
    put(tmp_path, 'seg_train/1.png')  # images of its own: a class with folders in it
    assert 'inside them: seg_test/x (' in source_dataset({'name': 'folder', 'root': str(tmp_path)}).note
    put(tmp_path / 'two', *(f'set/{split}/{kind}/1.png' for split in ('train', 'val') for kind in 'xy'))
    with pytest.raises(Fail, match=r'the only class would be set .train, val., which holds splits: set .*root=.*/set$'):
        source_dataset({'name': 'folder', 'root': str(tmp_path / 'two')})
    put(tmp_path / 'two', 'nut/train/1.png', 'nut/test/1.png')  # as MVTec: a class holds its splits
    source = source_dataset({'name': 'folder', 'root': str(tmp_path / 'two')})
    assert source.classes == ['nut', 'set'] and len(source) == 6
    assert 'of which all images are taken: nut (test, train), set (train, val)' in source.note
    put(tmp_path / 'three', 'engine/train/1.png', 'engine/wagon/1.png', 'ship/1.png')  # a train is a thing too
    assert source_dataset({'name': 'folder', 'root': str(tmp_path / 'three')}).classes == ['engine', 'ship']


def test_images_that_are_no_files(tmp_path, monkeypatch):
    """FER2013 keeps (pixels, label) where others keep (path, label)."""
    class Pixels(torchvision.datasets.FER2013):
        def __init__(self, root, split='train'):
            self._samples = [(torch.full((4, 4), 40 * k, dtype=torch.uint8), k) for k in range(3)]
            self.transform = self.target_transform = None
    monkeypatch.setattr(torchvision.datasets, 'FER2013', Pixels)
    source = source_dataset({'name': 'FER2013', 'root': str(tmp_path)})
    assert source.labels.tolist() == [0, 1, 2] and source.path(1) is None
    assert (np.asarray(source[2][0]) == 80).all() and len({source.identity(k) for k in range(3)}) == 3


def test_brightness_of_16_bits_and_of_floats_does_not_depend_on_the_image(tmp_path):
    for k, (value, kind, expected) in enumerate((
            (250, np.uint16, 1), (260, np.uint16, 1), (51400, np.uint16, 200), (0.5, np.float32, 128),
            (200, np.float32, 200), (51400, np.int32, 200))):
        Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / f'{k}.tiff')
        image, _ = source_dataset({'name': 'folder', 'root': str(tmp_path)})[k]
        assert (np.asarray(image) == expected).all(), (value, kind)


def test_cifar_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch):
    import torchvision.datasets

    def unreachable(root, train, download):
        if download:
            (Path(root) / 'half.tar.gz').write_bytes(b'half')
        raise OSError('no such host')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', unreachable)
    monkeypatch.setenv('PATH', '')                       # no npm either
    with pytest.raises(Fail, match='CIFAR10 in .*no such host.*npm'):
        source_dataset({'name': 'CIFAR10', 'root': tmp_path, 'download': True})
    assert os.listdir(tmp_path) == []


def test_cifar_with_a_wrong_pixel_is_refused(tmp_path):
    images = {s: np.zeros((n, 32, 32, 3), np.uint8) for s, n in (('train', 50_000), ('test', 10_000))}
    np.savez(tmp_path / 'cifar10.npz', **{f'{s}_images': x for s, x in images.items()}, classes=np.array(['a']),
             **{f'{s}_labels': np.zeros(len(x), int) for s, x in images.items()})
    for split in ('train', 'test'):
        with pytest.raises(Fail, match='cifar10.npz is damaged .number, mean or checksum'):
            source_dataset({'name': 'CIFAR10', 'root': tmp_path, 'split': split})
    (tmp_path / 'cifar10.npz').write_bytes(b'PK')
    with pytest.raises(Fail, match='damaged'):
        source_dataset({'name': 'CIFAR10', 'root': tmp_path})


# ---------------------------------------------------------------------------------------------------------------------
# Transfer sets by name

def put(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), 7, np.uint8)).save(path / name)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def read(root, name, split):
    """Paths and labels; every image opens."""
    source = source_dataset({'name': name, 'root': str(root), 'split': split})
    assert all(source[i][0].size == (9, 8) and source[i][1] == source.labels[i] for i in range(len(source)))
    return [source.path(i) for i in range(len(source))], source.labels.tolist()


def test_food101_and_pets_and_aircraft(tmp_path):
    put(tmp_path / 'food-101/images', 'pie/1.jpg', 'pie/2.jpg', 'soup/3.jpg')
    for split, files in (('train', {'pie': ['pie/1'], 'soup': ['soup/3']}), ('test', {'pie': ['pie/2'], 'soup': []})):
        write(tmp_path / f'food-101/meta/{split}.json', json.dumps(files))
    assert read(tmp_path, 'Food101', 'train') == (['food-101/images/pie/1.jpg', 'food-101/images/soup/3.jpg'], [0, 1])
    assert read(tmp_path, 'Food101', 'test') == read(tmp_path, 'Food101', 'val') == (['food-101/images/pie/2.jpg'], [0])

    put(tmp_path / 'oxford-iiit-pet/images', 'Abyssinian_1.jpg', 'pug_2.jpg', 'pug_3.jpg')
    write(tmp_path / 'oxford-iiit-pet/annotations/trainval.txt', 'Abyssinian_1 1 1 1', 'pug_2 2 2 1')
    write(tmp_path / 'oxford-iiit-pet/annotations/test.txt', 'pug_3 2 2 1')
    paths, labels = read(tmp_path, 'OxfordIIITPet', 'train')
    assert labels == [0, 1] and paths[1] == 'oxford-iiit-pet/images/pug_2.jpg'
    assert read(tmp_path, 'OxfordIIITPet', 'test')[1] == [1]

    home = tmp_path / 'fgvc-aircraft-2013b/data'
    put(home / 'images', '1.jpg', '2.jpg', '3.jpg')
    write(home / 'variants.txt', '707', 'A 300')
    write(home / 'images_variant_trainval.txt', '1 A 300', '2 707')
    write(home / 'images_variant_test.txt', '3 A 300')
    assert read(tmp_path, 'FGVCAircraft', 'train')[1] == [1, 0] and read(tmp_path, 'FGVCAircraft', 'test')[1] == [1]


def test_dtd_trains_on_training_and_validation_images(tmp_path):
    put(tmp_path / 'dtd/dtd/images', *(f'{c}/{i}.jpg' for c in ('dotted', 'woven') for i in range(3)))
    for i, split in enumerate(('train', 'val', 'test')):
        write(tmp_path / f'dtd/dtd/labels/{split}1.txt', f'dotted/{i}.jpg', f'woven/{i}.jpg')
    paths, labels = read(tmp_path, 'DTD', 'train')
    assert [Path(p).parts[-2:] for p in paths] == [('dotted', '0.jpg'), ('woven', '0.jpg'), ('dotted', '1.jpg'),
                                                   ('woven', '1.jpg')] and labels == [0, 1, 0, 1]
    assert len(read(tmp_path, 'DTD', 'val')[0]) == len(read(tmp_path, 'DTD', 'test')[0]) == 2


def test_flowers_trains_on_training_and_validation_images_and_cars_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.Flowers102, '_check_integrity', lambda self: True)  # checksums of the real
    home = tmp_path / 'flowers-102'
    put(home / 'jpg', *(f'image_{i:05d}.jpg' for i in range(1, 7)))
    scipy.io.savemat(home / 'imagelabels.mat', {'labels': [[77, 1, 77, 2, 3, 4]]})
    scipy.io.savemat(home / 'setid.mat', {'trnid': [[4, 5]], 'valid': [[1, 6]], 'tstid': [[2, 3]]})
    paths, labels = read(tmp_path, 'Flowers102', 'train')
    assert [Path(p).stem[-1] for p in paths] == ['4', '5', '1', '6'] and labels == [1, 2, 76, 3]
    assert read(tmp_path, 'Flowers102', 'test')[1] == [0, 76]

    home = tmp_path / 'stanford_cars'
    put(home, *(f'cars_{split}/{i}.jpg' for split in ('train', 'test') for i in (1, 2)))
    (home / 'devkit').mkdir()
    for file, classes in (('devkit/cars_train_annos', (196, 1)), ('cars_test_annos_withlabels', (7, 8))):
        rows = np.array([(c, f'{i}.jpg') for i, c in enumerate(classes, 1)], [('class', object), ('fname', object)])
        scipy.io.savemat(home / f'{file}.mat', {'annotations': rows})
    scipy.io.savemat(home / 'devkit/cars_meta.mat', {'class_names': np.array(['a', 'b'], object)})
    assert read(tmp_path, 'StanfordCars', 'train') == (['stanford_cars/cars_train/1.jpg',
                                                        'stanford_cars/cars_train/2.jpg'], [195, 0])
    assert read(tmp_path, 'StanfordCars', 'test')[1] == read(tmp_path, 'StanfordCars', 'val')[1] == [6, 7]


def test_sun397_has_its_first_partition(tmp_path):
    home = tmp_path / 'SUN397'
    put(home, 'a/abbey/sun_1.jpg', 'b/bow_window/indoor/sun_2.jpg', 'b/bow_window/indoor/sun_3.jpg')
    write(home / 'ClassName.txt', '/a/abbey', '/b/bow_window/indoor')
    with pytest.raises(Fail, match='Training_01.txt is not there: unpack Partitions.zip'):
        read(tmp_path, 'SUN397', 'train')
    write(home / 'Training_01.txt', '/b/bow_window/indoor/sun_2.jpg', '/a/abbey/sun_1.jpg')
    write(home / 'Testing_01.txt', '/b/bow_window/indoor/sun_3.jpg')
    assert read(tmp_path, 'SUN397', 'train') == (['b/bow_window/indoor/sun_2.jpg', 'a/abbey/sun_1.jpg'], [1, 0])
    assert read(tmp_path, 'SUN397', 'test') == (['b/bow_window/indoor/sun_3.jpg'], [1])


def test_caltech101_has_30_images_of_each_class_always_the_same(tmp_path):
    home = tmp_path / 'caltech101/101_ObjectCategories'
    for name, number in (('BACKGROUND_Google', 2), ('Faces', 34), ('ant', 31)):
        put(home, *(f'{name}/image_{i:04d}.jpg' for i in range(1, number + 1)))
    train, labels = read(tmp_path, 'Caltech101', 'train')
    test, test_labels = read(tmp_path, 'Caltech101', 'test')
    assert labels == [0] * 30 + [1] * 30 and test_labels == [0] * 4 + [1]
    assert not set(train) & set(test) and len(set(train) | set(test)) == 65
    (home / 'aaa').mkdir()                               # empty: no class, and it must not change what is drawn
    assert train == read(tmp_path, 'Caltech101', 'train')[0]
    assert train[:30] != sorted(train + test)[:30]                      # drawn, not the first ones
    assert test == ['Faces/image_0001.jpg', 'Faces/image_0009.jpg', 'Faces/image_0023.jpg', 'Faces/image_0026.jpg',
                    'ant/image_0029.jpg']                               # these, on every machine


@pytest.mark.parametrize('name', HOMES)
def test_a_set_that_is_not_there_is_one_line_that_says_what_to_download_and_where_to_put_it(tmp_path, name):
    with pytest.raises(Fail) as error:
        source_dataset({'name': name, 'root': str(tmp_path)})
    source, there = HOMES[name]
    assert source in str(error.value) and str(tmp_path / there) in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())
