"A mistake gets one sentence that says what to do, before the first step, and the learner stays usable"

import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, MixUp, nn
from PIL import Image

from fixmatch_fastai.all import (
    FixedThreshold,
    FixMatch,
    FixMatchBatchTransform,
    FixMatchTransform,
    FlexMatch,
    ModelEMA,
    Policy,
    PseudoLabels,
    SaveFixMatch,
    ShowPseudoLabels,
    split_labeled,
    strong_augment,
    weak_augment,
)
from fixmatch_fastai.augment import WeakAugment
from fixmatch_fastai.recipe import FrozenBatchNorm
from fixmatch_fastai.record import StopOnTrouble
from fixmatch_fastai.self_training.meta_pseudo_labels import MetaPseudoLabels


def labeled(y=None, x=None):
    "`DataLoaders` of two batches, which are one"
    y = torch.zeros(4, dtype=torch.long) if y is None else y
    x = torch.randn(4, 1, 16, 16) if x is None else x
    batch = (*x, y) if isinstance(x, tuple) else (x, y)
    return DataLoaders([batch] * 2, [batch] * 2)


def views(n=8, shape=(1, 16, 16)):
    return [(torch.randn(n, *shape), torch.randn(n, *shape))]


def refused(dls, model, loader, exc, match, loss=None):
    learn = Learner(dls, model, loss or CrossEntropyLossFlat(), cbs=FixMatch(loader))
    own = learn.loss_func
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(exc, match=match) as e:
        quiet_fit(learn, 1)
    sentence = str(e.value).split('\n')[-1].strip()
    assert sentence.endswith('.') and len(sentence) < 400 and '\n' not in sentence
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), 'before the first step'
    assert learn.loss_func is own
    return learn


@pytest.mark.parametrize(
    'y,match,loss',
    [
        (torch.zeros(4, 10), 'multi-label', nn.BCEWithLogitsLoss()),
        (torch.zeros(4), 'regression, or binary with one logit', nn.MSELoss()),
        (torch.zeros(4, 1), 'regression, or binary with one logit', nn.BCEWithLogitsLoss()),
        (torch.zeros(4, 16, 16, dtype=torch.long), 'segmentation', None),
    ],
    ids=['multi-label', 'regression', 'binary', 'segmentation'],
)
def test_targets_of_other_tasks(y, match, loss):
    refused(labeled(y), tiny_net(), views(), ValueError, match, loss)


class OneLogit(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.net = tiny_net(n)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    'model',
    [OneLogit(1), nn.Sequential(tiny_net(10), nn.Unflatten(1, (2, 5))), nn.Sequential(tiny_net(1), nn.Flatten(0))],
    ids=['one logit', 'a map', 'flat'],
)
def test_outputs_that_are_no_logits(model):
    refused(labeled(), model, views(), ValueError, 'end the model in a linear layer', lambda p, y: p.float().mean())


class TwoOutputs(OneLogit):
    def forward(self, x):
        return self.net(x), x


def test_model_with_two_outputs():
    refused(labeled(), TwoOutputs(10), views(), ValueError, 'the model returns \\(Tensor', lambda p, y: p[0].mean())


class TwoInputs(OneLogit):
    def forward(self, a, b):
        return self.net(a + b)


def test_model_with_two_inputs():
    x = (torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16))
    learn = refused(labeled(x=x), TwoInputs(10), views(), ValueError, 'models with one input')
    learn.validate()


@pytest.mark.parametrize(
    'loader,exc,match',
    [
        ([], ValueError, 'yields no batch'),
        (iter([]), ValueError, 'an iterator that is used up'),
        (['cat.jpg'], TypeError, 'but it yields str: make it with'),
        ([torch.zeros(8, 1, 16, 16)], TypeError, 'but it yields Tensor'),
        ([(torch.zeros(8, 1, 16, 16), torch.zeros(8))], TypeError, r'\(Tensor\(8, 1, 16, 16\), Tensor\(8,\)\)'),
        ([dict(weak=1)], TypeError, 'yields dict'),
        ([(torch.zeros(8, 1, 16, 16), torch.zeros(7, 1, 16, 16))], ValueError, 'one shape and dtype'),
        (views(shape=(1, 20, 20)), ValueError, r'A view is \(1, 20, 20\).*a labelled image is \(1, 16, 16\)'),
        (views(shape=(3, 16, 16)), ValueError, r'A view is \(3, 16, 16\).* for each channel'),
        ([(torch.zeros(8, 1, 16, 16, dtype=torch.uint8),) * 2], ValueError, '`mean` and `std`'),
    ],
    ids=['empty', 'used up', 'files', 'tensor', 'labelled', 'dict', 'unequal', 'size', 'channels', 'uint8'],
)
def test_unlabeled_loaders_of_another_shape(loader, exc, match):
    learn = refused(labeled(), tiny_net(), loader, exc, match)
    learn.remove_cb(FixMatch)
    learn.validate()
    quiet_fit(learn, 1, cbs=FixMatch(views()))
    quiet_fit(learn, 1)


def test_labeled_images_that_are_not_floats():
    dls = labeled(x=torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    refused(dls, tiny_net(), views(), ValueError, 'must be floats, but are torch.uint8')


def test_wrong_arguments_of_loaders(make_dls, pool):
    dls = make_dls()
    for bad, exc, match in (
        (dict(items=pool[0].parent), TypeError, r'use `get_image_files\('),
        (dict(items=str(pool[0].parent)), TypeError, r'use `get_image_files\('),
        (dict(items=pool, bs=0), ValueError, '1 or more'),
        (dict(items=pool, mu=1.5), ValueError, '1 or more'),
        (dict(items=[]), ValueError, 'is empty'),
    ):
        with pytest.raises(exc, match=match):
            dls.unlabeled_dl(**bad)
    for tfm in (lambda o: o, lambda o: (o, o), lambda o: torch.zeros(1, 4, 4)):
        with pytest.raises(TypeError, match='must return two tensors'):
            dls.unlabeled_dl(pool, tfm=tfm).one_batch()
    with pytest.raises(ValueError, match='whole number'):
        dls.repeat_train(2.5)
    with pytest.raises(ValueError, match='a multiple of 10'):
        split_labeled(pool, lambda o: o.parent.name, -10)


@pytest.mark.parametrize(
    'kwargs,match',
    [
        (dict(weak=WeakAugment), r'use `weak=WeakAugment\(\)`'),
        (dict(weak=weak_augment), r'use `weak=weak_augment\(\)`'),
        (dict(strong=strong_augment), r'use `strong=strong_augment\(\)`'),
        (dict(strong='paper'), r"use for example `strong=strong_augment\('paper'\)`"),
        (dict(weak=3), r'use for example `weak=weak_augment\(\)`'),
    ],
    ids=['class', 'weak', 'strong', 'name', 'number'],
)
@pytest.mark.parametrize('cls', [FixMatchTransform, FixMatchBatchTransform])
def test_what_makes_a_view_in_place_of_it(cls, kwargs, match):
    with pytest.raises(TypeError, match=match):
        cls(**kwargs)


@pytest.mark.parametrize('cls', [FixMatchTransform, FixMatchBatchTransform])
def test_a_transforms_class_in_place_of_a_transform(make_dls, pool, cls):
    with pytest.raises(TypeError, match=rf'is the class {cls.__name__}: use `tfm={cls.__name__}\(\)`'):
        make_dls().unlabeled_dl(pool, tfm=cls)


def test_a_transforms_class_in_a_torch_data_set():
    with pytest.raises(TypeError, match=r'use `transform=FixMatchTransform\(mean, std\)`, not the class'):
        FixMatchTransform(Image.new('RGB', (8, 8)))


def test_fewer_labels_than_bs(make_dls, make_learner, pool):
    dls = make_dls(bs=64, n_batches=None)
    learn = make_learner(dls=dls)
    fewer = r'fewer labelled images \(20\) than the batch size \(64\).*repeat_train\(100\)'
    with pytest.raises(ValueError, match=fewer):
        quiet_fit(learn, 1)
    assert len(learn.validate()) == 2 and learn.predict(pool[0])
    learn.dls = dls.repeat_train(2)
    quiet_fit(learn, 1)


def test_two_fixmatch_callbacks(make_learner, make_dls, pool):
    learn = make_learner()
    with pytest.raises(ValueError, match='two FixMatch callbacks'):
        quiet_fit(learn, 1, cbs=FixMatch(make_dls().unlabeled_dl(pool)))
    quiet_fit(learn, 1)


@pytest.mark.parametrize(
    'kwargs,exc,match',
    [
        (dict(threshold=1.1), ValueError, 'between 0 and 1'),
        (dict(threshold='high'), ValueError, 'between 0 and 1'),
        (dict(threshold=-0.1), ValueError, 'between 0 and 1'),
        (dict(T=0), ValueError, 'above 0'),
        (dict(T=-1), ValueError, 'above 0'),
        (dict(lambda_u=-0.1), ValueError, '0 or more'),
        (dict(lambda_u=float('nan')), ValueError, '0 or more'),
        (dict(forward='twice'), ValueError, "must be 'joint'"),
        (dict(policy=FixedThreshold(), threshold=0.9), ValueError, 'either `policy`, or'),
        (dict(policy=FixedThreshold(), T=0.5), ValueError, 'either `policy`, or'),
        (
            dict(policy=FlexMatch),
            TypeError,
            'must be a Policy, but is the class FlexMatch: use `policy=FlexMatch\\(\\)`',
        ),
        (dict(policy=3), TypeError, 'must be a Policy, but is a int: use for example'),
    ],
    ids=lambda o: str(o) if isinstance(o, dict) else '',
)
def test_wrong_arguments_of_fixmatch(kwargs, exc, match):
    with pytest.raises(exc, match=match):
        FixMatch(views(), **kwargs)


class WrongShape(Policy):
    def forward(self, batch):
        c, k = batch.probs.max(1, keepdim=True)
        return PseudoLabels(k[:, 0], c)


def test_policy_with_weights_that_would_broadcast():
    fix_match = FixMatch(views(), policy=WrongShape())
    learn = Learner(labeled(), tiny_net(), CrossEntropyLossFlat(), cbs=fix_match)
    with pytest.raises(ValueError, match=r'WrongShape gives weights \(8, 1\) for losses \(8,\)'):
        quiet_fit(learn, 1)
    assert type(learn.loss_func) is CrossEntropyLossFlat


def test_policy_that_returns_something_else(make_learner):
    class TargetsAlone(FixedThreshold):
        def forward(self, batch):
            return super().forward(batch).targets

    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': TargetsAlone()})
    with pytest.raises(TypeError, match=r'TargetsAlone must return `PseudoLabels\(targets, weights\)`'):
        learn.fix_match.show_pseudo_labels()
    with pytest.raises(TypeError, match='TargetsAlone must return'):
        quiet_fit(learn, 1)


TEACHER = '`teacher` must be a ModelEMA, but is'
WARMUP = '`warmup` is a share of the fit, 0 or more and below 1, but got'


@pytest.mark.parametrize(
    'kwargs,exc,sentence',
    [
        (dict(teacher=ModelEMA), TypeError, f'{TEACHER} the class ModelEMA: use for example `teacher=ModelEMA('),
        *((dict(teacher=o), TypeError, f'{TEACHER} a {type(o).__name__}: use') for o in (3, MixUp(), nn.Linear(1, 1))),
        *((dict(warmup=o), ValueError, f'{WARMUP} {o!r}.') for o in (1, -0.1, True, 'a', None, float('nan'))),
    ],
    ids=str,
)
def test_wrong_teacher_or_warmup(kwargs, exc, sentence):
    with pytest.raises(exc) as e:
        FixMatch([], **kwargs)
    assert str(e.value).startswith(sentence) and '\n' not in str(e.value)


# --- one image in a batch


def one_label(n=6, **kwargs):
    "A learner whose head has a BatchNorm1d, and whose labelled batches have one image"
    batch = torch.randn(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    model = nn.Sequential(tiny_net(), nn.BatchNorm1d(10))
    return Learner(DataLoaders([batch] * 2, [batch]), model, CrossEntropyLossFlat(), cbs=FixMatch(views(n), **kwargs))


@pytest.mark.parametrize('forward', ['joint', 'split', 'selective'])
def test_a_batch_of_one_label_trains(forward):
    learn = one_label(forward=forward, threshold=1.0)  # nothing counts, so that `'selective'` keeps no view of its own
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 2


ONE_IMAGE = [dict(warmup=0.5), dict(n=1, forward='split'), dict(n=1, forward='selective')]


@pytest.mark.parametrize('kwargs', ONE_IMAGE, ids=str)
def test_a_pass_of_one_image_is_refused(kwargs):
    with pytest.raises(ValueError, match='has a single image, which BatchNorm1d .*: use a `bs` of 2 or more'):
        quiet_fit(one_label(**kwargs), 1)


# --- one callback, two learners


def plain_learner(*cbs):
    return Learner(labeled(), tiny_net(), CrossEntropyLossFlat(), cbs=cbs)


@pytest.mark.parametrize(
    'make',
    [
        lambda: FixMatch(views()),
        lambda: FixMatch(views(), teacher=ModelEMA(half_life=1)),
        lambda: MetaPseudoLabels(tiny_net(), views()),
        lambda: ModelEMA(half_life=1),
        SaveFixMatch,
        StopOnTrouble,
        ShowPseudoLabels,
        FrozenBatchNorm,
    ],
    ids=['FixMatch', 'teacher', 'MetaPseudoLabels', 'ModelEMA', 'Save', 'Stop', 'Show', 'FrozenBatchNorm'],
)
def test_a_callback_given_to_a_second_learner(make, tmp_path):
    cb = make()
    first, second = plain_learner(cb), plain_learner(cb)
    first.path = second.path = tmp_path
    quiet_fit(second, 1)
    name = type(cb).__name__
    with pytest.raises(ValueError, match=f"This Learner's {name} was given to another Learner.*`learn.add_cb") as e:
        quiet_fit(first, 1)
    assert str(e.value).split('\t')[-1].count('\n') == 0
    first.validate()
    quiet_fit(second, 1)
    first.add_cb(make())
    quiet_fit(first, 1)


def test_a_callback_that_comes_back():
    fm = FixMatch(views())
    first, second = plain_learner(fm), plain_learner(fm)
    first.add_cb(fm)
    quiet_fit(first, 1)
    assert len(fm.history) == 2 and 'loss_u' in first.recorder.metric_names
    with pytest.raises(ValueError, match='was given to another Learner'):
        quiet_fit(second, 1)


def test_a_callback_whose_learner_is_lost():
    fm = FixMatch(views())
    first, second = plain_learner(fm), plain_learner(fm)
    first.remove_cb(fm)
    with pytest.raises(ValueError, match='FixMatch has lost its Learner .*: make the Learner anew'):
        quiet_fit(second, 1)
