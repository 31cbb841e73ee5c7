"An interrupt in any event, before or after ours: then everything works, and nothing is left behind"

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import Raise, quiet_fit
from fastai.vision.all import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    CrossEntropyLossFlat,
    MixUp,
    load_learner,
)

from fixmatch_fastai.around import CtrlC
from fixmatch_fastai.callback import OneCallLoss
from fixmatch_fastai.record import SemiRecorder

# of fastai's loop, as they lie in each other
BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step']
# where neither FixMatch nor its recorder does anything: these differ in nothing from their neighbours
NOT_OURS = ['before_epoch', 'before_backward', 'after_backward', 'before_step']
TRAIN = ['before_train', *(o for o in BATCH if o not in NOT_OURS), 'after_batch']
EPOCH = ['before_epoch', *TRAIN, 'after_train', 'before_validate', 'after_validate']
FIT = ['before_fit', *EPOCH, 'after_epoch']
EVENTS = [*FIT, *(o for o in BATCH if o in NOT_OURS), 'after_fit']

FIRST, LAST = -20, 55


def assert_usable(learn, item):
    "Predicts, validates, pickles its loss, exports and trains on, as if nothing had been"
    learn.get_preds(with_loss=True)  # sets `reduction` of whatever stands in the loss's place
    assert learn.loss_func.reduction == 'mean'
    assert learn.predict(item)[0] in learn.dls.vocab
    assert type(learn.loss_func) is CrossEntropyLossFlat
    loss, acc = learn.validate()
    x, y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*[b[:2] for b in learn.dls.valid]))
    with torch.no_grad():
        assert loss == pytest.approx(F.cross_entropy(learn.model(x), y).item(), rel=1e-4)
    learn.export()
    assert load_learner(learn.path / 'export.pkl').predict(item)[0] in learn.dls.vocab
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 6 and len(learn.recorder.values) == 2
    assert [len(v) for v in learn.recorder.values] == [7, 7]
    assert learn.fix_match.stream is None and not multiprocessing.active_children()


@pytest.mark.parametrize(
    'event,exc,order',
    [
        *((o, KeyboardInterrupt, FIRST) for o in EVENTS),
        *((o, KeyboardInterrupt, LAST) for o in EVENTS if o not in NOT_OURS),
        *((o, RuntimeError, LAST) for o in ('before_fit', 'before_batch', 'after_pred', 'after_loss')),
    ],
)
def test_learner_is_usable_after_an_interrupt(make_learner, pool, event, exc, order):
    learn = make_learner()
    with pytest.raises(exc):
        quiet_fit(learn, 2, cbs=Raise(event, exc, order))
    assert type(learn.loss_func) is CrossEntropyLossFlat and learn.fix_match.stream is None
    assert_usable(learn, pool[0])


@pytest.mark.slow
@pytest.mark.parametrize('order', [FIRST, LAST], ids=['first', 'last'])
@pytest.mark.parametrize(
    'exc,events',
    [
        (CancelStepException, ['before_step']),
        (CancelBackwardException, ['before_backward']),
        (CancelBatchException, BATCH),
        (CancelTrainException, TRAIN),
        (CancelValidException, ['before_validate']),
        (CancelEpochException, EPOCH),
        (CancelFitException, FIT),
    ],
    ids=['step', 'backward', 'batch', 'train', 'valid', 'epoch', 'fit'],
)
def test_learner_is_usable_after_a_cancel(make_dls, make_learner, exc, events, order):
    "Where fastai catches it; elsewhere it is an error as any"
    for event in [o for o in events if order == FIRST or o not in NOT_OURS]:
        learn = make_learner(make_dls(n_batches=2), mu=1, metrics=[])
        learn.recorder.train_metrics = True
        quiet_fit(learn, 2, cbs=Raise(event, exc, order))
        assert not isinstance(learn.loss_func, OneCallLoss), event
        assert learn.fix_match.stream is None, event
        learn.validate()
        assert type(learn.loss_func) is CrossEntropyLossFlat, event
        quiet_fit(learn, 1)
        assert len(learn.fix_match.history) == 2, event


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step'])
def test_cancelled_batch_leaves_labeled_rows(make_learner, event):
    "A metric on training batches sees predictions and targets of one length, also when the batch is cancelled"
    learn = make_learner()
    learn.recorder.train_metrics = True
    quiet_fit(learn, 2, cbs=Raise(event, CancelBatchException, FIRST if event == 'after_pred' else LAST))
    assert len(learn.recorder.values) == 2


def test_first_batch_cancelled_before_any_prediction(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1, cbs=Raise('before_batch', CancelBatchException, LAST, times=1))
    assert len(learn.fix_match.history) == 2


def test_own_loss_is_back_before_any_validation(make_learner):
    "A cancelled training phase goes straight on to validation, which must not meet our loss"
    learn = make_learner()
    seen = []

    class Look(Callback):
        order = 100

        def after_pred(self):
            if not self.training:
                seen.append(type(self.learn.loss_func))

    quiet_fit(learn, 1, cbs=[Raise('after_pred', CancelTrainException, LAST), Look()])
    assert set(seen) == {CrossEntropyLossFlat}


def test_mixup_and_a_cancelled_epoch(make_learner):
    learn = make_learner()
    quiet_fit(learn, 2, cbs=[MixUp(), Raise('after_pred', CancelTrainException, LAST)])
    assert type(learn.loss_func) is CrossEntropyLossFlat


def test_interrupted_fit_with_fixmatch_given_to_fit(make_learner):
    learn = make_learner()
    fm = learn.fix_match
    learn.remove_cb(fm)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=[fm, Raise('after_pred', KeyboardInterrupt, LAST)])
    assert type(learn.loss_func) is CrossEntropyLossFlat and fm.stream is None
    assert not hasattr(learn, 'fix_match') and not any(isinstance(cb, SemiRecorder) for cb in learn.cbs)
    assert quiet_fit(learn, 1) is None and len(learn.recorder.values[-1]) == 3


class Children(Callback):
    "Notes the worker processes at each training batch"

    def __init__(self):
        self.pids = []

    def after_pred(self):
        if self.training:
            self.pids.append({p.pid for p in multiprocessing.active_children()})


def test_workers_live_for_one_fit(make_learner):
    learn, look = make_learner(num_workers=2), Children()
    learn.validate()
    learn.get_preds()
    assert not multiprocessing.active_children(), 'no workers without training'
    quiet_fit(learn, 2, cbs=look)
    assert len(look.pids) == 6 and all(p == look.pids[0] for p in look.pids), 'the same workers in both epochs'
    assert len(look.pids[0]) == 2
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    'event,exc,order',
    [
        ('after_pred', KeyboardInterrupt, LAST),
        ('after_pred', RuntimeError, LAST),
        ('after_epoch', CancelFitException, FIRST),
        ('after_epoch', KeyboardInterrupt, FIRST),
        ('after_fit', RuntimeError, FIRST),
    ],
)
def test_workers_end_with_their_fit(make_learner, event, exc, order):
    "Though the traceback, which people's tools keep, holds on to all frames of the fit"
    learn, look, kept = make_learner(num_workers=2), Children(), None
    try:
        quiet_fit(learn, 1, cbs=[look, Raise(event, exc, order, times=1)])
    except BaseException as e:
        kept = e
    assert type(kept) is exc or exc is CancelFitException
    assert len(look.pids[0]) == 2 and not multiprocessing.active_children() and learn.fix_match.stream is None
    if exc is KeyboardInterrupt:
        assert learn.xb == learn.yb == (None,), 'the last batch lies in shared memory'


def slow_views(img):
    threading.Event().wait(0.1)
    t = torch.zeros(1, 16, 16, dtype=torch.uint8)
    return t, t + 1


class CtrlCSoon(Callback):
    "A signal while FixMatch waits for its first views"

    order = -20

    def before_batch(self):
        if self.training and self.iter == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_while_waiting_for_views(make_dls, make_learner, pool):
    "The traceback, which people's tools keep, holds on to the loader: its workers end all the same"
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(pool, bs=8, tfm=slow_views, num_workers=2))
    with pytest.raises(KeyboardInterrupt) as kept:
        quiet_fit(learn, 10, cbs=CtrlCSoon())
    assert kept.traceback and not multiprocessing.active_children()


class CtrlCForAll(Callback):
    "As a terminal sends it: to all workers, labelled and unlabelled ones, and to this process"

    def after_pred(self):
        if not self.training:
            return
        self.workers = multiprocessing.active_children()
        for o in self.workers:
            os.kill(o.pid, signal.SIGINT)
        time.sleep(0.2)
        self.alive = [o.is_alive() for o in self.workers]
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_of_a_terminal(make_dls, make_learner, capfd):
    press = CtrlCForAll()
    learn = make_learner(dls=make_dls(num_workers=1), num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=press)
    assert press.alive == [True, True], 'they end when they are asked to'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert 'Traceback' not in capfd.readouterr().err


def test_ctrl_c_that_python_would_drop_comes_again():
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with CtrlC():
        with pytest.raises(KeyboardInterrupt):
            Dropped()
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_a_loader_is_made():
    "Half made, it is in nobody's hands, who could end its workers"

    class Loader:
        def _get_iterator(self):
            signal.raise_signal(signal.SIGINT)
            self.made = True

    loader = Loader()
    with pytest.raises(KeyboardInterrupt), CtrlC():
        loader._get_iterator()
        time.sleep(5)
    assert loader.made


def test_ctrl_c_frees_the_loaders_of_a_kept_traceback(make_dls):
    def wait(dl):
        for _ in dl:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as kept, CtrlC():
        wait(make_dls(num_workers=1).valid)
    assert kept.traceback and not multiprocessing.active_children()


def test_ctrl_c_of_ones_own_handler():
    "A program that ends its training in its own way goes on to"
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *args: pressed.append(args[0]))
    try:
        with CtrlC():
            signal.raise_signal(signal.SIGINT)
        assert pressed == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_error_in_the_loader_has_a_message(make_dls, make_learner, pool):
    "An exception without one would become an IndexError in fastai"

    def broken(img):
        raise AssertionError

    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(pool, tfm=broken, num_workers=0))
    with pytest.raises(AssertionError, match='AssertionError in the unlabelled loader'):
        quiet_fit(learn, 1)
    learn.validate()
