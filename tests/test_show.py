"The pictures of a fit show what happened: by class, thresholds that move, which pairs are picked"

import warnings
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    PILImageBW,
    Resize,
    accuracy,
    parent_label,
    set_seed,
)
from in_memory import memory

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    FixedThreshold,
    FixMatch,
    FlexMatch,
    FreeMatch,
    PseudoLabelInterpretation,
    PseudoLabels,
    SemiBatch,
    SoftMatch,
    plot_to_label,
    split_labeled,
)
from fixmatch_fastai.core import finished
from fixmatch_fastai.record import SemiRecorder, plot_steps


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


# --- counts by class


def recorder_of(*steps, n_classes=3):
    "A recorder after steps whose pseudo-labels are `targets` and `weights`"
    rec = SemiRecorder()
    rec.start()
    add(rec, *steps, n_classes=n_classes)
    return rec


def add(rec, *steps, n_classes=3):
    for targets, weights in steps:
        pseudo = PseudoLabels(torch.tensor(targets), torch.tensor(weights))
        rec.add(torch.tensor(1.0), torch.tensor(1.0), 2, pseudo, n_classes=n_classes)


FEW, MORE = ([0, 0, 1], [1.0, 0.0, 0.5]), ([0, 0, 1], [1.0, 1.0, 0.5])


def test_by_class_by_hand():
    "Two spans of ten steps; class 2 never comes"
    rec = recorder_of(*[FEW] * 10, *[MORE] * 15)
    o = rec.by_class
    assert o['step'].tolist() == [10, 20] and o['predicted'].tolist() == [[20, 10, 0]] * 2 and 'threshold' not in o
    np.testing.assert_array_equal(o['share'], [[0.5, 0.5, np.nan], [1, 0.5, np.nan]])
    rec.start()
    assert len(rec.by_class['step']) == 2, 'kept until training begins'
    add(rec, ([0], [1.0]))
    assert rec.by_class == {}


def test_soft_targets_are_counted_as_their_likeliest_class():
    rec = recorder_of(*[([[0.1, 0.9], [0.6, 0.4]], [1.0, 1.0])] * 10, n_classes=2)
    assert rec.by_class['predicted'].tolist() == [[10, 10]]


def test_spans_go_on_after_a_resume():
    "A span in whose midst a run stops is neither lost nor counted twice"
    whole = recorder_of(*[FEW] * 15, *[MORE] * 10).by_class
    later = SemiRecorder()
    later.restore(recorder_of(*[FEW] * 15).snapshot())
    add(later, *[MORE] * 10)
    assert whole['step'].tolist() == later.by_class['step'].tolist() == [10, 20]
    for name in ('predicted', 'share'):
        np.testing.assert_array_equal(whole[name], later.by_class[name])


@pytest.mark.parametrize(
    'policy, moves',
    [
        (FixedThreshold(0.2), False),
        (FlexMatch(0.2), True),
        (FreeMatch(decay=0.5), True),
        (SoftMatch(decay=0.5), True),
        (AdaMatch(), False),
    ],
    ids=repr,
)
def test_sums_by_class_agree_with_the_history(make_learner, policy, moves):
    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': policy})
    quiet_fit(learn, 4, 1e-2)
    o, history = learn.semi_recorder.by_class, learn.fix_match.history
    assert o['step'].tolist() == list(range(1, 13)), 'few steps: each by itself'
    assert (o['predicted'].sum(1) == 8).all()
    np.testing.assert_allclose(np.nansum(o['predicted'] * o['share'], 1) / 8, history.mask_rate, atol=1e-6)
    axs = learn.fix_match.plot()
    assert len(axs) == 3 + moves and [ax.get_title() for ax in axs][2] == 'pseudo-labels of each class that count'
    assert [o.get_text() for o in axs[2].get_yticklabels()] == [str(i) for i in range(10)]
    quiet_fit(learn, 1)
    assert len(learn.semi_recorder.by_class['step']) == 3, 'of the last fit only'


@pytest.mark.parametrize(
    'policy',
    [FixedThreshold(0.6), FlexMatch(0.8), FreeMatch(lower=0.7, decay=1.0), Dash(warmup=0, C=0.3, every=100)],
    ids=lambda o: type(o).__name__,
)
def test_thresholds_are_what_counts(policy):
    "An image a little above its class's threshold counts, one a little below does not"
    g = torch.Generator().manual_seed(0)
    policy.setup(3, 50, None)

    def batch(n):
        weak, labeled = (torch.randn(o, 3, generator=g) for o in (n, 4))
        idxs = torch.randint(0, 50, (n,), generator=g)
        return SemiBatch(idxs=idxs, logits_weak=3 * weak, logits_x=labeled, y=torch.tensor([0, 1, 2, 0]))

    for _ in range(8):
        policy(batch(40))
    needed, b = policy.thresholds().expand(3).clone(), batch(200)
    targets, weights = policy(b)
    if targets.ndim == 2:
        targets = targets.argmax(1)
    confidence = b.probs.max(1).values
    far = (confidence - needed[targets]).abs() > 1e-4
    assert torch.equal((weights > 0)[far], (confidence >= needed[targets])[far])
    assert 0 < (weights > 0).sum() < 200


def test_dash_asks_for_certainty_while_it_warms_up():
    policy = Dash(warmup=2)
    policy.setup(3, 50, None)
    assert policy.thresholds() == 1


# --- pairs


def confidences(fig):
    return [float(ax.get_title().split()[1]) for ax in fig.axes if ax.get_title()]


def test_which_pairs_are_shown(make_learner):
    learn = make_learner(fixmatch={'threshold': 0.25})
    quiet_fit(learn, 2, 1e-2)
    fm = learn.fix_match

    def seeded(**kwargs):
        set_seed(3)
        return confidences(fm.show_pseudo_labels(**kwargs))

    whole = seeded(max_n=8)
    assert len(whole) == 8, 'a batch of mu · bs'
    assert seeded(max_n=3, which='confident') == sorted(whole, reverse=True)[:3]
    near = seeded(max_n=2, which='border')
    assert max(abs(o - 0.25) for o in near) <= sorted(abs(o - 0.25) for o in whole)[1] + 0.1
    assert len(seeded(max_n=4, which='disagree')) == 4
    with pytest.raises(ValueError, match="'confident', 'border', 'disagree'"):
        fm.show_pseudo_labels(which='best')


def test_most_disagreement_first(make_learner):
    learn = make_learner(fixmatch={'threshold': 0.25})
    quiet_fit(learn, 2, 1e-2)
    fm = learn.fix_match
    set_seed(3)
    batch, _, _, strong = fm.peek(None, labeled=False)
    with torch.no_grad():
        logits = learn.model.eval()(finished(strong, learn.dls))
    losses = F.cross_entropy(logits, batch.logits_weak.argmax(1), reduction='none')
    set_seed(3)
    expected = batch.probs.max(1).values[losses.argsort(descending=True)[:4]]
    assert confidences(fm.show_pseudo_labels(4, which='disagree')) == [int(100 * o) / 100 for o in expected.tolist()]


# --- long names

NAMES = ['great_crested_grebe_male', 'n02099601_golden_retriever', 'automobile', 'airplane']
NAMES += ['horse', 'frog', 'deer', 'ship', 'truck', 'cat']


def named(o):
    return NAMES[int(parent_label(o))]


@pytest.fixture
def long_names(digits, pool, tmp_path):
    "A learner whose classes have names as in ImageNet"
    labeled, rest = split_labeled(digits, parent_label, 20, seed=0)
    items = labeled + rest[:20]
    set_seed(0)
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=NAMES)), get_y=named, splitter=IndexSplitter(range(20, 40))
    )
    dls = block.dataloaders(items, bs=4, num_workers=0).repeat_train(6)
    fix_match = FixMatch(dls.unlabeled_dl(pool, mu=2, num_workers=0, label_func=named), policy=FlexMatch())
    learn = Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path, cbs=fix_match)
    quiet_fit(learn, 2, 1e-2)
    return learn


def assert_legible(fig):
    "No title runs into another or out of the picture, and no legend lies on what is drawn"
    fig.canvas.draw()
    whole, boxes = fig.bbox, [ax.title.get_window_extent() for ax in fig.axes if ax.get_title()]
    for i, a in enumerate(boxes):
        assert a.x0 >= whole.x0 - 1 and a.x1 <= whole.x1 + 1
        assert not any(a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9)) for b in boxes[:i])
    for ax in fig.axes:
        if ax.get_legend() is not None:
            legend = ax.get_legend().get_window_extent()
            assert not any(legend.overlaps(o.get_window_extent()) for o in fig.axes)
            assert legend.x0 >= whole.x0 - 1 and legend.x1 <= whole.x1 + 1
    plt.close(fig)


@pytest.mark.slow
def test_long_names_are_legible(long_names):
    fm, interp = long_names.fix_match, PseudoLabelInterpretation.from_learner(long_names)
    fm.unlabeled_dl.show_batch()
    assert_legible(plt.gcf())
    assert_legible(fm.plot()[0].figure)
    assert_legible(fm.show_pseudo_labels(8))
    assert_legible(fm.show_pseudo_labels(1))
    assert_legible(interp.plot_top_losses(8, counted=False))
    assert_legible(interp.plot_images('uncertain', 5))
    assert_legible(interp.plot_acceptance().figure)
    assert_legible(interp.plot_calibration().figure)
    fig = plot_to_label(interp.suggest_labels(10))
    assert [ax.get_title().split(':')[0] for ax in fig.axes if ax.get_title()] == [str(i) for i in range(10)]
    assert_legible(fig)


def test_the_confusion_matrix_keeps_its_size(long_names):
    interp = PseudoLabelInterpretation.from_learner(long_names)
    sizes = []
    for names in (NAMES, [o[:3] for o in NAMES]):
        interp.learn.dls.vocab[:] = names
        ax = interp.plot_confusion_matrix(counted=False)
        ax.figure.canvas.draw()
        sizes.append(ax.get_window_extent().width)
        plt.close(ax.figure)
    assert sizes[0] > 0.8 * sizes[1]


# --- what pictures look at, and leave alone


def test_peek(make_learner):
    learn = make_learner(fixmatch=dict(policy=FlexMatch(), threshold=0.95))
    learn.model[0][1].eval()  # as BnFreeze leaves it
    flags, stats = [m.training for m in learn.model.modules()], deepcopy(learn.model.state_dict())
    batch, truth, weak, strong = learn.fix_match.peek(5)
    assert batch.x.shape == (4, 1, 16, 16) and batch.logits_x.shape == (4, 10) and batch.y.shape == (4,)
    assert batch.weak.shape == (5, 1, 16, 16) and batch.logits_weak.shape == (5, 10)
    assert batch.idxs.shape == truth.shape == (5,)
    assert weak.shape == strong.shape == (5, 1, 16, 16) and not batch.logits_weak.requires_grad
    assert flags == [m.training for m in learn.model.modules()]
    assert all(torch.equal(v, stats[k]) for k, v in learn.model.state_dict().items())
    with torch.no_grad():
        expected = learn.model.eval()(batch.weak)
    torch.testing.assert_close(batch.logits_weak, expected)
    assert learn.fix_match.peek(2, labeled=False)[0].x is None


@pytest.mark.parametrize('policy', [AdaMatch(), Dash(warmup=0), FlexMatch(), UDA(0.1)], ids=lambda o: type(o).__name__)
def test_pictures_change_no_policy_and_no_model(make_learner, policy):
    learn = make_learner(fixmatch=dict(policy=policy, threshold=0.95))
    learn.fix_match.show_pseudo_labels(3)  # before training too
    quiet_fit(learn, 1)
    learn.model.train()
    before, weights = memory(learn), deepcopy(learn.model.state_dict())
    assert len(learn.fix_match.show_pseudo_labels(3).axes) == 6
    assert all(torch.equal(v, before[k]) for k, v in memory(learn).items())
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    assert learn.model.training


def test_pictures_follow_progressive_resizing(make_dls, make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    learn.dls = make_dls(item_tfms=Resize(24))
    seen = []
    learn.model.register_forward_pre_hook(lambda m, x: seen.append(tuple(x[0].shape[1:])))
    learn.fix_match.show_pseudo_labels(3)
    assert seen == [(1, 24, 24)]


# --- which fit


def test_a_fit_of_its_own_can_be_plotted(make_learner):
    learn = make_learner()
    fm = learn.fix_match
    learn.remove_cb(fm)
    quiet_fit(learn, 2, cbs=fm)
    assert len(fm.plot()) > 1 and len(fm.history) == 6
    with pytest.raises(ValueError, match='give it to the Learner'):
        fm.show_pseudo_labels()


def test_no_warning_of_a_head_that_trains_alone(make_dls, pool, tmp_path):
    dls = make_dls(n_batches=20)
    fm = FixMatch(dls.unlabeled_dl(pool, mu=1, num_workers=0), threshold=1.0, T=4.0)
    splitter = lambda m: [list(m[0].parameters()), list(m[1:].parameters())]
    learn = Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path, cbs=fm, splitter=splitter)
    learn.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        quiet_fit(learn, 1)
    assert not fm.trouble
    learn.unfreeze()
    with pytest.warns(UserWarning, match='No pseudo-label has counted for 20 steps'):
        quiet_fit(learn, 1)


ODD_NAMES = ['a', 'a_$_$', '_background_', '$x^{', '_', '%', '{', '$', '$\\alpha$', ' _b']


def test_names_are_never_formulas_or_left_out():
    history = pd.DataFrame(dict(loss_x=1.0, loss_u=1.0, mask_rate=0.5, pseudo_acc=0.5), index=range(3))
    thresholds = np.linspace(0.1, 0.9, 30).reshape(3, 10)
    by_class = dict(step=np.arange(1, 4), predicted=np.ones((3, 10)), share=thresholds, threshold=thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        axs = plot_steps(history, by_class=by_class, vocab=ODD_NAMES)
        axs[0].figure.canvas.draw()
    assert [o.get_text() for o in axs[3].get_legend().get_texts()] == ODD_NAMES
    assert [o.get_text() for o in axs[2].get_yticklabels()] == ODD_NAMES
