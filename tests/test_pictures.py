"""pictures.py on small arrays: what is drawn, and where."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pictures import curves, grid, histograms, overlay  # noqa: E402

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


def plain(colour):
    return np.full((6, 6, 3), COLOURS[colour], np.uint8)


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB')).astype(int)


def places(pixels, colour):
    """Rows and columns of this colour's pixels."""
    return np.nonzero((np.abs(pixels - COLOURS[colour]) < 3).all(-1))


def spy(monkeypatch, method):
    """Everything that is handed to a method of the axes, while it draws as ever."""
    calls, before = [], getattr(Axes, method)

    def spied(self, *args, **kwargs):
        calls.append((args, kwargs))
        return before(self, *args, **kwargs)
    monkeypatch.setattr(Axes, method, spied)
    return calls


def test_grid_has_its_images_in_their_cells_and_none_leaves_a_cell_free(tmp_path):
    grid(tmp_path / 'new/grid.png', [((), [('1', [plain('red'), plain('green')]), ('2', [plain('blue'), None]),
                                           ('3', [plain('red'), plain('green')])])], columns=3)
    with Image.open(tmp_path / 'new/grid.png') as image:
        assert image.format == 'PNG' and image.width / image.height == pytest.approx(3.3 / 2.5, rel=0.01)
    pixels = opened(tmp_path / 'new/grid.png')
    height, width = pixels.shape[:2]
    third, half, top = width // 3, round(height * 1.1 / 2.5), round(height * 0.3 / 2.5)  # above: the titles
    cells = {(r, c): pixels[top + r * half:top + (r + 1) * half, c * third:(c + 1) * third]
             for r in (0, 1) for c in range(3)}
    for cell, colour in {(0, 0): 'red', (1, 0): 'green', (0, 1): 'blue', (0, 2): 'red', (1, 2): 'green'}.items():
        assert len(places(cells[cell], colour)[0]) > 0.7 * third * half, cell
        for other in COLOURS.keys() - {colour}:
            assert len(places(cells[cell], other)[0]) == 0, (cell, other)
    assert (cells[1, 1] == 255).all()
    assert not list(tmp_path.rglob('*.tmp*'))


def test_sections_begin_new_lines_with_their_labels(tmp_path, monkeypatch):
    texts = spy(monkeypatch, 'text')
    grid(tmp_path / 'grid.png', [(('above', 'below'), [(str(k), [plain('red'), plain('green')]) for k in range(3)]),
                                 ((), [('last', [plain('blue'), plain('blue')])])], columns=2)
    labels = ['above', 'below']                          # of the section's two lines
    assert [args[2] for args, _ in texts] == ['0', '1', *labels, '2', *labels, 'last']
    pixels = opened(tmp_path / 'grid.png')
    height, width = pixels.shape[:2]
    assert width / height == pytest.approx(2.5 / 7.5, rel=0.01)
    rows, columns = places(pixels, 'blue')
    assert rows.min() > 0.6 * height and columns.max() < 0.6 * width
    rows, columns = places(pixels, 'red')
    assert rows.max() < 0.55 * height and (columns > width / 2).any()


def test_overlay_darkens_exactly_what_is_masked_out():
    image = np.random.default_rng(0).uniform(0.2, 1, (6, 8, 3))
    found = overlay(image, np.array([[1.0, 0.0]]))
    assert (found[:, :4] == image[:, :4]).all()
    np.testing.assert_allclose(found[:, 4:], 0.25 * image[:, 4:] + np.array([0, 0.05, 0.3]))
    checked = overlay(image[:5, :7], np.array([[1.0, 0.0], [0.0, 1.0]]))  # does not divide: cells of 3 x 4 pixels
    same = (checked == image[:5, :7]).all(-1)
    assert same.tolist() == [[True] * 4 + [False] * 3] * 3 + [[False] * 4 + [True] * 3] * 2
    assert (overlay(image, np.ones((3, 4), bool)) == image).all()


def test_histograms_count_everything_in_common_bins(tmp_path, monkeypatch):
    counted, lines = spy(monkeypatch, 'hist'), spy(monkeypatch, 'axvline')
    histograms(tmp_path / 'h.png', [('cosine', 'pairs', {'a': np.arange(4.0).reshape(2, 2), 'b': [5.0]}, (2.5, 'x')),
                                    ('level', 'images', {'same': [7, 7, 7]}, None)])
    assert [kwargs['label'] for _, kwargs in counted] == ['a', 'b', 'same']
    assert [len(args[0]) for args, _ in counted] == [4, 1, 3]
    (_, first), (_, second), (_, third) = (args for args, _ in counted)
    assert (first == second).all() and first[0] < 0 < 5 < first[-1] and len(first) == 81
    assert third[0] < 7 < third[-1] and (np.diff(third) > 0).all()
    (args, kwargs), = lines
    assert args == (2.5,) and kwargs['label'] == 'x'
    pixels = opened(tmp_path / 'h.png')
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(10 / 3.2, rel=0.01) and pixels.std() > 10


def test_curves_take_the_last_of_a_step_and_ignore_a_line_cut_short(tmp_path, monkeypatch):
    drawn = spy(monkeypatch, 'plot')
    log = [{'command': 'python x.py', 'time': 'today'}, {'step': 2, 'loss': 5.0, 'top1_accuracy': 0.5},
           {'step': 4, 'loss': 4.0}, {'step': 1, 'loss': 6.0, 'lr': 0.1}, {'step': 4, 'loss': 3.0}]
    text = '\n'.join(map(json.dumps, log))
    noise = b'\n{"step": 5, "lo\n\xff\xfe\n7\n{"loss": 9}\n'
    (tmp_path / 'log.jsonl').write_bytes(text.encode() + noise + json.dumps({'step': 6, 'loss': 2.0}).encode())
    curves(tmp_path / 'loss.png', tmp_path / 'log.jsonl', ['loss', 'absent'], ['top1_accuracy', 'lacking'])
    found = {kwargs['label']: [list(map(float, values)) for values in args] for args, kwargs in drawn}
    assert found == {'loss': [[1, 2, 4, 6], [6, 5, 3, 2]], 'top1 accuracy': [[2], [0.5]]}
    pixels = opened(tmp_path / 'loss.png')
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(10 / 3.5, rel=0.01) and pixels.std() > 10


def test_backend_that_a_notebook_leaves_behind(tmp_path):
    script = f"import pictures; pictures.histograms({str(tmp_path / 'h.png')!r}, [('x', 'y', {{'a': [1., 2.]}}, None)])"
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'})
    assert done.returncode == 0 and done.stderr == '' and np.ptp(opened(tmp_path / 'h.png')) == 255


@pytest.mark.parametrize('broken', ['no matplotlib', 'no folder', 'no figure'])
def test_a_picture_that_fails_is_one_line(broken, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'picture.png'
    if broken == 'no matplotlib':
        monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    elif broken == 'no folder':
        (tmp_path / 'file').touch()
        path = tmp_path / 'file/picture.png'
    else:
        def savefig(*_, **__):
            raise ValueError('of several\nlines')
        monkeypatch.setattr('matplotlib.figure.Figure.savefig', savefig)
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "loss": 2}\n')
    for draw in (lambda: grid(path, [((), [('1', [plain('red')])])], columns=1),
                 lambda: histograms(path, [('x', 'y', {'a': [1.0, 2.0]}, None)]),
                 lambda: curves(path, tmp_path / 'log.jsonl', ['loss'], ['loss'])):
        assert draw() is False
        out, err = capsys.readouterr()
        assert out == '' and err.count('\n') == 1 and err.startswith(f'{path}: no picture, but nothing else'), err
    assert not path.exists() and not list(tmp_path.glob('.*'))
