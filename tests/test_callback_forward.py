"`forward='split'` and `'selective'`: the same training as the joint pass, without the work that earns no gradient"

from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from conftest import Seen, no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    SGD,
    Callback,
    CancelBatchException,
    ChannelsLast,
    CrossEntropyLossFlat,
    DataLoaders,
    GradientAccumulation,
    Learner,
    MixedPrecision,
    MixUp,
    load_learner,
    nn,
    set_seed,
)

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    FeatureDensity,
    FixedThreshold,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MCDropout,
    ModelEMA,
    Policy,
    PseudoLabels,
    SoftMatch,
    add_dropout,
    fixmatch_check,
)
from fixmatch_fastai.batch import kept_rows
from fixmatch_fastai.callback import EarlyPass

FORWARDS = ['split', 'selective']
POLICIES = {
    'FixedThreshold': partial(FixedThreshold, 0.18),
    'FlexMatch': partial(FlexMatch, 0.18),
    'FreeMatch': partial(FreeMatch, decay=0.5),
    'SoftMatch': partial(SoftMatch, decay=0.9),
    'AdaMatch': partial(AdaMatch, decay=0.9),
    'UDA': partial(UDA, 0.18),
    'Dash': partial(Dash, warmup=1, every=1),
    'DebiasMatch': partial(DebiasMatch, 0.18, decay=0.9),
    'FeatureDensity': partial(FeatureDensity, 0.5, n_recent=12),
    'FlexMatch | FreeMatch': lambda: FlexMatch(0.18) | FreeMatch(decay=0.5),
}


class Pool(list):
    dataset = range(12)


def batches(n_steps=4, n_in=1, size=16, bs=4, mu=3):
    g = torch.Generator().manual_seed(1)
    labeled = [(torch.randn(bs, n_in, size, size, generator=g), torch.randint(0, 10, (bs,), generator=g)) for _ in range(n_steps)]
    shape = bs * mu, n_in, size, size
    return labeled, Pool((torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.arange(bs * mu)) for _ in range(n_steps))


def trained(forward, net, policy=None, data=None, n_epoch=1, cbs=(), **kwargs):
    labeled, unlabeled = data or batches()
    seen = Seen()
    fm = FixMatch(unlabeled, forward=forward, **(dict(threshold=0.18) if policy is None else dict(policy=policy)), **kwargs)
    learn = Learner(DataLoaders(labeled, labeled[:1]), deepcopy(net), CrossEntropyLossFlat(), opt_func=SGD, cbs=[fm, seen, *cbs])
    set_seed(0)
    quiet_fit(learn, n_epoch, 0.1, wd=0.0)
    return learn, seen


def assert_alike(a, b, tol=1e-5):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224', 'no_bn'])
@pytest.mark.parametrize('forward', FORWARDS)
def test_same_gradients_without_batchnorm(name, forward):
    "Loss and gradients of the joint pass, to 1e-5, in float32 without dropout"
    set_seed(0)
    kwargs = dict(img_size=32, patch_size=8) if 'vit' in name else {}
    net = no_bn() if name == 'no_bn' else timm.create_model(name, num_classes=10, **kwargs)
    data = batches(2) if name == 'no_bn' else batches(2, 3, 32)
    (joint, a), (other, b) = (trained(o, net, FixedThreshold(0.18 if name == 'no_bn' else 0.15), data) for o in ('joint', forward))
    rate = joint.fix_match.history.mask_rate[0]
    assert 0 < rate < 1
    assert_alike(a.grads, b.grads)
    assert_alike(joint.model.parameters(), other.model.parameters())
    for column in ('loss_x', 'loss_u', 'mask_rate'):
        assert other.fix_match.history[column].tolist() == pytest.approx(joint.fix_match.history[column].tolist(), abs=1e-5)


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('forward', FORWARDS)
def test_every_policy(policy, forward):
    "Four steps end where those of the joint pass end, and the policy remembers the same"
    net = no_bn()
    (joint, a), (other, b) = (trained(o, net, POLICIES[policy](), batches(8 if policy == 'FeatureDensity' else 4)) for o in ('joint', forward))
    assert joint.fix_match.history.loss_u.max() > 0
    assert_alike(a.grads, b.grads)
    assert_alike(joint.model.parameters(), other.model.parameters())
    assert_alike(*([v.nan_to_num(7) for v in o.fix_match.policy.state_dict().values()] for o in (joint, other)), 1e-4)


@pytest.mark.parametrize('forward', FORWARDS)
def test_policy_with_passes_of_its_own(forward):
    net = add_dropout(no_bn(), 0.3)
    learn, _ = trained(forward, net, MCDropout(n_passes=2, at_most=0.01))
    assert 0 < learn.fix_match.history.mask_rate.mean() < 1


def test_passes():
    "What goes through the network, with gradient and without"
    data = batches(1)

    def passes(forward, policy):
        return trained(forward, tiny_net(), policy, data)[1].passes

    class Five(Policy):
        "The first five count"

        def forward(self, batch):
            return PseudoLabels(batch.logits_weak.argmax(1), (torch.arange(len(batch.logits_weak)) < 5).float())

    class FiveOfBoth(Five):
        needs_labeled = True

        def forward(self, batch):
            assert batch.logits_x.shape == (4, 10)
            return super().forward(batch)

    assert passes('joint', Five()) == [(28, True)]
    assert passes('split', Five()) == [(12, False), (16, True)]
    assert passes('selective', Five()) == [(12, False), (4 + 6, True)], 'five, filled up to a multiple of two, an eighth of twelve'
    assert passes('split', FiveOfBoth()) == [(12, False), (16, True)]
    assert passes('selective', FiveOfBoth()) == [(16, False), (4 + 6, True)]
    assert passes('selective', FixedThreshold(1.0)) == [(12, False), (4, True)], 'none counts'
    assert passes('selective', FixedThreshold(0.0)) == [(12, False), (16, True)], 'all count'


@pytest.mark.parametrize(
    'weights,expected',
    [
        ([0, 1, 0, 0.5, 0, 0, 0, 0], [1, 3]),
        ([0] * 8, []),
        ([1] * 8, range(8)),
        ([0] * 16 + [1], [16, 0, 1]),
        ([1], [0]),
        ([[0, 0], [0, 0.1], [0, 0]], [1]),
    ],
)
def testkept_rows(weights, expected):
    assert kept_rows(torch.tensor(weights, dtype=torch.float32)).tolist() == list(expected)


def test_few_sizes():
    "However many count, there are nine sizes at most: as many compiled graphs"
    sizes = {len(kept_rows((torch.arange(448) < n).float())) for n in range(449)}
    assert sizes == {56 * i for i in range(9)}


@pytest.mark.parametrize('forward', FORWARDS)
@pytest.mark.parametrize(
    'cbs', [lambda: [MixUp()], lambda: [GradientAccumulation(8)], lambda: [ModelEMA(half_life=2)], lambda: [MixedPrecision()], lambda: [ChannelsLast()]]
)
def test_beside(forward, cbs):
    learn, seen = trained(forward, tiny_net(), cbs=cbs(), n_epoch=2)
    assert len(learn.fix_match.history) == 8
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert {grad for _, grad in seen.passes} == {True, False}


@pytest.mark.parametrize('forward', FORWARDS)
def test_inside_autocast(forward):
    "The pass without gradient runs in the precision of the main one"
    seen = []

    class Autocast(Callback):
        order = 10  # where MixedPrecision enters it

        def before_batch(self):
            self.context = torch.autocast('cpu', torch.bfloat16)
            self.context.__enter__()

        def after_loss(self):
            self.context.__exit__(None, None, None)

    net = tiny_net()
    net.register_forward_hook(lambda m, x, out: seen.append(out.dtype) if m.training else None)
    learn, _ = trained(forward, net, cbs=[Autocast()])
    assert set(seen) == {torch.bfloat16} and len(seen) == 8
    assert learn.fix_match.history.loss_u.notna().all()


@pytest.mark.parametrize('forward', FORWARDS)
@pytest.mark.parametrize('order', [6, 11, 13])
def test_cancelled_before_the_model(forward, order):
    "Before and after the pass without gradient"

    class Cancel(Callback):
        run_valid = False

        def before_batch(self):
            if self.iter == 1:
                raise CancelBatchException('not this one')

    cancel = Cancel()
    cancel.order = order
    learn, _ = trained(forward, tiny_net(), cbs=[cancel], n_epoch=2)
    assert len(learn.fix_match.history) == 6 and learn.fix_match._pending is None


@pytest.mark.parametrize('forward', FORWARDS)
def test_comes_and_goes_with_fixmatch(make_learner, forward):
    learn = make_learner(fixmatch=dict(forward=forward))
    quiet_fit(learn, 1)
    assert len(learn._grab_cbs(EarlyPass)) == 1
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    assert len(loaded._grab_cbs(EarlyPass)) == 1
    loaded.remove_cb(FixMatch)
    assert not loaded._grab_cbs(EarlyPass)
    with learn.removed_cbs(list(learn.cbs)):
        pass
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3
    learn.remove_cb(FixMatch)
    assert not learn._grab_cbs(EarlyPass)
    quiet_fit(learn, 1)
    learn.validate()


@pytest.mark.parametrize('forward', FORWARDS)
def test_interrupted(forward):
    "Ctrl-C in the pass without gradient"

    class Stop(nn.Module):
        left = 3

        def forward(self, x):
            if not torch.is_grad_enabled() and self.training:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
            return x

    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        trained(forward, nn.Sequential(tiny_net(), stop))
    net = nn.Sequential(tiny_net(), Stop())
    labeled, unlabeled = batches()
    learn = Learner(DataLoaders(labeled, labeled[:1]), net, CrossEntropyLossFlat(), cbs=FixMatch(unlabeled, threshold=0.18, forward=forward))
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1)
    assert learn.get_preds(dl=labeled[:1])[0].shape == (4, 10)
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 8


@pytest.mark.parametrize('forward', FORWARDS)
def test_preflight_passes_like_training(make_learner, forward):
    learn = make_learner(fixmatch=dict(forward=forward))
    rows = fixmatch_check(learn, speed=False)
    assert 'stops' not in str(rows)
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


@pytest.mark.parametrize('forward', FORWARDS)
def test_wrong_model_is_told(forward):
    with pytest.raises(ValueError, match='one row of logits for each image'):
        trained(forward, nn.Sequential(tiny_net(), nn.Unflatten(1, (2, 5))))


@pytest.mark.parametrize('forward', ['joint', *FORWARDS])
def test_compiled(forward):
    "torch.compile without a compiler behind it: graphs are made once for each size"
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = torch.compile(no_bn(), backend=backend, dynamic=False)
    labeled, unlabeled = batches(6)
    learn = Learner(DataLoaders(labeled, []), net, CrossEntropyLossFlat(), opt_func=SGD, cbs=FixMatch(unlabeled, threshold=0.18, forward=forward))
    quiet_fit(learn, 2, 0.1)
    assert len(learn.fix_match.history) == 12
    assert len(graphs) in dict(joint=[1], split=[2], selective=range(2, 11))[forward]


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts where a number is taken from the device, which waits for it"

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class CountWaits(Callback):
    "In each step, all that happens from the first of `before_batch` to the last of `after_loss`"

    order, run_valid = -100, False

    def __init__(self):
        self.counts = []

    def before_batch(self):
        self.mode = Waits()
        self.mode.__enter__()

    def before_backward(self):
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.n)


@pytest.mark.parametrize('policy', [None, SoftMatch, AdaMatch])  # others check their input on the CPU, and only there
@pytest.mark.parametrize('forward,waits', [('joint', 0), ('split', 0), ('selective', 1)])
def test_waits_for_the_device(forward, waits, policy):
    "Never with the joint pass and with split; with selective once, for the number that counts"
    count = CountWaits()
    trained(forward, tiny_net(), policy and policy(), cbs=[count])
    assert count.counts[1:] == [waits] * 3, 'the first step sets the policy up'
