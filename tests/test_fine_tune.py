"The probe against scikit-learn, the network that begins with it, and the recipe for pretrained networks stage by stage"

import math
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Raise, quiet_fit, tiny_net
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    L,
    Learner,
    accuracy,
    load_learner,
    nn,
    params,
    parent_label,
    set_seed,
    vision_learner,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fixmatch_fastai.all import FixedThreshold, FixMatch, FlexMatch, ModelEMA, SaveFixMatch
from fixmatch_fastai.recipe import FrozenBatchNorm, PoolCheck, probe, probe_head


def two_groups(model):
    return L(model[0], model[1:]).map(params)


@pytest.fixture
def make(make_dls, tmp_path):
    "A learner in two groups, and a pool for it"

    def make(dls=None, net=tiny_net, **kwargs):
        dls = dls or make_dls()
        set_seed(0)
        return Learner(dls, net(), **{'metrics': accuracy, 'path': tmp_path, 'splitter': two_groups, **kwargs})

    return make


@pytest.fixture
def pool_of(pool):
    def pool_of(dls, **kwargs):
        return dls.unlabeled_dl(pool, **{'mu': 2, 'label_func': parent_label, 'num_workers': 0, **kwargs})

    return pool_of


def state(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def features_by_hand(learn, items):
    x, y = learn.dls.test_dl(items, with_labels=True, bs=len(items)).one_batch()
    with torch.no_grad():
        return learn.model[:-1].eval()(torch.Tensor(x)).numpy().astype(np.float64), y.numpy()


# the probe


SCALED = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def test_probe_is_scikit_learns(make):
    learn = make()
    found = probe(learn)
    (x, y), (x_v, y_v) = (features_by_hand(learn, o.items) for o in (learn.dls.train_ds, learn.dls.valid_ds))
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    search = GridSearchCV(SCALED, {'logisticregression__C': [1e-3, 1e-2, 0.1, 1]}, scoring='neg_log_loss', cv=folds)
    search.fit(x, y)
    assert found.C == search.best_params_['logisticregression__C']
    assert (found.right == (search.predict(x_v) == y_v)).all()
    assert found.accuracy == search.best_estimator_.score(x_v, y_v)
    logits = torch.tensor(x_v, dtype=torch.float32) @ found.weight.T + found.bias
    np.testing.assert_allclose(logits.numpy(), search.best_estimator_.decision_function(x_v), atol=1e-4)
    assert 0 <= found.cv_accuracy <= 1 and f'{found.accuracy:.1%} of {len(y_v)} validation images' in repr(found)


def test_probe_changes_nothing(make):
    learn = make()
    before, modes = state(learn), [m.training for m in learn.model.modules()]
    probe(learn)
    assert equal(before, state(learn)) and modes == [m.training for m in learn.model.modules()] and learn.opt is None


def simple_learner(data, net, **kwargs):
    return Learner(DataLoaders(data, data), net, CrossEntropyLossFlat(), splitter=two_groups, **kwargs)


def no_linear():
    return nn.Sequential(nn.Conv2d(1, 2, 16), nn.Flatten())


def torch_loader(n_classes, n_each, net_in=1, seed=0):
    "Images whose mean brightness says their class"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n_classes).repeat_interleave(n_each)
    x = torch.randn(len(y), net_in, 16, 16, generator=g) * 0.1 + y.view(-1, 1, 1, 1)
    return [(x[i::2], y[i::2]) for i in range(2)]


@pytest.mark.parametrize('n_classes', [2, 3])
def test_torch_loaders_and_two_classes(n_classes):
    data = torch_loader(n_classes, 4)
    learn = simple_learner(data, tiny_net(n_classes), metrics=accuracy)
    found = probe_head(learn)
    assert found.accuracy > 0.9 and found.weight.shape == (n_classes, 128)
    with learn.no_bar():
        assert learn.validate()[1] == pytest.approx(found.accuracy)


def test_one_label_a_class_and_a_class_without():
    "No cross-validation is possible; a class without a label is never said, and its logit stays finite in the head"
    data = [(torch.randn(2, 1, 16, 16), torch.tensor([0, 2]))]
    learn = simple_learner(data, tiny_net(4))
    learn.dls.vocab = list('abcd')
    found = probe_head(learn)
    assert math.isnan(found.cv_accuracy) and found.bias[[1, 3]].isneginf().all() and found.bias[[0, 2]].isfinite().all()
    with torch.no_grad():
        logits = learn.model.eval()(data[0][0])
    assert logits.isfinite().all() and logits.argmax(1).tolist() == [0, 2]


def test_without_validation_images():
    data = torch_loader(2, 4)
    learn = Learner(DataLoaders(data), tiny_net(2), CrossEntropyLossFlat(), splitter=two_groups)
    found = probe(learn)
    assert math.isnan(found.accuracy) and len(found.right) == 0


def test_models_that_are_not_split_end_in_a_linear_layer(make):
    "The features are what their last linear layer gets"
    split, whole = make(), make(splitter=lambda m: params(m))
    assert (probe(split).right == probe(whole).right).all()
    probe_head(whole), probe_head(split)
    assert equal(state(split), state(whole))


@pytest.mark.parametrize(
    'y,net,contains',
    [
        (torch.zeros(4, 3), tiny_net, 'one class number for each image'),
        (torch.rand(4), tiny_net, 'one class number for each image'),
        (torch.zeros(4, dtype=torch.long), tiny_net, 'of two classes or more'),
        (torch.arange(4) % 2, no_linear, 'no linear layer that could be its head'),
        (torch.arange(4), partial(tiny_net, 2), 'The head has 2 outputs'),
    ],
    ids=['several labels', 'numbers', 'one class', 'no linear layer', 'too few outputs'],
)
def test_what_the_probe_refuses(y, net, contains):
    data = [(torch.randn(4, 1, 16, 16), y)]
    learn = Learner(DataLoaders(data, data), net(), CrossEntropyLossFlat())
    before = state(learn)
    with pytest.raises(ValueError, match=contains):
        probe_head(learn)
    assert equal(before, state(learn))


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['test_resnet', 'test_vit'])
def test_heads_of_fastai_on_bodies_of_timm(make_dls, arch):
    "A head of two layers says what the probe says, on most images, and nothing but the head has changed"
    from fastai.vision.all import PILImage, Resize

    dls = make_dls(bs=4, n_batches=2, img_cls=PILImage, item_tfms=Resize(160 if arch == 'test_vit' else 32))
    learn = vision_learner(dls, arch, pretrained=False, metrics=accuracy)
    body, modes = deepcopy(learn.model[0].state_dict()), [m.training for m in learn.model.modules()]
    wants = [p.requires_grad for p in learn.model.parameters()]
    found = probe_head(learn)
    with learn.no_bar():
        assert abs(learn.validate()[1] - found.accuracy) <= 0.2
    assert equal(body, learn.model[0].state_dict()) and wants == [p.requires_grad for p in learn.model.parameters()]
    assert modes == [m.training for m in learn.model.modules()] or not learn.model.training


# the recipe


fine_tune = partial(quiet_fit, method='fine_tune_fixmatch')


class Watch(Callback):
    "What each step looked like"

    order = 90

    def before_fit(self):
        self.rows, self.start = [], state(self.learn)

    def after_batch(self):
        if self.training:
            norm = any(m.training for m in self.model.modules() if isinstance(m, nn.BatchNorm2d))
            self.rows.append((self.learn.fix_match.warming_up, [h['lr'] for h in self.opt.hypers], norm))


@pytest.mark.slow
def test_stage_by_stage(make, pool_of):
    learn, watch = make(), Watch()
    dls, probed = learn.dls, make()
    found = fine_tune(learn, pool_of(learn.dls), 20, base_lr=1e-3, n_epoch=5, cbs=watch)
    head = probe_head(probed)
    assert found.accuracy == head.accuracy and equal(watch.start, state(probed)), 'it begins as the probe'
    warming, lrs, norms = zip(*watch.rows)
    assert len(warming) == 20 and learn.dls is dls and len(learn.recorder.values) == 5
    assert warming[:7] == (True,) * 7 and not any(warming[8:]), 'two fifths on labels alone'
    body, of_head = zip(*lrs)
    np.testing.assert_allclose(np.array(body), 0.3 * np.array(of_head), rtol=1e-6)
    # a cycle for each stage
    assert of_head[2] == pytest.approx(1e-3) and max(of_head) <= 1e-3 and of_head[7] < 1e-4 < of_head[11]
    assert not any(norms) and torch.equal(learn.model[0][1].running_mean, torch.zeros(8)), 'BatchNorm is frozen'
    history = learn.fix_match.history
    assert history.mask_rate.isna().sum() == 8 and len(history) == 20
    teacher = learn.fix_match.teacher
    assert learn.model_ema is teacher and teacher.averaged and teacher.half_life == pytest.approx(2.5)
    assert not learn._grab_cbs(FrozenBatchNorm) and not learn._grab_cbs(PoolCheck)


def test_options_of_fine_tuning(make, pool_of):
    learn, teacher, policy = make(), ModelEMA(half_life=3), FlexMatch(0.5)
    options = dict(policy=policy, teacher=teacher, warmup=0.0, freeze_bn=False, n_epoch=2, lambda_u=0.5)
    fine_tune(learn, pool_of(learn.dls), 6, **options)
    assert learn.fix_match.policy is policy and learn.model_ema is teacher and learn.fix_match.lambda_u == 0.5
    assert learn.fix_match.history.mask_rate.notna().all()
    assert learn.model[0][1].running_mean.abs().sum() > 0


@pytest.mark.slow
def test_again_and_after_another_fixmatch(make, pool_of):
    "The callbacks of the fit before are taken off; nothing piles up"
    learn = make()
    learn.add_cbs([FixMatch(pool_of(learn.dls)), ModelEMA(half_life=2)])
    for _ in range(2):
        fine_tune(learn, pool_of(learn.dls), 4, n_epoch=1)
        assert len(learn._grab_cbs(FixMatch)) == len(learn._grab_cbs(ModelEMA)) == 1
    loss, acc = learn.validate()
    assert 0 <= acc <= 1


INTERRUPTS = dict(before_fit=[1], after_pred=[2, 9], after_step=[4], before_validate=[2], after_fit=[1])


@pytest.mark.slow
@pytest.mark.parametrize('event,times', [(event, n) for event, times in INTERRUPTS.items() for n in times])
def test_fine_tuning_after_an_interrupt(make, pool_of, event, times):
    "In either stage, and between: the learner predicts, exports, and can be fine-tuned again"
    learn = make()
    dls = learn.dls
    with pytest.raises(KeyboardInterrupt):
        fine_tune(learn, pool_of(dls), 10, n_epoch=5, cbs=Raise(event, KeyboardInterrupt, times=times))
    assert learn.dls is dls
    with learn.no_bar():
        assert len(learn.validate()) == 2
    learn.export()
    with load_learner(learn.path / 'export.pkl').no_bar():
        pass
    fine_tune(learn, pool_of(dls), 4, n_epoch=2)
    assert len(learn.fix_match.history) == 4


@pytest.mark.slow
@pytest.mark.parametrize('stop', [2, 7])
def test_fine_tuning_resumes(make, pool_of, tmp_path, stop):
    "Stopped on labels alone, or with the pool, and called again: as if it had not been"

    def run(fname, *cbs, resume=False):
        learn = make()
        set_seed(3)
        try:
            fine_tune(learn, pool_of(learn.dls), 10, n_epoch=5, cbs=[SaveFixMatch(fname, resume=resume), *cbs])
        except KeyboardInterrupt:
            return None
        return state(learn)

    whole = run('whole')
    assert run('part', Raise('after_batch', KeyboardInterrupt, times=2 * stop)) is None
    assert equal(run('part', resume=True), whole)


def test_epochs_of_fine_tuning(make, make_dls, pool_of):
    "As many steps as asked for, or a few more, however few the labels; a torch loader's epochs are what they are"
    learn = make(make_dls(n_batches=None))
    fine_tune(learn, pool_of(learn.dls), 7, n_epoch=3)
    assert len(learn.fix_match.history) == 9 and len(learn.recorder.values) == 3
    data = torch_loader(2, 4)
    learn = simple_learner(data, tiny_net(2))
    views = [(torch.randn(8, 1, 16, 16), torch.randn(8, 1, 16, 16))]
    fine_tune(learn, views, 5)
    assert len(learn.fix_match.history) == 6


def test_pool_that_cannot_help(make, pool_of):
    "Teacher and probe must agree where the teacher is sure, or the rest goes on with labels alone"
    learn = make()
    options = dict(base_lr=0.1, n_epoch=2, policy=FixedThreshold(0.0))
    with pytest.warns(UserWarning, match='images are left out from here on: .* says the same as the probe of'):
        fine_tune(learn, pool_of(learn.dls), 10, **options, min_agreement=1.0)
    assert learn.fix_match.history.mask_rate.isna().all() and learn.fix_match.warmup == 0.4
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='The unlabelled images are left out')
        fine_tune(learn, pool_of(learn.dls), 10, **options, min_agreement=0)
    assert learn.fix_match.history.mask_rate.notna().sum() == 6


@pytest.mark.parametrize(
    'kwargs,contains',
    [
        (dict(n_steps=0), '1 or more, but got 0'),
        (dict(n_steps=True), '1 or more'),
        (dict(warmup=1.0), 'below 1'),
        (dict(min_agreement=2), 'a share between 0 and 1'),
    ],
)
def test_arguments_that_fine_tuning_refuses(make, pool_of, kwargs, contains):
    learn = make()
    before, dls = state(learn), learn.dls
    with pytest.raises(ValueError, match=contains):
        learn.fine_tune_fixmatch(pool_of(learn.dls), **kwargs)
    assert equal(before, state(learn)) and learn.dls is dls and not learn._grab_cbs(FixMatch)


@pytest.mark.parametrize('pretrained,teacher,said', [(True, False, True), (False, False, False), (True, True, False)])
def test_plain_fixmatch_on_a_pretrained_network_is_warned_of(make, pool_of, pretrained, teacher, said):
    learn = make()
    learn.pretrained = pretrained
    learn.add_cb(FixMatch(pool_of(learn.dls), teacher=ModelEMA(half_life=2) if teacher else None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet_fit(learn, 1)
    assert any('fine_tune_fixmatch(unlabeled_dl)' in str(o.message) for o in caught) == said


def test_frozen_batch_norm_in_every_epoch(make):
    learn = make(cbs=FrozenBatchNorm)
    before = state(learn)
    quiet_fit(learn, 2, 1e-2)
    after = state(learn)
    for name in before:
        assert torch.equal(before[name], after[name]) == ('running' in name or 'tracked' in name), name
