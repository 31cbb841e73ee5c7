"ModelEMA against timm, and in all the places where two sets of weights could be mixed up"

import pickle
import sys
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import Raise, no_bn, quiet_fit, tiny_net
from fastai.callback.core import _events
from fastai.callback.hook import ActivationStats
from fastai.vision.all import (
    Adam,
    BnFreeze,
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    ChannelsLast,
    CrossEntropyLossFlat,
    DataLoaders,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    Learner,
    MixedPrecision,
    MixUp,
    OptimWrapper,
    SaveModelCallback,
    accuracy,
    load_learner,
    nn,
    set_seed,
)
from timm.utils import ModelEmaV3

from fixmatch_fastai.ema import ModelEMA

EVENTS = [e for e in _events if e != 'after_create']
OURS = [e for e in EVENTS if hasattr(ModelEMA, e)]  # at others it is all the same who comes first
CANCELS = [
    CancelBatchException,
    CancelTrainException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelBackwardException,
    CancelValidException,
]
sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def params(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


class Steps(Callback):
    "Notes the weights before and after each step that the optimizer takes, whatever becomes of the events around it"

    def __init__(self):
        self.before, self.after = [], []

    def before_fit(self):
        opt = self.learn.opt
        if opt is None or 'step' in vars(opt):
            return

        def step(*args, **kwargs):
            self.before.append(params(self.learn.model))
            type(opt).step(opt, *args, **kwargs) if not isinstance(opt, OptimWrapper) else opt.opt.step()
            self.after.append(params(self.learn.model))

        opt.step = step


def by_hand(start, steps, decay):
    average = [p.clone() for p in start]
    for step in steps:
        average = [decay * a + (1 - decay) * p for a, p in zip(average, step)]
    return average


def close(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def batches(n=3, bs=4):
    set_seed(1)
    return [(torch.randn(bs, 1, 16, 16), torch.randint(0, 10, (bs,))) for _ in range(n)]


def learner(tmp_path, net=tiny_net, decay=0.8, cbs=(), data=None, seed=0, **kwargs):
    data = data or batches()
    set_seed(seed)
    kwargs = {'opt_func': sgd, 'lr': 0.1, 'metrics': accuracy, 'path': tmp_path, **kwargs}
    cbs = [ModelEMA(decay), Steps(), *cbs]
    return Learner(DataLoaders(data, data), net(), CrossEntropyLossFlat(), cbs=cbs, **kwargs)


# the numbers


def test_a_weight_by_hand():
    "Loss = w: each step of lr 1 takes 1 off. From 0, decay 0.5: 0, -0.5, -1.25, -2.125"

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.w

    data = [(torch.zeros(1), torch.zeros(1))] * 3
    learn = Learner(DataLoaders(data, data), One(), lambda p, y: p.sum(), opt_func=sgd, cbs=ModelEMA(decay=0.5))
    seen = []

    class Look(Callback):
        order = 13

        def after_step(self):
            seen.append((self.learn.model.w.item(), self.learn.model_ema.ema.module.w.item()))

    quiet_fit(learn, 1, 1.0, cbs=Look())
    assert seen == [(-1, -0.5), (-2, -1.25), (-3, -2.125)]
    assert learn.model.w.item() == -2.125 and learn.model_ema.averaged and learn.model_ema.steps == 3
    assert learn.recorder.values[-1][1] == learn.validate()[0] == -2.125, 'validated with the average'


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9, 0.999])
def test_equals_timm(tmp_path, decay):
    learn = learner(tmp_path, decay=decay, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9))
    model = deepcopy(learn.model)
    timm = ModelEmaV3(model, decay=decay)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learn, 4)
    steps = learn.steps.after
    assert len(steps) == 12 and learn.model_ema.steps == 12
    for step in steps:
        with torch.no_grad():
            for p, q in zip(model.parameters(), step):
                p.copy_(q)
        timm.update(model)
    theirs = dict(timm.module.named_parameters())
    for ours in (learn.model, learn.model_ema.ema.module):  # of dicts, names and shapes are compared too
        torch.testing.assert_close(dict(ours.named_parameters()), theirs, rtol=1e-5, atol=1e-7)
    assert same(learn.model_ema.state_dict()['raw'].values(), steps[-1])


def test_batchnorm_statistics_are_the_training_models(tmp_path):
    "As a twin without ModelEMA has them after the same training"
    learn, twin = learner(tmp_path), learner(tmp_path)
    twin.remove_cb(ModelEMA)
    for o in (learn, twin):
        quiet_fit(o, 2)
    assert not same(learn.model.parameters(), twin.model.parameters()) and len(list(twin.model.buffers())) == 3
    assert same(learn.model.buffers(), twin.model.buffers())
    assert same(learn.model_ema.ema.module.buffers(), twin.model.buffers())
    assert not learn.model_ema.ema.training and not any(p.requires_grad for p in learn.model_ema.ema.parameters())
    raw = learn.model_ema.state_dict()['raw'].values()
    assert same(raw, twin.model.parameters()), 'the average has no say in training'


def test_half_life():
    assert ModelEMA(half_life=1).decay == 0.5
    assert ModelEMA(half_life=2).decay == pytest.approx(0.70710678)
    assert ModelEMA(half_life=692.8).decay == pytest.approx(0.999, abs=1e-6)
    assert ModelEMA().decay == 0.999 and ModelEMA().half_life == pytest.approx(692.8005)
    assert ModelEMA(0.5).half_life == 1 and ModelEMA(0).half_life == 0


@pytest.mark.parametrize(
    'kwargs,match',
    [
        ({'decay': 1}, 'below 1'),
        ({'decay': -0.1}, '0 or more'),
        ({'decay': float('nan')}, '0 or more'),
        ({'half_life': 0}, 'above 0'),
        ({'half_life': -3}, 'above 0'),
        ({'half_life': float('nan')}, 'above 0'),
        ({'decay': 0.9, 'half_life': 3}, 'either'),
    ],
)
def test_rates_that_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ModelEMA(**kwargs)


def test_two_averages_are_refused(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(ValueError, match='two ModelEMA callbacks'):
        quiet_fit(learn, 1, cbs=ModelEMA())
    assert learn.steps.after == []


# what is a step


def test_accumulated_batches_are_no_steps(tmp_path):
    learn = learner(tmp_path, cbs=[GradientAccumulation(8)], data=batches(7))
    start = params(learn.model)
    quiet_fit(learn, 1)
    assert len(learn.steps.after) == learn.model_ema.steps == 3
    close(learn.model.parameters(), by_hand(start, learn.steps.after, 0.8))
    # the last batch, which made no step, moved them too
    assert same(learn.model_ema.ema.module.buffers(), learn.model.buffers())


@pytest.mark.parametrize('order', [10, 55], ids=['before ours', 'after ours'])
@pytest.mark.parametrize('exc', [CancelStepException, CancelBatchException])
def test_skipped_steps(tmp_path, exc, order):
    "As mixed precision skips them: in `before_step`, order 10"

    class Skip(Callback):
        def before_step(self):
            if self.train_iter in (0, 2, 3):
                raise exc

    skip = Skip()
    skip.order = order
    learn = learner(tmp_path, cbs=[skip])
    start = params(learn.model)
    quiet_fit(learn, 2)
    assert len(learn.steps.after) == learn.model_ema.steps == 3
    close(learn.model.parameters(), by_hand(start, learn.steps.after, 0.8))


def test_no_step_moves_nothing(tmp_path):
    learn = learner(tmp_path, cbs=[Raise('before_step', CancelTrainException, times=1)])
    start = params(learn.model)
    quiet_fit(learn, 1)
    assert learn.model_ema.steps == 0
    assert same(learn.model.parameters(), start)


# who sees which weights


def test_validation_sees_the_average_and_training_does_not(tmp_path):
    seen = []

    class Look(Callback):
        order = 13

        def before_batch(self):
            seen.append((self.training, params(self.learn.model)))

    learn = learner(tmp_path, cbs=[Look()])
    start = params(learn.model)
    quiet_fit(learn, 2)
    steps = [start, *learn.steps.after]
    assert [t for t, _ in seen] == ([True] * 3 + [False] * 3) * 2
    for i, (training, weights) in enumerate(seen):
        n = 3 * (i // 6) + min(i % 6, 3)
        if training:
            assert same(weights, steps[n])
        else:
            close(weights, by_hand(start, steps[1 : n + 1], 0.8))
            assert not same(weights, steps[n])


def test_predictions_after_training(tmp_path):
    learn = learner(tmp_path)
    start = params(learn.model)
    quiet_fit(learn, 2)
    recorded = learn.recorder.values[-1][1]
    expected = deepcopy(learn.model).eval()
    with torch.no_grad():
        for p, q in zip(expected.parameters(), by_hand(start, learn.steps.after, 0.8)):
            p.copy_(q)
        logits = torch.cat([expected(x) for x, _ in learn.dls.valid])
        y = torch.cat([y for _, y in learn.dls.valid])
    preds, _ = learn.get_preds(dl=learn.dls.valid)
    torch.testing.assert_close(preds, logits.softmax(1), rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert recorded == pytest.approx(loss, rel=1e-4) and learn.validate()[0] == pytest.approx(loss, rel=1e-4)
    x = learn.dls.valid[0][0]
    torch.testing.assert_close(learn.model_ema.ema(x), expected(x), rtol=1e-4, atol=1e-5)


def test_two_fits_are_one(tmp_path):
    one, two = learner(tmp_path), learner(tmp_path)
    quiet_fit(one, 2)
    quiet_fit(two, 1)
    two.validate()
    two.get_preds(dl=two.dls.valid)
    quiet_fit(two, 1)
    assert same(one.model.parameters(), two.model.parameters()) and two.model_ema.steps == 6
    assert same(one.model_ema.state_dict()['raw'].values(), two.model_ema.state_dict()['raw'].values())


@pytest.mark.parametrize('kwargs', [{}, {'at_end': True}, {'every_epoch': True}], ids=['best', 'last', 'each'])
def test_average_is_what_save_model_saves(tmp_path, kwargs):
    "What is saved is what was monitored: a model loaded from it has the recorded loss"
    learn = learner(tmp_path, cbs=[SaveModelCallback(fname='m', **kwargs)])
    quiet_fit(learn, 3, 0.3)
    losses = [v[1] for v in learn.recorder.values]
    assert len(set(losses)) == 3
    epochs = {'m': 2 if 'at_end' in kwargs else losses.index(min(losses))}
    for name, epoch in ({'m_0': 0, 'm_1': 1, 'm_2': 2} if 'every_epoch' in kwargs else epochs).items():
        fresh = learner(tmp_path).load(name, with_opt=False)
        fresh.remove_cb(ModelEMA)
        assert fresh.validate()[0] == pytest.approx(losses[epoch], rel=1e-5)


def test_best_is_respected(tmp_path):
    "`SaveModelCallback` loads the best at the end: that is evaluated, and training goes on from it with a new average"

    class Worse(Callback):
        order = 55

        def after_epoch(self):
            if self.epoch > 0:
                self.learn.recorder.values[-1][1] = 99.0

    learn = learner(tmp_path, cbs=[SaveModelCallback(), Worse()])
    start = params(learn.model)
    quiet_fit(learn, 3)
    best = by_hand(start, learn.steps.after[:3], 0.8)
    close(learn.model.parameters(), best)
    best = params(learn.model)
    learn.validate()
    assert same(learn.model.parameters(), best)
    learn.remove_cbs([SaveModelCallback, Worse])
    quiet_fit(learn, 1)
    assert same(learn.steps.before[9], best) and learn.model_ema.steps == 3
    close(learn.model.parameters(), by_hand(best, learn.steps.after[9:], 0.8))


def test_best_that_is_the_last_changes_nothing(tmp_path):
    one, two = learner(tmp_path), learner(tmp_path, cbs=[SaveModelCallback(comp=lambda a, b: True)])
    quiet_fit(one, 4)
    quiet_fit(two, 2)
    quiet_fit(two, 2)
    assert same(one.model.parameters(), two.model.parameters()) and two.model_ema.steps == 12


# weights from elsewhere


def other_weights(learn, name='other'):
    other = learner(learn.path)
    other.remove_cb(ModelEMA)
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.1)
    other.save(name, with_opt=False)
    return params(other.model)


def interrupted(learn, event='after_pred', order=55, times=2):
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=Raise(event, KeyboardInterrupt, order, times))


HOW, BEFORE = ['load', 'copy', 'model'], ['nothing', 'fit', 'Ctrl-C', 'lr_find', 'Ctrl-C in lr_find']


@pytest.mark.parametrize(
    'how,before,opt_func',
    [*((how, o, sgd) for how in HOW for o in BEFORE), *((how, o, Adam) for how, o in zip(HOW, BEFORE[1:]))],
)
def test_loaded_weights_are_respected(tmp_path, how, before, opt_func):
    learn = learner(tmp_path, opt_func=opt_func)
    other = other_weights(learn)
    if before != 'nothing':
        quiet_fit(learn, 1)
    if before == 'Ctrl-C':
        interrupted(learn)
    if 'lr_find' in before:
        try:
            find(learn, cbs=Raise('after_pred', KeyboardInterrupt) if 'Ctrl-C' in before else None)
        except KeyboardInterrupt:
            pass
    if how == 'load':
        learn.load('other', with_opt=False)
    elif how == 'copy':
        with torch.no_grad():
            for p, q in zip(learn.model.parameters(), other):
                p.copy_(q)
    else:
        learn.model = deepcopy(learn.model)
        learn.model.load_state_dict(torch.load(tmp_path / 'models' / 'other.pth'))
        learn.create_opt()
    learn.validate()
    assert same(learn.model.parameters(), other)
    n = len(learn.steps.before)
    quiet_fit(learn, 1)
    assert same(learn.steps.before[n], other) and learn.model_ema.steps == 3
    close(learn.model.parameters(), by_hand(other, learn.steps.after[n:], 0.8))


def test_loaded_between_epochs(tmp_path):
    "By a callback that goes back to the best, or to any other"

    class Back(Callback):
        order = 65

        def after_epoch(self):
            if self.epoch == 0:
                self.learn.load('other', with_opt=False)

    learn = learner(tmp_path, cbs=[Back()])
    other = other_weights(learn)
    quiet_fit(learn, 2)
    assert same(learn.steps.before[3], other)
    close(learn.model.parameters(), by_hand(other, learn.steps.after[3:], 0.8))


def test_another_network(tmp_path):
    learn = learner(tmp_path)
    quiet_fit(learn, 1)
    interrupted(learn, 'before_step')  # within a step, where whatever is in the model is taken as trained
    learn.model = no_bn()
    learn.create_opt()
    learn.validate()
    quiet_fit(learn, 1)
    assert [p.shape for p in learn.model_ema.ema.parameters()] == [p.shape for p in learn.model.parameters()]
    assert learn.model_ema.steps == 3


def test_raw_weights_loaded_back_keep_the_average(tmp_path):
    one, two = learner(tmp_path), learner(tmp_path)
    quiet_fit(one, 2)
    quiet_fit(two, 1)
    with torch.no_grad():
        for p, q in zip(two.model.parameters(), two.model_ema.state_dict()['raw'].values()):
            p.copy_(q)
    assert not two.model_ema.averaged
    two.validate()
    assert two.model_ema.averaged
    quiet_fit(two, 1)
    assert same(one.model.parameters(), two.model.parameters())


# lr_find


def find(learn, cbs=None):
    for cb in [cbs] if cbs else []:
        learn.add_cb(cb)
    try:
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
    finally:
        for cb in [cbs] if cbs else []:
            learn.remove_cb(cb)


def test_lr_find_moves_nothing(tmp_path):
    one, two = learner(tmp_path), learner(tmp_path)
    start = params(two.model)
    find(two)
    assert two.model_ema.ema is None and same(two.model.parameters(), start)
    # lr_find loads statistics too, but for those of a batch it never validated
    two.model.load_state_dict(one.model.state_dict())
    quiet_fit(one, 2)
    quiet_fit(two, 1)
    held = params(two.model)
    find(two)
    assert same(two.model.parameters(), held) and two.model_ema.steps == 3 and two.model_ema.averaged
    two.validate()
    assert same(two.model.parameters(), held)
    quiet_fit(two, 1)
    assert same(one.model.parameters(), two.model.parameters()) and two.model_ema.steps == 6


IN_LR_FIND = (
    'before_fit before_train after_pred before_step after_step after_batch before_validate after_epoch after_fit'
)


@pytest.mark.parametrize(
    'event,order', [(o, order) for o in IN_LR_FIND.split() for order in ([-20, 70] if o in OURS else [70])]
)
def test_ctrl_c_in_lr_find(tmp_path, event, order):
    one, two = learner(tmp_path, no_bn), learner(tmp_path, no_bn)
    quiet_fit(one, 2)
    quiet_fit(two, 1)
    held = params(two.model)
    times = 1 if event in ('before_validate', 'before_fit', 'after_fit') else 2
    try:
        find(two, Raise(event, KeyboardInterrupt, order, times))
    except KeyboardInterrupt:
        pass
    two.get_preds(dl=two.dls.valid)
    assert same(two.model.parameters(), held)
    two.opt.zero_grad()  # fastai leaves the interrupted step's gradients
    quiet_fit(two, 1, 0.1)
    assert same(one.model.parameters(), two.model.parameters()) and two.model_ema.steps == 6


# interrupts


@pytest.mark.parametrize('event,order', [*((o, 70) for o in EVENTS), *((o, -20) for o in OURS)])
def test_average_after_an_interrupt(make_dls, tmp_path, pool, event, order):
    "Both sets of weights are there: predictions and exports have the average, training goes on from the raw ones"
    cbs = [ModelEMA(0.8), Steps()]
    learn = Learner(make_dls(), tiny_net(), metrics=accuracy, path=tmp_path, lr=0.1, opt_func=sgd, cbs=cbs)
    start = params(learn.model)
    try:
        quiet_fit(learn, 2, cbs=Raise(event, KeyboardInterrupt, order))
    except KeyboardInterrupt:
        pass
    ema, steps = learn.model_ema, learn.steps.after
    raw = steps[-1] if steps else start
    average = by_hand(start, steps[: ema.steps], 0.8)
    assert ema.steps == len(steps) - (event == 'after_step' and order == -20)
    if ema.ema is not None:
        close(ema.ema.parameters(), average)
        assert same(ema.state_dict()['raw'].values(), raw)
        assert same(learn.model.parameters(), raw) or ema.averaged
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    expected = learn.predict(pool[0])[2]
    close(learn.model.parameters(), average)
    torch.testing.assert_close(loaded.predict(pool[0])[2], expected)
    close(loaded.model.parameters(), average)
    n = len(steps)
    learn.opt.__dict__.pop('step', None)
    quiet_fit(learn, 1)
    assert same(learn.steps.before[n], raw)
    assert learn.model_ema.averaged


@pytest.mark.slow
def test_interrupt_between_any_two_lines(tmp_path):
    "Each line of the module that runs in a fit of two epochs is interrupted once"
    module, at, n = sys.modules[ModelEMA.__module__].__file__, None, 0

    def trace(frame, event, arg):
        nonlocal n
        if frame.f_code.co_filename != module:
            return None
        if event == 'line':
            n += 1
            if n == at:
                raise KeyboardInterrupt
        return trace

    def interrupt(learn, line):
        nonlocal at, n
        at, n = line, 0
        sys.settrace(trace)
        try:
            quiet_fit(learn, 2)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return n

    data = batches(1)
    lines = interrupt(learner(tmp_path, no_bn, data=data), None)
    assert lines > 100
    for line in range(1, lines + 1):
        learn = learner(tmp_path, no_bn, data=data)
        start = params(learn.model)
        assert interrupt(learn, line) == line
        ema, steps = learn.model_ema, [start, *learn.steps.after]
        if ema.ema is None:
            continue
        average = params(ema.ema)
        updates = ema.steps
        assert len(steps) - 2 <= updates <= len(steps) - 1
        close(average, by_hand(start, steps[1 : updates + 1], 0.8))
        learn.validate()
        assert same(learn.model.parameters(), average), line
        assert same(ema.state_dict()['raw'].values(), steps[-1]), line


@pytest.mark.slow
@pytest.mark.parametrize('order', [-20, 55], ids=['first', 'last'])
@pytest.mark.parametrize('exc', CANCELS, ids=lambda o: o.__name__)
def test_average_after_a_cancel(tmp_path, exc, order):
    data = batches(2)
    for event in EVENTS if order == 55 else OURS:
        learn = learner(tmp_path, data=data)
        start = params(learn.model)
        try:
            quiet_fit(learn, 2, cbs=Raise(event, exc, order))
        except exc:  # fastai catches each only where it belongs
            learn.validate()
        steps, ema = learn.steps.after, learn.model_ema
        missed = event == 'after_step' and order == -20  # the event was cancelled before it came to us
        taken = [s for i, s in enumerate(steps) if not (missed and i == 1)]
        close(learn.model.parameters(), by_hand(start, taken, 0.8))
        if ema.ema is not None:
            assert ema.steps == len(taken) and ema.averaged, event
            assert same(ema.state_dict()['raw'].values(), steps[-1] if steps else start), event


def test_fit_with_the_callback_given_to_it(tmp_path):
    learn = learner(tmp_path)
    learn.remove_cb(ModelEMA)
    start, ema = params(learn.model), ModelEMA(0.8)
    quiet_fit(learn, 1, cbs=ema)
    close(learn.model.parameters(), by_hand(start, learn.steps.after, 0.8))
    quiet_fit(learn, 1, cbs=ema)
    close(learn.model.parameters(), by_hand(start, learn.steps.after, 0.8))
    assert len(learn.steps.after) == 6


# files


def test_average_in_an_exported_learner(make_dls, tmp_path, pool):
    learn = Learner(make_dls(), tiny_net(), metrics=accuracy, path=tmp_path, lr=0.1, cbs=ModelEMA(0.8))
    quiet_fit(learn, 1)
    expected = learn.predict(pool[0])[2]
    learn.export()
    assert learn.model_ema.steps == 3
    loaded = load_learner(tmp_path / 'export.pkl')
    assert loaded.model_ema.ema is None and loaded.model_ema.state_dict() == {}
    torch.testing.assert_close(loaded.predict(pool[0])[2], expected)
    start = params(loaded.model)
    assert same(start, learn.model.parameters())
    loaded.dls = learn.dls
    quiet_fit(loaded, 1)
    assert loaded.model_ema.steps == 3 and loaded.model_ema.averaged
    interrupted(learn)
    plain = pickle.loads(pickle.dumps(learn.model_ema.ema))
    assert same(plain.parameters(), learn.model_ema.ema.parameters())


def test_loaded_after_ctrl_c_trains_on(make_dls, tmp_path):
    learn = Learner(make_dls(), tiny_net(), path=tmp_path, lr=0.1, opt_func=sgd, cbs=[ModelEMA(0.8)])
    interrupted(learn, 'after_step', 55)
    raw, average = params(learn.model), params(learn.model_ema.ema)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    loaded.dls = learn.dls
    loaded.add_cb(Steps())
    quiet_fit(loaded, 1)
    assert same(loaded.steps.before[0], raw) and loaded.model_ema.steps == 5
    close(loaded.model.parameters(), by_hand(average, loaded.steps.after, 0.8))


def test_export_of_weights_from_elsewhere_after_ctrl_c(make_dls, tmp_path, pool):
    learn = Learner(make_dls(), tiny_net(), path=tmp_path, lr=0.1, opt_func=sgd, cbs=[ModelEMA(0.8)])
    learn.save('start', with_opt=False)
    start = params(learn.model)
    interrupted(learn, 'after_step', 55)
    learn.load('start', with_opt=False)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    loaded.predict(pool[0])
    assert same(loaded.model.parameters(), start)


@pytest.mark.parametrize('through', ['memory', 'file'])
@pytest.mark.parametrize('model', ['fresh', 'loaded before', 'loaded after'])
@pytest.mark.parametrize('when', ['after a fit', 'after Ctrl-C'])
def test_average_resumes(tmp_path, when, model, through):
    whole, part, rest = learner(tmp_path), learner(tmp_path), learner(tmp_path, seed=5)
    if when == 'after a fit':
        quiet_fit(whole, 1)
        quiet_fit(part, 1)
    else:
        for o in (whole, part):
            interrupted(o)  # BatchNorm has seen the second batch, which made no step
    sd = part.model_ema.state_dict()
    assert sd['steps'] == part.model_ema.steps == (3 if when == 'after a fit' else 1)
    part.save('part')
    if through == 'file':
        torch.save(sd, tmp_path / 'ema.pth')
        sd = torch.load(tmp_path / 'ema.pth', weights_only=True)
    if model == 'loaded before':
        rest.load('part')
    rest.model_ema.load_state_dict(sd)
    if model == 'loaded after':
        rest.load('part')
    assert rest.model_ema.averaged or model == 'loaded after'
    quiet_fit(whole, 2)
    quiet_fit(rest, 2)
    for a, b in ((whole.model, rest.model), (whole.model_ema.ema.module, rest.model_ema.ema.module)):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert same(a.state_dict().values(), b.state_dict().values())
    assert same(whole.model_ema.state_dict()['raw'].values(), rest.model_ema.state_dict()['raw'].values())
    assert whole.model_ema.steps == rest.model_ema.steps


def test_state_of_another_network(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, partial(tiny_net, 9))
    quiet_fit(learn, 1)
    start = params(other.model)
    with pytest.raises(ValueError, match="(?s)another model's.*size mismatch"):
        other.model_ema.load_state_dict(learn.model_ema.state_dict())
    with pytest.raises(ValueError, match='another model'):
        learner(tmp_path, no_bn).model_ema.load_state_dict(learn.model_ema.state_dict())
    assert same(other.model.parameters(), start) and other.model_ema.ema is None


STATES = {
    'no state': lambda sd: 3,
    'a part is missing': lambda sd: {k: sd[k] for k in ('average', 'steps')},
    'more than a state': lambda sd: {**sd, 'learn': 3},
    'steps below 0': lambda sd: {**sd, 'steps': -1},
    'steps as text': lambda sd: {**sd, 'steps': '3'},
    'raw is no state': lambda sd: {**sd, 'raw': 3},
    'NaN': lambda sd: {**sd, 'raw': {k: v / 0 for k, v in sd['raw'].items()}},
    'integers': lambda sd: {**sd, 'average': {k: v.long() for k, v in sd['average'].items()}},
    'a weight is missing': lambda sd: {**sd, 'raw': dict([*sd['raw'].items()][1:])},
}


@pytest.mark.parametrize('change', STATES.values(), ids=STATES)
def test_states_that_can_not_be_one(tmp_path, change):
    "Are refused whole: average, raw weights and steps are as before"
    learn = learner(tmp_path, no_bn)
    quiet_fit(learn, 1)
    held, sd = params(learn.model), learn.model_ema.state_dict()
    with pytest.raises(ValueError, match='state of a ModelEMA|average is another model'):
        learn.model_ema.load_state_dict(change(sd))
    assert same(learn.model.parameters(), held) and learn.model_ema.steps == sd['steps']
    assert same(learn.model_ema.state_dict()['raw'].values(), sd['raw'].values())


@pytest.mark.parametrize('name', ['decay', 'half_life'])
@pytest.mark.parametrize('v', [True, '3', [3], float('inf'), float('nan'), -1])
def test_rates_of_another_kind(name, v):
    with pytest.raises(ValueError, match=f'`{name}` must be'):
        ModelEMA(**{name: v})
    with pytest.raises(ValueError, match='`half_life` must be'):
        ModelEMA(half_life=1e30)  # of which the decay is 1


def test_state_before_training(tmp_path):
    learn = learner(tmp_path)
    assert learn.model_ema.state_dict() == {} and learn.model_ema.steps == 0 and not learn.model_ema.averaged
    learn.model_ema.load_state_dict({})
    quiet_fit(learn, 1)


# the warning


def test_warns_once_when_the_half_life_is_too_long(tmp_path):
    learn = learner(tmp_path, decay=0.999)
    with pytest.warns(UserWarning, match=r'half-life of 693 steps is long for 150 .*use `ModelEMA\(half_life=3\)`'):
        quiet_fit(learn, 50)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet_fit(learn, 1)


@pytest.mark.parametrize('half_life,epochs,warned', [(2.9, 2, False), (3.1, 2, True), (None, 1, False), (6, 3, True)])
def test_warns_above_half_of_training(tmp_path, half_life, epochs, warned):
    learn = learner(tmp_path)
    learn.remove_cb(ModelEMA)
    learn.add_cb(ModelEMA(half_life=half_life) if half_life else ModelEMA(decay=0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.validate()
        assert not seen, 'nothing is trained'
        quiet_fit(learn, epochs)
    assert [o for o in seen if 'half-life' in str(o.message)] == seen and len(seen) == warned


def test_steps_trained_before_count(tmp_path):
    "A half-life of 4 is too long for the 3 steps to come, but not for 9 in all; each callback would warn once"
    learn = learner(tmp_path)
    quiet_fit(learn, 2)
    state = learn.model_ema.state_dict()
    learn.remove_cb(ModelEMA)
    learn.add_cb(ModelEMA(half_life=4))
    learn.model_ema.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet_fit(learn, 1)


# neighbours


@pytest.mark.parametrize(
    'cbs',
    [
        [MixedPrecision()],
        [GradientClip(0.1)],
        [MixUp(), GradientAccumulation(8), GradientClip()],
        [EarlyStoppingCallback(patience=1, min_delta=9)],
        [ChannelsLast()],
        [BnFreeze()],
        [ActivationStats(with_hist=False)],
    ],
    ids=lambda cbs: '+'.join(type(c).__name__ for c in cbs),
)
@pytest.mark.parametrize('method,args', [('fit', (2,)), ('fit_one_cycle', (2,))])
def test_average_beside_neighbours(make_learner, cbs, method, args):
    learn = make_learner(cbs=[ModelEMA(0.8), Steps(), *cbs])
    start = params(learn.model)
    quiet_fit(learn, *args, method=method)
    assert learn.model_ema.steps == len(learn.steps.after) > 0 and learn.model_ema.averaged
    close(learn.model.parameters(), by_hand(start, learn.steps.after, 0.8))
    assert not any(m._forward_hooks for m in learn.model.modules()) and len(learn.fix_match.history) > 0
    learn.model_ema.ema(torch.randn(2, 1, 16, 16))


def test_hooks_of_callbacks_are_not_copied(tmp_path):
    learn = learner(tmp_path, cbs=[ActivationStats(with_hist=False)])
    quiet_fit(learn, 1)
    n = len(learn.activation_stats.stats)
    learn.model_ema.ema(torch.randn(2, 1, 16, 16))
    assert len(learn.activation_stats.stats) == n
    hooks = [f for m in learn.model_ema.ema.modules() for f in m._forward_hooks.values()]
    assert not any(hasattr(f, '__self__') for f in hooks)


def test_average_over_both_fits_of_fine_tune(make_learner):
    net = tiny_net()
    splitter = lambda m: [list(m[0].parameters()), list(m[1:].parameters())]
    learn = make_learner(model=net, cbs=[ModelEMA(0.8), Steps()], splitter=splitter)
    start = params(net)
    quiet_fit(learn, 2, method='fine_tune')
    assert len(learn.steps.after) == learn.model_ema.steps == 9
    close(net.parameters(), by_hand(start, learn.steps.after, 0.8))


def test_average_of_a_data_parallel_model(tmp_path):
    learn = learner(tmp_path)
    net = learn.model
    learn.model = nn.DataParallel(net)
    start = params(net)
    quiet_fit(learn, 1)
    assert type(learn.model_ema.ema.module) is type(net) and learn.model_ema.averaged
    close(net.parameters(), by_hand(start, learn.steps.after, 0.8))


def test_model_moved_and_cast(tmp_path):
    "A model cast to another precision between fits holds the same weights"
    learn = learner(tmp_path)
    quiet_fit(learn, 1)
    learn.model.to(memory_format=torch.channels_last)
    learn.validate()
    assert learn.model_ema.steps == 3 and learn.model_ema.averaged


def test_copy_of_a_learner(tmp_path):
    learn = learner(tmp_path)
    quiet_fit(learn, 1)
    interrupted(learn)
    learn._end_cleanup()
    learn.loss_grad = None  # tensors with a graph, which torch can't copy
    copied = deepcopy(learn)
    assert copied.model_ema.learn is copied and copied.model_ema.ema is not learn.model_ema.ema
    for o in (learn, copied):
        o.validate()
    assert same(learn.model.parameters(), copied.model.parameters())


def test_frozen_parameters_stay_exactly(tmp_path):
    learn = learner(tmp_path)
    held = next(learn.model.parameters()).requires_grad_(False).clone()
    quiet_fit(learn, 5)
    for model in (learn.model, learn.model_ema.ema):
        assert torch.equal(next(model.parameters()), held)
