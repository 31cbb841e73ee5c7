"Experiments: what a configuration says, torchvision's files, runs that go on, and what a real MLflow server is told"

import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets as tv
from conftest import quiet_fit
from fastai.vision.all import Callback, CancelFitException, PILImage, load_learner, parent_label
from PIL import Image

from fixmatch_fastai import experiment
from fixmatch_fastai.all import FixMatch, ModelEMA, SaveFixMatch
from fixmatch_fastai.cli.experiment import main
from fixmatch_fastai.experiment.config import ExperimentConfig, read_config, resolved
from fixmatch_fastai.experiment.datasets import ArrayImages, load_images
from fixmatch_fastai.experiment.networks import make_network, wide_resnet
from fixmatch_fastai.experiment.run import get_learner

os.environ |= {'MLFLOW_DISABLE_TELEMETRY': 'true', 'DO_NOT_TRACK': 'true'}
pytest.importorskip('omegaconf', reason='omegaconf is not installed')
SMALL = 'data=digits n_labels=20 network=small_cnn bs=4 mu=2 steps=6 eval_every=2 workers=0'.split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)


def small(**kwargs):
    return ExperimentConfig(**{**dict(data='digits', n_labels=20, network='small_cnn', bs=4, mu=2, steps=6, eval_every=2, workers=0), **kwargs})


def errors(capsys, *args):
    "What the command says when it refuses its arguments"
    assert main([*args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith('fixmatch_experiment: ') and '\n' not in said
    return said


# --- configuration -----------------------------------------------------------------------------------------------------------------------


def test_every_value_has_a_default_and_a_help(capsys):
    assert main(['--help']) == 0
    text = capsys.readouterr().out
    helps = dict(experiment._helps(ExperimentConfig()))
    assert set(helps) == set(experiment._flat(ExperimentConfig())) > {'data', 'optimizer.wd', 'schedule.part', 'ema.decay', 'views.strong', 'track'}
    for name, doc in helps.items():
        assert doc and len(doc) > 8, f'{name} has no help'
        assert re.search(rf'^{re.escape(name)} ', text, re.M), f'{name} is not in --help'
    lr = re.search(r'^optimizer.lr +(\S+) +(.*)', text, re.M)
    assert lr[1] == '0.03' and lr[2].startswith('learning rate')


@pytest.mark.parametrize(
    'args, said',
    [
        ('n_label=40', 'n_label is not known: did you mean n_labels'),
        ('optimiser.lr=1', 'did you mean optimizer.lr'),
        ('lr=1', 'did you mean optimizer.lr'),
        ('zzz=1', '`fixmatch_experiment --help` lists all there is'),
        ('optimizer=sgd', 'optimizer is a group of values: set one of optimizer.name, optimizer.lr'),
        ('bs=many', "bs can't have this value: Value 'many'"),
        ('bs=2.5', "bs can't have this value"),
        ('n_labels', 'write name=value'),
        ('=3', 'write name=value'),
        ('data=cifar_10', 'data cifar_10 is not known: did you mean cifar10'),
        ('policy=flexmach', 'did you mean flexmatch'),
        ('policy=entropy policy_args.at_mots=1', 'policy_args.at_mots is no argument of entropy: did you mean at_most'),
        ('policy=supervised policy_args.threshold=1', 'it takes none'),
        ('policy_args.threshold=9', 'policy_args: `threshold` must be between 0 and 1'),
        ('data=digits network=resnet81', 'network resnet81 is not known: did you mean resnet'),
        ('data=digits network=wrn_27_2', '10, 16, 22, 28'),
        ('data=digits network=small_cnn pretrained=true', 'no pretrained weights of small_cnn'),
        ('forward=joined', 'did you mean joint'),
        ('optimizer.name=sgd', 'optimizer.name sgd is not known: use for example nesterov, adam'),
        ('schedule.part=1', 'schedule.part must be above 0 and below 1, but is 1.0'),
        ('mu=0', 'mu must be 1 or more, but is 0'),
        ('seed=-1', 'seed must be 0 or more'),
        ('steps=100 eval_every=30', 'use 90 steps'),
        ('data=digits n_labels=25', 'n_labels: 25 labels'),
        ('track=mlflow,wandbb', 'track wandbb is not known: did you mean wandb'),
        ('track=none,mlflow', 'track is none, or some of'),
        ('device=gpu', 'device gpu is not there: use cpu'),
        ('data=digits n_labels=1400', "images of '0' ("),
        ('--config nothing.yaml', '--config nothing.yaml is not there'),
    ],
)
def test_mistakes(capsys, args, said):
    assert said in errors(capsys, *args.split())


def test_precision_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'precision=bf16 needs a GPU' in errors(capsys, 'precision=bf16')


def test_file_and_command_line(tmp_path, capsys):
    (tmp_path / 'my.yaml').write_text('data: digits\nbs: 8\noptimizer:\n  wd: 0.001\n  lr: 0.1\npolicy_args:\n  threshold: 0.8\n')
    args = ['--config', 'my.yaml', 'optimizer.lr=0.2', 'steps=40', 'policy_args.T=0.5']
    assert main([*args, '--print']) == 0
    printed = capsys.readouterr().out
    c = read_config(args[2:], 'my.yaml')
    assert (c.data, c.bs, c.optimizer.wd, c.optimizer.lr, c.steps, c.mu) == ('digits', 8, 0.001, 0.2, 40, 7)
    assert c.policy_args == {'threshold': 0.8, 'T': 0.5}
    (tmp_path / 'again.yaml').write_text(printed)
    assert read_config(file='again.yaml') == resolved(c), 'what is printed is a configuration'
    assert not (tmp_path / 'experiments').exists(), 'nothing is trained'
    (tmp_path / 'wrong.yaml').write_text('bss: 3\n')
    assert '--config wrong.yaml: bss is not known: did you mean bs' in errors(capsys, '--config', 'wrong.yaml')
    (tmp_path / 'list.yaml').write_text('- 3\n')
    assert 'must hold names and values' in errors(capsys, '--config', 'list.yaml')
    (tmp_path / 'broken.yaml').write_text('a: [\n')
    assert "can't be read as YAML" in errors(capsys, '--config', 'broken.yaml')


def test_what_follows_the_length_of_a_run():
    c = resolved(ExperimentConfig())
    assert (c.ema.decay, c.eval_every, c.log_every, c.name) == (0.999, 1024, 11, 'cifar10_250_fixed')
    assert c.bn_momentum == 0.001
    assert resolved(ExperimentConfig(steps=34658, eval_every=34658)).ema.decay == 0.999
    c = resolved(ExperimentConfig(steps=1000, ema=experiment.EMAConfig(0.5)))
    assert (c.ema.decay, c.bn_momentum, c.eval_every, c.log_every) == (0.5, 0.5, 100, 1)
    assert resolved(ExperimentConfig(steps=1000)).ema.decay ** 20 == pytest.approx(0.5), '2 % of the steps'
    assert [resolved(ExperimentConfig(data=o)).optimizer.wd for o in ('cifar10', 'cifar100')] == [5e-4, 1e-3]
    assert [resolved(ExperimentConfig(data=o)).views.flip for o in ('cifar10', 'stl10', 'svhn', 'digits')] == [True, True, False, False]
    assert [resolved(ExperimentConfig(policy=o)).dropout for o in ('mutual_info', 'entropy')] == [0.3, 0]


# --- networks and the learner ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, n', [('wrn_28_2', 1_467_610), ('wrn_28_8', 23_354_842)])
def test_wide_resnets_have_the_published_size(name, n):
    assert sum(p.numel() for p in make_network(name, 3, 10).parameters()) == n


def test_start_of_a_wide_resnet():
    torch.manual_seed(0)
    net = wide_resnet(28, 2)
    conv = net[8].conv2  # 64 to 64 channels
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert net[-1].weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 10)), rel=0.1) and not net[-1].bias.any()
    assert net(torch.randn(2, 3, 32, 32)).std() < 5


def test_the_recipe():
    "Optimiser, schedule, views, average: each where it should be"
    learn = get_learner(
        small(optimizer=experiment.OptimizerConfig(lr=0.02, mom=0.8, wd=0.01), lambda_u=0.5, policy_args={'threshold': 0.7}, forward='split', bn_momentum=0.05)
    )
    fm = learn.fix_match
    assert (fm.policy.threshold, fm.lambda_u, fm.forward_mode, fm.unlabeled_dl.mu) == (0.7, 0.5, 'split', 2)
    assert fm.unlabeled_dl.dataset.tfm.strong.name == 'google' and not fm.unlabeled_dl.dataset.tfm.weak.flip
    assert learn.model_ema.decay == 0.5, '2 % of 6 steps are less than one'
    assert {m.momentum for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.05}
    learn.create_opt()
    group = learn.opt.opt.param_groups[0]
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.8, 0.01)
    assert len(fm.unlabeled_dl.dataset) == 1300 and len(learn.dls.train_ds) == 20, 'the pool holds the labelled images too'


def test_schedules(tmp_path):
    run = experiment.Run(small(schedule=experiment.ScheduleConfig(part=0.5), name='cos')).fit()
    assert run.learn.recorder.lrs == pytest.approx([0.03 * math.cos(math.pi / 2 * k / 6) for k in range(6)])
    run = experiment.Run(small(optimizer=experiment.OptimizerConfig('adam', 0.01), schedule=experiment.ScheduleConfig('one_cycle'), name='cycle')).fit()
    assert run.learn.recorder.lrs[0] == pytest.approx(0.01 / 25) and 'sqr_avg' in next(iter(run.learn.opt.state.values()))


@pytest.mark.parametrize('policy', experiment._all_policies)
def test_every_policy_trains(policy):
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
    learn = get_learner(small(steps=40, eval_every=10, optimizer=experiment.OptimizerConfig(lr=0.1)))
    judged = Judged()
    learn.add_cb(judged)
    quiet_fit(learn, 4)
    names = learn.recorder.metric_names[1:-1]
    rows = pd.DataFrame([list(v) for v in learn.recorder.values], columns=names)
    assert rows.raw_accuracy.tolist() == pytest.approx(judged.raw) and rows.accuracy.tolist() == pytest.approx(judged.held)
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
    assert len(learn.recorder.values[0]) == len(learn.recorder.metric_names) - 2 and 0 <= learn.recorder.values[0][-1] <= 1


# --- data --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def shapes():
    "Images with the sizes of each data set, of no meaning: 20 of each class of ten"
    rng = np.random.default_rng(0)
    return lambda n, size: rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_cifar(root, imgs, y, coarse):
    "Python batches as they are in the archive: rows of 3,072 bytes, red first, in five files and one"
    folder = root / ('cifar-100-python' if coarse else 'cifar-10-batches-py')
    folder.mkdir(parents=True)
    rows = imgs.transpose(0, 3, 1, 2).reshape(len(imgs), -1)
    n = len(y) * 4 // 5
    parts = (
        {'train': slice(0, n), 'test': slice(n, None)}
        if coarse
        else {**{f'data_batch_{i + 1}': slice(i * n // 5, (i + 1) * n // 5) for i in range(5)}, 'test_batch': slice(n, None)}
    )
    for name, part in parts.items():
        entry = {'data': rows[part], ('fine_labels' if coarse else 'labels'): [int(o) for o in y[part]]}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = (
        {'fine_label_names': [f'kind {i}' for i in range(100)]}
        if coarse
        else {'label_names': 'airplane automobile bird cat deer dog frog horse ship truck'.split()}
    )
    (folder / ('meta' if coarse else 'batches.meta')).write_bytes(pickle.dumps(names, protocol=2))


def write_svhn(root, imgs, y):
    from scipy.io import savemat

    root.mkdir(parents=True)
    n = len(y) * 4 // 5
    for name, part in (('train', slice(0, n)), ('test', slice(n, None))):
        labels = np.where(y[part] == 0, 10, y[part]).astype(np.uint8)[:, None]  # the digit 0 is class 10 there
        savemat(root / f'{name}_32x32.mat', {'X': imgs[part].transpose(1, 2, 3, 0), 'y': labels})


def write_stl10(root, imgs, y, n_unlabeled):
    "Bytes, channel first, then column by column; labels from 1; folds as lines of places"
    folder = root / 'stl10_binary'
    folder.mkdir(parents=True)
    raw = imgs.transpose(0, 3, 2, 1)
    n = (len(imgs) - n_unlabeled) * 4 // 5
    raw[:n].tofile(folder / 'train_X.bin')
    raw[n : len(imgs) - n_unlabeled].tofile(folder / 'test_X.bin')
    raw[len(imgs) - n_unlabeled :].tofile(folder / 'unlabeled_X.bin')
    (y[:n] + 1).astype(np.uint8).tofile(folder / 'train_y.bin')
    (y[n : len(imgs) - n_unlabeled] + 1).astype(np.uint8).tofile(folder / 'test_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join('airplane bird car cat deer dog horse monkey ship truck'.split()))
    (folder / 'fold_indices.txt').write_text('\n'.join(' '.join(str((10 * k + i) % n) for i in range(40)) for k in range(10)))


@pytest.fixture
def torchvision_files(tmp_path, monkeypatch, shapes):
    "A folder with all four, and no check that these are the originals"
    for module in (tv.cifar, tv.svhn, tv.stl10, tv.utils):
        monkeypatch.setattr(module, 'check_integrity', lambda *args, **kwargs: True)
    y = np.arange(200) % 10
    imgs = {32: shapes(400, 32), 96: shapes(130, 96)}
    write_cifar(tmp_path / 'sets' / 'cifar10', imgs[32][:200], y, False)
    write_cifar(tmp_path / 'sets' / 'cifar100', imgs[32], np.arange(400) % 100, True)
    write_svhn(tmp_path / 'sets' / 'svhn', imgs[32][:200], y)
    write_stl10(tmp_path / 'sets' / 'stl10', imgs[96], y[:100], 30)
    return tmp_path / 'sets', imgs


EXPECTED = dict(  # training and test images, pool, and the class of the first training image
    cifar10=(160, 40, 160, 'airplane'),
    cifar100=(320, 80, 320, 'kind 0'),
    svhn=(160, 40, 160, '0'),
    stl10=(80, 20, 110, 'airplane'),
)


@pytest.mark.parametrize('data', EXPECTED)
def test_torchvision_sets_train(torchvision_files, data):
    root, imgs = torchvision_files
    config = small(
        data=data,
        root=str(root),
        n_labels=100 if data == 'cifar100' else 20,
        steps=2,
        eval_every=1,
        network='wrn_10_1',
        views=experiment.ViewsConfig(device=data == 'svhn'),
    )
    images = load_images(config)
    n_train, n_test, n_pool, first = EXPECTED[data]
    labeled, pool = images.split(config.n_labels, 0)
    assert (len(images.train), len(images.test), len(pool)) == (n_train, n_test, n_pool)
    assert set(labeled) <= set(pool) and parent_label(images.train[0]) == first
    assert len(images.classes) == (100 if data == 'cifar100' else 10)
    own = imgs[96 if data == 'stl10' else 32]
    for i in (0, 17, n_train - 1):
        assert np.array_equal(np.array(images.opener(images.train[i])), own[i]), 'the image, the right way up'
    assert np.array_equal(np.array(images.opener(images.test[3])), own[n_train + 3])
    row = experiment.run(config, images)
    assert row['n_test'] == n_test and 0 <= row['accuracy'] <= 1
    scores = pd.read_csv(Path('experiments') / f'{data}_{config.n_labels}_fixed' / 'seed_0' / 'scores.csv')
    assert len(scores) == n_pool and scores.truth.notna().sum() == n_train


def test_stl10(torchvision_files):
    root, imgs = torchvision_files
    images = load_images(small(data='stl10', root=str(root)))
    first, fourth = (images.split(40, o)[0] for o in (0, 3))
    assert first == images.train[list(range(40))] and fourth == images.train[list(range(30, 70))], 'the official choices'
    assert len(images.split(20, 3)[0]) == 20, 'other numbers are drawn'
    with pytest.raises(experiment.CommandError, match='10 official choices of 40 labels'):
        images.split(40, 10)
    assert np.array_equal(np.array(images.opener(images.unlabeled[5])), imgs[96][105])
    assert {parent_label(o) for o in images.unlabeled} == {'unknown'}


def test_a_learner_trained_on_arrays(torchvision_files, tmp_path):
    "It is small, and opens files; workers get the arrays, also where they are no forks"
    root, imgs = torchvision_files
    config = small(data='cifar10', root=str(root), network='wrn_10_1', workers=1, steps=2, eval_every=2)
    learn = get_learner(config)
    quiet_fit(learn, 1)
    opener = next(o for o in learn.dls.valid.dataset.tls[0].tfms.fs if isinstance(o, ArrayImages))
    learn.export(tmp_path / 'learner.pkl')
    assert (tmp_path / 'learner.pkl').stat().st_size < 1_500_000
    assert learn.dls.valid_ds[0][0].size == (32, 32), 'they are still there'
    Image.fromarray(imgs[32][0]).save(tmp_path / 'a.png')
    loaded = load_learner(tmp_path / 'learner.pkl')
    with loaded.no_bar(), learn.no_bar():
        expected = learn.predict(PILImage.create(tmp_path / 'a.png'))[2]
        for o in (tmp_path / 'a.png', str(tmp_path / 'a.png'), PILImage.create(tmp_path / 'a.png')):
            torch.testing.assert_close(loaded.predict(o)[2], expected)
    assert pickle.loads(pickle.dumps(opener)).arrays == {}


def test_arrays_go_to_spawned_workers(monkeypatch):
    opener = ArrayImages({'train': np.zeros((1, 4, 4, 3), dtype=np.uint8)})
    monkeypatch.setattr(experiment, 'get_spawning_popen', lambda: object())
    assert pickle.loads(pickle.dumps(opener)).arrays['train'].shape == (1, 4, 4, 3)


def test_no_internet(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setattr(tv.cifar, 'download_and_extract_archive', offline)
    with pytest.raises(
        experiment.CommandError, match=r"data cifar10 can't be had \(URLError: .*no route.*connect to the internet, or put torchvision's files into"
    ):
        load_images(ExperimentConfig(root=str(tmp_path)))


@pytest.fixture
def folder(tmp_path):
    "Class folders: 8 colour images of each of two classes to train on, 4 to test on, 6 without a class"
    rng = np.random.default_rng(1)
    for part, n in (('train/red', 8), ('train/blue', 8), ('test/red', 4), ('test/blue', 4), ('unlabeled/some/where', 6)):
        (tmp_path / 'own' / part).mkdir(parents=True)
        for i in range(n):
            a = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            a[..., 0 if 'red' in part else 2] += 50
            Image.fromarray(a).save(tmp_path / 'own' / part / f'{i}.png')
    return tmp_path / 'own'


def test_a_folder_of_ones_own(folder):
    images = load_images(small(data=str(folder)))
    assert (len(images.train), len(images.test), len(images.unlabeled), images.grey) == (16, 8, 6, False)
    labeled, pool = images.split(4, 0)
    assert len(pool) == 22 and images.classes == ['blue', 'red']
    a = np.stack([np.array(Image.open(o)) for o in images.train]) / 255
    np.testing.assert_allclose(images.stats, (a.mean((0, 1, 2)), a.std((0, 1, 2))), rtol=1e-6)
    row = experiment.run(small(data=str(folder), n_labels=4, size=16, views=experiment.ViewsConfig(cache=True)))
    assert row['n_test'] == 8 and row['data'] == str(folder)
    assert Path('experiments/own_4_fixed/seed_0/scores.csv').exists()


def test_class_folders_without_a_test_set(folder):
    images = load_images(small(data=str(folder / 'train')))
    assert sorted(map(parent_label, images.test)) == ['blue', 'blue', 'red', 'red'] and len(images.train) == 12
    assert not set(images.test) & set(images.train)
    again = load_images(small(data=str(folder / 'train'), seed=5))
    assert again.test == images.test, 'the same for all seeds'


def test_mistakes_in_a_folder(folder, capsys):
    Image.new('RGB', (20, 16)).save(folder / 'train/red/wide.png')
    assert 'give size, as size=64' in errors(capsys, f'data={folder}', 'n_labels=4')
    assert load_images(small(data=str(folder), size=16)).stats
    (folder / 'test/green').mkdir()
    Image.new('RGB', (16, 16)).save(folder / 'test/green/0.png')
    assert "test/ has a class 'green'" in errors(capsys, f'data={folder}', 'n_labels=4', 'size=16')
    assert 'two classes or more' in errors(capsys, f'data={folder / "unlabeled"}')
    (folder / 'test').rename(folder / 'elsewhere')
    assert 'has train/, but no test/' in errors(capsys, f'data={folder}')


@pytest.mark.parametrize('part', ['train', 'test'])
def test_a_damaged_image_with_a_label(folder, capsys, part):
    (folder / part / 'blue/broken.png').write_bytes(b'no image')
    assert re.search(r"The labelled image .*broken\.png can't be opened \(UnidentifiedImageError\): mend it", errors(capsys, f'data={folder}', 'n_labels=4'))
    assert "can't be opened" in errors(capsys, f'data={folder}', 'n_labels=4', 'size=16')


def test_grey_images(tmp_path):
    for k, c in enumerate('ab'):
        (tmp_path / 'grey' / c).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((16, 16), 40 * k + i, dtype=np.uint8)).save(tmp_path / 'grey' / c / f'{i}.png')
    config = small(data=str(tmp_path / 'grey'), n_labels=4)
    images = load_images(config)
    assert images.grey and len(images.stats[0]) == 1
    assert get_learner(config, images).model[0][0].in_channels == 1


# --- runs --------------------------------------------------------------------------------------------------------------------------------


def test_what_a_run_writes(capsys, monkeypatch):
    assert main([*SMALL, 'seeds=2', 'steps=2', 'eval_every=1', 'track=tensorboard']) == 0
    said, root = capsys.readouterr().out, Path('experiments/digits_20_fixed')
    for seed in (0, 1):
        files = {o.name for o in (root / f'seed_{seed}').iterdir()}
        assert {
            'config.yaml',
            'history.csv',
            'scores.csv',
            'accuracy.png',
            'training.png',
            'pseudo_labels.png',
            'acceptance.png',
            'learner.pkl',
            'result.json',
            'tensorboard',
        } <= files
        assert not [o for o in files if o.endswith('.tmp')]
    rows, history = pd.read_csv(root / 'results.csv'), pd.read_csv(root / 'seed_1/history.csv')
    assert rows.seed.tolist() == [0, 1] and (rows.n_test == 497).all()
    assert rows.accuracy[1] == history.accuracy.iloc[-1] and rows.raw_accuracy[1] == history.raw_accuracy.iloc[-1]
    assert rows.median_20.isna().all(), 'there are no 20 evaluations'
    assert (
        f'averaged weights, last step: {100 * rows.accuracy.mean():.2f} ± {100 * np.std(rows.accuracy, ddof=1):.2f} %' in said
        and '2 seeds, 497 test images' in said
    )
    loaded = load_learner(root / 'seed_0/learner.pkl')
    with loaded.no_bar():
        assert len(loaded.predict(load_images(small()).test[0])[2]) == 10
    scores = pd.read_csv(root / 'seed_0/scores.csv')
    assert len(scores) == 1300 and set(scores) == {'item', 'predicted', 'confidence', 'weight', 'truth', 'right'}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / 'seed_0/tensorboard'))
    events.Reload()
    assert {'accuracy', 'raw_accuracy', 'mask_rate', 'train_loss'} <= set(events.Tags()['scalars'])
    assert {o.step for o in events.Scalars('train_loss')} == {1, 2} and len(events.Scalars('raw_accuracy')) == 2

    monkeypatch.setattr(experiment.Run, 'fit', lambda self: pytest.fail('what is finished is not trained again'))
    assert main([*SMALL, 'seeds=2', 'steps=2', 'eval_every=1', 'track=tensorboard', 'workers=1']) == 0
    assert 'seed 1: finished before' in capsys.readouterr().out
    assert 'holds a run with another bs (4 there, 8 here)' in errors(capsys, *SMALL, 'steps=2', 'eval_every=1', 'track=tensorboard', 'bs=8')


def test_result_and_summary(tmp_path):
    "By hand: the last row, the median of the last 20, mean and standard deviation with n - 1"
    run = experiment.Run(small(name='x'))
    run.folder.mkdir(parents=True)
    acc = [0.1, 0.2] + [0.5] * 9 + [0.7] * 10 + [0.4]
    history = pd.DataFrame(
        dict(epoch=range(22), accuracy=acc, raw_accuracy=[0.3] * 22, mask_rate=[0.9] * 22, pseudo_acc=[0.8] * 22, time=['01:00'] * 20 + ['00:30', '1:00:30'])
    )
    history.to_csv(run.folder / 'history.csv', index=False)
    row = run.result()
    assert (row['accuracy'], row['raw_accuracy'], row['mask_rate'], row['n_test'], row['minutes']) == (0.4, 0.3, 0.9, 497, 81)
    assert row['median_20'] == pytest.approx(0.6), 'of nine 0.5, ten 0.7 and 0.4: the mean of the two in the middle'
    said = experiment.describe_results(pd.DataFrame([row, {**row, 'seed': 1, 'accuracy': 0.6}]))
    assert 'averaged weights, last step: 50.00 ± 14.14 %' in said and 'median of the last 20 evaluations: 60.00 ± 0.00 %' in said


class Stop(Callback):
    "Ctrl-C, or an error, in the batch with this number"

    order, run_valid = 75, False

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error = at, error

    def after_batch(self):
        if self.train_iter == self.at:
            raise self.error('stopped here')


def stopping(monkeypatch, at):
    "The next run is stopped in this step; those after it are not"
    real = experiment.Run._tracking

    def tracking(self):
        monkeypatch.setattr(experiment.Run, '_tracking', real)
        return [*real(self), Stop(at)]

    monkeypatch.setattr(experiment.Run, '_tracking', tracking)


def weights(run):
    return torch.cat([p.flatten() for p in load_learner(run / 'learner.pkl').model.parameters()])


def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    assert main([*SMALL, 'name=whole']) == 0
    stopping(monkeypatch, 5)  # in the third epoch
    assert main([*SMALL, 'name=cut']) == 130
    assert 'the same command goes on' in capsys.readouterr().err
    cut = Path('experiments/cut/seed_0')
    assert len(pd.read_csv(cut / 'history.csv')) == 2 and not (cut / 'result.json').exists()
    assert main([*SMALL, 'name=cut']) == 0
    assert '2 of 3 epochs are done, going on' in capsys.readouterr().out
    whole = Path('experiments/whole/seed_0')
    a, b = (pd.read_csv(o / 'history.csv').drop(columns='time') for o in (whole, cut))
    pd.testing.assert_frame_equal(a, b)
    assert torch.equal(weights(whole), weights(cut))


def test_what_was_stopped_before_its_first_evaluation_may_begin_anew(monkeypatch, capsys):
    stopping(monkeypatch, 1)
    assert main(SMALL) == 130
    assert main([*SMALL, 'bs=5']) == 0
    capsys.readouterr()
    assert 'holds a run with another bs (5 there' in errors(capsys, *SMALL)
    root = Path('experiments/digits_20_fixed')
    shutil.copytree(root / 'seed_0', root / 'seed_8')
    assert 'seed_8 holds a run with another bs' in errors(capsys, *SMALL, 'seed=7', 'seeds=2')
    assert not (root / 'seed_7').exists(), 'it is said before the first seed is trained'
    assert main([*SMALL, 'bs=5', 'track=tensorboard']) == 0, 'it is not trained by its tracker'
    assert 'finished before' in capsys.readouterr().out


def test_a_folder_by_another_path(folder, capsys, monkeypatch):
    args = [o for o in SMALL if not o.startswith(('data', 'n_labels'))] + ['n_labels=4', 'name=own']
    assert main([f'data={folder}', *args]) == 0
    assert main([f'data={os.path.relpath(folder)}', *args]) == 0
    assert 'finished before' in capsys.readouterr().out


def test_stopped_while_it_writes(monkeypatch, capsys):
    "All is trained: only what was not written is written"
    real = experiment.save_csv
    monkeypatch.setattr(experiment, 'save_csv', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(SMALL) == 130
    monkeypatch.setattr(experiment, 'save_csv', real)
    assert main(SMALL) == 0
    assert 'nothing is left to train' in capsys.readouterr().out and Path('experiments/digits_20_fixed/seed_0/result.json').exists()


def test_supervised_run():
    assert main([*SMALL, 'policy=supervised']) == 0
    root = Path('experiments/digits_20_supervised/seed_0')
    assert 'mask_rate' not in json.loads((root / 'result.json').read_text()) and len(pd.read_csv(root / 'scores.csv')) == 1300
    assert not (root / 'training.png').exists()


def test_console_command():
    "In a process of its own, as the console calls it"
    code = 'import sys; from fixmatch_fastai.experiment import main; sys.exit(main())'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'data=digits', 'n_label=3'], capture_output=True, text=True, timeout=120)
    assert res.returncode == 2 and res.stderr.strip().endswith('n_label is not known: did you mean n_labels?') and 'Traceback' not in res.stderr


@pytest.mark.parametrize('name', ['wandb', 'mlflow', 'tensorboard'])
def test_a_tracker_that_is_not_installed(capsys, monkeypatch, name):
    real = experiment.importlib.util.find_spec
    monkeypatch.setattr(experiment.importlib.util, 'find_spec', lambda o, *args: None if o == name else real(o, *args))
    assert f'track={name} needs the package {name}, which is not installed: `pip install {name}`, or leave it out.' in errors(capsys, *SMALL, f'track={name}')


# --- MLflow ------------------------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    "A real MLflow server on loopback"
    pytest.importorskip('mlflow', reason='mlflow is not installed')
    folder, port = tmp_path_factory.mktemp('mlflow'), free_port()
    uri = f'http://127.0.0.1:{port}'
    args = f'server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{folder}/server.db --artifacts-destination {folder}/files'
    with (folder / 'log').open('w') as log:
        process = subprocess.Popen([sys.executable, '-m', 'mlflow', *args.split()], stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        for _ in range(240):
            assert process.poll() is None, (folder / 'log').read_text()
            try:
                if urllib.request.urlopen(f'{uri}/health', timeout=1).status == 200:
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f'the server does not answer: {(folder / "log").read_text()[-2000:]}')
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(server)


@pytest.fixture
def tracker(server, request):
    def make(**kwargs):
        return experiment.MLflowCallback(**{'experiment': request.node.name, 'tracking_uri': server, **kwargs})

    return make


def runs(client, name):
    found = client.get_experiment_by_name(name)
    return [] if found is None else client.search_runs([found.experiment_id])


def steps(client, run_id, name='step/train_loss'):
    return [o.step for o in client.get_metric_history(run_id, name)]


def test_server_is_told_everything(client, tracker, make_learner, request):
    "By a learner of anyone: parameters, each step, each epoch"
    learn, cb = make_learner(cbs=[ModelEMA(0.5)]), tracker(run_name='first', params={'colour': 'red'}, experiment='birds')
    quiet_fit(learn, 2, cbs=cb)
    (run,) = runs(client, 'birds')
    assert (run.info.status, run.info.run_name, run.info.run_id) == ('FINISHED', 'first', cb.run_id)
    params = run.data.params
    assert (params['colour'], params['epochs'], params['steps'], params['bs'], params['ema_decay']) == ('red', '2', '6', '4', '0.5')
    assert params['fixmatch.policy'] == 'FixedThreshold(threshold=0.2, T=1.0)' and params['fixmatch.unlabeled_images'] == '100'
    history = learn.fix_match.history
    for name in ('loss_x', 'loss_u', 'mask_rate'):
        found = client.get_metric_history(cb.run_id, f'step/{name}')
        assert [o.step for o in found] == [1, 2, 3, 4, 5, 6]
        assert [o.value for o in found] == pytest.approx(history[name].tolist())
    known = history.pseudo_acc[history.pseudo_acc.notna()]
    assert [o.value for o in client.get_metric_history(cb.run_id, 'step/pseudo_acc')] == pytest.approx(known.tolist())
    assert [o.value for o in client.get_metric_history(cb.run_id, 'step/lr')] == pytest.approx(learn.recorder.lrs)
    assert [o.value for o in client.get_metric_history(cb.run_id, 'step/threshold')] == pytest.approx([0.2] * 6)
    values = pd.DataFrame([list(v) for v in learn.recorder.values], columns=learn.recorder.metric_names[1:-1])
    found = client.get_metric_history(cb.run_id, 'accuracy')
    assert [o.step for o in found] == [3, 6] and [o.value for o in found] == pytest.approx(values.accuracy.tolist())
    assert '_with_events' not in vars(learn), 'nothing is left behind'


def test_few_requests(tracker, make_learner, make_dls, monkeypatch):
    "The steps of an epoch in one request, and none while it is trained"
    import mlflow

    sent, real = [], mlflow.MlflowClient.log_batch
    learn = make_learner(dls=make_dls(n_batches=20))
    monkeypatch.setattr(mlflow.MlflowClient, 'log_batch', lambda self, *args, **kwargs: (sent.append(learn.train_iter), real(self, *args, **kwargs)))
    quiet_fit(learn, 2, cbs=tracker())
    assert sent == [0, 20, 40]


def test_thresholds_of_classes(client, tracker, make_learner, request):
    from fixmatch_fastai.all import FreeMatch

    learn, cb = make_learner(fixmatch=dict(policy=FreeMatch(), threshold=0.95)), tracker(every=2)
    quiet_fit(learn, 2, cbs=cb)
    low, mean, high = ([o.value for o in client.get_metric_history(cb.run_id, f'step/threshold_{k}')] for k in ('min', 'mean', 'max'))
    assert steps(client, cb.run_id) == [2, 4, 6] and len(low) == 3
    assert all(a <= b <= c for a, b, c in zip(low, mean, high)) and high[-1] == pytest.approx(learn.fix_match.policy.thresholds().max().item())


def test_several_fits_are_one_run(client, tracker, make_learner, request):
    cb = tracker()
    learn = make_learner(cbs=[cb])
    quiet_fit(learn, 1)
    quiet_fit(learn, 2)
    (run,) = runs(client, request.node.name)
    assert steps(client, run.info.run_id) == list(range(1, 10)) and run.info.status == 'FINISHED'


@pytest.mark.parametrize('error, status', [(KeyboardInterrupt, 'KILLED'), (ZeroDivisionError, 'FAILED'), (CancelFitException, 'FINISHED')])
def test_how_a_run_ends(client, tracker, make_learner, error, status):
    cb = tracker()
    learn = make_learner(cbs=[cb, Stop(5, error)])
    try:
        quiet_fit(learn, 2)
    except (KeyboardInterrupt, ZeroDivisionError):
        assert status != 'FINISHED'
    run = client.get_run(cb.run_id)
    assert run.info.status == status and run.info.end_time
    assert steps(client, cb.run_id) == [1, 2, 3, 4, 5]
    assert '_with_events' not in vars(learn)
    learn.remove_cb(learn.stop)
    quiet_fit(learn, 1)
    assert client.get_run(cb.run_id).info.status == 'FINISHED', 'the learner trains on, in the same run'


def test_what_is_no_fit_is_no_run(client, tracker, make_learner, request, tmp_path):
    learn = make_learner(cbs=[tracker()])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
        learn.validate()
        learn.get_preds()
    assert runs(client, request.node.name) == []
    quiet_fit(learn, 1)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.lr_find(num_it=3, show_plot=False)
    (run,) = runs(client, request.node.name)
    assert steps(client, run.info.run_id) == [1, 2, 3] and run.info.status == 'FINISHED'


def test_export_and_pickle(client, tracker, make_learner, tmp_path):
    cb = tracker()
    learn = make_learner(cbs=[cb])
    quiet_fit(learn, 1)
    learn.export(tmp_path / 'learner.pkl')
    loaded = load_learner(tmp_path / 'learner.pkl')
    own = next(o for o in loaded.cbs if isinstance(o, experiment.MLflowCallback))
    assert own._client is None and not own._unsent and own.run_id == cb.run_id
    cb.log_files(tmp_path / 'learner.pkl')
    assert [o.path for o in client.list_artifacts(cb.run_id)] == ['learner.pkl']
    quiet_fit(learn, 1)
    assert steps(client, cb.run_id) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('on_learner', [True, False])
def test_beside_a_checkpoint(client, tracker, make_learner, on_learner, request):
    "A fit that is resumed elsewhere goes on with the same run, and tells no step twice"
    learn = make_learner()
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 3, cbs=[SaveFixMatch('x', resume=True), tracker(), Stop(5)])  # one epoch is saved
    (run,) = runs(client, request.node.name)
    assert run.info.status == 'KILLED' and steps(client, run.info.run_id) == [1, 2, 3, 4, 5]
    cbs = [SaveFixMatch('x', resume=True), tracker()]
    learn = make_learner(path=learn.path, cbs=cbs if on_learner else ())
    quiet_fit(learn, 3, cbs=None if on_learner else cbs)
    (run,) = runs(client, request.node.name)
    assert steps(client, run.info.run_id) == list(range(1, 10)) and run.info.status == 'FINISHED'
    assert [o.step for o in client.get_metric_history(run.info.run_id, 'valid_loss')] == [3, 6, 9]
    assert '_with_events' not in vars(learn)


def test_a_server_that_is_away(make_learner, capsys):
    "One warning, and training as ever"
    cb = experiment.MLflowCallback(tracking_uri=f'http://127.0.0.1:{free_port()}')
    learn = make_learner(cbs=[cb])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        quiet_fit(learn, 2)
        cb.log_files('nothing')
    (said,) = [str(o.message) for o in said if 'MLflow' in str(o.message)]
    assert said.startswith('MLflow at http://127.0.0.1:') and 'training goes on' in said
    assert len(learn.recorder.values) == 2 and cb.run_id is None
    assert 'MLFLOW_HTTP_REQUEST_MAX_RETRIES' not in os.environ


def test_a_server_that_comes_back(client, tracker, make_learner, monkeypatch):
    "Nothing is lost, nothing is there twice"
    import mlflow

    learn, cb = make_learner(), tracker()
    for name in ('log_batch', 'create_run'):
        real = getattr(mlflow.MlflowClient, name)

        def gone_in_the_middle(self, *args, real=real, **kwargs):
            if learn.epoch == 1:
                raise ConnectionError('gone')
            return real(self, *args, **kwargs)

        monkeypatch.setattr(mlflow.MlflowClient, name, gone_in_the_middle)
    with pytest.warns(UserWarning, match=r"can't be written to \(ConnectionError: gone\)"):
        quiet_fit(learn, 3, cbs=cb)
    assert steps(client, cb.run_id) == list(range(1, 10)) and client.get_run(cb.run_id).info.status == 'FINISHED'
    assert [o.step for o in client.get_metric_history(cb.run_id, 'valid_loss')] == [3, 6, 9]


def test_losses_that_are_not_finite(client, tracker, make_learner):
    learn, cb = make_learner(), tracker()
    learn.loss_func = lambda pred, y: pred.sum() * float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learn, 1, cbs=cb)
    assert steps(client, cb.run_id, 'step/loss_x') == [1, 2, 3]
    assert all(math.isnan(o.value) for o in client.get_metric_history(cb.run_id, 'step/loss_x'))


def test_other_processes_say_nothing(client, tracker, make_learner, monkeypatch, request):
    monkeypatch.setattr(experiment, 'rank_distrib', lambda: 1)
    cb = tracker()
    quiet_fit(make_learner(cbs=[cb]), 1)
    cb.log_files('nothing')
    assert runs(client, request.node.name) == [] and cb.run_id is None


def test_without_mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ImportError, match=r'MLflowCallback needs MLflow: `pip install mlflow`'):
        experiment.MLflowCallback()


def test_every_is_a_number_of_steps(server):
    with pytest.raises(ValueError, match='1 or more, but got 0'):
        experiment.MLflowCallback(every=0)


def test_a_local_database(make_learner, monkeypatch):
    "Without a server: two lines, and no word of how the database is made"
    pytest.importorskip('mlflow', reason='mlflow is not installed')
    from mlflow import MlflowClient

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = make_learner()
        cb = experiment.MLflowCallback(experiment='x')
        quiet_fit(learn, 1, cbs=cb)
    assert not [o for o in said if 'mlflow' in str(o.filename) or 'MLflow' in str(o.message)]
    cb.log_files(learn.path / 'mlflow.db')
    own = MlflowClient(f'sqlite:///{learn.path}/mlflow.db')
    assert steps(own, cb.run_id) == [1, 2, 3]
    assert cb.uri == f'sqlite:///{learn.path.resolve()}/mlflow.db', 'also when the fit is over'
    assert (learn.path / 'mlartifacts' / 'x' / cb.run_id / 'artifacts' / 'mlflow.db').exists() and not Path('mlruns').exists()


def test_a_tracked_experiment(client, server, monkeypatch, capsys):
    "Interrupted and resumed, on a server that an environment variable names"
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server)
    args = [*SMALL, 'track=mlflow', 'name=tracked', 'policy=flexmatch']
    stopping(monkeypatch, 5)
    assert main(args) == 130
    (run,) = runs(client, 'tracked')
    assert run.info.status == 'KILLED'
    assert main(args) == 0
    (run,) = runs(client, 'tracked')
    assert (run.info.status, run.info.run_name) == ('FINISHED', 'seed_0') and steps(client, run.info.run_id) == [1, 2, 3, 4, 5, 6]
    assert (run.data.params['policy'], run.data.params['optimizer.lr'], run.data.params['optimizer']) == ('flexmatch', '0.03', 'nesterov_sgd')
    folder = Path('experiments/tracked/seed_0')
    files = {o.path for o in client.list_artifacts(run.info.run_id)}
    assert (
        files
        == {o.name for o in folder.iterdir() if o.is_file() and o.name != 'result.json'}
        >= {'learner.pkl', 'scores.csv', 'config.yaml', 'pseudo_labels.png'}
    )
    row = json.loads((folder / 'result.json').read_text())
    assert {k: run.data.metrics[k] for k in ('accuracy', 'raw_accuracy')} == pytest.approx({k: row[k] for k in ('accuracy', 'raw_accuracy')})
    here = client.download_artifacts(run.info.run_id, 'scores.csv', '.')
    assert Path(here).read_bytes() == (folder / 'scores.csv').read_bytes()
