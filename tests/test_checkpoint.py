"A run that is cut off goes on as if it had not been; learners go elsewhere without images"

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import no_bn, quiet_fit
from fastai.vision.all import (
    Adam,
    Callback,
    CategoryBlock,
    ColReader,
    ConvLayer,
    CrossEntropyLossFlat,
    CSVLogger,
    DataBlock,
    DataLoaders,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    ImageBlock,
    IndexSplitter,
    Learner,
    MixUp,
    PILImageBW,
    ReduceLROnPlateau,
    SaveModelCallback,
    ShowGraphCallback,
    TensorImageBW,
    TerminateOnNaNCallback,
    accuracy,
    get_image_files,
    load_learner,
    nn,
    parent_label,
    ranger,
    set_seed,
)

from fixmatch_fastai.all import (
    AdaMatch,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    ModelEMA,
    Policy,
    WeakTransform,
    digits_path,
    split_labeled,
    weak_augment,
)
from fixmatch_fastai.around import AroundEpochs
from fixmatch_fastai.augment import Cutout
from fixmatch_fastai.checkpoint import SaveFixMatch
from fixmatch_fastai.policy import PseudoLabels
from fixmatch_fastai.recipe import nesterov_sgd
from fixmatch_fastai.uncertainty import FeatureDensity, MCDropout

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
N_STEPS, N_EPOCHS = 3, 4
WEAK = weak_augment(flip=False)


def groups(model):
    return [[*model[0].parameters()], [*model[1:].parameters()]]


def drop_net(n_out=10):
    head = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, n_out)
    return nn.Sequential(ConvLayer(1, 8, stride=2), *head)


@cache
def files(n_labeled, n_pool, data, split):
    "Labelled, unlabelled and validation images"
    digits = get_image_files(data or digits_path()).sorted()
    labeled, rest = split_labeled(digits, parent_label, n_labeled, seed=int(split == 1))
    pool, rest = split_labeled(rest, parent_label, n_pool, seed=int(split == 2))
    return labeled, pool, split_labeled(rest, parent_label, 10, seed=0)[0]


def strong(img):
    "Random, and quick"
    return Cutout(0.5)(img.rotate(random.uniform(-30, 30)))


def build(
    path,
    seed=1,
    policy=None,
    cbs=(),
    n_batches=N_STEPS,
    n_pool=60,
    n_labeled=20,
    net=drop_net,
    num_workers=0,
    vocab=None,
    data=None,
    lambda_u=1.0,
    split=0,
    reverse=False,
    fixmatch=None,
    strong=strong,
    weak=WEAK,
    **kwargs,
):
    "A learner with all that draws random numbers: weak views of labelled images, strong views, dropout"
    labeled, pool, valid = files(n_labeled, n_pool, data, split)
    if reverse:
        pool = pool[::-1]
    set_seed(seed)
    block = DataBlock(
        blocks=(ImageBlock(PILImageBW), CategoryBlock(vocab=vocab, sort=vocab is None)),
        get_y=parent_label,
        splitter=IndexSplitter(range(n_labeled, n_labeled + len(valid))),
        item_tfms=WeakTransform(weak),
    )
    dls = block.dataloaders(labeled + valid, bs=4, val_bs=10, num_workers=num_workers).repeat_train(n_batches)
    loader = dls.unlabeled_dl(pool, mu=2, tfm=FixMatchTransform(weak=WEAK, strong=strong))
    fm = FixMatch(loader, policy=policy or FlexMatch(0.5), lambda_u=lambda_u, **(fixmatch or {}))
    return Learner(dls, net(), **{'metrics': accuracy, 'path': path, 'cbs': [fm, *cbs], **kwargs})


def one_cycle(learn, n_epoch=N_EPOCHS, lr=1e-2, cbs=(), **kwargs):
    quiet_fit(learn, n_epoch, lr, cbs=cbs, method='fit_one_cycle', **kwargs)


def fixmatch_fit(learn, cbs=()):
    quiet_fit(learn, N_EPOCHS * N_STEPS, cbs=cbs, method='fit_fixmatch')


def flat(learn, cbs=()):
    quiet_fit(learn, N_EPOCHS, 1e-2, cbs=[ReduceLROnPlateau(patience=1, min_delta=10), *cbs])


RUNS = {  # what `build` gets, and how it is trained
    'FlexMatch and ModelEMA': (lambda: dict(policy=FlexMatch(0.5), cbs=[ModelEMA(half_life=3)]), one_cycle),
    'FreeMatch and ModelEMA, MCDropout': (
        lambda: dict(policy=FreeMatch(decay=0.9) & MCDropout(at_most=0.5, n_passes=2), cbs=[ModelEMA(half_life=3)]),
        one_cycle,
    ),
    'FeatureDensity, two layer groups': (lambda: dict(policy=FeatureDensity(), splitter=groups), one_cycle),
    'GradientAccumulation over the end of an epoch': (lambda: dict(cbs=[GradientAccumulation(20)]), one_cycle),
    'MixUp and ranger': (lambda: dict(cbs=[MixUp()], opt_func=ranger), one_cycle),
    "the paper's recipe": (lambda: dict(opt_func=nesterov_sgd, cbs=[ModelEMA(half_life=3)]), fixmatch_fit),
    'a constant learning rate that a callback lowers': (dict, flat),
}


def state(learn):
    "All that a run has come to"
    fm = learn.fix_match
    ema = learn.model_ema.state_dict() if hasattr(learn, 'model_ema') else {}
    rec = learn.recorder
    return dict(
        model=dict(learn.model.state_dict()),
        opt=learn.opt.state_dict()['state'],
        hypers=[{k: float(v) for k, v in o.items()} for o in learn.opt.hypers],
        ema=ema,
        policy=dict(fm.policy.state_dict()),
        lrs=[float(o) for o in rec.lrs],
        losses=torch.stack([*rec.losses]),
        values=[list(o) for o in rec.values],
        iters=rec.iters,
        history=torch.tensor(fm.history.values),
    )


def assert_same(learn, whole):
    "A learner, and the state of one that was not cut off"
    found = state(learn)
    for part in whole:
        same(found[part], whole[part], msg=partial('{}: {}'.format, part))


def saved(path, name='a'):
    "What is in a checkpoint"
    return torch.load(path / f'models/{name}.pth', weights_only=True)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


class Interrupt(Callback):
    "Ctrl-C in `event`, from training step `at` on"

    order = 100

    def __init__(self, at, event='after_step'):
        self._at, self._event = at, event

    def __call__(self, event_name):
        here = event_name == self._event and (self.training or event_name == 'before_validate')
        if here and self.train_iter >= self._at:
            raise KeyboardInterrupt


def cut_off(fit, learn, cbs, at=2 * N_STEPS + 1, **kwargs):
    with pytest.raises(KeyboardInterrupt):
        fit(learn, cbs=[*cbs, Interrupt(at, **kwargs)])


# ---- what a new process does ----

POLICIES = dict(
    FixedThreshold=FixedThreshold,
    FlexMatch=FlexMatch,
    FeatureDensity=FeatureDensity,
    MCDropout=partial(MCDropout, n_passes=2),
)
EXPORTED = [  # and whether with an average of the weights
    ('FixedThreshold', False),
    ('FlexMatch', True),
    ('FeatureDensity', False),
    ('FeatureDensity', True),
    ('MCDropout', False),
]
MOMENTS = dict(
    before=lambda learn: None,
    after_pred=partial(cut_off, partial(one_cycle, n_epoch=1), cbs=[], at=1, event='after_pred'),
    after_backward=partial(cut_off, partial(one_cycle, n_epoch=1), cbs=[], at=2, event='after_backward'),
    before_validate=partial(cut_off, partial(one_cycle, n_epoch=1), cbs=[], at=0, event='before_validate'),
    after=partial(one_cycle, n_epoch=1),
)


def prediction(learn, image):
    with learn.no_bar():
        cls, _, probs = learn.predict(image)
    return cls, probs.tolist()


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    """Runs as a whole, and cut off after half of their steps and one more in vain; exported learners, whose data is
    deleted; and what a new process makes of them"""
    folder, data = tmp_path_factory.mktemp('here'), tmp_path_factory.mktemp('secret_data')
    whole = {}
    for i, (name, (args, fit)) in enumerate(RUNS.items()):
        learn = build(folder, **args())
        fit(learn)
        whole[name] = {**state(learn), 'random': draw()}
        cut_off(fit, build(folder, **args()), [SaveFixMatch(f'run{i}')])
    shutil.copytree(digits_path(), data / 'digits')
    image = folder / 'image.png'
    shutil.copy(get_image_files(data / 'digits').sorted()[700], image)
    here = {}
    for policy, ema in EXPORTED:
        here.update(export(folder, policy, ema, data / 'digits', image))
    shutil.rmtree(data)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, data, whole, here, torch.load(folder / 'found.pth', weights_only=False)


def export(folder, policy, ema, data, image):
    "A learner at each moment of its training, and what it predicts for an image then"
    learn = build(folder, policy=POLICIES[policy](), cbs=[ModelEMA(half_life=3)] if ema else [], data=data)
    for moment, reach in MOMENTS.items():
        reach(learn)
        name = f'{policy} {moment} {ema}'
        learn.export(f'{name}.pkl')
        cls, probs = prediction(learn, image)
        if ema and moment != 'before':  # it is the average's
            x = learn.dls.test_dl([image]).one_batch()[0].as_subclass(torch.Tensor)
            same(learn.model_ema.ema.module(x).softmax(1)[0].tolist(), probs)
        yield name, (cls, probs)


def in_a_new_process(folder):
    "Go on with each run, and load each exported learner"
    found = {}
    for i, (name, (args, fit)) in enumerate(RUNS.items()):
        learn = build(folder, seed=100 + i, **args())
        fit(learn, cbs=[SaveFixMatch(f'run{i}', resume=True)])
        found[name] = {**state(learn), 'random': draw()}
    found.update({f.stem: prediction(load_learner(f), folder / 'image.png') for f in folder.glob('*.pkl')})
    torch.save(found, folder / 'found.pth')


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_resumed_in_a_new_process(elsewhere, name):
    "6 steps, a new process, 6 steps are 12 steps, bit for bit; and writing checkpoints changes nothing"
    *_, whole, _, found = elsewhere
    assert len(found[name]['losses']) == N_EPOCHS * N_STEPS and len(found[name]['values']) == N_EPOCHS
    for part, o in whole[name].items():
        same(found[name][part], o, msg=partial('{}: {}'.format, part))


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'after_step', 'before_validate'])
def test_the_cell_is_run_again(tmp_path, event):
    "In the same notebook, with the learner that Ctrl-C left, wherever it fell"
    args = dict(cbs=[ModelEMA(half_life=3)], policy=FreeMatch(decay=0.9))
    whole = build(tmp_path, **args)
    one_cycle(whole, 3)
    learn = build(tmp_path, **args)
    with pytest.raises(KeyboardInterrupt):
        one_cycle(learn, 3, cbs=[SaveFixMatch('a'), Interrupt(4, event)])
    assert '_with_events' not in vars(learn)
    random.seed(7)
    torch.rand(3)
    one_cycle(learn, 3, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, state(whole))
    assert type(learn.loss_func) is type(whole.loss_func)


MEMORIES = dict(
    FlexMatch=lambda: FlexMatch(0.12),
    FeatureDensity=FeatureDensity,
    passes=lambda: FreeMatch(decay=0.9) & MCDropout(at_most=0.5, n_passes=2),
)


def taught(warmup=0.5, policy='FlexMatch', beside=False):
    "What `build` gets for a teacher and a warm-up"
    teacher = ModelEMA(half_life=3)
    cbs = [teacher] if beside else []
    return dict(policy=MEMORIES[policy](), fixmatch=dict(teacher=teacher, warmup=warmup), cbs=cbs)


@pytest.fixture(scope='module')
def taught_run(tmp_path_factory):
    "Makes a whole run with a teacher, once for each warm-up and policy; and what is drawn after it"

    @cache
    def make(warmup, policy):
        learn = build(tmp_path_factory.mktemp('whole'), **taught(warmup, policy))
        one_cycle(learn)
        return state(learn), draw()

    return make


@pytest.mark.parametrize(
    'warmup,policy,at,again',
    [
        # within it, at its end, after it
        *[(0.5, o, at, False) for o in MEMORIES for at in (N_STEPS + 1, 2 * N_STEPS + 1, 3 * N_STEPS + 1)],
        *[(0.5, 'FlexMatch', at, True) for at in (N_STEPS + 1, 2 * N_STEPS + 1, 3 * N_STEPS + 1)],
        (0.5, 'FeatureDensity', 3 * N_STEPS + 1, True),
        # the checkpoint is from within it, the interrupt fell on a step with unlabelled images
        *[(0.4, o, N_STEPS + 2, again) for o, again in (('FlexMatch', False), ('passes', False), ('passes', True))],
        *[(0.0, o, 2 * N_STEPS + 1, again) for o, again in (('FlexMatch', False), ('passes', False), ('passes', True))],
    ],
)
def test_teacher_and_warm_up(tmp_path, taught_run, warmup, policy, at, again):
    "Bit for bit, wherever the fit is cut off; by a new learner, and by the same again"
    whole, drawn = taught_run(warmup, policy)
    learn = build(tmp_path, **taught(warmup, policy))
    cut_off(one_cycle, learn, [SaveFixMatch('a')], at=at)
    if not again:
        learn = build(tmp_path, seed=5, **taught(warmup, policy))
    random.seed(7)
    torch.rand(3)
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert draw() == drawn
    assert_same(learn, whole)
    assert len(learn.fix_match.history) == N_EPOCHS * N_STEPS and learn.model_ema.averaged


def test_teacher_given_beside_fixmatch_is_the_same_run(tmp_path, taught_run):
    cut_off(one_cycle, build(tmp_path, **taught()), [SaveFixMatch('a')])
    learn = build(tmp_path, seed=5, **taught(beside=True))
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, taught_run(0.5, 'FlexMatch')[0])


def test_second_fit_in_its_warm_up(tmp_path):
    "The unlabelled stream's place is that of the fit before, and the policy remembers that fit"

    def first(seed):
        learn = build(tmp_path, seed=seed, **taught())
        one_cycle(learn, 2)
        return learn

    whole = first(1)
    one_cycle(whole)
    cut_off(one_cycle, first(1), [SaveFixMatch('a')], at=N_STEPS + 1)
    learn = first(5)
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, state(whole))


def test_finished_run_with_teacher(tmp_path):
    whole = build(tmp_path, **taught())
    one_cycle(whole, 2, cbs=SaveFixMatch('a'))
    learn = build(tmp_path, seed=5, **taught())
    one_cycle(learn, 2, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, state(whole))
    assert learn.fix_match.stream is None
    one_cycle(learn, 1)


def test_settings_of_teacher_and_warm_up(tmp_path):
    "They are there only when set, so that older checkpoints fit; a teacher is named once, beside FixMatch or not"
    new = {'share on labels alone', 'decay of the teacher'}

    def setting(**kwargs):
        learn = build(tmp_path, **kwargs)
        one_cycle(learn, 1, cbs=SaveFixMatch('a'))
        return saved(tmp_path)['setting']

    plain, with_average = setting(), setting(cbs=[ModelEMA(half_life=3)])
    assert not new & {*plain, *with_average}
    assert with_average['callbacks with a state'] == ['model_ema'] and len(with_average['decay of the average']) == 1
    with_teacher = setting(**taught())
    assert new < {*with_teacher} and with_teacher == setting(**taught(beside=True))
    without = lambda o: {k: v for k, v in o.items() if k not in new | {'policy'}}
    assert without(with_teacher) == without(plain)


def test_interrupted_twice_and_before_the_first_checkpoint(tmp_path):
    whole, fit = build(tmp_path), partial(one_cycle, n_epoch=3)
    fit(whole)
    cut_off(fit, build(tmp_path), [SaveFixMatch('a', resume=True)], at=2)
    assert not (tmp_path / 'models/a.pth').exists()
    for at in (4, 5, 7):
        learn = build(tmp_path, seed=1 if at == 4 else at)  # before there is a checkpoint, a run depends on its seed
        cut_off(fit, learn, [SaveFixMatch('a', resume=True)], at=at)
    learn = build(tmp_path, seed=5)
    fit(learn, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, state(whole))


def test_every_second_epoch_and_the_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(torch, 'save', lambda o, f, save=torch.save: (written.append(o['epoch']), save(o, f)))
    one_cycle(build(tmp_path), 5, cbs=SaveFixMatch('a', every=2))
    assert written == [2, 4, 5]


def test_finished_run_is_loaded_and_trains_nothing(tmp_path, capsys):
    whole = build(tmp_path, cbs=[ModelEMA(half_life=3)])
    one_cycle(whole, 2, cbs=SaveFixMatch('a'))
    before = (tmp_path / 'models/a.pth').read_bytes()
    learn = build(tmp_path, seed=5, cbs=[ModelEMA(half_life=3), Interrupt(0)])  # would be interrupted in its first step
    capsys.readouterr()
    one_cycle(learn, 2, cbs=SaveFixMatch('a', resume=True))
    assert 'a.pth: 2 of 2 epochs are done, nothing is left to train.' in capsys.readouterr().out
    assert_same(learn, state(whole))
    assert learn.final_record == whole.final_record
    assert (tmp_path / 'models/a.pth').read_bytes() == before
    assert learn.fix_match.stream is None


def test_table_bar_and_log_are_whole(tmp_path, capsys):
    "With fastai's progress bar, its logger and its graph, which all live through epochs that don't take place"

    def fit(learn, **kwargs):
        graph = ShowGraphCallback()
        learn.fit(3, cbs=[SaveFixMatch('a', **kwargs), CSVLogger(tmp_path / 'log.csv'), graph])
        assert graph.nb_batches == [N_STEPS, 2 * N_STEPS, 3 * N_STEPS]
        return (tmp_path / 'log.csv').read_text()

    whole = build(tmp_path)
    whole.recorder.add_time = False
    log = fit(whole)
    learn = build(tmp_path, cbs=[Interrupt(7)])
    learn.recorder.add_time = False
    with pytest.raises(KeyboardInterrupt):
        fit(learn)
    again = build(tmp_path, seed=3)
    again.recorder.add_time = False
    capsys.readouterr()
    assert fit(again, resume=True) == log and len(log.splitlines()) == 4
    out = capsys.readouterr().out
    assert 'a.pth: 2 of 3 epochs are done, going on.' in out
    assert again.final_record == whole.final_record == again.recorder.values[-1]


def test_recorder_plots_and_schedule_after_resuming(tmp_path):
    whole = build(tmp_path)
    one_cycle(whole, 3)
    cut_off(partial(one_cycle, n_epoch=3), build(tmp_path), [SaveFixMatch('a')])
    learn = build(tmp_path, seed=3)
    one_cycle(learn, 3, cbs=SaveFixMatch('a', resume=True))
    assert learn.recorder.hps['lr'] == pytest.approx(whole.recorder.hps['lr'])
    assert len(learn.recorder.hps['mom']) == 3 * N_STEPS
    learn.recorder.plot_loss()
    learn.recorder.plot_sched()
    learn.fix_match.plot()


class Scripted(Callback):
    "Makes what trackers look at go as it is told"

    order = 55

    def __init__(self, losses):
        self._losses = losses

    def after_epoch(self):
        self.recorder.values[-1][1] = self._losses[self.epoch]


def trackers():
    return [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=3)]


def test_trackers_remember(tmp_path):
    "The best model stays the best, patience isn't new after an interruption; a run that was stopped early is finished"
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    whole = build(tmp_path / 'a', cbs=[Scripted(losses)])
    one_cycle(whole, 8, cbs=[SaveFixMatch('a'), *trackers()])
    learn = build(tmp_path / 'b', cbs=[Scripted(losses)])
    cut_off(partial(one_cycle, n_epoch=8), learn, [SaveFixMatch('a'), *trackers()], at=3 * N_STEPS + 1)
    learn = build(tmp_path / 'b', seed=3, cbs=[Scripted(losses)])
    one_cycle(learn, 8, cbs=[SaveFixMatch('a', resume=True), *trackers()])
    assert len(learn.recorder.values) == len(whole.recorder.values) == 5  # the best is the second, then three in vain
    assert_same(learn, state(whole))
    done = build(tmp_path / 'b', seed=4, cbs=[Scripted(losses)])
    one_cycle(done, 8, cbs=[SaveFixMatch('a', resume=True), *trackers()])
    assert len(done.recorder.values) == 5
    same(dict(done.model.state_dict()), dict(whole.model.state_dict()))


def test_a_fit_that_ends_within_an_epoch_keeps_the_checkpoint_before(tmp_path):
    class NaN(Callback):
        def after_loss(self):
            if self.training and self.train_iter == 4:
                self.learn.loss = self.learn.loss * float('nan')

    learn = build(tmp_path, cbs=[NaN(), TerminateOnNaNCallback()])
    one_cycle(learn, cbs=SaveFixMatch('a'))
    found = saved(tmp_path)
    assert found['epoch'] == 1 and not found['finished']


@pytest.mark.parametrize('at', [1, 2 * N_STEPS + 1], ids=['frozen', 'unfrozen'])
def test_fine_tune(tmp_path, capsys, at):
    "Two fits in one call: each goes on by itself"

    def fit(learn, cbs=()):
        quiet_fit(learn, 3, cbs=cbs, freeze_epochs=2, method='fine_tune')

    class Count(Interrupt):  # steps of both fits
        _n = 0

        def __call__(self, event_name):
            if event_name == 'after_step' and self.training:
                self._n += 1
                if self._n > N_STEPS + at:
                    raise KeyboardInterrupt

    args = dict(splitter=groups, cbs=[ModelEMA(half_life=3)])
    whole = build(tmp_path, **args)
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(build(tmp_path, **args), cbs=[SaveFixMatch('a'), Count(0)])
    learn = build(tmp_path, seed=3, **args)
    capsys.readouterr()
    fit(learn, cbs=SaveFixMatch('a', resume=True))
    printed = [o for o in capsys.readouterr().out.splitlines() if o.startswith('a.pth')]
    later = 'a.pth: of a later fit, whose weights are loaded; nothing is left to train in this one.'
    going_on = ['a.pth: 1 of 2 epochs are done, going on.'], [later, 'a.pth: 1 of 3 epochs are done, going on.']
    assert printed == going_on[at > 1]
    assert_same(learn, state(whole))


def test_only_fits_are_saved(tmp_path):
    "Not what `lr_find`, `validate`, `get_preds` and `tta` do; also where the callback stays on the learner"
    learn = build(tmp_path, cbs=[SaveFixMatch('a', resume=True)])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
        learn.validate()
        learn.get_preds()
        learn.tta(n=1)
    assert not (tmp_path / 'models/a.pth').exists() and '_with_events' not in vars(learn)
    assert int(learn.fix_match.policy.counts[-1]) == 60, 'nothing was remembered'
    one_cycle(learn, 1)
    before = (tmp_path / 'models/a.pth').read_bytes()
    learn.validate()
    with learn.no_bar():
        learn.tta(n=1)
    assert (tmp_path / 'models/a.pth').read_bytes() == before
    one_cycle(learn, 1)  # the second fit of this callback
    assert saved(tmp_path)['fit'] == 1


def test_a_callback_that_stays_goes_on_after_an_interrupt(tmp_path):
    whole = build(tmp_path)
    one_cycle(whole, 3)
    learn = build(tmp_path, cbs=[SaveFixMatch('a', resume=True)])
    cut_off(partial(one_cycle, n_epoch=3), learn, [])
    learn.validate()
    learn.export()
    assert len(load_learner(tmp_path / 'export.pkl').validate(dl=learn.dls.valid)) == 2
    one_cycle(learn, 3)
    assert_same(learn, state(whole))
    assert '_with_events' not in vars(learn)


def test_lr_find_after_an_interrupt_is_no_fit(tmp_path):
    "The callback that stays goes on with the fit that was cut off"
    learn = build(tmp_path, cbs=[SaveFixMatch('a', resume=True)])
    cut_off(partial(one_cycle, n_epoch=3), learn, [])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
    one_cycle(learn, 3)
    assert saved(tmp_path)['fit'] == 0 and len(learn.recorder.losses) == 3 * N_STEPS


class Epochs(Callback):
    "Notes how epochs end, and leaves out those in `skipped`"

    def __init__(self, order, notes, skipped=()):
        self.order, self._notes, self._skipped = order, notes, skipped

    def before_fit(self):
        AroundEpochs.add(self)

    def after_fit(self):
        AroundEpochs.remove(self.learn)

    def around_epoch(self, run):
        if self.epoch in self._skipped:
            return
        try:
            run()
        except BaseException as e:
            self._notes.append((self.order, self.epoch, type(e).__name__))
            raise
        self._notes.append((self.order, self.epoch, 'done'))


def test_callbacks_around_an_epoch(make_learner):
    "The last by order is outermost; nothing is left behind, however the fit ends"
    notes = []
    learn = make_learner()
    quiet_fit(learn, 3, cbs=[Epochs(1, notes, skipped=[1]), Epochs(2, notes)])
    assert notes == [(1, 0, 'done'), (2, 0, 'done'), (2, 1, 'done'), (1, 2, 'done'), (2, 2, 'done')]
    assert '_with_events' not in vars(learn)
    notes.clear()
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 3, cbs=[Epochs(1, notes), Epochs(2, notes), Interrupt(1)])
    assert notes == [(1, 0, 'KeyboardInterrupt'), (2, 0, 'KeyboardInterrupt')]
    assert '_with_events' not in vars(learn)


def test_a_fit_that_never_came_to_an_epoch(make_learner):
    "Its callbacks have no part in the next"
    notes = []
    learn = make_learner()

    class Refuses(Callback):
        order = 10

        def before_fit(self):
            raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        quiet_fit(learn, 1, cbs=[Epochs(1, notes), Refuses()])
    learn.export()
    quiet_fit(learn, 1)
    assert notes == [] and '_with_events' not in vars(learn)


def snapshot(learn):
    "The learner, as it would be missed"
    ema = learn.model_ema.state_dict() if hasattr(learn, 'model_ema') else {}
    fm = learn._grab_cbs(FixMatch)
    return deepcopy(
        dict(
            model=dict(learn.model.state_dict()),
            opt=learn.opt.state_dict()['state'],
            grads=[p.grad for p in learn.model.parameters()],
            ema=ema,
            policy=dict(fm[0].policy.state_dict()) if fm else {},
            steps=torch.tensor(fm[0].history.values) if fm else torch.zeros(0),
            losses=[*learn.recorder.losses],
            values=[[*o] for o in learn.recorder.values],
        )
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ('harm-was-done',)


def damaged(kind):
    def do(file):
        data = file.read_bytes()
        if kind == 'cut short':
            file.write_bytes(data[: len(data) // 2])
        elif kind == 'empty':
            file.write_bytes(b'')
        elif kind == 'one bit':
            with zipfile.ZipFile(file) as z:
                biggest = max(z.infolist(), key=lambda o: o.file_size)
            at = biggest.header_offset + 1000
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        elif kind == 'text':
            file.write_text('not a checkpoint')
        elif kind == 'program':
            torch.save({'format': 'fixmatch_fastai checkpoint 1', 'more': Evil()}, file)
        elif kind == 'old pickle':
            file.write_bytes(pickle.dumps(Evil()))

    return do


@pytest.mark.parametrize('kind', ['cut short', 'empty', 'one bit', 'text', 'program', 'old pickle'])
def test_damaged_checkpoint(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    learn = build(tmp_path, cbs=[ModelEMA(half_life=3)])
    one_cycle(learn, 1, cbs=SaveFixMatch('a'))
    damaged(kind)(tmp_path / 'models/a.pth')
    refused(learn, r"The file a\.pth can't be read as a checkpoint.*delete it", partial(one_cycle, n_epoch=2))
    assert not Path('harm-was-done').exists()


def refused(learn, match, fit=one_cycle):
    before, loss_func = snapshot(learn), learn.loss_func
    with pytest.raises(ValueError, match=match):
        fit(learn, cbs=SaveFixMatch('a', resume=True))
    same(snapshot(learn), before)
    assert learn.loss_func is loss_func and '_with_events' not in vars(learn) and learn.fix_match.stream is None
    one_cycle(learn, 1)  # and trains on


def test_other_files_under_its_name(tmp_path):
    learn = build(tmp_path, cbs=[ModelEMA(half_life=3)])
    one_cycle(learn, 1)
    learn.save('a', with_opt=False)
    refused(learn, 'no checkpoint of this version of SaveFixMatch')
    torch.save({'format': 'fixmatch_fastai checkpoint 99'}, tmp_path / 'models/a.pth')
    refused(learn, 'no checkpoint of this version of SaveFixMatch')


class Own(Policy):
    "Remembers more for more classes, whatever its name says"

    def __init__(self, size):
        super().__init__()
        self._size = size

    def setup(self, n_classes, n_unlabeled, model):
        self.remember(mean=torch.zeros(self._size))

    def forward(self, batch):
        return PseudoLabels(batch.probs.argmax(1), batch.probs.max(1).values)


class Counter(Callback):
    "Has a state of its own"

    n = 0

    def after_batch(self):
        self.n += self.training

    def state_dict(self):
        return {'n': self.n}

    def load_state_dict(self, sd):
        self.n = sd['n']


two_epochs = partial(one_cycle, n_epoch=2)


def wider_net():
    return nn.Sequential(ConvLayer(1, 9, stride=2), *drop_net()[1:4], nn.Linear(144, 10))


def longer_net():
    return nn.Sequential(*drop_net(), nn.ReLU(), nn.Linear(10, 10))


def other_net(i, layer):
    "`drop_net` with another layer in place of one; all shapes are the same"

    def make():
        net = drop_net()
        (net[0] if i == 'act' else net)[2 if i == 'act' else i] = layer
        return net

    return make


def other_strong(img):
    return img


SETTINGS = {
    r"forward: \['joint'\] there, \['split'\] here": (dict(fixmatch=dict(forward='split')), two_epochs),
    r'kind of 0\.2: ReLU\(inplace=False\) there, GELU.* here': (dict(net=other_net('act', nn.GELU())), two_epochs),
    r'kind of 3: Dropout\(p=0\.3.* there, Dropout\(p=0\.5': (dict(net=other_net(3, nn.Dropout(0.5))), two_epochs),
    'loss: .*label_smoothing=0.* there': (dict(loss_func=CrossEntropyLossFlat(label_smoothing=0.1)), two_epochs),
    'loss: .* here': (dict(loss_func=CrossEntropyLossFlat(weight=torch.arange(1.0, 11))), two_epochs),
    'unlabelled images go through: .*': (dict(strong=other_strong), two_epochs),
    'labelled images go through: .*': (dict(weak=weak_augment(flip=False, shift=0.25)), two_epochs),
    r"callbacks that train: \[\] there, \['GradientClip\(max_norm=1": (dict(cbs=[GradientClip(1.0)]), two_epochs),
    r"callbacks that train: \[\] there, \['MixUp\(\) 0.4'\] here": (dict(cbs=[MixUp(0.4)]), two_epochs),
    'eps of the optimizer': (dict(opt_func=partial(Adam, eps=1e-3)), two_epochs),
    'epochs: 2 there, 4 here': ({}, one_cycle),
    'steps in an epoch: 3 there, 5 here': (dict(n_batches=5), two_epochs),
    'unlabelled images: 60 there, 70 here': (dict(n_pool=70), two_epochs),
    'labelled images: 20 there, 30 here': (dict(n_labeled=30), two_epochs),
    'policy: .*FlexMatch.*threshold=0.5.* there, .*threshold=0.6.* here': (dict(policy=FlexMatch(0.6)), two_epochs),
    'policy: .* there, .*FreeMatch.* here': (dict(policy=FreeMatch()), two_epochs),
    r'shape of 0\.0\.weight: \(8, 1, 3, 3\) there, \(9, 1, 3, 3\) here': (dict(net=wider_net), two_epochs),
    r'shape of 6\.weight: none there, \(10, 10\) here': (dict(net=longer_net), two_epochs),
    r'decay of the average: \[\] there, \[0.5\] here': (dict(cbs=[ModelEMA(0.5)]), two_epochs),
    r"callbacks with a state: \[\] there, \['counter'\] here": (dict(cbs=[Counter()]), two_epochs),
    'optimizer: .*weight_decay.* there, .*SGD.* here': (dict(opt_func=nesterov_sgd), two_epochs),
    r'parameters in each group: \[.\] there, \[., .\] here': (dict(splitter=groups), two_epochs),
    r'lambda_u: .*1 1 1 1.* there, .*2 2 2 2.* here': (dict(lambda_u=2.0), two_epochs),
    'schedule of lr: 0.0004 0.01 0.0075 0.0025 there, 0.0008 0.02 0.015 0.005 here': ({}, partial(two_epochs, lr=2e-2)),
    'schedule of mom: ': ({}, partial(two_epochs, moms=(0.9, 0.8, 0.9))),
    r'wd: \[0.01\] there, \[0.1\] here': ({}, partial(two_epochs, wd=0.1)),
    'checksum of the labelled images: ': (dict(split=1), two_epochs),
    'checksum of the unlabelled images: ': (dict(split=2), two_epochs),
    'classes: .*8.*9.* there, .*9.*8.* here': (dict(vocab=[*'0123456798']), two_epochs),
    r'share on labels alone: none there, \[0.5\] here': (dict(fixmatch=dict(warmup=0.5)), two_epochs),
    r'decay of the teacher: none there, \[0.5\] here': (dict(fixmatch=dict(teacher=ModelEMA(0.5))), two_epochs),
}


@pytest.fixture(scope='module')
def checkpoint_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp('settings')
    one_cycle(build(folder), 2, cbs=SaveFixMatch('a'))
    return folder / 'models/a.pth'


@pytest.mark.parametrize('match', SETTINGS)
def test_checkpoint_of_another_run(tmp_path, checkpoint_file, match):
    args, fit = SETTINGS[match]
    learn = build(tmp_path, **args)
    one_cycle(learn, 1)
    (tmp_path / 'models').mkdir(exist_ok=True)
    shutil.copy(checkpoint_file, tmp_path / 'models')
    refused(learn, match, fit)


def test_checkpoint_of_an_earlier_version(tmp_path, checkpoint_file):
    "That says nothing of kinds"
    learn = build(tmp_path, net=other_net('act', nn.GELU()))
    (tmp_path / 'models').mkdir()
    found = torch.load(checkpoint_file, weights_only=True)
    assert found.pop('kinds')['kind of 0.2'] == 'ReLU(inplace=False)'
    torch.save(found, tmp_path / 'models/a.pth')
    two_epochs(learn, cbs=SaveFixMatch('a', resume=True))
    assert len(learn.recorder.values) == 2


def test_policy_of_other_settings_that_it_does_not_print(tmp_path):
    one_cycle(build(tmp_path, policy=AdaMatch(decay=0.9)), 1, cbs=SaveFixMatch('a'))
    learn = build(tmp_path, policy=AdaMatch(decay=0.8))
    with pytest.raises(ValueError, match='policy, in full: .*decay=0.9'):
        one_cycle(learn, 1, cbs=SaveFixMatch('a', resume=True))


def test_callbacks_that_look_on_may_come_and_go(tmp_path, checkpoint_file):
    (tmp_path / 'models').mkdir()
    shutil.copy(checkpoint_file, tmp_path / 'models')
    learn = build(tmp_path, cbs=[CSVLogger(tmp_path / 'log.csv'), TerminateOnNaNCallback()])
    two_epochs(learn, cbs=SaveFixMatch('a', resume=True))


# ---- files that someone changed ----


class Fit:
    "Resumes, and is stopped in the first step: what the file made of the learner is all there is"

    def __init__(self, folder):
        self.learn, self.folder = build(folder, cbs=[ModelEMA(half_life=3), Counter(), GradientAccumulation(4)]), folder
        with pytest.raises(KeyboardInterrupt):
            self(SaveFixMatch('good'), at=N_STEPS + 1)
        self.good = torch.load(folder / 'models/good.pth', weights_only=True)

    def __call__(self, cb, at=0):
        one_cycle(self.learn, 2, cbs=[cb, ReduceLROnPlateau(), Interrupt(at)])

    def refusal(self, state):
        "The sentence that refuses it, and leaves all as it was; `None` where it was loaded"
        torch.save(state, self.folder / 'models/bad.pth')
        before = {**snapshot(self.learn), 'random': [torch.get_rng_state(), random.getstate()[1][-1]]}
        attributes = {cb.name: {*vars(cb)} for cb in self.learn.cbs}
        try:
            self(SaveFixMatch('bad', resume=True))
        except KeyboardInterrupt:
            return None
        except ValueError as e:
            sentence = str(e).split('\n\t')[-1]
            assert '\n' not in sentence and sentence.startswith(('bad.pth ', 'The file bad.pth '))
            after = {**snapshot(self.learn), 'random': [torch.get_rng_state(), random.getstate()[1][-1]]}
            same(after, before)
            assert {cb.name: {*vars(cb)} for cb in self.learn.cbs} == attributes
            return sentence


@pytest.fixture(scope='module')
def crafted(tmp_path_factory):
    return Fit(tmp_path_factory.mktemp('crafted'))


def leaves(o, path=()):
    "All values of a checkpoint that hold no others, by the way to them"
    pairs = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, (list, tuple)) else None
    if pairs is None or not o:
        yield path
    else:
        for k, v in pairs:
            yield from leaves(v, (*path, k))


def changed(o, path, change):
    "A copy of `o` with one value changed"
    if not path:
        return change(o)
    key, *rest = path
    assert key in o if isinstance(o, dict) else key < len(o)
    if isinstance(o, dict):
        return {k: changed(v, rest, change) if k == key else v for k, v in o.items()}
    return type(o)(changed(v, rest, change) if k == key else v for k, v in enumerate(o))


def without(o, path):
    key = path[-1]
    return changed(o, path[:-1], lambda d: {k: v for k, v in d.items() if k != key})


FAR = 10**15
CRAFTED = {  # where, and what is put there
    ('epoch',): ['x', -3, 0, 3, 1.5, None, True, FAR],
    ('train_iter',): ['x', -1, FAR, None],
    ('finished',): ['x', 1, None],
    ('fit',): ['x', -1, None],
    ('rows',): ['x', None, [3], [[{}]]],
    ('setting',): [None, 3, {3: 4}, {'a': torch.ones(2)}],
    ('order',): [torch.ones(2), {3: 4}],
    ('model', '4.weight'): [None, 'x', torch.full((10, 128), float('nan')), torch.ones(10, 128).long(), torch.ones(3)],
    ('model',): [None, {}, {'4.weight': torch.ones(10, 128)}],
    ('opt',): [None, {}, 3],
    ('opt', 'frozen_idx'): ['x', -1, FAR],
    ('opt', 'grads'): [None, [], [3]],
    ('opt', 'opt', 'hypers'): [None, [], [{}], [{'lr': 'x'}]],
    ('opt', 'opt', 'hypers', 0, 'lr'): ['x', float('nan'), float('inf'), True, [1]],
    ('opt', 'opt', 'state', 0): [None, {'sqr_avg': torch.ones(3)}, {'step': 'x'}, {'grad_avg': torch.ones(1) / 0}],
    ('scaler',): [None, {'scale': 'x'}, {'scale': -1.0}, {'scale': float('inf')}, {'scale': 0.0}],
    ('cbs',): [None, {}],
    ('cbs', 'model_ema'): [None, {'average': {}}, {'average': {}, 'raw': {}, 'steps': 3}],
    ('cbs', 'model_ema', 'steps'): ['x', -1, True, 2.0, 2**60],
    ('cbs', 'model_ema', 'raw', '4.bias'): [None, torch.ones(10) / 0, torch.ones(3)],
    ('cbs', 'counter'): [None, {}, {'n': 'x'}, 3],
    ('cbs', 'save_fix_match'): [{'fname': '../../x'}, {'learn': 3}, {'run': False}, {'order': 3}, 3],
    ('cbs', 'recorder'): [{'_log': 3}, {'__class__': 3}, {'learn': None}],
    ('cbs', 'gradient_accumulation'): [{'n_acc': 3}, {'count': 'x'}, {'count': -1}, {'count': True}],
    ('cbs', 'param_scheduler', 'hps'): [None, {}, {'lr': 3, 'mom': 3}],
    ('cbs', 'reduce_lr_on_plateau', 'best'): ['x', None, [1], {}],
    ('fixmatch',): [None, 3, {}],
    ('fixmatch', 'place'): [3, 'x', (1,), (1, FAR), (1, -8), ('x', 8), (2**70, 8), (1, 8.0)],
    ('fixmatch', 'n_classes'): ['x', -1, 0, FAR, 2.0],
    ('fixmatch', 'policy'): [None, 3, {}, {'last': 3}],
    ('fixmatch', 'policy', 'last'): [
        torch.full((61,), 99),
        torch.full((61,), -1),
        torch.ones(61),
        torch.ones(3).long(),
    ],
    ('fixmatch', 'steps'): [None, torch.ones(3), torch.full((3, 9), -1.0).double(), torch.full((3, 9), 1e15).double()],
    ('fixmatch', 'trouble'): [3, {'one_class': 3}],
    ('fixmatch', 'classes'): [3, [3], [(1, 2, 3)], [(1, torch.ones(2, 3), None)]],
    ('record',): [None, {}],
    ('record', 'losses'): ['x', [3], torch.ones(2, 2), torch.ones(2).long()],
    ('record', 'values'): ['x', [3], [['x']]],
    ('record', 'smooth'): [None, (1, 2), (torch.ones(()), 'x')],
    ('generators',): [None, [], [3]],
    ('random', 'python'): [None, 3, (3, (1, 2), None)],
    ('random', 'numpy'): [None, ('x', [1], 0, 0, 0.0), ('MT19937', [1] * 624, FAR, 0, 0.0)],
    ('random', 'torch'): [None, torch.ones(3), torch.ones(5056)],
    ('random', 'cuda'): [3, ['x']],
}


@pytest.mark.parametrize('path', CRAFTED, ids=lambda o: '.'.join(map(str, o)))
def test_crafted_checkpoints_are_refused(crafted, path):
    "In one sentence, before anything is loaded: after each the learner is bit for bit as it was"
    for v in CRAFTED[path]:
        assert crafted.refusal(changed(crafted.good, path, lambda old, v=v: v)), v


def test_a_missing_part_is_refused(crafted):
    inner = [
        ('opt', 'opt'),
        ('opt', 'grads'),
        ('fixmatch', 'policy'),
        ('record', 'lrs'),
        ('random', 'numpy'),
        ('model', '4.bias'),
    ]
    optional = {'version', 'kinds'}
    for path in [*((k,) for k in crafted.good if k not in optional), *inner]:
        assert crafted.refusal(without(crafted.good, path)), path
    assert 'opt is missing' in crafted.refusal(without(crafted.good, ('opt',)))


def other_value(v, rng):
    if isinstance(v, torch.Tensor):
        changes = [torch.full_like(v, 7), v.double() / 0, v.bool(), v[None], v.flatten()[:0], v + 1j, None, 'x']
        return rng.choice(changes)
    return rng.choice(['x', -3, FAR, float('nan'), float('inf'), None, True, [], {}, torch.ones(2), 1.5])


def test_any_value_may_be_changed(crafted):
    "To something else at random: one sentence and the learner as before, or it is loaded and trains a step"
    rng = random.Random(0)
    ways = [o for o in leaves(crafted.good) if not {'setting', 'kinds', 'numpy', 'python', 'generators'} & {*o}]
    loaded = 0
    for path in rng.sample(ways, 60):
        loaded += crafted.refusal(changed(crafted.good, path, lambda v: other_value(v, rng))) is None
    assert loaded < 20


def test_nothing_is_written_elsewhere(tmp_path):
    "A file that names another for `SaveFixMatch`, as it was once possible"
    folder = tmp_path / 'run'
    one_cycle(build(folder), 1, cbs=SaveFixMatch('a'))
    state = saved(folder)
    state['cbs']['save_fix_match'] = {'fname': '../../x'}
    torch.save(state, folder / 'models/a.pth')
    with pytest.raises(ValueError, match=r'a\.pth is damaged, or someone changed it \(fname of save_fix_match\)'):
        one_cycle(build(folder), 1, cbs=SaveFixMatch('a', resume=True))
    assert [o.name for o in tmp_path.iterdir()] == ['run']


# ---- compiled networks ----


def compiled(net=drop_net):
    return torch.compile(net(), backend='eager')


def partly_compiled():
    net = drop_net()
    net[0] = torch.compile(net[0], backend='eager')
    return net


NETS = dict(plain=drop_net, whole=compiled, part=partly_compiled)


@pytest.mark.parametrize('there, here', [('plain', 'whole'), ('whole', 'plain'), ('part', 'whole'), ('plain', 'part')])
def test_checkpoints_of_compiled_networks(tmp_path, there, here):
    "Go on in any other, with the average too"
    two_epochs(build(tmp_path, net=NETS[there], cbs=[ModelEMA(half_life=3)]), cbs=SaveFixMatch('a'))
    assert not [k for k in saved(tmp_path)['model'] if '_orig_mod' in k]
    learn = build(tmp_path, seed=3, net=NETS[here], cbs=[ModelEMA(half_life=3)])
    two_epochs(learn, cbs=SaveFixMatch('a', resume=True))
    same([*learn.model.state_dict().values()], [*saved(tmp_path)['model'].values()])
    assert learn.model_ema.averaged and learn.model_ema.steps == 2 * N_STEPS


# ---- frozen layers, policies, images ----


def test_frozen_layers(tmp_path):
    learn = build(tmp_path, splitter=groups)
    one_cycle(learn, cbs=SaveFixMatch('a'))
    learn.freeze()
    refused(learn, 'weights that are trained')


@pytest.mark.parametrize('trained', [False, True])
def test_memory_of_another_policy(tmp_path, trained):
    "That looks the same from outside; before its first step, and after"
    one_cycle(build(tmp_path, policy=Own(3)), 1, cbs=SaveFixMatch('a'))
    learn = build(tmp_path, policy=Own(4))
    learn.create_opt()
    if trained:
        one_cycle(learn, 1)
    else:
        learn.recorder.losses, learn.recorder.values = [], []
    refused(learn, "a.pth holds another policy's memory", partial(one_cycle, n_epoch=1))


def test_images_that_are_gone(tmp_path, pool):
    "The stream starts before anything is loaded"
    one_cycle(build(tmp_path), 1, cbs=SaveFixMatch('b'))
    cut_off(one_cycle, build(tmp_path), [SaveFixMatch('a')])
    learn = build(tmp_path, seed=3)
    one_cycle(learn, 1)
    learn.fix_match.unlabeled_dl.start_at = lambda place: 1 / 0
    before = snapshot(learn)
    with pytest.raises(ZeroDivisionError):
        one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    after = snapshot(learn)
    for part in ('model', 'opt', 'policy'):
        same(after[part], before[part])


def test_files_in_another_order(tmp_path):
    "Is told, and training goes on"
    cut_off(one_cycle, build(tmp_path), [SaveFixMatch('a')])
    learn = build(tmp_path, reverse=True)
    with pytest.warns(UserWarning, match='another order than in the run of a.pth'):
        one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert len(learn.recorder.values) == N_EPOCHS


def test_rows_of_a_table(tmp_path):
    "Items may be rows of a table: its index tells them apart"
    labeled, _, valid = files(20, 60, None, 0)
    df = pd.DataFrame({'file': [*labeled, *valid, valid[0]]})
    df['label'] = df.file.map(parent_label)
    block = DataBlock(
        blocks=(ImageBlock(PILImageBW), CategoryBlock),
        get_x=ColReader('file'),
        get_y=ColReader('label'),
        splitter=IndexSplitter(range(20, 30)),
    )

    def written(df):
        learn = Learner(block.dataloaders(df, bs=4, num_workers=0), drop_net(), path=tmp_path)
        quiet_fit(learn, 1, cbs=SaveFixMatch('a'))
        found = saved(tmp_path)
        return found['setting']['checksum of the labelled images'], found['order'][0]

    rows, mixed, others = [*range(30)], [1, 0, *range(2, 30)], [30, *range(1, 30)]
    (a, order), (b, mixed_order), (c, _) = (written(df.iloc[o]) for o in (rows, mixed, others))
    assert a == b != c and order != mixed_order


def test_own_callbacks(tmp_path):
    learn = build(tmp_path, cbs=[Counter()])
    cut_off(one_cycle, learn, [SaveFixMatch('a')])
    learn = build(tmp_path, cbs=[Counter()], seed=3)
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert learn.counter.n == N_EPOCHS * N_STEPS
    learn.counter.n = {1, 2}
    with pytest.raises(TypeError, match='something in it is a set: give what holds it a `state_dict`'):
        learn.counter.after_batch = lambda: None
        one_cycle(learn, 1, cbs=SaveFixMatch('b'))


class Stop(Exception):
    pass


@pytest.mark.parametrize('how', ['interrupt', 'disk full', 'replace'])
def test_writing_that_fails_leaves_the_file_before(tmp_path, monkeypatch, how):
    learn = build(tmp_path)
    one_cycle(learn, 1, cbs=SaveFixMatch('a'))
    file, n = tmp_path / 'models/a.pth', []
    before = file.read_bytes()

    def half(state, tmp):
        Path(tmp).write_bytes(b'half of it')
        n.append(tmp)
        raise KeyboardInterrupt if how == 'interrupt' else RuntimeError('enforce fail at inline_container.cc')

    if how == 'replace':
        monkeypatch.setattr('os.replace', lambda a, b: (_ for _ in ()).throw(OSError('no space')))
    else:
        monkeypatch.setattr(torch, 'save', half)
    if how == 'interrupt':
        with pytest.raises(KeyboardInterrupt):
            one_cycle(learn, 2, cbs=SaveFixMatch('a'))
    else:
        with pytest.warns(UserWarning, match='No checkpoint could be written after epoch 0 .*training goes on'):
            one_cycle(learn, 2, cbs=SaveFixMatch('a'))
        assert len(learn.recorder.values) == 2
    assert file.read_bytes() == before and [o.name for o in file.parent.iterdir()] == ['a.pth']


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    learn = build(tmp_path)
    one_cycle(learn, 1, cbs=SaveFixMatch('a'))
    assert not [*(tmp_path / 'models').iterdir()]
    monkeypatch.delenv('RANK')
    one_cycle(learn, 1, cbs=SaveFixMatch('a'))
    monkeypatch.setenv('RANK', '1')
    capsys.readouterr()
    other = build(tmp_path, seed=3)
    set_seed(17)
    expected = random.random()
    set_seed(17)
    one_cycle(other, 1, cbs=SaveFixMatch('a', resume=True))
    assert random.random() == expected, 'other processes keep their own random numbers'
    same(dict(other.model.state_dict()), dict(learn.model.state_dict()))
    assert 'a.pth' not in capsys.readouterr().out


class Noting(FlexMatch):
    "Notes the images of each batch"

    def __init__(self):
        super().__init__(0.5)
        self.seen = []

    def forward(self, batch):
        self.seen.append(batch.idxs.tolist())
        return super().forward(batch)


class Views(Callback):
    "Keeps the labelled images of each batch"

    order, run_valid = 4, False

    def before_fit(self):
        self.x = []

    def before_batch(self):
        self.x.append(self.xb[0].clone())


@pytest.mark.slow
def test_with_workers_the_same_images_and_labeled_views(tmp_path):
    make = lambda seed=1: build(tmp_path, seed=seed, num_workers=1, policy=Noting(), cbs=[Views()])
    whole = make()
    one_cycle(whole, 2)
    cut_off(partial(one_cycle, n_epoch=2), make(), [SaveFixMatch('a')], at=4)
    learn = make(seed=3)
    one_cycle(learn, 2, cbs=SaveFixMatch('a', resume=True))
    assert learn.fix_match.policy.seen == whole.fix_match.policy.seen[N_STEPS:]
    same(torch.stack(learn.views.x), torch.stack(whole.views.x[N_STEPS:]))


def fit_in_one_of_two(rank, path, cbs, seed):
    learn = build(path, seed=seed, n_batches=4, policy=Noting(), cbs=[ModelEMA(half_life=3)])
    try:
        with learn.distrib_ctx(sync_bn=False):
            one_cycle(learn, 2, cbs=cbs())
    except KeyboardInterrupt:
        pass
    policy = learn.fix_match.policy
    return policy.seen, dict(learn.model.state_dict()), dict(policy.state_dict()), len(learn.recorder.values)


@pytest.mark.slow
def test_two_processes(tmp_path):
    "Each goes on with its share of the images, and both with the same weights"
    pytest.importorskip('accelerate')
    from test_processes import in_two

    def run(name, *args):
        (tmp_path / name).mkdir()
        return in_two(fit_in_one_of_two, tmp_path / name, tmp_path, *args)

    whole = run('whole', list, 1)
    n_steps = len(whole[0][0]) // 2
    run('cut', lambda: [SaveFixMatch('a'), Interrupt(n_steps + 1)], 1)
    assert [o.name for o in (tmp_path / 'models').iterdir()] == ['a.pth'] and saved(tmp_path)['epoch'] == 1
    resumed = run('resumed', lambda: [SaveFixMatch('a', resume=True)], 3)
    for rank in range(2):
        assert resumed[rank][0] == whole[rank][0][n_steps:] and resumed[rank][3] == 2
    assert resumed[0][0] != resumed[1][0]
    for part in (1, 2):
        a, b = resumed[0][part], resumed[1][part]
        same(*({k: v for k, v in o.items() if 'running' not in k} for o in (a, b)))


def torch_learner(path, seed=1, generator=False):
    "Torch's loaders on both sides, which can't tell their place"
    set_seed(seed)
    x, y = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10
    kwargs = dict(generator=torch.Generator().manual_seed(seed)) if generator else {}
    train = torch.utils.data.DataLoader([*zip(x, y)], batch_size=4, shuffle=True, **kwargs)
    valid = torch.utils.data.DataLoader([*zip(x, y)], batch_size=4)
    pool = torch.utils.data.DataLoader([*zip(x, x + 0.1)], batch_size=8, generator=torch.Generator())
    dls = DataLoaders(train, valid, device='cpu')
    fm = FixMatch(pool, threshold=0.2, lambda_u=0.0)
    return Learner(dls, no_bn(), loss_func=nn.CrossEntropyLoss(), path=path, cbs=fm)


@pytest.mark.parametrize('generator', [False, True])
def test_runs_on_torch_loaders_go_on(tmp_path, generator):
    "The labelled images come as they would have; the pool begins anew (and doesn't count here)"

    def fit(learn, cbs=()):
        quiet_fit(learn, 3, 1e-2, cbs=cbs)

    whole = torch_learner(tmp_path, generator=generator)
    fit(whole)
    cut_off(fit, torch_learner(tmp_path, generator=generator), [SaveFixMatch('a')], at=8)
    learn = torch_learner(tmp_path, seed=3, generator=generator)
    fit(learn, cbs=SaveFixMatch('a', resume=True))
    same([o[2] for o in learn.recorder.values], [o[2] for o in whole.recorder.values])
    same(dict(learn.model.state_dict()), dict(whole.model.state_dict()))


def test_scale_of_half_precision(tmp_path):
    class Scaler:
        def __init__(self, scale):
            self.scale = scale

        def state_dict(self):
            return {'scale': self.scale}

        def load_state_dict(self, sd):
            self.scale = sd['scale']

    class Half(Callback):
        def __init__(self, scale):
            self._scale = scale

        def before_fit(self):
            self.learn.scaler = Scaler(self._scale)

    cut_off(one_cycle, build(tmp_path), [Half(512.0), SaveFixMatch('a')])
    learn = build(tmp_path)
    one_cycle(learn, cbs=[Half(1.0), SaveFixMatch('a', resume=True)])
    assert learn.scaler.scale == 512.0
    learn = build(tmp_path)
    learn.to_fp16()
    with pytest.raises(ValueError, match=r"callbacks that train: \[\] there, \['MixedPrecision"):
        one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    cut_off(one_cycle, build(tmp_path).to_fp16(), [SaveFixMatch('b')])  # without CUDA it has no scale
    one_cycle(build(tmp_path).to_fp16(), cbs=SaveFixMatch('b', resume=True))


class FirstStep(nn.Module):
    "Has a parameter that the first step alone uses, and one that none does"

    def __init__(self):
        super().__init__()
        self.net, self.first, self.never = drop_net(), nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))
        self.register_buffer('n', torch.tensor(0))

    def forward(self, x):
        logits = self.net(x)
        if self.training and self.n == 0:
            logits = logits + self.first
        self.n += self.training
        return logits


def test_a_gradient_of_zeros_is_not_none(tmp_path):
    "Weight decay and momentum move a parameter that has one"
    whole = build(tmp_path, net=FirstStep)
    one_cycle(whole)
    cut_off(one_cycle, build(tmp_path, net=FirstStep), [SaveFixMatch('a')])
    cut_at = saved(tmp_path)['model']['first']
    learn = build(tmp_path, net=FirstStep, seed=3)
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    assert_same(learn, state(whole))
    assert learn.model.never.grad is None and not torch.equal(learn.model.first, cut_at)


def test_without_fixmatch(tmp_path):
    "A supervised run, to compare with"

    def supervised(seed):
        learn = build(tmp_path, seed=seed, cbs=[ModelEMA(half_life=3)])
        return learn.remove_cb(FixMatch)

    whole = supervised(1)
    one_cycle(whole)
    cut_off(one_cycle, supervised(1), [SaveFixMatch('a')])
    learn = supervised(3)
    one_cycle(learn, cbs=SaveFixMatch('a', resume=True))
    same(dict(learn.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize(
    'cbs, kwargs, match',
    [
        (lambda: [SaveFixMatch('a'), SaveFixMatch('b')], {}, 'two SaveFixMatch'),
        (lambda: [SaveFixMatch('a'), SaveModelCallback(fname='a')], {}, r'SaveModelCallback would both write a\.pth'),
        (lambda: [SaveFixMatch('a', resume=True)], dict(start_epoch=1), 'either `resume=True` or `start_epoch`'),
    ],
)
def test_use_that_can_not_be_meant(tmp_path, cbs, kwargs, match):
    with pytest.raises(ValueError, match=match):
        one_cycle(build(tmp_path), cbs=cbs(), **kwargs)


def test_start_epoch_alone(tmp_path):
    "fastai's way to skip epochs writes no checkpoint of those"
    learn = build(tmp_path, metrics=None)
    one_cycle(learn, 3, cbs=[SaveFixMatch('a', every=1), Interrupt(0)], start_epoch=3)
    assert not (tmp_path / 'models/a.pth').exists()


@pytest.mark.parametrize('every', [0, -1, 1.5, None, True, '2'])
def test_every_is_checked(every):
    with pytest.raises(ValueError, match='`every` is a number of epochs'):
        SaveFixMatch(every=every)


def test_the_callback_is_copied_and_pickled(tmp_path):
    learn = build(tmp_path, cbs=[SaveFixMatch('sub/a', every=2)])
    one_cycle(learn, 2)
    assert (tmp_path / 'models/sub/a.pth').exists()
    copies = deepcopy(learn.save_fix_match), pickle.loads(pickle.dumps(SaveFixMatch('a', every=3)))
    assert [(o.fname, o.every) for o in copies] == [('sub/a', 2), ('a', 3)]


# ---- export ----


@pytest.mark.slow
@pytest.mark.parametrize('moment', MOMENTS)
@pytest.mark.parametrize('policy,ema', EXPORTED)
def test_export(elsewhere, policy, moment, ema):
    "Small, without images, their names or folders; elsewhere it predicts the same, with ModelEMA as the average does"
    folder, data, _, here, there = elsewhere
    name = f'{policy} {moment} {ema}'
    assert there[name][0] == here[name][0]
    assert there[name][1] == pytest.approx(here[name][1], abs=1e-6)
    exported = (folder / f'{name}.pkl').read_bytes()
    n_weights = sum(v.numel() * v.element_size() for v in drop_net().state_dict().values())
    assert len(exported) < 3 * n_weights + 64_000
    assert data.name.encode() not in exported and b'.png' not in exported and b'PNG' not in exported


DATA = Path(__file__).parent / 'data'


@pytest.mark.parametrize('file', sorted(DATA.glob('export_*.pkl')), ids=lambda o: o.stem)
def test_learner_exported_by_an_earlier_version(file):
    "Made by tests/data/make_export.py with the version in its name; it loads and predicts what it did then"
    expected = json.loads(file.with_suffix('.json').read_text())
    learn = load_learner(file)
    cls, probs = prediction(learn, (TensorImageBW(expected['image']).byte(),))
    assert cls == expected['class'] and learn.dls.vocab == expected['vocab']
    assert probs == pytest.approx(expected['probs'], abs=1e-5)
    assert isinstance(learn.model_ema, ModelEMA)
    assert {n: v.tolist() for n, v in learn.fix_match.policy.state_dict().items()} == expected['memory']
    assert file.stat().st_size < 100_000


def test_an_export_is_as_large_whatever_the_pool(tmp_path):
    "`FlexMatch` notes a class for each image: a run that goes on needs them, an export does not"
    sizes = []
    for n_pool in (60, 600):
        learn = build(tmp_path, n_pool=n_pool)
        one_cycle(learn, 1)
        learn.export()
        assert len(learn.fix_match.policy.last) == n_pool + 1
        sizes.append((tmp_path / 'export.pkl').stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 600
    loaded = load_learner(tmp_path / 'export.pkl')
    assert loaded.fix_match.policy.state_dict() == {} and loaded.fix_match.policy.threshold == 0.5


if __name__ == '__main__':
    in_a_new_process(Path(sys.argv[1]))
