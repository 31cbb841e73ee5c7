"Multi-label: the formula and training by hand, errors, the three passes, columns, and what must keep working"

import math
import re
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Seen, no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    BCEWithLogitsLossFlat,
    Callback,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoaders,
    GradientAccumulation,
    ImageBlock,
    IndexSplitter,
    Learner,
    MixedPrecision,
    MixUp,
    MultiCategoryBlock,
    OptimWrapper,
    PILImageBW,
    accuracy_multi,
    load_learner,
    nn,
    parent_label,
    set_seed,
)

from fixmatch_fastai.all import (
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    ModelEMA,
    MultiLabelThreshold,
    Policy,
    PseudoLabels,
    SaveFixMatch,
    SemiBatch,
    fixmatch_check,
    weak_augment,
)
from fixmatch_fastai.uncertainty import ScoreThreshold, compare_scores, entropy

C = 5
FORWARDS = ['joint', 'split', 'selective']
NEAR = partial(MultiLabelThreshold, 0.52, 0.49)  # of a fresh network some count, and some do not
sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def batches(sizes_x=(4, 4, 4), sizes_u=(8, 8, 8)):
    g = torch.Generator().manual_seed(1)
    labeled = [(torch.randn(n, 1, 16, 16, generator=g), (torch.rand(n, C, generator=g) < 0.3).float()) for n in sizes_x]
    return labeled, [(torch.randn(n, 1, 16, 16, generator=g), torch.randn(n, 1, 16, 16, generator=g)) for n in sizes_u]


def learner(model=None, policy=None, data=None, cbs=(), loss=None, **kwargs):
    labeled, unlabeled = data or batches()
    cbs = [FixMatch(unlabeled, policy=policy or NEAR(), **kwargs), *cbs]
    dls, loss = DataLoaders(labeled, labeled[:1]), loss or BCEWithLogitsLossFlat()
    return Learner(dls, model or no_bn(C), loss, opt_func=sgd, metrics=accuracy_multi, cbs=cbs)


# --- the policy


def by_formula(logits, positive, negative):
    "Targets and weights in float64, entry by entry; targets are NaN where nothing counts"
    targets, weights = np.full(logits.shape, np.nan), np.zeros(logits.shape)
    for i, row in enumerate(logits):
        for k, logit in enumerate(row):
            p = 1 / (1 + math.exp(-logit))
            if p >= positive[k]:
                targets[i, k], weights[i, k] = 1, 1
            elif p <= negative[k]:
                targets[i, k], weights[i, k] = 0, 1
    return targets, weights


@pytest.mark.parametrize(
    'positive,negative',
    [
        (0.95, 0.05),
        (0.6, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0.9, 0.8, 0.7, 0.6, 0.55], 0.5),
        (np.array([0.9, 0.4, 0.7, 0.6, 1]), torch.tensor([0.05, 0.3, 0, 0.5, 0.1])),
    ],
)
def test_multi_label_equals_formula(positive, negative):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, C)).astype(np.float32)
    strong = rng.normal(0, 3, (40, C)).astype(np.float32)
    each = [np.broadcast_to(np.asarray(o, dtype=float), C) for o in (positive, negative)]
    targets, weights = by_formula(logits.astype(float), *each)
    assert 0.05 < weights.mean() < 0.95
    policy = MultiLabelThreshold(positive, negative)
    policy.setup(C, None, None)
    pseudo = policy(SemiBatch(logits_weak=torch.from_numpy(logits)))
    assert pseudo.targets.shape == pseudo.weights.shape == (40, C)
    assert pseudo.targets.dtype == pseudo.weights.dtype == torch.float32
    np.testing.assert_array_equal(pseudo.weights, weights)
    counts = weights > 0
    np.testing.assert_array_equal(pseudo.targets[counts], targets[counts])
    loss = policy.loss(torch.from_numpy(strong), pseudo)
    assert loss.shape == (40, C)
    p = 1 / (1 + np.exp(-strong.astype(float)))
    expected = -np.where(targets == 1, np.log(p), np.log(1 - p))
    np.testing.assert_allclose(loss[counts], expected[counts], rtol=1e-4, atol=1e-6)


def test_on_and_beside_the_thresholds():
    "On a threshold counts; just inside does not; certainty is asked for by 1 and 0"
    p = torch.tensor([[0.75, 0.25], [0.7499, 0.2501]])
    policy = MultiLabelThreshold(0.75, 0.25)
    targets, weights = policy(SemiBatch(logits_weak=p.logit()))
    assert weights.tolist() == [[1, 1], [0, 0]] and targets[0].tolist() == [1, 0]
    _, weights = MultiLabelThreshold(1, 0)(SemiBatch(logits_weak=torch.tensor([[200.0, -200.0, 5.0, -5.0]])))
    assert weights.tolist() == [[1, 1, 0, 0]]
    _, weights = policy(SemiBatch(logits_weak=torch.full((1, 2), math.nan)))
    assert weights.sum() == 0


def test_each_class_by_itself():
    "Not a softmax: what one class says does not change another"
    logits = torch.tensor([[4.0, 0.0, -4.0]])
    a = MultiLabelThreshold()(SemiBatch(logits_weak=logits))
    b = MultiLabelThreshold()(SemiBatch(logits_weak=logits + torch.tensor([0.0, 9.0, 0.0])))
    assert a.weights.tolist() == [[1, 0, 1]] and b.weights.tolist() == [[1, 1, 1]]
    assert a.targets[0, [0, 2]].tolist() == b.targets[0, [0, 2]].tolist() == [1, 0]


@pytest.mark.parametrize(
    'args,match',
    [
        ((1.1,), '`positive` must be a number between 0 and 1, or one for each class'),
        ((math.nan,), '`positive` must be'),
        (('high',), '`positive` must be'),
        ((None,), '`positive` must be'),
        (([],), '`positive` must be'),
        (([[0.9]],), '`positive` must be'),
        (([0.9, 'a'],), '`positive` must be'),
        ((0.9, -0.1), '`negative` must be a number'),
        ((0.5, 0.5), '`negative` must be below `positive`'),
        ((0.1, 0.9), '`negative` must be below `positive`'),
        (([0.9, 0.4], 0.4), '`negative` must be below `positive`'),
        (([0.9, 0.8], [0.1] * 3), 'equally many thresholds, one for each class, but have 2 and 3'),
    ],
    ids=str,
)
def test_thresholds_that_are_refused(args, match):
    with pytest.raises(ValueError, match=match):
        MultiLabelThreshold(*args)


def test_wrong_number_of_thresholds_is_an_error_in_setup():
    for args, name in ((([0.9] * 4,), 'positive'), ((0.9, [0.1] * 4), 'negative')):
        with pytest.raises(ValueError, match=rf'`{name}` has 4 thresholds, but the model has 5 outputs'):
            quiet_fit(learner(policy=MultiLabelThreshold(*args)), 1)


def test_multi_label_remembers_nothing():
    policy = MultiLabelThreshold([0.9, 0.8], 0.1)
    policy.setup(2, None, None)
    assert policy.state_dict() == {}
    assert repr(policy) == 'MultiLabelThreshold(positive=[0.9, 0.8], negative=0.1)'
    flex = FlexMatch()
    flex.setup(2, 5, None)
    policy = MultiLabelThreshold()
    policy.load_state_dict(flex.state_dict())
    with pytest.raises(ValueError, match='saved by another policy'):
        policy.setup(2, None, None)


def test_multi_label_policies_combined():
    p = torch.tensor([[0.92, 0.6, 0.08, 0.01]])
    strict, loose = MultiLabelThreshold(0.95, 0.05), MultiLabelThreshold(0.9, 0.1)
    batch = SemiBatch(logits_weak=p.logit())
    both, either = strict & loose, strict | loose
    assert both.multi_label and either.multi_label
    assert both(batch).weights.tolist() == [[0, 0, 0, 1]]
    assert either(batch).weights.tolist() == [[1, 0, 1, 1]]
    assert either(batch).targets[0, [0, 2, 3]].tolist() == [1, 0, 0], 'the likelier, where the first does not count'
    assert either.loss(torch.zeros(1, 4), either(batch)).shape == (1, 4)
    for a, b in ((strict, FixedThreshold()), (FlexMatch(), strict), (strict, ScoreThreshold(entropy, 1.0))):
        with pytest.raises(ValueError, match="can't be combined: one is for several labels"):
            a & b
    assert not (FixedThreshold() & FixedThreshold()).multi_label


# --- training


def by_hand(model, labeled, unlabeled, positive, negative, lambda_u, lr):
    opt = torch.optim.SGD(model.parameters(), lr)
    model.train()
    rates = []
    for (x, y), (weak, strong) in zip(labeled, unlabeled):
        logits = model(torch.cat([x, weak, strong]))
        b, m = len(x), len(weak)
        q = torch.sigmoid(logits[b : b + m].detach())
        total, n = 0, 0
        for j in range(m):
            for k in range(C):
                if q[j, k] >= positive or q[j, k] <= negative:
                    p = torch.sigmoid(logits[b + m + j, k])
                    total = total - (p.log() if q[j, k] >= positive else (1 - p).log())
                    n += 1
        loss = F.binary_cross_entropy_with_logits(logits[:b], y) + lambda_u * total / (m * C)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.append(n / (m * C))
    return rates


@pytest.mark.parametrize('sizes_x,sizes_u', [((4, 4, 4), (8, 8, 8)), ((4, 1, 3), (1, 9, 5))], ids=['full', 'any size'])
@pytest.mark.parametrize('net', [tiny_net, no_bn], ids=['BatchNorm', 'no norm'])
def test_multi_label_equals_loop_by_hand(net, sizes_x, sizes_u):
    data = batches(sizes_x, sizes_u)
    set_seed(0)
    theirs = net(C)
    ours = deepcopy(theirs)
    learn = learner(ours, MultiLabelThreshold(0.52, 0.47), data, lambda_u=0.7)
    quiet_fit(learn, 1, 0.1, wd=0)
    rates = by_hand(theirs, *data, 0.52, 0.47, 0.7, 0.1)
    assert 0 < sum(rates) < len(rates), 'a test in which all count, or none, would show little'
    assert learn.fix_match.history.mask_rate.tolist() == pytest.approx(rates)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_no_label_counts_no_gradient():
    plain, ours = (deepcopy(o) for o in [no_bn(C)] * 2)
    labeled, _ = batches()
    quiet_fit(Learner(DataLoaders(labeled, labeled[:1]), plain, BCEWithLogitsLossFlat(), opt_func=sgd), 1, 0.1, wd=0)
    learn = learner(ours, MultiLabelThreshold(1, 0))
    quiet_fit(learn, 1, 0.1, wd=0)
    assert learn.fix_match.history.loss_u.tolist() == [0, 0, 0]
    for a, b in zip(plain.parameters(), ours.parameters()):
        torch.testing.assert_close(a, b)


class OfSome(MultiLabelThreshold):
    "In the first three images one class counts, in the others none"

    def forward(self, batch):
        targets, weights = super().forward(batch)
        weights = torch.zeros_like(weights)
        weights[range(3), range(3)] = 1
        return PseudoLabels(targets, weights)


@pytest.mark.parametrize('policy', [NEAR, OfSome], ids=['thresholds', 'few images'])
def test_three_forwards_of_multi_label_are_equal(policy):
    set_seed(0)
    net, found = no_bn(C), {}
    for forward in FORWARDS:
        seen = Seen()
        learn = learner(deepcopy(net), policy(), forward=forward, cbs=[seen])
        quiet_fit(learn, 1, 0.1, wd=0)
        found[forward] = [*seen.grads, *learn.model.parameters()], learn.fix_match.history, seen.passes
    tensors, history, passes = found['joint']
    assert passes[0] == (20, True) and 0 < history.mask_rate[0] < 1 and history.loss_u[0] > 0
    for forward in FORWARDS[1:]:
        others, its, passes = found[forward]
        for a, b in zip(tensors, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for column in ('loss_x', 'loss_u', 'mask_rate'):
            assert its[column].tolist() == pytest.approx(history[column].tolist(), abs=1e-5)
        assert passes[:2] == [(8, False), (4 + (3 if forward == 'selective' and policy is OfSome else 8), True)]


# --- errors


def refused(y, policy, match, loss=None, model=None, forward='joint'):
    labeled = [(torch.randn(4, 1, 16, 16), y)] * 2
    own = loss or BCEWithLogitsLossFlat()
    fm = FixMatch(batches()[1], policy=policy, forward=forward)
    learn = Learner(DataLoaders(labeled, labeled), model or no_bn(C), own, cbs=fm)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=match) as e:
        quiet_fit(learn, 1)
    sentence = str(e.value).split('\n')[-1].strip()
    assert sentence.endswith('.') and len(sentence) < 400
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters())) and learn.loss_func is own


@pytest.mark.parametrize('forward', FORWARDS)
@pytest.mark.parametrize(
    'y,policy,match',
    [
        (torch.ones(4, C), None, r'multi-label: use `FixMatch\(unlabeled_dl, policy=MultiLabelThreshold\(\)\)`'),
        (torch.ones(4, C), FlexMatch(), 'FixMatch with FlexMatch needs one class number'),
        (torch.ones(4).long(), MultiLabelThreshold(), 'needs a 0 or 1 of each class.*use a MultiCategoryBlock'),
        (torch.ones(4, 1), MultiLabelThreshold(), 'needs a 0 or 1 of each class'),
        (torch.full((4, C), 7.5), MultiLabelThreshold(), 'with other numbers in it'),
        (torch.ones(4, C + 1), MultiLabelThreshold(), 'has 5 outputs, but .* 6 classes: .* with 6 outputs'),
    ],
    ids=['default policy', 'another policy', 'classes', 'one logit', 'regression', 'outputs'],
)
def test_targets_that_multi_label_refuses(y, policy, match, forward):
    refused(y, policy, match, CrossEntropyLossFlat() if y.ndim == 1 else None, forward=forward)


def test_zeros_and_ones_of_any_type():
    for dtype in (torch.long, torch.bool, torch.float64):
        labeled, unlabeled = batches()
        learn = learner(data=([(x, y.to(dtype)) for x, y in labeled], unlabeled), loss=BCEWithLogitsLossFlat())
        quiet_fit(learn, 1)
        assert len(learn.fix_match.history) == 3


class PerImage(Policy):
    "Weights (M,) for losses (M, C) would broadcast"

    multi_label = True

    def forward(self, batch):
        return PseudoLabels(batch.logits_weak.sigmoid(), torch.ones(len(batch.logits_weak)))

    def loss(self, logits_strong, pseudo):
        return F.binary_cross_entropy_with_logits(logits_strong, pseudo.targets, reduction='none')


def test_weights_that_would_broadcast():
    with pytest.raises(ValueError, match=r'PerImage gives weights \(8,\) for losses \(8, 5\)'):
        quiet_fit(learner(policy=PerImage()), 1)


def test_compare_scores_refuses(images):
    with pytest.raises(ValueError, match='for several labels'):
        compare_scores(images())


# --- with fastai's own data


def labels_of(o):
    "A digit, and whether it is even; 0 and 5 have no other label"
    d = int(parent_label(o))
    return [parent_label(o)] + ['even'] * (d % 2 == 0 and d > 0)


VOCAB = sorted([*map(str, range(10)), 'even'])


@pytest.fixture
def images(digits, tmp_path):
    "A learner on digits with several labels each, three steps an epoch"

    def make(policy=None, label_func=labels_of, cbs=(), model=None, forward='joint', n_out=11, n_batches=3, **kwargs):
        set_seed(0)
        files, tfm = digits[::30], FixMatchTransform(weak=weak_augment(flip=False))
        blocks, splitter = (
            (ImageBlock(PILImageBW), MultiCategoryBlock(vocab=VOCAB)),
            IndexSplitter(range(40, len(files))),
        )
        block = DataBlock(blocks=blocks, get_y=labels_of, splitter=splitter)
        dls = block.dataloaders(files, bs=4, num_workers=0).repeat_train(n_batches)
        loader = dls.unlabeled_dl(digits[1::30], mu=2, tfm=tfm, label_func=label_func)
        set_seed(0)
        fm = FixMatch(loader, policy=policy or MultiLabelThreshold(0.55, 0.45), forward=forward)
        metric = partial(accuracy_multi, thresh=0.5)
        return Learner(dls, model or tiny_net(n_out), metrics=metric, path=tmp_path, cbs=[fm, *cbs], **kwargs)

    return make


@pytest.mark.parametrize('forward', FORWARDS)
def test_multi_label_in_all_of_fastai(images, forward):
    learn = images(forward=forward)
    assert type(learn.loss_func) is BCEWithLogitsLossFlat
    quiet_fit(learn, 2, 1e-2)
    names = 'epoch train_loss valid_loss accuracy_multi loss_x loss_u mask_rate pseudo_acc time'
    assert learn.recorder.metric_names == names.split()
    row = learn.recorder.values[-1]
    assert len(row) == 7 and np.isfinite(row).all() and 0 < row[-2] < 1 and 0 < row[-1] <= 1
    with learn.no_bar():
        loss, acc = learn.validate()
        preds, y = learn.get_preds()
        assert preds.shape == y.shape == (len(learn.dls.valid_ds), 11)
        assert 0 <= preds.min() and preds.max() <= 1 and preds.sum(1).sub(1).abs().max() > 0.1, 'sigmoids, no softmax'
        assert acc == pytest.approx(((preds > 0.5) == y.bool()).float().mean().item(), abs=1e-6)
        assert loss == pytest.approx(F.binary_cross_entropy(preds, y).item(), rel=1e-4)
        learn.export()
        loaded = load_learner(learn.path / 'export.pkl')
        with loaded.no_bar():
            for a, b in zip(loaded.predict(learn.dls.valid_ds.items[0]), learn.predict(learn.dls.valid_ds.items[0])):
                assert list(a) == list(b)


@pytest.mark.parametrize('forward', FORWARDS)
@pytest.mark.parametrize(
    'cbs',
    [lambda: [MixUp()], lambda: [GradientAccumulation(8)], lambda: [ModelEMA(half_life=2)], lambda: [MixedPrecision()]],
    ids=['MixUp', 'GradientAccumulation', 'ModelEMA', 'MixedPrecision'],
)
@pytest.mark.filterwarnings('ignore:CUDA is not available', 'ignore:torch.cuda.amp.GradScaler')
def test_multi_label_beside_callbacks(forward, cbs):
    weights = {}
    for lambda_u in (0.0, 1.0):
        set_seed(0)
        learn = learner(tiny_net(C), forward=forward, cbs=cbs(), lambda_u=lambda_u)
        quiet_fit(learn, 2, 0.1)
        assert len(learn.fix_match.history) == 6 and learn.fix_match.history.iloc[:, :3].notna().all().all()
        weights[lambda_u] = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert weights[1.0].isfinite().all() and not torch.equal(weights[0.0], weights[1.0])


class Half(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.net, self.dtype = no_bn(C), dtype

    def forward(self, x):
        return self.net(x).to(self.dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_judged_in_float32(dtype):
    class Spy(MultiLabelThreshold):
        def forward(self, batch):
            self.seen = batch.logits_weak.dtype
            return super().forward(batch)

    spy = Spy(0.52, 0.49)
    learn = learner(Half(dtype), spy)
    quiet_fit(learn, 1)
    assert spy.seen == torch.float32 and learn.fix_match.history.loss_u.gt(0).all()


@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_batch', 'after_backward'])
@pytest.mark.parametrize('forward', ['joint', 'selective'])
def test_multi_label_after_an_interrupt(images, event, forward):
    def stop(self):
        if self.training and self.train_iter == 1:
            raise KeyboardInterrupt

    cb = type('Stop', (Callback,), {'order': 40, event: stop})()
    learn = images(forward=forward)
    own = learn.loss_func
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1, cbs=cb)
    with learn.no_bar():
        assert len(learn.validate()) == 2 and learn.loss_func is own
        assert learn.get_preds()[0].shape[1] == 11
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


def test_multi_label_resumes(images, tmp_path):
    "A fit that is cut after an epoch ends where one without a cut ends"

    def run(cut):
        learn = images(cbs=[SaveFixMatch(resume=True, fname=f'cut{cut}')])
        if cut:

            class Stop(Callback):
                order = 99

                def before_epoch(self):
                    if self.epoch == 1:
                        raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                quiet_fit(learn, 2, 1e-2, cbs=Stop())
            learn = images(cbs=[SaveFixMatch(resume=True, fname=f'cut{cut}')])
        quiet_fit(learn, 2, 1e-2)
        return learn

    whole, cut = run(False), run(True)
    for a, b in zip(whole.model.parameters(), cut.model.parameters()):
        torch.testing.assert_close(a, b)


# --- columns, pictures, warnings


def test_pseudo_acc_by_hand():
    "Over all that counts and is known, class by class"
    labeled, unlabeled = batches((4,), (8,))
    truth = torch.randint(0, 2, (8, C), generator=torch.Generator().manual_seed(0))
    truth[0], truth[1, 2] = -1, -1

    class Loader(list):
        dataset = [((torch.zeros(1, 16, 16),) * 2, o) for o in truth.flip(0)]

    set_seed(0)
    net = no_bn(C)
    learn = learner(deepcopy(net), data=(labeled, Loader([(unlabeled[0], truth)])))
    quiet_fit(learn, 1, 0.0)
    p = net(unlabeled[0][0]).sigmoid()
    right = counted = 0
    for i in range(8):
        for k in range(C):
            if (p[i, k] >= 0.52 or p[i, k] <= 0.49) and truth[i, k] >= 0:
                counted += 1
                right += (p[i, k] >= 0.52) == (truth[i, k] == 1)
    assert 0 < right < counted < 8 * C
    assert learn.fix_match.history.pseudo_acc[0] == pytest.approx(float(right) / counted)
    assert learn.recorder.values[-1][-1] == pytest.approx(float(right) / counted)
    assert learn.recorder.metric_names[-2] == 'pseudo_acc'


def test_truth_of_one_class_is_no_truth():
    labeled, unlabeled = batches((4,), (8,))
    learn = learner(data=(labeled, [(unlabeled[0], torch.zeros(8, dtype=torch.long))]))
    quiet_fit(learn, 1)
    assert learn.fix_match.history.pseudo_acc.isna().all() and 'pseudo_acc' not in learn.recorder.metric_names


def test_loader_gives_labels_as_zeros_and_ones(images, digits):
    loader = images().fix_match.unlabeled_dl
    (_, _), y, idxs = loader.one_batch()
    assert y.shape == (8, 11) and y.dtype == torch.int64
    for row, i in zip(y, idxs):
        assert [VOCAB[k] for k in row.nonzero().flatten()] == sorted(labels_of(loader.dataset.items[int(i)]))
    assert (images(label_func=lambda o: None).fix_match.unlabeled_dl.one_batch()[1] == -1).all()
    half_known = images(label_func=lambda o: ['even', 'never seen']).fix_match.unlabeled_dl
    assert half_known.one_batch()[1].sum(1).tolist() == [1] * 8
    with pytest.raises(TypeError, match=r"must return a list of them, but it returned '\d': return \['\d'\]"):
        images(label_func=parent_label).fix_match.unlabeled_dl.one_batch()


class Says(MultiLabelThreshold):
    "These targets and weights in the first images"

    def __init__(self, targets, weights):
        super().__init__()
        self.says = torch.tensor(targets, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)

    def forward(self, batch):
        reps = -(-len(batch.logits_weak) // len(self.says[0]))
        return PseudoLabels(*(o.repeat(reps, 1)[: len(batch.logits_weak)] for o in self.says))


def row(*names):
    return [float(o in names) for o in VOCAB]


def test_titles_of_multi_label_pictures(images, monkeypatch):
    "Labels that count as there, the share of classes that count, the truth where it differs, and colours"
    two = row('3', 'even')
    only_3 = row('3')
    learn = images(Says([two, two, two, row()], [[1.0] * 11, only_3, row(), [1.0] * 11]), label_func=lambda o: ['3'])
    fig = learn.fix_match.show_pseudo_labels(4)
    tops = [ax.title for ax in fig.axes[:4]]
    assert [t.get_text() for t in tops] == ['3, even  1.00\n(is 3)', '3  0.09', 'none  0.00', 'none  1.00\n(is 3)']
    assert [t.get_color() for t in tops] == ['tab:red', 'tab:green', '0.55', 'tab:red']
    learn = images(label_func=None)
    learn.fix_match.show_pseudo_labels(3)
    learn.fix_match.unlabeled_dl.show_batch(max_n=2)
    images().fix_match.unlabeled_dl.show_batch(max_n=2)
    batch, truth, *_ = images().fix_match.peek()
    assert batch.y.shape == (4, 11) and truth.shape == (8, 11)


def warned(learn, n=1):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        quiet_fit(learn, n)
    return [str(o.message) for o in said if 'usually helps' in str(o.message)]


@pytest.mark.slow
@pytest.mark.parametrize(
    'targets,weights,says',
    [
        ([row('3')], [[1.0] * 11], ['named the same class in']),
        ([row('3', 'even')], [[1.0] * 11], ['named the same 2 classes in']),
        ([row('3')], [row('5')], ['named no class in']),
        ([row('3')], [row()], ['No pseudo-label has counted']),
        ([row('3'), row('5')], [[1.0] * 11] * 2, []),
        ([row('3'), row()], [[1.0] * 11] * 2, []),
    ],
    ids=['one', 'two', 'none is there', 'none counts', 'two kinds', 'half without'],
)
def test_trouble_of_multi_label(images, targets, weights, says):
    found = warned(images(Says(targets, weights), n_batches=25))
    assert len(found) == len(says) and all(re.search(s, f) for s, f in zip(says, found)), found


# --- preflight


def test_preflight_of_multi_label(images, capsys):
    report = fixmatch_check(images(), speed=False)
    assert [o.name for o in report.findings if 'stop' in o.found] == [] and 'not known' not in capsys.readouterr().out
    assert 'runs with MultiLabelThreshold' in report['step'].found
    assert report['labels'].found.startswith('40 labelled images, ')
    assert report['outputs'].found == '11 for 11 classes'


def test_preflight_finds_a_class_that_no_image_has(images, digits):
    missing = fixmatch_check(images(), speed=False)['labels']
    train = [labels_of(o) for o in images().dls.train.dataset.items]
    never = [o for o in VOCAB if not any(o in labels for labels in train)]
    assert (missing.level == 'problem') == bool(never)
    counts = [sum(o in labels for labels in train) for o in VOCAB if o not in never]
    assert f'{min(counts)} to {max(counts)} of each of {len(counts)} classes' in missing.found


def test_preflight_finds_too_few_outputs(images):
    report = fixmatch_check(images(n_out=9), speed=False)
    assert report['outputs'].level == 'problem' and report['step'].level == 'problem'
    assert 'The model has 9 outputs, but the target of an image is 11 classes' in report['step'].advice


def test_preflight_advises_a_multi_label_policy(images):
    report = fixmatch_check(images(FixedThreshold()), speed=False)
    assert 'MultiLabelThreshold()' in report['step'].advice
