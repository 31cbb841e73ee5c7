"Looking at the whole pool: numbers against independent ones, nothing changed, every kind of loader and policy"

import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Learner,
    MultiCategoryBlock,
    PILImageBW,
    RandomSplitter,
    SimpleNamespace,
    load_learner,
    nn,
    parent_label,
    set_seed,
)
from PIL import Image
from scipy.spatial.distance import cdist
from torchvision.datasets import ImageFolder

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    FixedThreshold,
    FixMatchBatchTransform,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    PseudoLabelInterpretation,
    ShowPseudoLabels,
    SoftMatch,
    plot_to_label,
    select_to_label,
    weak_augment,
)
from fixmatch_fastai.interpret import plot_suspect_labels, suspect_labels
from fixmatch_fastai.uncertainty import FeatureDensity, MCDropout, ScoreThreshold, entropy

look = PseudoLabelInterpretation.from_learner
WEAK = weak_augment(flip=False)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


@pytest.fixture
def trained(make_learner):
    learn = make_learner(fixmatch={'threshold': 0.3})
    quiet_fit(learn, 3, 1e-2)
    return learn


def made_up(probs, truth=None, threshold=0.9, vocab='abc'):
    "Of probabilities written down"
    probs = torch.tensor(probs)
    weights = (probs.max(1).values >= threshold).float()
    truth = None if truth is None else torch.tensor(truth)
    learn = SimpleNamespace(dls=SimpleNamespace(vocab=list(vocab)))
    idxs, policy = torch.arange(len(probs)), FixedThreshold(threshold)
    return PseudoLabelInterpretation(learn, None, probs, probs.argmax(1), weights, truth, idxs, policy, {})


# --- what is looked at


def test_numbers_are_those_of_validation(trained, pool):
    interp = look(trained)
    probs = trained.get_preds(dl=trained.dls.test_dl(pool))[0]
    torch.testing.assert_close(interp.probs, probs, rtol=1e-4, atol=1e-5)
    assert interp.idxs.tolist() == list(range(len(pool)))
    assert torch.equal(interp.counted, interp.probs.max(1).values >= 0.3) and 0 < interp.counted.sum() < len(pool)
    labeled = trained.dls.train_ds.items
    truth = [-1 if o in labeled else trained.dls.vocab.o2i[parent_label(o)] for o in pool]
    assert interp.truth.tolist() == truth and interp.known.sum() >= 80
    df = interp.to_df()
    assert df.item.tolist() == list(pool)
    predicted = interp.probs.argmax(1).tolist()
    assert df.right.tolist() == [None if y < 0 else y == k for y, k in zip(truth, predicted, strict=True)]
    counted = df[df.weight > 0]
    assert f'{len(counted):,} pseudo-labels count' in repr(interp)
    assert f'{counted.right[counted.truth.notna()].mean():.1%} of them right' in repr(interp)


POLICIES = [FlexMatch, FreeMatch, SoftMatch, AdaMatch, UDA, Dash, DebiasMatch, FeatureDensity]


@pytest.mark.parametrize('policy', [*POLICIES, lambda: ScoreThreshold(entropy, 2.0)])
def test_every_policy_and_nothing_is_remembered(make_learner, policy):
    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': policy()})
    quiet_fit(learn, 1)
    memory, weights = (copy.deepcopy(dict(o.state_dict())) for o in (learn.fix_match.policy, learn.model))
    cbs, training = list(learn.cbs), learn.model.training
    interp = look(learn)
    assert len(interp) == 100 and interp.targets.dtype == torch.int64
    assert ((0 <= interp.weights) & (interp.weights <= 1)).all()
    assert list(learn.cbs) == cbs and learn.model.training == training
    for before, o in ((memory, learn.fix_match.policy), (weights, learn.model)):
        torch.testing.assert_close(dict(o.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    interp.plot_acceptance()
    quiet_fit(learn, 1)


def test_dropout_is_drawn_for_the_policy_alone(make_learner):
    net = nn.Sequential(tiny_net()[0], nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 10))
    policy = FixedThreshold(0.0) & MCDropout(at_most=0.5, n_passes=3)
    learn = make_learner(model=net, fixmatch={'threshold': 0.95, 'policy': policy})
    quiet_fit(learn, 1)
    assert torch.equal(look(learn).probs, look(learn).probs)


LOADERS = {
    'workers': dict(num_workers=2),
    'cache': dict(cache=True),
    'views of a batch': dict(tfm=FixMatchBatchTransform(weak=WEAK)),
    'small batches': dict(bs=7),
    'one batch': dict(bs=1000),
}


@pytest.mark.parametrize('opts', LOADERS.values(), ids=LOADERS)
def test_loaders(trained, pool, opts):
    whole = look(trained)
    interp = look(trained, trained.dls.unlabeled_dl(pool, **{'label_func': parent_label, **opts}))
    torch.testing.assert_close(interp.probs, whole.probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(interp.truth, whole.truth)


def test_another_pool_and_another_policy(make_learner, pool, digits):
    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': FlexMatch()})
    quiet_fit(learn, 1)
    fm = learn.fix_match
    other = learn.dls.unlabeled_dl(digits[:150])
    assert len(look(learn, other)) == 150 and look(learn, other).truth is None
    all_count = look(learn, policy=FixedThreshold(0.0))
    assert all_count.counted.all() and learn.fix_match is fm
    none_counts = look(learn, other, FixedThreshold(1.0))
    assert not none_counts.counted.any() and learn.fix_match is fm
    quiet_fit(learn, 1)
    assert len(fm.history) == 3


def test_a_learner_without_fixmatch(make_dls, pool, tmp_path):
    dls = make_dls()
    learn = Learner(dls, tiny_net())
    quiet_fit(learn, 1)
    with pytest.raises(ValueError, match='give `unlabeled_dl`'):
        look(learn)
    interp = look(learn, dls.unlabeled_dl(pool))
    assert len(interp) == 100 and isinstance(interp.policy, FixedThreshold) and not hasattr(learn, 'fix_match')
    learn.export(tmp_path / 'learner.pkl')
    loaded = load_learner(tmp_path / 'learner.pkl')
    again = look(loaded, loaded.dls.unlabeled_dl(pool))
    torch.testing.assert_close(again.probs, interp.probs)


def test_a_loaded_learner_that_had_fixmatch(trained, pool, tmp_path):
    trained.export(tmp_path / 'learner.pkl')
    loaded = load_learner(tmp_path / 'learner.pkl')
    with pytest.raises(ValueError, match='give `unlabeled_dl`'):
        look(loaded)
    torch.testing.assert_close(look(loaded, loaded.dls.unlabeled_dl(pool)).probs, look(trained).probs)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_damaged_images_are_left_out(trained, pool, tmp_path, num_workers):
    bad = [tmp_path / f'{i}.png' for i in range(3)]
    for o in bad:
        o.write_bytes(b'no image')
    files = [bad[0], *pool[:30], bad[1], *pool[30:50], bad[2]]
    interp = look(trained, trained.dls.unlabeled_dl(files, bs=8, num_workers=num_workers))
    assert sorted(interp.damaged) == [0, 31, 52] and interp.to_df().item.tolist() == list(pool[:50])
    assert "3 images can't be opened" in repr(interp)
    assert set(interp.suggest_labels(10)['item']) <= set(pool[:50])
    with pytest.raises(ValueError, match='can be opened'):
        look(trained, NoBatches())


class NoBatches:
    "A loader without batches"

    def __iter__(self):
        return iter(())


def test_torch_loaders_are_looked_at(make_learner, tmp_path, pool):
    for o in pool:
        (tmp_path / 'pool' / parent_label(o)).mkdir(parents=True, exist_ok=True)
        Image.open(o).save(tmp_path / 'pool' / parent_label(o) / o.name)
    folder = ImageFolder(tmp_path / 'pool', transform=FixMatchTransform(0.3, 0.33, weak=lambda img: img))
    make = lambda **kwargs: torch.utils.data.DataLoader(folder, batch_size=16, **kwargs)
    learn = make_learner(loader=make(), fixmatch={'threshold': 0.12})
    quiet_fit(learn, 1)
    interp = look(learn)
    assert len(interp) == 100 and interp.truth.tolist() == folder.targets
    assert interp.to_df().item.tolist() == [o for o, _ in folder.samples]
    assert len(interp.plot_images('uncertain', 4).axes) == 4
    assert len(interp.suggest_labels(5)) == 5
    mixed = look(learn, make(shuffle=True))
    assert mixed.to_df().item.isna().all(), 'no file is named where it is not known'
    with pytest.raises(ValueError, match='shuffle=False'):
        mixed.plot_images()


# --- what is made of it


def test_acceptance_by_hand():
    interp = made_up([[0.95, 0.05, 0], [0.96, 0, 0.04], [0.5, 0.3, 0.2], [0.02, 0.98, 0]], [0, 2, 0, -1])
    df = interp.acceptance()
    assert df.index.tolist() == ['a', 'b', 'c']
    assert df.images.tolist() == [3, 1, 0] and df.counted.tolist() == [2, 1, 0]
    assert df.known.tolist() == [2, 0, 0] and df.right.tolist() == [1, 0, 0]
    assert df.share.tolist()[:2] == [2 / 3, 1] and np.isnan(df.share['c'])
    assert interp.to_df().right.tolist() == [True, False, True, None]
    truth = interp.to_df().truth
    assert truth.tolist()[:3] == ['a', 'c', 'a'] and truth.isna().tolist() == [False, False, False, True]
    np.testing.assert_array_equal(interp.confusion_matrix(), [[1, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert interp.most_confused() == [('c', 'a', 1)]


def bars(ax):
    "Widths of bars by what the legend says of them"
    return {c.get_label(): [float(p.get_width()) for p in c] for c in ax.containers}


def test_acceptance_is_drawn():
    probs, truth = [[0.95, 0.05, 0], [0.96, 0, 0.04], [0.5, 0.3, 0.2], [0.02, 0.98, 0]], [0, 2, 0, -1]
    drawn = bars(made_up(probs, truth).plot_acceptance())
    counts = {'counts, right': [1, 0, 0], 'counts, wrong': [1, 0, 0], 'counts': [0, 1, 0]}
    assert drawn == {**counts, 'does not count': [1, 0, 0]}
    assert set(bars(made_up(probs).plot_acceptance())) == {'counts', 'does not count'}
    many = made_up(np.eye(60, dtype=np.float32).tolist(), threshold=0.5, vocab=[f'class {i}' for i in range(60)])
    assert len(many.plot_acceptance(max_n=40).get_yticklabels()) == 40


def test_normalised_confusion():
    ax = made_up([[0.95, 0.05, 0]] * 3 + [[0, 0.96, 0.04]], [0, 0, 1, 0]).plot_confusion_matrix(normalize=True)
    assert sorted(o.get_text() for o in ax.texts) == ['0.33', '0.67', '1.00']


def test_calibration_against_a_loop():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.4] * 3, 500).astype(np.float32)
    truth = rng.integers(-1, 3, 500)
    interp = made_up(probs.tolist(), truth.tolist())
    conf, right, known = probs.max(1), probs.argmax(1) == truth, truth >= 0
    error = 0
    for i in range(10):
        inside = known & (conf > i / 10) & (conf <= (i + 1) / 10)
        row = interp.calibration().iloc[i]
        assert row.images == inside.sum()
        if inside.any():
            assert row.accuracy == pytest.approx(right[inside].mean())
            assert row.confidence == pytest.approx(conf[inside].mean(), abs=1e-6)
            error += inside.sum() / known.sum() * abs(right[inside].mean() - conf[inside].mean())
    assert interp.calibration_error() == pytest.approx(error, abs=1e-6)
    ax = interp.plot_calibration()
    assert f'{error:.3f}' in ax.get_title()
    assert 'threshold 0.9' in [o.get_text() for o in ax.figure.axes[1].get_legend().get_texts()]


def test_largest_losses_first(trained):
    interp = look(trained)
    losses = -interp.probs[torch.arange(100), interp.truth].log()
    titles = [ax.get_title() for ax in interp.plot_top_losses(5, counted=False).axes]
    expected = [f'loss {losses[i]:.1f}' for i in losses.argsort(descending=True)[:5]]
    assert [o.split(', ')[1] for o in titles] == expected
    among = losses[interp.counted].sort(descending=True).values[:5]
    assert [o.get_title().split(', ')[1] for o in interp.plot_top_losses(5).axes] == [f'loss {o:.1f}' for o in among]


def test_which_images(trained):
    interp = look(trained)
    shown = lambda which: [float(ax.get_title().split()[1]) for ax in interp.plot_images(which, 6).axes]
    conf = interp.confidence.sort(descending=True).values
    floor = lambda o: int(100 * o) / 100
    assert shown('confident') == [floor(o) for o in conf[:6].tolist()]
    assert max(abs(o - 0.3) for o in shown('border')) <= sorted((interp.confidence - 0.3).abs().tolist())[12] + 0.02
    interp = look(trained, policy=FixedThreshold(0.15))  # so low that some are wrong
    rows = interp.confidence.argsort(descending=True, stable=True)
    green = interp.right | ~interp.known
    expected = [('tab:green' if green[i] else 'tab:red') if interp.counted[i] else '0.5' for i in rows]
    colors = [ax.title.get_color() for ax in interp.plot_images('confident', 100).axes[:100]]
    assert colors == expected and len(set(colors)) == 3, 'some count, right and wrong, some do not'


def test_without_truth():
    interp = made_up([[0.95, 0.05, 0]])
    needs_truth = interp.confusion_matrix, interp.most_confused, interp.calibration
    for f in (*needs_truth, interp.plot_confusion_matrix, interp.plot_calibration, interp.plot_top_losses):
        with pytest.raises(ValueError, match='label_func'):
            f()
    assert list(interp.to_df()) == ['item', 'predicted', 'confidence', 'weight']
    assert 'right' not in repr(interp)


# --- what to label


def test_doubts_by_hand():
    "1 − margin; of a class of which nothing counts, twice as much, as the mean of (5 + 1, 1, 1) over 1 is above 4"
    interp = made_up([[0.95, 0.05, 0]] * 17 + [[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]])
    counts = torch.tensor([18.0, 1.0, 1.0])
    expected = torch.stack([0.8 * (counts.mean() / 18).sqrt(), torch.tensor(0.8) * 2])
    torch.testing.assert_close(interp.doubts()[-2:], expected)


def test_suggestions(trained, pool):
    interp = look(trained)
    for k in (1, 7, 100):
        df = interp.suggest_labels(k)
        assert len(set(df['item'])) == k and (df.label == '').all() and df.stands_for.is_monotonic_decreasing
        assert df.stands_for.sum() == min(10 * k, 100)
    best = set(interp.doubts().argsort(descending=True)[:30].tolist())
    assert {pool.index(o) for o in interp.suggest_labels(3)['item']} <= best
    pd.testing.assert_frame_equal(interp.suggest_labels(9), interp.suggest_labels(9))
    row = interp.suggest_labels(1).iloc[0]
    i = pool.index(row['item'])
    first, second = interp.probs[i].topk(2).indices.tolist()
    assert (row.predicted, row.second) == (interp.vocab[first], interp.vocab[second])
    assert row.confidence == pytest.approx(interp.confidence[i].item())
    with pytest.raises(ValueError, match='between 1 and 100'):
        interp.suggest_labels(101)
    assert len(plot_to_label(interp.suggest_labels(5)).axes) == 5


def unit(f):
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def of_features(f):
    "An interpretation of images that the model doubts equally, and knows by `f`"
    interp = made_up([[0.4, 0.35, 0.25]] * len(f))
    interp.features = lambda rows: f[rows]
    interp.items = lambda rows: rows.tolist()
    return interp


def test_suggestions_are_central_in_groups_that_are_plain_to_see():
    rng = np.random.default_rng(0)
    f = np.concatenate([10 * np.eye(3)[k] + rng.normal(0, 1, (n, 3)) for k, n in ((0, 15), (1, 10), (2, 5))])
    df = of_features(f.astype(np.float32)).suggest_labels(3)
    assert df.stands_for.tolist() == [15, 10, 5]
    for i, members in zip(df['item'], (range(15), range(15, 25), range(25, 30))):
        distances = ((unit(f)[members] - unit(f)[members].mean(0)) ** 2).sum(1)
        assert i == members[distances.argmin()]


def plain_images(colors):
    return [np.full((8, 8, 3), o, dtype=np.uint8) for o in colors]


class Colors(nn.Conv2d):
    "A body whose features are an image's colours"

    def __init__(self):
        super().__init__(3, 3, 1)
        mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD  # with which timm normalises
        self.weight.data, self.bias.data = torch.diag(torch.tensor(std))[:, :, None, None], torch.tensor(mean)


def test_select_is_most_typical_by_all_distances():
    rng = np.random.default_rng(1)
    groups = (0, 30), (1, 9), (2, 23)  # more than the 20 neighbours that count, and fewer
    colors = np.concatenate([200 * np.eye(3)[k] + rng.integers(0, 50, (n, 3)) for k, n in groups])
    df = select_to_label(plain_images(colors), 3, Colors())
    assert df.stands_for.tolist() == [30, 23, 9]
    for i, members in zip(df['item'], (range(30), range(39, 62), range(30, 39))):
        f = unit(colors[members])
        nearest = np.sort(cdist(f, f), 1)[:, : min(21, len(f))]
        assert i == members[nearest.mean(1).argmin()]


def test_alike_images_are_filled_up():
    alike = plain_images([(9, 9, 9)] * 12)
    for df in (select_to_label(alike, 5), of_features(np.ones((12, 4), dtype=np.float32)).suggest_labels(5)):
        assert len(set(df['item'])) == 5 == len(df.stands_for)


@pytest.mark.parametrize(
    'net',
    [
        None,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 6, 3, 4)),
        lambda: timm.create_model('test_resnet', pretrained=False),
        lambda: timm.create_model('test_vit', pretrained=False, num_classes=0),
    ],
    ids=['pixels', 'body', 'timm', 'vit'],
)
def test_select_with(net, pool):
    set_seed(0)
    net = net and net().train()
    df = select_to_label(pool[:40], 6, net)
    assert len(set(df['item'])) == 6 and set(df['item']) <= set(pool)
    assert df.stands_for.sum() == 40 and (df.label == '').all()
    assert net is None or net.training, 'as it was'
    pd.testing.assert_frame_equal(df, select_to_label(pool[:40], 6, net))


def test_select_with_a_learner(trained, pool):
    df = select_to_label(pool, 10, trained)
    assert len(set(df['item'])) == 10 and df.stands_for.sum() == 100


def test_select_covers_more_classes_than_chance(digits):
    files = digits[::4]
    n_classes = lambda fs: len({parent_label(o) for o in fs})
    found = np.mean([n_classes(select_to_label(files, 10, seed=i)['item']) for i in range(5)])
    chance = np.mean([n_classes(np.random.default_rng(i).choice(files, 10, replace=False)) for i in range(200)])
    assert found > chance + 1


def test_select_from_other_things(pool, tmp_path, photo):
    arrays = [photo.roll(i, 0).numpy() for i in range(12)]
    assert set(select_to_label(arrays, 4)['item']) <= set(range(12))
    assert set(select_to_label([Image.fromarray(o) for o in arrays], 4)['item']) <= set(range(12))
    assert set(select_to_label(list(map(str, pool[:20])), 3)['item']) <= set(map(str, pool[:20]))
    assert len(select_to_label(pool, 100)) == 100
    few = select_to_label(pool, 4, most=10)
    assert few.stands_for.sum() == 10
    with pytest.raises(TypeError, match='files can be shown'):
        plot_to_label(select_to_label(arrays, 4))


def test_select_leaves_damaged_files_out(pool, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'')
    with pytest.warns(UserWarning, match="1 of 6 images can't be opened and are left out, the first .*bad.png"):
        df = select_to_label([*pool[:5], bad], 5)
    assert set(df['item']) == set(pool[:5])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='Only 5 of the images'):
        select_to_label([*pool[:5], bad], 6)
    with pytest.raises(ValueError, match='None of the images'):
        select_to_label([bad], 1)


def test_select_says_what_is_wrong(pool):
    with pytest.raises(ValueError, match='between 1 and 100'):
        select_to_label(pool, 101)
    with pytest.raises(TypeError, match='get_image_files'):
        select_to_label('photos', 3)


# --- live


class FakeBar:
    names = ['train', 'valid']

    def __init__(self):
        self.drawn = []

    def update_graph(self, graphs, x_bounds, y_bounds):
        self.drawn.append(([len(y) for _, y in graphs], list(self.names), x_bounds, y_bounds))


@pytest.mark.parametrize('known', [True, False])
def test_graph_after_each_epoch(make_learner, known, monkeypatch):
    learn = make_learner(label_func=parent_label if known else None, fixmatch={'threshold': 0.0})
    bar, show = FakeBar(), ShowPseudoLabels()
    monkeypatch.setattr(Learner, 'progress', SimpleNamespace(mbar=bar), raising=False)
    quiet_fit(learn, 2, cbs=show)
    names = ['mask_rate', 'pseudo_acc'][: 1 + known]
    assert bar.drawn == [([n] * len(names), names, (0, 6), (0, 1)) for n in (3, 6)]


def test_no_graph_where_there_is_none(make_learner, make_dls):
    learn = make_learner(cbs=[ShowPseudoLabels()])
    quiet_fit(learn, 1)
    learn.validate()
    learn.get_preds()
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
    learn.fit(1)
    quiet_fit(Learner(make_dls(), no_bn(), cbs=ShowPseudoLabels()), 1)


# --- which labels are wrong


def labels_of(files, wrong=()):
    "The digits' own, but for `wrong` ones"
    labels = {o: parent_label(o) for o in files}
    return labels | {o: str((int(labels[o]) + 1) % 3) for o in wrong}


def labeled_learner(items, get_y, **kwargs):
    "On digits whose pixels are its features, half of them to validate on"
    blocks = ImageBlock(PILImageBW), CategoryBlock(vocab=list('012'))
    block = DataBlock(blocks, get_y=get_y, splitter=RandomSplitter(0.5, 0), **kwargs)
    return Learner(block.dataloaders(items, bs=8, num_workers=0), nn.Sequential(nn.Flatten(), nn.Linear(256, 3)))


def some_of(digits, counts):
    by_class = {c: [o for o in digits if parent_label(o) == c] for c in counts}
    return [o for c, n in counts.items() for o in by_class[c][:n]]


def test_wrong_labels_are_the_first_suspects(digits):
    files = some_of(digits, {'0': 20, '1': 20, '2': 20})
    labels = labels_of(files, wrong := files[3::20])
    learn = labeled_learner(files, lambda o: labels[o])
    before = copy.deepcopy(learn.model.state_dict())
    df = suspect_labels(learn)
    assert set(df['item'][:3]) == set(wrong) and set(df['item']) == set(files)
    assert df.label.tolist() == [labels[o] for o in df['item']] and df.confidence.is_monotonic_increasing
    assert df.predicted[:3].tolist() == [parent_label(o) for o in df['item'][:3]]
    assert df.suspect[:3].all() and not df.suspect[10:].any()
    assert df.confidence.between(0, 1).all() and (df.confidence[10:] > 0.4).all()
    assert learn.model.training and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    pd.testing.assert_frame_equal(suspect_labels(learn, bs=7, num_workers=1), df, check_exact=False, atol=1e-6)
    titles = [ax.get_title() for ax in plot_suspect_labels(df, max_n=3).axes]
    assert titles[0].split()[0] == df.label[0] and titles[0].split('\n')[1] == f'{df.predicted[0]}?'
    assert len(titles) == 3


def test_classes_with_fewer_images_than_folds(digits):
    "An image that is alone in its class can't be judged; of two in a class each is judged by the other"
    files = some_of(digits, {'0': 12, '1': 2, '2': 1})
    df = suspect_labels(labeled_learner(files, parent_label))
    assert sorted(df.label) == ['0'] * 12 + ['1'] * 2 and df.confidence.notna().all()


def test_suspects_of_rows_and_arrays(digits):
    files = some_of(digits, {'0': 6, '1': 6})
    rows = {'file': [str(o) for o in files], 'kind': [parent_label(o) for o in files]}
    frame = pd.DataFrame(rows, index=range(5, 17))
    df = suspect_labels(labeled_learner(frame, ColReader('kind'), get_x=ColReader('file')))
    assert set(df['item']) == set(frame.file)
    plot_suspect_labels(df)
    arrays = [np.array(Image.open(o)) for o in files]
    y = {a.tobytes(): parent_label(o) for a, o in zip(arrays, files)}
    df = suspect_labels(labeled_learner(arrays, lambda o: y[o.tobytes()]))
    assert sorted(df['item']) == list(range(12))
    with pytest.raises(TypeError, match='Only images that are files'):
        plot_suspect_labels(df)
    with pytest.raises(ValueError, match='the table is empty'):
        plot_suspect_labels(df[:0])


def test_what_has_no_suspects(digits, make_learner):
    files = some_of(digits, {'0': 6, '1': 1})
    with pytest.raises(ValueError, match='two classes or more, two of each'):
        suspect_labels(labeled_learner(files, parent_label))
    block = DataBlock((ImageBlock(PILImageBW), MultiCategoryBlock), get_y=lambda o: [parent_label(o)])
    learn = Learner(block.dataloaders(files, bs=2, num_workers=0), tiny_net(2))
    with pytest.raises(ValueError, match='Each image must have one class'):
        suspect_labels(learn)
    batch = torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match='DataLoaders of a DataBlock'):
        suspect_labels(Learner(DataLoaders([batch], [batch]), tiny_net(), loss_func=nn.CrossEntropyLoss()))


@pytest.mark.slow
@pytest.mark.parametrize('alike', [False, True])
def test_the_most_typical_image_of_a_large_group(alike):
    "The one that scikit-learn finds among all, or of images that are the same any of them"
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestNeighbors

    rng, base = np.random.default_rng(0), 15 * load_digits().data
    images = np.clip(base[rng.integers(0, len(base), 4500)] + rng.normal(0, 8, (4500, 64)), 0, 255)
    images = [*images.reshape(-1, 8, 8).astype(np.uint8)]
    if alike:
        images = images[:1] * 4500
    df = select_to_label(images, 1)
    assert df.stands_for.tolist() == [4500]
    f = [np.array(Image.fromarray(o).resize((32, 32), Image.Resampling.BILINEAR)).flatten() for o in images]
    f = np.array(f, dtype=np.float32)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    distances = NearestNeighbors(n_neighbors=21).fit(f).kneighbors(f)[0].mean(1)
    assert distances[df['item'][0]] <= distances.min() + 1e-6
