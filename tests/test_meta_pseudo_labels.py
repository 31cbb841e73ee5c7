"Meta Pseudo Labels against a hand-written loop of two networks, and what must hold around it"

import multiprocessing
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Raise, no_bn, quiet_fit, tiny_net
from fastai.callback.core import _events
from fastai.vision.all import (
    Adam,
    BnFreeze,
    Callback,
    CancelBatchException,
    CancelStepException,
    CancelTrainException,
    CrossEntropyLossFlat,
    CutMix,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    L,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    MixedPrecision,
    MixUp,
    OptimWrapper,
    SaveModelCallback,
    SchedLin,
    ShortEpochCallback,
    TerminateOnNaNCallback,
    accuracy,
    load_learner,
    nn,
    parent_label,
    set_seed,
)

from fixmatch_fastai.augment import FixMatchTransform, weak_augment
from fixmatch_fastai.callback import FixMatch, OneCallLoss
from fixmatch_fastai.checkpoint import SaveFixMatch
from fixmatch_fastai.ema import ModelEMA
from fixmatch_fastai.self_training import MetaPseudoLabels, meta_pseudo_labels

sgd = partial(OptimWrapper, opt=torch.optim.SGD)
EVENTS = [e for e in _events if e != 'after_create']
OURS = [e for e in EVENTS if hasattr(MetaPseudoLabels, e)]  # at others it is all the same who comes first


def batches(sizes_x, sizes_u):
    set_seed(1)
    labeled = [(torch.randn(n, 1, 16, 16), torch.randint(0, 10, (n,))) for n in sizes_x]
    return labeled, [(torch.randn(n, 1, 16, 16), torch.randn(n, 1, 16, 16)) for n in sizes_u]


def batch_loss(model, x, y):
    "Cross-entropy with BatchNorm over these images, and its statistics as they were"
    trial = deepcopy(model).train()
    with torch.no_grad():
        return F.cross_entropy(trial(x), y)


def by_hand(student, teacher, labeled, unlabeled, lr, teacher_lr, lambda_u, threshold, T, decay, smoothing=0.0):
    "The method, written from the paper's section 2 and appendix, without the library"
    s_opt, t_opt = torch.optim.SGD(student.parameters(), lr), torch.optim.SGD(teacher.parameters(), teacher_lr)
    student.train(), teacher.train()
    baseline, signals = 0.0, []
    for (x, y), (weak, strong) in zip(labeled, unlabeled):
        b, m = len(x), len(weak)
        t = teacher(torch.cat([x, weak, strong]))
        t_x, t_weak, t_strong = t[:b], t[b : b + m], t[b + m :]
        named = t_strong.detach().max(1).indices
        goal = torch.zeros(m, 10)
        goal[range(m), named] = 1
        goal = (1 - smoothing) * goal + smoothing / 10
        old = batch_loss(student, x, y)
        s_strong = student(torch.cat([x, strong]))[b:]
        s_loss = -(goal * s_strong.log_softmax(1)).sum(1).mean()
        s_opt.zero_grad()
        s_loss.backward()
        s_opt.step()
        h = (old - batch_loss(student, x, y)).item()
        signal = h - baseline
        baseline = decay * baseline + (1 - decay) * h
        p = torch.softmax(t_weak.detach(), 1)
        sharp = p ** (1 / T) / (p ** (1 / T)).sum(1, keepdim=True)
        uda = 0
        for j in range(m):
            if p[j].max() >= threshold:
                uda = uda - (sharp[j] * t_strong[j].log_softmax(0)).sum() / m
        t_loss = F.cross_entropy(t_x, y) + lambda_u * uda + signal * F.cross_entropy(t_strong, named)
        t_opt.zero_grad()
        t_loss.backward()
        t_opt.step()
        signals.append(signal)
    return signals


def pair(net):
    set_seed(2)
    return net(), net()


def same(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert p.shape == q.shape
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize('n', [1, 4], ids=['one step', 'four steps'])
@pytest.mark.parametrize('net', [tiny_net, no_bn], ids=['BatchNorm', 'no norm'])
def test_equals_loop_of_two_networks_by_hand(net, n):
    labeled, unlabeled = batches((5, 4, 6, 3)[:n], (8, 9, 7, 8)[:n])
    student, teacher = pair(net)
    theirs = deepcopy(student), deepcopy(teacher)
    opts = dict(lambda_u=1.5, threshold=0.16, T=0.6, decay=0.8)
    mpl = MetaPseudoLabels(teacher, unlabeled, lr=0.05, label_smoothing=0.2, **opts)
    learn = Learner(DataLoaders(labeled, labeled[:1]), student, CrossEntropyLossFlat(), opt_func=sgd, cbs=mpl)
    quiet_fit(learn, 1, 0.1, wd=0)
    signals = by_hand(*theirs, labeled, unlabeled, 0.1, 0.05, smoothing=0.2, **opts)
    assert all(abs(s) > 1e-4 for s in signals), 'without a signal the test would show little'
    assert mpl.history.signal.tolist() == pytest.approx(signals, abs=2e-6)
    same(student, theirs[0])
    same(teacher, theirs[1])


class Fixed(nn.Module):
    "The same logits for each image, but a weight to train"

    def __init__(self, logits):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.w.expand(len(x), -1)


@pytest.mark.parametrize('label,sign', [(0, 1), (1, -1)], ids=['good name', 'bad name'])
def test_sign_of_the_signal_by_hand(label, sign):
    """A teacher that says 0, for labels 0 or 1: the student gets better or worse, and the name more or less likely.
    One step of 1 from logits (0, 0)"""
    x, y = torch.zeros(4, 1, 2, 2), torch.full((4,), label)
    teacher, student = Fixed([1e-4, 0.0]), Fixed([0.0, 0.0])
    loader = [(x, x)]
    mpl = MetaPseudoLabels(teacher, loader, lambda_u=0, lr=1.0)
    dls = DataLoaders([(x, y)], [(x, y)])
    learn = Learner(dls, student, lambda p, y: F.cross_entropy(p, y), opt_func=sgd, cbs=[mpl])
    quiet_fit(learn, 1, 1.0, wd=0)
    assert student.w.tolist() == pytest.approx([0.5, -0.5])  # it learned the name 0: p - target = (-1/2, 1/2)
    new = torch.tensor([0.5, -0.5]).log_softmax(0)[label]
    signal = torch.tensor(2.0).log() + new  # log 2 is the loss before
    assert signal.sign() == sign
    assert mpl.history.signal[0] == pytest.approx(signal.item(), abs=1e-6)
    # without the signal the teacher's own term would move the logits by ±1/2; the signal adds s/2 for the name 0
    own = 0.5 if label == 0 else -0.5
    assert teacher.w[0].item() == pytest.approx(own + signal.item() / 2, abs=2e-4)


@pytest.fixture
def make_mpl(make_dls, pool, tmp_path):
    "A learner with Meta Pseudo Labels, three steps an epoch"

    def make(model=None, teacher=None, dls=None, cbs=(), label_func=parent_label, opts=None, num_workers=0, **kwargs):
        dls = make_dls() if dls is None else dls
        tfm = FixMatchTransform(weak=weak_augment(flip=False))
        loader = dls.unlabeled_dl(pool, mu=2, tfm=tfm, label_func=label_func, num_workers=num_workers)
        set_seed(0)
        mpl = MetaPseudoLabels(teacher or tiny_net(), loader, **{'lambda_u': 1.0, **(opts or {})})
        return Learner(dls, model or tiny_net(), metrics=accuracy, path=tmp_path, cbs=[mpl, *L(cbs)], **kwargs)

    return make


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def moved(model, before):
    return any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_columns_come_and_go(make_mpl):
    learn = make_mpl()
    for _ in range(2):
        quiet_fit(learn, 2)
        assert learn.recorder.metric_names[:4] == ['epoch', 'train_loss', 'valid_loss', 'accuracy']
        assert learn.recorder.metric_names[4:] == ['teacher_loss', 'signal', 'pseudo_acc', 'time']
        assert [len(v) for v in learn.recorder.values] == [6, 6]
        assert len(learn.meta_pseudo_labels.history) == 6
    last = learn.meta_pseudo_labels.history[3:]
    means = last[['teacher_loss', 'signal', 'pseudo_acc']].mean().tolist()
    assert list(learn.recorder.values[-1][3:]) == pytest.approx(means)
    assert len(learn.validate()) == 2
    learn = make_mpl(label_func=None)
    quiet_fit(learn, 1)
    assert learn.recorder.metric_names[4:] == ['teacher_loss', 'signal', 'time']
    assert learn.meta_pseudo_labels.history.pseudo_acc.isna().all()


def test_monitored_and_train_metrics(make_mpl):
    learn = make_mpl(cbs=[SaveModelCallback(monitor='pseudo_acc')])
    learn.recorder.train_metrics = True
    quiet_fit(learn, 2)
    assert len(learn.recorder.values[0]) == 7 and 0 <= learn.recorder.values[0][1] <= 1


def test_pseudo_acc_counts_the_known_only():
    labeled, ((weak, strong),) = batches((4,), (6,))
    _, teacher = pair(no_bn)
    with torch.no_grad():
        named = teacher(strong).argmax(1)
    truth = named.clone()
    truth[0], truth[1] = -1, (named[1] + 1) % 10  # one unknown, one wrong, four right
    mpl = MetaPseudoLabels(teacher, [((weak, strong), truth)], lambda_u=0)
    learn = Learner(DataLoaders(labeled, labeled), no_bn(), CrossEntropyLossFlat(), cbs=mpl)
    quiet_fit(learn, 1)
    assert mpl.history.pseudo_acc.tolist() == pytest.approx([0.8])


def usable(learn, item):
    "Predicts, validates, exports and trains on, as if nothing had been"
    assert type(pickle.loads(pickle.dumps(learn.loss_func))) is CrossEntropyLossFlat
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    assert loaded.predict(item)[0] in learn.dls.vocab and loaded.meta_pseudo_labels.teacher is None
    assert learn.predict(item)[0] in learn.dls.vocab
    assert len(learn.validate()) == 2 and type(learn.loss_func) is CrossEntropyLossFlat
    quiet_fit(learn, 2)
    mpl = learn.meta_pseudo_labels
    assert len(mpl.history) == 6 and [len(v) for v in learn.recorder.values] == [6, 6]
    assert mpl.stream is None and mpl.lesson is None and not multiprocessing.active_children()
    assert all(m.track_running_stats for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('event,order', [*((o, 55) for o in EVENTS), *((o, -20) for o in OURS)])
def test_interrupt_at_each_event(make_mpl, pool, event, order):
    learn = make_mpl()
    try:
        quiet_fit(learn, 2, cbs=Raise(event, KeyboardInterrupt, order))
    except KeyboardInterrupt:
        pass
    usable(learn, pool[0])


@pytest.mark.parametrize('where', ['student', 'teacher', 'loss'])
def test_interrupt_within(make_mpl, pool, where):
    "In the midst of the student's trial, of the teacher's pass, or of its step"
    learn = make_mpl()
    calls = {'n': 0}

    def stop(*args, **kwargs):
        calls['n'] += 1
        if calls['n'] == 2:
            raise KeyboardInterrupt

    model = learn.model if where == 'student' else learn.meta_pseudo_labels.teacher
    hook = model.register_full_backward_hook(stop) if where == 'loss' else model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 2)
    hook.remove()
    assert learn.meta_pseudo_labels.stream is None and '_with_events' not in vars(learn)
    usable(learn, pool[0])


OF_A_BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch']


@pytest.mark.parametrize(
    'event,exc',
    [
        *((o, exc) for o in OF_A_BATCH for exc in (CancelBatchException, CancelTrainException)),
        *((o, CancelStepException) for o in ('after_loss', 'before_step', 'after_step')),
    ],
)
def test_cancel_at_events_of_a_batch(make_mpl, pool, event, exc):
    learn = make_mpl()
    learn.recorder.train_metrics = True
    try:
        quiet_fit(learn, 2, cbs=Raise(event, exc, 55))
    except exc:  # fastai catches each only where it belongs
        pass
    learn.recorder.train_metrics = False
    usable(learn, pool[0])


@pytest.mark.parametrize('order', [-20, 55], ids=['before ours', 'after ours'])
def test_skipped_step_gives_no_signal(make_mpl, order):
    learn = make_mpl(model=no_bn(), teacher=no_bn())
    teacher = learn.meta_pseudo_labels.teacher
    before = snapshot(teacher)
    quiet_fit(learn, 1, cbs=[Raise('before_step', CancelStepException, order)])
    signal = learn.meta_pseudo_labels.history.signal
    assert signal[1] == 0 and signal[0] != 0 and signal[2] != 0
    assert moved(teacher, before)


def test_lr_find_leaves_the_teacher_alone(make_mpl, pool):
    learn = make_mpl()
    mpl = learn.meta_pseudo_labels
    quiet_fit(learn, 1)
    before, kept = snapshot(mpl.teacher), deepcopy(mpl.state_dict())
    with learn.no_bar():
        learn.lr_find(num_it=6, show_plot=False)
    now = mpl.state_dict()
    assert not moved(mpl.teacher, before) and torch.equal(now['baseline'], kept['baseline'])
    steps, kept_steps = ([s['step'] for s in o['opt']['state'] if s] for o in (now, kept))
    assert steps == kept_steps
    with pytest.raises(KeyboardInterrupt):
        with learn.no_bar(), learn.added_cbs(Raise('after_batch', KeyboardInterrupt, 55)):
            learn.lr_find(num_it=6, show_plot=False)
    assert not moved(mpl.teacher, before)
    usable(learn, pool[0])


def test_lr_find_before_training(make_mpl):
    learn = make_mpl()
    mpl = learn.meta_pseudo_labels
    before = snapshot(mpl.teacher)
    with learn.no_bar():
        learn.lr_find(num_it=6, show_plot=False)
    state = mpl.state_dict()
    assert not moved(mpl.teacher, before) and state['opt'] is None and state['baseline'] == 0


def test_loaded_learner_says_what_it_lacks(make_mpl, make_dls):
    learn = make_mpl()
    quiet_fit(learn, 1)
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    loaded.dls = make_dls()
    with pytest.raises(ValueError, match='loaded without the teacher'):
        quiet_fit(loaded, 1)
    with loaded.removed_cbs(loaded.meta_pseudo_labels):
        quiet_fit(loaded, 1)


def test_state_dict_goes_on_elsewhere(make_mpl):
    learn = make_mpl()
    quiet_fit(learn, 1)
    a, other = learn.meta_pseudo_labels, make_mpl().meta_pseudo_labels
    assert moved(other.teacher, snapshot(a.teacher))
    mine = a.state_dict()
    other.load_state_dict(deepcopy(mine))
    theirs = other.state_dict()
    assert not moved(other.teacher, snapshot(a.teacher))
    assert torch.equal(theirs['baseline'], mine['baseline']) and mine['baseline'] != 0
    for s, t in zip(mine['opt']['state'], theirs['opt']['state'], strict=True):
        assert torch.equal(s['grad_avg'], t['grad_avg']) and s.get('do_wd') == t.get('do_wd')


def test_student_does_not_learn_from_labels(make_mpl):
    "Other labels, the same first step of the student; the teacher's differs"
    labeled, unlabeled = batches((5,), (8,))
    others = [(x, (y + 1) % 10) for x, y in labeled]
    out = []
    for data in (labeled, others):
        student, teacher = pair(tiny_net)
        mpl = MetaPseudoLabels(teacher, unlabeled)
        quiet_fit(Learner(DataLoaders(data, data), student, CrossEntropyLossFlat(), opt_func=sgd, cbs=mpl), 1, 0.1)
        out.append((snapshot(student), teacher))
    assert not moved(student, out[0][0])
    assert moved(out[0][1], snapshot(teacher))


class Hypers(Callback):
    order = 100

    def __init__(self):
        self.seen = []

    def after_step(self):
        mpl = self.learn.meta_pseudo_labels
        self.seen.append((dict(self.opt.hypers[-1]), mpl.teacher_opt.hypers[0].copy()))


ADAMW = partial(OptimWrapper, opt=torch.optim.AdamW)


@pytest.mark.parametrize('opt_func', [Adam, sgd, ADAMW], ids=['Adam', 'torch SGD', 'torch AdamW'])
def test_teacher_follows_the_schedule(make_mpl, opt_func):
    learn = make_mpl(cbs=[seen := Hypers()], opt_func=opt_func)
    quiet_fit(learn, 1, 1e-2, method='fit_one_cycle', wd=0.3)
    lrs = [t['lr'] for _, t in seen.seen]
    assert lrs == pytest.approx(learn.recorder.lrs) and len(set(lrs)) == 3
    assert all(t['wd'] == 0.3 for _, t in seen.seen)
    for s, t in seen.seen:
        assert t.get('mom') == s.get('mom')


def test_own_lr_wd_and_optimizer(make_mpl):
    learn = make_mpl(cbs=[seen := Hypers()], opts=dict(lr=SchedLin(1.0, 0.0), wd=0.7, opt_func=sgd))
    quiet_fit(learn, 2, 1e-2, method='fit_one_cycle')
    assert [t['lr'] for _, t in seen.seen] == pytest.approx([1 - k / 6 for k in range(6)])
    assert all(t['wd'] == 0.7 for _, t in seen.seen)
    assert isinstance(learn.meta_pseudo_labels.teacher_opt, OptimWrapper) and not isinstance(learn.opt, OptimWrapper)


def test_weight_decay_spares_norm_and_bias(make_mpl):
    learn = make_mpl()
    quiet_fit(learn, 1)
    teacher, state = learn.meta_pseudo_labels.teacher, learn.meta_pseudo_labels.teacher_opt.state
    spared = [n for n, p in teacher.named_parameters() if state[p].get('do_wd') is False]
    assert spared == ['0.1.weight', '0.1.bias', '3.bias']


def test_lambda_u_may_be_a_schedule():
    labeled, unlabeled = batches((5,) * 4, (8,) * 4)
    losses = []
    for lambda_u in (SchedLin(0, 4), 0, 4):
        student, teacher = pair(no_bn)
        mpl = MetaPseudoLabels(teacher, unlabeled, lambda_u=lambda_u, threshold=0, lr=0.0)
        dls = DataLoaders(labeled, labeled[:1])
        quiet_fit(Learner(dls, student, CrossEntropyLossFlat(), opt_func=sgd, cbs=mpl), 1, 0.0, wd=0)
        losses.append(mpl.history.teacher_loss)
    between = [(1 - k / 4) * losses[1][k] + k / 4 * losses[2][k] for k in range(4)]
    assert losses[0].tolist() == pytest.approx(between, rel=1e-5)


def test_gradient_clip_holds_both(make_mpl):
    "With SGD of rate 1 the norm of a step is that of its clipped gradient"
    learn = make_mpl(model=no_bn(), teacher=no_bn(), cbs=GradientClip(1e-3), opt_func=sgd, opts=dict(lambda_u=8))
    models = learn.model, learn.meta_pseudo_labels.teacher
    weights = lambda: [torch.nn.utils.parameters_to_vector(m.parameters()).detach().clone() for m in models]
    before = weights()
    quiet_fit(learn, 1, 1.0, wd=0, cbs=Raise('after_batch', CancelTrainException, 55))
    for old, new in zip(before, weights(), strict=True):
        assert 0 < (new - old).norm() <= 2.01e-3


class Half(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.net, self.dtype = no_bn(), dtype

    def forward(self, x):
        return self.net(x).to(self.dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_are_float32(dtype):
    "Those of the logits as float32, which have seven digits where half precision has two or three"
    labeled, unlabeled = batches((5,), (8,))
    set_seed(2)
    student, teacher = Half(dtype), Half(dtype)
    x, y, strong = *labeled[0], unlabeled[0][1]
    with torch.no_grad():
        logits, logits_x, names = teacher(strong).float(), teacher(x).float(), teacher(strong).argmax(1)
        student_loss = F.cross_entropy(student(strong).float(), names).item()
    mpl = MetaPseudoLabels(teacher, unlabeled, lambda_u=0)
    quiet_fit(Learner(DataLoaders(labeled, labeled), student, CrossEntropyLossFlat(), cbs=mpl), 1)
    step = mpl.history.iloc[0]
    assert step.student_loss == pytest.approx(student_loss, rel=1e-5)
    expected = F.cross_entropy(logits_x, y) + step.signal * F.cross_entropy(logits, names)
    assert step.teacher_loss == pytest.approx(expected.item(), rel=1e-5)


class Autocast(Callback):
    "What fastai's MixedPrecision does, on the CPU too"

    order = 10

    def __init__(self, dtype):
        self.dtype = dtype

    def before_batch(self):
        self.cast = torch.autocast('cpu', dtype=self.dtype)
        self.cast.__enter__()

    def after_loss(self):
        self.cast.__exit__(None, None, None)


def test_teacher_has_a_scaler_in_float16(monkeypatch):
    "Its first scale, 65536, is too much for some step or other, which is left out; in the end it has learned"
    labeled, unlabeled = batches((5,) * 6, (8,) * 6)
    student, teacher = pair(no_bn)
    before = snapshot(teacher)
    scalers = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            scalers.append(self)

    monkeypatch.setattr(meta_pseudo_labels, 'GradScaler', Scaler)
    dls, cbs = DataLoaders(labeled, labeled[:1]), [MetaPseudoLabels(teacher, unlabeled), Autocast(torch.float16)]
    quiet_fit(Learner(dls, student, CrossEntropyLossFlat(), cbs=cbs), 1)
    assert [o.is_enabled() for o in scalers] == [True] and scalers[0].get_scale() > 1
    assert moved(teacher, before) and all(p.isfinite().all() for p in teacher.parameters())


def test_goes_with_the_average(make_mpl, pool):
    learn = make_mpl(cbs=ModelEMA(half_life=1))
    quiet_fit(learn, 1)
    assert learn.model_ema.averaged and learn.model_ema.steps == 3
    usable(learn, pool[0])


@pytest.mark.filterwarnings('ignore:.*cuda')
@pytest.mark.parametrize(
    'cb',
    [MixedPrecision, partial(MixedPrecision, amp_mode='bf16'), TerminateOnNaNCallback, BnFreeze, ShortEpochCallback],
    ids=['fp16', 'bf16', 'NaN', 'BnFreeze', 'short'],
)
def test_goes_with_neighbours(make_mpl, cb):
    learn = make_mpl(cbs=cb())
    before = snapshot(learn.meta_pseudo_labels.teacher)
    quiet_fit(learn, 2)
    mpl = learn.meta_pseudo_labels
    assert len(learn.recorder.values) == 2 and moved(mpl.teacher, before) and mpl.history.signal.abs().max() > 0
    assert len(mpl.history) == (4 if cb is ShortEpochCallback else 6)  # it stops after the second step of three


def test_user_loss_judges_the_labels():
    "Its smoothing is in the teacher's supervised term, and not in what the student learns"
    labeled, unlabeled = batches((5,), (8,))
    got = []
    for loss in (CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(eps=0.3)):
        student, teacher = pair(no_bn)
        t0 = deepcopy(teacher)
        mpl = MetaPseudoLabels(teacher, unlabeled, lambda_u=0)
        quiet_fit(Learner(DataLoaders(labeled, labeled), student, loss, opt_func=sgd, cbs=mpl), 1, 0.1, wd=0)
        got.append(mpl.history.iloc[0])
    x, y = labeled[0]
    logp = t0(x).log_softmax(1)
    smooth = (0.7 * -logp[range(5), y] + 0.3 * -logp.mean(1)).mean().item()
    strong = unlabeled[0][1]
    own = F.cross_entropy(t0(strong), t0(strong).argmax(1)).item()
    assert got[1].teacher_loss == pytest.approx(smooth + got[1].signal * own, rel=1e-5)
    assert got[0].student_loss == got[1].student_loss and got[0].teacher_loss != got[1].teacher_loss


def test_resumes_with_its_teacher(make_mpl):
    "What `SaveFixMatch` wrote after the first epoch is there again when the second begins"
    learn = make_mpl()
    seen = []

    class Look(Callback):
        order = 100

        def after_epoch(self):
            seen.append(deepcopy(self.learn.meta_pseudo_labels.state_dict()))

        def before_batch(self):
            if self.training and self.iter == 0:
                seen.append(deepcopy(self.learn.meta_pseudo_labels.state_dict()))

    def n_steps(state):
        return state['opt']['state'][0].get('step')

    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 2, cbs=[SaveFixMatch(), Look(), Raise('before_epoch', KeyboardInterrupt, 200)])
    saved = seen[-1]
    learn = make_mpl()
    assert moved(learn.meta_pseudo_labels.teacher, saved['teacher'])
    seen.clear()
    quiet_fit(learn, 2, cbs=[SaveFixMatch(resume=True), Look()])
    at_start = seen[0]
    assert all(torch.equal(a, b) for a, b in zip(at_start['teacher'].values(), saved['teacher'].values(), strict=True))
    assert torch.equal(at_start['baseline'], saved['baseline']) and at_start['baseline'] != 0
    assert n_steps(at_start) == n_steps(saved) == 3 and n_steps(seen[-1]) == 6


def test_trial_is_without_chance():
    "Where the student stands still nothing has become better: neither dropout nor BatchNorm's statistics differ"
    labeled, unlabeled = batches((6, 5), (8, 8))
    mpl = MetaPseudoLabels(tiny_net(), unlabeled)
    student = nn.Sequential(tiny_net(), nn.Dropout(0.5))
    dls = DataLoaders(labeled, labeled[:1])
    quiet_fit(Learner(dls, student, CrossEntropyLossFlat(), opt_func=sgd, cbs=mpl), 1, 0.0, wd=0)
    assert mpl.history.signal.tolist() == [0, 0]
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))


class FreezeNorm(Callback):
    order = 100

    def before_batch(self):
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()


def test_frozen_batch_norm_is_tried_with_its_statistics():
    labeled, unlabeled = batches((6,), (8,))
    student, teacher = pair(tiny_net)
    before = deepcopy(student).eval()
    mpl = MetaPseudoLabels(teacher, unlabeled)
    dls = DataLoaders(labeled, labeled)
    quiet_fit(Learner(dls, student, CrossEntropyLossFlat(), opt_func=sgd, cbs=[mpl, FreezeNorm()]), 1, 0.1, wd=0)
    (x, y), after = labeled[0], deepcopy(student).eval()
    with torch.no_grad():
        improvement = F.cross_entropy(before(x), y) - F.cross_entropy(after(x), y)
    assert mpl.history.signal[0] == pytest.approx(improvement.item(), abs=1e-6) != 0
    for name, value in before.named_buffers():
        assert torch.equal(value, after.get_buffer(name)), name


def test_refuses_more_than_one_process(make_mpl, monkeypatch):
    learn = make_mpl()
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 0)
    refused(learn, 'trains in one process')


def test_copy_and_removal(make_mpl, pool):
    learn = make_mpl()
    mpl = learn.meta_pseudo_labels
    with learn.removed_cbs(mpl):
        quiet_fit(learn, 1)
        assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    usable(learn, pool[0])
    learn.remove_cb(mpl)
    assert not [cb for cb in learn.cbs if 'Teacher' in type(cb).__name__]


def test_workers_end_with_the_fit(make_mpl):
    learn = make_mpl(num_workers=1)
    quiet_fit(learn, 1)
    assert not multiprocessing.active_children() and len(learn.meta_pseudo_labels.history) == 3


def refused(learn, match):
    before = snapshot(learn.model)
    own = learn.loss_func
    with pytest.raises(ValueError, match=match) as e:
        quiet_fit(learn, 1)
    sentence = str(e.value).split('\n')[-1].strip()
    assert sentence.endswith('.') and len(sentence) < 400
    assert not moved(learn.model, before) and learn.loss_func is own and not isinstance(own, OneCallLoss)


@pytest.mark.parametrize('cb', [MixUp, CutMix, GradientAccumulation], ids=lambda o: o.__name__)
def test_refuses_neighbours(make_mpl, cb):
    refused(make_mpl(cbs=cb()), f'does not go with {cb.__name__}')


def test_refuses_fixmatch_beside(make_mpl):
    learn = make_mpl()
    learn.add_cb(FixMatch(learn.meta_pseudo_labels.unlabeled_dl))
    refused(learn, 'does not go with FixMatch')


def test_refuses_settings(make_mpl, make_dls):
    model = tiny_net()
    refused(make_mpl(model=model, teacher=nn.Sequential(model)), 'share weights')
    refused(make_mpl(dls=make_dls(bs=64, n_batches=None)), 'fewer labelled images')
    refused(make_mpl(teacher=tiny_net().requires_grad_(False)), 'no parameter that can be trained')
    learn = make_mpl()
    learn.add_cb(MetaPseudoLabels(tiny_net(), learn.meta_pseudo_labels.unlabeled_dl))
    refused(learn, 'two MetaPseudoLabels')
    built = OptimWrapper(opt=torch.optim.SGD(model.parameters(), 0.1))
    refused(make_mpl(model=model, opt_func=built), 'give the teacher its own')


@pytest.mark.parametrize(
    'model,teacher,match',
    [
        (no_bn(), nn.Sequential(no_bn(), nn.Unflatten(1, (2, 5))), 'the teacher returns'),
        (nn.Sequential(no_bn(), nn.Unflatten(1, (2, 5))), no_bn(), 'the student returns'),
        (no_bn(), no_bn(7), 'The teacher has 7 outputs, but the student 10'),
    ],
)
def test_refuses_outputs(model, teacher, match):
    x, y = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)
    u, dls = torch.randn(8, 1, 16, 16), DataLoaders([(x, y)], [(x, y)])
    refused(Learner(dls, model, CrossEntropyLossFlat(), cbs=MetaPseudoLabels(teacher, [(u, u)])), match)


IMAGES, CLASSES = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    'x,y,side,match',
    [
        (IMAGES, torch.zeros(4, 10), 16, 'one class number for each image'),
        (IMAGES, torch.zeros(4), 16, 'one class number for each image'),
        (IMAGES.to(torch.uint8), CLASSES, 16, 'must be float tensors'),
        (IMAGES, CLASSES, 12, 'A view is'),
    ],
    ids=['multi-label', 'regression', 'uint8', 'size'],
)
def test_refuses_labelled_batches(x, y, side, match):
    u, dls = torch.randn(8, 1, side, side), DataLoaders([(x, y)], [(x, y)])
    refused(Learner(dls, tiny_net(), CrossEntropyLossFlat(), cbs=MetaPseudoLabels(tiny_net(), [(u, u)])), match)


@pytest.mark.parametrize(
    'opts,exc,match',
    [
        (dict(teacher=Learner), TypeError, 'give `learn.model`'),
        (dict(unlabeled_dl=3), TypeError, 'must be a loader'),
        (dict(decay=1.0), ValueError, '`decay`'),
        (dict(label_smoothing=1.0), ValueError, '`label_smoothing`'),
        (dict(lambda_u=-1), ValueError, '`lambda_u`'),
        (dict(lambda_u=SchedLin(0, -1)), ValueError, 'throughout'),
        (dict(lr=-1), ValueError, '`lr`'),
        (dict(threshold=2), ValueError, 'threshold'),
        (dict(T=0), ValueError, 'T'),
    ],
)
def test_refuses_arguments(opts, exc, match):
    with pytest.raises(exc, match=match):
        MetaPseudoLabels(**{'teacher': tiny_net(), 'unlabeled_dl': [], **opts})
