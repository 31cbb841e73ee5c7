"Of what goes wrong unseen there is a warning, once, with what helps; training goes on unless asked to stop"

import warnings

import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, TerminateOnNaNCallback, accuracy

from fixmatch_fastai.all import UDA, FixMatch, Policy, PseudoLabels, StopOnTrouble


class Says(Policy):
    "`n_same` pseudo-labels of `classes[step]` in each batch, the others spread; all with weight `weight`"

    def __init__(self, classes, n_same=8, weight=1.0):
        super().__init__()
        self.classes, self.n_same, self.weight, self.step = classes, n_same, weight, 0

    def forward(self, batch):
        k = self.classes[self.step % len(self.classes)]
        self.step += 1
        targets = torch.arange(len(batch.logits_weak)) % 10
        targets[: self.n_same] = k
        return PseudoLabels(targets, torch.full((len(targets),), self.weight))


class Spoil(Callback):
    "The labelled loss of step `at` is not a number"

    order, run_valid = 4, False

    def __init__(self, at):
        self.at = at

    def before_batch(self):
        if self.train_iter == self.at:
            self.learn.xb = (self.xb[0] * float('nan'),)


@pytest.fixture
def fit(tmp_path):
    "Many short steps: their images are noise that is in memory"
    labeled, views = (torch.randn(4, 1, 16, 16), torch.arange(4)), [(torch.randn(8, 1, 16, 16),) * 2]

    def fit(policy, epochs=2, n_batches=60, cbs=(), method='fit'):
        dls = DataLoaders([labeled] * n_batches, [labeled])
        dls.vocab = '0123456789'
        fm = FixMatch(views, policy=policy, threshold=0.95)
        learn = Learner(dls, tiny_net(), CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path, cbs=fm)
        args, options = ([epochs], {'cbs': list(cbs)}) if method == 'fit' else ([], {'show_plot': False})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            quiet_fit(learn, *args, method=method, **options)
        found = [str(o.message) for o in caught if issubclass(o.category, UserWarning)]
        return learn, [o for o in found if 'usually helps' in o]

    return fit


def test_no_warning_in_a_good_run(fit):
    learn, found = fit(Says(range(10), 2))
    assert found == [] and learn.semi_recorder.trouble == {}


def test_not_finite(fit):
    learn, found = fit(Says(range(10), 2), cbs=[Spoil(70)])
    assert len(found) == 1
    assert found[0].startswith('The loss is not a finite number since step 70: a lower learning rate')
    assert len(learn.fix_match.history) == 120, 'training goes on'


def test_none_counts(fit):
    learn, found = fit(Says(range(10), 2, weight=0.0))
    assert len(found) == 1 and found[0].startswith('No pseudo-label has counted for 100 steps')
    assert 'FreeMatch()' in found[0]


def test_none_counts_in_a_short_fit(fit):
    "Fewer steps than a hundred: the whole fit"
    assert len(fit(Says(range(10), 2, weight=0.0), 1, 25)[1]) == 1
    assert len(fit(Says(range(10), 2, weight=0.0), 1, 10)[1]) == 0, 'too short to say'


def test_some_count(fit):
    class Once(Says):
        def forward(self, batch):
            targets, weights = super().forward(batch)
            return PseudoLabels(targets, weights * (self.step % 60 == 1))

    assert fit(Once(range(10), 2))[1] == []


def test_one_class(fit):
    learn, found = fit(Says([3]))
    assert len(found) == 1 and 'AdaMatch()' in found[0]
    assert found[0].startswith("For 100 steps the model has said '3' of (nearly) all unlabelled images")


def test_soft_targets_of_one_class(fit):
    class Soft(Says):
        def forward(self, batch):
            targets, weights = super().forward(batch)
            return PseudoLabels(torch.nn.functional.one_hot(targets, 10).float(), weights)

    assert len(fit(Soft([3]))[1]) == 1


def test_classes_in_turn_are_no_collapse(fit):
    assert fit(Says([3] * 50 + [4] * 50))[1] == []


def test_all_but_one_image(fit):
    "7 of 8 are 87 %: not (nearly) all"
    assert fit(Says([3], 7))[1] == []


def test_each_trouble_has_its_warning(fit):
    learn, found = fit(Says([3], weight=0.0), cbs=[Spoil(5)])
    assert len(found) == 3 and list(learn.semi_recorder.trouble.values()) == found


def test_warned_again_in_the_next_fit(fit):
    learn, _ = fit(Says([3]))
    with pytest.warns(UserWarning, match="has said '3'"):
        quiet_fit(learn, 2)


def test_lr_find_is_left_alone(fit):
    learn, found = fit(Says([3]), method='lr_find', cbs=[Spoil(5)])
    assert found == []


def test_without_a_vocabulary():
    views = [(torch.randn(8, 1, 16, 16), torch.randn(8, 1, 16, 16))]
    dl = [(torch.randn(4, 1, 16, 16), torch.arange(4))] * 20
    learn = Learner(DataLoaders(dl, dl), tiny_net(), CrossEntropyLossFlat(), cbs=FixMatch(views, policy=Says([7])))
    with pytest.warns(UserWarning, match='has said class 7 of'):
        quiet_fit(learn, 1)


def test_stop(fit):
    learn, found = fit(Says([3]), epochs=2, n_batches=150, cbs=[StopOnTrouble()])
    assert len(found) == 1 and len(learn.fix_match.history) == 100
    assert len(learn.validate()) == 2 and learn.fix_match.stream is None


def test_stop_at_the_end_of_a_short_epoch(fit):
    learn, found = fit(Says([3], weight=0.0), epochs=5, n_batches=20, cbs=[StopOnTrouble()])
    assert len(found) == 2 and len(learn.fix_match.history) == 100


def test_stop_without_fixmatch(make_dls):
    learn = Learner(make_dls(), tiny_net(), cbs=StopOnTrouble())
    quiet_fit(learn, 1)
    assert len(learn.recorder.values) == 1


def test_beside_fastais_own(fit):
    learn, found = fit(Says(range(10), 2), cbs=[Spoil(5), TerminateOnNaNCallback()])
    assert len(learn.fix_match.history) <= 7


def test_a_real_policy_at_an_impossible_threshold(fit):
    assert len(fit(UDA(1.0))[1]) == 1
