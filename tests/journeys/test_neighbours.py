"FixMatch beside what people use with it, where more is to be seen than in the rows of matrix.py"

import csv
import math
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    CSVLogger,
    DataLoaders,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    ImageDataLoaders,
    Learner,
    MixUp,
    Normalize,
    PILImage,
    Resize,
    ResizeMethod,
    SaveModelCallback,
    ShortEpochCallback,
    accuracy,
    aug_transforms,
    get_image_files,
    imagenet_stats,
    load_learner,
    parent_label,
    resnet18,
    set_seed,
    vision_learner,
)
from in_memory import batches, sgd

from fixmatch_fastai.all import FixMatch, FixMatchTransform, ModelEMA
from fixmatch_fastai.core import finished

COLUMNS = ['loss_x', 'loss_u', 'mask_rate', 'pseudo_acc']


class Inputs(Callback):
    "What the model trains on, batch by batch"

    order, run_valid = 8, False

    def __init__(self):
        self.seen = []

    def before_batch(self):
        self.seen.append(self.x.clone())


# --- callbacks


def test_mixup_blends_labeled_images_only(make_dls):
    "The unlabelled rows are the same with and without MixUp"
    dls = make_dls()
    loader = [(torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16), torch.arange(8))]
    looks = []
    for cbs in ([MixUp()], []):
        looks.append(Inputs())
        quiet_fit(Learner(dls, tiny_net(), cbs=[FixMatch(loader), looks[-1], *cbs]), 1)
    a, b = (look.seen[0][4:] for look in looks)
    assert torch.equal(a, b)


def test_gradient_accumulation_equals_the_whole_batch():
    "Two batches of 4 with 8 unlabelled images each are one of 8 with 16, for a network without BatchNorm"
    set_seed(0)
    x, y = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    weak, strong = torch.randn(2, 16, 1, 16, 16).unbind()
    model, grads = no_bn(), []

    class Grab(Callback):
        order = 100

        def before_step(self):
            grads.append([p.grad.clone() for p in self.model.parameters()])

    for labeled, unlabeled, cbs in (
        ([(x[:4], y[:4]), (x[4:], y[4:])], [(weak[:8], strong[:8]), (weak[8:], strong[8:])], [GradientAccumulation(8)]),
        ([(x, y)], [(weak, strong)], []),
    ):
        dls, cbs = DataLoaders(labeled, labeled), [FixMatch(unlabeled, threshold=0.19), *cbs, Grab()]
        learn = Learner(dls, deepcopy(model), CrossEntropyLossFlat(), opt_func=sgd, cbs=cbs)
        quiet_fit(learn, 1)
        assert 0 < learn.fix_match.history.mask_rate.mean() < 1
    a, b = grads
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize(
    'cbs',
    [[GradientAccumulation(6)], [MixUp(), GradientAccumulation(8), GradientClip()], [ShortEpochCallback(0.5, False)]],
    ids=['accumulated over epochs', 'three at once', 'short validation'],
)
def test_columns_stay_in_their_places(make_learner, cbs):
    learn = make_learner(cbs=cbs)
    quiet_fit(learn, 2, 1e-2)
    assert len(learn.fix_match.history) >= 2 and type(learn.loss_func) is CrossEntropyLossFlat
    for row in learn.recorder.values:
        assert len(row) == 7 and math.isfinite(row[5])


# --- columns


@pytest.mark.parametrize('train_metrics', [False, True])
def test_columns_are_means_of_the_steps(make_learner, train_metrics):
    "In the table, for trackers and for loggers"
    learn = make_learner()
    learn.recorder.train_metrics = train_metrics
    save = SaveModelCallback(monitor='mask_rate')
    stop = EarlyStoppingCallback(monitor='pseudo_acc', patience=5)
    quiet_fit(learn, 3, cbs=[save, stop, CSVLogger('log.csv')])
    names = ['train_loss', 'valid_loss', 'accuracy']
    if train_metrics:
        names = ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']
    assert learn.recorder.metric_names == ['epoch', *names, *COLUMNS, 'time']
    history = learn.fix_match.history
    for i, name in enumerate(COLUMNS[:3], len(names)):  # batches of one size
        per_epoch = history[name].values.reshape(3, 3).mean(1).tolist()
        assert [row[i] for row in learn.recorder.values] == pytest.approx(per_epoch)
    rates = [row[len(names) + 2] for row in learn.recorder.values]
    assert save.best == max(rates) and (learn.path / 'models/model.pth').exists()
    with (learn.path / 'log.csv').open() as f:
        assert [float(o['mask_rate']) for o in csv.DictReader(f)] == pytest.approx(rates, abs=1e-6)


def test_columns_hold_values_only_while_training(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    loss, acc = learn.validate()
    assert np.isnan(learn.recorder.values[-1][2:]).all(), 'the columns are there for trackers, without values'
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    preds, targs = learn.get_preds()
    assert len(preds) == len(targs) == 20


def test_pseudo_acc_only_where_the_truth_is_known(make_learner):
    learn = make_learner(label_func=None)
    quiet_fit(learn, 1)
    assert learn.recorder.metric_names[4:-1] == COLUMNS[:3]
    assert learn.fix_match.history.pseudo_acc.isna().all()


class TorchImages(torch.utils.data.Dataset):
    "torchvision's way: the transform of the data set makes the views"

    def __init__(self, n, transform, y):
        self.imgs = [torchvision.transforms.functional.to_pil_image(torch.rand(3, 12, 12)) for _ in range(n)]
        self.transform, self.y = transform, y

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, i):
        return self.transform(self.imgs[i]), self.y(i)


def test_torch_loaders_that_know_the_truth_or_do_not():
    mean, std = [0.3] * 3, [0.33] * 3
    tfms = torchvision.transforms
    plain = tfms.Compose([tfms.ToTensor(), tfms.Normalize(mean, std)])
    loader = lambda transform, y: torch.utils.data.DataLoader(TorchImages(12, transform, y), batch_size=4)
    train, views = loader(plain, lambda i: i % 10), FixMatchTransform(mean, std)
    learn = Learner(DataLoaders(train, train), tiny_net(n_in=3), CrossEntropyLossFlat(), metrics=accuracy)
    for y, columns in ((lambda i: i % 10, COLUMNS), (lambda i: -1, COLUMNS[:3])):
        quiet_fit(learn, 2, cbs=FixMatch(loader(views, y), threshold=0.1))
        assert learn.recorder.metric_names[4:-1] == columns
        assert len(learn.validate()) == 2


# --- export


def test_export_names_no_folder_of_images(make_learner, pool):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.export()
    file = learn.path / 'export.pkl'
    assert str(pool[0].parent).encode() not in file.read_bytes()
    loaded = load_learner(file)
    assert isinstance(loaded.fix_match, FixMatch) and type(loaded.loss_func) is CrossEntropyLossFlat


# --- photos and pretrained networks


@pytest.fixture
def fake_weights(monkeypatch):
    "What `pretrained=True` would download: the same tensors, untrained"
    weights = lambda self, *args, **kwargs: resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', weights)


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    "The folders of the README: `labeled/<class>/*.jpg` and `unlabeled/*.jpg`, of many sizes"
    path = tmp_path_factory.mktemp('jpegs')
    set_seed(0)
    for i in range(24):
        img = torchvision.transforms.functional.to_pil_image(torch.rand(3, 40 + i, 60 - i))
        for f in (path / 'labeled' / 'ab'[i % 2] / f'{i}.jpg', path / 'unlabeled' / f'{i}.jpg'):
            f.parent.mkdir(parents=True, exist_ok=True)
            img.save(f)
    return path


def photos(jpegs, item_tfms, bs=8, **kwargs):
    opts = dict(valid_pct=0.2, num_workers=0, **kwargs)
    return ImageDataLoaders.from_folder(jpegs / 'labeled', item_tfms=item_tfms, bs=bs, **opts)


@pytest.mark.slow
def test_the_first_lines_of_the_readme(jpegs, fake_weights, monkeypatch):
    "As they stand there, but for a smaller network, smaller images and fewer steps"
    readme = (Path(__file__).parents[2] / 'README.md').read_text(encoding='utf-8')
    first, second = re.findall(r'```python\n(.*?)```', readme, re.S)[:2]
    for whole, little in (('(128)', '(32)'), ('repeat_train(100)', 'repeat_train(3)'), ('resnet34', 'resnet18')):
        assert whole in first
        first, second = first.replace(whole, little), second.replace(whole, little)
    names = {'path': jpegs}
    exec(first, names)
    dls, history = names['dls'], names['learn'].fix_match.history
    assert [Counter(map(parent_label, o.items)) for o in (dls.train_ds, dls.valid_ds)] == [
        *({'a': 10, 'b': 10}, {'a': 2, 'b': 2})
    ]
    assert len(history) == 9 and (history.mask_rate > 0).any()
    exec(second.replace('(unlabeled_dl)', '(unlabeled_dl, n_steps=3)'), names)
    assert len(names['learn'].fix_match.history) == 3


@pytest.mark.slow
def test_a_vision_learner_normalises_both_sides(jpegs, fake_weights):
    "Both sides are normalised, by the pipeline that `vision_learner` changes after the loader was made"
    dls = photos(jpegs, Resize(32)).repeat_train(2)
    unlabeled_dl, look = dls.unlabeled_dl(get_image_files(jpegs / 'unlabeled'), mu=2), Inputs()
    learn = vision_learner(dls, resnet18, metrics=accuracy, cbs=[FixMatch(unlabeled_dl), look])
    quiet_fit(learn, 1, 3e-3, method='fit_one_cycle')
    assert [type(t) for t in learn.dls.after_batch.fs][-1] is Normalize
    assert look.seen[0].shape == (8 + 2 * 16, 3, 32, 32)
    mean, std = map(torch.tensor, imagenet_stats)
    black, white = -mean / std, (1 - mean) / std
    x, weak, strong = look.seen[0].split([8, 16, 16])
    for t in (x, weak, strong):
        assert t.amin((0, 2, 3)).ge(black - 1e-4).all() and t.amax((0, 2, 3)).le(white + 1e-4).all()
        assert t.min() < -1, 'normalised'
    torch.testing.assert_close(x.mean((0, 2, 3)), weak.mean((0, 2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), weak.std((0, 2, 3)), atol=0.1, rtol=0)


def test_weak_view_is_what_validation_shows(jpegs, fake_weights):
    "An unchanged view, finished, equals the image as validation sees it, to the last bit"
    dls = photos(jpegs, Resize(32), batch_tfms=aug_transforms())
    items = list(dls.valid_ds.items)
    same = FixMatchTransform(weak=lambda o: o, strong=lambda o: o)
    loader = dls.unlabeled_dl(items, tfm=same, shuffle=False, bs=len(items))
    learn = vision_learner(dls, resnet18, cbs=FixMatch(loader))
    weak, strong, _ = next(iter(loader))
    assert weak.dtype == torch.uint8
    expected = dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(finished(weak, learn.dls), expected, rtol=0, atol=0)


@pytest.mark.parametrize('presize', [False, True])
def test_views_follow_progressive_resizing(jpegs, presize):
    def get(size, bs):
        if presize:
            return photos(jpegs, Resize(48), bs, batch_tfms=aug_transforms(size=size), img_cls=PILImage).repeat_train(2)
        return photos(jpegs, Resize(size), bs, img_cls=PILImage).repeat_train(2)

    dls, look = get(16, 8), Inputs()
    loader = dls.unlabeled_dl(get_image_files(jpegs / 'unlabeled'), mu=2)
    learn = Learner(dls, tiny_net(2, n_in=3), cbs=FixMatch(loader))
    quiet_fit(learn, 1)
    learn.dls = get(24, 4)
    quiet_fit(learn, 1, cbs=look)
    assert [tuple(o.shape) for o in look.seen] == [(4 + 2 * 8, 3, 24, 24)] * 2


def test_repeat_train_keeps_the_transforms_of_now(jpegs, fake_weights):
    "`vision_learner` adds Normalize to the repeated loader: predictions and longer epochs must have it too"
    dls = photos(jpegs, Resize(32, ResizeMethod.Squish)).repeat_train(2)
    learn = vision_learner(dls, resnet18)
    items = list(dls.train_ds.items)
    expected, _ = learn.get_preds(dl=dls.test_dl(items))
    torch.testing.assert_close(learn.get_preds(ds_idx=0)[0], expected)
    assert len(learn.tta(ds_idx=0, n=1)[0]) == len(items)
    plain = dls.train.new(shuffle=False, after_batch=[], device='cpu').one_batch()[0]
    assert plain.dtype == torch.uint8, 'what is asked for goes before what is there'
    longer = dls.repeat_train(5)
    assert len(longer.train) == 5
    assert [type(t) for t in longer.train.after_batch.fs] == [type(t) for t in longer.valid.after_batch.fs]
    assert longer.train.one_batch()[0].min() < -1, 'normalised'


# --- a validation during a fit


class Validates(Callback):
    "Tries other images, as a user's callback may"

    def __init__(self, event, order):
        self._event, self.order, self.results = event, order, []

    def __call__(self, event_name):
        if event_name == self._event and not self.learn.lock.locked():
            self.results.append(self.learn.validate())


def fit_beside(*cbs):
    labeled, unlabeled = batches(3)
    fm = FixMatch(unlabeled, 0.12, teacher=ModelEMA(half_life=2))
    set_seed(0)
    dls = DataLoaders(labeled, labeled[:1])
    learn = Learner(dls, tiny_net(), CrossEntropyLossFlat(), metrics=accuracy, opt_func=sgd, cbs=[fm, *cbs])
    quiet_fit(learn, 2)
    return learn


@pytest.fixture(scope='module')
def alone():
    return fit_beside()


@pytest.mark.parametrize('order', [-20, 0, 90])
@pytest.mark.parametrize('event', ['before_epoch', 'after_train', 'after_validate', 'after_epoch'])
def test_a_validation_during_a_fit_changes_nothing(alone, event, order):
    validates = Validates(event, order)
    learn = fit_beside(validates)
    assert len(validates.results) == 2 and all(len(o) == 2 for o in validates.results)
    assert learn.recorder.metric_names == alone.recorder.metric_names and len(learn.fix_match.history) == 6
    pd.testing.assert_frame_equal(learn.fix_match.history, alone.fix_match.history)
    np.testing.assert_equal(learn.recorder.values, alone.recorder.values)
    np.testing.assert_equal(learn.recorder.losses, alone.recorder.losses)
    assert learn.epoch == 1 and learn.train_iter == 6
