"Runs: the learner of a configuration, what a run writes, and how it goes on after an interrupt"

import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import quiet_fit
from fastai.vision.all import Callback, CancelFitException, load_learner

from fixmatch_fastai.all import FixMatch
from fixmatch_fastai.console import CommandError
from fixmatch_fastai.experiment import run as run_room
from fixmatch_fastai.experiment.config import (
    ExperimentConfig,
    OptimizerConfig,
    ScheduleConfig,
    config_yaml,
    resolved,
)
from fixmatch_fastai.experiment.datasets import load_images
from fixmatch_fastai.experiment.policies import all_policies
from fixmatch_fastai.experiment.run import (
    Run,
    describe_results,
    get_learner,
    is_finished,
    read_results,
    run,
    run_folder,
    run_seeds,
)

pytest.importorskip('omegaconf', reason='omegaconf is not installed')


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    Path('images').symlink_to(few_digits.parent)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)


def small(**kwargs):
    short = dict(data='images/digits', n_labels=20, network='small_cnn', bs=4, mu=2, steps=6, eval_every=2, workers=0)
    return ExperimentConfig(**{**short, **kwargs})


class Stop(Callback):
    "Ctrl-C in the batch with this number"

    order, run_valid = 75, False

    def __init__(self, at):
        self.at = at

    def after_batch(self):
        if self.train_iter == self.at:
            raise KeyboardInterrupt


def stop_next_run(monkeypatch, at):
    "The next run is stopped in this step; those after it are not"
    real = run_room.get_learner

    def stopped(*args):
        monkeypatch.setattr(run_room, 'get_learner', real)
        learn = real(*args)
        learn.add_cb(Stop(at))
        return learn

    monkeypatch.setattr(run_room, 'get_learner', stopped)


# --- the learner


def test_recipe_of_a_configuration():
    "Optimiser, policy, average: each where it should be"
    optimizer = OptimizerConfig(lr=0.02, mom=0.8, wd=0.01)
    policy = dict(lambda_u=0.5, policy_args={'threshold': 0.7}, forward='split')
    learn = get_learner(small(optimizer=optimizer, **policy, bn_momentum=0.05))
    fm = learn.fix_match
    assert (fm.policy.threshold, fm.lambda_u, fm.forward_mode, fm.unlabeled_dl.mu) == (0.7, 0.5, 'split', 2)
    assert learn.model_ema.decay == 0.5, '2 % of 6 steps are less than one'
    assert {m.momentum for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.05}
    learn.create_opt()
    group = learn.opt.opt.param_groups[0]
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.8, 0.01)
    assert learn.lr == 0.02 and learn.pool is fm.unlabeled_dl


def test_schedules_of_a_run():
    ran = Run(small(schedule=ScheduleConfig(part=0.5), name='cos')).fit()
    assert ran.learn.recorder.lrs == pytest.approx([0.03 * math.cos(math.pi / 2 * k / 6) for k in range(6)])
    ran = Run(small(optimizer=OptimizerConfig('adam', 0.01), schedule=ScheduleConfig('one_cycle'), name='cycle')).fit()
    assert ran.learn.recorder.lrs[0] == pytest.approx(0.01 / 25)
    assert 'sqr_avg' in next(iter(ran.learn.opt.state.values()))


@pytest.mark.parametrize('policy', all_policies)
def test_every_named_policy_trains(policy):
    learn = get_learner(small(policy=policy))
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 2 and learn.fix_match.history.loss_u.notna().all()


def test_supervised_has_no_unlabeled_images():
    learn = get_learner(small(policy='supervised'))
    assert not learn._grab_cbs(FixMatch)
    quiet_fit(learn, 1)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'raw_accuracy', 'time']


class Judged(Callback):
    "Accuracies of the weights at the end of training and during validation, by a loop of its own"

    order, run_valid = 100, False

    def __init__(self):
        self.raw, self.held = [], []

    def judge(self):
        right = n = 0
        self.learn.model.eval()
        with torch.no_grad():
            for x, y in self.dls.valid:
                right, n = right + int((self.learn.model(x).argmax(1) == y).sum()), n + len(y)
        return right / n

    def after_train(self):
        self.raw.append(self.judge())

    def before_validate(self):
        self.held.append(self.judge())


def test_raw_and_averaged_accuracy():
    learn = get_learner(small(steps=12, eval_every=4, optimizer=OptimizerConfig(lr=0.1)))
    judged = Judged()
    learn.add_cb(judged)
    quiet_fit(learn, 3)
    names = learn.recorder.metric_names[1:-1]
    rows = pd.DataFrame([list(v) for v in learn.recorder.values], columns=names)
    assert rows.raw_accuracy.tolist() == pytest.approx(judged.raw) and rows.accuracy.tolist() == pytest.approx(
        judged.held
    )
    assert (rows.raw_accuracy != rows.accuracy).any(), 'or the test shows nothing'
    assert len(learn.validate()) == 2


def test_raw_accuracy_where_training_is_cut_short():
    class Cut(Callback):
        def after_validate(self):
            raise CancelFitException

    learn = get_learner(small())
    learn.add_cb(Cut())
    quiet_fit(learn, 1)
    learn.remove_cb(learn.cut)
    quiet_fit(learn, 1)
    assert (
        len(learn.recorder.values[0]) == len(learn.recorder.metric_names) - 2 and 0 <= learn.recorder.values[0][-1] <= 1
    )


# --- what a run writes


FILES = 'config.yaml history.csv scores.csv learner.pkl result.json'
PICTURES = 'accuracy.png training.png pseudo_labels.png acceptance.png'


@pytest.mark.slow
def test_what_a_run_writes(monkeypatch):
    config = small(seeds=2, steps=2, eval_every=1, track='tensorboard')
    results, root = run_seeds(config), Path('experiments/digits_20_fixed')
    for seed in (0, 1):
        files = {o.name for o in (root / f'seed_{seed}').iterdir()}
        assert {*FILES.split(), *PICTURES.split(), 'tensorboard'} <= files
        assert not [o for o in files if o.endswith('.tmp')]
    rows, history = pd.read_csv(root / 'results.csv'), pd.read_csv(root / 'seed_1/history.csv')
    assert rows.seed.tolist() == [0, 1] and (rows.n_test == 40).all()
    assert rows.accuracy.tolist() == pytest.approx(results.accuracy.tolist())
    assert rows.accuracy[1] == history.accuracy.iloc[-1] and rows.raw_accuracy[1] == history.raw_accuracy.iloc[-1]
    assert rows.median_20.isna().all(), 'there are no 20 evaluations'
    loaded = load_learner(root / 'seed_0/learner.pkl')
    with loaded.no_bar():
        assert len(loaded.predict(load_images(small()).test[0])[2]) == 10
    scores = pd.read_csv(root / 'seed_0/scores.csv')
    assert len(scores) == 100
    assert set(scores) == {'item', 'predicted', 'confidence', 'weight', 'truth', 'right'}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / 'seed_0/tensorboard'))
    events.Reload()
    assert {'accuracy', 'raw_accuracy', 'mask_rate', 'train_loss'} <= set(events.Tags()['scalars'])
    assert {o.step for o in events.Scalars('train_loss')} == {1, 2} and len(events.Scalars('raw_accuracy')) == 2

    monkeypatch.setattr(Run, 'fit', lambda self: pytest.fail('what is finished is not trained again'))
    config.workers = 1
    assert run_seeds(config).equals(results)


def test_result_and_summary():
    "By hand: the last row, the median of the last 20, mean and standard deviation with n - 1"
    ran = Run(small(name='x'))
    ran.folder.mkdir(parents=True)
    history = pd.DataFrame(dict(epoch=range(22), raw_accuracy=0.3, mask_rate=0.9, pseudo_acc=0.8))
    history['accuracy'] = [0.1, 0.2] + [0.5] * 9 + [0.7] * 10 + [0.4]
    history['time'] = ['01:00'] * 20 + ['00:30', '1:00:30']
    history.to_csv(ran.folder / 'history.csv', index=False)
    row = ran.result()
    assert (row['accuracy'], row['raw_accuracy'], row['mask_rate'], row['n_test']) == (0.4, 0.3, 0.9, 40)
    assert row['minutes'] == 81
    assert row['median_20'] == pytest.approx(0.6), 'of nine 0.5, ten 0.7 and 0.4: the mean of the two in the middle'
    text = describe_results(pd.DataFrame([row, {**row, 'seed': 1, 'accuracy': 0.6}]))
    assert '2 seeds, 40 test images, mean ± standard deviation' in text
    assert 'averaged weights, last step: 50.00 ± 14.14 %' in text
    assert 'median of the last 20 evaluations: 60.00 ± 0.00 %' in text
    text = describe_results(pd.DataFrame([{**row, 'median_20': None}]))
    assert '1 seed, 40 test images\naveraged weights, last step: 40.00 %\nraw' in text


def test_supervised_run(undrawn):
    row = run(small(policy='supervised'))
    root = Path('experiments/digits_20_supervised/seed_0')
    assert 'mask_rate' not in row and row == json.loads((root / 'result.json').read_text())
    assert len(pd.read_csv(root / 'scores.csv')) == 100 and not (root / 'training.png').exists()


@pytest.mark.slow
def test_a_run_tracked_by_mlflow():
    "Interrupted and resumed, with its files"
    mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed')
    config = small(track='mlflow', name='tracked', policy='flexmatch')
    with pytest.MonkeyPatch.context() as m:
        stop_next_run(m, 5)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    row = run(config)
    client = mlflow.MlflowClient('sqlite:///experiments/mlflow.db')
    (found,) = client.search_runs([client.get_experiment_by_name('tracked').experiment_id])
    assert (found.info.status, found.info.run_name) == ('FINISHED', 'seed_0')
    assert [o.step for o in client.get_metric_history(found.info.run_id, 'step/train_loss')] == [1, 2, 3, 4, 5, 6]
    expected = {'policy': 'flexmatch', 'optimizer.lr': '0.03', 'optimizer': 'nesterov_sgd'}
    assert {k: found.data.params[k] for k in expected} == expected
    folder = Path('experiments/tracked/seed_0')
    files = {o.path for o in client.list_artifacts(found.info.run_id)}
    assert files == {o.name for o in folder.iterdir() if o.is_file() and o.name != 'result.json'}
    assert files >= {'learner.pkl', 'scores.csv', 'config.yaml', 'pseudo_labels.png'}
    assert found.data.metrics['accuracy'] == pytest.approx(row['accuracy'])
    assert found.data.metrics['raw_accuracy'] == pytest.approx(row['raw_accuracy'])


# --- going on


def weights(folder):
    return torch.cat([p.flatten() for p in load_learner(folder / 'learner.pkl').model.parameters()])


@pytest.mark.slow
def test_an_interrupted_run_goes_on(monkeypatch, capsys, undrawn):
    "In its training, and while it writes: then all is trained, and what was not written is written"
    run(small(name='whole'))
    stop_next_run(monkeypatch, 5)  # in the third epoch
    with pytest.raises(KeyboardInterrupt):
        run(small(name='cut'))
    whole, cut = (Path('experiments') / o / 'seed_0' for o in ('whole', 'cut'))
    assert len(pd.read_csv(cut / 'history.csv')) == 2 and not (cut / 'result.json').exists()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run_room, 'save_csv', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(small(name='cut'))
    assert '2 of 3 epochs are done, going on' in capsys.readouterr().out
    run(small(name='cut'))
    assert 'nothing is left to train' in capsys.readouterr().out and (cut / 'result.json').exists()
    a, b = (pd.read_csv(o / 'history.csv').drop(columns='time') for o in (whole, cut))
    pd.testing.assert_frame_equal(a, b)
    assert torch.equal(weights(whole), weights(cut))


@pytest.mark.slow
def test_what_was_stopped_before_its_first_evaluation_may_begin_anew(monkeypatch, undrawn):
    stop_next_run(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(small())
    result, root = run(small(bs=5)), Path('experiments/digits_20_fixed')
    with pytest.raises(CommandError, match=r'holds a run with another bs \(5 there, 4 here\): give another name'):
        run(small())
    shutil.copytree(root / 'seed_0', root / 'seed_8')
    with pytest.raises(CommandError, match='seed_8 holds a run with another bs'):
        run_seeds(small(seed=7, seeds=2))
    assert not (root / 'seed_7').exists(), 'it is said before the first seed is trained'
    monkeypatch.setattr(Run, 'fit', lambda self: pytest.fail('it is trained again'))
    same = lambda row: pd.DataFrame([row]).equals(pd.DataFrame([result]))
    assert same(run(small(bs=5, track='tensorboard'))), 'it is not trained by its tracker'
    assert same(run(small(bs=5, data=os.path.abspath('images/digits')))), 'nor by another path to its images'


RESULT = dict(data='digits', n_labels=20, policy='fixed', network='x', steps=6, seed=0)
RESULT |= dict(accuracy=0.5, raw_accuracy=0.25, median_20=None, n_test=40)
DAMAGED = ['', '{', '{}', '[]', 'null', '3', b'\xff', json.dumps(RESULT | dict(accuracy='a'))]
DAMAGED += [json.dumps(RESULT | dict(raw_accuracy=7)), json.dumps({k: v for k, v in RESULT.items() if k != 'n_test'})]


@pytest.mark.parametrize('text', DAMAGED)
def test_a_damaged_result_is_no_result(tmp_path, text):
    for seed in (0, 1):
        file = tmp_path / f'x/seed_{seed}/result.json'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(RESULT | dict(seed=seed)))
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=r'result\.json is damaged and left out: run its seed again\.'):
        assert read_results(tmp_path / 'x').seed.tolist() == [0]
    assert not is_finished(ExperimentConfig(out=str(tmp_path), name='x', seed=1))


@pytest.mark.slow
def test_what_is_damaged_in_a_finished_folder(monkeypatch, capsys, undrawn):
    "The result is made anew from the checkpoint; what can't be made anew is named"
    result, folder = run(small()), Path('experiments/digits_20_fixed/seed_0')
    (folder / 'result.json').write_text('{}')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Callback, 'after_batch', lambda self: pytest.fail('it is trained again'), raising=False)
        assert run(small()) == result and is_finished(resolved(small()))
    out = capsys.readouterr().out
    assert 'result.json is damaged, so it is made anew' in out and 'nothing is left to train' in out
    table = (folder / 'history.csv').read_text()
    for text, says in ((table[:-5], 'history.csv is damaged: mend it'), (None, 'lacks the last evaluation')):
        (folder / 'result.json').unlink()
        (folder / 'history.csv').unlink() if text is None else (folder / 'history.csv').write_text(text)
        with pytest.raises(CommandError, match=says):
            run(small())
        (folder / 'result.json').touch()
    for damage in (lambda o: o.write_text('a: ['), Path.unlink):
        damage(folder / 'config.yaml')
        with pytest.raises(CommandError, match=r'whose config\.yaml is not there, or damaged: give another name, or'):
            run(small())


def test_the_folder_of_another_seed_is_refused(tmp_path):
    c = resolved(small())
    folder = run_folder(c)
    folder.mkdir(parents=True)
    (folder / 'config.yaml').write_text(config_yaml(c))
    (folder / 'result.json').write_text(json.dumps(RESULT))
    assert run(c)['seed'] == 0
    folder.rename(folder.with_name('seed_1'))
    with pytest.raises(CommandError, match=r'holds a run with another seed \(0 there, 1 here\)'):
        run(small(seed=1))
