"""The rows of the compatibility matrix: FixMatch and one more thing, trained for a few steps

Each row is a function of a `Bench`, which makes tiny learners on one device and in one precision. test_matrix.py runs
the rows on the CPU, benchmarks/gpu_matrix.py on a GPU, also in half precision; tools/matrix_page.py makes a page of the
results.
"""

import math
import multiprocessing
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_fit, tiny_net
from fastai.callback.all import BnFreeze
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    ChannelsLast,
    CrossEntropyLossFlat,
    CSVLogger,
    CutMix,
    DataBlock,
    DataLoaders,
    EarlyStoppingCallback,
    FocalLossFlat,
    GradientAccumulation,
    GradientClip,
    ImageBlock,
    IndexSplitter,
    Interpretation,
    L,
    LabelSmoothingCrossEntropy,
    Learner,
    MixedPrecision,
    MixUp,
    PILImage,
    PILImageBW,
    ReduceLROnPlateau,
    SaveModelCallback,
    ShortEpochCallback,
    ShowGraphCallback,
    TerminateOnNaNCallback,
    accuracy,
    get_image_files,
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
    DebiasMatch,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    ModelEMA,
    SoftMatch,
    digits_path,
    split_labeled,
)
from fixmatch_fastai.recipe import nesterov_sgd
from fixmatch_fastai.uncertainty import (
    FeatureDensity,
    MCDropout,
    ScoreThreshold,
    ValidatedThreshold,
    add_dropout,
    entropy,
)

COLUMNS = ['loss_x', 'loss_u', 'mask_rate', 'pseudo_acc']
NAMES = ['epoch', 'train_loss', 'valid_loss', 'accuracy', *COLUMNS, 'time']


class Row(NamedTuple):
    "One line of the matrix"

    group: str  # Its heading on the page
    name: str  # What FixMatch is combined with; the id of the test
    says: str  # What is checked, beside what `Bench.trains` checks each time
    run: Callable  # Of a `Bench`; raises where something is wrong


ROWS = []


def row(group, name, says, *args):
    "Makes a row of a function of a `Bench`, and of `args` if there are any"

    def add(f):
        ROWS.append(Row(group, name, says, lambda bench: f(bench, *args)))
        return f

    return add


def run(row, bench):
    "A row, and nothing of it left for the next"
    try:
        row.run(bench)
    finally:
        torch.set_autocast_enabled('cuda', False)  # fastai leaves it on after an interrupt
        plt.close('all')


# --- how a row trains


@cache
def images():
    "Digits: 20 labelled, 10 to validate on, a pool of 100"
    files = get_image_files(digits_path()).sorted()
    labeled, rest = split_labeled(files, parent_label, 20, seed=0)
    valid, _ = split_labeled(rest, parent_label, 10, seed=0)
    pool, _ = split_labeled(rest, parent_label, 100, seed=1)
    return list(labeled), list(valid), list(pool)


def cast_output(dtype, module, inputs, out):
    return out.to(dtype)


def change(a, b):
    "Is any weight different?"
    return any(not torch.equal(p, q) for p, q in zip(a, b))


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        yield


class Bench:
    "Makes and trains learners. What holds state is given as a function that makes it, as each learner needs its own"

    def __init__(self, path, device='cpu', precision='fp32', teacher=None):
        self.path, self.device, self.precision = path, torch.device(device), precision
        self.teacher = teacher  # Makes a `ModelEMA` for FixMatch; one that a row has anyway is its teacher then

    def with_precision(self, precision):
        return Bench(self.path, self.device, precision, self.teacher)

    def dls(self, bs=4, n_batches=3, img_cls=PILImageBW, num_workers=0, **kwargs):
        "An epoch is three steps of four"
        labeled, test, _ = images()
        splitter = IndexSplitter(range(len(labeled), len(labeled) + len(test)))
        block = DataBlock(blocks=(ImageBlock(img_cls), CategoryBlock), get_y=parent_label, splitter=splitter)
        sizes = dict(bs=bs, val_bs=len(test), num_workers=num_workers)
        dls = block.dataloaders(labeled + test, **sizes, device=self.device, **kwargs)
        return dls if n_batches is None else dls.repeat_train(n_batches)

    def learner(
        self,
        dls=None,  # Makes `DataLoaders`
        model=tiny_net,  # Makes a model
        loader=None,  # Makes an unlabelled loader of `dls`
        policy=None,  # Makes a policy of `dls`; default: `FixedThreshold`, lower for a teacher, who is less sure
        lambda_u=1.0,
        forward='joint',
        first=(),  # These make callbacks that stand before FixMatch in the list
        cbs=(),  # And these, those behind it
        make=Learner,  # `Learner`, or what is called as it is
        **kwargs,
    ):
        set_seed(0)
        dls = dls() if dls else self.dls()
        loader = loader(dls) if loader else dls.unlabeled_dl(images()[2], mu=1, label_func=parent_label)
        first, cbs = ([cb() for cb in o] for o in (first, cbs))
        teacher = None
        if self.teacher:
            teacher = next((cb for cb in first + cbs if isinstance(cb, ModelEMA)), None) or self.teacher()
        policy = policy(dls) if policy else FixedThreshold(0.11 if self.teacher else 0.15)
        fm = FixMatch(loader, policy=policy, lambda_u=lambda_u, forward=forward, teacher=teacher)
        cbs = [*first, fm, *cbs]
        learn = make(dls, model(), **{'metrics': accuracy, 'path': self.path, 'cbs': cbs, **kwargs})
        learn.model.to(self.device)
        if self.precision == 'fp16':
            learn.to_fp16(init_scale=1024.0)  # the default skips many of the first steps
        elif self.precision == 'bf16':
            learn.to_bf16()
        elif self.precision == 'channels_last':
            learn.to_channelslast(init_scale=1024.0)
        if self.device.type == 'cpu' and self.precision != 'fp32':  # fastai's mixed precision does nothing there
            dtype = torch.bfloat16 if self.precision == 'bf16' else torch.float16
            learn.model.register_forward_hook(partial(cast_output, dtype))
        return learn

    def trains(
        self,
        fit=lambda learn: learn.fit(2, 1e-2),
        steps=6,  # Of the last fit
        epochs=2,  # Of the last fit
        names=NAMES,  # Of the columns
        finite=slice(-1),  # Which values of a line must be finite; `pseudo_acc` is NaN where nothing counted
        **how,  # To `learner`
    ):
        "A learner after `fit`, if all is as it should be, and if the unlabelled loss moved the weights"
        without, learn = (self.learner(**{'lambda_u': lambda_u, **how}) for lambda_u in (0.0, how.pop('lambda_u', 1.0)))
        loss_func = learn.loss_func
        for o in (without, learn):
            set_seed(1)
            with quiet(o):
                fit(o)
        changed = change(weights(learn), weights(without))
        assert changed, 'FixMatch changed nothing: the weights are those of the same training with lambda_u=0'
        self.sound(learn, steps, epochs, names, finite)
        assert learn.loss_func is loss_func, 'the loss function is not the one it was'
        return learn

    def sound(self, learn, steps, epochs, names=NAMES, finite=slice(-1)):
        "Loss back, steps counted, columns in their places and finite, nothing left running, and it predicts"
        assert learn.fix_match.stream is None, 'a loader still runs'
        assert not multiprocessing.active_children(), 'a loader still runs'
        history = learn.fix_match.history
        assert len(history) == steps, f'{len(history)} steps, not {steps}'
        assert np.isfinite(history[COLUMNS[:3]].values).all() and (history.loss_u >= 0).all()
        assert 0 < history.mask_rate.mean() <= 1 and history.mask_rate.max() <= 1
        assert learn.recorder.metric_names == names, learn.recorder.metric_names
        values = learn.recorder.values[-epochs:]
        assert len(learn.recorder.values) == epochs and all(len(v) == len(names) - 2 for v in values)
        assert np.isfinite([v[finite] for v in values]).all(), values
        with quiet(learn):
            assert len(learn.validate()) == 1 + len(learn.metrics), 'the columns are there while training only'
            if not hasattr(learn.dls.valid, 'new'):  # fastai's `get_preds` wants fastai's loader
                return
            preds, targs = learn.get_preds()
        assert preds.shape == (len(targs), 10) and preds.isfinite().all()
        if hasattr(learn.loss_func, 'activation'):
            torch.testing.assert_close(preds.float().sum(1), torch.ones(len(preds)), atol=1e-2, rtol=0)


def logits(learn):
    "Of the validation set, as the model gives them"
    x, y = learn.dls.valid.one_batch()
    with torch.no_grad():
        return learn.model.eval()(x).as_subclass(torch.Tensor).float(), y.as_subclass(torch.Tensor)


class Note(Callback):
    "Keeps what `look` says of the callback in each training batch, at one event"

    def __init__(self, event, look, order):
        self.event, self.look, self.order, self.seen = event, look, order, []

    def __call__(self, event_name):
        if event_name == self.event and self.training:
            self.seen.append(self.look(self))


class CtrlC(Callback):
    "Interrupts between FixMatch's `after_pred` (5) and the loss, where most is in the air"

    order = 55

    def after_pred(self):
        if self.training and self.train_iter == 1:
            raise KeyboardInterrupt


# --- fits

FITS = 'Fits'


@row(FITS, 'fit', 'nothing more')
def fit(bench):
    bench.trains()


@row(FITS, 'fit_one_cycle', 'the learning rate rises and falls over the steps')
def fit_one_cycle(bench):
    lrs = bench.trains(lambda learn: learn.fit_one_cycle(2, 1e-2)).recorder.hps['lr']
    assert len(lrs) == 6 and lrs[0] < max(lrs) > lrs[-1]


@row(FITS, 'fit_flat_cos', 'the learning rate is flat, then falls')
def fit_flat_cos(bench):
    lrs = bench.trains(lambda learn: learn.fit_flat_cos(2, 1e-2, pct_start=0.5)).recorder.hps['lr']
    assert lrs[0] == lrs[1] == 1e-2 and lrs[-1] < lrs[-2] < 1e-2


@row(FITS, 'fit_sgdr', 'cycles of one and two epochs; the learning rate restarts')
def fit_sgdr(bench):
    lrs = bench.trains(lambda learn: learn.fit_sgdr(2, 1, 1e-2), 9, 3).recorder.hps['lr']
    assert lrs[0] == lrs[3] == 1e-2 and lrs[2] < lrs[3] > lrs[-1]


@row(FITS, 'fine_tune', 'the frozen layers stay in the first fit and move in the second')
def fine_tune(bench):
    kept = []

    class Keep(Callback):
        def after_fit(self):
            if self.create_mbar:
                kept.append(self.model[0][0].weight.detach().clone())

    def go(learn):
        kept.append(learn.model[0][0].weight.detach().clone())
        learn.fine_tune(1, 1e-2)

    bench.trains(go, 3, 1, cbs=[Keep], splitter=lambda m: L(m[:1], m[1:]).map(lambda o: list(o.parameters())))
    start, frozen, after = kept[-3:]
    assert torch.equal(start, frozen) and not torch.equal(frozen, after)


@row(FITS, 'two fits in a row', 'columns and history are of the second; nothing is doubled')
def two_fits(bench):
    def go(learn):
        learn.fit(2, 1e-2)
        learn.fit(1, 1e-2)

    learn = bench.trains(go, 3, 1)
    assert len(learn.metrics) == 1 and len(learn.cbs.filter(lambda cb: isinstance(cb, FixMatch))) == 1


@row(FITS, 'start_epoch', 'the skipped epochs have no steps')
def start_epoch(bench):
    learn = bench.learner()
    before = weights(learn)
    quiet_fit(learn, 3, 1e-2, start_epoch=2)
    assert len(learn.fix_match.history) == 3 and change(before, weights(learn))
    assert len(learn.recorder.values[-1]) == len(NAMES) - 2 and learn.recorder.metric_names == NAMES
    bench.trains(lambda o: o.fit(2, 1e-2))


@row(FITS, 'fit_fixmatch, nesterov_sgd', "the paper's schedule and optimiser")
def fit_fixmatch(bench):
    lrs = bench.trains(lambda learn: learn.fit_fixmatch(6, 0.03), opt_func=nesterov_sgd).recorder.hps['lr']
    np.testing.assert_allclose(lrs, [0.03 * math.cos(7 * math.pi * k / 16 / 6) for k in range(6)])


LR_FIND = 'Learning rate finder'


def find(learn):
    before = weights(learn)
    learn.lr_find(show_plot=False, num_it=6)
    assert not change(before, weights(learn)), 'lr_find left other weights'


@row(LR_FIND, 'lr_find before a fit', 'it trains, and puts the weights back')
def lr_find_before(bench):
    def go(learn):
        find(learn)
        learn.fit(2, 1e-2)

    bench.trains(go)


@row(LR_FIND, 'lr_find between two fits', 'it puts the weights and the policy back')
def lr_find_between(bench):
    def go(learn):
        learn.fit(1, 1e-2)
        before = deepcopy(learn.fix_match.policy.state_dict())
        find(learn)
        assert all(torch.equal(v, before[k]) for k, v in learn.fix_match.policy.state_dict().items()) and before
        learn.fit(2, 1e-2)

    bench.trains(go, policy=lambda dls: FreeMatch(decay=0.5))


# --- precision

PRECISION = 'Precision'


def precision(bench, name, dtype):
    def dtypes(cb):
        return cb.pred.dtype

    class Asks(FixedThreshold):
        def forward(self, batch):
            assert batch.logits_weak.dtype == batch.logits_x.dtype == torch.float32
            return super().forward(batch)

        def loss(self, logits_strong, pseudo):
            assert logits_strong.dtype == torch.float32
            return super().loss(logits_strong, pseudo)

    note = lambda: Note('after_pred', dtypes, 4)
    learn = bench.with_precision(name).trains(cbs=[note], policy=lambda dls: Asks(0.15))
    assert set(learn.note.seen) == {dtype} and hasattr(learn, 'mixed_precision')


for name, dtype in (('fp16', torch.float16), ('bf16', torch.bfloat16)):
    says = 'logits are of half precision, the pseudo-labels are decided in float32'
    row(PRECISION, f'to_{name}', says, name, dtype)(precision)


@row(PRECISION, 'to_fp32', 'single precision again')
def to_fp32(bench):
    def go(learn):
        learn.to_fp16().to_fp32()
        learn.fit(2, 1e-2)

    learn = bench.with_precision('fp32').trains(go, cbs=[lambda: Note('after_pred', lambda cb: cb.pred.dtype, 4)])
    assert set(learn.note.seen) == {torch.float32} and not learn._grab_cbs(MixedPrecision)


# --- callbacks of training

CALLBACKS = "fastai's training callbacks"


@row(CALLBACKS, 'GradientAccumulation', 'the optimiser steps once in two batches, by the count of labelled images')
def gradient_accumulation(bench):
    note = lambda: Note('after_step', lambda cb: cb.train_iter, 70)
    learn = bench.trains(cbs=[lambda: GradientAccumulation(8), note])
    assert len(learn.note.seen) == 3


@row(CALLBACKS, 'GradientClip', 'the gradient of both losses together is not longer than asked for')
def gradient_clip(bench):
    def norm(cb):
        return torch.stack([p.grad.norm() for p in cb.model.parameters()]).norm().item()

    learn = bench.trains(cbs=[lambda: GradientClip(0.01), lambda: Note('before_step', norm, 12)])
    assert max(learn.note.seen) <= 0.0101 and max(learn.note.seen) > 0


@row(CALLBACKS, 'TerminateOnNaN', 'a loss that is NaN ends the fit; loss function and columns are as they were')
def terminate_on_nan(bench):
    class Break(Callback):
        def after_step(self):
            if self.train_iter == 1:
                next(self.model.parameters()).data.fill_(math.nan)

    learn = bench.trains(cbs=[TerminateOnNaNCallback])
    loss_func = learn.loss_func
    quiet_fit(learn, 2, cbs=Break())
    assert len(learn.fix_match.history) == 3 and math.isnan(learn.fix_match.history.loss_x[2])
    assert learn.loss_func is loss_func and learn.fix_match.stream is None


@row(CALLBACKS, 'BnFreeze', 'the statistics of frozen BatchNorm stay, also under unlabelled images')
def bn_freeze(bench):
    def model():
        net = tiny_net()
        net[0][1].requires_grad_(False)
        return net

    learn = bench.trains(model=model, cbs=[BnFreeze], train_bn=False)
    bn = learn.model[0][1]
    assert bn.running_mean.eq(0).all() and bn.running_var.eq(1).all()


@row(CALLBACKS, 'ChannelsLast', 'the weights lie channels-last')
def channels_last(bench):
    def go(learn):
        learn.to_channelslast(use_amp=False)
        learn.fit(2, 1e-2)

    learn = bench.trains(go, dls=partial(bench.dls, img_cls=PILImage), model=partial(tiny_net, n_in=3))
    assert learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@row(
    CALLBACKS,
    'ShortEpoch',
    'a cut epoch has its steps, and its columns are in their places, though fastai then leaves `train_loss` out',
)
def short_epoch(bench):
    bench.trains(dls=partial(bench.dls, n_batches=4), cbs=[lambda: ShortEpochCallback(0.5)], finite=slice(3, 6))


# --- mixing

MIXING = 'Mixing'


def mixing(bench, mix, first):
    learn = bench.trains(**{'first' if first else 'cbs': [mix]})
    plain = bench.learner()
    set_seed(1)
    quiet_fit(plain, 2, 1e-2)
    assert not learn.fix_match.history.loss_x.equals(plain.fix_match.history.loss_x), 'labelled images were not mixed'
    assert type(learn.loss_func) is CrossEntropyLossFlat


for mix in (MixUp, CutMix):
    for first in (True, False):
        where = 'before' if first else 'behind'
        name = f'{mix.__name__} {where} FixMatch in the list'
        row(MIXING, name, 'labelled images are mixed; the loss function comes back', mix, first)(mixing)


# --- losses

LOSSES = 'Loss functions'


def losses(bench, make):
    loss_func = make()
    learn = bench.trains(loss_func=loss_func)
    expected = loss_func(*logits(learn))
    rtol = 1e-4 if bench.precision == 'fp32' else 1e-2
    with quiet(learn):
        torch.testing.assert_close(learn.validate()[0], expected.item(), rtol=rtol, atol=1e-5)


for name, make in {
    'CrossEntropyLossFlat': CrossEntropyLossFlat,
    'weighted cross-entropy': lambda: CrossEntropyLossFlat(weight=torch.arange(1.0, 11)),
    'LabelSmoothingCrossEntropy': LabelSmoothingCrossEntropy,
    'FocalLossFlat': FocalLossFlat,
    'nn.CrossEntropyLoss': nn.CrossEntropyLoss,
    'F.cross_entropy': lambda: F.cross_entropy,
}.items():
    row(LOSSES, name, 'validation reports it as it is', make)(losses)


# --- trackers

TRACKERS = 'Trackers'


def save_model(bench, monitor):
    learn = bench.trains(lambda learn: learn.fit(3, 1e-2), 9, 3, cbs=[lambda: Note('after_step', weights, 70)])
    save = SaveModelCallback(monitor=monitor)
    quiet_fit(learn, 3, 1e-2, cbs=save)
    values = [v[NAMES.index(monitor) - 1] for v in learn.recorder.values]
    best = min(values) if 'loss' in monitor else max(values)
    assert save.best == best
    weights_of_epochs = learn.note.seen[-9:][2::3]  # after the last step of each
    assert not change(weights_of_epochs[values.index(best)], weights(learn)), 'these are not those of the best epoch'


def early_stopping(bench, monitor):
    # an improvement of 10 never comes: it stops after the second epoch
    fit = partial(Learner.fit, n_epoch=5, lr=1e-2)
    bench.trains(lambda learn: fit(learn, cbs=EarlyStoppingCallback(monitor=monitor, min_delta=10)), 6, 2)


def reduce_lr(bench, monitor):
    learn = bench.trains(lambda learn: learn.fit(2, 1e-2, cbs=ReduceLROnPlateau(monitor=monitor, min_delta=10)))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-3)


for monitor in ('valid_loss', 'mask_rate'):
    for name, says, f in (
        ('SaveModelCallback', 'the best epoch by this column is saved, and loaded at the end', save_model),
        ('EarlyStoppingCallback', 'the fit ends where this column does not improve', early_stopping),
        ('ReduceLROnPlateau', 'the learning rate falls where this column does not improve', reduce_lr),
    ):
        row(TRACKERS, f'{name} on {monitor}', says, monitor)(f)


def kept_tracker(bench, monitor):
    learn = bench.learner(cbs=[lambda: SaveModelCallback(monitor=monitor)])
    quiet_fit(learn, 2, 1e-2)
    with quiet(learn):
        assert learn.predict(images()[2][0])[0] in learn.dls.vocab
        assert len(learn.get_preds()[0]) == 10
        assert len(learn.validate()) == 2
    quiet_fit(learn, 2, 1e-2)
    assert learn.recorder.metric_names == NAMES and len(learn.fix_match.history) == 6


for monitor in ('valid_loss', 'mask_rate'):
    label = f'SaveModelCallback on {monitor}, given to the Learner'
    row(TRACKERS, label, 'it stays there while the learner predicts and is fitted again', monitor)(kept_tracker)


# --- loggers

LOGGERS = 'Loggers'


@row(LOGGERS, 'CSVLogger', 'the file holds the columns')
def csv_logger(bench):
    values = []

    def go(learn):
        learn.fit(2, 1e-2, cbs=CSVLogger('log.csv'))
        values.append(learn.recorder.values)

    bench.trains(go)
    log = pd.read_csv(bench.path / 'log.csv')
    assert list(log) == NAMES
    np.testing.assert_allclose(log[NAMES[1:-1]], np.array(values[-1]), atol=1e-6)


@row(LOGGERS, 'ShowGraphCallback', 'the graph gets the training and the validation losses')
def show_graph(bench):
    drawn = []

    class Spy(Callback):
        order = 64

        def before_epoch(self):
            self.progress.mbar.update_graph = lambda graphs, *bounds: drawn.append(graphs)

    learn = bench.trains()
    learn.fit(2, 1e-2, cbs=[ShowGraphCallback(), Spy()])
    (_, train), (_, valid) = drawn[-1]
    assert len(drawn) == 2 and len(train) == 6 and valid == [v[1] for v in learn.recorder.values]


@row(LOGGERS, 'TensorBoardCallback', 'the event file holds the columns')
def tensorboard(bench):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trace = bench.precision == 'fp32'  # fastai refuses to trace in mixed precision
    learn = bench.trains()
    quiet_fit(learn, 2, 1e-2, cbs=TensorBoardCallback(bench.path / 'runs', trace_model=trace, log_preds=False))
    events = EventAccumulator(str(bench.path / 'runs')).Reload()
    for name, i in (('valid_loss', 1), ('loss_u', 4), ('mask_rate', 5)):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([v[i] for v in learn.recorder.values], abs=1e-6)


@row(LOGGERS, 'WandbCallback', 'an offline run gets the columns')
def wandb(bench):
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')
    from fastai.callback import wandb as fastai_wandb

    learn = bench.trains()
    try:
        fastai_wandb._format_config(learn.gather_args())
    except TypeError:
        pytest.skip('the WandbCallback of this version of fastai fails, with FixMatch or without')
    run = wandb.init(mode='offline', dir=bench.path, project='matrix', settings=wandb.Settings(silent=True))
    try:
        quiet_fit(learn, 2, 1e-2, cbs=fastai_wandb.WandbCallback(log_preds=False))
        run.log({}, step=run.step + 1)
        summary = dict(run.summary)
    finally:
        wandb.finish()
    assert [summary[o] for o in NAMES[2:-1]] == pytest.approx(learn.recorder.values[-1][1:], abs=1e-6, nan_ok=True)


@row(LOGGERS, 'train_metrics=True', 'metrics are of the labelled images only; the columns come behind them')
def train_metrics(bench):
    def go(learn):
        learn.recorder.train_metrics = True
        learn.fit(2, 1e-2)

    class Sizes(Callback):
        order = 49

        def after_batch(self):
            assert len(self.pred) == len(self.y) == len(self.xb[0])

    names = ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', *COLUMNS, 'time']
    learn = bench.trains(go, names=names, cbs=[Sizes])
    assert all(0 <= v[1] <= 1 for v in learn.recorder.values)


# --- learners

LEARNERS = 'Learners and models'


def body(bench, arch):
    def make(dls, model, **kwargs):
        return vision_learner(dls, arch, pretrained=False, **kwargs)

    dls = partial(bench.dls, img_cls=PILImage, n_batches=2)
    learn = bench.trains(lambda learn: learn.fine_tune(1, 1e-2), 2, 1, dls=dls, model=lambda: None, make=make)
    with quiet(learn):
        assert learn.predict(images()[2][0])[0] in learn.dls.vocab


for name, arch in {'torchvision': resnet18, 'timm': 'test_resnet'}.items():
    label = f'vision_learner with a {name} body'
    row(LEARNERS, label, '`fine_tune`, then a prediction; without pretrained weights', arch)(body)


@row(LEARNERS, 'DataParallel', 'the model is wrapped; policies see the module')
def data_parallel(bench):
    class Asks(FixedThreshold):
        def setup(self, n_classes, n_unlabeled, model):
            self.model = [model]

    learn = bench.trains(model=lambda: nn.DataParallel(tiny_net()), policy=lambda dls: Asks(0.15))
    assert isinstance(learn.model, nn.DataParallel) and learn.fix_match.policy.model[0] is learn.model.module


# files of tests that the page lists too, and what they check
ELSEWHERE = {
    'learn.distrib_ctx() with two processes, notebook_launcher': (
        'tests/journeys/test_processes.py',
        'each process has its share, and the gradients are those of one',
    ),
    'multi-label images': (
        'tests/test_multi_label.py',
        'columns, metrics, sigmoids, `export`; MixUp, GradientAccumulation, ModelEMA, MixedPrecision; Ctrl-C',
    ),
    'MetaPseudoLabels in place of FixMatch': (
        'tests/test_meta_pseudo_labels.py',
        'equal to a loop by hand; neighbours work for both networks, or are refused; Ctrl-C at every event',
    ),
}


# --- saving

SAVING = 'Saving'


def same(a, b):
    "Two predictions are alike"
    assert a[0] == b[0]
    torch.testing.assert_close(a[2].float(), b[2].float(), atol=1e-3, rtol=1e-2)


@row(SAVING, 'export', 'the file is small, holds the name of no image, and leaves the learner as it was')
def export(bench):
    learn = bench.trains()
    learn.export()
    data = (bench.path / 'export.pkl').read_bytes()
    assert len(data) < 200_000 and not any(file.name.encode() in data for file in images()[2])
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


@row(SAVING, 'load_learner', 'it predicts the same; fitted again it says what it lacks, and trains when it has it')
def load(bench):
    learn = bench.trains()
    learn.export()
    loaded = load_learner(bench.path / 'export.pkl', cpu=bench.device.type == 'cpu')
    item = images()[2][0]
    with quiet(learn), quiet(loaded):
        same(learn.predict(item), loaded.predict(item))
    loaded.dls = dls = bench.dls()
    with pytest.raises(ValueError, match='without its unlabelled images'):
        quiet_fit(loaded, 1)
    loaded.remove_cb(FixMatch)
    loaded.add_cb(FixMatch(dls.unlabeled_dl(images()[2], mu=1, label_func=parent_label), threshold=0.15))
    quiet_fit(loaded, 2)
    bench.sound(loaded, 6, 2)


@row(SAVING, 'save, load', 'weights and optimiser are those saved, and training goes on')
def save_load(bench):
    learn = bench.trains()
    learn.save('weights')
    before = weights(learn)
    quiet_fit(learn, 1, 1e-2)
    assert change(before, weights(learn))
    learn.load('weights')
    assert not change(before, weights(learn))
    quiet_fit(learn, 2, 1e-2)
    bench.sound(learn, 6, 2)


# --- predictions

PREDICTIONS = 'Predictions and pictures, also after Ctrl-C'


def get_preds(learn):
    preds, targs = learn.get_preds()
    out, y = logits(learn)
    torch.testing.assert_close(preds.float(), out.softmax(1).cpu(), atol=1e-2, rtol=1e-2)
    assert torch.equal(targs.as_subclass(torch.Tensor), y.cpu())


def predict(learn):
    out, _ = logits(learn)
    for file, i in list(zip(learn.dls.valid_ds.items, out.argmax(1)))[:2]:
        assert learn.predict(file)[0] == learn.dls.vocab[i]


def validate(learn):
    loss, acc = learn.validate()
    out, y = logits(learn)
    assert loss == pytest.approx(F.cross_entropy(out, y).item(), rel=2e-2)
    assert acc == pytest.approx((out.argmax(1) == y).float().mean().item())


def tta(learn):
    preds, targs = learn.tta(n=1)
    assert preds.shape == (10, 10) and len(targs) == 10
    torch.testing.assert_close(preds.float().sum(1), torch.ones(10), atol=1e-2, rtol=0)


def show_results(learn):
    learn.show_results(max_n=4)
    assert len(plt.gcf().axes) >= 4


def summary(learn):
    text = str(learn.summary())
    assert f'Total params: {sum(p.numel() for p in learn.model.parameters()):,}' in text
    assert f'Loss function: {learn.loss_func}' in text and 'OneCallLoss' not in text


def interpretation(learn):
    interp = Interpretation.from_learner(learn)
    out, y = logits(learn)
    worst, _ = interp.top_losses(3)
    expected = F.cross_entropy(out, y, reduction='none').topk(3).values.cpu()
    torch.testing.assert_close(worst.float(), expected, atol=2e-2, rtol=2e-2)
    interp.plot_top_losses(2)


def predictions(bench, use):
    learn = bench.trains(lambda learn: learn.fit(1, 1e-2), 3, 1)
    with quiet(learn):
        use(learn)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=CtrlC())
    with quiet(learn):
        use(learn)
    assert type(learn.loss_func) is CrossEntropyLossFlat
    quiet_fit(learn, 1, 1e-2)
    bench.sound(learn, 3, 1)


for use, name, says in (
    (get_preds, 'get_preds', 'they are what the model says'),
    (predict, 'predict', 'it is what the model says'),
    (validate, 'validate', 'two values, which are loss and accuracy of the model'),
    (tta, 'tta', 'probabilities of each image'),
    (show_results, 'show_results', 'pictures are drawn'),
    (summary, 'summary', "it counts the parameters, and names the user's loss function"),
    (interpretation, 'Interpretation', 'the largest losses are those of the model'),
):
    row(PREDICTIONS, name, says + ', after a fit and after Ctrl-C in another; then training goes on', use)(predictions)


# --- loaders

LOADERS = 'Loaders'
MEAN, STD = [0.3], [0.33]


class Opened(torch.utils.data.Dataset):
    "torchvision's way: the transform of the dataset makes what the model gets"

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(PILImageBW.create(self.files[i])), int(parent_label(self.files[i]))


def finished(img):
    "A normalised tensor (1, H, W)"
    return (torch.from_numpy(np.array(img, dtype=np.float32))[None] / 255 - MEAN[0]) / STD[0]


def torch_dl(files, transform, **kwargs):
    return torch.utils.data.DataLoader(Opened(files, transform), **kwargs)


def torch_dls(num_workers):
    labeled, test, _ = images()
    train = torch_dl(labeled[:12], finished, batch_size=4, shuffle=True, drop_last=True, num_workers=num_workers)
    return DataLoaders(train, torch_dl(test, finished, batch_size=10, num_workers=num_workers))


def torch_views(dls, n=100, **kwargs):
    return torch_dl(images()[2][:n], FixMatchTransform(MEAN, STD), batch_size=4, **kwargs)


def loaders(bench, labeled, unlabeled, num_workers):
    dls = partial(torch_dls, num_workers) if labeled == 'torch' else partial(bench.dls, num_workers=num_workers)

    def ours(dls):
        tfm = FixMatchTransform(MEAN, STD) if labeled == 'torch' else FixMatchTransform()
        dls = bench.dls() if labeled == 'torch' else dls
        return dls.unlabeled_dl(images()[2], bs=4, tfm=tfm, label_func=parent_label, num_workers=num_workers)

    def count(cb):
        return len(multiprocessing.active_children())

    loader = partial(torch_views, num_workers=num_workers) if unlabeled == 'torch' else ours
    note = lambda: Note('after_pred', count, 70)
    how = dict(dls=dls, loader=loader, loss_func=CrossEntropyLossFlat(), cbs=[note])
    learn = bench.trains(lambda learn: learn.fit(1, 1e-2), 3, 1, **how)
    # those of fastai end before the epoch does
    assert num_workers <= min(learn.note.seen) <= max(learn.note.seen) <= 2 * num_workers
    assert (learn.fix_match.history.pseudo_acc.dropna() >= 0).any()


# fastai's on both sides, without workers, are in all other rows
for labeled, unlabeled, n in (
    ('fastai', 'fastai', 2),
    ('fastai', 'torch', 0),
    ('torch', 'fastai', 2),
    ('torch', 'torch', 0),
    ('torch', 'torch', 2),
):
    label = f'labelled images from {labeled}, unlabelled from {unlabeled}, {n} workers'
    says = 'the truth is found for `pseudo_acc`; workers end with the fit'
    row(LOADERS, label, says, labeled, unlabeled, n)(loaders)


POOLS = 'Unlabelled pools and short batches'


@row(POOLS, 'an empty pool', 'the error comes when the loader is made')
def empty_pool(bench):
    with pytest.raises(ValueError, match='pool of unlabelled images is empty'):
        bench.dls().unlabeled_dl([])


@row(POOLS, 'an empty torch DataLoader', 'the error comes at the first step; the learner stays usable')
def empty_loader(bench):
    learn = bench.learner(loader=lambda dls: torch_views(dls, n=3, drop_last=True))
    with pytest.raises(ValueError, match='yields no batch'):
        quiet_fit(learn, 1)
    with quiet(learn):
        assert len(learn.validate()) == 2 and type(learn.loss_func) is CrossEntropyLossFlat


def sizes(cb):
    return len(cb.x), len(cb.y)


@row(POOLS, 'a pool shorter than a batch', 'its images are repeated until the batch is full')
def short_pool(bench):
    look = [lambda: Note('before_batch', sizes, 8)]
    loader = lambda dls: dls.unlabeled_dl(images()[2][:3], mu=1, label_func=parent_label)
    learn = bench.trains(loader=loader, cbs=look)
    assert learn.note.seen == [(4 + 2 * 4, 4)] * 6


@row(POOLS, 'a torch pool shorter than a batch', 'its short batches are trained as they are')
def short_torch_pool(bench):
    learn = bench.trains(loader=partial(torch_views, n=3), cbs=[lambda: Note('before_batch', sizes, 8)])
    assert learn.note.seen == [(4 + 2 * 3, 4)] * 6


@row(POOLS, 'a pool longer than an epoch', 'the next epoch goes on where the last one stopped, so that all images come')
def long_pool(bench):
    class Keep(FixedThreshold):
        def setup(self, n_classes, n_unlabeled, model):
            self.seen, self.n = [], n_unlabeled

        def forward(self, batch):
            self.seen += batch.idxs.tolist()
            return super().forward(batch)

    seen = bench.trains(policy=lambda dls: Keep(0.15)).fix_match.policy
    assert seen.n == 100 and len(seen.seen) == len(set(seen.seen)) == 24


@row(POOLS, 'a short last labelled batch', 'rows are split by their count')
def short_last_batch(bench):
    dls = partial(bench.dls, bs=8, n_batches=None, drop_last=False)
    learn = bench.trains(dls=dls, cbs=[lambda: Note('before_batch', sizes, 8)])
    assert learn.note.seen == [(8 + 2 * 8, 8), (8 + 2 * 8, 8), (4 + 2 * 8, 4)] * 2


# --- our own

AVERAGES = 'Averaged weights'


@row(AVERAGES, 'ModelEMA and SaveModelCallback', 'the file holds the average of the best epoch, as validated')
def ema_save_model(bench):
    learn = bench.trains(cbs=[lambda: ModelEMA(half_life=2)])
    quiet_fit(learn, 2, 1e-2, cbs=SaveModelCallback())
    best = min(v[1] for v in learn.recorder.values)
    with quiet(learn):
        assert learn.validate()[0] == pytest.approx(best, rel=1e-4)


POLICIES = {
    'FixedThreshold': lambda dls: FixedThreshold(0.15),
    'UDA': lambda dls: UDA(0.15),
    'FlexMatch': lambda dls: FlexMatch(0.15),
    'FreeMatch': lambda dls: FreeMatch(decay=0.5),
    'SoftMatch': lambda dls: SoftMatch(decay=0.5),
    'AdaMatch': lambda dls: AdaMatch(decay=0.5),
    'Dash': lambda dls: Dash(warmup=1, every=1),
    'DebiasMatch': lambda dls: DebiasMatch(0.15, decay=0.5),
    'ScoreThreshold': lambda dls: ScoreThreshold(entropy, 2.25),
    'MCDropout': lambda dls: MCDropout(at_most=0.2, n_passes=3),
    'FeatureDensity': lambda dls: FeatureDensity(),
    'ValidatedThreshold': lambda dls: ValidatedThreshold(dls.valid, target=0.01, every=2, bound=0.5),
    'FixedThreshold & ScoreThreshold': lambda dls: FixedThreshold(0.15) & ScoreThreshold(entropy, 2.25),
    'FlexMatch | FreeMatch': lambda dls: FlexMatch(0.15) | FreeMatch(decay=0.5),
}
# of things beside FixMatch, those that a policy may notice; of policies, one of each kind that looks at more than the
# unlabelled logits: memory of each image, labelled logits, more passes, a hook in the network, the validation set
THINGS = ['half-precision logits', 'MixUp', 'ModelEMA']
NOTICE = ['FlexMatch', 'AdaMatch', 'MCDropout', 'FeatureDensity', 'ValidatedThreshold']

FORWARD = 'Passes of their own'
BESIDE = {
    'GradientAccumulation': lambda: GradientAccumulation(8),
    'MixUp': MixUp,
    'ModelEMA': lambda: ModelEMA(half_life=1),
    'ChannelsLast': ChannelsLast,
}


def beside(name, thing):
    return name if thing == 'alone' else f'{name} with {thing}'


def forwards(bench, forward, thing):
    if thing == 'half-precision logits':
        bench = bench.with_precision('fp16')
    passes = []
    look = lambda: Note('before_batch', lambda cb: passes.append(len(cb.x)), 100)
    bench.trains(forward=forward, cbs=[look, *([BESIDE[thing]] if thing in BESIDE else [])])
    assert set(passes) <= ({8} if forward == 'split' else {4, 5, 6, 7, 8}), passes


for forward, things in {
    'split': ['alone', 'half-precision logits'],
    'selective': ['alone', 'half-precision logits', *BESIDE],
}.items():
    for thing in things:
        says = 'weak images are not in the pass with gradient, nor, with selective, those that count for nothing'
        row(FORWARD, beside(f"forward='{forward}'", thing), says, forward, thing)(forwards)


def policies(bench, make, thing):
    if thing == 'half-precision logits':
        bench = bench.with_precision('fp16')
    steps = 8 if make is POLICIES['FeatureDensity'] else 4  # it counts none before it has met the classes
    learn = bench.trains(
        lambda learn: learn.fit(1, 1e-2),
        steps,
        1,
        dls=partial(bench.dls, n_batches=steps),
        policy=make,
        model=lambda: add_dropout(tiny_net(), 0.3),
        cbs=[BESIDE[thing]] if thing in BESIDE else [],
    )
    fresh = make(learn.dls)
    fresh.setup(10, 100, learn.model)
    fresh.to(bench.device)
    start, memory = fresh.state_dict(), learn.fix_match.policy.state_dict()
    changed = [k for k, v in start.items() if not torch.equal(v, memory[k])]
    assert changed or not start, 'the policy remembers nothing'
    if thing == 'ModelEMA':
        assert learn.model_ema.averaged and 0 < learn.model_ema.steps <= steps


for name, make in POLICIES.items():
    for thing in ['alone', *THINGS] if name in NOTICE else ['alone']:
        says = 'some pseudo-labels count, and the policy remembers'
        row('Policies', beside(name, thing), says, make, thing)(policies)


# --- with a teacher

# those in which an average of the weights could be in the way; with others it is as with these
TAUGHT_NAMES = [
    *('fit', 'fine_tune', 'two fits in a row', 'start_epoch', 'lr_find before a fit', 'lr_find between two fits'),
    *('to_fp16', 'to_bf16', 'GradientAccumulation', 'TerminateOnNaN', 'BnFreeze', 'ChannelsLast', 'ShortEpoch'),
    *('MixUp before FixMatch in the list', 'MixUp behind FixMatch in the list', 'train_metrics=True'),
    *(f'SaveModelCallback on {o}, given to the Learner' for o in ('valid_loss', 'mask_rate')),
    *('export', 'load_learner', 'save, load'),
    # of the score thresholds none: their bounds are for the model's own logits, and a young average is not as sure
    *(o for o in POLICIES if 'ScoreThreshold' not in o),
]
TAUGHT = [o for o in ROWS if o.name in TAUGHT_NAMES or o.group in (PREDICTIONS, FORWARD)]
