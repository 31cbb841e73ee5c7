"Doubts against scipy; models and policies that come out of a second look as they went in"

import copy
import math
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    BnFreeze,
    Callback,
    GradientAccumulation,
    Learner,
    PILImage,
    load_learner,
    nn,
    resnet18,
    set_seed,
    vision_learner,
)
from sklearn.metrics import roc_auc_score
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from fixmatch_fastai.all import FixedThreshold, SemiBatch
from fixmatch_fastai.uncertainty import (
    ClassGaussians,
    FeatureDensity,
    MCDropout,
    ScoreThreshold,
    ValidatedThreshold,
    add_dropout,
    compare_scores,
    dropout_passes,
    entropy,
    mutual_info,
    one_minus_confidence,
    one_minus_margin,
    one_minus_mean_confidence,
    penultimate,
    predictive_entropy,
    remove_spectral_norm_,
    safe_doubt,
    spectral_norm_,
)

pytestmark = pytest.mark.filterwarnings('ignore:load_learner')
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model, before, flags):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for k in before:
        assert torch.equal(after[k], before[k]), k
    assert [m.training for m in model.modules()] == flags


def odd_flags(model):
    "Train mode, but for every third module"
    model.train()
    for m in list(model.modules())[::3]:
        m.training = False
    return [m.training for m in model.modules()]


def dropping_net(p=0.5):
    body = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3)
    return nn.Sequential(*body, nn.Dropout(p), nn.Flatten(), nn.Linear(8 * 3 * 3, 10))


def weak_batch(m=16, n_in=1, size=8, **kwargs):
    torch.manual_seed(3)
    return SemiBatch(weak=torch.randn(m, n_in, size, size), **kwargs)


# --- doubts


@pytest.fixture(scope='module')
def passes():
    torch.manual_seed(0)
    probs = (3 * torch.randn(7, 20, 5)).softmax(2)
    probs[:, 0] = torch.eye(5)[0]  # certain
    return probs


def test_doubts_of_one_pass_are_scipys_and_sorted_ones(passes):
    probs = passes[0]
    p = probs.double().numpy()
    close(entropy(probs), torch.tensor(scipy.stats.entropy(p, axis=1)).float())
    ordered = np.sort(p, 1)
    close(one_minus_confidence(probs), torch.tensor(1 - ordered[:, -1]).float())
    close(one_minus_margin(probs), torch.tensor(1 - ordered[:, -1] + ordered[:, -2]).float())


def test_doubts_of_passes_are_scipys(passes):
    p = passes.double().numpy()
    total = scipy.stats.entropy(p.mean(0), axis=1)
    close(predictive_entropy(passes), torch.tensor(total).float())
    close(mutual_info(passes), torch.tensor(total - scipy.stats.entropy(p, axis=2).mean(0)).float())
    close(one_minus_mean_confidence(passes), torch.tensor(1 - p.mean(0).max(1)).float())


@pytest.mark.parametrize('score', [entropy, one_minus_confidence, one_minus_margin])
def test_certainty_has_no_doubt_and_no_nan(score):
    assert score(torch.eye(3)).tolist() == [0, 0, 0]


def test_mutual_info_is_never_negative():
    one = torch.rand(1, 500, 10, generator=torch.Generator().manual_seed(0)).softmax(2)
    equal = mutual_info(one.expand(7, -1, -1))
    assert equal.min() >= 0 and equal.max() < 1e-5
    assert mutual_info(torch.eye(4)[:, None]).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize('score', [entropy, one_minus_confidence, one_minus_margin])
def test_one_pass_refuses_passes(score, passes):
    with pytest.raises(ValueError, match=rf'`{score.__name__}` needs the probabilities of one pass.*\(7, 20, 5\)'):
        score(passes)
    with pytest.raises(ValueError, match='for T passes there are'):
        MCDropout(score)


@pytest.mark.parametrize('score', [mutual_info, predictive_entropy, one_minus_mean_confidence])
def test_passes_refuse_one_pass(score, passes):
    with pytest.raises(ValueError, match=rf'`{score.__name__}` needs .* of T passes.*\(20, 5\).*with `MCDropout`'):
        score(passes[0])
    with pytest.raises(ValueError, match='use it with `MCDropout`'):
        ScoreThreshold(score, 0.1)


def test_thresholds_check_their_arguments():
    with pytest.raises(TypeError, match='must be a function'):
        ScoreThreshold('entropy', 0.1)
    with pytest.raises(ValueError, match='one doubt for each image'):
        ScoreThreshold(lambda probs: probs, 0.1)
    with pytest.raises(ValueError, match='must be a number'):
        ScoreThreshold(entropy, float('nan'))
    with pytest.raises(ValueError, match='2 or more'):
        MCDropout(n_passes=1)
    assert repr(ScoreThreshold(entropy, 0.5)) == 'ScoreThreshold(entropy, at_most=0.5)'
    assert repr(MCDropout()) == 'MCDropout(mutual_info, at_most=0.02, n_passes=10)'


def test_one_minus_confidence_is_the_fixed_threshold():
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 3
    policies = ScoreThreshold(one_minus_confidence, 0.1), FixedThreshold(0.9)
    ours, theirs = (p(SemiBatch(logits_weak=logits)) for p in policies)
    assert 0 < theirs.weights.sum() < 200
    assert torch.equal(ours.weights, theirs.weights) and torch.equal(ours.targets, theirs.targets)


# --- MC dropout


def old_spectral_norm():
    net = dropping_net()
    torch.nn.utils.spectral_norm(net[0])
    return net


def of_timm(name, **kwargs):
    return timm.create_model(name, num_classes=10, **kwargs)


def instance_norm():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Dropout(), nn.LazyLinear(10))


VIT = partial(of_timm, 'vit_tiny_patch16_224', img_size=32, depth=2)
EVO = dict(norm_layer=timm.layers.EvoNorm2dB0, act_layer=None)
MODELS = {
    'BatchNorm': (dropping_net, 1),
    'functional dropout': (partial(of_timm, 'efficientnet_b0', drop_rate=0.3), 3),
    'stochastic depth': (partial(of_timm, 'resnet18', drop_path_rate=0.3, zero_init_last=False), 3),
    'ViT': (partial(VIT, drop_rate=0.2, attn_drop_rate=0.2), 3),
    'EvoNorm': (lambda: add_dropout(of_timm('resnet18', **EVO)), 3),
    'InstanceNorm': (instance_norm, 1),
    'spectral norm': (lambda: spectral_norm_(dropping_net()), 1),
    'old spectral norm': (old_spectral_norm, 1),
}


@pytest.mark.parametrize('name', MODELS)
def test_passes_differ_and_leave_the_model_alone(name):
    torch.manual_seed(0)
    make, n_in = MODELS[name]
    model = make()
    batch = weak_batch(8, n_in, 32 if n_in == 3 else 8)
    with torch.no_grad():
        model(batch.weak)  # moves the running statistics off their start values
    flags = odd_flags(model)
    before = state(model)
    logits = dropout_passes(model, batch.weak, 3, None)
    assert logits.shape == (3, 8, 10) and not logits.requires_grad
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert_same(model, before, flags)
    mc = MCDropout(at_most=100.0, n_passes=2)
    mc.setup(10, None, model)
    assert mc(batch).weights.tolist() == [1.0] * 8
    assert_same(model, before, flags)


def test_batchnorm_uses_what_it_knows_not_the_batch():
    model = dropping_net()
    x = weak_batch().weak
    torch.manual_seed(0)
    together = dropout_passes(model, x, 400, None).mean(0)
    model.eval()
    with torch.no_grad():
        still = model(x)
    # the mean over many masks is the output without dropout, but not with the statistics of this batch
    assert (together - still).abs().mean() < 0.1 * still.std()
    model.train()
    model[4].eval()
    with torch.no_grad():
        assert (model(x) - still).abs().mean() > 0.1 * still.std()


def test_mc_dropout_by_hand():
    class Alternating(nn.Module):
        "Logits of three images that change from pass to pass"

        def __init__(self):
            super().__init__()
            self.w, self.t = nn.Parameter(torch.ones(1)), 0

        def forward(self, x):
            assert self.training and not torch.is_grad_enabled()
            self.t += 1
            p = [[[0.9, 0.1], [0.5, 0.5], [0.99, 0.01]], [[0.9, 0.1], [0.5, 0.5], [0.05, 0.95]]][self.t % 2]
            return self.w * torch.tensor(p).log()

    mc = MCDropout(at_most=0.1, n_passes=4)
    mc.setup(2, None, Alternating())
    pseudo = mc(weak_batch(3))
    assert pseudo.targets[[0, 2]].tolist() == [0, 0]  # mean (0.52, 0.48) of the last
    assert pseudo.weights.tolist() == [1, 1, 0]  # information 0, 0, 0.692 - 0.127
    assert pseudo.weights.dtype == torch.float32


def test_an_error_in_a_pass_restores_the_model():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError('out of memory')

    model = nn.Sequential(dropping_net(), Fails())
    flags = odd_flags(model)
    mc = MCDropout()
    mc.setup(10, None, model)
    with pytest.raises(RuntimeError, match='out of memory'):
        mc(weak_batch())
    assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize('net', [tiny_net, lambda: dropping_net(0.0)], ids=['none', 'p=0'])
def test_without_dropout_it_says_so(net):
    mc = MCDropout()
    mc.setup(10, None, net())
    with pytest.raises(ValueError, match=r'no active dropout: put some in with `add_dropout\(model, 0.5\)`'):
        mc(weak_batch())
    with pytest.raises(ValueError, match='call `policy.setup'):
        MCDropout()(weak_batch())


def test_a_last_layer_of_zeros_is_no_proof_of_no_dropout():
    model = add_dropout(tiny_net())
    mc = MCDropout()
    mc.setup(10, None, model)
    with torch.no_grad():
        model[-1].weight.zero_()
        assert mc(weak_batch()).weights.sum() == 16
        model[-1].weight.normal_()
        mc(weak_batch())
        model[-1].weight.zero_()
        model[-1].bias.zero_()
    model[-1]._forward_pre_hooks.clear()
    mc(weak_batch())  # looked at only until it is known


def test_a_branch_that_starts_at_0_is_no_proof_of_no_dropout():
    for rate in (0.3, 0):
        mc = MCDropout()
        mc.setup(10, None, of_timm('resnet10t', drop_path_rate=rate, zero_init_last=True, in_chans=1))
        if rate:
            mc(weak_batch(4, size=32))
        else:
            with pytest.raises(ValueError, match='no active dropout'):
                mc(weak_batch(4, size=32))


def test_passes_in_half_precision():
    half = dropping_net().bfloat16()
    batch = weak_batch()
    logits = dropout_passes(half, batch.weak.bfloat16(), 2, None)
    assert logits.dtype == torch.float32
    seen = []
    model = dropping_net()
    model[-1].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    for autocast in (torch.bfloat16, None):
        mc = MCDropout(n_passes=2)
        mc.setup(10, None, model)
        assert mc(batch._replace(autocast=autocast)).weights.shape == (16,)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_passes_inside_autocast_leave_no_weights_without_gradient():
    model = dropping_net()
    x = weak_batch().weak
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with torch.autocast('cpu', enabled=False):
            dropout_passes(model, x, 1, torch.bfloat16)
        model(x).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- dropout added


def ends_in_a_convolution(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def n_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize(
    'make,where,n',
    [
        (tiny_net, 'classifier', 1),
        (partial(of_timm, 'resnet18', in_chans=1), 'classifier', 1),
        (partial(of_timm, 'resnet18', in_chans=1), 'blocks', 8),
        (partial(VIT, in_chans=1), 'blocks', 2),
        (partial(of_timm, 'regnetx_002', in_chans=1), 'blocks', 13),
        (tiny_net, nn.Conv2d, 1),
        (tiny_net, (nn.Conv2d, nn.ReLU), 2),
        (ends_in_a_convolution, 'classifier', 1),
    ],
)
def test_added_dropout(make, where, n, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        keys, out = list(model.state_dict()), model(x)
        assert add_dropout(model, 0.3, where) is model
        add_dropout(model, 0.5, where)
        assert n_hooks(model) == n
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), out)
        torch.save(model, tmp_path / 'model.pth')
        loaded = torch.load(tmp_path / 'model.pth', weights_only=False)
        for o in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(o(x), out)
            logits = dropout_passes(o, x, 2, None)
            assert (logits[0] - logits[1]).abs().max() > 1e-3
            assert n_hooks(o) == n and not o.training


def test_added_dropout_is_before_the_classifier_with_p():
    model = add_dropout(nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000, bias=False)), 0.25)
    model[1].weight.data = torch.eye(1000)
    out = model(torch.ones(20, 1000))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    add_dropout(model, 0.75)
    assert (model(torch.ones(20, 1000)) == 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    add_dropout(model, 0.75, nn.Flatten)  # in the place of the other
    assert n_hooks(model) == 1 and (model[0](torch.ones(20, 1000)) == 0).any()


def test_a_copy_is_on_its_own():
    model = add_dropout(tiny_net(), 0.5)
    other = copy.deepcopy(model)
    add_dropout(other, 0.1, nn.Conv2d)
    assert n_hooks(model) == n_hooks(other) == 1
    assert next(iter(model[-1]._forward_pre_hooks.values())).p == 0.5 and not other[-1]._forward_pre_hooks


def test_unpickled_elsewhere_the_hook_keeps_its_number(monkeypatch):
    data = pickle.dumps(add_dropout(tiny_net(), 0.5))
    monkeypatch.setattr(RemovableHandle, 'next_id', 0)  # as in a new process
    model = pickle.loads(data)
    for _ in range(1000):
        if RemovableHandle.next_id > 999:
            break
        model[-1].register_forward_pre_hook(lambda m, i: None).remove()
    assert n_hooks(model) == 1


def test_where_of_added_dropout_is_checked():
    with pytest.raises(ValueError, match='no residual blocks that are known by name'):
        add_dropout(tiny_net(), where='blocks')
    with pytest.raises(ValueError, match='no module of the class'):
        add_dropout(tiny_net(), where=nn.LSTM)
    for bad in ('head', 3):
        with pytest.raises(ValueError, match="must be 'classifier', 'blocks'"):
            add_dropout(tiny_net(), where=bad)
    for p in (0, 1, float('nan')):
        with pytest.raises(ValueError, match='above 0 and below 1'):
            add_dropout(tiny_net(), p)
    with pytest.raises(ValueError, match='neither a linear layer nor a convolution'):
        add_dropout(nn.ReLU())
    with pytest.raises(TypeError, match='LSTM returns a tuple'):
        add_dropout(nn.Sequential(nn.LSTM(4, 4)), where=nn.LSTM)(torch.randn(2, 4))


@pytest.mark.parametrize('arch', [resnet18, 'resnet10t'])
def test_added_dropout_in_a_vision_learner(make_dls, arch, tmp_path):
    dls = make_dls(img_cls=PILImage)
    learn = vision_learner(dls, arch, pretrained=False, path=tmp_path, ps=0.0)
    groups = [len(list(g)) for g in learn.splitter(learn.model)]
    add_dropout(learn.model, 0.5)
    assert [len(list(g)) for g in learn.splitter(learn.model)] == groups
    with learn.no_bar():
        learn.summary()
    assert n_hooks(learn.model) == len(learn.model[-1][-1]._forward_pre_hooks) == 1
    logits = dropout_passes(learn.model, torch.randn(4, 3, 32, 32), 2, None)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# --- feature density


def labeled_features(n=60, d=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    return rng.normal(size=(n, d)) * [0.5, 1, 2] + 4 * np.eye(5, d)[y] + 7, y


def by_hand(f, y, at, n_classes=5, shrink=5.0, w=None):
    "Class Gaussians of all images at once, with numpy and scipy"
    w = np.ones(len(y)) if w is None else w
    n = np.array([w[y == c].sum() for c in range(n_classes)])
    mean = np.array([np.average(f[y == c], 0, w[y == c]) if n[c] else np.zeros(f.shape[1]) for c in range(n_classes)])
    spread = np.array([(w[y == c, None] * (f[y == c] - mean[c]) ** 2).sum(0) for c in range(n_classes)])
    between = np.average((mean - np.average(mean, 0, n)) ** 2, 0, n)
    pooled = (spread.sum(0) + between) / (n.sum() + 1)
    pooled = pooled + 0.01 * pooled.mean() + 1e-6
    var = (spread + shrink * pooled) / (n[:, None] + shrink)
    log_density = lambda c: scipy.stats.multivariate_normal(mean[c], np.diag(var[c])).logpdf(at)
    logs = [np.log(n[c] / n.sum()) + log_density(c) for c in range(n_classes) if n[c]]
    return torch.tensor(scipy.special.logsumexp(logs, axis=0)).float()


@pytest.mark.parametrize('decay', [1.0, 0.8])
def test_class_gaussians_are_scipys(decay):
    f, y = labeled_features()
    at = labeled_features(seed=1)[0]
    gaussians = ClassGaussians(decay=decay, shrink=2.0)
    gaussians.setup(5, 3)
    assert gaussians.log_density(torch.tensor(at).float()).tolist() == [-math.inf] * 60
    for i in range(0, 60, 10):
        gaussians.update(torch.tensor(f[i : i + 10]).float(), torch.tensor(y[i : i + 10]))
    w = decay ** np.repeat(np.arange(6)[::-1], 10)
    density = gaussians.log_density(torch.tensor(at).float())
    assert density.shape == (60,)
    close(density, by_hand(f, y, at, shrink=2.0, w=w), rtol=1e-3, atol=1e-3)


def test_density_of_features_far_from_0():
    f, y = labeled_features()
    f += 100
    gaussians = ClassGaussians(decay=1.0)
    gaussians.setup(5, 3)
    for i in range(0, 60, 10):
        gaussians.update(torch.tensor(f[i : i + 10]).float(), torch.tensor(y[i : i + 10]))
    close(gaussians.log_density(torch.tensor(f).float()), by_hand(f, y, f), rtol=0, atol=2e-3)


def test_one_image_of_a_class_and_a_dead_feature():
    gaussians = ClassGaussians()
    gaussians.setup(3, 2)
    gaussians.update(torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([0, 2]))
    near, middle, far = gaussians.log_density(torch.tensor([[1.0, 0.0], [3.0, 0.0], [30.0, 0.0]]))
    assert math.isfinite(near) and near > middle > far
    gaussians.setup(3, 2)
    gaussians.update(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(gaussians.log_density(torch.zeros(1, 2))).all()


def test_a_class_that_stays_away_for_long_is_not_lost():
    gaussians = ClassGaussians(decay=0.5)
    gaussians.setup(2, 1)
    gaussians.update(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1]))
    for _ in range(2000):
        gaussians.update(torch.tensor([[8.0], [9.0]]), torch.tensor([1, 1]))
    assert torch.isfinite(gaussians.log_density(torch.tensor([[0.5], [8.5]]))).all()


@pytest.mark.parametrize(
    'model,width',
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 64),
        (ends_in_a_convolution(6), 6),
        (timm.create_model('resnet10t', in_chans=1, num_classes=10), 512),
        (nn.Sequential(nn.Flatten(2), nn.Linear(64, 10)), 64),  # a row for each of several places
    ],
)
def test_penultimate_features(model, width):
    x = weak_batch(4).weak
    flags = odd_flags(model)
    before = state(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    f = penultimate(model, x)
    assert f.shape == (4, width) and f.dtype == torch.float32 and not f.requires_grad
    assert_same(model, before, flags)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Flatten):
        close(f, x.flatten(1))
    assert penultimate(model, x, torch.bfloat16).dtype == torch.float32


def test_feature_density_step_by_step():
    "Identity features: densities, the order of measuring and learning, and the quantile, against numpy"
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 5))
    f, y = labeled_features(80)
    weak = labeled_features(40, seed=2)[0] + np.linspace(0, 6, 40)[:, None]
    policy = FeatureDensity(quantile=0.2, decay=1.0, n_recent=30)
    policy.setup(5, None, model)
    image = lambda a: torch.tensor(a).float()[:, None, None]
    recent = []
    for i in range(0, 80, 16):
        x, labels = image(f[i : i + 16]), torch.tensor(y[i : i + 16])
        pseudo = policy(SemiBatch(x=x, y=labels, weak=image(weak), logits_weak=torch.eye(40, 5)))
        if i == 0:
            assert pseudo.weights.sum() == 0
            continue
        recent += by_hand(f[:i], y[:i], f[i : i + 16]).tolist()
        at_least = np.quantile(recent[-30:], 0.2)
        assert pseudo.weights.tolist() == (by_hand(f[:i], y[:i], weak).numpy() >= at_least).astype(float).tolist()
    assert 0 < pseudo.weights.sum() < 40
    assert pseudo.targets.tolist() == [0, 1, 2, 3, 4] + [0] * 35
    assert policy.needs_labeled and (policy & FixedThreshold()).needs_labeled


def test_feature_density_state():
    model = tiny_net()
    model.eval()
    batch = weak_batch(8, x=torch.randn(4, 1, 8, 8), y=torch.tensor([0, 1, 1, 3]), logits_weak=torch.randn(8, 10))
    policy = FeatureDensity()
    policy.setup(10, None, model)
    for _ in range(3):
        policy(batch)
    saved = policy.state_dict()
    assert saved.keys() == {'recent', 'gaussians.n', 'gaussians.mean', 'gaussians.spread'}
    other = FeatureDensity()
    other.load_state_dict(saved)
    other.setup(10, None, model)
    assert torch.equal(other(batch).weights, policy(batch).weights)
    with pytest.raises(ValueError, match='call `policy.setup'):
        pickle.loads(pickle.dumps(policy))(batch)
    lone = weak_batch(8, logits_weak=torch.randn(8, 10))
    before = state(policy)
    assert policy(lone).weights.shape == (8,)
    for k, v in policy.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_density_tells_noise_from_digits(make_learner):
    learn = make_learner()
    quiet_fit(learn, 6, 1e-2)
    policy = FeatureDensity()
    policy.setup(10, None, learn.model)
    for _ in range(40):
        batch = learn.fix_match.peek()[0]
        policy(batch)
    noise = batch._replace(weak=3 * torch.randn_like(batch.weak))
    assert policy(noise).weights.sum() == 0
    assert policy(batch._replace(weak=batch.x, logits_weak=batch.logits_x)).weights.mean() > 0.7
    digits, other = (policy.gaussians.log_density(penultimate(learn.model, b.weak)) for b in (batch, noise))
    assert digits.min() > other.max()


# --- spectral normalisation


def test_spectral_norm_and_back(make_learner):
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3)
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    keys = set(model.state_dict())
    assert spectral_norm_(spectral_norm_(model)) is model
    assert [is_parametrized(m) for m in model] == [True, False, False, True, False, False, False]
    assert len(model[0].parametrizations.weight) == 1
    for _ in range(30):
        model(torch.randn(4, 1, 8, 8))
    model.eval()
    for i in (0, 3):
        assert torch.linalg.matrix_norm(model[i].weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    with pytest.raises(RuntimeError):
        pickle.dumps(model)
    learn = make_learner(model=model)
    quiet_fit(learn, 1, 1e-2)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.eval()
        before = model(x)
        model.train()
        assert remove_spectral_norm_(model) is model and all(m.training for m in model.modules())
        model.eval()
        assert torch.equal(model(x), before)
    assert set(model.state_dict()) == keys
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(x), before)
    quiet_fit(learn := make_learner(model=model), 1, 1e-2)  # trains on


def test_a_classifier_that_is_a_convolution_stays():
    assert [is_parametrized(m) for m in spectral_norm_(ends_in_a_convolution())] == [True, False, False, False]
    with pytest.raises(ValueError, match='no convolution'):
        spectral_norm_(nn.Linear(2, 2))


# --- validated threshold


def test_safe_doubt_by_hand():
    # the lower 90 % bound with all n right is 0.1^(1/n): 0.794 for 10, 0.811 for 11, 0.841 for 14;
    # with one wrong of 18, 0.799; of 19, 0.809
    doubts = np.arange(20) / 20
    right = np.ones(20, bool)
    assert safe_doubt(doubts, right, 0.8, 0.9) == 0.95
    right[14:] = False
    assert safe_doubt(doubts, right, 0.8, 0.9) == 0.65  # 14 right; with one wrong of 15, 0.764
    assert safe_doubt(doubts, right, 0.85, 0.9) == -math.inf
    right[:] = [True] * 13 + [False] + [True] * 6
    assert safe_doubt(doubts, right, 0.8, 0.9) == 0.95  # one wrong of 20, although not with one of 14
    assert safe_doubt(doubts, ~right, 0.1, 0.9) == -math.inf
    assert safe_doubt(doubts[::-1].copy(), right[::-1].copy(), 0.8, 0.9) == 0.95


def test_safe_doubt_does_not_part_ties():
    doubts = np.array([0.1] * 10 + [0.2] * 10)
    right = np.array([True] * 14 + [False] * 6)
    assert safe_doubt(doubts, right, 0.75, 0.9) == 0.1
    # 14 right would do, but four of these have the doubt of the wrong ones
    assert safe_doubt(doubts, right, 0.8, 0.9) == -math.inf


@pytest.mark.parametrize('n', [30, 100, 400])
def test_safe_doubt_against_every_cut(n):
    rng = np.random.default_rng(n)
    doubts = rng.random(n).round(2)
    right = rng.random(n) > doubts * 0.6
    best = -math.inf
    for t in np.unique(doubts):
        k, m = right[doubts <= t].sum(), (doubts <= t).sum()
        # Clopper–Pearson by its definition: the accuracy at which so many are right with a probability of 1 − bound
        if scipy.stats.binomtest(int(k), int(m), alternative='greater').proportion_ci(0.9, 'exact').low >= 0.75:
            best = max(best, t)
    assert safe_doubt(doubts, right, 0.75, 0.9) == best
    assert n == 30 or best > 0


class Held(list):
    "Held-out batches that count how often they were gone through"

    passed = 0

    def __iter__(self):
        self.passed += 1
        return super().__iter__()


def confident_net():
    "The logits are the images"
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(2, affine=False), nn.Identity())


def held_out(n_wrong=3, n=80):
    "Right where the doubt is small, wrong in the `n_wrong` of most doubt"
    margin = torch.linspace(6, 0.1, n)
    x = torch.stack([margin, torch.zeros(n)], 1)[:, None, None]
    y = torch.zeros(n, dtype=torch.long)
    y[n - n_wrong :] = 1
    return Held([(x[:50], y[:50]), (x[50:], y[50:])]), margin


def test_validated_threshold_by_hand():
    data, margin = held_out(10)
    model = confident_net().train()
    policy = ValidatedThreshold(data, target=0.9, every=3, bound=0.9)
    policy.setup(2, None, model)
    flags, before = odd_flags(model), state(model)
    weak = torch.stack([margin[[0, 60, 70, 79]], torch.zeros(4)], 1)[:, None, None]
    batch = SemiBatch(weak=weak, logits_weak=torch.randn(4, 2))
    pseudo = policy(batch)
    assert_same(model, before, flags)
    lower = [scipy.stats.beta.ppf(0.1, k := min(i, 70), i - k + 1) for i in range(1, 81)]
    last = max(i for i, v in enumerate(lower) if v >= 0.9)
    assert 60 < last < 79
    m = margin[last] / (1 + 1e-5) ** 0.5  # BatchNorm in evaluation mode
    assert policy.at_most.item() == pytest.approx(1 - torch.sigmoid(m).item(), rel=1e-5)
    assert pseudo.weights.tolist() == [1, 1, float(last >= 70), 0]
    assert pseudo.targets.tolist() == [0] * 4
    for _ in range(5):
        policy(batch)
    assert data.passed == 2  # steps 0 and 3
    policy(batch)
    assert data.passed == 3


def test_validated_threshold_that_is_never_safe():
    data, _ = held_out(79)
    policy = ValidatedThreshold(data)
    policy.setup(2, None, confident_net())
    assert policy(SemiBatch(weak=data[0][0], logits_weak=torch.zeros(50, 2))).weights.sum() == 0
    assert policy.at_most == -math.inf


def test_validated_threshold_state():
    data, _ = held_out()
    batch = SemiBatch(weak=data[0][0], logits_weak=torch.zeros(50, 2))
    policy = ValidatedThreshold(data, every=4)
    policy.setup(2, None, confident_net())
    for _ in range(3):
        policy(batch)
    saved = policy.state_dict()
    assert saved.keys() == {'at_most', 'step'}
    other = ValidatedThreshold(data, every=4)
    other.load_state_dict(saved)
    other.setup(2, None, confident_net())
    assert other.at_most == policy.at_most
    data.passed = 0
    other(batch)
    assert data.passed == 0  # the fourth step
    other(batch)
    assert data.passed == 1
    other.load_state_dict(saved)  # while in use, as `lr_find` does
    other(batch)
    other(batch)
    assert data.passed == 2
    other.setup(2, None, confident_net())  # of another learner: from the start
    assert other.at_most == -math.inf
    assert other(batch).weights.sum() == policy(batch).weights.sum() and data.passed == 3


def test_the_loader_stays_out_of_pickles_and_copies():
    data, _ = held_out()
    data.lock = threading.Lock()  # neither copied nor pickled
    policy = ValidatedThreshold(data)
    policy.setup(2, None, confident_net())
    copy.deepcopy(policy)(SemiBatch(weak=data[0][0], logits_weak=torch.zeros(50, 2)))
    assert data.passed == 1
    loaded = pickle.loads(pickle.dumps(policy))
    loaded.setup(2, None, confident_net())
    with pytest.raises(ValueError, match='loaded without its held-out images'):
        loaded(weak_batch(logits_weak=torch.zeros(16, 2)))


def test_too_few_held_out_images():
    data, _ = held_out(0, 58)
    for n, loader in ((58, data), (0, [])):
        policy = ValidatedThreshold(loader)
        policy.setup(2, None, confident_net())
        with pytest.raises(ValueError, match=f"{n} held-out images can't prove an accuracy of 0.95 .*: it takes 59"):
            policy(SemiBatch(weak=torch.zeros(4, 1, 1, 2), logits_weak=torch.zeros(4, 2)))
    # and 59 do
    data, _ = held_out(0, 59)
    policy = ValidatedThreshold(data)
    policy.setup(2, None, confident_net())
    assert policy(SemiBatch(weak=data[0][0], logits_weak=torch.zeros(50, 2))).weights.sum() == 50


def test_validated_threshold_checks_its_arguments():
    for bad in (3, iter([]), (o for o in [])):
        with pytest.raises(TypeError, match='gone through again and again'):
            ValidatedThreshold(bad)
    for kw in (dict(target=1), dict(bound=1.0), dict(target=0)):
        with pytest.raises(ValueError, match='above 0 and below 1'):
            ValidatedThreshold([], **kw)
    with pytest.raises(ValueError, match='1 or more'):
        ValidatedThreshold([], every=0)
    with pytest.raises(ValueError, match='use it with `MCDropout`'):
        ValidatedThreshold([], score=mutual_info)


# --- in a Learner


class Watch(Callback):
    "Notes the weights that a policy gives"

    def before_fit(self):
        self.seen = []
        policy = self.learn.fix_match.policy
        if not hasattr(policy, '_watched'):
            policy.register_forward_hook(lambda m, i, out: self.seen.append(out.weights))
            policy._watched = True


POLICIES = {
    'MCDropout': lambda dls: FixedThreshold(0.15) & MCDropout(mutual_info, 0.2, n_passes=3),
    'FeatureDensity': lambda dls: FixedThreshold(0.05) & FeatureDensity(),
    'ValidatedThreshold': lambda dls: ValidatedThreshold(dls.valid, target=0.05, every=2, bound=0.6),
    'ScoreThreshold': lambda dls: ScoreThreshold(entropy, 2.3),
}


@pytest.mark.parametrize('name', POLICIES)
@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(8)], [BnFreeze()]], ids=['alone', 'accumulated', 'BnFreeze'])
def test_doubts_train_export_and_predict(make_learner, make_dls, name, cbs, digits):
    dls = make_dls()
    policy = POLICIES[name](dls)
    model = add_dropout(tiny_net())
    watch = Watch()
    learn = make_learner(dls, model, dict(policy=policy, threshold=0.95), cbs=[*(copy.copy(cb) for cb in cbs), watch])
    quiet_fit(learn, 2, 1e-2)
    if not any(isinstance(cb, BnFreeze) for cb in learn.cbs):
        assert model[0][1].num_batches_tracked == 6  # moved once a step, by training alone
    assert len(watch.seen) == 6 and 0 < sum(w.sum() for w in watch.seen)
    assert learn.fix_match.history.mask_rate.gt(0).any()
    assert not {k for k in policy.state_dict() if 'weight' in k or 'bias' in k or 'running' in k}
    learn.remove_cb(watch)
    policy._forward_hooks.clear()
    with learn.no_bar():
        before = learn.predict(digits[0])
    learn.export()
    loaded = load_learner(learn.path / 'export.pkl')
    assert n_hooks(loaded.model) == 1
    with loaded.no_bar():
        after = loaded.predict(digits[0])
    assert after[0] == before[0]
    close(after[2], before[2])


def test_policies_do_not_change_training_but_by_their_weights(make_learner, make_dls):
    "A policy that runs the model again and lets all count trains as one that does not run it"
    ends = []
    for policy in (
        FixedThreshold(0.0),
        FixedThreshold(0.0) | FeatureDensity(quantile=0.0),
        FixedThreshold(0.0) | ValidatedThreshold(list(make_dls(n_batches=None).valid), target=0.001, bound=0.1),
    ):
        torch.manual_seed(0)
        learn = make_learner(fixmatch=dict(policy=policy, threshold=0.95))
        set_seed(0, True)
        quiet_fit(learn, 1, 1e-2)
        ends.append(state(learn.model))
    assert ends[0].keys() == ends[1].keys()
    for other in ends[1:]:
        for k in ends[0]:
            close(other[k], ends[0][k])


def test_lr_find_leaves_the_memory(make_learner, make_dls):
    dls = make_dls(n_batches=12)
    learn = make_learner(dls, fixmatch=dict(policy=FeatureDensity(), threshold=0.95))
    quiet_fit(learn, 1, 1e-3)
    before = {k: v.clone() for k, v in learn.fix_match.policy.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
    for k, v in learn.fix_match.policy.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True, msg=k)


# --- compare scores


def test_compare_scores(make_learner, capsys):
    learn = make_learner(model=dropping_net(), fixmatch=dict(policy=FeatureDensity(), threshold=0.95))
    quiet_fit(learn, 4, 1e-2)
    flags, before = odd_flags(learn.model), state(learn.model)
    memory = state(learn.fix_match.policy)
    table = compare_scores(learn, n_passes=3, n_batches=5)
    assert_same(learn.model, before, flags)
    for k, v in learn.fix_match.policy.state_dict().items():
        torch.testing.assert_close(v, memory[k], rtol=0, atol=0, equal_nan=True)
    scores = one_minus_confidence, one_minus_margin, entropy, one_minus_mean_confidence, predictive_entropy, mutual_info
    assert set(table.index) == {'FeatureDensity', *(o.__name__ for o in scores)}
    assert list(table.columns) == ['auroc', 'accuracy', 'n'] and (table.n == 40).all()
    assert table.auroc.is_monotonic_decreasing and table.auroc.between(0, 1).all()
    assert capsys.readouterr().out == ''


def test_compare_scores_numbers(make_learner, monkeypatch):
    "Against sklearn, on batches that are known"
    learn = make_learner(model=add_dropout(tiny_net()))
    learn.model.eval()
    torch.manual_seed(0)
    weak = torch.randn(30, 1, 16, 16)
    with torch.no_grad():
        logits = learn.model(weak) * 5
    truth = logits.argmax(1).clone()
    truth[::3] = (truth[::3] + 1) % 10
    truth[1] = -1  # not known
    peeked = SemiBatch(weak=weak, logits_weak=logits), truth, weak, weak
    monkeypatch.setattr(type(learn.fix_match), 'peek', lambda self, labeled=True: peeked)
    table = compare_scores(learn, n_passes=2, n_batches=1)
    known = truth >= 0
    wrong = (logits.argmax(1) != truth)[known]
    doubt = 1 - logits.softmax(1).max(1).values[known]
    assert table.n.tolist() == [29] * 7
    assert table.accuracy['entropy'] == pytest.approx(19 / 29)
    assert table.auroc['one_minus_confidence'] == pytest.approx(roc_auc_score(wrong, doubt))
    truth.copy_(logits.argmax(1))
    table = compare_scores(learn, n_passes=2, n_batches=1)
    assert math.isnan(table.auroc['entropy']) and table.accuracy['entropy'] == 1


def test_compare_scores_says_what_it_lacks(make_learner, make_dls, capsys):
    table = compare_scores(make_learner(), n_batches=1)
    assert 'mutual_info' not in table.index and len(table) == 4
    assert 'no active dropout' in capsys.readouterr().out
    with pytest.raises(ValueError, match='needs a learner with FixMatch'):
        compare_scores(Learner(make_dls(), tiny_net()))
    with pytest.raises(ValueError, match='label_func'):
        compare_scores(make_learner(label_func=None))
