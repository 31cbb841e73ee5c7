"Teachers and students: Noisy Student, self-distillation, semi-weak training"

from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    PILImageBW,
    accuracy,
    noop,
    parent_label,
    set_seed,
)

from fixmatch_fastai.labeled import split_labeled
from fixmatch_fastai.self_training import NoisyStudent, add_drop_path, pseudo_label, self_distill, semi_weak


def test_rounds(teacher, pool, make_student):
    made = []

    def student(dls):
        made.append(dls)
        return make_student(dls)

    fit = partial(quiet_fit, n_epoch=2, lr=1e-2)
    rounds = NoisyStudent(teacher, student, fit, pool, rounds=2, threshold=0.0, label_func=parent_label)
    last = rounds.fit()
    df = rounds.history
    known = {*teacher.dls.train_ds.items, *teacher.dls.valid_ds.items}
    new = [o for o in pool if o not in known]
    assert 0 < len(new) < len(pool) and len(made) == 2
    assert df['round'].tolist() == [0, 1, 2] and df.pseudo_labels.tolist() == [0, len(new), len(new)]
    table = pseudo_label(teacher, new, soft=True)
    assert df.pseudo_acc[1] == pytest.approx(np.mean([parent_label(f) == p for f, p in zip(new, table.predicted)]))
    with last.no_bar():
        assert df.accuracy[2] == pytest.approx(last.validate()[1])
    targets = torch.stack([torch.as_tensor(made[0].train_ds[i][1]) for i in range(20, len(made[0].train_ds))])
    counts, kinds = targets.argmax(1).bincount(), table.predicted.nunique()
    assert counts[counts > 0].tolist() == [round(len(new) / kinds)] * kinds, 'of each class as many'
    x = torch.ones(2, 1, 16, 16)
    assert not torch.equal(last.model.train()(x), last.model(x)), 'dropout'


def test_an_interrupted_round_is_trained_again(teacher, pool, make_student):
    fits = []

    def fit(learn):
        fits.append(learn)
        quiet_fit(learn, 1, 1e-2)
        if len(fits) == 2:
            raise KeyboardInterrupt

    rounds = NoisyStudent(teacher, make_student, fit, pool, rounds=3, threshold=0.0)
    with pytest.raises(KeyboardInterrupt):
        rounds.fit()
    assert rounds.student is fits[0] and rounds.history['round'].tolist() == [0, 1]
    assert rounds.fit() is fits[-1] and len(fits) == 4 and rounds.history['round'].tolist() == [0, 1, 2, 3]
    assert rounds.fit() is fits[-1] and len(fits) == 4, 'there is nothing left to train'


def test_a_round_without_pseudo_labels_can_be_fitted_again(teacher, pool, make_student):
    fit = partial(quiet_fit, n_epoch=1, lr=1e-2)
    rounds = NoisyStudent(teacher, make_student, fit, pool, rounds=1, threshold=1.0)
    with (
        pytest.warns(UserWarning, match='No pseudo-label is kept'),
        pytest.raises(ValueError, match='Round 1 has no pseudo-label to train on: lower `threshold`'),
    ):
        rounds.fit()
    rounds.threshold = 0.0
    rounds.fit()
    assert len(rounds.history) == 2


def test_images_in_memory_are_labelled_once(digits, tmp_path):
    "Of 70 arrays 20 are validated on, 20 labelled; a round trains on the 30 that are new, and asks for their truth"
    files, rest = split_labeled(digits, parent_label, 40, seed=0)
    files = [*files, *split_labeled(rest, parent_label, 30, seed=0)[0]]
    opened = [np.array(PILImageBW.create(o)) for o in files]
    labels = {o.tobytes(): parent_label(f) for o, f in zip(opened, files)}
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_y=lambda o: labels[o.tobytes()],
        splitter=IndexSplitter(range(0, 40, 2)),
    )
    make_student = lambda dls: Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path)
    learn = make_student(block.dataloaders(opened[:40], bs=4, num_workers=0))
    items, asked = [o.copy() for o in opened], []

    def truth(item):
        asked.append(item)
        return '1'

    rounds = NoisyStudent(learn, make_student, noop, items, rounds=1, threshold=0.0, dropout=0, label_func=truth)
    rounds.fit()
    assert rounds.history.pseudo_labels[1] == 30 and 0 <= rounds.history.pseudo_acc[1] <= 1
    assert [o.tobytes() for o in asked] == [o.tobytes() for o in opened[40:]]


def test_hard_losses_are_refused_before_training(teacher, pool):
    hard = lambda dls: Learner(dls, tiny_net(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='CrossEntropyLossFlat, is not made for soft labels'):
        NoisyStudent(teacher, hard, pytest.fail, pool, threshold=0).fit()
    with pytest.raises(ValueError, match='is not made for soft labels'):
        self_distill(teacher, hard, pytest.fail)
    fit = partial(quiet_fit, n_epoch=1)
    NoisyStudent(teacher, hard, fit, pool, rounds=1, threshold=0, soft=False).fit()


@pytest.mark.slow
def test_self_distillation_learns_the_teachers_answers(teacher, make_student, pool):
    "With enough steps the student agrees with the teacher more than chance would"
    set_seed(0)
    student = self_distill(teacher, make_student, partial(quiet_fit, n_epoch=10, lr=1e-2), items=pool)
    a, b = (pseudo_label(o, pool).predicted for o in (teacher, student))
    assert (a == b).mean() > 0.6


def test_semi_weak_trains_on_the_best_then_on_the_labels(teacher, pool, make_student):
    sets = []

    def fit(learn):
        sets.append(learn.dls.train_ds)
        quiet_fit(learn, 1, 1e-2)

    semi_weak(teacher, make_student, fit, pool, fit, k=3)
    best = pseudo_label(teacher, pool, top_k_per_class=3)
    known = set(map(str, teacher.dls.valid_ds.items))
    assert len(sets[0]) == len([o for o in best.file if o not in known]) and sets[1] is teacher.dls.train_ds


@pytest.mark.parametrize(
    'call,exc,match',
    [
        (lambda t, p: NoisyStudent(t, noop, noop, []), ValueError, 'no images to label'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, rounds=0), ValueError, '`rounds` is a whole number, 1 or more'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, dropout=1), ValueError, '`dropout` must be 0 or more and below 1'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, drop_path=-0.1), ValueError, '`drop_path` must be'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, mu=-1), ValueError, '`mu` is how many'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, bs=0), ValueError, '`bs` is a number of images'),
        (lambda t, p: NoisyStudent(t, noop, noop, p, threshold=95), ValueError, '`threshold` is a confidence'),
        (lambda t, p: NoisyStudent(t, 'resnet34', noop, p), TypeError, 'a function that makes a Learner'),
        (lambda t, p: NoisyStudent(t.model, noop, noop, p), TypeError, 'must be a Learner'),
        (
            lambda t, p: NoisyStudent(t, lambda dls: None, noop, p, threshold=0.0).fit(),
            TypeError,
            'it returned a NoneType',
        ),
        (lambda t, p: self_distill(t, noop, noop, rounds=0), ValueError, '1 or more'),
        (lambda t, p: self_distill(t.model, noop, noop), TypeError, 'must be a Learner'),
        (lambda t, p: self_distill(t, lambda dls: None, noop), TypeError, 'it returned a NoneType'),
        (lambda t, p: semi_weak(t, noop, noop, p, noop, k=0), ValueError, '`k` is a number of images'),
        (lambda t, p: semi_weak(t, lambda dls: None, noop, p, noop), TypeError, 'it returned a NoneType'),
    ],
)
def test_wrong_students_are_refused_in_a_sentence(teacher, pool, call, exc, match):
    with pytest.raises(exc, match=match) as e:
        call(teacher, pool)
    assert str(e.value).endswith('.')


@pytest.mark.parametrize('arch, n', [('resnet18', 8), ('vit_tiny_patch16_224', 12), ('convnext_atto', 12)])
def test_drop_path_in_bodies_of_timm(arch, n):
    kwargs = dict(img_size=32, patch_size=8) if arch.startswith('vit') else {}
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=3, **kwargs)
    for p in model.parameters():  # some begin as 0, so that whole blocks do nothing
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    before = model(x)
    assert add_drop_path(model, 0.5) == n
    torch.testing.assert_close(model(x), before)  # in evaluation nothing changes
    reference = timm.create_model(arch, num_classes=3, drop_path_rate=0.5, **kwargs)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    theirs = [m.drop_prob for m in reference.modules() if type(m).__name__ == 'DropPath']
    assert max(rates) == 0.5 == max(theirs) and rates == sorted(rates)
    model.train()
    torch.manual_seed(0)
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    assert add_drop_path(tiny_net()) == 0
    with pytest.raises(ValueError, match='below 1'):
        add_drop_path(model, 1)
