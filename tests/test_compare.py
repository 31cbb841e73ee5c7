"With and without unlabelled images: runs, statistics, the probe, files, pictures"

import json
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ConvLayer,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Learner,
    PILImageBW,
    accuracy,
    nn,
    noop,
    parent_label,
    set_seed,
)
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fixmatch_fastai.callback import FixMatch
from fixmatch_fastai.labeled import WeakTransform, split_labeled
from fixmatch_fastai.policy import FlexMatch
from fixmatch_fastai.self_training import (
    SupervisedTwin,
    compare,
    compare_supervised,
)
from fixmatch_fastai.self_training.compare import paired_interval, wilson_interval


@pytest.fixture
def arms(digits):
    "Functions that make a learner and a pool"
    train, test = split_labeled(digits, parent_label, 200, seed=3)
    test = test[::40]

    def make_learner(n_labels=20, seed=0):
        labeled, _ = split_labeled(train, parent_label, n_labels, seed)
        splitter = IndexSplitter(range(n_labels, n_labels + len(test)))
        block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label, splitter=splitter)
        dls = block.dataloaders(labeled + test, bs=4, val_bs=64, num_workers=0).repeat_train(3)
        return Learner(dls, tiny_net(), metrics=accuracy)

    return make_learner, lambda dls: dls.unlabeled_dl(train, mu=2, num_workers=0)


FIT = partial(quiet_fit, n_epoch=2, lr=1e-2)


def test_both_arms_begin_alike_and_take_as_many_steps(arms):
    pairs = []

    def keep(learn):
        weights = [o.clone() for o in learn.model.parameters()]
        pairs.append((weights, list(learn.dls.train_ds.items), hasattr(learn, 'fix_match')))
        FIT(learn)

    twin = compare_supervised(*arms, seeds=2, fit=keep, progress=False)
    for a, b in (pairs[:2], pairs[2:]):
        assert (a[2], b[2]) == (False, True) and a[1] == b[1]
        assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert pairs[0][1] != pairs[2][1], 'each seed has its own labels'
    assert twin.runs.steps.tolist() == [0, 6, 6] * 2 and twin.runs.seed.tolist() == [0, 0, 0, 1, 1, 1]
    assert twin.runs.method.tolist() == ['probe', 'supervised', 'FixMatch'] * 2 == [*twin.methods] * 2
    assert twin.arms == ('supervised', 'FixMatch')
    assert len(twin.table()) == 1 and twin.table().seeds.iloc[0] == 2
    assert twin.learn.fix_match.history.shape[0] == 6


def test_accuracies_are_those_of_the_validation_images(arms):
    kept = []
    twin = compare_supervised(*arms, seeds=1, fit=lambda learn: (FIT(learn), kept.append(learn)), progress=False)
    for learn, accuracy_ in zip(kept, twin.runs.accuracy[1:], strict=True):
        with learn.no_bar():
            assert learn.validate()[1] == pytest.approx(accuracy_)
    assert [len(o['curve']) for o in twin.rows] == [0, 2, 2]
    assert twin.rows[1]['curve'][-1] == pytest.approx(twin.rows[1]['accuracy'])


@pytest.mark.slow
def test_more_than_one_number_of_labels(arms):
    twin = compare_supervised(*arms, seeds=[5, 7], n_labels=[10, 40], fit=FIT, progress=False)
    assert twin.table().index.tolist() == [10, 40] and len(twin.rows) == 12
    assert '10 labels:' in repr(twin) and 'worth' in repr(twin)
    hidden = lambda **kwargs: arms[0](**kwargs)
    one = compare_supervised(hidden, arms[1], seeds=[5], n_labels=10, fit=FIT, progress=False)
    same = twin.runs[(twin.runs.n_labels == 10) & (twin.runs.seed == 5)]
    assert one.runs.accuracy.tolist() == same.accuracy.tolist()
    assert twin.plot().get_xscale() == 'log'


def test_the_comparison_warns_of_nothing(arms):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        compare_supervised(*arms, seeds=1, fit=FIT, progress=False)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(arms, tmp_path):
    fits, out = [], tmp_path / 'twin.json'

    def fit(learn):
        fits.append(learn)
        if len(fits) == 3:
            raise KeyboardInterrupt
        FIT(learn)

    with pytest.raises(KeyboardInterrupt):
        compare_supervised(*arms, seeds=2, fit=fit, out=out, progress=False)
    twin = compare_supervised(*arms, seeds=2, fit=fit, out=out, progress=False)
    assert len(fits) == 5 and len(twin.rows) == 6
    whole = compare_supervised(*arms, seeds=2, fit=FIT, progress=False)
    pd.testing.assert_frame_equal(twin.runs.drop(columns='seconds'), whole.runs.drop(columns='seconds'))
    assert twin.table().equals(whole.table()) and repr(twin) == repr(whole)
    again = compare_supervised(*arms, seeds=2, fit=pytest.fail, out=out, progress=False)
    assert again.table().equals(whole.table())


@pytest.mark.slow
def test_an_old_file_without_probes_goes_on(arms, tmp_path):
    out = tmp_path / 'twin.json'
    whole = compare_supervised(*arms, seeds=2, fit=FIT, out=out, progress=False)
    new = json.loads(out.read_text())
    assert [o['method'] for o in new] == ['probe', 'supervised', 'FixMatch'] * 2
    old = [o for o in new if o['method'] != 'probe']
    out.write_text(json.dumps(old[:3]))
    twin = compare_supervised(*arms, seeds=2, fit=FIT, out=out, progress=False)
    assert twin.table().equals(whole.table()) and repr(twin) == repr(whole)
    out.write_text(json.dumps(old))
    twin = compare_supervised(*arms, seeds=2, fit=pytest.fail, out=out, progress=False)
    assert twin.table().equals(whole.table()) and len(json.loads(out.read_text())) == 6
    calls = []
    compare_supervised(lambda: calls.append(1), arms[1], seeds=2, fit=pytest.fail, out=out, progress=False)
    assert not calls, 'nothing is left to do'
    out.write_text(json.dumps(old))

    def other():
        torch.rand(1)
        return arms[0]()

    with pytest.warns(UserWarning, match='goes without the probe. The finished runs began with other weights'):
        twin = compare_supervised(other, arms[1], seeds=2, fit=pytest.fail, out=out, progress=False)
    assert 'probe' not in repr(twin) and twin.table()['FixMatch mean'].equals(whole.table()['FixMatch mean'])


RUN = dict(n_labels=0, seed=0, method='supervised', accuracy=0.75, steps=3, seconds=1.0, right='1101', curve=[0.75])
RUN |= dict(start=1)
DAMAGED = {
    'cut short': '[{',
    'empty': '',
    'a dict': '{}',
    'a number': '3',
    'nothing': 'null',
    'no rows': '[1, null]',
    'a row in a list': json.dumps([[RUN]]),
    'a key is missing': json.dumps([{k: v for k, v in RUN.items() if k != 'right'}]),
    'twice': json.dumps([RUN, RUN]),
    'another accuracy': json.dumps([RUN | dict(accuracy=0.5)]),
    'no accuracy': '[' + json.dumps(RUN).replace('"accuracy": 0.75', '"accuracy": NaN') + ']',
    'no image': json.dumps([RUN | dict(right='')]),
    'other letters': json.dumps([RUN | dict(right='11x1')]),
    'no text': json.dumps([RUN | dict(right=[1, 1, 0, 1])]),
    'a seed in words': json.dumps([RUN | dict(seed='0')]),
    'words for a curve': json.dumps([RUN | dict(curve=['a'])]),
}


@pytest.mark.parametrize('text', [*DAMAGED.values(), b'\xff\xfe'], ids=[*DAMAGED, 'no text at all'])
def test_a_damaged_file_of_runs_is_refused_and_kept(tmp_path, text):
    out, text = tmp_path / 'x.json', text if isinstance(text, bytes) else text.encode()
    out.write_bytes(text)
    with pytest.raises(ValueError, match=r'x\.json is no file of finished runs, or damaged: give another `out`\.'):
        compare_supervised(pytest.fail, None, out=out, progress=False)
    assert out.read_bytes() == text
    with pytest.raises(ValueError, match='`out` must be a file'):
        compare_supervised(pytest.fail, None, out=tmp_path, progress=False)


@pytest.mark.slow
def test_runs_of_another_comparison_are_not_gone_on_with(arms, tmp_path):
    "Other labelled, validation or unlabelled images, another network or method; the same one goes on"
    make_learner, pool = arms
    out, fit = tmp_path / 'x.json', partial(quiet_fit, n_epoch=1)
    call = partial(compare_supervised, fit=fit, out=out, progress=False)
    call(make_learner, pool, seeds=np.arange(1))

    def changed(seed):
        learn = make_learner(seed=seed)
        learn.dls.valid.dataset.items[:2] = learn.dls.valid.dataset.items[1::-1]
        return learn

    def wider(seed):
        learn = make_learner(seed=seed)
        learn.model.append(nn.Tanh())
        return learn

    others = [
        (changed, pool, FixMatch),
        (wider, pool, FixMatch),
        (lambda seed: make_learner(30, seed), pool, FixMatch),
        (make_learner, lambda dls: dls.unlabeled_dl(pool(dls).dataset.items[1:], mu=2, num_workers=0), FixMatch),
        (make_learner, pool, lambda dl: FixMatch(dl, threshold=0.9)),
        (make_learner, pool, lambda dl: FixMatch(dl, lambda_u=2.0)),
    ]
    for make, unlabeled_dl, method in others:
        with pytest.raises(ValueError, match=r'holds runs of another comparison: .* Give another `out`\.'):
            call(make, unlabeled_dl, seeds=2, method=method)
    assert len(json.loads(out.read_text())) == 3
    assert len(call(make_learner, pool, seeds=2).rows) == 6


@pytest.mark.parametrize('resumed', [False, True])
def test_arms_that_share_a_model_are_refused(arms, tmp_path, resumed):
    "The second would begin where the first ended"
    make_learner, pool = arms
    net, out = tiny_net(), tmp_path / 'new folder/twin.json'
    shared = lambda: Learner(make_learner().dls, net, metrics=accuracy)
    with pytest.raises(ValueError, match='`make_learner` must make a new model each time'):
        compare_supervised(shared, pool, seeds=1, fit=FIT, out=out, progress=False)
    if resumed:
        with pytest.raises(ValueError, match='`make_learner` must make a new model each time'):
            compare_supervised(shared, pool, seeds=1, fit=FIT, out=out, progress=False)


def test_other_validation_images_warn(arms):
    make_learner, pool = arms

    def of_seed(seed):
        learn = make_learner(20, seed)
        learn.dls.loaders[1] = learn.dls.test_dl(learn.dls.valid_ds.items[: 10 + seed], with_labels=True)
        return learn

    with pytest.warns(UserWarning, match='but on 10 to 11 of them'):
        twin = compare_supervised(of_seed, pool, seeds=2, fit=FIT, progress=False)
    assert twin.table()['low, over images'].isna().all()
    with pytest.raises(ValueError, match='no run with 11 labels: give one of 0'):
        twin.worth(11)


@pytest.mark.slow
def test_what_can_not_be_compared(arms, tmp_path):
    make_learner, pool = arms

    def with_fixmatch():
        learn = make_learner()
        return learn.add_cb(FixMatch(pool(learn.dls)))

    with pytest.raises(ValueError, match='without FixMatch'):
        compare_supervised(with_fixmatch, pool, seeds=1, progress=False)
    with pytest.raises(ValueError, match='`make_learner` must take it'):
        compare_supervised(lambda: make_learner(), pool, n_labels=[10, 20])
    with pytest.raises(TypeError, match='must return a Learner'):
        compare_supervised(lambda: None, pool, seeds=1, progress=False)
    with pytest.raises(ValueError, match='nothing to compare'):
        compare_supervised(make_learner, pool, seeds=0)
    with pytest.raises(ValueError, match="'supervised' is the other one"):
        compare_supervised(make_learner, pool, name='supervised')
    with pytest.raises(ValueError, match="'probe' is what stands beside the two"):
        compare_supervised(make_learner, pool, name='probe')
    with pytest.raises(TypeError, match=r'must make a callback .* `lambda dl: FixMatch\(dl, policy=FlexMatch\(\)\)`'):
        compare_supervised(make_learner, pool, method=FlexMatch)
    with pytest.raises(TypeError, match='but made a FlexMatch'):
        compare_supervised(make_learner, pool, seeds=1, fit=FIT, method=lambda dl: FlexMatch(), progress=False)
    with pytest.warns(UserWarning, match='No step was trained'):
        compare_supervised(make_learner, pool, seeds=1, fit=noop, progress=False)
    lengths = iter([1, 2])
    longer = lambda learn: quiet_fit(learn, next(lengths))
    with pytest.warns(UserWarning, match='with 3 to 6: the comparison is not fair'):
        compare_supervised(make_learner, pool, seeds=1, fit=longer, progress=False)


def made_up_run(method, right, n_labels=0, seed=0, curve=()):
    right = np.array(list(right)) == '1'
    steps = 0 if method == 'probe' else 9
    run = dict(n_labels=n_labels, seed=seed, method=method, accuracy=right.mean(), steps=steps, seconds=1.0)
    return {**run, 'right': right, 'curve': [*curve]}


def test_intervals_of_the_table():
    "Over seeds scipy's paired t test, over images the normal interval of each image's mean difference"
    rng = np.random.default_rng(0)
    right = {m: rng.random((4, 500)) < p for m, p in (('supervised', 0.6), ('FixMatch', 0.7))}
    twin = SupervisedTwin()
    for seed in range(4):
        for method, o in right.items():
            twin.rows.append(made_up_run(method, ''.join('01'[int(k)] for k in o[seed]), seed=seed))
    row = twin.table().iloc[0] / 100
    a, b = (right[m].mean(1) for m in ('FixMatch', 'supervised'))
    over_seeds = stats.ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose((row['low, over seeds'], row['high, over seeds']), over_seeds, rtol=1e-9)
    d = (right['FixMatch'].astype(float) - right['supervised']).mean(0)
    over_images = stats.norm(d.mean(), stats.sem(d)).interval(0.95)
    np.testing.assert_allclose((row['low, over images'], row['high, over images']), over_images, rtol=1e-9)
    # as by the formulas, with the quantiles of tables: t of 3 degrees of freedom, and the normal distribution
    half = 3.182446305284263 * (a - b).std(ddof=1) / 4**0.5
    assert row['high, over seeds'] == pytest.approx((a - b).mean() + half, abs=1e-9)
    half = 1.959963984540054 * d.std(ddof=1) / 500**0.5
    assert row['low, over images'] == pytest.approx(d.mean() - half, abs=1e-9)


def test_one_seed_or_no_difference():
    "One seed has no interval over seeds; where both arms are alike in all images each interval is a point"
    twin = SupervisedTwin()
    twin.rows += [made_up_run('supervised', '1100'), made_up_run('FixMatch', '1110')]
    assert twin.table()[['low, over seeds', 'high, over seeds', 'difference std']].isna().all(axis=None)
    twin = SupervisedTwin()
    for seed in range(2):
        twin.rows += [made_up_run(m, '1100', seed=seed) for m in twin.arms]
    row = twin.table().iloc[0]
    assert [row[f'{end}, over {o}'] for end in ('low', 'high') for o in ('seeds', 'images')] == [0] * 4


@pytest.mark.parametrize('k,n', [(8, 10), (0, 5), (5, 5), (37, 100), (1, 1), (480, 497)])
def test_wilson_interval_by_the_formula(k, n):
    z, p = 1.959963984540054, k / n
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    low, high = ((middle + o) / (1 + z * z / n) for o in (-half, half))
    assert wilson_interval(k, n) == pytest.approx((max(0, low), min(1, high)), abs=1e-9)


def test_wilson_interval_of_earlier_versions():
    "They had 1.959964 for the quantile"
    assert wilson_interval(8, 10) == pytest.approx((0.4901624691221326, 0.9433178490621853), abs=1e-8)
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1


def test_paired_interval_by_the_formula():
    "Of 100 images one is right on 10 that the other has wrong, and wrong on 4: half an image more in each cell"
    first, second = [1] * 70 + [0] * 30, [1] * 60 + [0] * 10 + [1] * 4 + [0] * 26
    b, c, n = 10, 4, 100
    middle, variance = (b - c) / (n + 2), ((b + c + 1) - (b - c) ** 2 / (n + 2)) / (n + 2) ** 2
    half = 1.959963984540054 * variance**0.5
    assert paired_interval(first, second) == pytest.approx((0.06, middle - half, middle + half), abs=1e-9)
    assert paired_interval([True], [False])[2] == 1 and paired_interval([False], [True])[1] == -1


@pytest.mark.slow
@pytest.mark.parametrize('n_labels', [10, 30])
def test_the_probe_is_scikit_learns(arms, n_labels):
    "On the features before training, with the labels of each seed; of one label a class there is no cross-validation"
    twin = compare_supervised(*arms, seeds=2, n_labels=n_labels, fit=FIT, progress=False)
    for seed, found in enumerate(o for o in twin.rows if o['method'] == 'probe'):
        set_seed(seed)
        learn = arms[0](n_labels, seed)
        features = []
        for dl in (learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True), learn.dls.valid):
            x, y = (torch.cat(o) for o in zip(*dl, strict=True))
            with torch.no_grad():
                features.append((learn.model.eval()[:-1](x).double().numpy(), y.numpy()))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        if n_labels > 10:
            folds = StratifiedKFold(n_labels // 10, shuffle=True, random_state=0)
            grid = {'logisticregression__C': [0.001, 0.01, 0.1, 1]}
            model = GridSearchCV(model, grid, scoring='neg_log_loss', cv=folds)
        right = model.fit(*features[0]).predict(features[1][0]) == features[1][1]
        assert found['right'].dtype == bool and found['right'].tolist() == right.tolist()
        assert found['accuracy'] == right.mean() and found['seed'] == seed
        assert 0.2 < right.mean() < 1


def refused(learn):
    raise ValueError('Not this one.')


def of_fastai(n_labels=20, seed=0, arms=None):
    "Random views, shuffled validation and a worker"
    dls = arms[0](n_labels, seed).dls
    noisy = nn.Sequential(*tiny_net()[:3], nn.Dropout(0.2), nn.Linear(128, 10))
    dls.train.after_item.add(WeakTransform())
    dls = DataLoaders(dls.train, dls.valid.new(shuffle=True, num_workers=1))
    return Learner(dls, noisy, metrics=accuracy, loss_func=CrossEntropyLossFlat())


def of_torch(n_labels=20, seed=0, arms=None):
    "Loaders with random numbers of their own"
    dls = arms[0](n_labels, seed).dls
    x, y = (torch.cat(o) for o in zip(*dls.test_dl(dls.train_ds.items, with_labels=True), strict=True))
    train = torch.utils.data.TensorDataset(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))
    train = torch.utils.data.DataLoader(train, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Learner(DataLoaders(train, dls.valid), tiny_net(), metrics=accuracy, loss_func=CrossEntropyLossFlat())


@pytest.mark.slow
@pytest.mark.parametrize('make_learner', [of_fastai, of_torch])
def test_the_probe_changes_nothing_of_the_training(arms, monkeypatch, make_learner):
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pool = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.flip(-1)), 8)

    def trained():
        kept = []

        def fit(learn):
            FIT(learn)
            kept.append([o.clone() for o in learn.model.state_dict().values()])

        twin = compare_supervised(partial(make_learner, arms=arms), pool, seeds=1, fit=fit, progress=False)
        return twin, kept

    twin, weights = trained()
    monkeypatch.setattr(compare, 'probe', refused)
    with pytest.warns(UserWarning, match=r'goes without the probe\. Not this one\.') as told:
        without, expected = trained()
    assert len([o for o in told if 'probe' in str(o.message)]) == 1 and told[0].filename == __file__
    assert all(torch.equal(p, q) for a, b in zip(weights, expected, strict=True) for p, q in zip(a, b, strict=True))
    rows = [o for o in twin.rows if o['method'] != 'probe']
    assert len(rows) == 2 == len(without.rows) and len(twin.rows) == 3
    for a, b in zip(rows, without.rows, strict=True):
        assert a['right'].tolist() == b['right'].tolist()
        assert all(a[k] == b[k] for k in ('method', 'seed', 'accuracy', 'steps', 'curve', 'start'))
    assert without.methods == without.arms and 'probe' not in repr(without) + ''.join(without.table().columns)
    pd.testing.assert_frame_equal(twin.table()[without.table().columns], without.table())
    assert [o for o in twin.report().splitlines() if not o.startswith('probe')] == without.report().splitlines()
    assert len(without.plot().get_legend().get_texts()) == 2


def test_what_can_not_be_probed_is_compared_all_the_same(arms):
    "Here a network without a linear layer"
    make_learner, pool = arms

    def convolutional():
        net = nn.Sequential(ConvLayer(1, 8), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Learner(make_learner().dls, net, metrics=accuracy)

    with pytest.warns(UserWarning, match=r'goes without the probe\. The model has no linear layer') as told:
        twin = compare_supervised(convolutional, pool, seeds=2, fit=FIT, progress=False)
    assert len(told) == 1 and twin.runs.method.tolist() == ['supervised', 'FixMatch'] * 2
    assert len(twin.report().splitlines()) == 4


def test_the_probe_is_a_line_beside_the_two():
    "Of four images each it has 1 and 2 right, supervised training 2 and 2, FixMatch 3 and 3"
    twin = SupervisedTwin()
    for seed, (a, b) in enumerate((('1100', '1110'), ('1010', '0111'))):
        twin.rows.append(made_up_run('supervised', a, seed=seed, curve=(0.25, 0.5)))
        twin.rows.append(made_up_run('FixMatch', b, seed=seed, curve=(0.5, 0.75)))
    without = twin.table()
    twin.rows.append(made_up_run('probe', '1000'))
    assert 'probe  ' not in twin.report(), 'a mean of other seeds is no comparison'
    assert np.isnan(twin.table()['probe mean'].iloc[0])
    twin.rows.append(made_up_run('probe', '1001', seed=1))
    pd.testing.assert_frame_equal(twin.table()[without.columns], without)
    lines = twin.report().splitlines()
    assert [o.split()[0] for o in lines[1:]] == ['probe', 'supervised', 'FixMatch', 'difference']
    assert 'better in 2 of 2' in lines[4]
    assert lines[1].startswith('probe         37.5 ± 17.7 %   logistic regression'), lines[1]
    twin.rows.append(made_up_run('probe', '1111', seed=2))
    assert twin.report().splitlines() == lines, 'a seed of which the two are not known yet'


def test_the_probe_is_flat_in_the_plot():
    twin = SupervisedTwin()
    for seed, (a, b, c) in enumerate((('1000', '1100', '1110'), ('1001', '1010', '0111'))):
        twin.rows.append(made_up_run('probe', a, seed=seed))
        twin.rows.append(made_up_run('supervised', b, seed=seed, curve=(0.25, 0.5)))
        twin.rows.append(made_up_run('FixMatch', c, seed=seed, curve=(0.5, 0.75)))
    ax = twin.plot()
    texts = [o.get_text() for o in ax.get_legend().get_texts()]
    assert texts == ['probe, 37.5 %', 'supervised, 50.0 %', 'FixMatch, 75.0 %']
    flat = [o for o in ax.lines if len(set(o.get_ydata())) == 1]
    assert [o.get_ydata()[0] for o in flat] == [25, 50, 37.5] and {o.get_color() for o in flat} == {'C1'}
    assert len({o.get_color() for o in ax.lines}) == 3
    twin.rows += [{**o, 'n_labels': 40} for o in twin.rows]
    ax = twin.plot()
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['probe', 'supervised', 'FixMatch']
    assert [o.get_ydata()[-1] for o in ax.lines[1::2]] == [37.5, 50, 75]
    plt.close('all')


def test_the_probe_has_no_say_in_what_labels_are_worth():
    twin = SupervisedTwin()
    for n, a, b in ((10, '1100', '1110'), (40, '1111', '1111')):
        twin.rows += [made_up_run('supervised', a, n), made_up_run('FixMatch', b, n)]
    assert twin.worth(10) == pytest.approx(20)
    twin.rows += [made_up_run('probe', '0000', n) for n in (5, 10, 40)]
    assert twin.worth(10) == pytest.approx(20) and twin.table().worth[10] == pytest.approx(20)
    with pytest.raises(ValueError, match='no run with 5 labels: give one of 10, 40'):
        twin.worth(5)
