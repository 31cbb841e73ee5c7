"FixMatch against an independent training loop in plain PyTorch, and what must hold whatever the numbers"

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, nn, set_seed

from fixmatch_fastai.all import FixedThreshold, FixMatch, Policy, PseudoLabels

sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def batches(sizes_x, sizes_u, n_in=1):
    set_seed(1)
    labeled = [(torch.randn(n, n_in, 16, 16), torch.randint(0, 10, (n,))) for n in sizes_x]
    return labeled, [(torch.randn(n, n_in, 16, 16), torch.randn(n, n_in, 16, 16)) for n in sizes_u]


def by_hand(model, labeled, unlabeled, threshold, lambda_u, lr, T=1.0):
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
def test_equals_loop_by_hand(net, sizes_x, sizes_u):
    labeled, unlabeled = batches(sizes_x, sizes_u)
    theirs = net()
    ours = deepcopy(theirs)
    opts = dict(threshold=0.19, lambda_u=0.7, T=0.9)
    learn = Learner(DataLoaders(labeled, labeled[:1]), ours, CrossEntropyLossFlat(), opt_func=sgd, cbs=FixMatch(unlabeled, **opts))
    quiet_fit(learn, 1, 0.1, wd=0)
    rates = by_hand(theirs, labeled, unlabeled, lr=0.1, **opts)
    assert 0 < sum(rates) < len(rates), 'a test in which all count, or none, would show little'
    assert learn.fix_match.history.mask_rate.tolist() == pytest.approx(rates)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_two_epochs_go_on_with_the_stream():
    labeled, unlabeled = batches((4, 4), (8, 8, 8))
    theirs = no_bn()
    ours = deepcopy(theirs)
    learn = Learner(DataLoaders(labeled, labeled[:1]), ours, CrossEntropyLossFlat(), opt_func=sgd, cbs=FixMatch(unlabeled, threshold=0.14))
    quiet_fit(learn, 2, 0.1, wd=0)
    by_hand(theirs, labeled * 2, [unlabeled[i] for i in (0, 1, 2, 0)], 0.14, 1.0, 0.1)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_lambda_0_is_plain_training():
    labeled, unlabeled = batches((4, 4, 2), (8, 8, 8))
    dls = DataLoaders(labeled, labeled[:1])
    plain = no_bn()
    ours = deepcopy(plain)
    quiet_fit(Learner(dls, plain, CrossEntropyLossFlat(), opt_func=sgd), 2, 0.1, wd=0)
    quiet_fit(Learner(dls, ours, CrossEntropyLossFlat(), opt_func=sgd, cbs=FixMatch(unlabeled, lambda_u=0)), 2, 0.1, wd=0)
    for a, b in zip(plain.parameters(), ours.parameters()):
        torch.testing.assert_close(a, b)


def grads(fixmatch, labeled, unlabeled, model):
    "Gradients of one step, and what the policy was given"
    learn = Learner(DataLoaders(labeled, labeled), deepcopy(model), CrossEntropyLossFlat(), opt_func=sgd, cbs=fixmatch)
    out = []
    learn.add_cb(Grab(out))
    quiet_fit(learn, 1, 0.0, wd=0)
    return out


class Grab(Callback):
    order = 100

    def __init__(self, out):
        self.out = out

    def before_step(self):
        self.out.extend(p.grad.clone() for p in self.model.parameters())


def test_nothing_counts_no_gradient():
    labeled, unlabeled = batches((4,), (8,))
    model = no_bn()
    a = grads(FixMatch(unlabeled, threshold=1.0), labeled, unlabeled, model)
    b = grads(FixMatch(unlabeled, threshold=0.0, lambda_u=0), labeled, unlabeled, model)
    c = grads(FixMatch(unlabeled, threshold=0.0), labeled, unlabeled, model)
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h)
    assert any((g - h).abs().max() > 1e-4 for g, h in zip(a, c)), 'where all count, the gradient must differ'


def test_order_of_unlabeled_images_does_not_matter():
    labeled, ((weak, strong),) = batches((4,), (8,))
    perm = torch.randperm(8)
    model = no_bn()
    a = grads(FixMatch([(weak, strong)], threshold=0.14), labeled, None, model)
    b = grads(FixMatch([(weak[perm], strong[perm])], threshold=0.14), labeled, None, model)
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h)


class Spy(FixedThreshold):
    "Remembers what it was given"

    def forward(self, batch):
        self.batch, self.grad, self.autocast = batch, torch.is_grad_enabled(), torch.is_autocast_enabled(batch.logits_weak.device.type)
        return super().forward(batch)


class Half(nn.Module):
    "Returns logits in half precision, as autocast does"

    def __init__(self, dtype):
        super().__init__()
        self.net, self.dtype = no_bn(), dtype

    def forward(self, x):
        return self.net(x).to(self.dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_policy_sees_float32_without_gradient(dtype):
    labeled, unlabeled = batches((4, 3), (8, 5))
    unlabeled = [(*b, torch.arange(len(b[0]))) for b in unlabeled]
    spy = Spy(threshold=0.1)
    learn = Learner(DataLoaders(labeled, labeled[:1]), Half(dtype), CrossEntropyLossFlat(), cbs=FixMatch(unlabeled, policy=spy))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        quiet_fit(learn, 1)
    b = spy.batch
    assert not spy.grad and not spy.autocast
    assert (b.logits_x.dtype, b.logits_weak.dtype) == (torch.float32,) * 2
    assert (tuple(b.logits_x.shape), tuple(b.logits_weak.shape)) == ((3, 10), (5, 10))
    assert not b.logits_x.requires_grad and not b.logits_weak.requires_grad
    assert all(type(o) is torch.Tensor for o in b[:6])
    assert b.autocast == (torch.bfloat16 if dtype == torch.bfloat16 else None)  # so that a policy can run the model alike
    torch.testing.assert_close(b.x, labeled[1][0])
    torch.testing.assert_close(b.weak, unlabeled[1][0])
    assert b.y.tolist() == labeled[1][1].tolist() and b.idxs.tolist() == [0, 1, 2, 3, 4]


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
    got = grads(FixMatch([(weak, strong)], policy=policy, lambda_u=2.0), labeled, None, model)
    (x, y) = labeled[0]
    ref = deepcopy(model)
    soft = ref(weak).softmax(1).detach()
    out = ref(strong)
    (F.cross_entropy(ref(x), y) + 2 * 0.25 * -(soft * out.log_softmax(1)).sum(1).mean() + out.pow(2).mean()).backward()
    for g, p in zip(got, ref.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
    assert policy.n == (10, None) and policy.steps == 1 and 'steps' in policy.state_dict()


def test_labeled_loss_alone_is_weighted():
    "Class weights and label smoothing are the user's; the unlabelled loss is plain cross-entropy"
    labeled, unlabeled = batches((4,), (8,))
    weighted = nn.CrossEntropyLoss(weight=torch.arange(10.0), label_smoothing=0.1)
    model = no_bn()
    learn = Learner(DataLoaders(labeled, labeled), deepcopy(model), weighted, opt_func=sgd, cbs=FixMatch(unlabeled, threshold=0.0))
    quiet_fit(learn, 1, 0.0, wd=0)
    (x, y), (weak, strong) = labeled[0], unlabeled[0]
    h = learn.fix_match.history
    assert h.loss_x[0] == pytest.approx(weighted(model(x), y).item(), rel=1e-4)
    assert h.loss_u[0] == pytest.approx(F.cross_entropy(model(strong), model(weak).argmax(1)).item(), rel=1e-4)
