"FixMatch beside what people use with it"

import csv
import math
from copy import copy, deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    CSVLogger,
    CutMix,
    DataLoaders,
    EarlyStoppingCallback,
    FocalLossFlat,
    GradientAccumulation,
    GradientClip,
    ImageDataLoaders,
    Interpretation,
    LabelSmoothingCrossEntropy,
    Learner,
    MixedPrecision,
    MixUp,
    Normalize,
    OptimWrapper,
    PILImage,
    Resize,
    ResizeMethod,
    SaveModelCallback,
    SchedLin,
    ShortEpochCallback,
    accuracy,
    aug_transforms,
    get_image_files,
    imagenet_stats,
    load_learner,
    nn,
    parent_label,
    resnet18,
    set_seed,
    vision_learner,
)

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    split_labeled,
)
from fixmatch_fastai.callback import OneCallLoss
from fixmatch_fastai.core import finished

COLUMNS = ['loss_x', 'loss_u', 'mask_rate', 'pseudo_acc']


@pytest.mark.parametrize('first', [True, False], ids=['mix first', 'mix last'])
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mix(make_learner, mix, first):
    learn = make_learner()
    if first:
        fm = learn.fix_match
        learn.remove_cb(fm)
        learn.add_cbs([mix(), fm])
    else:
        learn.add_cb(mix())
    quiet_fit(learn, 2)
    assert type(learn.loss_func) is CrossEntropyLossFlat
    assert learn.fix_match.history[COLUMNS[:3]].notna().all().all()
    assert len(learn.validate()) == 2


def test_mixup_blends_labeled_images_only(make_dls):
    "With weights that can't learn, the unlabelled rows are the same with and without MixUp"
    dls = make_dls()
    loader = [(torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16), torch.arange(8))]
    seen = {}

    class Look(Callback):
        order = 8

        def before_batch(self):
            if self.training:
                seen.setdefault(self.tag, self.x[4:].clone())

    for tag in ('with', 'without'):
        look = Look()
        look.tag = tag
        learn = Learner(dls, tiny_net(), cbs=[FixMatch(loader), look] + [MixUp()] * (tag == 'with'))
        quiet_fit(learn, 1)
    assert torch.equal(seen['with'], seen['without'])


def test_gradient_accumulation_equals_whole_batch():
    "Two micro-batches of 4 and their 8 unlabelled images each are one batch of 8 with 16, for a network without BatchNorm"
    set_seed(0)
    x, y = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    weak, strong = torch.randn(16, 1, 16, 16), torch.randn(16, 1, 16, 16)
    small, large = [(x[:4], y[:4]), (x[4:], y[4:])], [(x, y)]
    model = no_bn()
    grads = []

    class Grab(Callback):
        order = 100

        def before_step(self):
            grads.append([p.grad.clone() for p in self.model.parameters()])

    for data, loader, cbs in ((small, [(weak[:8], strong[:8]), (weak[8:], strong[8:])], [GradientAccumulation(8)]), (large, [(weak, strong)], [])):
        learn = Learner(
            DataLoaders(data, data),
            deepcopy(model),
            CrossEntropyLossFlat(),
            opt_func=partial(OptimWrapper, opt=torch.optim.SGD),
            cbs=[FixMatch(loader, threshold=0.19), *cbs, Grab()],
        )
        quiet_fit(learn, 1)
        assert 0 < learn.fix_match.history.mask_rate.mean() < 1
    assert len(grads) == 2
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    'cbs',
    [
        [MixedPrecision()],
        [GradientClip(0.1)],
        [GradientAccumulation(6)],
        [MixUp(), GradientAccumulation(8), GradientClip()],
        [ShortEpochCallback(0.5)],
        [ShortEpochCallback(0.5, False)],
    ],
    ids=lambda cbs: '+'.join(type(c).__name__ for c in cbs),
)
def test_callbacks(make_learner, cbs):
    learn = make_learner(cbs=cbs)
    quiet_fit(learn, 2, 1e-2)
    assert len(learn.fix_match.history) >= 2 and type(learn.loss_func) is CrossEntropyLossFlat
    for row in learn.recorder.values:
        assert len(row) == 7 and math.isfinite(row[5]), 'the columns stay in their places, also where an epoch is cut short'


@pytest.mark.parametrize(
    'loss',
    [
        CrossEntropyLossFlat(),
        CrossEntropyLossFlat(weight=torch.ones(10)),
        LabelSmoothingCrossEntropy(),
        FocalLossFlat(),
        nn.CrossEntropyLoss(),
        torch.nn.functional.cross_entropy,
    ],
    ids=['flat', 'weighted', 'smoothed', 'focal', 'torch', 'function'],
)
def test_losses(make_learner, pool, loss):
    learn = make_learner(loss_func=loss)
    quiet_fit(learn, 1)
    assert learn.loss_func is loss
    preds, _ = learn.get_preds()
    if hasattr(loss, 'activation'):
        torch.testing.assert_close(preds.sum(1), torch.ones(len(preds)))


@pytest.mark.parametrize('method,args', [('fit_one_cycle', (2, 1e-2)), ('fit_flat_cos', (2, 1e-2)), ('fit_sgdr', (1, 1)), ('fine_tune', (1,))])
def test_fits(make_learner, method, args):
    learn = make_learner()
    before = [p.clone() for p in learn.model.parameters()]
    quiet_fit(learn, *args, method=method)
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    assert learn.recorder.metric_names[4:-1] == COLUMNS


def test_twice_and_start_epoch(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    quiet_fit(learn, 3, start_epoch=2)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *COLUMNS, 'time']
    assert len(learn.metrics) == 1 and len(learn.recorder.values[-1]) == 7


def test_lr_find_before_and_after(make_learner):
    learn = make_learner()
    before = [p.clone() for p in learn.model.parameters()]
    lr = quiet_fit(learn, show_plot=False, num_it=6, method='lr_find').valley
    assert lr > 0
    for a, b in zip(before, learn.model.parameters()):
        assert torch.equal(a, b)
    quiet_fit(learn, 1, lr)
    quiet_fit(learn, show_plot=False, num_it=6, method='lr_find')
    quiet_fit(learn, 1)


@pytest.mark.parametrize('train_metrics', [False, True])
def test_monitor_and_log(make_learner, tmp_path, train_metrics):
    learn = make_learner()
    learn.recorder.train_metrics = train_metrics
    save = SaveModelCallback(monitor='mask_rate')
    stop = EarlyStoppingCallback(monitor='pseudo_acc', patience=5)
    quiet_fit(learn, 3, cbs=[save, stop, CSVLogger('log.csv')])
    names = ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy'] if train_metrics else ['train_loss', 'valid_loss', 'accuracy']
    assert learn.recorder.metric_names == ['epoch', *names, *COLUMNS, 'time']
    rates = [row[len(names) + 2] for row in learn.recorder.values]
    assert save.best == max(rates) and (learn.path / 'models/model.pth').exists()
    rows = list(csv.DictReader((learn.path / 'log.csv').open()))
    assert [float(r['mask_rate']) for r in rows] == pytest.approx(rates, abs=1e-6)
    per_step = learn.fix_match.history.mask_rate.values.reshape(3, 3).mean(1)
    assert rates == pytest.approx(per_step.tolist()), 'batches of one size: the mean of the steps'
    assert [r[len(names)] for r in learn.recorder.values] == pytest.approx(learn.fix_match.history.loss_x.values.reshape(3, 3).mean(1).tolist())


def test_columns_hold_values_only_while_training(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    loss, acc = learn.validate()
    assert np.isnan(learn.recorder.values[-1][2:]).all()  # the columns are there for trackers, without values
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    preds, targs = learn.get_preds()
    assert len(preds) == len(targs) == 20


def test_pseudo_acc_only_where_known(make_learner):
    learn = make_learner(label_func=None)
    quiet_fit(learn, 1)
    assert learn.recorder.metric_names[4:-1] == COLUMNS[:3]
    assert learn.fix_match.history.pseudo_acc.isna().all()


def test_show_and_predict(make_learner, pool):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.show_results(max_n=4)
    learn.summary()
    learn.tta(n=1)
    Interpretation.from_learner(learn).plot_top_losses(2)
    learn.fix_match.plot()
    fig = learn.fix_match.show_pseudo_labels(5)
    assert len(fig.axes) == 10
    assert learn.predict(pool[0])[0] in learn.dls.vocab


def test_show_pseudo_labels_changes_nothing(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.model.train()
    before = deepcopy(learn.model.state_dict())
    learn.fix_match.show_pseudo_labels(4)
    assert learn.model.training
    for k, v in learn.model.state_dict().items():
        assert torch.equal(v, before[k])


def test_export_holds_no_images(make_learner, pool):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.export()
    file = learn.path / 'export.pkl'
    assert file.stat().st_size < 200_000
    assert str(pool[0].parent).encode() not in file.read_bytes()
    loaded = load_learner(file)
    a, b = learn.predict(pool[3]), loaded.predict(pool[3])
    assert a[0] == b[0]
    torch.testing.assert_close(a[2], b[2])
    assert isinstance(loaded.fix_match, FixMatch) and not isinstance(loaded.loss_func, OneCallLoss)


def test_deepcopy_and_save(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    deepcopy(learn.fix_match)
    learn.save('weights')
    learn.load('weights')
    quiet_fit(learn, 1)


def test_one_callback_in_two_learners_in_turn(make_learner):
    a, b = make_learner(), make_learner()
    fm = a.fix_match
    a.remove_cb(fm)
    b.remove_cb(FixMatch)
    for learn in (b, a):
        quiet_fit(learn, 1, cbs=fm)
        assert len(learn.recorder.values[-1]) == 7
        quiet_fit(learn, 1)
        assert len(learn.recorder.values[-1]) == 3


@pytest.mark.parametrize('as_list', [False, True])
def test_torch_loaders_on_both_sides(as_list):
    "torchvision's way: the transform of the dataset makes the views"
    mean, std = 0.3, 0.33

    class Images(torch.utils.data.Dataset):
        def __init__(self, n, transform, y):
            self.imgs = [torchvision.transforms.functional.to_pil_image(torch.rand(3, 12, 12)) for _ in range(n)]
            self.transform, self.y = transform, y

        def __len__(self):
            return len(self.imgs)

        def __getitem__(self, i):
            views = self.transform(self.imgs[i])
            return (list(views) if as_list else views), self.y(i)

    plain = torchvision.transforms.Compose([torchvision.transforms.ToTensor(), torchvision.transforms.Normalize([mean] * 3, [std] * 3)])
    train = torch.utils.data.DataLoader([(plain(img), i % 10) for i, img in enumerate(Images(10, plain, int).imgs)], batch_size=4)
    views = FixMatchTransform([mean] * 3, [std] * 3)
    learn = Learner(DataLoaders(train, train), tiny_net(n_in=3), CrossEntropyLossFlat(), metrics=accuracy)
    known = torch.utils.data.DataLoader(Images(20, views, lambda i: i % 10), batch_size=8)
    unknown = torch.utils.data.DataLoader(Images(20, views, lambda i: -1), batch_size=8)
    for loader, columns in ((known, COLUMNS), (unknown, COLUMNS[:3])):
        quiet_fit(learn, 2, cbs=FixMatch(loader, threshold=0.1))
        assert learn.recorder.metric_names[4:-1] == columns
        assert len(learn.validate()) == 2


def fake_weights(monkeypatch):
    "What `pretrained=True` would download: the same tensors, untrained"
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', lambda self, *a, **k: resnet18().state_dict())


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


def test_the_readme_snippet(jpegs, monkeypatch):
    "A pretrained `vision_learner`, smaller: both sides are normalised, by the one pipeline that `vision_learner` changes after the loader was made"
    fake_weights(monkeypatch)
    dls = ImageDataLoaders.from_folder(jpegs / 'labeled', valid_pct=0.2, item_tfms=Resize(32), bs=8, num_workers=0).repeat_train(2)
    unlabeled_dl = dls.unlabeled_dl(get_image_files(jpegs / 'unlabeled'), mu=2)
    learn = vision_learner(dls, resnet18, metrics=accuracy, cbs=[FixMatch(unlabeled_dl)])
    seen = []

    class Look(Callback):
        order = 8

        def before_batch(self):
            if self.training:
                seen.append(self.x.clone())

    learn.add_cb(Look())
    quiet_fit(learn, 1, 3e-3, method='fit_one_cycle')
    assert [type(t) for t in learn.dls.after_batch.fs][-1] is Normalize
    assert seen[0].shape == (8 + 2 * 16, 3, 32, 32)
    low, high = ((torch.tensor(v) - torch.tensor(imagenet_stats[0])) / torch.tensor(imagenet_stats[1]) for v in (0.0, 1.0))
    x, weak = seen[0][:8], seen[0][8:24]
    for t in (x, weak, seen[0][24:]):
        assert t.amin((0, 2, 3)).ge(low - 1e-4).all() and t.amax((0, 2, 3)).le(high + 1e-4).all() and t.min() < -1, 'ImageNet range'
    torch.testing.assert_close(x.mean((0, 2, 3)), weak.mean((0, 2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), weak.std((0, 2, 3)), atol=0.1, rtol=0)


def test_weak_view_is_what_validation_shows(jpegs, monkeypatch):
    "An unchanged view, finished, equals the image as validation sees it, to the last bit"
    fake_weights(monkeypatch)
    dls = ImageDataLoaders.from_folder(jpegs / 'labeled', valid_pct=0.2, item_tfms=Resize(32), bs=8, batch_tfms=aug_transforms(), num_workers=0)
    items = list(dls.valid_ds.items)
    same = FixMatchTransform(weak=lambda o: o, strong=lambda o: o)
    loader = dls.unlabeled_dl(items, tfm=same, shuffle=False, bs=len(items))
    learn = vision_learner(dls, resnet18, cbs=FixMatch(loader))
    weak, strong, _ = next(iter(loader))
    assert weak.dtype == torch.uint8
    torch.testing.assert_close(finished(weak, learn.dls), dls.valid.one_batch()[0].as_subclass(torch.Tensor), rtol=0, atol=0)


@pytest.mark.parametrize('presize', [False, True])
def test_progressive_resizing(jpegs, presize):
    def get(size, bs):
        item, batch = (Resize(48), aug_transforms(size=size)) if presize else (Resize(size), None)
        return ImageDataLoaders.from_folder(
            jpegs / 'labeled', valid_pct=0.2, item_tfms=item, batch_tfms=batch, bs=bs, num_workers=0, img_cls=PILImage
        ).repeat_train(2)

    dls = get(16, 8)
    learn = Learner(dls, tiny_net(2, n_in=3), cbs=FixMatch(dls.unlabeled_dl(get_image_files(jpegs / 'unlabeled'), mu=2)))
    quiet_fit(learn, 1)
    learn.dls = get(24, 4)
    shapes = []

    class Look(Callback):
        order = 8

        def before_batch(self):
            if self.training:
                shapes.append(tuple(self.x.shape))

    learn.add_cb(Look())
    quiet_fit(learn, 1)
    assert shapes == [(4 + 2 * 8, 3, 24, 24)] * 2


def test_repeat_train_keeps_the_transforms_of_now(jpegs, monkeypatch):
    "`vision_learner` adds Normalize to the repeated loader: predictions on the training set, and longer epochs, must have it too"
    fake_weights(monkeypatch)
    dls = ImageDataLoaders.from_folder(jpegs / 'labeled', valid_pct=0.2, item_tfms=Resize(32, ResizeMethod.Squish), bs=8, num_workers=0).repeat_train(2)
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


def test_pictures_follow_progressive_resizing(make_dls, make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.dls = make_dls(item_tfms=Resize(24))
    seen = []
    learn.model.register_forward_pre_hook(lambda m, x: seen.append(tuple(x[0].shape[1:])))
    learn.fix_match.show_pseudo_labels(3)
    assert seen == [(1, 24, 24)]


class Remembers(FixedThreshold):
    "A policy that needs `setup`"

    def setup(self, n_classes, n_unlabeled, model):
        self.seen, self.model = torch.zeros(n_classes), [model]

    def forward(self, batch):
        self.seen += torch.bincount(batch.probs.argmax(1), minlength=len(self.seen)).cpu()
        return super().forward(batch)


def test_policy_is_set_up_once_for_a_learner(make_learner):
    a = make_learner(fixmatch=dict(policy=Remembers(), threshold=0.95))
    fm = a.fix_match
    fm.show_pseudo_labels(2)
    assert not hasattr(fm.policy, 'seen'), 'pictures leave the policy as it is'
    quiet_fit(a, 1)
    assert fm.policy.seen.sum() == 3 * 8 and fm.policy.model[0] is a.model
    fm.show_pseudo_labels(2)
    assert fm.policy.seen.sum() == 3 * 8
    quiet_fit(a, 1)
    assert fm.policy.seen.sum() == 6 * 8, 'it remembers from fit to fit'
    a.remove_cb(fm)
    b = make_learner()
    b.remove_cb(FixMatch)
    quiet_fit(b, 1, cbs=fm)
    assert fm.policy.seen.sum() == 3 * 8 and fm.policy.model[0] is b.model, 'another learner: set up anew'


@pytest.mark.parametrize('before', [0, 1])
def test_callbacks_taken_off_and_put_back(make_learner, before):
    learn = make_learner()
    quiet_fit(learn, before)
    with learn.removed_cbs(list(learn.cbs)):
        pass
    quiet_fit(learn, 1)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *COLUMNS, 'time']
    assert len(learn.recorder.values[-1]) == 7 and np.isfinite(learn.recorder.values[-1][3:6]).all()


def test_copy_leaves_the_original_alone(make_learner):
    a, b = make_learner(), make_learner()
    other = copy(a.fix_match)
    b.remove_cb(FixMatch)
    b.add_cb(other)
    quiet_fit(a, 1)
    assert len(a.recorder.values[-1]) == 7
    with pytest.raises(ValueError, match='without its unlabelled images'):
        quiet_fit(b, 1)


def test_history_is_of_the_last_fit(make_learner):
    learn = make_learner()
    for _ in range(2):
        with learn.no_mbar():
            quiet_fit(learn, 1)
        assert len(learn.fix_match.history) == 3


def test_numpy_labels_are_known():
    x = torch.randn(8, 1, 16, 16)
    data = [((v, v + 1), np.int64(i % 3)) for i, v in enumerate(x)]
    train = [(x[:4], torch.zeros(4, dtype=torch.long))]
    learn = Learner(DataLoaders(train, train), tiny_net(), CrossEntropyLossFlat(), cbs=FixMatch(torch.utils.data.DataLoader(data, batch_size=4), threshold=0))
    quiet_fit(learn, 1)
    assert 'pseudo_acc' in learn.recorder.metric_names


def test_split_labeled_then_train(jpegs):
    files = get_image_files(jpegs / 'labeled')
    labeled, unlabeled = split_labeled(files, parent_label, 8)
    assert len(labeled) == 8 and len(unlabeled) == 16


class InterruptAtStep(Callback):
    order = 70

    def after_batch(self):
        if self.training and self.train_iter == 2:
            raise KeyboardInterrupt


def memory(learn):
    return {k: v.clone() for k, v in learn.fix_match.policy.state_dict().items()}


@pytest.mark.parametrize('interrupted', [False, True])
@pytest.mark.parametrize('before', [False, True], ids=['first', 'later'])
def test_lr_find_leaves_the_policy_as_it_was(make_learner, interrupted, before):
    learn = make_learner(fixmatch=dict(policy=FreeMatch(decay=0.5) & FlexMatch(0.2), threshold=0.95))
    fresh = FreeMatch() & FlexMatch()
    fresh.setup(10, 100, None)
    expected = fresh.state_dict()
    if before:
        quiet_fit(learn, 1)
        expected = memory(learn)
        assert not torch.equal(expected['first.p'], fresh.first.p)
    if interrupted:
        with learn.added_cbs(InterruptAtStep()), pytest.raises(KeyboardInterrupt):
            quiet_fit(learn, show_plot=False, num_it=6, method='lr_find')
        assert not torch.equal(memory(learn)['first.p'], expected['first.p']), 'else this test would show nothing'
        learn.validate()
    else:
        quiet_fit(learn, show_plot=False, num_it=6, method='lr_find')
    for k, v in memory(learn).items():
        assert torch.equal(v, expected[k]), k
    quiet_fit(learn, 1)
    assert not torch.equal(memory(learn)['first.p'], expected['first.p'])


def test_lambda_u_as_a_schedule(make_learner):
    seen = []

    class Ramp:
        def __call__(self, pos):
            seen.append(pos)
            return 2 * pos

    class Losses(Callback):
        def after_loss(self):
            if self.training:
                totals.append(self.loss.item())

    totals = []
    learn = make_learner(fixmatch=dict(lambda_u=Ramp(), threshold=0), cbs=[Losses()])
    seen.clear()  # those of the check
    quiet_fit(learn, 2)
    assert seen == pytest.approx([i / 6 for i in range(6)])
    history = learn.fix_match.history
    expected = history.loss_x + 2 * np.arange(6) / 6 * history.loss_u
    assert totals == pytest.approx(expected.tolist(), abs=1e-5) and (history.loss_u > 0).all()
    quiet_fit(make_learner(fixmatch=dict(lambda_u=SchedLin(0, 1))), 1)
    with pytest.raises(ValueError, match='0 or more throughout'):
        FixMatch([], lambda_u=SchedLin(1, -1))


def test_peek(make_learner):
    learn = make_learner(fixmatch=dict(policy=FlexMatch(), threshold=0.95))
    learn.model[0][1].eval()  # as BnFreeze leaves it
    flags, stats = [m.training for m in learn.model.modules()], deepcopy(learn.model.state_dict())
    batch, truth, weak, strong = learn.fix_match.peek(5)
    assert batch.x.shape == (4, 1, 16, 16) and batch.logits_x.shape == (4, 10) and batch.y.shape == (4,)
    assert batch.weak.shape == (5, 1, 16, 16) and batch.logits_weak.shape == (5, 10) and batch.idxs.shape == truth.shape == (5,)
    assert weak.shape == strong.shape == (5, 1, 16, 16) and not batch.logits_weak.requires_grad
    assert flags == [m.training for m in learn.model.modules()]
    assert all(torch.equal(v, stats[k]) for k, v in learn.model.state_dict().items())
    with torch.no_grad():
        expected = learn.model.eval()(batch.weak)
    torch.testing.assert_close(batch.logits_weak, expected)
    assert learn.fix_match.peek(2, labeled=False)[0].x is None


@pytest.mark.parametrize('policy', [AdaMatch(), Dash(warmup=0), FlexMatch(), UDA(0.1)], ids=lambda p: type(p).__name__)
def test_pictures_with_every_kind_of_policy(make_learner, policy):
    learn = make_learner(fixmatch=dict(policy=policy, threshold=0.95))
    learn.fix_match.show_pseudo_labels(3)  # also before training
    quiet_fit(learn, 1)
    before = memory(learn)
    learn.fix_match.show_pseudo_labels(3)
    assert all(torch.equal(v, before[k]) for k, v in memory(learn).items())


def test_policy_exchanged_between_fits(make_learner):
    learn = make_learner(fixmatch=dict(policy=FlexMatch(), threshold=0.95))
    quiet_fit(learn, 1)
    learn.fix_match.policy = free = FreeMatch()
    learn.fix_match.show_pseudo_labels(2)
    assert not hasattr(free, 'tau'), 'pictures leave the policy as it is'
    quiet_fit(learn, 1)
    tau = free.tau.clone()
    quiet_fit(learn, 1)
    assert 0.1 < tau < free.tau, 'set up once, then it goes on'
