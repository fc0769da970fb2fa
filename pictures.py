"""Pictures: images in a grid, histograms, curves of a log. Without a screen, and without pyplot's state. Whatever goes
wrong while one is drawn is one line on standard error: no result is lost to a picture."""
import functools
import json
import os
import sys

import numpy as np

from files import atomic
from start import say


os.environ['MPLBACKEND'] = 'agg'  # a notebook's own, inherited, would not let matplotlib be imported


def harmless(draw):
    """Makes draw(path, ...) a function that never raises, but returns whether it went well. matplotlib is imported in
    the functions, so that this may fail too."""
    @functools.wraps(draw)
    def drawn(path, *args, **kwargs):
        try:
            draw(path, *args, **kwargs)
            return True
        except Exception as error:
            say(f"{path}: no picture, but nothing else is missing ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]})", sys.stderr)
            return False
    return drawn


@harmless
def grid(path, sections, columns=10):
    """Examples beside each other, the images of each under each other.

    sections: [(labels, examples)], each of which begins a new line. labels: words to the left of its lines of images,
    or (). examples: [(title, images)], images a list of arrays (H, W, 3) (None: left free), all of one length."""
    from matplotlib.figure import Figure
    lines = [(labels, examples[k:k + columns]) for labels, examples in sections
             for k in range(0, len(examples), columns)]
    left, high = 0.3 * any(labels for labels, _ in sections), 1.1 * len(lines[0][1][0][1]) + 0.3  # all in inches
    width, height = left + 1.1 * columns, high * len(lines)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))  # one for all: one each takes four times as long
    for line, (labels, examples) in enumerate(lines):
        middles = [high * line + 0.8 + 1.1 * k for k in range(len(examples[0][1]))]
        for column, (title, images) in enumerate(examples):
            x = left + 1.1 * column + 0.55
            axis.text(x, high * line + 0.25, title, fontsize=7, ha='center', va='bottom')
            for y, image in zip(middles, images):
                if image is not None:
                    h, w = np.array(image.shape[:2]) / max(image.shape[:2]) / 2
                    axis.imshow(image, extent=(x - w, x + w, y + h, y - h))
        for y, label in zip(middles, labels):
            axis.text(left - 0.05, y, label, fontsize=8, rotation=90, ha='right', va='center')
    axis.set(xlim=(0, width), ylim=(height, 0), aspect='auto')
    axis.axis('off')
    atomic(path, lambda temporary: figure.savefig(temporary, dpi=120))


def overlay(image, mask):
    """The image (H, W, 3) in [0, 1], dark blue where the mask (h, w) is 0."""
    mask = np.kron(mask, np.ones((-(-image.shape[0] // mask.shape[0]), -(-image.shape[1] // mask.shape[1]))))
    mask = mask[:image.shape[0], :image.shape[1], None]
    return image * (0.25 + 0.75 * mask) + (1 - mask) * np.array([0.0, 0.05, 0.3])


@harmless
def histograms(path, panels):
    """Panels beside each other: [(label of x, label of y, {name: values}, mark)]; mark: None or (x, name) of a line."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * len(panels), 3.2), layout='constrained')
    for axis, (values, things, curves, mark) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        every = np.concatenate([np.ravel(v) for v in curves.values()])
        bins = np.linspace(every.min() - 0.01, every.max() + 0.01, 81)  # also where all are the same
        for name, numbers in curves.items():
            axis.hist(np.ravel(numbers), bins, histtype='step', label=name)
        if mark:
            axis.axvline(mark[0], color='C3', label=mark[1])
        axis.set(xlabel=values, ylabel=things)
        axis.legend(frameon=False, fontsize=7)
    atomic(path, lambda temporary: figure.savefig(temporary, dpi=120))


@harmless
def curves(path, log, left, right):
    """Of a log.jsonl, over the step: the keys `left` and, from 0 to 1, `right`, as far as they occur.

    Of a step that was done twice (after a kill) the last line counts."""
    from matplotlib.figure import Figure
    values = {}
    for text in log.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line cut short by a kill
        for key in {*left, *right} & set(line) if isinstance(line, dict) and 'step' in line else ():
            values.setdefault(key, {})[line['step']] = line[key]
    figure = Figure(figsize=(10, 3.5), layout='constrained')
    axes = figure.subplots(1, 2)
    for axis, keys in zip(axes, (left, right)):
        for key in keys:
            if key in values:
                axis.plot(*zip(*sorted(values[key].items())), label=key.replace('_', ' '))
        axis.set(xlabel='step')
        axis.legend(frameon=False)
    axes[1].set(ylim=(0, 1.05))
    atomic(path, lambda temporary: figure.savefig(temporary, dpi=110))
