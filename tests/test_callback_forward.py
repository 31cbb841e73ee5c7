"`forward='split'` and `'selective'`: the same training as the joint pass, without the work that earns no gradient"

from copy import deepcopy
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import timm
import torch
from conftest import Seen, no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    SGD,
    Callback,
    CancelBatchException,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    load_learner,
    nn,
    set_seed,
)
from in_memory import POLICIES, assert_alike, batches, memory, same, sgd

from fixmatch_fastai.all import (
    AdaMatch,
    FixedThreshold,
    FixMatch,
    ModelEMA,
    Policy,
    PseudoLabelInterpretation,
    PseudoLabels,
    SoftMatch,
    fixmatch_check,
)
from fixmatch_fastai.uncertainty import MCDropout, add_dropout

FORWARDS = ['split', 'selective']


def learner(forward, net, policy=None, data=None, cbs=()):
    labeled, unlabeled = data or batches()
    fm = FixMatch(unlabeled, policy=policy or FixedThreshold(0.18), forward=forward)
    dls = DataLoaders(labeled, labeled[:1])
    return Learner(dls, net, CrossEntropyLossFlat(), opt_func=SGD, cbs=[fm, *cbs])


def trained(forward, net, policy=None, data=None, n_epoch=1, cbs=()):
    "A learner after a fit, and what its passes were"
    seen = Seen()
    learn = learner(forward, deepcopy(net), policy, data, [seen, *cbs])
    set_seed(0)
    quiet_fit(learn, n_epoch, 0.1, wd=0.0)
    return learn, seen


# --- what is computed


@pytest.mark.slow
@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224', 'no_bn'])
def test_gradients_are_the_joint_passes_without_batchnorm(name):
    "Loss and gradients, to 1e-5, in float32 without dropout"
    set_seed(0)
    kwargs = dict(img_size=32, patch_size=8) if 'vit' in name else {}
    net = no_bn() if name == 'no_bn' else timm.create_model(name, num_classes=10, **kwargs)
    data = batches(2) if name == 'no_bn' else batches(2, 3, 32)
    policy = FixedThreshold(0.18 if name == 'no_bn' else 0.15)
    joint, a = trained('joint', net, policy, data)
    assert 0 < joint.fix_match.history.mask_rate[0] < 1
    for forward in FORWARDS:
        other, b = trained(forward, net, policy, data)
        assert_alike(a.grads, b.grads)
        assert_alike(joint.model.parameters(), other.model.parameters())
        for column in ('loss_x', 'loss_u', 'mask_rate'):
            expected = joint.fix_match.history[column].tolist()
            assert other.fix_match.history[column].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('policy', POLICIES)
def test_every_policy_learns_the_same_in_every_forward(policy):
    "Four steps end where those of the joint pass end, and the policy remembers the same"
    net, data = no_bn(), batches(8 if policy == 'FeatureDensity' else 4)
    joint, a = trained('joint', net, POLICIES[policy](), data)
    assert joint.fix_match.history.loss_u.max() > 0
    for forward in FORWARDS:
        other, b = trained(forward, net, POLICIES[policy](), data)
        assert_alike(a.grads, b.grads)
        assert_alike(joint.model.parameters(), other.model.parameters())
        assert_alike(memory(joint, nan=7).values(), memory(other, nan=7).values(), 1e-4)


@pytest.mark.parametrize('forward', FORWARDS)
def test_policy_with_passes_of_its_own(forward):
    learn, _ = trained(forward, add_dropout(no_bn(), 0.3), MCDropout(n_passes=2, at_most=0.01))
    assert 0 < learn.fix_match.history.mask_rate.mean() < 1


class Five(Policy):
    "The first five count"

    def forward(self, batch):
        counts = torch.arange(len(batch.logits_weak)) < 5
        return PseudoLabels(batch.logits_weak.argmax(1), counts.float())


class FiveOfBoth(Five):
    needs_labeled = True

    def forward(self, batch):
        assert batch.logits_x.shape == (4, 10)
        return super().forward(batch)


def test_passes_of_each_forward():
    "What goes through the network, with gradient and without"
    data = batches(1)
    passes = lambda forward, policy: trained(forward, tiny_net(), policy, data)[1].passes
    assert passes('joint', Five()) == [(28, True)]
    assert passes('split', Five()) == [(12, False), (16, True)]
    filled_up = 'five, filled up to a multiple of two, an eighth of twelve'
    assert passes('selective', Five()) == [(12, False), (4 + 6, True)], filled_up
    assert passes('split', FiveOfBoth()) == [(12, False), (16, True)]
    assert passes('selective', FiveOfBoth()) == [(16, False), (4 + 6, True)]
    assert passes('selective', FixedThreshold(1.0)) == [(12, False), (4, True)], 'none counts'
    assert passes('selective', FixedThreshold(0.0)) == [(12, False), (16, True)], 'all count'


@pytest.mark.slow
@pytest.mark.parametrize('forward', ['joint', *FORWARDS])
def test_compiled_model(forward):
    "torch.compile without a compiler behind it: graphs are made once for each size"
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    learn = learner(forward, torch.compile(no_bn(), backend=backend, dynamic=False), data=batches(6))
    learn.dls.valid = []
    quiet_fit(learn, 2, 0.1)
    assert len(learn.fix_match.history) == 12
    assert len(graphs) in dict(joint=[1], split=[2], selective=range(2, 11))[forward]


# --- when the passes come


class Autocast(Callback):
    "Where MixedPrecision enters it"

    order, run_valid = 10, False

    def before_batch(self):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()

    def after_loss(self):
        self.context.__exit__(None, None, None)


@pytest.mark.parametrize('forward', FORWARDS)
def test_first_pass_is_inside_autocast(forward):
    "The pass without gradient runs in the precision of the main one"
    seen, net = [], tiny_net()
    net.register_forward_hook(lambda m, x, out: seen.append(out.dtype) if m.training else None)
    learn, _ = trained(forward, net, cbs=[Autocast()])
    assert set(seen) == {torch.bfloat16} and len(seen) == 8
    assert learn.fix_match.history.loss_u.notna().all()


@pytest.mark.parametrize('forward', FORWARDS)
@pytest.mark.parametrize('order', [6, 11, 13])
def test_batch_cancelled_before_the_main_pass(forward, order):
    "Before and after the pass without gradient"

    class Cancel(Callback):
        run_valid = False

        def before_batch(self):
            if self.iter == 1:
                raise CancelBatchException('not this one')

    cancel = Cancel()
    cancel.order = order
    learn, _ = trained(forward, tiny_net(), cbs=[cancel], n_epoch=2)
    assert len(learn.fix_match.history) == 6


@pytest.mark.parametrize('forward', FORWARDS)
def test_loaded_learner_keeps_its_forward(make_learner, pool, forward):
    learn = make_learner(fixmatch=dict(forward=forward))
    quiet_fit(learn, 1)
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    assert loaded.fix_match.forward_mode == forward and loaded.predict(pool[0])[0] in learn.dls.vocab
    n_cbs = len(loaded.cbs)
    loaded.remove_cb(FixMatch)
    assert len(loaded.cbs) == n_cbs - 3, 'with its recorder, and the callback of the early pass'


class Stops(nn.Module):
    "Ctrl-C in the third pass without gradient"

    left = 3

    def forward(self, x):
        if not torch.is_grad_enabled() and self.training:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return x


@pytest.mark.parametrize('forward', FORWARDS)
def test_ctrl_c_in_the_pass_without_gradient(forward):
    learn = learner(forward, nn.Sequential(tiny_net(), Stops()))
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 1)
    assert learn.get_preds(dl=batches()[0][:1])[0].shape == (4, 10)
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 8


@pytest.mark.parametrize('forward', FORWARDS)
def test_preflight_passes_like_training(make_learner, forward):
    learn = make_learner(fixmatch=dict(forward=forward))
    assert 'stops' not in str(fixmatch_check(learn, speed=False))
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


@pytest.mark.parametrize('forward', FORWARDS)
def test_wrong_model_is_refused_in_every_forward(forward):
    with pytest.raises(ValueError, match='one row of logits for each image'):
        trained(forward, nn.Sequential(tiny_net(), nn.Unflatten(1, (2, 5))))


# --- waiting for the device


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


# others check their input on the CPU, and only there
@pytest.mark.parametrize('policy', [FixedThreshold, SoftMatch, AdaMatch])
@pytest.mark.parametrize('forward,waits', [('joint', 0), ('split', 0), ('selective', 1)])
def test_waits_for_the_device(forward, waits, policy):
    "Never with the joint pass and with split; with selective once, for the number that counts"
    count = CountWaits()
    trained(forward, tiny_net(), policy(), cbs=[count])
    assert count.counts[1:] == [waits] * 3, 'the first step sets the policy up'


# --- a model that returns more than logits


class Outputs(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class TellsMore(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = no_bn(), kind

    def forward(self, x):
        return self.kind(logits=self.net(x), features=x)


class TakesLogits(Callback):
    def after_pred(self):
        self.learn.pred = self.learn.pred['logits'] if isinstance(self.learn.pred, dict) else self.learn.pred.logits


def more_learner(model, *cbs, **kwargs):
    labeled, unlabeled = batches(2)
    dls = DataLoaders(labeled, labeled[:1])
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=sgd, cbs=[FixMatch(unlabeled, **kwargs), *cbs])


@pytest.mark.parametrize('kind', [dict, Outputs, SimpleNamespace])
@pytest.mark.parametrize('forward,teacher', [('joint', False), ('split', False), ('selective', False), ('joint', True)])
def test_what_a_callback_makes_logits_of(forward, teacher, kind, capsys):
    set_seed(0)
    kwargs = dict(threshold=0.12, forward=forward)
    model = TellsMore(kind)
    make_teacher = lambda: ModelEMA(half_life=1) if teacher else None
    plain = more_learner(deepcopy(model.net), teacher=make_teacher(), **kwargs)
    learn = more_learner(model, TakesLogits(), teacher=make_teacher(), **kwargs)
    for o in (plain, learn):
        quiet_fit(o, 1)
    assert learn.fix_match.history.equals(plain.fix_match.history)
    fixmatch_check(learn, speed=False, strict=True)
    assert 'step           runs with FixedThreshold' in capsys.readouterr().out
    same(learn.fix_match.peek()[0].logits_weak, plain.fix_match.peek()[0].logits_weak)
    learn.fix_match.show_pseudo_labels(2, which='disagree')
    theirs, ours = (PseudoLabelInterpretation.from_learner(o).probs for o in (plain, learn))
    same(ours, theirs)


ALONE = 'The model returns a dict where it runs beside the Learner: wrap the model so that it returns logits alone.'


def test_what_nothing_makes_logits_of(capsys):
    learn = more_learner(TellsMore(dict), forward='split')
    for f in (lambda: quiet_fit(learn, 1), learn.fix_match.peek, learn.fix_match.show_pseudo_labels):
        with pytest.raises(TypeError, match=ALONE):
            f()
    fixmatch_check(learn, speed=False)
    assert ALONE in ' '.join(capsys.readouterr().out.split())
    joint = more_learner(TellsMore(dict), TakesLogits(), policy=MCDropout())
    with pytest.raises(TypeError, match=ALONE):
        quiet_fit(joint, 1)
    joint.remove_cb(TakesLogits)
    with pytest.raises(ValueError, match='wrap the model so that it returns logits alone'):
        quiet_fit(joint, 1)
