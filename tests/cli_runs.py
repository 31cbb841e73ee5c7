"What the tests of the commands share: folders of images, weights on disk, and two finished runs"

import io
import os
import re
import shutil
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from fastai.vision.all import parent_label
from safetensors.torch import load_file, save_file

from fixmatch_fastai.all import split_labeled
from fixmatch_fastai.cli.folders import find_images
from fixmatch_fastai.cli.learner import make_learner
from fixmatch_fastai.cli.options import Options
from fixmatch_fastai.cli.train import fixmatch_train
from fixmatch_fastai.console import run_command

ODD = '<b>zero & "nil" $_^$'  # a class, and a folder, that no page must take for HTML and no picture for a formula
DATA = '--labeled labeled --unlabeled unlabeled'.split()
TINY = '--arch test_resnet --size 32 --no-flip --workers 0 --steps 3 --bs 4 --mu 2'.split()
SMALL = [*TINY, '--no-pretrained', '--lr', '0.01']
KNOWN = [*TINY, '--lr', '0.0003']  # for a pretrained network, which begins with a probe's answers


@contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def exit_code(func, *args):
    "Of a command; also where the arguments can't even be read"
    try:
        return run_command(func, args)
    except SystemExit as e:
        return e.code


def train(*args, data=DATA):
    return exit_code(fixmatch_train, *data, *SMALL, *args)


def options(weights=None, **kwargs):
    "Of the small network"
    small = dict(arch='test_resnet', size=32, workers=0, flip=False, steps=3, bs=4, mu=2, weights=weights)
    data = dict(labeled='labeled', unlabeled='unlabeled', pretrained=weights is not None)
    return Options(**{**data, **small, **kwargs})


def learner(weights=None, semi=True, **kwargs):
    o = options(weights, **kwargs)
    return make_learner(o, find_images(o), semi=semi)


def once(make):
    "A fixture of the session; pytest would make one for each file that imports it"
    made = []

    @wraps(make)
    def fixture(**kwargs):
        if not made:
            made.append(make(**kwargs))
        return made[0]

    return pytest.fixture(scope='session')(fixture)


@once
def folders(digits, tmp_path_factory):
    "8 labelled images of each of three classes, and 24 without labels, one of them damaged"
    root = tmp_path_factory.mktemp('images')
    some = [o for o in digits if parent_label(o) in '012']
    labeled, rest = split_labeled(some, parent_label, 24)
    for o in labeled:
        folder = root / 'labeled' / {'0': ODD}.get(parent_label(o), parent_label(o))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(o, folder)
    (root / 'unlabeled' / 'deeper').mkdir(parents=True)
    pool, rest = split_labeled(rest, parent_label, 24)
    for i, o in enumerate(pool):
        shutil.copy(o, root / 'unlabeled' / ('deeper' if i % 2 else '.'))
    (root / 'unlabeled' / 'damaged.png').write_bytes(b'no image')
    (root / 'new').mkdir()
    for o in rest[:6]:
        shutil.copy(o, root / 'new')
    (root / 'new' / 'cut_short.png').write_bytes(Path(rest[7]).read_bytes()[:60])
    (root / 'empty').mkdir()
    (root / 'file').touch()
    return root


@pytest.fixture
def there(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


@once
def weights(tmp_path_factory):
    "Weights of the small network, with its classifier, as timm gives them"
    file = tmp_path_factory.mktemp('weights') / 'net.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file


@once
def run(folders):
    "A run with everything"
    with working_in(folders):
        assert train('--policy', 'FreeMatch', '--epochs', 2, '--compare', '--out', 'run') == 0
    return folders / 'run'


@once
def tuned(folders, weights):
    "A run of the recipe for pretrained networks with everything, and what it printed"
    out = io.StringIO()
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--compare', '--out', 'tuned']
    with working_in(folders), redirect_stdout(out):
        assert exit_code(fixmatch_train, *args) == 0
    return folders / 'tuned', out.getvalue()


class Page(HTMLParser):
    "Headings, text and links of a page; fails where tags are not closed in their order"

    VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}

    def __init__(self, file):
        super().__init__()
        self.open, self.tags, self.headings, self.links, self.text = [], [], [], [], ''
        self.feed(file.read_text(encoding='utf-8'))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'action', 'data')]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == 'h2':
            self.headings.append(data)
        if self.open and self.open[-1] != 'style':
            self.text += data.replace('\xa0', ' ')


def same_histories(a, b, name='history.csv'):
    h, g = (pd.read_csv(o / name).drop(columns='time') for o in (a, b))
    pd.testing.assert_frame_equal(h, g)


def same_runs(a, b):
    "Weights, history and pseudo-labels"
    mine, other = (load_file(o / 'weights.safetensors') for o in (a, b))
    assert mine.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in mine.items())
    same_histories(a, b)
    pd.testing.assert_frame_equal(*(pd.read_csv(o / 'pseudo_labels.csv') for o in (a, b)))


def verdict(printed):
    "What is said of a whole run at its end"
    beginnings = 'validation images right|^Chance|^The probe|^Difference|^The supervised twin, with'
    return [o for o in printed.splitlines() if re.search(beginnings, o)]
