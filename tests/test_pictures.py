"The pictures of a fit show what happened: by class, thresholds that move, which pairs are picked"

import copy
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import Callback, CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Learner, PILImageBW, accuracy, parent_label, set_seed

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
    SaveFixMatch,
    SemiBatch,
    SoftMatch,
    plot_to_label,
    split_labeled,
)
from fixmatch_fastai.core import finished
from fixmatch_fastai.record import SemiRecorder


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def test_by_class_by_hand():
    "Two spans of ten steps; class 2 is never said"
    rec = SemiRecorder()
    rec.start()
    for step in range(25):
        targets, weights = torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 0.5])
        rec.add(
            torch.tensor(1.0), torch.tensor(1.0), 2, PseudoLabels(targets, weights if step < 10 else 2 * weights / 2 + torch.tensor([0, 1.0, 0])), None, None, 3
        )
    o = rec.by_class
    assert o['step'].tolist() == [10, 20] and o['said'].tolist() == [[20, 10, 0]] * 2 and 'threshold' not in o
    np.testing.assert_array_equal(o['share'], [[0.5, 0.5, np.nan], [1, 0.5, np.nan]])
    rec.start()
    assert len(rec.by_class['step']) == 2, 'kept until training begins'
    rec.add(torch.tensor(1.0), torch.tensor(1.0), 2, PseudoLabels(torch.tensor([0]), torch.tensor([1.0])), None, None, 3)
    assert rec.by_class == {}


def test_soft_targets_are_counted_as_their_likeliest_class():
    rec = SemiRecorder()
    rec.start()
    for _ in range(10):
        rec.add(torch.tensor(1.0), torch.tensor(1.0), 2, PseudoLabels(torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.ones(2)), None, None, 2)
    assert rec.by_class['said'].tolist() == [[10, 10]]


@pytest.mark.parametrize(
    'policy, moves',
    [(FixedThreshold(0.2), False), (FlexMatch(0.2), True), (FreeMatch(decay=0.5), True), (SoftMatch(decay=0.5), True), (AdaMatch(), False), (UDA(), False)],
    ids=repr,
)
def test_sums_agree_with_the_history(make_learner, policy, moves):
    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': policy})
    quiet_fit(learn, 4, 1e-2)
    o, history = learn.fix_match._recorder.by_class, learn.fix_match.history
    assert o['step'].tolist() == list(range(1, 13)), 'few steps: each by itself'
    assert (o['said'].sum(1) == 8).all()
    np.testing.assert_allclose(np.nansum(o['said'] * o['share'], 1) / 8, history.mask_rate, atol=1e-6)
    axs = learn.fix_match.plot()
    assert len(axs) == 3 + moves and [ax.get_title() for ax in axs][2] == 'pseudo-labels of each class that count'
    assert [o.get_text() for o in axs[2].get_yticklabels()] == [str(i) for i in range(10)]
    quiet_fit(learn, 1)
    assert len(learn.fix_match._recorder.by_class['step']) == 3, 'of the last fit only'


def test_thresholds_are_what_counts():
    "An image a little above its class's threshold counts, one a little below does not"
    g = torch.Generator().manual_seed(0)
    for policy in (FixedThreshold(0.6), FlexMatch(0.8), FreeMatch(lower=0.7, decay=1.0), Dash(warmup=0, C=0.3)):
        policy.setup(3, 50, None)
        batch = lambda n: SemiBatch(
            idxs=torch.randint(0, 50, (n,), generator=g),
            logits_weak=3 * torch.randn(n, 3, generator=g),
            logits_x=torch.randn(4, 3, generator=g),
            y=torch.tensor([0, 1, 2, 0]),
        )
        for _ in range(8):
            policy(batch(40))
        needed, b = policy.thresholds().expand(3).clone(), batch(200)
        if isinstance(policy, Dash):
            policy.step.fill_(5)  # the bound neither starts anew nor falls in between
            needed = policy.thresholds().expand(3).clone()
        targets, weights = policy(b)
        if targets.ndim == 2:
            targets = targets.argmax(1)
        confidence = b.probs.max(1).values
        far = (confidence - needed[targets]).abs() > 1e-4
        assert torch.equal((weights > 0)[far], (confidence >= needed[targets])[far]), policy
        assert 0 < (weights > 0).sum() < 200, policy


def test_dash_asks_for_certainty_while_it_warms_up():
    policy = Dash(warmup=2)
    policy.setup(3, 50, None)
    assert policy.thresholds() == 1


def test_spans_go_on_after_a_resume(make_learner, tmp_path):
    "A span that an epoch ends in the midst of is neither lost nor counted twice"
    spans = lambda learn: learn.fix_match._recorder.by_class
    make = lambda: make_learner(cbs=[SaveFixMatch(resume=True)], path=tmp_path)
    whole, first, second = make_learner(path=tmp_path / 'other'), make(), make()
    for learn in (whole, first, second):
        learn.fix_match._recorder._span = lambda: 2  # three steps an epoch
    set_seed(1)
    quiet_fit(whole, 4)

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 3:
                raise KeyboardInterrupt

    set_seed(1)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(first, 4, cbs=Stop())
    quiet_fit(second, 4)
    a, b = spans(whole), spans(second)
    assert a['step'].tolist() == b['step'].tolist() == [2, 4, 6, 8, 10, 12]
    np.testing.assert_array_equal(a['said'], b['said'])


def test_a_copy_holds_no_counts(make_learner):
    learn = make_learner()
    quiet_fit(learn, 1)
    assert len(learn.semi_recorder.by_class['step']) == len(learn.semi_recorder.history) == 3
    copied = copy.copy(learn.semi_recorder)
    assert copied.by_class == {} and len(copied.history) == 0


def test_a_policy_must_answer_in_pictures_too(make_learner):
    class Wrong(FixedThreshold):
        def forward(self, batch):
            return super().forward(batch).targets

    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': Wrong()})
    with pytest.raises(TypeError, match=r'Wrong must return `PseudoLabels\(targets, weights\)`'):
        learn.fix_match.show_pseudo_labels()
    with pytest.raises(TypeError, match='Wrong must return'):
        quiet_fit(learn, 1)


def test_a_bool_may_say_what_counts(make_learner):
    class Bools(FixedThreshold):
        def forward(self, batch):
            targets, weights = super().forward(batch)
            return targets, weights > 0

    a, b = (make_learner(fixmatch={'threshold': 0.95, 'policy': cls(0.2)}) for cls in (FixedThreshold, Bools))
    for learn in (a, b):
        set_seed(1)
        quiet_fit(learn, 1)
    assert a.fix_match.history.equals(b.fix_match.history)


def shown(fig):
    return [float(ax.get_title().split()[1]) for ax in fig.axes if ax.get_title()]


def test_which_pairs(make_learner):
    learn = make_learner(fixmatch={'threshold': 0.25})
    quiet_fit(learn, 2, 1e-2)
    fm = learn.fix_match
    seeded = lambda **kwargs: (set_seed(3), shown(fm.show_pseudo_labels(**kwargs)))[1]
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
        learn.model.eval()
        losses = torch.nn.functional.cross_entropy(learn.model(finished(strong, learn.dls)), batch.logits_weak.argmax(1), reduction='none')
    set_seed(3)
    expected = batch.probs.max(1).values[losses.argsort(descending=True)[:4]]
    assert shown(fm.show_pseudo_labels(4, which='disagree')) == [int(100 * o) / 100 for o in expected.tolist()]


# --- long names --------------------------------------------------------------------------------------------------------------------------

NAMES = ['great_crested_grebe_male', 'n02099601_golden_retriever', 'horse', 'frog', 'automobile', 'airplane', 'deer', 'ship', 'truck', 'cat']


def named(o):
    return NAMES[int(parent_label(o))]


@pytest.fixture
def long_names(digits, pool, tmp_path):
    "A learner whose classes have names as in ImageNet"
    labeled, rest = split_labeled(digits, parent_label, 20, seed=0)
    items = labeled + rest[:20]
    set_seed(0)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock(vocab=NAMES)), get_y=named, splitter=IndexSplitter(range(20, 40)))
    dls = block.dataloaders(items, bs=4, num_workers=0).repeat_train(6)
    learn = Learner(
        dls, tiny_net(), metrics=accuracy, path=tmp_path, cbs=FixMatch(dls.unlabeled_dl(pool, mu=2, num_workers=0, label_func=named), policy=FlexMatch())
    )
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


# --- which fit -----------------------------------------------------------------------------------------------------------------------------


def test_lr_find_leaves_the_history(make_learner):
    learn = make_learner(fixmatch=dict(policy=FlexMatch(), threshold=0.95))
    quiet_fit(learn, 2)
    before, spans = learn.fix_match.history, learn.fix_match._recorder.by_class['step'].tolist()
    quiet_fit(learn, method='lr_find', num_it=8, show_plot=False)
    assert learn.fix_match.history.equals(before) and learn.fix_match._recorder.by_class['step'].tolist() == spans

    class Stop(Callback):
        def after_step(self):
            if self.train_iter == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), learn.added_cbs(Stop()):
        quiet_fit(learn, method='lr_find', num_it=8, show_plot=False)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Stop) or type(cb).__name__ == 'LRFinder'])
    learn.validate()
    assert learn.fix_match.history.equals(before)
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


def test_a_fit_of_its_own_can_be_plotted(make_learner):
    learn = make_learner()
    fm = learn.fix_match
    learn.remove_cb(fm)
    quiet_fit(learn, 2, cbs=fm)
    assert len(fm.plot()) > 1 and len(fm.history) == 6
    with pytest.raises(ValueError, match='give it to the Learner'):
        fm.show_pseudo_labels()


def test_a_head_that_trains_alone_is_not_told_to_be_unsure(make_dls, pool, tmp_path):
    dls = make_dls(n_batches=20)
    fm = FixMatch(dls.unlabeled_dl(pool, mu=1, num_workers=0), threshold=1.0, T=4.0)
    learn = Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path, cbs=fm, splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())])
    learn.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        quiet_fit(learn, 1)
    assert not fm.trouble
    learn.unfreeze()
    with pytest.warns(UserWarning, match='No pseudo-label has counted for 20 steps'):
        quiet_fit(learn, 1)
