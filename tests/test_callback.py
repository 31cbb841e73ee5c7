"FixMatch against an independent training loop in plain PyTorch, and what must hold whatever the numbers"

from copy import copy, deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SchedLin, nn, set_seed
from in_memory import Half, Spy, memory, sgd

from fixmatch_fastai.all import FixedThreshold, FixMatch, FlexMatch, FreeMatch, ModelEMA, Policy, PseudoLabels


def batches(sizes_x, sizes_u):
    set_seed(1)
    labeled = [(torch.randn(n, 1, 16, 16), torch.randint(0, 10, (n,))) for n in sizes_x]
    return labeled, [(torch.randn(n, 1, 16, 16), torch.randn(n, 1, 16, 16)) for n in sizes_u]


# --- algorithm 1


def loop_by_hand(model, labeled, unlabeled, threshold, lambda_u, lr, T=1.0):
    "Algorithm 1 of the paper, written from it"
    opt = torch.optim.SGD(model.parameters(), lr)
    model.train()
    rates = []
    for (x, y), (weak, strong) in zip(labeled, unlabeled):
        logits = model(torch.cat([x, weak, strong]))
        b, m = len(x), len(weak)
        q = torch.softmax(logits[b : b + m].detach() / T, dim=1)
        confidence, target = torch.max(q, dim=1)
        counts = confidence.ge(threshold)
        total = 0
        for j in range(m):
            if counts[j]:
                total = total + F.cross_entropy(logits[b + m + j][None], target[j][None])
        loss = F.cross_entropy(logits[:b], y) + lambda_u * total / m
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.append(counts.float().mean().item())
    return rates


@pytest.mark.parametrize(
    'sizes_x,sizes_u',
    [((4, 4, 4, 4), (8, 8, 8, 8)), ((4, 4, 4, 2), (8, 8, 8, 3)), ((4, 1, 3, 2), (1, 9, 2, 5))],
    ids=['full', 'short last batch', 'any size'],
)
@pytest.mark.parametrize('net', [tiny_net, no_bn], ids=['BatchNorm', 'no norm'])
def test_fit_equals_the_loop_by_hand(net, sizes_x, sizes_u):
    labeled, unlabeled = batches(sizes_x, sizes_u)
    theirs = net()
    ours = deepcopy(theirs)
    opts = dict(threshold=0.19, lambda_u=0.7, T=0.9)
    dls, fix_match = DataLoaders(labeled, labeled[:1]), FixMatch(unlabeled, **opts)
    learn = Learner(dls, ours, CrossEntropyLossFlat(), opt_func=sgd, cbs=fix_match)
    quiet_fit(learn, 1, 0.1, wd=0)
    rates = loop_by_hand(theirs, labeled, unlabeled, lr=0.1, **opts)
    assert 0 < sum(rates) < len(rates), 'a test in which all count, or none, would show little'
    assert learn.fix_match.history.mask_rate.tolist() == pytest.approx(rates)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_two_epochs_go_on_with_the_stream():
    labeled, unlabeled = batches((4, 4), (8, 8, 8))
    theirs = no_bn()
    ours = deepcopy(theirs)
    dls, fix_match = DataLoaders(labeled, labeled[:1]), FixMatch(unlabeled, threshold=0.14)
    quiet_fit(Learner(dls, ours, CrossEntropyLossFlat(), opt_func=sgd, cbs=fix_match), 2, 0.1, wd=0)
    loop_by_hand(theirs, labeled * 2, [unlabeled[i] for i in (0, 1, 2, 0)], 0.14, 1.0, 0.1)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_lambda_0_is_plain_training():
    labeled, unlabeled = batches((4, 4, 2), (8, 8, 8))
    dls = DataLoaders(labeled, labeled[:1])
    plain = no_bn()
    ours = deepcopy(plain)
    for model, cbs in ((plain, []), (ours, [FixMatch(unlabeled, lambda_u=0)])):
        quiet_fit(Learner(dls, model, CrossEntropyLossFlat(), opt_func=sgd, cbs=cbs), 2, 0.1, wd=0)
    for a, b in zip(plain.parameters(), ours.parameters()):
        torch.testing.assert_close(a, b)


# --- one step


class Gradients(Callback):
    "Of the last step"

    order = 100

    def before_step(self):
        self.seen = [p.grad.clone() for p in self.model.parameters()]


def gradients(fix_match, labeled, model):
    "Of one step"
    look = Gradients()
    dls = DataLoaders(labeled, labeled)
    learn = Learner(dls, deepcopy(model), CrossEntropyLossFlat(), opt_func=sgd, cbs=[fix_match, look])
    quiet_fit(learn, 1, 0.0, wd=0)
    return look.seen


def test_no_gradient_where_nothing_counts():
    labeled, unlabeled = batches((4,), (8,))
    model = no_bn()
    a = gradients(FixMatch(unlabeled, threshold=1.0), labeled, model)
    b = gradients(FixMatch(unlabeled, threshold=0.0, lambda_u=0), labeled, model)
    c = gradients(FixMatch(unlabeled, threshold=0.0), labeled, model)
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h)
    assert any((g - h).abs().max() > 1e-4 for g, h in zip(a, c)), 'where all count, the gradient must differ'


def test_order_of_unlabeled_rows_does_not_matter():
    labeled, ((weak, strong),) = batches((4,), (8,))
    perm = torch.randperm(8)
    model = no_bn()
    a = gradients(FixMatch([(weak, strong)], threshold=0.14), labeled, model)
    b = gradients(FixMatch([(weak[perm], strong[perm])], threshold=0.14), labeled, model)
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h)


class SoftWithPenalty(Policy):
    "Soft targets, weights between 0 and 1, and a penalty"

    def setup(self, n_classes, n_unlabeled, model):
        self.n = (n_classes, n_unlabeled)
        self.register_buffer('steps', torch.zeros(()))

    def forward(self, batch):
        self.steps += 1
        return PseudoLabels(batch.probs, torch.full((len(batch.weak),), 0.25))

    def penalty(self, batch, pseudo, logits_strong):
        return logits_strong.pow(2).mean()


def test_soft_targets_and_penalty():
    labeled, ((weak, strong),) = batches((4,), (8,))
    model, policy = no_bn(), SoftWithPenalty()
    ours = gradients(FixMatch([(weak, strong)], policy=policy, lambda_u=2.0), labeled, model)
    (x, y) = labeled[0]
    theirs = deepcopy(model)
    soft = theirs(weak).softmax(1).detach()
    out = theirs(strong)
    loss_u = 0.25 * -(soft * out.log_softmax(1)).sum(1).mean()
    (F.cross_entropy(theirs(x), y) + 2 * loss_u + out.pow(2).mean()).backward()
    for g, p in zip(ours, theirs.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
    assert policy.n == (10, None) and policy.steps == 1 and 'steps' in policy.state_dict()


def test_labeled_loss_alone_is_weighted():
    "Class weights and label smoothing are the user's; the unlabelled loss is plain cross-entropy"
    labeled, unlabeled = batches((4,), (8,))
    weighted = nn.CrossEntropyLoss(weight=torch.arange(10.0), label_smoothing=0.1)
    model, dls = no_bn(), DataLoaders(labeled, labeled)
    learn = Learner(dls, deepcopy(model), weighted, opt_func=sgd, cbs=FixMatch(unlabeled, threshold=0.0))
    quiet_fit(learn, 1, 0.0, wd=0)
    (x, y), (weak, strong) = labeled[0], unlabeled[0]
    h = learn.fix_match.history
    assert h.loss_x[0] == pytest.approx(weighted(model(x), y).item(), rel=1e-4)
    assert h.loss_u[0] == pytest.approx(F.cross_entropy(model(strong), model(weak).argmax(1)).item(), rel=1e-4)


def test_lambda_u_as_a_schedule(make_learner):
    positions, totals = [], []

    class Ramp:
        def __call__(self, pos):
            positions.append(pos)
            return 2 * pos

    class Totals(Callback):
        def after_loss(self):
            if self.training:
                totals.append(self.loss.item())

    learn = make_learner(fixmatch=dict(lambda_u=Ramp(), threshold=0), cbs=[Totals()])
    positions.clear()  # those of the check
    quiet_fit(learn, 2)
    assert positions == pytest.approx([i / 6 for i in range(6)])
    history = learn.fix_match.history
    expected = history.loss_x + 2 * np.arange(6) / 6 * history.loss_u
    assert totals == pytest.approx(expected.tolist(), abs=1e-5) and (history.loss_u > 0).all()
    quiet_fit(make_learner(fixmatch=dict(lambda_u=SchedLin(0, 1))), 1)
    with pytest.raises(ValueError, match='0 or more throughout'):
        FixMatch([], lambda_u=SchedLin(1, -1))


@pytest.mark.parametrize('lambda_u', [-1, float('inf'), float('nan'), True, '1', None])
def test_weight_that_is_none(lambda_u):
    with pytest.raises(ValueError, match='`lambda_u`.* must be a finite number, 0 or more, but got'):
        FixMatch([], lambda_u=lambda_u)


# --- the policy


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_policy_sees_float32_without_gradient(dtype):
    labeled, unlabeled = batches((4, 3), (8, 5))
    unlabeled = [(*b, torch.arange(len(b[0]))) for b in unlabeled]
    spy, dls = Spy(threshold=0.1), DataLoaders(labeled, labeled[:1])
    learn = Learner(dls, Half(dtype), CrossEntropyLossFlat(), cbs=FixMatch(unlabeled, policy=spy))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        quiet_fit(learn, 1)
    b = spy.batch
    assert not spy.grad and not spy.autocast
    assert (b.logits_x.dtype, b.logits_weak.dtype) == (torch.float32,) * 2
    assert (tuple(b.logits_x.shape), tuple(b.logits_weak.shape)) == ((3, 10), (5, 10))
    assert not b.logits_x.requires_grad and not b.logits_weak.requires_grad
    assert all(type(o) is torch.Tensor for o in (b.x, b.y, b.weak, b.idxs, b.logits_x, b.logits_weak))
    # so that a policy can run the model alike
    assert b.autocast == (torch.bfloat16 if dtype == torch.bfloat16 else None)
    torch.testing.assert_close(b.x, labeled[1][0])
    torch.testing.assert_close(b.weak, unlabeled[1][0])
    assert b.y.tolist() == labeled[1][1].tolist() and b.idxs.tolist() == [0, 1, 2, 3, 4]


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


def test_a_bool_may_tell_what_counts(make_learner):
    class Bools(FixedThreshold):
        def forward(self, batch):
            targets, weights = super().forward(batch)
            return targets, weights > 0

    a, b = (make_learner(fixmatch={'threshold': 0.95, 'policy': cls(0.2)}) for cls in (FixedThreshold, Bools))
    for learn in (a, b):
        set_seed(1)
        quiet_fit(learn, 1)
    assert a.fix_match.history.equals(b.fix_match.history)


# --- lr_find


class InterruptAtStep(Callback):
    order = 70

    def after_batch(self):
        if self.training and self.train_iter == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize('before', [0, 1], ids=['before the first fit', 'between two fits'])
@pytest.mark.parametrize('interrupted', [False, True], ids=['whole', 'Ctrl-C'])
def test_lr_find_leaves_policy_and_history(make_learner, interrupted, before):
    learn = make_learner(fixmatch=dict(policy=FreeMatch(decay=0.5) & FlexMatch(0.2), threshold=0.95))
    fresh = FreeMatch() & FlexMatch()
    fresh.setup(10, 100, None)
    expected = fresh.state_dict()
    if before:
        quiet_fit(learn, before)
        expected = memory(learn)
        assert not torch.equal(expected['first.p'], fresh.first.p)
    history, by_class = learn.fix_match.history, learn.semi_recorder.by_class
    if interrupted:
        with learn.added_cbs(InterruptAtStep()), pytest.raises(KeyboardInterrupt):
            quiet_fit(learn, show_plot=False, num_it=6, method='lr_find')
        learn.validate()
    else:
        quiet_fit(learn, show_plot=False, num_it=6, method='lr_find')
    for k, v in memory(learn).items():
        assert torch.equal(v, expected[k]), k
    assert learn.fix_match.history.equals(history)
    assert len(learn.semi_recorder.by_class.get('step', [])) == len(by_class.get('step', [])) == 3 * before
    quiet_fit(learn, 1)
    assert not torch.equal(memory(learn)['first.p'], expected['first.p'])
    assert len(learn.fix_match.history) == 3


# --- copies, and callbacks that come and go


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


@pytest.mark.parametrize('before', [0, 1])
@pytest.mark.parametrize('forward', ['joint', 'split', 'selective'])
def test_callbacks_taken_off_and_put_back(make_learner, forward, before):
    learn = make_learner(fixmatch=dict(forward=forward))
    quiet_fit(learn, before)
    with learn.removed_cbs(list(learn.cbs)):
        assert not learn.cbs
    quiet_fit(learn, 1)
    names = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'loss_x', 'loss_u', 'mask_rate', 'pseudo_acc', 'time']
    assert learn.recorder.metric_names == names
    assert len(learn.recorder.values[-1]) == 7 and np.isfinite(learn.recorder.values[-1][3:6]).all()
    assert len(learn.fix_match.history) == 3
    others = make_learner().cbs
    learn.remove_cb(FixMatch)
    quiet_fit(learn, 1)
    assert len(learn.cbs) < len(others) and learn.recorder.metric_names == [*names[:4], 'time']


@pytest.mark.parametrize('copied', [copy, deepcopy])
def test_copy_leaves_the_original_alone(make_learner, copied):
    a, b = make_learner(), make_learner()
    other = copied(a.fix_match)
    b.remove_cb(FixMatch)
    b.add_cb(other)
    quiet_fit(a, 1)
    assert len(a.recorder.values[-1]) == 7
    with pytest.raises(ValueError, match='without its unlabelled images'):
        quiet_fit(b, 1)


def test_history_is_of_the_last_fit_without_a_bar_too(make_learner):
    learn = make_learner()
    for _ in range(2):
        with learn.no_mbar():
            quiet_fit(learn, 1)
        assert len(learn.fix_match.history) == 3


def test_arguments_are_attributes():
    teacher = ModelEMA()
    fm = FixMatch([], threshold=0.9, lambda_u=0.5, teacher=teacher, warmup=0)
    assert fm.unlabeled_dl == [] and fm.lambda_u == 0.5 and fm.policy.threshold == 0.9
    assert fm.teacher is teacher and fm.warmup == 0.0 and FixMatch([]).teacher is None
