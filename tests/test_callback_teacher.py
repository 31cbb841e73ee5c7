"`FixMatch(dl, teacher=ModelEMA(), warmup=0.4)`: an average makes the labels, and a fit begins on labels alone"

import multiprocessing
import random
from copy import deepcopy
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Seen, no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    SGD,
    Callback,
    ConvLayer,
    CrossEntropyLossFlat,
    DataLoaders,
    GradientAccumulation,
    Learner,
    MixUp,
    load_learner,
    nn,
    parent_label,
    set_seed,
)
from in_memory import POLICIES, Half, Pool, Spy, assert_alike, batches, memory, same, sgd
from two_processes import Replicas, in_two

from fixmatch_fastai.all import (
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    ModelEMA,
    Policy,
    PseudoLabels,
    StopOnTrouble,
    WeakTransform,
    weak_augment,
)
from fixmatch_fastai.uncertainty import MCDropout, add_dropout

FORWARDS = ['joint', 'selective']  # with a teacher, `'split'` is `'joint'`: see `test_joint_is_split`


def taught(net, data=None, forward='joint', policy=None, n_epoch=2, lr=0.1, ema=None, cbs=(), **kwargs):
    "A learner after a fit on batches of random images, `FixMatch` with a teacher, and what its passes were"
    labeled, unlabeled = data or batches()
    seen = Seen()
    policy, ema = policy or FixedThreshold(0.18), ema or ModelEMA(0.7)
    fm = FixMatch(unlabeled, forward=forward, policy=policy, teacher=ema, **kwargs)
    dls = DataLoaders(labeled, labeled[:1])
    learn = Learner(dls, deepcopy(net), CrossEntropyLossFlat(), opt_func=sgd, cbs=[fm, seen, *cbs])
    set_seed(0)
    if n_epoch:
        quiet_fit(learn, n_epoch, lr, wd=0.0)
    return learn, seen


# --- what is computed


def taught_by_hand(model, labeled, unlabeled, threshold, lambda_u, lr, decay, n_alone):
    "Mean Teacher's average makes the pseudo-labels of algorithm 1; the first steps are on labels alone"
    opt, unlabeled = torch.optim.SGD(model.parameters(), lr), iter(unlabeled)
    average, rates = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    model.train()
    for i, (x, y) in enumerate(labeled):
        if i < n_alone:
            loss = F.cross_entropy(model(x), y)
        else:
            weak, strong = next(unlabeled)
            teacher = deepcopy(model).eval()  # with BatchNorm's statistics of now
            with torch.no_grad():
                for n, p in teacher.named_parameters():
                    p.copy_(average[n])
                confidence, target = teacher(weak).softmax(1).max(1)
            counts = confidence.ge(threshold)
            logits = model(torch.cat([x, strong]))
            losses = F.cross_entropy(logits[len(x) :], target, reduction='none')
            loss = F.cross_entropy(logits[: len(x)], y) + lambda_u * (counts * losses).sum() / len(weak)
            rates.append(counts.float().mean().item())
        opt.zero_grad()
        loss.backward()
        opt.step()
        average = {n: decay * average[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    return average, rates


@pytest.mark.parametrize('n_alone', [0, 3])
@pytest.mark.parametrize('net', [tiny_net, no_bn], ids=['BatchNorm', 'no norm'])
def test_fit_with_a_teacher_equals_the_loop_by_hand(net, n_alone):
    labeled, unlabeled = batches(8)
    unlabeled = Pool(o[:2] for o in unlabeled)
    set_seed(0)
    theirs = net()
    learn, _ = taught(
        theirs, (labeled, unlabeled), policy=FixedThreshold(0.2), n_epoch=1, warmup=n_alone / 8, lambda_u=0.7
    )
    average, rates = taught_by_hand(theirs, labeled, unlabeled, 0.2, lambda_u=0.7, lr=0.1, decay=0.7, n_alone=n_alone)
    assert 0 < sum(rates) < len(rates), 'a test in which all count, or none, would show little'
    assert learn.fix_match.history.mask_rate.dropna().tolist() == pytest.approx(rates)
    ours = learn.model_ema.state_dict()
    for n, p in theirs.named_parameters():
        torch.testing.assert_close(ours['raw'][n], p.detach(), rtol=1e-6, atol=1e-6, msg=n)
        torch.testing.assert_close(ours['average'][n], average[n], rtol=1e-6, atol=1e-6, msg=n)
        same(dict(learn.model.named_parameters())[n].detach(), ours['average'][n])
    for (n, a), b in zip(learn.model.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=n)


def test_joint_is_split():
    "There is but one way to ask a teacher"
    net = tiny_net()
    (joint, a), (split, b) = (taught(net, forward=o) for o in ('joint', 'split'))
    same(dict(joint.model.state_dict()), dict(split.model.state_dict()))
    same(joint.model_ema.state_dict(), split.model_ema.state_dict())
    assert a.passes == b.passes == [(16, True)] * 8, 'weak images are not in the pass with gradient'


# one that asks for labelled logits, one that hooks the network, and two at once; the matrix trains each with a teacher
@pytest.mark.parametrize('name', ['AdaMatch', 'FeatureDensity', 'FlexMatch | FreeMatch'])
def test_policies_with_a_teacher_learn_the_same_in_every_forward(name):
    net, data = no_bn(), batches(8 if name == 'FeatureDensity' else 4)
    joint, other = (taught(net, data, o, POLICIES[name](), lr=0.05)[0] for o in FORWARDS)
    assert joint.fix_match.history.loss_u.max() > 0
    assert_alike(joint.model.parameters(), other.model.parameters())
    assert_alike(memory(joint, nan=7).values(), memory(other, nan=7).values(), 1e-4)


@pytest.mark.parametrize('forward', FORWARDS)
def test_a_policys_own_passes_are_the_teachers(forward):
    policy = MCDropout(n_passes=2, at_most=0.01)
    learn, seen = taught(add_dropout(no_bn(), 0.3), forward=forward, policy=policy)
    assert 0 < learn.fix_match.history.mask_rate.mean() < 1
    assert all(grad for _, grad in seen.passes), 'the student has none without gradient'


class Note(FixedThreshold):
    "What it is given, and what it should be"

    def __init__(self, teacher, needs_labeled):
        super().__init__(0.15)
        self.teacher, self.needs_labeled, self.seen = [teacher], needs_labeled, []

    def forward(self, batch):
        net = self.teacher[0].ema.module
        assert not net.training and not any(m.training for m in net.modules())
        assert not batch.logits_weak.requires_grad
        with torch.no_grad():
            same(batch.logits_weak, net(batch.weak))
            if self.needs_labeled:
                same(batch.logits_x, net(batch.x))
        self.seen.append(batch)
        return super().forward(batch)


@pytest.mark.parametrize('needs_labeled', [False, True])
@pytest.mark.parametrize('forward', FORWARDS)
def test_the_teacher_judges(forward, needs_labeled):
    "In eval mode, without gradient; labelled images too for those who need them; the student's own logits are others"
    ema = ModelEMA(0.7)
    note, net = Note(ema, needs_labeled), tiny_net()
    data = batches()
    learn, seen = taught(net, data, forward, note, ema=ema)
    assert len(note.seen) == 8 and all(o.x.shape == data[0][0][0].shape for o in note.seen)
    assert all(grad for _, grad in seen.passes), "the student has no pass of the teacher's"
    assert len(learn.fix_match.history) == 8 and not any(p.requires_grad for p in ema.ema.parameters())


# --- warm-up


def drop_net():
    body = ConvLayer(1, 8, stride=2), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*body, nn.Dropout(0.3), nn.Linear(128, 10))


class Steps(Callback):
    "All there is after each step, random numbers too, and the processes that run"

    order, run_valid = 100, False

    def __init__(self):
        self.seen, self.children, self.calls = [], [], []

    def after_step(self):
        model = [v.clone() for v in self.model.state_dict().values()]
        opt = [t.clone() for o in self.opt.state_dict()['state'] for t in o.values() if isinstance(t, torch.Tensor)]
        numbers = random.getstate(), np.random.get_state()[1].tolist()
        self.seen.append((model, opt, torch.get_rng_state(), *numbers))
        self.children.append(len(multiprocessing.active_children()))


@pytest.mark.parametrize(
    'method,teacher,num_workers', [('fit', False, 0), ('fit_one_cycle', True, 0), ('fit_one_cycle', False, 1)]
)
def test_warm_up_is_plain_training(make_dls, make_learner, pool, method, teacher, num_workers):
    "Bit by bit, with labelled images and dropout that are random; no unlabelled image is opened, and no worker started"
    opened, tfm = [], FixMatchTransform(weak=weak_augment(flip=False))

    def views(img):
        opened.append(img)
        return tfm(img)

    def run(fixmatch):
        dls = make_dls(item_tfms=WeakTransform(weak_augment(flip=False)))
        loader = dls.unlabeled_dl(pool, mu=2, tfm=views, num_workers=num_workers)
        opts = dict(teacher=ModelEMA(half_life=2) if teacher else None, warmup=0.5)
        learn = make_learner(dls=dls, model=drop_net(), loader=loader, fixmatch=opts)
        if not fixmatch:
            learn.remove_cb(FixMatch)
        steps = Steps()
        steps.after_batch = lambda: steps.calls.append(len(opened))
        set_seed(3)
        quiet_fit(learn, 4, 1e-2, method=method, cbs=steps)
        return learn, steps

    (plain, a), (learn, b) = (run(o) for o in (False, True))
    assert len(a.seen) == len(b.seen) == 12
    for i in range(6):
        same(a.seen[i][:3], b.seen[i][:3], msg=f'step {i}')
        assert a.seen[i][3:] == b.seen[i][3:], f'random numbers of step {i}'
    changed = [not torch.equal(p, q) for p, q in zip(a.seen[-1][0], b.seen[-1][0])]
    assert any(changed), 'the unlabelled images must do something afterwards'
    assert b.children == [0] * 6 + [num_workers] * 6
    if num_workers == 0:
        assert b.calls == [0] * 6 + [8 * i for i in range(1, 7)]
    assert plain.recorder.losses[:6] == learn.recorder.losses[:6]


def test_loader_is_not_touched():
    "Any loader: it isn't even iterated"

    class Counts(Pool):
        n = 0

        def __iter__(self):
            self.n += 1
            return super().__iter__()

    labeled, unlabeled = batches()
    unlabeled, seen = Counts(unlabeled), []

    class Look(Callback):
        run_valid = False

        def after_batch(self):
            seen.append(unlabeled.n)

    taught(tiny_net(), (labeled, unlabeled), warmup=0.5, cbs=[Look()])
    assert seen == [0] * 4 + [1] * 4


@pytest.mark.parametrize('warmup,n_alone', [(0, 0), (0.01, 1), (0.4, 5), (0.5, 6), (0.99, 12)])
def test_share_of_the_fit(make_learner, warmup, n_alone):
    "Columns and history have no number where nothing unlabelled was seen"
    learn = make_learner(fixmatch=dict(warmup=warmup))
    quiet_fit(learn, 4)
    history = learn.fix_match.history
    assert len(history) == 12 and history.loss_x.notna().all()
    for name in ('loss_u', 'mask_rate'):
        assert history[name].isna().tolist() == [True] * n_alone + [False] * (12 - n_alone)
    assert history.pseudo_acc[:n_alone].isna().all()
    names = learn.recorder.metric_names
    for epoch, values in enumerate(learn.recorder.values):
        rows = history[3 * epoch : 3 * epoch + 3]
        for name in ('loss_x', 'loss_u', 'mask_rate'):
            mean = pytest.approx(rows[name].mean(), rel=1e-5, nan_ok=True)
            assert values[names.index(name) - 1] == mean, (epoch, name)
    assert len(learn.validate()) == 2


def test_schedules_go_over_the_whole_fit():
    "A schedule of `lambda_u` begins with the fit"
    seen = []

    def lambda_u(pct):
        seen.append(pct)
        return pct

    taught(tiny_net(), lambda_u=lambda_u, warmup=0.5)
    assert seen[3:] == pytest.approx([0.5, 0.625, 0.75, 0.875]), 'three are those of the check of the argument'


def test_average_begins_with_the_warm_up():
    learn, _ = taught(tiny_net(), warmup=0.5)
    assert learn.model_ema.steps == 8


def test_plot_of_a_warm_up(make_dls, make_learner):
    "Steps on labels alone are shaded; classes are drawn where they were counted"
    opts = dict(policy=FlexMatch(0.15), threshold=0.95, warmup=0.5)
    learn = make_learner(dls=make_dls(n_batches=20), fixmatch=opts)
    quiet_fit(learn, 2)
    axs = learn.fix_match.plot()
    for ax in axs[:2]:
        assert 'labels alone' in [o.get_text() for o in ax.get_legend().get_texts()]
        (shade,) = [o for o in ax.patches if o.get_label() == 'labels alone']
        assert shade.get_x() == 0 and shade.get_width() == 20
    by_class = learn.semi_recorder.by_class
    assert by_class['step'][0] > 20 and by_class['step'][-1] == 40 and by_class['predicted'].sum() == 20 * 8
    plt.close('all')
    plain = make_learner()
    quiet_fit(plain, 1)
    assert 'labels alone' not in [o.get_text() for o in plain.fix_match.plot()[0].get_legend().get_texts()]
    plt.close('all')


def test_plot_of_a_fit_on_labels_alone(make_learner):
    learn = make_learner(fixmatch=dict(warmup=0.99))
    quiet_fit(learn, 2)
    assert learn.fix_match.history.loss_u.isna().all()
    learn.fix_match.plot()
    plt.close('all')


class NoneCounts(Policy):
    "Of the classes in turn"

    def forward(self, batch):
        n = len(batch.weak)
        return PseudoLabels(torch.arange(n) % 10, torch.zeros(n))


@pytest.mark.slow
@pytest.mark.parametrize('warmup,warned', [(0.1, True), (0.5, False)])
def test_trouble_is_of_unlabelled_steps(make_dls, make_learner, warmup, warned):
    "108 or 60 of 120 steps on unlabelled images, none of which counts: a hundred are asked for"
    opts = dict(policy=NoneCounts(), threshold=0.95, warmup=warmup)
    learn = make_learner(dls=make_dls(n_batches=60), fixmatch=opts, cbs=[StopOnTrouble()])
    if warned:
        with pytest.warns(UserWarning, match='No pseudo-label has counted for 100 steps'):
            quiet_fit(learn, 2)
    else:
        quiet_fit(learn, 2)
        assert len(learn.fix_match.history) == 120
    assert list(learn.fix_match.trouble) == ['none_counts'] * warned


def test_warning_of_a_loss_that_is_nan_in_the_warm_up(make_learner):
    class Spoil(Callback):
        order, run_valid = 4, False

        def before_batch(self):
            if self.train_iter == 2:
                self.learn.xb = (self.xb[0] * float('nan'),)

    learn = make_learner(fixmatch=dict(warmup=0.5), cbs=[Spoil()])
    with pytest.warns(UserWarning, match='not a finite number since step 2'):
        quiet_fit(learn, 2)


# --- beside what people use


@pytest.mark.parametrize('forward,dtype', [('joint', torch.bfloat16), ('selective', torch.float16)], ids=str)
def test_half_precision_logits_of_student_and_teacher(forward, dtype):
    "Logits of either network may be of half precision: the policy gets float32, and no autocast"
    spy = Spy(threshold=0.1)
    labeled, unlabeled = batches()
    fm = FixMatch(unlabeled, policy=spy, forward=forward, teacher=ModelEMA(0.7), warmup=0.25)
    learn = Learner(DataLoaders(labeled, labeled[:1]), Half(dtype), CrossEntropyLossFlat(), opt_func=SGD, cbs=fm)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        quiet_fit(learn, 2)
    b = spy.batch
    assert not spy.grad and not spy.autocast
    assert b.logits_weak.dtype == torch.float32
    assert b.logits_x is None if forward == 'selective' else b.logits_x.dtype == torch.float32
    assert all(o.dtype == torch.float32 for o in learn.model_ema.ema.module.parameters())
    assert learn.fix_match.history.loss_u[2:].notna().all()


def test_teacher_runs_inside_autocast():
    "Which is entered between FixMatch's `before_batch` and the teacher's pass"
    seen = []

    class Autocast(Callback):
        order, run_valid = 10, False  # where MixedPrecision enters it

        def before_batch(self):
            self.context = torch.autocast('cpu', torch.bfloat16)
            self.context.__enter__()

        def after_loss(self):
            self.context.__exit__(None, None, None)

    class Notes(nn.Module):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), x.dtype))
            return x

    taught(nn.Sequential(tiny_net(), Notes()), n_epoch=1, cbs=[Autocast()])
    assert seen[:8] == [(False, torch.bfloat16), (True, torch.bfloat16)] * 4


@pytest.mark.parametrize('cb', [MixUp, lambda: GradientAccumulation(8)], ids=['MixUp', 'GradientAccumulation'])
def test_warm_up_beside(make_learner, cb):
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=2), warmup=0.25), cbs=[cb()])
    quiet_fit(learn, 4)
    assert len(learn.fix_match.history) == 12
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert type(learn.loss_func) is CrossEntropyLossFlat and len(learn.validate()) == 2


@pytest.mark.parametrize('before', [False, True], ids=['before the first fit', 'between two fits'])
def test_lr_find_leaves_teacher_and_policy(make_learner, before):
    "It leaves weights, average and policy as they were, and no warm-up in it"
    opts = dict(policy=FreeMatch(decay=0.5), threshold=0.95, teacher=ModelEMA(half_life=2), warmup=0.5)
    learn = make_learner(fixmatch=opts)
    reference = deepcopy(learn.model.state_dict())
    if before:
        quiet_fit(learn, 2)

    def state():
        ema = learn.model_ema.state_dict() if hasattr(learn, 'model_ema') else {}
        return deepcopy((dict(learn.model.state_dict()), ema, memory(learn), learn.fix_match.history))

    was, steps = state(), []
    learn.add_cb(Passes(steps))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
    assert min(steps) > 4, 'unlabelled images from the first step on'
    weights, ema, policy, history = state()
    same(weights, was[0])
    same(ema, was[1])
    assert history.equals(was[3])
    if before:
        same(policy, was[2])
    else:
        same(weights, dict(reference))
        start = FreeMatch(decay=0.5)
        start.setup(10, 100, learn.model)
        same(policy, dict(start.state_dict()))
    quiet_fit(learn, 2)
    assert learn.fix_match.history.loss_u.isna().tolist() == [True] * 3 + [False] * 3
    assert learn.model_ema.averaged and learn.model_ema.steps == (12 if before else 6)


class Passes(Callback):
    "How many images the model trains on"

    order, run_valid = 100, False

    def __init__(self, seen):
        self.seen = seen

    def before_batch(self):
        self.seen.append(len(self.x))


def test_lr_find_changes_no_fit():
    "A fit after it is the fit without it"

    def run(find):
        learn, _ = taught(net, policy=FlexMatch(0.15), n_epoch=0)
        if find:
            with learn.no_bar(), learn.no_logging():
                learn.lr_find(num_it=6, show_plot=False)
        set_seed(4)
        quiet_fit(learn, 2, 0.1, reset_opt=True)
        return learn

    net = tiny_net()
    a, b = run(False), run(True)
    same(dict(a.model.state_dict()), dict(b.model.state_dict()))
    same(memory(a), memory(b))


class CountsSteps(Policy):
    "Remembers in how many steps it was asked"

    def setup(self, n_classes, n_unlabeled, model):
        self.remember(n=torch.tensor(0))

    def forward(self, batch):
        self.n += 1
        return PseudoLabels(batch.logits_weak.argmax(1), torch.ones(len(batch.weak)))


def test_memory_stays_when_weights_are_loaded(make_learner):
    "As it does without a teacher: the average is made anew, the policy goes on"

    def run(teacher):
        learn = make_learner(fixmatch=dict(policy=CountsSteps(), threshold=0.95, teacher=teacher))
        learn.save('first')
        quiet_fit(learn, 2)
        learn.load('first')
        quiet_fit(learn, 2)
        return learn

    learn = run(ModelEMA(half_life=2))
    assert learn.fix_match.policy.n == run(None).fix_match.policy.n == 12
    assert learn.model_ema.steps == 6


def test_another_model_is_another_memory(make_learner):
    opts = dict(policy=CountsSteps(), threshold=0.95, teacher=ModelEMA(half_life=2))
    learn = make_learner(fixmatch=opts)
    quiet_fit(learn, 1)
    learn.model = no_bn()
    learn.create_opt()
    quiet_fit(learn, 1)
    assert learn.fix_match.policy.n == 3


# --- where the teacher comes from


# what the Learner gets, and what `fit`
GIVEN = {
    'FixMatch': lambda fm, teacher: ([fm], []),
    'FixMatch, teacher': lambda fm, teacher: ([fm, teacher], []),
    'teacher, FixMatch': lambda fm, teacher: ([teacher, fm], []),
    'FixMatch to fit': lambda fm, teacher: ([], [fm]),
    'both to fit': lambda fm, teacher: ([], [teacher, fm]),
    'teacher to fit': lambda fm, teacher: ([fm], [teacher]),
    'teacher, FixMatch to fit': lambda fm, teacher: ([teacher], [fm]),
}


def fitted_twice(make_learner, give):
    "The learner, the teacher, and after each fit weights, average and columns"
    teacher = ModelEMA(half_life=2)
    learn = make_learner(fixmatch=dict(teacher=teacher))
    fm = learn.fix_match
    learn.remove_cb(fm)
    to_learner, to_fit = give(fm, teacher)
    learn.add_cbs(to_learner)
    fits = []
    for _ in range(2):
        set_seed(2)
        quiet_fit(learn, 2, cbs=to_fit, reset_opt=True)
        model, average = dict(learn.model.state_dict()), dict(teacher.ema.module.named_parameters())
        fits.append((*deepcopy((model, average)), [list(o) for o in learn.recorder.values]))
    return learn, teacher, fits


@pytest.mark.slow
def test_teacher_given_anywhere(make_learner):
    "Wherever it is given, one and the same average makes the labels, validates and is what is left; twice"
    _, _, expected = fitted_twice(make_learner, GIVEN['FixMatch'])
    plain = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    for where, give in GIVEN.items():
        learn, teacher, fits = fitted_twice(make_learner, give)
        for (model, average, values), (expected_model, _, expected_values) in zip(fits, expected, strict=True):
            same(model, expected_model, msg=where)
            same({name: model[name] for name in average}, average, msg=where)
            for row, expected_row in zip(values, expected_values, strict=True):
                assert row == pytest.approx(expected_row, nan_ok=True), where
        assert teacher.steps == 12, where
        to_learner, to_fit = ([type(o) for o in cbs] for cbs in give(FixMatch([]), teacher))
        seated = ModelEMA in to_learner or not to_fit
        assert len(learn._grab_cbs(ModelEMA)) == seated, where
        if not to_fit:
            learn.remove_cb(FixMatch)
            assert bool(learn._grab_cbs(ModelEMA)) == (ModelEMA in to_learner), 'what was given stays'
        with learn.no_bar():
            assert len(learn.validate()) == 2, where
        quiet_fit(learn, 1)
        assert learn.recorder.metric_names == plain or where == 'teacher to fit'


def test_teacher_comes_and_goes_with_fixmatch(make_learner):
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=2)))
    teacher = learn.fix_match.teacher
    quiet_fit(learn, 1)
    assert learn.model_ema is teacher
    for _ in range(2):
        with learn.removed_cbs(list(learn.cbs)):
            assert not learn.cbs
    quiet_fit(learn, 1)
    assert len(learn._grab_cbs(ModelEMA)) == 1 and teacher.steps == 6
    fm = learn.fix_match
    learn.remove_cb(ModelEMA)
    quiet_fit(learn, 1)
    assert learn.model_ema is teacher
    learn.remove_cb(fm)
    assert not learn._grab_cbs(ModelEMA) and not hasattr(learn, 'model_ema')
    learn.add_cb(fm)
    quiet_fit(learn, 1)
    assert learn.model_ema is teacher and len(fm.history) == 3


@pytest.mark.parametrize('first', [True, False])
def test_another_average_beside_it(make_learner, first):
    "Two averages in one learner can't be meant; it stays usable"
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=2)))
    fm, other = learn.fix_match, ModelEMA(half_life=3)
    learn.remove_cb(fm)
    learn.add_cbs([other, fm] if first else [fm, other])
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=r'has another ModelEMA .*`FixMatch\(unlabeled_dl, teacher=learn\.model_ema'):
        quiet_fit(learn, 1)
    same(dict(learn.model.state_dict()), dict(before))
    assert type(learn.loss_func) is CrossEntropyLossFlat and fm.stream is None and fm.teacher.ema is None
    learn.remove_cb(ModelEMA)
    quiet_fit(learn, 1)
    assert learn.model_ema is fm.teacher and len(learn.validate()) == 2 and len(fm.history) == 3


def test_the_learners_average_as_teacher(make_learner, make_dls, pool):
    "As the error says: one that has already averaged goes on"
    learn = make_learner(cbs=[ModelEMA(half_life=2)])
    quiet_fit(learn, 1)
    learn.remove_cb(FixMatch)
    learn.add_cb(FixMatch(learn.dls.unlabeled_dl(pool, mu=2), threshold=0.2, teacher=learn.model_ema))
    quiet_fit(learn, 1)
    assert learn.model_ema.steps == 6 and len(learn._grab_cbs(ModelEMA)) == 1


# --- what is left after a fit


def says(learn, x):
    with torch.no_grad():
        return learn.model.eval()(x).as_subclass(torch.Tensor)


@pytest.mark.parametrize('forward', FORWARDS)
def test_predictions_and_export_are_the_averages(make_learner, pool, forward):
    opts = dict(policy=FlexMatch(0.15), threshold=0.95, teacher=ModelEMA(half_life=2), warmup=0.25)
    learn = make_learner(fixmatch=dict(opts, forward=forward))
    quiet_fit(learn, 2)
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad():
        same(says(learn, x), learn.model_ema.ema.module(x))
    last = learn.recorder.values[-1][1:3]
    with learn.no_bar():
        assert list(learn.validate()) == pytest.approx(last, rel=1e-4)
        preds = learn.get_preds()[0]
        learn.export()
        loaded = load_learner(learn.path / 'export.pkl')
        same(loaded.get_preds(dl=learn.dls.valid)[0], preds)
        cls, _, probs = learn.predict(pool[0])
        cls_, _, probs_ = loaded.predict(pool[0])
    assert cls == cls_
    same(probs, probs_)
    assert len(loaded._grab_cbs(ModelEMA)) == 1 and loaded.fix_match.teacher is loaded.model_ema
    with pytest.raises(ValueError, match='without its unlabelled images'):
        loaded.dls = learn.dls
        quiet_fit(loaded, 1)
    loaded.remove_cb(FixMatch)
    assert not loaded._grab_cbs(ModelEMA)
    loaded.add_cb(FixMatch(learn.dls.unlabeled_dl(pool, mu=2), threshold=0.2, teacher=ModelEMA(half_life=2)))
    quiet_fit(loaded, 2)
    assert len(loaded.fix_match.history) == 6 and loaded.model_ema.averaged
    quiet_fit(learn, 1)
    assert learn.model_ema.steps == 9


def test_pictures_show_the_teachers_labels(make_learner):
    "In the midst of a fit, where the two networks differ; their modes stay as they are"
    learn = make_learner(fixmatch=dict(threshold=0.15, teacher=ModelEMA(half_life=5)))
    seen = []

    class Peek(Callback):
        order, run_valid = 100, False

        def after_batch(self):
            fm = self.learn.fix_match
            batch, truth, weak, strong = fm.peek()
            average = fm.teacher.ema.module
            with torch.no_grad():
                same(batch.logits_weak, average(batch.weak))
                same(batch.logits_x, average(batch.x))
                student = deepcopy(self.model).eval()(batch.weak).as_subclass(torch.Tensor)
            seen.append((student - batch.logits_weak).abs().max().item())
            assert self.model.training and not average.training
            fm.show_pseudo_labels(2)
            plt.close('all')

    quiet_fit(learn, 1, 0.1, cbs=Peek())
    assert len(seen) == 3 and min(seen) > 1e-3 and len(learn.fix_match.history) == 3


def test_pictures_before_a_fit_show_the_models_labels(make_learner):
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=5), warmup=0.5))
    batch, *_ = learn.fix_match.peek()
    same(batch.logits_weak, says(learn, batch.weak))
    learn.fix_match.show_pseudo_labels(2)
    plt.close('all')


# --- interrupts


class Stop(Callback):
    "Raises at `event`, from step `at` on"

    def __init__(self, event, at, order):
        self._event, self._at, self.order = event, at, order

    def __call__(self, event_name):
        if event_name == self._event and getattr(self.learn, 'train_iter', 0) >= self._at:
            raise KeyboardInterrupt('stop')


# those in which FixMatch and the teacher do something: before both, in the warm-up, and after both, when it is over
FIRST = [(o, 'warm-up', -20) for o in ('before_fit', 'before_train', 'before_batch', 'after_loss', 'before_validate')]
LAST = [(o, 'after', 55) for o in ('before_batch', 'after_pred', 'after_loss', 'after_step')]
LAST += [(o, 'after', 55) for o in ('before_validate', 'after_epoch', 'after_fit')]


@pytest.mark.parametrize('event,when,order', FIRST + LAST)
def test_learner_with_a_teacher_is_usable_after_an_interrupt(make_learner, pool, event, when, order):
    "It predicts with the average, exports, and trains on"
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=2), warmup=0.5))  # three of six steps
    within = event in ('before_batch', 'after_pred', 'after_loss', 'after_step')
    at = (0 if when == 'warm-up' else 3) + within
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 2, cbs=Stop(event, at, order))
    fm = learn.fix_match
    with learn.no_bar():
        preds = learn.get_preds()[0]
        assert learn.predict(pool[0])[0] in learn.dls.vocab
        assert type(learn.loss_func) is CrossEntropyLossFlat and fm.stream is None
        assert len(learn.validate()) == 2
        teacher = fm.teacher
        assert learn.model_ema is teacher
        if when == 'after' or event not in ('before_fit', 'before_train'):  # before these there is no average
            assert teacher.ema is not None and teacher.averaged
            steps = teacher.steps
            assert steps > 0 or at == 0
            x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
            torch.testing.assert_close(teacher.ema.module(x).softmax(1), preds, rtol=1e-5, atol=1e-6)
        learn.export()
        same(load_learner(learn.path / 'export.pkl').get_preds(dl=learn.dls.valid)[0], preds)
    had = teacher.steps
    quiet_fit(learn, 2)
    assert fm.history.loss_u.isna().tolist() == [True] * 3 + [False] * 3
    assert teacher.steps == had + 6 and teacher.averaged
    assert fm.stream is None and not multiprocessing.active_children()


def test_ctrl_c_in_the_teachers_pass():
    class Breaks(nn.Module):
        left = 3

        def forward(self, x):
            if not torch.is_grad_enabled() and stop.on:
                stop.left -= 1
                if stop.left == 0:
                    raise KeyboardInterrupt
            return x

    stop = SimpleNamespace(left=3, on=True)
    learn, _ = taught(nn.Sequential(tiny_net(), Breaks()), n_epoch=0)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1)
    stop.on = False
    assert learn.get_preds(dl=batches()[0][:1])[0].shape == (4, 10) and learn.model_ema.averaged
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 8


def test_interrupted_fit_with_a_teacher_given_to_fit(make_learner):
    "Nothing of it stays with the learner"
    learn = make_learner(fixmatch=dict(teacher=ModelEMA(half_life=2)))
    fm = learn.fix_match
    learn.remove_cb(fm)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=[fm, Stop('after_pred', 1, 55)])
    assert type(learn.loss_func) is CrossEntropyLossFlat and not learn._grab_cbs(ModelEMA) and fm.stream is None
    quiet_fit(learn, 1, cbs=fm)
    assert fm.teacher.steps == 1 + 3


# --- processes and devices


@pytest.mark.parametrize('forward', FORWARDS)
def test_replicas_with_a_teacher(make_learner, forward):
    "DataParallel's split of a batch changes nothing, without BatchNorm"
    opts = dict(threshold=0.05, forward=forward, warmup=0.25)
    plain, parallel = (
        make_learner(model=no_bn(), fixmatch=dict(opts, teacher=ModelEMA(half_life=2))) for _ in range(2)
    )
    parallel.model.load_state_dict(plain.model.state_dict())
    parallel.model = net = Replicas(parallel.model, 2)
    for o in (plain, parallel):
        set_seed(1)
        quiet_fit(o, 4)
    for p, q in zip(plain.model.parameters(), net.module.parameters()):
        torch.testing.assert_close(p, q)
    for p, q in zip(plain.model_ema.ema.parameters(), parallel.model_ema.ema.parameters()):
        torch.testing.assert_close(p, q)
    assert len(net.seen) > 12


def fit_in_two(rank, make_dls, pool, path):
    dls = make_dls(n_batches=6)
    tfm = FixMatchTransform(weak=weak_augment(flip=False))
    loader = dls.unlabeled_dl(pool, mu=2, tfm=tfm, label_func=parent_label)
    set_seed(0)
    fm = FixMatch(loader, policy=FreeMatch(decay=0.9), teacher=ModelEMA(half_life=2), warmup=0.5)
    learn = Learner(dls, tiny_net(), opt_func=SGD, path=path, cbs=fm)
    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, 2, 0.1, wd=0.0)
    ema = fm.teacher.state_dict()
    average = {n: v for n, v in ema['average'].items() if n in ema['raw']}
    return dict(
        raw=ema['raw'],
        average=average,
        policy=dict(fm.policy.state_dict()),
        alone=fm.history.loss_u.isna().tolist(),
        params=[p.detach() for p in learn.model.parameters()],
    )


def test_teacher_in_two_processes(make_dls, pool, tmp_path):
    pytest.importorskip('accelerate')
    a, b = in_two(fit_in_two, tmp_path, make_dls, pool, tmp_path)
    for part in ('raw', 'average', 'policy', 'params'):
        same(a[part], b[part])
    same(a['params'], list(a['average'].values()))
    n = len(a['alone'])
    assert a['alone'] == b['alone'] == [True] * (n // 2) + [False] * (n - n // 2)
