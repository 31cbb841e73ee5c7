"A step of training that is tried, and leaves nothing behind"

import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from conftest import Odd, quiet_fit, tiny_net
from fastai.vision.all import TfmdDL
from torch import nn
from torchvision.transforms.v2 import functional as tv

from fixmatch_fastai.all import FixMatch, FixMatchTransform, FlexMatch, weak_augment
from fixmatch_fastai.rehearsal import (
    Rehearsal,
    labeled_batches,
    loaders_as_they_were,
    model_as_it_was,
    unlabeled_batches,
    workers_of,
)


@pytest.fixture
def rehearsed():
    "One step of a learner, tried"

    def rehearse(learn, seconds=0):
        dls, fm = learn.dls, learn.fix_match
        with loaders_as_they_were([*dls.loaders, fm.unlabeled_dl]), model_as_it_was(learn.model, torch.device('cpu')):
            xy, batch = labeled_batches(dls.train, 1).batches[0], unlabeled_batches(fm.unlabeled_dl, dls, 1).batches[0]
            return Rehearsal(fm, learn.model, xy, batch).run(seconds)

    return rehearse


# --- as it was


@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt])
def test_a_model_is_as_it_was(error):
    net = Odd()
    net.frozen.eval()
    modes = [m.training for m in net.modules()]
    before = [(k, id(b), b.clone()) for k, b in net.named_buffers()]
    try:
        with model_as_it_was(net, torch.device('cpu')) as model:
            assert model is net and all(m.training for m in net.modules())
            net(torch.rand(4, 1, 16, 16))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as e:
        assert type(e) is error
    assert modes == [m.training for m in net.modules()]
    for (k, b), (name, number, value) in zip(net.named_buffers(), before):
        assert k == name and id(b) == number and torch.equal(b, value)


@pytest.mark.parametrize('error', [None, KeyboardInterrupt])
def test_loaders_are_as_they_were(error):
    "Those with a generator of their own too, and what is kept in their dicts"
    generator, own = torch.Generator().manual_seed(3), np.random.default_rng(0)
    theirs = torch.utils.data.DataLoader(range(8), batch_size=2, shuffle=True, generator=generator)
    fastais = TfmdDL(range(8), bs=2, shuffle=True)
    fastais.notes, fastais.numpy_rng = {}, own

    def look():
        fastais.notes['seen'], fastais.extra = True, 1
        batches = [b.tolist() for dl in (theirs, fastais) for b in dl]
        return batches, own.random(), random.random(), np.random.random(), torch.rand(1).item()

    try:
        with loaders_as_they_were([theirs, fastais, [1, 2]]):
            first = look()
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert fastais.notes == {} and not hasattr(fastais, 'extra')
    assert look() == first


# --- batches


@pytest.mark.parametrize('n, expected', [(1, 1), (4, 1), (5, 2), (1000, 5)])
def test_batches_with_enough_images(make_dls, pool, n, expected):
    dls = make_dls(n_batches=None)  # 20 labels, 4 in a batch
    assert len(labeled_batches(dls.train, n).batches) == expected
    unlabeled_dl = dls.unlabeled_dl(pool, bs=4, tfm=FixMatchTransform(weak=weak_augment(flip=False)))
    found = unlabeled_batches(unlabeled_dl, dls, n)
    assert [len(b[0]) for b in found.batches] == [4] * -(-n // 4)  # for ever


def test_no_batch(make_dls):
    dls = make_dls(bs=21, n_batches=None)
    assert labeled_batches(dls.train, 1).batches == []
    with pytest.raises(ValueError, match='yields no batch'):
        unlabeled_batches([], dls, 1)


def slow_views(img, seconds=0.01):
    time.sleep(seconds)
    return tv.pil_to_tensor(img), tv.pil_to_tensor(img)


@pytest.mark.parametrize('workers', [0, 1])
def test_seconds_for_a_batch(make_dls, pool, workers):
    dls = make_dls()
    unlabeled_dl = dls.unlabeled_dl(pool, bs=4, tfm=slow_views, num_workers=workers)
    assert workers_of(unlabeled_dl) == workers
    found = unlabeled_batches(unlabeled_dl, dls, 1, seconds=0.2)
    assert len(found.batches) == 1 and found.seconds >= 0.04 * 0.9
    assert multiprocessing.active_children() == []


def test_it_ends_when_it_is_late(make_dls):
    def batches():
        for _ in range(1000):
            time.sleep(0.05)
            yield torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16)

    assert len(unlabeled_batches(batches(), make_dls(), 1000, most=0.01).batches) == 1
    timed = unlabeled_batches(batches(), make_dls(), 1000, seconds=9, most=0.01)
    assert len(timed.batches) == 2 and timed.seconds >= 0.04


def test_workers_of_other_loaders():
    assert workers_of([1, 2]) == 0 and workers_of(torch.utils.data.DataLoader(range(3), num_workers=2)) == 2


# --- a step


def test_a_step(make_learner, rehearsed):
    o = rehearsed(make_learner())
    assert (o.error, o.seconds, o.peak) == (None, None, None)
    assert (o.n_out, o.n_images, o.n_bytes) == (10, 4 + 2 * 8, 20 * 16 * 16 * 4)
    assert np.isfinite(o.loss) and 0 <= o.mask_rate <= 1


def test_the_time_of_a_step(make_learner, rehearsed):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            time.sleep(0.05)
            return self.net(x)

    assert rehearsed(make_learner(model=Slow()), seconds=0.1).seconds >= 0.045


def test_no_hook_of_an_optimizer_wakes_up(make_learner, rehearsed):
    learn, woken = make_learner(), []
    for p in learn.model.parameters():
        p.register_post_accumulate_grad_hook(woken.append)
    rehearsed(learn)
    assert woken == [] and all(p.grad is None for p in learn.model.parameters())


def test_labels_beyond_the_outputs_stop_it(make_learner, rehearsed):
    o = rehearsed(make_learner(model=tiny_net(2)))
    assert '2 outputs' in str(o.error) and o.n_out == 2


def test_a_copied_policy_is_tried_as_ours_would(make_learner, rehearsed, pool):
    "What ours remembers is used, and what it can't do is found"
    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': FlexMatch(0.1)})
    quiet_fit(learn, 1)
    memory = {k: v.clone() for k, v in learn.fix_match.policy.state_dict().items()}
    assert rehearsed(learn).error is None
    policy = learn.fix_match.policy
    assert all(torch.equal(v, memory[k]) for k, v in policy.state_dict().items())
    learn.remove_cb(FixMatch)
    smaller = learn.dls.unlabeled_dl(pool[:10], tfm=FixMatchTransform(weak=weak_augment(flip=False)))
    learn.add_cb(FixMatch(smaller, policy=policy))
    assert 'another pool' in str(rehearsed(learn).error)


def test_a_policy_is_set_up_as_often_as_in_training(make_learner, rehearsed):
    class Once(FlexMatch):
        done = False

        def setup(self, *args):
            assert not self.done, 'once is enough'
            self.done = True
            super().setup(*args)

    learn = make_learner(fixmatch={'threshold': 0.95, 'policy': Once(0.1)})
    assert rehearsed(learn).error is None and not learn.fix_match.policy.done
    quiet_fit(learn, 1)
    assert rehearsed(learn).error is None
