"The preflight: each finding provoked and absent, and a learner that is as it was"

import ast
import inspect
import multiprocessing
import random
import re
import sys
import time
import warnings
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
from conftest import Odd, quiet_fit, tiny_net
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    ColReader,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    IntToFloatTensor,
    L,
    Learner,
    MultiCategoryBlock,
    Normalize,
    PILImageBW,
    Resize,
    accuracy,
    parent_label,
    set_seed,
)
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as tv

from fixmatch_fastai import check as room
from fixmatch_fastai import findings, inspection
from fixmatch_fastai.all import FixMatch, FixMatchTransform, FlexMatch, ModelEMA, weak_augment
from fixmatch_fastai.check import fixmatch_check, quick_check
from fixmatch_fastai.findings import Finding, Preflight


@pytest.fixture(scope='session')
def unseen(make_dls, digits):
    "Digits that are neither labelled nor validated"
    dls = make_dls(n_batches=None)
    used = set(dls.train.items) | set(dls.valid.items)
    return L(o for o in digits if o not in used)[::32]


@pytest.fixture(autouse=True)
def little(monkeypatch, request):
    "Less to look at, unless the test is about that"
    if 'whole' in request.fixturenames:
        return
    monkeypatch.setattr(inspection, 'limits', inspection.Limits(images=8, views=3, batches=32, seconds=0.2))


@pytest.fixture
def whole():
    "Look at as much as users do"


@pytest.fixture
def fine(make_learner, make_dls, unseen):
    "A learner of which nothing is wrong"

    def make(dls=None, pool=unseen, mu=2, tfm=None, num_workers=0, n_batches=20, **kwargs):
        dls = make_dls(n_batches=n_batches) if dls is None else dls
        tfm = tfm or FixMatchTransform(weak=weak_augment(flip=False))
        loader = dls.unlabeled_dl(pool, mu=mu, tfm=tfm, num_workers=num_workers)
        return make_learner(dls, **{'loader': loader, **kwargs})

    return make


def check(learn, **kwargs):
    return fixmatch_check(learn, **{'speed': False, **kwargs})


def level(report, name):
    "Of line `name`, which has an advice where it is not ok"
    finding = report[name]
    assert bool(finding.advice) == (finding.level != 'ok')
    return finding.level


def make_block(vocab=None, n=20, n_valid=20, img_cls=PILImageBW, **kwargs):
    blocks = ImageBlock(img_cls), CategoryBlock(vocab=vocab)
    return DataBlock(blocks=blocks, get_y=parent_label, splitter=IndexSplitter(range(n, n + n_valid)), **kwargs)


def of_class(digits, **counts):
    return [o for c, n in counts.items() for o in L(d for d in digits if d.parent.name == c[1:])[:n]]


class Fixed(torch.utils.data.Dataset):
    "A torch pool that tells nothing of its images"

    def __init__(self, make, n=32):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


# --- the report


def test_all_is_well(whole, fine, capsys):
    pytest.importorskip('imagehash')
    report = fixmatch_check(fine(), n_epoch=3)
    assert [o.name for o in report.findings] == [
        *('labels', 'validation', 'epoch', 'pool'),
        *('files', 'in validation', 'near validation', 'in labels', 'copies'),
        *('strong views', 'weak views', 'channels', 'outputs', 'step', 'memory', 'speed', 'time'),
    ]
    assert [o.name for o in report.findings if o.level != 'ok' and o.name != 'speed'] == ['validation']  # 20 images
    assert report['labels'].found == '20 labelled images, 2 of each of 10 classes'
    assert report['epoch'].found == '20 steps of 4 labelled images'
    assert report['outputs'].found == '10 for 10 classes'
    assert 'FixedThreshold' in report['step'].found
    # 4 + 2·8 images of 16·16 float32
    assert report['memory'].found.startswith('20 images in a joint batch, 0.0205 MB')
    assert report['time'].found.startswith('3 epochs of 20 steps: about ')
    assert len(report.overlap) == len(report.damaged) == 0
    assert capsys.readouterr().out == f'{report}\n'
    report = check(fine())
    assert not report.problems and 'speed' not in report and 'time' not in report


def test_report_reads_well():
    long = ' '.join(['word'] * 40)
    findings = ('a', 'fine', 'ok', ''), ('b b', long, 'problem', long), ('c', '1', 'note', 'do')
    report = Preflight([Finding(*o) for o in findings])
    lines = str(report).split('\n')
    assert lines[0] == 'ok       a    fine'
    assert lines[-2:] == ['note     c    1', '              -> do']
    assert max(map(len, lines)) <= 110 and str(report).isascii()  # a Windows terminal has not every sign
    assert repr(report) == 'Preflight: 1 ok, 1 to note, 1 problem'
    assert list(report.table.index) == ['a', 'b b', 'c'] and list(report.table.columns) == ['found', 'level', 'advice']
    assert report.problems == [report['b b']] and 'd' not in report
    assert str(Preflight([])) == ''


def test_strict(fine, capsys):
    assert not check(fine(), strict=True).problems
    capsys.readouterr()
    learn = fine(model=tiny_net(5), n_batches=None, pool=fine().dls.valid.items)
    with pytest.raises(ValueError, match='must be mended first.*in validation: .*outputs: 5 for 10 classes.*'):
        check(learn, strict=True)
    assert 'outputs' in capsys.readouterr().out  # said in full before


@pytest.mark.parametrize('n', [0, 2])
def test_one_fixmatch_is_needed(fine, n):
    learn = fine()
    learn.remove_cb(FixMatch)
    learn.add_cbs([FixMatch([]) for _ in range(n)])
    with pytest.raises(ValueError, match='no FixMatch callback' if n == 0 else 'two FixMatch callbacks'):
        fixmatch_check(learn)


def test_loaders_that_cannot_be_looked_at(fine):
    learn = fine()
    learn.fix_match.unlabeled_dl = None
    with pytest.raises(ValueError, match='without its unlabelled images'):
        fixmatch_check(learn)
    learn.fix_match.unlabeled_dl = iter([1, 2])
    with pytest.raises(TypeError, match='is an iterator'):
        fixmatch_check(learn)
    assert next(learn.fix_match.unlabeled_dl) == 1


# --- as it was


class Boom(Callback):
    "Ctrl-C in the second batch"

    def after_pred(self):
        if self.training and self.iter == 1:
            raise KeyboardInterrupt


def snapshot(learn):
    "All that training, predicting and saving may depend on"
    model, fm, train = learn.model, learn.fix_match, learn.dls.train
    rngs = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    loaders = [o for o in (train, getattr(train, 'base', None), learn.dls.valid, fm.unlabeled_dl) if o is not None]
    return deepcopy(
        {
            'buffers': [(k, id(b), b.clone()) for k, b in model.named_buffers()],
            'params': [(k, id(p), p._version, p.detach().clone(), p.grad) for k, p in model.named_parameters()],
            'flags': [m.training for m in model.modules()],
            'opt': learn.opt and learn.opt.state_dict(),
            'policy': fm.policy.state_dict(),
            'rngs': [*rngs, *(o.rng.getstate() for o in loaders if hasattr(o, 'rng'))],
            'split_idx': [o.after_batch.split_idx for o in loaders if hasattr(o, 'after_batch')],
            'loss': id(learn.loss_func),
            'cbs': [id(o) for o in learn.cbs],
            'learn': sorted(vars(learn)),
            'values': [list(o) for o in learn.recorder.values] if hasattr(learn.recorder, 'values') else None,
            'fixmatch': {k: id(v) for k, v in vars(fm).items()},
            'history': fm.history.values.tolist(),
            'damaged': len(fm.damaged),
            'pool': getattr(fm.unlabeled_dl, 'place', None),
        }
    )


def assert_same(a, b, path=''):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for k in a:
            assert_same(a[k], b[k], f'{path}.{k}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{path}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        assert (a == b).all(), path
    else:
        assert a == b or a != a, path


@pytest.mark.filterwarnings('ignore:Unlabelled images')
@pytest.mark.parametrize('when', ['before a fit', 'after a fit', 'after an interrupt'])
def test_the_learner_is_as_it_was(fine, when, unseen, tmp_path):
    (tmp_path / 'empty.png').touch()
    batch_tfms = [IntToFloatTensor(), Normalize.from_stats([0.3], [0.3], cuda=False)]
    items = list(fine().dls.train.items) + list(fine().dls.valid.items)
    dls = make_block(batch_tfms=batch_tfms).dataloaders(items, bs=4, num_workers=0).repeat_train(3)
    pool = unseen[:20] + L(tmp_path / 'empty.png')
    fixmatch = {'threshold': 0.95, 'policy': FlexMatch(0.1)}
    learn = fine(dls, pool, model=Odd(), fixmatch=fixmatch, cbs=[ModelEMA(half_life=1)])
    learn.model.frozen.eval()
    if when == 'after a fit':
        quiet_fit(learn, 1)
    if when == 'after an interrupt':
        with pytest.raises(KeyboardInterrupt):
            quiet_fit(learn, 1, cbs=Boom())
        learn.remove_cb(Boom)
        assert any(p.grad is not None for p in learn.model.parameters())
    before = snapshot(learn)
    report = check(learn, speed=True)
    assert 'time' in report and not report['step'].advice
    assert_same(before, snapshot(learn))


def test_training_after_it_is_the_same(fine):
    def run(checked):
        set_seed(0)
        learn = fine(model=Odd(), n_batches=3, fixmatch={'threshold': 0.95, 'policy': FlexMatch(0.1)})
        if checked:
            check(learn, speed=True)
        quiet_fit(learn, 2)
        return learn.model.state_dict(), learn.fix_match.history.values.tolist(), random.random()

    assert_same(run(True), run(False))


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_the_midst(fine, error):
    class Stops(Odd):
        def forward(self, x):
            super().forward(x)
            raise error

    learn = fine(model=Stops())
    before = snapshot(learn)
    with pytest.raises(error):
        check(learn)
    assert_same(before, snapshot(learn))


def test_workers_end(fine):
    learn = fine(num_workers=2)
    report = check(learn, speed=True)
    assert 'with 2 workers' in report['speed'].found and 'at least' in report['time'].found
    assert multiprocessing.active_children() == []


# --- labels, epoch, pool


def test_labels(fine, digits):
    valid = list(fine().dls.valid.items)

    def report(vocab=None, **counts):
        labeled = of_class(digits, **counts)
        return check(fine(make_block(vocab, len(labeled)).dataloaders(labeled + valid, bs=4, num_workers=0), mu=1))

    one = report(list('012'), _0=4, _1=3, _2=3)
    assert level(one, 'labels') == 'ok' and one['labels'].found == '10 labelled images, 3 to 4 of each of 3 classes'
    missing = report(list('012345678'), _0=4, _1=4)
    assert level(missing, 'labels') == 'problem'
    assert missing['labels'].found.endswith('none of 2, 3, 4, 5, 6 and 2 more')
    assert level(report(_0=40, _1=4), 'labels') == 'ok'
    assert level(report(_0=41, _1=4), 'labels') == 'note'
    assert level(report(list('01') + ['#na#'], _0=4, _1=4), 'labels') == 'ok'  # fastai's name for no class


def test_labels_of_data_frames(fine, digits):
    df = pd.DataFrame({'file': list(map(str, digits[::36])), 'label': [o.parent.name for o in digits[::36]]})
    block = DataBlock(
        blocks=(ImageBlock(PILImageBW), CategoryBlock),
        get_x=ColReader('file'),
        get_y=ColReader('label'),
        splitter=IndexSplitter(range(0, 50, 5)),
    )
    dls = block.dataloaders(df, bs=4, num_workers=0)
    tfm = FixMatchTransform(weak=weak_augment(flip=False))
    report = check(fine(loader=dls.unlabeled_dl(df.iloc[1:50:5], mu=1, tfm=tfm), dls=dls))
    assert report['labels'].found.startswith('40 labelled images')
    assert level(report, 'in validation') == 'ok'
    assert report['in labels'].found.startswith('10 unlabelled images')
    report = check(fine(loader=dls.unlabeled_dl(df.iloc[:20], mu=1, tfm=tfm), dls=dls))
    assert level(report, 'in validation') == 'problem' and report['in validation'].found.startswith('4 in both')


@pytest.mark.parametrize('n_batches, expected', [(None, 'note'), (19, 'note'), (20, 'ok')])
def test_epoch(fine, n_batches, expected):
    assert level(check(fine(n_batches=n_batches)), 'epoch') == expected


def test_fewer_labels_than_a_batch(fine, make_dls):
    report = check(fine(make_dls(bs=21, n_batches=None), mu=1), speed=True)
    assert level(report, 'epoch') == 'problem' and '(20)' in report['epoch'].advice
    assert 'step' not in report and 'speed' not in report
    assert level(report, 'channels') == 'ok' and 'validation mean' in report['channels'].found


@pytest.mark.parametrize(
    'pool, mu, expected',
    [
        (50, 2, 'ok'),
        (20, 2, 'ok'),
        (19, 2, 'note: fewer unlabelled than labelled images, so'),
        (40, 11, 'note: shorter than a batch'),
    ],
)
def test_pool(fine, unseen, pool, mu, expected):
    expected, _, why = expected.partition(': ')
    report = check(fine(pool=unseen[:pool], mu=mu))
    assert level(report, 'pool') == expected and why in report['pool'].advice
    assert report['pool'].found.startswith(f'{pool} unlabelled images')
    assert f'{4 * mu} in a batch, mu = {mu}' in report['pool'].found


def test_small_mu_and_no_batch(fine, unseen):
    dls = fine().dls
    tfm = FixMatchTransform(weak=weak_augment(flip=False))
    report = check(fine(dls, loader=dls.unlabeled_dl(unseen, bs=3, tfm=tfm)))
    assert level(report, 'pool') == 'note' and 'larger `mu`' in report['pool'].advice
    assert 'mu = 0.75' in report['pool'].found
    views = Fixed(lambda i: (torch.rand(1, 16, 16), torch.rand(1, 16, 16)))
    report = check(fine(dls, loader=torch.utils.data.DataLoader(views, batch_size=64, drop_last=True)))
    assert level(report, 'pool') == 'problem' and 'drop_last' in report['pool'].advice
    assert level(report, 'unlabelled batch') == 'problem' and 'yields no batch' in report['unlabelled batch'].advice


# --- files


@pytest.mark.parametrize('n, expected', [(0, 'ok'), (5, 'note'), (50, 'problem')])
def test_unreadable_files(fine, unseen, tmp_path, n, expected):
    for i in range(n):
        (tmp_path / f'{i}.png').write_bytes(unseen[i].read_bytes()[:40] if i % 2 else b'')
    learn = fine(pool=unseen + L(tmp_path / f'{i}.png' for i in range(n)))
    report = check(learn)
    assert level(report, 'files') == expected
    assert list(report.damaged.index) == list(range(len(unseen), len(unseen) + n))
    assert list(report.damaged.item) == [tmp_path / f'{i}.png' for i in range(n)]
    assert (n == 0) == ('were readable' in report['files'].found)
    assert 'HEIC' not in report['files'].advice
    assert len(learn.fix_match.damaged) == 0  # not what a fit met


def test_heic_that_can_not_be_opened_is_no_file_to_remove(fine, unseen, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    phone, torn = tmp_path / 'phone.heic', tmp_path / 'torn.png'
    phone.write_bytes(b'\0\0\0\x18ftypheic' + bytes(200))
    torn.write_bytes(b'no image')
    advice = check(fine(pool=unseen + [phone]))['files'].advice
    assert '1 are HEIC, which Pillow opens with pillow-heif: install it by' in advice and 'emove' not in advice
    assert 'Mend or remove the others' in check(fine(pool=unseen + [phone, torn]))['files'].advice


def test_unreadable_files_stop_a_torch_loader(fine, unseen, tmp_path):
    (tmp_path / 'a').mkdir()
    for o in unseen[:20]:
        (tmp_path / 'a' / o.name).write_bytes(o.read_bytes())
    tfm = FixMatchTransform([0.3], [0.3], weak=weak_augment(flip=False))
    pool = lambda: ImageFolder(tmp_path, lambda o: tfm(o.convert('L')))
    make = lambda: fine(loader=torch.utils.data.DataLoader(pool(), batch_size=8))
    assert level(check(make()), 'files') == 'ok'
    (tmp_path / 'a' / '0.png').write_bytes(b'no image')
    report = check(make())
    assert level(report, 'files') == 'problem' and 'Training will stop' in report['files'].advice


def test_at_most_n_are_opened(fine, unseen, monkeypatch):
    learn, opened = fine(), []
    monkeypatch.delitem(room.checks, 'views')
    monkeypatch.delitem(room.checks, 'batches')
    create = PILImageBW.create.__func__
    noted = lambda cls, fn, **kwargs: opened.append(fn) or create(cls, fn, **kwargs)
    monkeypatch.setattr(PILImageBW, 'create', classmethod(noted))
    for dset in (learn.dls.train_ds, learn.dls.valid_ds, learn.fix_match.unlabeled_dl.dataset.dataset):
        dset.tls[0].tfms.fs[-1] = type(dset.tls[0].tfms.fs[-1])(PILImageBW.create)
    report = check(learn, n=7)
    assert len(opened) == 21
    assert f'looked at 7 of {len(unseen)} unlabelled and 7 of 20 validation images' in report['in validation'].found
    assert report['files'].found == 'all 7 unlabelled images opened were readable'


# --- the same image twice


def test_same_path(fine, unseen):
    learn = fine()
    valid = learn.dls.valid.items
    report = check(fine(learn.dls, pool=unseen + L(valid[3], valid[5])), n=1)  # paths are compared, all of them
    assert level(report, 'in validation') == 'problem' and report['in validation'].found.startswith('2 in both')
    assert report.overlap.values.tolist() == [[len(unseen), 3, 'same'], [len(unseen) + 1, 5, 'same']]
    assert 'near validation' in report and level(report, 'near validation') == 'ok'


def test_arrays(fine, unseen):
    learn = fine()
    arrays = L(np.array(Image.open(o)) for o in [*unseen[:20], learn.dls.valid.items[3]])
    report = check(fine(learn.dls, pool=arrays))
    assert level(report, 'in validation') == 'problem' and report.overlap.values.tolist() == [[20, 3, 'same']]
    assert 'place 20' in report['in validation'].found
    assert level(check(fine(learn.dls, pool=arrays[:20])), 'in validation') == 'ok'


def test_near(fine, unseen, tmp_path):
    pytest.importorskip('imagehash')
    learn = fine()
    img = Image.open(learn.dls.valid.items[3])
    img.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / 'large.jpg')
    report = check(fine(make_learner_dls_resized(learn), pool=unseen + L(tmp_path / 'large.jpg')))
    assert level(report, 'near validation') == 'note' and report.overlap.values.tolist() == [[len(unseen), 3, 'near']]
    assert level(report, 'in validation') == 'ok'
    assert level(check(fine()), 'near validation') == 'ok'


def make_learner_dls_resized(learn):
    items = list(learn.dls.train.items) + list(learn.dls.valid.items)
    return make_block(item_tfms=Resize(16)).dataloaders(items, bs=4, num_workers=0).repeat_train(20)


def test_without_imagehash(fine, monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagehash', None)
    report = check(fine())
    assert level(report, 'near validation') == 'note' and 'pip install imagehash' in report['near validation'].advice
    assert level(report, 'in validation') == 'ok'


def test_labelled_images_in_the_pool(fine, unseen):
    learn = fine()
    report = check(fine(learn.dls, pool=unseen + L(learn.dls.train.items[0])))
    assert level(report, 'in labels') == 'note' and report['in labels'].found.startswith('1 unlabelled images')
    assert level(report, 'in validation') == 'ok'


def test_a_pool_that_does_not_tell_its_images(fine):
    nothing = Fixed(lambda i: (torch.rand(1, 16, 16), torch.rand(1, 16, 16)))
    report = check(fine(loader=torch.utils.data.DataLoader(nothing, batch_size=8)))
    assert level(report, 'in validation') == 'note' and report['in validation'].found.startswith('not known')
    assert 'files' not in report and report.overlap is None


# --- what the model gets


def with_stats(learn, mean, std):
    items = list(learn.dls.train.items) + list(learn.dls.valid.items)
    batch_tfms = [IntToFloatTensor(), Normalize.from_stats([mean], [std], cuda=False)]
    return make_block(batch_tfms=batch_tfms).dataloaders(items, bs=4, num_workers=0).repeat_train(20)


class Times255(FixMatchTransform):
    def __call__(self, img):
        return tuple(o.float() for o in super().__call__(img))


@pytest.mark.parametrize(
    'labeled, views, expected',
    [
        (None, None, 'ok'),
        ((0.3, 0.33), None, 'ok'),  # the views follow
        ((0.3, 0.33), (0.3, 0.33), 'ok'),
        (None, (0.3, 0.33), 'problem'),
        ((0.3, 0.33), (0.0, 1.0), 'problem'),
        (None, 'times 255', 'problem'),
        ((0.3, 0.33), (0.75, 0.33), 'note'),
        ((0.3, 0.33), (1.0, 0.33), 'problem'),
    ],
)
def test_channels(fine, labeled, views, expected):
    dls = fine().dls if labeled is None else with_stats(fine(), *labeled)
    weak = weak_augment(flip=False)
    stats = [[o] for o in views] if isinstance(views, tuple) else []
    tfm = Times255(weak=weak) if views == 'times 255' else FixMatchTransform(*stats, weak=weak)
    assert level(check(fine(dls, tfm=tfm)), 'channels') == expected


def test_channels_of_validation_alone(fine):
    "`Normalize` on the validation loader only, whose transforms finish the views: training images differ"
    learn = fine(with_stats(fine(), 0.3, 0.33))
    learn.dls.train.after_batch = type(learn.dls.train.after_batch)([IntToFloatTensor()])
    assert level(check(learn), 'channels') == 'problem'


def test_strong_views(whole, fine):
    def report(**kwargs):
        learn = fine(tfm=FixMatchTransform(**{'weak': weak_augment(flip=False), **kwargs}))
        return check(learn, n=5)

    as_is = lambda o: o
    assert level(report(), 'strong views') == 'ok'
    assert level(report(strong=weak_augment(flip=False)), 'strong views') == 'note'  # a second weak view
    assert level(report(weak=as_is, strong=as_is), 'strong views') == 'problem'
    some = iter(range(100_000))
    often = report(weak=as_is, strong=lambda o: o if next(some) % 4 == 0 else o.rotate(90))
    assert level(often, 'strong views') == 'note' and '25% equal' in often['strong views'].found
    still = report(weak=as_is)
    assert level(still, 'strong views') == 'ok' and 'times' not in still['strong views'].found
    assert still['weak views'].found == '100% equal the image itself'
    assert report()['weak views'].found != '100% equal the image itself'


def test_views_of_torch_pools(fine):
    pixels = lambda: torch.randn(1, 16, 16)
    same = torch.utils.data.DataLoader(Fixed(lambda i: ((o := pixels()), o)), batch_size=8)
    assert level(check(fine(loader=same)), 'strong views') == 'problem'
    other = torch.utils.data.DataLoader(Fixed(lambda i: ((o := pixels() * 0.1), o + pixels())), batch_size=8)
    report = check(fine(loader=other))
    assert level(report, 'strong views') == 'ok' and 'weak views' not in report


# --- a step


@pytest.mark.parametrize('n_out, expected', [(10, 'ok'), (9, 'problem'), (11, 'note')])
def test_outputs(fine, n_out, expected):
    learn = fine(model=tiny_net(n_out))
    assert level(check(learn), 'outputs') == expected


def test_a_policy_that_needs_places(fine):
    views = Fixed(lambda i: (torch.randn(1, 16, 16), torch.randn(1, 16, 16)))
    loader = torch.utils.data.DataLoader(views, batch_size=8)
    report = check(fine(loader=loader, fixmatch={'threshold': 0.95, 'policy': FlexMatch()}))
    assert level(report, 'step') == 'problem' and 'FlexMatch needs the place' in report['step'].advice
    assert level(check(fine(fixmatch={'threshold': 0.95, 'policy': FlexMatch()})), 'step') == 'ok'


def test_what_stops_training_is_found(fine, unseen):
    small = FixMatchTransform(weak=lambda o: o.resize((12, 12)))
    report = check(fine(tfm=small))
    assert level(report, 'step') == 'problem' and 'a labelled image is (1, 16, 16)' in report['step'].advice
    report = check(fine(loader=[torch.rand(3)]))
    assert level(report, 'unlabelled batch') == 'problem'
    assert 'must yield (weak, strong)' in report['unlabelled batch'].advice
    flat = nn.Sequential(tiny_net(), nn.Flatten(0))
    assert 'one row of logits' in check(fine(model=flat))['step'].advice
    report = check(fine(model=tiny_net(), loss_func=lambda pred, y: pred.sum() * float('nan')))
    assert level(report, 'step') == 'problem' and 'nan' in report['step'].advice


def test_unreadable_labelled_files(fine, digits, tmp_path):
    labeled = [tmp_path / f'{i}' / 'a.png' for i in range(20)]
    for o in labeled:
        o.parent.mkdir()
        o.write_bytes(digits[0].read_bytes() if o == labeled[0] else b'')
    dls = make_block().dataloaders(labeled + list(fine().dls.valid.items), bs=4, num_workers=0)
    report = check(fine(dls))
    assert level(report, 'labelled batch') == 'problem' and 'UnidentifiedImageError' in report['labelled batch'].found


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.net, self.seconds = tiny_net(), seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.net(x)


def slow_views(img, seconds=0.01):
    time.sleep(seconds)
    return tv.pil_to_tensor(img), tv.pil_to_tensor(img.rotate(90))


@pytest.mark.parametrize(
    'slow, workers, expected',
    [
        ('model', 0, 'ok: take turns'),
        ('loader', 0, 'note: take turns'),
        ('loader', 1, 'note: the model waits'),
        ('model', 1, 'ok: the loader waits'),
    ],
)
def test_speed(fine, slow, workers, expected):
    """20 minutes or more of a model that sleeps 0.2 s for 8 unlabelled images, 8 seconds or more of a loader that
    sleeps 0.01 s for each: longer on a busy machine"""
    n_epoch, per_second, seconds = (60, 41, 20 * 60 * 0.95) if slow == 'model' else (1, 101, 7.5)
    slow_part = {'model': Slow(0.2)} if slow == 'model' else {'tfm': slow_views}
    report = check(fine(num_workers=workers, n_batches=100, **slow_part), speed=True, n_epoch=n_epoch, n=5)
    expected, _, who = expected.partition(': ')
    assert level(report, 'speed') == expected and who in report['speed'].found
    found = re.findall(r'([0-9,]+) (?:unlabelled|through)', report['speed'].found)
    speeds = dict(zip(('loader', 'model'), (float(o.replace(',', '')) for o in found)))
    assert 0 < speeds[slow] <= per_second
    number, unit = re.search(r'([0-9.]+) (seconds|minutes)', report['time'].found).groups()
    assert float(number) * (60 if unit == 'minutes' else 1) >= seconds


def test_what_cannot_be_looked_at_is_no_problem(fine, monkeypatch):
    learn = fine()
    before = snapshot(learn)

    def odd(setup):
        random.random()
        raise KeyError('odd data')

    monkeypatch.setitem(room.checks, 'views', {'strong views': odd})
    report = check(learn, strict=True)
    assert level(report, 'views') == 'note' and 'odd data' in report['views'].found and 'step' in report
    assert_same(before, snapshot(learn))


# --- torch on both sides


def test_torch_learner(unseen, tmp_path):
    x, y = torch.rand(40, 1, 16, 16), torch.arange(40) % 10
    data = torch.utils.data.TensorDataset(x, y)
    data.targets, data.classes = y.tolist(), list('0123456789')
    generator = torch.Generator().manual_seed(3)
    train = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    noise = Fixed(lambda i: (torch.rand(1, 16, 16), torch.rand(1, 16, 16)))
    views = torch.utils.data.DataLoader(noise, batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    loss_func, fm = nn.CrossEntropyLoss(), FixMatch(views)
    learn = Learner(DataLoaders(train, train), tiny_net(), loss_func=loss_func, cbs=fm, metrics=accuracy, path=tmp_path)
    state = generator.get_state()
    report = check(learn, speed=True)
    assert not report.problems and level(report, 'labels') == 'ok' and 'time' in report
    assert report['labels'].found == '40 labelled images, 4 of each of 10 classes'
    assert torch.equal(state, generator.get_state())
    assert multiprocessing.active_children() == []
    data.targets = [0] * 40
    some = torch.utils.data.Subset(data, range(20))
    learn.dls = DataLoaders(torch.utils.data.DataLoader(some, batch_size=4), train)
    learn.dls.vocab = data.classes
    assert check(learn)['labels'].found.startswith('20 labelled images, 20 of each of 1 classes, none of 1, 2')


# --- before every first fit


def warnings_of(learn, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        quiet_fit(learn, *args, **kwargs)
    return [str(o.message) for o in caught if 'fixmatch_check' in str(o.message)]


@pytest.fixture
def leaky(fine, unseen, digits):
    "A class without label, and validation images in the pool"

    def make(**kwargs):
        items = list(fine().dls.train.items) + list(fine().dls.valid.items)
        dls = make_block([*'0123456789', 'ten']).dataloaders(items, bs=4, num_workers=0).repeat_train(2)
        return fine(dls, pool=unseen + L(items[20:23]), model=tiny_net(11), **kwargs)

    return make


def test_quick_check_warns_once(leaky, fine, unseen):
    learn = leaky()
    missing, shared = warnings_of(learn, 1)
    assert 'of class ten:' in missing and 'at least 3, such as' in shared
    assert warnings_of(learn, 1) == []
    learn.fix_match.unlabeled_dl = learn.dls.unlabeled_dl(unseen, mu=2)
    assert len(warnings_of(learn, 1)) == 1  # another pool: the class is still missing
    assert warnings_of(fine(n_batches=2), 1) == []


def test_quick_check_is_for_training(leaky):
    learn = leaky()
    assert warnings_of(learn, method='validate') == []
    assert warnings_of(learn, method='lr_find', show_plot=False, num_it=20, suggest_funcs=None) == []
    assert len(warnings_of(learn, 1)) == 2


def test_quick_check_on_the_first_process_only(leaky, monkeypatch):
    fm = leaky().fix_match
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, 'get_rank', lambda rank=rank: rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', UserWarning)
            quick_check(fm)
        assert len(caught) == (0 if rank else 2)


def test_quick_check_changes_nothing(leaky):
    learn = leaky()
    before = snapshot(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quick_check(learn.fix_match)
    assert_same(before, snapshot(learn))


def test_quick_check_is_quick(fine):
    "A million paths in the pool and in validation: none is opened, and no more than a sample is looked at"

    class Million:
        def __init__(self, first):
            self.first = first

        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            return f'/data/{self.first + i}.jpg'

    learn = fine()
    learn.fix_match.unlabeled_dl.dataset.dataset.tls[0].items = Million(0)
    learn.dls.valid_ds.tls[0].items = Million(1)
    labeled = learn.dls.train_ds
    labeled.tls[-1].items = L(list(labeled.tls[-1].items) * 50_000)
    start = time.process_time()
    with pytest.warns(UserWarning, match='at least [0-9]+, such as /data/'):
        quick_check(learn.fix_match)
    assert time.process_time() - start < 0.1


def test_a_class_may_be_missed_in_a_sample(fine, leaky):
    learn = leaky()
    learn.dls.train_ds.tls[-1].items = L(list(learn.dls.train_ds.tls[-1].items) * 51)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        quick_check(learn.fix_match)
    assert ['of class' in str(o.message) for o in caught] == [False]


def test_other_targets(fine, digits):
    "Several labels for each image: each is counted, and FixMatch's own message is found"
    items = list(fine().dls.train.items) + list(fine().dls.valid.items)
    blocks = ImageBlock(PILImageBW), MultiCategoryBlock
    block = DataBlock(blocks=blocks, get_y=lambda o: ['digit', parent_label(o)], splitter=IndexSplitter(range(20, 40)))
    learn = fine(block.dataloaders(items, bs=4, num_workers=0), loss_func=nn.BCEWithLogitsLoss())
    report = check(learn)
    assert report['labels'].found == '20 labelled images, 2 to 20 of each of 11 classes'
    assert 'multi-label' in report['step'].advice
    quick_check(learn.fix_match)
    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 16, 16), torch.zeros(8, 2))
    data.targets = torch.zeros(8, 2)
    torch_dl = torch.utils.data.DataLoader(data, batch_size=4)
    learn.dls = DataLoaders(torch_dl, torch_dl)
    assert 'labels' not in check(learn)
    learn.dls = DataLoaders(fine().dls.train)  # no validation
    assert 'in validation' not in check(learn)


def test_quick_check_of_other_loaders(fine, unseen):
    "Nothing is known of them, nothing is said"
    views = torch.utils.data.DataLoader(Fixed(lambda i: (torch.rand(1, 16, 16), torch.rand(1, 16, 16))), batch_size=8)
    assert warnings_of(fine(loader=views, n_batches=2), 1) == []
    arrays = L(np.array(Image.open(o)) for o in unseen)
    assert warnings_of(fine(pool=arrays, n_batches=2), 1) == []
    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 16, 16), torch.arange(8))
    train = torch.utils.data.DataLoader(data, batch_size=4)
    learn = Learner(DataLoaders(train, train), tiny_net(), loss_func=nn.CrossEntropyLoss(), cbs=FixMatch(views))
    assert warnings_of(learn, 1) == []


# --- the folders, and the same image twice


@pytest.fixture
def folders(fine, digits, tmp_path):
    "A learner of class folders that a function may spoil before they are read"

    def make(spoil=lambda root: None, n=8):
        root = tmp_path / 'labeled'
        for c in '01':
            (root / c).mkdir(parents=True)
            for i, o in enumerate(of_class(digits, **{f'_{c}': 2 * n})):
                (root / c / f'{i:02}.png').write_bytes(o.read_bytes())
        spoil(root)
        files = sorted(root.glob('*/*.png'))
        valid = [o for o in files if int(o.stem[:2]) >= n]
        items = [o for o in files if o not in valid] + valid
        block = make_block(n=len(items) - len(valid), n_valid=len(valid))
        return fine(block.dataloaders(items, bs=4, num_workers=0).repeat_train(20))

    return make


def move(root, a, b):
    (root / b).parent.mkdir(parents=True, exist_ok=True)
    (root / a).rename(root / b)


SPOILS = {
    'class names': (lambda root: move(root, '0/01.png', 'ZERO/01.png') or move(root, '0/02.png', 'Zero/02.png'), None),
    'empty folders': (lambda root: (root / 'two').mkdir(), 'two'),
    'system folders': (lambda root: (root / '@eaDir').mkdir(), '@eaDir'),
    'images beside': (lambda root: move(root, '0/01.png', 'beside.png'), 'beside.png'),
    'images below': (lambda root: move(root, '0/01.png', '0/more/01.png'), '0/more/01.png'),
}


@pytest.mark.parametrize('name', SPOILS)
def test_folders(folders, name):
    spoil, found = SPOILS[name]
    report = check(folders(spoil))
    assert level(report, name) == ('problem' if found is None else 'note')
    assert report[name].found == found or "'ZERO' and 'Zero' are classes of their own" in report[name].found
    assert [o for o in SPOILS if o in report] == [name]


def test_a_system_folder_as_a_class(folders):
    report = check(folders(lambda root: move(root, '0/01.png', '__MACOSX/01.png')))
    assert level(report, 'class names') == 'problem' and "'__MACOSX' is a class" in report['class names'].found


def test_nothing_is_wrong_with_the_folders(folders):
    report = check(folders())
    assert not {*SPOILS, 'both sides', 'two classes', 'labelled twice', 'labelled files'} & {*report.table.index}
    assert level(report, 'copies') == 'ok'
    assert report.classes.to_dict() == {'labelled': {'0': 8, '1': 8}, 'validation': {'0': 8, '1': 8}}
    assert list(report.damaged.columns) == ['set', 'item', 'error']
    assert set(report.duplicates.query("how == 'same'")['set']) <= {'pool'}, 'the pool holds labelled ones'


def copy(root, a, b):
    (root / b).write_bytes((root / a).read_bytes())


def resaved(root, a, b):
    Image.open(root / a).resize((64, 64), Image.Resampling.BICUBIC).save(root / b)


def test_validation_images_that_are_labelled_ones(folders):
    report = check(folders(lambda root: copy(root, '0/00.png', '0/50.png')))
    assert level(report, 'copies') == 'problem' and ': 1, and 0 nearly, such as 0/50.png' in report['copies'].found
    found = report.duplicates.iloc[0]
    assert (found['set'], found.in_set, found.how) == ('validation', 'labelled', 'same')
    assert (found['image'].name, found.copy_of.name) == ('50.png', '00.png')


@pytest.mark.parametrize('n, expected', [(20, 'note'), (8, 'problem')])
def test_validation_images_that_look_like_labelled_ones(folders, n, expected):
    pytest.importorskip('imagehash')
    learn = folders(lambda root: resaved(root, '0/00.png', '0/50.png'), n)
    items = [*learn.dls.train.items, *learn.dls.valid.items]
    block = make_block(n=2 * n, n_valid=2 * n + 1, item_tfms=Resize(16))
    dls = block.dataloaders(items, bs=4, num_workers=0).repeat_train(20)
    learn.dls = dls
    learn.fix_match.unlabeled_dl = dls.unlabeled_dl(items[:8], mu=2)
    report = check(learn)
    assert level(report, 'copies') == expected and '1 nearly' in report['copies'].found


def test_one_image_in_two_classes_or_twice_in_one(folders):
    def spoil(root):
        copy(root, '0/00.png', '1/50.png')  # labelled in one, validated in the other
        copy(root, '0/01.png', '1/03_.png')
        copy(root, '1/02.png', '1/04_.png')

    report = check(folders(spoil))
    assert level(report, 'two classes') == 'problem' and level(report, 'labelled twice') == 'note'
    assert report['two classes'].found == '1/03_.png is 0/01.png, 1/50.png is 0/00.png'
    assert report['labelled twice'].found == '1/04_.png is 1/02.png'
    assert {'00.png', '01.png', '02.png'} <= {o.name for o in report.duplicates.copy_of}


def test_one_image_in_two_classes_that_was_saved_again(folders):
    pytest.importorskip('imagehash')

    def spoil(root):
        resaved(root, '0/00.png', '1/50.png')  # labelled in one, validated in the other
        resaved(root, '0/01.png', '1/03_.png')

    report = check(folders(spoil, n=20))
    assert level(report, 'two classes') == 'note' and 'labelled twice' not in report
    found = report['two classes'].found
    assert found.startswith('nearly ') and '1/03_.png is 0/01.png' in found and '1/50.png is 0/00.png' in found


def test_a_pool_with_everything_twice(fine, unseen):
    report = check(fine(pool=unseen + unseen))
    assert level(report, 'pool twice') == 'note' and f': {len(unseen)}, and 0 nearly' in report['pool twice'].found
    assert 'pool twice' not in check(fine())


def test_a_class_on_one_side_only(fine, digits):
    def report(train, valid, vocab=None):
        items = [*of_class(digits, **train), *of_class(digits[::-1], **valid)]
        block = make_block(vocab, sum(train.values()), sum(valid.values()))
        return check(fine(block.dataloaders(items, bs=4, num_workers=0).repeat_train(20)))

    unseen = report(dict(_0=4, _1=4, _2=4), dict(_0=4, _1=4))
    assert level(unseen, 'both sides') == 'note' and unseen['both sides'].found == 'no validation images of 2'
    untrained = report(dict(_0=4, _1=4), dict(_0=4, _1=4, _2=4))
    assert level(untrained, 'both sides') == 'problem' and 'StratifiedSplitter' in untrained['both sides'].advice
    assert untrained.classes.loc['2'].tolist() == [0, 4]
    assert 'both sides' not in report(dict(_0=4, _1=4), dict(_0=4, _1=4, _2=4), list('012'))  # told by `labels`


@pytest.mark.parametrize('n, points', [(2, 41), (8, 28), (20, 20), (96, 10), (97, 10)])
def test_what_few_validation_images_tell(fine, digits, n, points):
    dls = make_block(n_valid=n).dataloaders([*digits[:20], *digits[:n]], bs=4, num_workers=0)
    found = check(fine(dls.repeat_train(20)))['validation']
    assert f'within {points} points' in found.found and (found.level == 'note') == (n < 93)


def test_unreadable_labelled_images_are_all_listed(folders):
    def spoil(root):
        for name in ('0/02.png', '1/01.png', '1/12.png'):
            (root / name).write_bytes(b'no image')

    report = check(folders(spoil))
    assert level(report, 'labelled files') == 'problem'
    assert '2 of 16 labelled images opened were unreadable, such as 0/02.png' in report['labelled files'].found
    assert [(o.set, o.item.name) for o in report.damaged.itertuples()] == [
        *(('labelled', '02.png'), ('labelled', '01.png'), ('validation', '12.png'))
    ]


# --- other images


def test_a_pool_of_another_kind(fine, unseen):
    inverted = L(255 - np.array(Image.open(o)) // 4 for o in unseen)
    report = check(fine(pool=inverted))
    assert level(report, 'kinds') == 'note' and 'lighter' in report['kinds'].found
    assert level(report, 'channels') == 'problem'
    assert '`mean`' not in report['channels'].advice and 'lighter' in report['channels'].advice
    assert 'kinds' not in check(fine())


@pytest.mark.parametrize('side, expected', [(159, None), (160, 'note')])
def test_originals_of_ten_times_the_size(fine, digits, tmp_path, side, expected):
    for i, o in enumerate(digits[:48]):
        (tmp_path / o.parent.name).mkdir(exist_ok=True)
        Image.open(o).resize((side, side + 40)).save(tmp_path / o.parent.name / f'{i}.png')
    files = sorted(tmp_path.glob('*/*.png'))
    dls = make_block(item_tfms=Resize(16)).dataloaders(files[:40], bs=4, num_workers=0).repeat_train(20)
    report = check(fine(dls, pool=files[40:], mu=1))
    assert ('originals' in report) == (expected is not None)
    assert expected is None or (level(report, 'originals') == expected and '160 pixels' in report['originals'].found)


def test_words_of_the_place(fine, unseen, tmp_path):
    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 16, 16), torch.arange(8))
    views = torch.utils.data.DataLoader(Fixed(lambda i: (torch.rand(1, 16, 16), torch.rand(1, 16, 16))), batch_size=8)
    dls = DataLoaders(torch.utils.data.DataLoader(data, batch_size=4), torch.utils.data.DataLoader(data, batch_size=4))
    learn = Learner(dls, tiny_net(), loss_func=nn.CrossEntropyLoss(), cbs=FixMatch(views), path=tmp_path)
    epoch = check(learn)['epoch'].advice
    assert 'RandomSampler' in epoch and 'repeat_train' not in epoch
    assert 'repeat_train' in check(fine(n_batches=None))['epoch'].advice
    words = findings.Words(epoch='--steps 100')
    assert check(fine(n_batches=None), words=words)['epoch'].advice.startswith('Use --steps 100 for epochs')


def test_a_sampler_as_advised_repeats():
    "What a torch loader's user is told to do"
    data = torch.utils.data.TensorDataset(torch.arange(8))
    sampler = torch.utils.data.RandomSampler(data, num_samples=100 * 4)
    assert len(torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)) == 100
    assert len(list(torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler))) == 100


def test_few_labels_on_a_pretrained_network(fine):
    def found(**kwargs):
        learn = fine(**kwargs)
        learn.pretrained = True
        return check(learn)

    report = found()
    assert level(report, 'recipe') == 'note'
    assert report['recipe'].found == 'a pretrained network with 20 labelled images'
    assert 'fine_tune_fixmatch' in report['recipe'].advice
    assert 'recipe' not in found(fixmatch={'teacher': ModelEMA(half_life=1)})
    assert 'recipe' not in check(fine())


def test_what_a_command_can_find_is_told_in_words_of_the_place():
    "Python stands in `Words`; in the checks, only where no command comes: torch's loaders, float views, several labels"
    tree = ast.parse(inspect.getsource(room))
    functions = [o for o in tree.body if isinstance(o, ast.FunctionDef) and o.name.startswith('_check')]
    told = [o.value for f in functions for o in ast.walk(f) if isinstance(o, ast.Constant) and isinstance(o.value, str)]
    assert {o for text in told for o in re.findall('`[^`]+`', text)} == {
        *('`positive`', '`MultiLabelThreshold(positive=[0.95, 0.8, ...])`'),
        *('`drop_last=False`', '`dls.unlabeled_dl(files)`'),
        '`pip install imagehash`',
    }
