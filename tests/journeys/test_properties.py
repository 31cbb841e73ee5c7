"What holds for every size, mode, shape and number: many cases, drawn by hypothesis"

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_fit
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, parent_label
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

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
    SemiBatch,
    SoftMatch,
    split_labeled,
)
from fixmatch_fastai.augment import Cutout

many = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(many, max_examples=25)

POLICIES = [FixedThreshold, UDA, FlexMatch, FreeMatch, SoftMatch, AdaMatch, Dash, DebiasMatch]


# --- views


@many
@given(st.sampled_from(['L', 'RGB']), *[st.integers(1, 70)] * 2, st.integers(0, 2**32 - 1), st.booleans())
@example('L', 1, 1, 0, False)
@example('RGB', 1, 40, 0, True)
def test_views_of_any_size(mode, w, h, seed, normalised):
    channels = len(mode)
    rng = np.random.default_rng(seed)
    img = Image.fromarray(rng.integers(0, 256, (h, w) if mode == 'L' else (h, w, 3), dtype=np.uint8), mode=None)
    before = np.array(img)
    tfm = FixMatchTransform([0.5] * channels, [0.2] * channels) if normalised else FixMatchTransform()
    for view in tfm(img):
        assert view.shape == (channels, h, w)
        assert view.dtype == (torch.float32 if normalised else torch.uint8) and (
            not normalised or view.isfinite().all()
        )
    assert np.array_equal(np.array(img), before), 'the image itself is left as it is'


@pytest.mark.parametrize('mode', ['1', 'P', 'LA', 'RGBA', 'CMYK', 'I', 'I;16', 'F', 'YCbCr', 'HSV', 'LAB'])
def test_other_modes_work_or_say_so(mode):
    "Never something silently wrong: a view of the mode's channels, or a sentence"
    img = Image.new(mode, (12, 9))
    try:
        weak, strong = FixMatchTransform()(img)
    except (TypeError, ValueError) as e:
        assert 'convert' in str(e) or 'mode' in str(e), e
    else:
        assert weak.shape == strong.shape and weak.shape[1:] == (9, 12) and weak.dtype == torch.uint8


@many
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1))
def test_cutout_of_any_size(w, h, size):
    out = np.array(Cutout(size)(Image.new('RGB', (w, h), (255, 0, 0))))
    assert out.shape == (h, w, 3)


# --- the stream


@many
@given(st.integers(1, 40), st.integers(1, 17), st.booleans(), st.integers(0, 99), st.integers(1, 4), st.integers(0, 6))
def test_streams_of_any_size(n, bs, shuffle, seed, world, skip):
    "Every pass has each image once; the processes' shares are the whole; a stream goes on where another was"
    from fixmatch_fastai.data import EndlessSampler, StreamPosition

    def shares(drawn):
        position = StreamPosition(seed, drawn)
        return [iter(EndlessSampler(n, bs, shuffle, position, rank, world)) for rank in range(world)]

    ranks, steps = shares(0), skip + math.ceil(2 * n / (bs * world))
    batches = [[next(o) for o in ranks] for _ in range(steps)]
    assert all(len(b) == bs for step in batches for b in step)
    together = [i for step in batches for b in step for i in b]
    for start in range(0, len(together) - n + 1, n):
        assert sorted(together[start : start + n]) == list(range(n))
    later = shares(skip * bs * world)
    assert [[next(o) for o in later] for _ in range(steps - skip)] == batches[skip:]


@many
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(-3, 40), st.integers(0, 5))
def test_split_labeled_of_any_labels(labels, n, seed):
    items = [f'{i}/{c}' for i, c in enumerate(labels)]
    of = lambda o: o.split('/')[1]
    classes = set(map(of, items))
    try:
        labeled, rest = split_labeled(items, of, n, seed)
    except ValueError as e:
        each = n // len(classes)
        assert n <= 0 or n % len(classes) or any(labels.count(int(c)) < each for c in classes), e
    else:
        assert len(labeled) == n and sorted([*labeled, *rest]) == sorted(items)
        assert {c: list(map(of, labeled)).count(c) for c in classes} == {c: n // len(classes) for c in classes}


# --- policies

numbers = st.floats(-80, 80, width=32)


def rows(o, n):
    return st.lists(o, min_size=n, max_size=n)


def logits(draw, n, c):
    return torch.tensor(draw(rows(rows(numbers, c), n)))


@st.composite
def batches(draw):
    c, m, b = draw(st.integers(2, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    n_batches = draw(st.integers(1, 3))
    whole = lambda n, top: torch.tensor(draw(rows(st.integers(0, top), n)))
    return [
        SemiBatch(y=whole(b, c - 1), idxs=whole(m, 19), logits_x=logits(draw, b, c), logits_weak=logits(draw, m, c))
        for _ in range(n_batches)
    ]


@few
@given(batches(), st.data())
@pytest.mark.parametrize('make', POLICIES, ids=lambda o: o.__name__)
def test_policies_on_any_logits(make, steps, data):
    "Weights in 0 to 1, targets that are classes or probabilities, a finite loss, whatever the logits"
    policy = make()
    c = steps[0].logits_weak.shape[1]
    policy.setup(c, 20, None)
    for batch in steps:
        assume(batch.logits_weak.shape[1] == c)
        m = len(batch.logits_weak)
        strong = logits(data.draw, m, c).requires_grad_()
        with torch.no_grad():
            pseudo = policy(batch)
        targets, weights = pseudo
        assert weights.shape == (m,) and weights.dtype == torch.float32
        assert (0 <= weights).all() and (weights <= 1).all()
        if targets.ndim == 2:
            torch.testing.assert_close(targets.sum(1), torch.ones(m))
        else:
            assert targets.shape == (m,) and targets.dtype == torch.int64
            assert (0 <= targets).all() and (targets < c).all()
        loss = (weights * policy.loss(strong, pseudo)).mean() + policy.penalty(batch, pseudo, strong)
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()
            assert strong.grad.isfinite().all()
    memory = [o for o in policy.state_dict().values() if o.is_floating_point()]
    assert all(o.isfinite().all() or o.isnan().all() for o in memory)


@many
@given(batches(), st.floats(0, 1), st.floats(0.05, 5))
def test_fixed_threshold_is_its_formula(steps, threshold, T):
    batch = steps[0]
    p = batch.logits_weak.double().div(T).softmax(1)
    confidence = p.max(1).values
    assume(((confidence - threshold).abs() > 1e-5).all())
    targets, weights = FixedThreshold(threshold, T)(batch)
    assert weights.bool().equal(confidence >= threshold)
    # one of the largest, where some are equal but for rounding
    torch.testing.assert_close(p.gather(1, targets[:, None])[:, 0], confidence, rtol=0, atol=1e-6)


# --- whole steps


class Flat(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.lin = nn.Linear(n_in, n_out)

    def forward(self, x):
        return self.lin(x.flatten(1))


@few
@given(
    b=st.integers(1, 7),
    m=st.integers(1, 9),
    c=st.integers(2, 5),
    channels=st.integers(1, 3),
    size=st.integers(1, 6),
    threshold=st.floats(0, 1),
    lambda_u=st.floats(0, 3),
    seed=st.integers(0, 999),
)
def test_a_step_is_the_formula(b, m, c, channels, size, threshold, lambda_u, seed):
    "Loss and gradient of any batch are those written down directly"
    torch.manual_seed(seed)
    x, y = torch.randn(b, channels, size, size + 1), torch.randint(0, c, (b,))
    weak, strong = torch.randn(2, m, channels, size, size + 1).unbind()
    net = Flat(channels * size * (size + 1), c)
    logits_x, logits_weak, logits_strong = net(torch.cat([x, weak, strong])).split([b, m, m])
    confidence, k = logits_weak.detach().softmax(1).max(1)
    assume(((confidence - threshold).abs() > 1e-5).all())
    counts = confidence >= threshold
    loss_x = F.cross_entropy(logits_x, y)
    loss_u = (counts * F.cross_entropy(logits_strong, k, reduction='none')).mean()
    expected = torch.autograd.grad(loss_x + lambda_u * loss_u, net.parameters())
    fix_match = FixMatch([(weak, strong)], threshold=threshold, lambda_u=lambda_u)
    found, dls = [], DataLoaders([(x, y)], [(x, y)])
    learn = Learner(dls, net, CrossEntropyLossFlat(), lr=0.0, cbs=[fix_match, Grads(found)])
    quiet_fit(learn, 1)
    for a, e in zip(found, expected):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)
    row = learn.fix_match.history.iloc[0]
    numbers = [o.item() for o in (loss_x, loss_u, counts.float().mean())]
    assert [row.loss_x, row.loss_u, row.mask_rate] == pytest.approx(numbers, abs=1e-5)


class Grads(Callback):
    def __init__(self, found):
        self.found = found

    def before_step(self):
        self.found += [p.grad.clone() for p in self.model.parameters()]


@pytest.mark.slow
@few
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_loaders_of_odd_shapes(make_dls, make_learner, pool, n_pool, bs, mu, n_batches, repeat):
    "Any pool, batch size and mu: full unlabelled batches of mu·bs, the steps asked for"
    dls = make_dls(bs=bs, n_batches=n_batches if repeat else None)
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(pool[:n_pool], mu=mu, label_func=parent_label, num_workers=0))
    assert sum(len(b[2]) for b in dls.unlabeled_dl(pool[:n_pool], mu=mu).new(drop_last=False)) == n_pool
    sizes = []
    learn.fix_match.policy.register_forward_hook(lambda policy, batch, pseudo: sizes.append(len(batch[0].weak)))
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == (n_batches if repeat else 20 // bs)
    assert set(sizes) == {mu * bs}
